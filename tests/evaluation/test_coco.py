from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster

from aligndet.data.coco import Category
from aligndet.data.rle import encode
from aligndet.evaluation.coco import FIGURES, CocoEvaluator
from aligndet.evaluation.inference import binary_masks

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


def masked_case(seed: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Boxes filled but for a corner, which is another one in half of the predictions."""
    predictions, targets = random_case(seed)
    for prediction, target in zip(predictions, targets, strict=True):
        for item in (prediction, target):
            x0, y0, x1, y1 = item["boxes"].clamp(0, 280).T
            item["boxes"] = torch.stack([x0, y0, torch.maximum(x1, x0 + 4), torch.maximum(y1, y0 + 4)], 1)
            x0, y0, x1, y1 = item["boxes"].T[:, :, None, None]
            y, x = torch.meshgrid(torch.arange(280.0), torch.arange(280.0), indexing="ij")
            item["masks"] = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
            below, right = y > (y0 + y1) / 2, x > (x0 + x1) / 2
            if item is prediction:
                right[::2] = ~right[::2]
            item["masks"] &= ~(below & right)
        target["area"] = target["masks"].sum((1, 2)).float()
        prediction["masks"] = prediction["masks"][:, None] * 0.9  # probabilities, as torchvision gives them
    return predictions, targets


@pytest.mark.parametrize("seed", range(2))
def test_figures_of_masks_equal_cocos_own(seed: int) -> None:
    predictions, targets = masked_case(seed)
    evaluator = CocoEvaluator(CATEGORIES, masks=True)
    boxes = CocoEvaluator(CATEGORIES)
    for prediction, target in zip(predictions, targets, strict=True):
        evaluator.update([prediction], [target])
        boxes.update([prediction], [target])
    result, boxes_alone = evaluator.compute(), boxes.compute()
    assert {k: v for k, v in result.figures.items() if k in FIGURES} == pytest.approx(
        boxes_alone.figures, nan_ok=True
    )
    assert result.ap_by_class == pytest.approx(boxes_alone.ap_by_class, nan_ok=True)

    def rows(items: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for image, item in enumerate(items):
            masks = binary_masks(item["masks"])
            segmentations = encode(masks.numpy()).segmentations()
            for i, segmentation in enumerate(segmentations):
                row: dict[str, Any] = {"id": len(found) + 1, "image_id": image}
                row |= {
                    "category_id": int(item["labels"][i]),
                    "segmentation": segmentation,
                    "area": int(masks[i].sum()),
                }
                row["iscrowd"] = int(item["iscrowd"][i]) if "iscrowd" in item else 0
                found.append(row | {"score": float(item["scores"][i]) if "scores" in item else 1.0})
        return found

    sizes = [{"id": i, "height": 280, "width": 280} for i in range(6)]
    names = [{"id": i + 1, "name": c.name} for i, c in enumerate(CATEGORIES)]

    def direct(categories: list[int]) -> list[float]:
        truth = COCO({"images": sizes, "annotations": rows(targets), "categories": names})
        evaluation = COCOeval_faster(truth, truth.loadRes(rows(predictions)), "segm")
        evaluation.params.catIds = categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return [value if value >= 0 else math.nan for value in evaluation.stats[:12]]

    for name, expected in zip(FIGURES, direct([1, 2, 3]), strict=True):
        assert result.figures[f"mask_{name}"] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    assert 0 < result.figures["mask_AP"] < result.figures["AP"]
    assert result.mask_ap_by_class is not None
    for position, category in enumerate(CATEGORIES):
        expected = direct([position + 1])[0]
        assert result.mask_ap_by_class[category.name] == pytest.approx(expected, abs=1e-6, nan_ok=True)

    written = result.to_dict()
    assert written["mask_AP"] == result.figures["mask_AP"]
    assert written["mask_AP_by_class"]["never seen"] is None
    assert "mask_AP" not in boxes_alone.to_dict()
    lines = result.table().splitlines()
    assert lines[1].split()[0] == f"{100 * result.figures['AP']:.1f}"
    assert lines[2].split()[0] == f"{100 * result.figures['mask_AP']:.1f}"
    assert lines[2].endswith("masks")
    bird = next(line for line in lines if "bird" in line)
    assert bird.split()[-1] == f"{100 * result.mask_ap_by_class['bird']:.1f}"
    assert "masks" not in boxes_alone.table()


def test_images_without_masks_to_find_or_found() -> None:
    predictions, targets = masked_case(0)
    evaluator = CocoEvaluator(CATEGORIES, masks=True)
    evaluator.update(predictions[:1], targets[:1])
    alone = evaluator.compute().figures["mask_AP"]
    nothing = {name: value[:0] for name, value in targets[1].items()}
    none_found = {name: value[:0] for name, value in predictions[1].items()}
    evaluator.update([none_found], [nothing])
    assert evaluator.compute().figures["mask_AP"] == pytest.approx(alone)
    evaluator.update([none_found], [targets[1]])
    assert evaluator.compute().figures["mask_AP"] < alone
    evaluator.reset()
    evaluator.update([none_found], [nothing])
    assert all(math.isnan(value) for value in evaluator.compute().figures.values())
