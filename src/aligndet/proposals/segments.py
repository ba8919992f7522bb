"""Coherent segments of an image (Felzenszwalb and Huttenlocher, 2004), and how well a box fits them."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from aligndet.proposals.selective_search import shrink


def segments_of(
    image: npt.NDArray[np.uint8], sigma: float, scale: float, min_size: int
) -> npt.NDArray[np.int32]:
    """Cuts an image into segments.

    Args:
        image: (H, W, 3) RGB.
        sigma: Sigma of the Gaussian that smooths the image first.
        scale: Larger values make larger segments (k of the paper).
        min_size: Fewest pixels of a segment.

    Returns:
        (H, W) numbers of segments, from 0 without a gap.
    """
    segmentation = cv2.ximgproc.segmentation.createGraphSegmentation(sigma, scale, min_size)
    return np.asarray(segmentation.processImage(np.ascontiguousarray(image[:, :, ::-1])), np.int32)


def shares_inside(segments: npt.NDArray[np.int32], boxes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """How much of each segment lies within each box.

    Args:
        segments: (H, W) numbers of segments, from 0 without a gap.
        boxes: (N, 4) xyxy, whole pixels.

    Returns:
        (N, segments) shares of the segments' pixels.
    """
    flat, width = segments.ravel(), segments.shape[1]
    # horizontal runs of one segment: dozens per row, where there are hundreds of pixels
    starts = np.ones(segments.shape, np.bool_)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = np.flatnonzero(starts)
    length = np.diff(start, append=flat.size)
    order = np.argsort(flat[start], kind="stable")  # the runs of a segment one after another
    start, length = start[order], length[order]
    y, left = np.divmod(start, width)
    small = np.int16 if max(segments.shape) < 2**15 else np.int32  # more than twice as fast as 64 bits
    y, left, right = (values.astype(small) for values in (y, left, left + length))
    x0, y0, x1, y1 = boxes.T.astype(small)[:, :, None]  # (N, 1) each, against (runs,)
    overlap = np.minimum(right, x1) - np.maximum(left, x0)
    np.maximum(overlap, 0, out=overlap)
    overlap *= (y >= y0) & (y < y1)
    first = np.flatnonzero(np.diff(flat[start], prepend=-1))  # run of each segment
    assert len(first) == flat.max() + 1
    return np.add.reduceat(overlap, first, axis=1, dtype=np.int32) / np.add.reduceat(length, first)


OBJECTNESS_SIDE = 128
"""Longest side of the image that boxes are judged on."""


def objectness(image: npt.NDArray[np.uint8], boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Scores how well boxes fit objects rather than cut through them: superpixel straddling (Alexe et al.,
    2012).

    A segment that a box cuts counts against the box with the smaller of its two parts, inside and outside. A
    box of one small segment cuts nothing, so larger boxes are preferred, by the fourth root of their area.

    Args:
        image: (H, W, 3) RGB.
        boxes: (N, 4) xyxy pixels.

    Returns:
        (N,) scores from 0 to 1, larger is better.
    """
    height, width = image.shape[:2]
    image = shrink(image, OBJECTNESS_SIDE)
    scales = np.array([image.shape[1] / width, image.shape[0] / height] * 2, np.float32)
    corners = np.rint(boxes * scales).astype(np.int64)
    segments = segments_of(image, sigma=0.5, scale=300.0, min_size=20)
    sizes = np.bincount(segments.ravel())
    within = shares_inside(segments, corners) * sizes  # (N, segments) pixels
    area = (corners[:, 2:] - corners[:, :2]).prod(axis=1).clip(1)
    cut = np.minimum(within, sizes - within).sum(axis=1) / area
    return (1 - cut).clip(0, 1) * (area / segments.size) ** 0.25
