"""What average precision hides: which classes are confused, at what score to cut, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv
from torch import Tensor

from aligndet.evaluation.matching import (
    CLASS,
    CORRECT,
    FOUND,
    KINDS,
    LOCATION,
    Floats,
    Ints,
    Matches,
    join,
    match,
    surest,
    without_crowds,
)

_SCORES = np.linspace(0, 1, 101)  # of the curves
_RECALLS = np.linspace(0, 1, 101)  # COCO's
CURVES = ("precision", "recall", "F1", "precision_at_recall")
"""The first three by score; the last by recall, as COCO has it: the best precision from that recall on."""


@dataclass(frozen=True)
class Details:
    """Figures of boxes at IoU 0.5; nan where nothing was found or there was nothing to find."""

    score: float  # boxes below are left out, except from curves, best scores and AP
    by_class: dict[str, dict[str, float]]
    curves: dict[str, dict[str, Floats]]  # of each class: precision, recall, F1 by score; precision by recall
    confusion: Ints  # (classes + 1, classes + 1) objects by rows, boxes by columns; the last: background
    errors: dict[str, dict[str, float]]  # by kind: how many, and by how much AP50 would be higher without

    def to_dict(self) -> dict[str, Any]:
        """All figures, in a form that JSON can hold; nan becomes None."""
        plain = {"iou": FOUND, "score": self.score, "classes": self.by_class, "errors": self.errors}
        names = [*self.by_class, "background"]
        confusion = {"names": names, "rows": "objects", "columns": "boxes", "counts": self.confusion.tolist()}
        curves = {
            "score": _SCORES.round(2).tolist(),
            "recall": _RECALLS.round(2).tolist(),
            "mean": _plain(self.mean_curves()),
            "classes": {name: _plain(curve) for name, curve in self.curves.items()},
        }
        return without_nan({**plain, "confusion": confusion, "curves": curves})

    def mean_curves(self) -> dict[str, Floats]:
        """Curves averaged over the classes with objects; for precision, over those that also have boxes."""
        found = [self.curves[name] for name, row in self.by_class.items() if row["objects"]]
        stacked = {kind: np.ma.masked_invalid([curve[kind] for curve in found]) for kind in CURVES}
        return {
            kind: values.mean(0).filled(np.nan) if found else np.full(len(_SCORES), np.nan)
            for kind, values in stacked.items()
        }

    def table(self) -> str:
        """The figures in percent, as text, with the ten classes most often taken for another."""
        width = max(map(len, [*self.by_class, "class"]))
        heads = ("objects", "P", "R", "F1", "best F1", "at score")
        lines = [
            f"boxes from score {self.score:g}",
            f"{'class':<{width}}  " + "  ".join(f"{h:>8}" for h in heads),
        ]
        for name, row in self.by_class.items():
            shares = [f"{100 * row[key]:8.1f}" for key in ("precision", "recall", "F1", "best_F1")]
            best = 1000 * row["best_score"]  # rounded down, so that it keeps the box of this score
            best = math.floor(best) / 1000 if math.isfinite(best) else best
            lines.append(
                f"{name:<{width}}  " + "  ".join([f"{row['objects']:8.0f}", *shares, f"{best:8.3f}"])
            )
        count, lost = f"from {self.score:g}", "AP50 lost, over all scores"
        lines += ["", f"{'error':<{width}}  {count:>9}  {lost}"]
        for kind, row in self.errors.items():
            lines.append(f"{kind:<{width}}  {row['count']:9.0f}  {100 * row['AP50_lost']:9.1f}")
        names = list(self.by_class)
        mistaken = self.confusion[:-1, :-1] * (1 - np.eye(len(names), dtype=np.int64))
        largest = np.argsort(-mistaken, axis=None, kind="stable")[:10]
        for row, column in zip(*np.unravel_index(largest, mistaken.shape), strict=True):
            if mistaken[row, column]:
                lines.append(f"{names[row]} taken for {names[column]}: {mistaken[row, column]} times")
        return "\n".join(lines)


class DetailsEvaluator:
    """Collects predictions and targets in torchvision's form."""

    def __init__(self, names: Sequence[str], *, score: float) -> None:
        """Starts empty.

        Args:
            names: Of the classes, all different, in label order.
            score: Boxes below are left out, where the figures do not say otherwise.
        """
        if not 0 <= score <= 1:
            raise ValueError(f"score must be from 0 to 1, not {score}")
        self.names, self.score = tuple(names), score
        self._matches: list[Matches] = []
        self._confusion = np.zeros((len(names) + 1, len(names) + 1), np.int64)

    def update(self, prediction: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        """Adds an image.

        Args:
            prediction: As for `aligndet.evaluation.matching.surest`.
            target: As for `aligndet.evaluation.matching.without_crowds`.
        """
        found, objects = without_crowds(surest(prediction), target)
        self._matches.append(match(found, objects))
        boxes = np.column_stack([found["boxes"], found["labels"] - 1, found["scores"]])
        there = np.column_stack([objects["boxes"], objects["labels"] - 1])
        self._confusion += sv.ConfusionMatrix.evaluate_detection_batch(
            boxes.astype(np.float32), there.astype(np.float32), len(self.names), self.score, FOUND
        )

    def compute(self) -> Details:
        """Computes the figures over all images.

        Raises:
            ValueError: If no image was added.
        """
        if not self._matches:
            raise ValueError("no image was evaluated")
        matches = join(self._matches)
        by_class, curves = {}, {}
        for label, name in enumerate(self.names, 1):
            by_class[name], curves[name] = _class_figures(matches, label, self.score)
        return Details(self.score, by_class, curves, self._confusion, _errors(matches, self.score))


def _class_figures(matches: Matches, label: int, score: float) -> tuple[dict[str, float], dict[str, Floats]]:
    own = matches.labels == label
    scores, correct = matches.scores[own], matches.kinds[own] == CORRECT
    objects = int((matches.object_labels == label).sum())
    hits = np.concatenate([[0], np.cumsum(correct)])  # of the first n boxes

    def at(threshold: Floats) -> tuple[Floats, Floats, Floats]:
        boxes = np.searchsorted(-scores, -threshold, side="right")
        with np.errstate(invalid="ignore"):
            found = hits[boxes]
            return found / boxes, found / np.float64(objects), 2 * found / (boxes + np.float64(objects))

    precision, recall, f1 = (float(value[0]) for value in at(np.array([score])))
    _, _, each = at(scores)
    best = int(np.argmax(each)) if len(each) and objects else None
    figures = {"objects": float(objects), "precision": precision, "recall": recall, "F1": f1}
    figures["best_F1"] = float("nan") if best is None else float(each[best])
    figures["best_score"] = float("nan") if best is None else float(scores[best])
    by_recall = _precision_at_recall(correct, objects)
    figures["AP50"] = float(by_recall.mean())
    return figures, dict(zip(CURVES, (*at(_SCORES), by_recall), strict=True))


def _precision_at_recall(correct: Any, objects: int) -> Floats:
    """COCO's curve: the highest precision at each recall or beyond; nan if there are no objects.

    Args:
        correct: (P,) whether each box has found an object, the highest score first.
        objects: How many there are.
    """
    if not objects:
        return np.full(len(_RECALLS), np.nan)
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return envelope[np.searchsorted(hits / objects, _RECALLS, side="left")]


def _plain(curves: dict[str, Floats]) -> dict[str, list[float]]:
    return {kind: values.round(4).tolist() for kind, values in curves.items()}


def _errors(matches: Matches, score: float) -> dict[str, dict[str, float]]:
    """Counts each kind of error from a score on, and what it costs in AP50 over all scores (TIDE)."""
    base = _ap50(matches)
    sure = matches.scores >= score
    errors = {}
    for kind, name in enumerate(KINDS[1:], CLASS):
        count = int((sure & (matches.kinds == kind)).sum())
        errors[name] = {"count": float(count), "AP50_lost": _ap50(_corrected(matches, kind)) - base}
    counted = _missed(matches._replace(**{n: getattr(matches, n)[sure] for n in ("kinds", "objects")}))
    had, remaining = np.unique(matches.object_labels), matches.object_labels[~_missed(matches)]
    # a class of which no object remains has AP 0, unless there is no box of it either
    kept = had[np.isin(had, remaining) | np.isin(had, matches.labels)]
    without = _ap50(matches._replace(object_labels=remaining), kept)
    errors["missed"] = {"count": float(counted.sum()), "AP50_lost": without - base}
    return errors


def _missed(matches: Matches) -> Any:
    """Objects that no box has found, not even with a wrong class or location, as a mask."""
    missed = np.ones(len(matches.object_labels), np.bool_)
    missed[matches.objects[matches.objects >= 0]] = False
    return missed


def _corrected(matches: Matches, kind: int) -> Matches:
    """Corrects one kind of error: a box finds the object that it means, if no other box has found it; all
    others with the error are left out.
    """
    mended = matches.kinds == kind
    if kind not in (CLASS, LOCATION):
        return _chosen(matches, ~mended)
    # an object without a correct box goes to the first that means it, with either error
    taken = np.zeros(len(matches.object_labels), np.bool_)
    taken[matches.objects[matches.kinds == CORRECT]] = True
    meant = np.flatnonzero(np.isin(matches.kinds, (CLASS, LOCATION)))
    _, first = np.unique(matches.objects[meant], return_index=True)
    right = meant[first]
    right = right[mended[right] & ~taken[matches.objects[right]]]
    kinds, labels = matches.kinds.copy(), matches.labels.copy()
    kinds[right] = CORRECT
    labels[right] = matches.object_labels[matches.objects[right]]
    return _chosen(matches._replace(kinds=kinds, labels=labels), ~mended | (kinds == CORRECT))


def _chosen(matches: Matches, kept: Any) -> Matches:
    fields = ("scores", "labels", "kinds", "objects")
    return matches._replace(**{name: getattr(matches, name)[kept] for name in fields})


def _ap50(matches: Matches, classes: Any = None) -> float:
    """Mean over classes, by default those that have objects, of COCO's average precision at IoU 0.5."""
    values = []
    for label in np.unique(matches.object_labels) if classes is None else classes:
        correct = matches.kinds[matches.labels == label] == CORRECT
        objects = int((matches.object_labels == label).sum())
        values.append(_precision_at_recall(correct, objects).mean() if objects else 0.0)
    return float(np.mean(values)) if values else float("nan")


def without_nan(value: Any) -> Any:
    """Makes figures what JSON can hold.

    Args:
        value: Numbers in any nesting of dicts and lists.

    Returns:
        A copy with None for nan.
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if value != value else value
