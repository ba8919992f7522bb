"""Which boxes of selective search become proposals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_iou, nms


def filter_boxes(
    boxes: npt.NDArray[np.float32],
    width: int,
    height: int,
    *,
    max_aspect_ratio: float,
    min_area: float,
    max_area: float,
    nms_iou: float,
    max_proposals: int | None = None,
    score: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]] | None = None,
) -> npt.NDArray[np.float32]:
    """Keeps boxes of a sensible shape and size that do not repeat a better one.

    Ratio and overlap are those of the official proposals, whose boxes have sides of 32 pixels at least and
    cover 64 % of the image at most. The bounds of the area are ours: selective search nearly always returns
    the whole image, which is no object.

    Args:
        boxes: (N, 4) xyxy pixels, best first unless there is a score.
        width: Width of the image.
        height: Height of the image.
        max_aspect_ratio: Largest ratio of the longer side to the shorter one.
        min_area: Smallest share of the image.
        max_area: Largest share of the image.
        nms_iou: A box that overlaps a better one by more is dropped.
        max_proposals: Most boxes to keep, the best ones.
        score: Scores boxes of a sensible shape and size, (K, 4) to (K,); larger is better.

    Returns:
        (M, 4), M <= N, best first.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    area = sides.prod(axis=1) / (width * height)
    shape = sides.max(axis=1, initial=0.0) <= max_aspect_ratio * sides.min(axis=1, initial=np.inf)
    kept = boxes[shape & (area >= min_area) & (area <= max_area)]
    if score is not None:
        kept = kept[np.argsort(-score(kept), kind="stable")]
    order = nms(torch.from_numpy(kept), torch.arange(len(kept), 0, -1, dtype=torch.float32), nms_iou)
    return kept[order.numpy()[:max_proposals]]


def best_proposals(
    proposals: npt.NDArray[np.float32], objects: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """How well each object is covered by its best proposal.

    Args:
        proposals: (N, 4) xyxy pixels.
        objects: (M, 4) xyxy pixels.

    Returns:
        Intersection over union (M,), 0 where there is no proposal, and the proposal's position (M,).
    """
    if not len(proposals) or not len(objects):
        return np.zeros(len(objects), np.float32), np.zeros(len(objects), np.int64)
    overlaps = box_iou(torch.from_numpy(objects).float(), torch.from_numpy(proposals).float())
    best = overlaps.max(dim=1)
    return best.values.numpy(), best.indices.numpy()
