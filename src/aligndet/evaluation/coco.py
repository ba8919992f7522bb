"""COCO's twelve figures and average precision by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from aligndet.data.coco import Category

FIGURES = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
    "AR1": "mar_1",
    "AR10": "mar_10",
    "AR100": "mar_100",
    "ARs": "mar_small",
    "ARm": "mar_medium",
    "ARl": "mar_large",
}
"""The field's names, and torchmetrics'."""


@dataclass(frozen=True)
class CocoResult:
    """The figures in 0..1; nan where the data have no object of that size or class."""

    figures: dict[str, float]
    ap_by_class: dict[str, float]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """All figures, what JSON can hold; nan becomes None."""
        by_class = {name: _known(value) for name, value in self.ap_by_class.items()}
        return {
            **{k: _known(v) for k, v in self.figures.items()},
            "AP_by_class": by_class,
            "images": self.images,
        }

    def table(self) -> str:
        """The figures in percent, as text."""
        lines = ["  ".join(f"{name:>5}" for name in self.figures)]
        lines.append("  ".join(f"{100 * value:5.1f}" for value in self.figures.values()))
        width = max(map(len, self.ap_by_class), default=0)
        lines += ["", "AP by class"]
        lines += [f"  {name:<{width}}  {100 * value:5.1f}" for name, value in self.ap_by_class.items()]
        return "\n".join(lines)


class CocoEvaluator:
    """Collects predictions and targets in torchvision's form; the sums are faster-coco-eval's."""

    def __init__(self, categories: Sequence[Category]) -> None:
        """Starts empty.

        Args:
            categories: In label order.
        """
        self.categories = tuple(categories)
        self.images = 0
        # every process sees all validation images: nothing to gather
        self._metric = MeanAveragePrecision(
            iou_type="bbox",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),  # torchmetrics' own are rounded to float32
            class_metrics=True,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        self._metric.warn_on_many_detections = False

    def update(self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        """Adds images.

        Args:
            predictions: Boxes (n, 4) xyxy pixels, labels (n,), scores (n,) of each.
            targets: Boxes, labels, and if known iscrowd and area of each.
        """
        keys = ("boxes", "labels", "scores")
        self._metric.update(
            [{key: prediction[key].detach().cpu() for key in keys} for prediction in predictions],
            [{k: v.detach().cpu() for k, v in target.items() if k != "image_id"} for target in targets],
        )
        self.images += len(predictions)

    def compute(self) -> CocoResult:
        """Sums up.

        Raises:
            ValueError: If no image was added.
        """
        if self.images == 0:
            raise ValueError("no image was evaluated")
        result = self._metric.compute()
        figures = {name: _figure(result[key]) for name, key in FIGURES.items()}
        by_label = dict(
            zip(result["classes"].flatten().tolist(), result["map_per_class"].flatten().tolist(), strict=True)
        )
        by_class = {
            name: _figure(torch.tensor(by_label.get(position + 1, -1.0)))
            for position, name in enumerate(_distinct_names(self.categories))
        }
        return CocoResult(figures, by_class, self.images)

    def reset(self) -> None:
        """Starts anew."""
        self._metric.reset()
        self.images = 0


def _distinct_names(categories: Sequence[Category]) -> list[str]:
    """Names of the classes; those that share one get their id, too."""
    uses = Counter(category.name for category in categories)
    return [c.name if uses[c.name] == 1 else f"{c.name} ({c.id})" for c in categories]


def _figure(value: Tensor) -> float:
    return float(value) if float(value) >= 0 else float("nan")  # -1 stands for "nothing to measure"


def _known(value: float) -> float | None:
    return None if value != value else value
