"""COCO's twelve figures and average precision by class, of boxes and of masks."""

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
from aligndet.evaluation.details import Details, without_nan
from aligndet.evaluation.inference import binary_masks
from aligndet.processes import all_gather_items

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

    figures: dict[str, float]  # of boxes: AP, AP50, ...; and if masks were measured, mask_AP, mask_AP50, ...
    ap_by_class: dict[str, float]
    images: int
    mask_ap_by_class: dict[str, float] | None = None
    details: Details | None = None  # of boxes, if asked for

    def to_dict(self) -> dict[str, Any]:
        """All figures, in a form that JSON can hold; nan becomes None."""
        result: dict[str, Any] = without_nan(self.figures)
        result["AP_by_class"] = without_nan(self.ap_by_class)
        if self.mask_ap_by_class is not None:
            result["mask_AP_by_class"] = without_nan(self.mask_ap_by_class)
        if self.details is not None:
            result["details"] = self.details.to_dict()
        return {**result, "images": self.images}

    def table(self) -> str:
        """The figures in percent, as text."""
        kinds = {"": self.ap_by_class}
        if self.mask_ap_by_class is not None:
            kinds["mask_"] = self.mask_ap_by_class
        lines = ["  ".join(f"{name:>5}" for name in FIGURES)]
        for kind in kinds:
            values = [self.figures[kind + name] for name in FIGURES]
            label = f"  {'masks' if kind else 'boxes'}" if len(kinds) > 1 else ""
            lines.append("  ".join(f"{100 * value:5.1f}" for value in values) + label)
        width = max(map(len, self.ap_by_class), default=0)
        lines += ["", "AP by class" + " (boxes, masks)" * (len(kinds) > 1)]
        for name in self.ap_by_class:
            values = [by_class[name] for by_class in kinds.values()]
            lines.append(f"  {name:<{width}}" + "".join(f"  {100 * value:5.1f}" for value in values))
        if self.details is not None:
            lines += ["", self.details.table()]
        return "\n".join(lines)


class CocoEvaluator:
    """Collects predictions and targets in torchvision's form; faster-coco-eval computes the figures.

    In a run of several processes each adds its part of the images.
    """

    def __init__(self, categories: Sequence[Category], *, masks: bool = False) -> None:
        """Starts empty.

        Args:
            categories: In label order.
            masks: Measure masks as well as boxes.
        """
        self.categories, self.masks = tuple(categories), masks
        self.images = 0
        self._metric = MeanAveragePrecision(
            iou_type=("bbox", "segm") if masks else "bbox",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),  # torchmetrics' own are rounded to float32
            class_metrics=True,
            backend="faster_coco_eval",
            sync_on_compute=False,  # it would gather image by image, and with GPUs only what is on them
        )
        self._metric.warn_on_many_detections = False

    def update(self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        """Adds images.

        Args:
            predictions: Boxes (n, 4) xyxy pixels, labels (n,), scores (n,) of each, and masks in a form of
                `binary_masks` if they are measured.
            targets: Boxes, labels, and if known iscrowd and area of each, and masks (n, H, W) if they are
                measured.
        """
        found = [{key: p[key].detach().cpu() for key in ("boxes", "labels", "scores")} for p in predictions]
        if self.masks:
            for item, prediction in zip(found, predictions, strict=True):
                item["masks"] = binary_masks(prediction["masks"].detach()).cpu()
        self._metric.update(found, [{k: v.detach().cpu() for k, v in target.items()} for target in targets])
        self.images += len(predictions)

    def compute(self) -> CocoResult:
        """Computes the figures over the images of all processes; every process has to call it.

        Raises:
            ValueError: If no image was added.
        """
        for name, state in self._metric.metric_state.items():
            setattr(self._metric, name, all_gather_items(list(state)))
        self.images = sum(all_gather_items([self.images]))
        if self.images == 0:
            raise ValueError("no image was evaluated")
        result = self._metric.compute()
        if not self.masks:
            return CocoResult(_figures(result, "", ""), self._by_class(result, ""), self.images)
        return CocoResult(
            _figures(result, "bbox_", "") | _figures(result, "segm_", "mask_"),
            self._by_class(result, "bbox_"),
            self.images,
            self._by_class(result, "segm_"),
        )

    def _by_class(self, result: dict[str, Tensor], prefix: str) -> dict[str, float]:
        values = result[f"{prefix}map_per_class"].flatten()
        by_label = dict(zip(result["classes"].flatten().tolist(), values, strict=True))
        nothing = torch.tensor(-1.0)
        return {
            name: _figure(by_label.get(position + 1, nothing))
            for position, name in enumerate(distinct_names(self.categories))
        }

    def reset(self) -> None:
        """Starts anew."""
        self._metric.reset()
        self.images = 0


def distinct_names(categories: Sequence[Category]) -> list[str]:
    """Names of the classes; those that share one get their id, too."""
    uses = Counter(category.name for category in categories)
    return [c.name if uses[c.name] == 1 else f"{c.name} ({c.id})" for c in categories]


def _figures(result: dict[str, Tensor], prefix: str, name: str) -> dict[str, float]:
    return {name + ours: _figure(result[prefix + theirs]) for ours, theirs in FIGURES.items()}


def _figure(value: Tensor) -> float:
    return float(value) if float(value) >= 0 else float("nan")  # -1 stands for "nothing to measure"
