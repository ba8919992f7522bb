"""Details of boxes, on images that are small enough to count by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aligndet.data.coco import Category
from aligndet.evaluation.coco import CocoEvaluator
from aligndet.evaluation.details import DetailsEvaluator, _ap50
from aligndet.evaluation.matching import KINDS, assign, join, match, surest, without_crowds

CAT, DOG = 1, 2
Box = tuple[int, int, int, int]


def _prediction(*rows: tuple[Box, int, float]) -> dict[str, Tensor]:
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4).float(),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores),
    }


def _target(*rows: tuple[Box, int], crowd: int = 0) -> dict[str, Tensor]:
    found = _prediction(*((*row, 1.0) for row in rows))
    iscrowd = torch.zeros(len(rows), dtype=torch.int64)
    iscrowd[len(rows) - crowd :] = 1
    return {"boxes": found["boxes"], "labels": found["labels"], "iscrowd": iscrowd}


OBJECTS = _target(((0, 0, 100, 100), CAT), ((200, 0, 300, 100), DOG), ((400, 0, 500, 100), CAT))
BOXES = _prediction(
    ((0, 0, 100, 90), CAT, 0.9),  # IoU 0.9: correct
    ((0, 0, 100, 100), CAT, 0.8),  # the same object again: duplicate
    ((200, 0, 300, 100), CAT, 0.7),  # a dog taken for a cat: class
    ((400, 0, 500, 40), CAT, 0.6),  # IoU 0.4: location
    ((200, 0, 300, 30), CAT, 0.5),  # IoU 0.3 with a dog: both
    ((0, 300, 100, 400), DOG, 0.4),  # nothing there: background
    ((200, 0, 300, 60), DOG, 0.2),  # IoU 0.6, but a low score: correct
)


def test_every_kind_of_error() -> None:
    found = match(BOXES, OBJECTS)
    kinds = [KINDS[kind] for kind in found.kinds]
    assert kinds == ["correct", "duplicate", "class", "location", "both", "background", "correct"]
    assert found.objects.tolist() == [0, -1, 1, 2, -1, -1, 1]


def test_a_box_is_near_an_object_from_an_overlap_of_a_tenth_on() -> None:
    found = match(
        _prediction(((0, 0, 100, 12), CAT, 0.9), ((0, 0, 100, 8), CAT, 0.8)), _target(((0, 0, 100, 100), CAT))
    )
    assert [KINDS[kind] for kind in found.kinds] == ["location", "background"]


def test_a_box_on_two_objects_is_taken_for_the_other_before_it_is_one_too_many() -> None:
    objects = _target(((0, 0, 100, 100), CAT), ((0, 0, 100, 90), DOG))
    found = match(_prediction(((0, 0, 100, 100), CAT, 0.9), ((0, 0, 100, 95), CAT, 0.8)), objects)
    assert [KINDS[kind] for kind in found.kinds] == ["correct", "class"]
    assert found.objects.tolist() == [0, 1]


def test_boxes_choose_as_one_after_the_other_would() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        ious = generator.random(generator.integers(0, 9, 2))
        ious[ious < 0.5] = 0
        left, expected = set(range(ious.shape[1])), []
        for row in ious:
            best = max(left, key=lambda g: row[g], default=None)
            expected.append(best if best is not None and row[best] > 0 else -1)
            left.discard(expected[-1])
        assert assign(ious).tolist() == expected


def test_figures_by_class_and_at_the_best_score() -> None:
    evaluator = DetailsEvaluator(["cat", "dog"], score=0.3)
    evaluator.update(BOXES, OBJECTS)
    details = evaluator.compute()
    cat, dog = details.by_class["cat"], details.by_class["dog"]
    assert (cat["objects"], cat["precision"], cat["recall"]) == (2, 1 / 5, 1 / 2)
    assert cat["F1"] == pytest.approx(2 * 1 / (5 + 2))
    assert (cat["best_F1"], cat["best_score"]) == pytest.approx((2 / 3, 0.9))
    assert (dog["precision"], dog["recall"]) == (0, 0)  # from 0.3 on there is the background alone
    assert (dog["best_F1"], dog["best_score"]) == pytest.approx((2 / 3, 0.2))
    curves = details.curves["dog"]
    assert (curves["recall"][20], curves["precision"][20], curves["recall"][21]) == (1, 0.5, 0)
    assert math.isnan(curves["precision"][100])
    counts = {kind: row["count"] for kind, row in details.errors.items()}
    assert counts == {"class": 1, "location": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 0}
    # cat found as cat, dog found as cat, one cat not found; background found as cat three times, as dog once
    assert details.confusion.tolist() == [[1, 0, 1], [1, 0, 0], [3, 1, 0]]
    text = details.table()
    assert "dog taken for cat: 1 times" in text
    assert "cat taken for dog" not in text
    stored = json.loads(json.dumps(details.to_dict()))
    assert stored["curves"]["classes"]["dog"]["precision"][100] is None
    # the dog's only correct box comes second: precision 1/2 at every recall; of two cats the first box is one
    assert stored["curves"]["classes"]["dog"]["precision_at_recall"] == [0.5] * 101
    assert stored["curves"]["classes"]["cat"]["precision_at_recall"] == [1.0] * 51 + [0.0] * 50
    assert stored["classes"]["cat"]["AP50"] == pytest.approx(51 / 101)
    mean = stored["curves"]["mean"]
    assert mean["precision_at_recall"][:52:51] == [0.75, 0.25]
    assert mean["F1"][89] == pytest.approx((2 / 3 + 0) / 2, abs=1e-4)
    assert mean["precision"][50] == pytest.approx(1 / 5)  # the dog has no box from there on


def test_what_an_error_costs() -> None:
    """Of two cats, one is found; the other box is short of it, or of another class, or not there."""
    objects = _target(((0, 0, 100, 100), CAT), ((200, 0, 300, 100), CAT))
    first = ((0, 0, 100, 100), CAT, 0.9)
    half = 51 / 101  # AP of one of two: precision 1 up to recall 0.5
    for second, kind in (
        (((200, 0, 300, 40), CAT, 0.8), "location"),
        (((200, 0, 300, 100), DOG, 0.8), "class"),
        (((600, 0, 700, 100), DOG, 0.8), "missed"),
    ):
        evaluator = DetailsEvaluator(["cat", "dog"], score=0.0)
        evaluator.update(_prediction(first, second), objects)
        errors = evaluator.compute().errors
        lost = {name: row["AP50_lost"] for name, row in errors.items() if row["AP50_lost"]}
        assert lost == pytest.approx({kind: 1 - half}), kind
    evaluator = DetailsEvaluator(["cat"], score=0.0)
    evaluator.update(_prediction((*first[:2], 0.5), ((600, 0, 700, 100), CAT, 0.9)), _target(first[:2]))
    assert evaluator.compute().errors["background"] == pytest.approx({"count": 1, "AP50_lost": 0.5})


def test_ap50_is_that_of_coco() -> None:
    """What all errors together cost is measured from the same AP50 as the table's."""
    generator = torch.Generator().manual_seed(0)
    coco = CocoEvaluator([Category(1, "cat"), Category(2, "dog")])
    details = DetailsEvaluator(["cat", "dog"], score=0.0)
    for _ in range(20):
        corner = torch.rand(6, 2, generator=generator) * 100
        boxes = torch.cat([corner, corner + 50], 1)
        labels = torch.randint(1, 3, (6,), generator=generator)
        target = {"boxes": boxes, "labels": labels, "iscrowd": torch.zeros(6, dtype=torch.int64)}
        moved = {
            "boxes": boxes + torch.randn(6, 4, generator=generator) * 10,
            "labels": labels,
            "scores": torch.rand(6, generator=generator),
        }
        coco.update([moved], [target])
        details.update(moved, target)
    expected = pytest.approx(coco.compute().figures["AP50"], abs=1e-6)
    assert _ap50(join(details._matches)) == expected
    assert details.compute().mean_curves()["precision_at_recall"].mean() == expected


def test_boxes_in_a_crowd_are_no_errors() -> None:
    target = _target(((0, 0, 100, 100), CAT), ((200, 0, 600, 400), CAT), crowd=1)
    prediction = _prediction(
        ((0, 0, 100, 100), CAT, 0.9), ((300, 100, 400, 200), CAT, 0.8), ((300, 100, 400, 200), DOG, 0.7)
    )
    found, objects = without_crowds(prediction, target)
    assert found["labels"].tolist() == [CAT, DOG]
    assert objects["labels"].tolist() == [CAT]
    evaluator = DetailsEvaluator(["cat", "dog"], score=0.3)
    evaluator.update(prediction, target)
    assert evaluator.compute().confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_a_crowd_excuses_a_box_that_is_half_in_it() -> None:
    target = _target(((0, 0, 400, 400), CAT), crowd=1)
    out, within = ((340, 0, 490, 100), CAT, 0.9), ((310, 0, 460, 100), CAT, 0.8)  # two and three fifths in it
    found, _ = without_crowds(_prediction(out, within), target)
    assert found["scores"].tolist() == pytest.approx([0.9])


def test_a_crowd_excuses_a_box_whose_object_another_has() -> None:
    target = _target(((0, 0, 100, 100), CAT), ((500, 0, 600, 100), CAT), ((0, 0, 400, 400), CAT), crowd=1)
    prediction = _prediction(
        ((0, 0, 100, 90), CAT, 0.8), ((0, 0, 100, 100), CAT, 0.9), ((500, 0, 600, 100), CAT, 0.7)
    )
    coco, details = CocoEvaluator([Category(1, "cat")]), DetailsEvaluator(["cat"], score=0.0)
    area = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1)
    coco.update([prediction], [{**target, "area": area}])
    details.update(prediction, target)
    assert coco.compute().figures["AP50"] == pytest.approx(1)
    assert _ap50(join(details._matches)) == pytest.approx(1)


def test_a_hundred_boxes_of_a_class_are_looked_at_as_in_coco() -> None:
    rows = [((10 * n, 0, 10 * n + 9, 9), CAT, 1 - n / 200) for n in range(120)]
    prediction = _prediction(*rows[60:], ((0, 90, 9, 99), DOG, 0.001), *rows[:60])
    kept = surest(prediction)
    assert kept["labels"].tolist() == [CAT] * 100 + [DOG]
    assert kept["scores"].tolist() == pytest.approx([1 - n / 200 for n in range(100)] + [0.001])
    details = DetailsEvaluator(["cat", "dog"], score=0.0)
    details.update(prediction, _target(*(row[:2] for row in rows)))
    assert _ap50(join(details._matches)) == pytest.approx(84 / 101)  # recall 100 of 120


def test_costs_by_hand() -> None:
    """Of two boxes that mean one object, the surer alone is put right; a class that is missed whole has AP 0
    while there is a box of it.
    """
    details = DetailsEvaluator(["cat", "dog"], score=0.0)
    details.update(
        _prediction(((0, 0, 100, 100), DOG, 0.9), ((0, 0, 100, 40), CAT, 0.8)),
        _target(((0, 0, 100, 100), CAT)),
    )
    errors = details.compute().errors
    assert (errors["class"]["AP50_lost"], errors["location"]["AP50_lost"]) == (1, 0)
    details = DetailsEvaluator(["cat", "dog"], score=0.0)
    details.update(
        _prediction(((0, 0, 100, 100), CAT, 0.9), ((600, 0, 700, 100), DOG, 0.5)),
        _target(((0, 0, 100, 100), CAT), ((200, 0, 300, 100), CAT), ((400, 0, 500, 100), DOG)),
    )
    half = 51 / 101
    assert details.compute().errors["missed"]["AP50_lost"] == pytest.approx(1 / 2 - half / 2)


def test_images_without_boxes_or_objects() -> None:
    evaluator = DetailsEvaluator(["cat", "dog"], score=0.3)
    with pytest.raises(ValueError, match="no image was evaluated"):
        evaluator.compute()
    evaluator.update(_prediction(), _target())
    evaluator.update(_prediction(), _target(((0, 0, 10, 10), CAT)))
    evaluator.update(_prediction(((0, 0, 10, 10), DOG, 0.5)), _target())
    details = evaluator.compute()
    assert details.confusion.tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert details.errors["missed"]["count"] == details.errors["background"]["count"] == 1
    assert math.isnan(details.by_class["dog"]["recall"])
    assert "nan" in details.table()
    with pytest.raises(ValueError, match=r"score must be from 0 to 1, not 30"):
        DetailsEvaluator(["cat"], score=30)
