from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster

from aligndet.data.coco import Category
from aligndet.evaluation.coco import FIGURES, CocoEvaluator

CATEGORIES = [Category(3, "bird"), Category(7, "fish"), Category(9, "never seen")]


def random_case(seed: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = [], []
    for _ in range(6):
        corner = torch.rand(5, 2, generator=generator) * 150
        boxes = torch.cat([corner, corner + 5 + torch.rand(5, 2, generator=generator) * 120], 1)
        labels = torch.randint(1, 3, (5,), generator=generator)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        crowd = torch.tensor([0, 0, 0, 0, 1])
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowd, "area": area})
        noise = torch.randn(5, 4, generator=generator) * 6
        scores = torch.rand(5, generator=generator)
        predictions.append({"boxes": boxes + noise, "labels": labels, "scores": scores})
    return predictions, targets


@pytest.mark.parametrize("filled", [1.0, 0.4])  # share of its box that an object's mask covers
@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_cocos_own(seed: int, filled: float) -> None:
    predictions, targets = random_case(seed)
    for target in targets:
        target["area"] *= filled
    evaluator = CocoEvaluator(CATEGORIES)
    for prediction, target in zip(predictions, targets, strict=True):
        evaluator.update([prediction], [target])
    result = evaluator.compute()

    def rows(items: list[dict[str, torch.Tensor]], key: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for image, item in enumerate(items):
            for i, (x0, y0, x1, y1) in enumerate(item["boxes"].tolist()):
                row: dict[str, Any] = {
                    "id": len(found) + 1,
                    "image_id": image,
                    "category_id": int(item["labels"][i]),
                }
                area = item["area"][i].item() if "area" in item else (x1 - x0) * (y1 - y0)
                row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": 0}
                found.append(row | {key: item[key][i].item()})
        return found

    truth = COCO(
        {
            "images": [{"id": i} for i in range(6)],
            "annotations": rows(targets, "iscrowd"),
            "categories": [{"id": i + 1, "name": c.name} for i, c in enumerate(CATEGORIES)],
        }
    )
    found = [row | {"score": row["scores"]} for row in rows(predictions, "scores")]
    direct = COCOeval_faster(truth, truth.loadRes(found), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    for name, expected in zip(FIGURES, direct.stats[:12], strict=True):
        known = expected if expected >= 0 else math.nan
        assert result.figures[name] == pytest.approx(known, abs=1e-6, nan_ok=True), name


def test_perfect_and_empty_predictions() -> None:
    _, targets = random_case(1)
    targets = [{k: v[:4] for k, v in target.items()} for target in targets]
    perfect = CocoEvaluator(CATEGORIES)
    perfect.update(
        [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(4)} for t in targets], targets
    )
    result = perfect.compute()
    assert result.figures["AP"] == pytest.approx(1.0)
    assert result.ap_by_class["bird"] == pytest.approx(1.0)
    assert math.isnan(result.ap_by_class["never seen"])
    assert result.to_dict()["AP_by_class"]["never seen"] is None
    assert "bird" in result.table()

    perfect.reset()
    with pytest.raises(ValueError, match="no image"):
        perfect.compute()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    perfect.update([none] * len(targets), targets)
    assert perfect.compute().figures["AP"] == 0.0


def test_classes_of_one_name_are_told_apart() -> None:
    evaluator = CocoEvaluator([Category(0, "bird"), Category(1, "bird")])
    box = {"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([1])}
    evaluator.update([{**box, "scores": torch.ones(1)}], [box])
    assert evaluator.compute().to_dict()["AP_by_class"] == {"bird (0)": 1.0, "bird (1)": None}


def test_images_without_any_object_have_no_figures() -> None:
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    evaluator = CocoEvaluator(CATEGORIES)
    evaluator.update([{**none, "scores": torch.zeros(0)}], [none])
    assert set(evaluator.compute().figures) == set(FIGURES)
    assert all(math.isnan(value) for value in evaluator.compute().figures.values())


def test_what_a_detector_finds_in_a_crowd_costs_nothing() -> None:
    target = {
        "boxes": torch.tensor([[0.0, 0.0, 50.0, 50.0], [100.0, 100.0, 200.0, 200.0]]),
        "labels": torch.tensor([1, 1]),
        "iscrowd": torch.tensor([0, 1]),
    }
    found = torch.tensor([[0.0, 0.0, 50.0, 50.0], [110.0, 110.0, 150.0, 150.0], [150.0, 150.0, 190.0, 190.0]])
    prediction = {
        "boxes": found,
        "labels": torch.ones(3, dtype=torch.int64),
        "scores": torch.tensor([0.5, 0.9, 0.8]),
    }
    evaluator = CocoEvaluator(CATEGORIES)
    evaluator.update([prediction], [target])
    assert evaluator.compute().figures["AP"] == pytest.approx(1.0)
