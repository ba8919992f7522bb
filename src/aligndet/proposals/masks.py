"""Pseudo-masks of proposals: the coherent segments (Felzenszwalb and Huttenlocher, 2004) that a box holds.

Selective search merges such segments into boxes; their union within a box is a first guess at the object's
outline. A mask is kept on a grid over its box: it cannot reach beyond it, and no resizing of the image
changes it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aligndet.proposals.segments import segments_of, shares_inside
from aligndet.proposals.selective_search import shrink

MASK_SIDE = 56
"""Cells of a mask's grid, across and down: twice what Mask R-CNN predicts."""

Grids = npt.NDArray[np.uint8]  # (N, MASK_SIDE, MASK_SIDE), 0 or 1, over the box of each proposal


def pseudo_masks(
    image: npt.NDArray[np.uint8],
    boxes: npt.NDArray[np.float32],
    *,
    resolution: int | None,
    sigma: float,
    scale: float,
    min_size: int,
    min_inside: float,
) -> Grids:
    """Guesses the outlines of proposals.

    Args:
        image: (H, W, 3) RGB.
        boxes: (N, 4) xyxy pixels.
        resolution: Longest side to run at, as for `selective_search`.
        sigma: Sigma of the Gaussian that smooths the image before it is segmented.
        scale: Larger values make larger segments (k of the segmentation's paper).
        min_size: Fewest pixels of a segment.
        min_inside: Smallest share of a segment's pixels in a box for it to belong to the box's mask.

    Returns:
        (N, MASK_SIDE, MASK_SIDE), all 0 where a box holds no segment.
    """
    height, width = image.shape[:2]
    image = shrink(image, resolution)
    segments = segments_of(image, sigma, scale, min_size)
    boxes = boxes * np.array([image.shape[1] / width, image.shape[0] / height] * 2, np.float32)
    inside = shares_inside(segments, np.rint(boxes).astype(np.int64)) >= min_inside
    grid = segments[_cells(boxes, *segments.shape)]  # (N, MASK_SIDE, MASK_SIDE) numbers of segments
    return inside[np.arange(len(boxes))[:, None, None], grid].astype(np.uint8)


def on_grid(mask: npt.NDArray[np.uint8], box: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Takes a mask from an image to the grid over its box.

    Args:
        mask: (H, W).
        box: (4,) xyxy pixels.

    Returns:
        (MASK_SIDE, MASK_SIDE).
    """
    return mask[_cells(box[None], *mask.shape)][0]


def on_image(
    grid: npt.NDArray[np.uint8], box: npt.NDArray[np.float32], width: int, height: int
) -> npt.NDArray[np.uint8]:
    """Takes a mask from the grid over its box to an image.

    Args:
        grid: (MASK_SIDE, MASK_SIDE).
        box: (4,) xyxy pixels.
        width: Width of the image.
        height: Height of the image.

    Returns:
        (H, W), 0 outside of the box: a pixel belongs to the box if its centre does.
    """
    mask = np.zeros((height, width), np.uint8)
    (left, top), (right, bottom) = np.ceil(box.reshape(2, 2) - 0.5).astype(int)
    columns, rows = (
        ((np.arange(*ends) + 0.5 - low) * (MASK_SIDE / (high - low))).astype(int)
        for ends, low, high in (((left, right), box[0], box[2]), ((top, bottom), box[1], box[3]))
    )
    mask[top:bottom, left:right] = grid[rows[:, None], columns]
    return mask


def _cells(
    boxes: npt.NDArray[np.float32], height: int, width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The pixels at the centres of the cells: rows (N, MASK_SIDE, 1) and columns (N, 1, MASK_SIDE)."""
    centres = (np.arange(MASK_SIDE) + 0.5) / MASK_SIDE
    sides = boxes[:, 2:] - boxes[:, :2]
    points = (boxes[:, :2, None] + sides[:, :, None] * centres).astype(np.int64)  # (N, 2, MASK_SIDE) x and y
    columns, rows = points[:, 0].clip(0, width - 1), points[:, 1].clip(0, height - 1)
    return rows[:, :, None], columns[:, None, :]
