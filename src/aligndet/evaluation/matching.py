"""Which object each box stands for, and what is wrong with a box that stands for none.

The kinds of error and their order are those of TIDE (Bolya et al., ECCV 2020, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

FOUND = 0.5  # IoU from which a box has found an object
NEAR = 0.1  # IoU up to which there is nothing but background

KINDS = ("correct", "class", "location", "both", "duplicate", "background")
"""Kinds of boxes; all but the first are errors. What no box has found, even with a wrong class or location,
is missed.
"""
CORRECT, CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND = range(len(KINDS))

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Matches(NamedTuple):
    """Boxes of one image (or of many, joined), the highest score first, and its objects."""

    scores: Floats  # (P,)
    labels: Ints  # (P,)
    kinds: Ints  # (P,) positions in KINDS
    # (P,) the object that the box has found, or would have but for its class or location; else -1
    objects: Ints
    object_labels: Ints  # (G,)


def without_crowds(
    prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leaves out crowds and the boxes that they excuse: those that have found no object and lie to a half or
    more in a crowd of their class.

    Args:
        prediction: Boxes (P, 4) xyxy pixels, labels (P,), scores (P,), the highest score first.
        target: Boxes (N, 4), labels (N,), and if known iscrowd (N,).
    """
    names = ("boxes", "labels")
    crowd = target["iscrowd"].bool() if "iscrowd" in target else target["labels"] < 0
    objects, crowds = ({name: target[name][mask] for name in names} for mask in (~crowd, crowd))
    if not len(crowds["labels"]):
        return {name: prediction[name] for name in (*names, "scores")}, objects
    boxes, same = prediction["boxes"], prediction["labels"][:, None] == crowds["labels"][None]
    corner, opposite = boxes[:, None].maximum(crowds["boxes"]), boxes[:, None].minimum(crowds["boxes"])
    inside = (opposite[..., 2:] - corner[..., :2]).clamp(min=0).prod(-1)  # (P, crowds)
    excused = (same & (inside >= FOUND * box_area(boxes)[:, None])).any(1)
    own = prediction["labels"][:, None] == objects["labels"][None]
    ious = box_iou(boxes.double(), objects["boxes"].double())
    found = torch.from_numpy(assign(torch.where(own & (ious >= FOUND), ious, 0.0).numpy()) >= 0)
    kept = found | ~excused
    return {name: prediction[name][kept] for name in (*names, "scores")}, objects


def surest(prediction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keeps the boxes that COCO's figures are of: the hundred best of each class.

    Args:
        prediction: Boxes (P, 4), labels (P,), scores (P,) of an image.

    Returns:
        The same, the highest score first.
    """
    order = prediction["scores"].argsort(descending=True, stable=True)
    order = order[prediction["labels"][order].argsort(stable=True)]  # class by class
    labels = prediction["labels"][order]
    rank = torch.arange(len(labels)) - torch.searchsorted(labels, labels)
    order = order[rank < 100]
    order = order[prediction["scores"][order].argsort(descending=True, stable=True)]
    return {name: prediction[name][order] for name in ("boxes", "labels", "scores")}


def match(prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Matches:
    """Assigns the boxes of an image to its objects, and finds out what is wrong with the others.

    Args:
        prediction: Boxes (P, 4) xyxy pixels, labels (P,), scores (P,), the highest score first.
        target: Boxes (G, 4), labels (G,), without crowds.
    """
    scores, labels = prediction["scores"].double().numpy(), prediction["labels"].numpy()
    ious = box_iou(prediction["boxes"].double(), target["boxes"].double()).numpy()  # (P, G)
    same = labels[:, None] == target["labels"].numpy()[None]
    found = assign(np.where(same & (ious >= FOUND), ious, 0.0))
    return Matches(scores, labels, *_kinds(ious, same, found), target["labels"].numpy())


def assign(ious: Floats) -> Ints:
    """Matches boxes greedily, in their order, each to the object that it overlaps most of those left.

    In rounds, all boxes ask for their best object; of those that ask for the same, the first keeps it, the
    others ask for their next best. The result is the same as box by box.

    Args:
        ious: (P, G), 0 where a box cannot have an object.

    Returns:
        (P,) an object, or -1.
    """
    count, objects = ious.shape
    if not objects:
        return np.full(count, -1, np.int64)
    open_, holder, boxes = ious.copy(), np.full(objects, count), np.arange(count)
    while True:
        wanted = open_.argmax(1)
        asks = open_[boxes, wanted] > 0
        np.minimum.at(holder, wanted[asks], boxes[asks])
        lost = asks & (holder[wanted] != boxes)
        if not lost.any():
            return np.where(asks, wanted, -1)
        open_[boxes[lost], wanted[lost]] = 0


def join(parts: list[Matches]) -> Matches:
    """Concatenates the matches of many images; objects are numbered anew.

    Args:
        parts: At least one.
    """
    first = np.cumsum([0, *(len(part.object_labels) for part in parts)])
    objects = [np.where(p.objects < 0, -1, p.objects + f) for p, f in zip(parts, first, strict=False)]
    scores = np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores, kind="stable")
    return Matches(
        scores[order],
        np.concatenate([part.labels for part in parts])[order],
        np.concatenate([part.kinds for part in parts])[order],
        np.concatenate(objects)[order],
        np.concatenate([part.object_labels for part in parts]),
    )


def _kinds(ious: Floats, same: npt.NDArray[np.bool_], found: Ints) -> tuple[Ints, Ints]:
    """For each box, its kind and the object that it has found or means."""
    if not ious.shape[1]:
        return np.full(len(ious), BACKGROUND), np.full(len(ious), -1)
    own, other = np.where(same, ious, 0.0), np.where(same, 0.0, ious)
    nearest, overlap = own.argmax(1), own.max(1)
    conditions = [
        found >= 0,
        (overlap > NEAR) & (overlap < FOUND),
        other.max(1) >= FOUND,
        overlap >= FOUND,  # another box has the object already
        ious.max(1) <= NEAR,
    ]
    kinds = np.select(conditions, [CORRECT, LOCATION, CLASS, DUPLICATE, BACKGROUND], BOTH)
    meant = np.select(
        [kinds == CORRECT, kinds == LOCATION, kinds == CLASS], [found, nearest, other.argmax(1)], -1
    )
    return kinds, meant
