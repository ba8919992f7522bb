"""Masks as COCO's compressed run lengths, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from faster_coco_eval.core import mask as coco_masks


class EncodedMasks(NamedTuple):
    """Masks of one size."""

    height: int
    width: int
    counts: Sequence[bytes]  # one a mask

    def rles(self) -> list[dict[str, Any]]:
        """In the form of COCO's own functions."""
        return [{"size": [self.height, self.width], "counts": counts} for counts in self.counts]

    def segmentations(self) -> list[dict[str, Any]]:
        """In the form of a COCO JSON."""
        return [{**rle, "counts": rle["counts"].decode("ascii")} for rle in self.rles()]


def encode(masks: npt.NDArray[Any]) -> EncodedMasks:
    """Encodes masks.

    Args:
        masks: (N, H, W) bool or uint8.
    """
    columns = np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)  # runs go down the columns
    counts = [rle["counts"] for rle in coco_masks.encode(columns)] if len(masks) else []
    return EncodedMasks(masks.shape[1], masks.shape[2], counts)


def decode(encoded: EncodedMasks) -> npt.NDArray[np.uint8]:
    """Decodes masks.

    Args:
        encoded: N masks.

    Returns:
        (N, H, W), 0 or 1.

    Raises:
        ValueError: If run lengths do not fit the size.
    """
    if not encoded.counts:
        return np.zeros((0, encoded.height, encoded.width), np.uint8)
    return coco_masks.decode(encoded.rles()).transpose(2, 0, 1)


def areas(encoded: EncodedMasks) -> npt.NDArray[np.int64]:
    """Counts the pixels of masks.

    Returns:
        (N,).
    """
    return np.array(coco_masks.area(encoded.rles()), np.int64)


def overlaps(masks: EncodedMasks, others: EncodedMasks) -> npt.NDArray[np.float64]:
    """Intersection over union of each mask with its counterpart.

    Args:
        masks: N masks.
        others: N masks of the same size.

    Returns:
        (N,).
    """
    pairs = zip(masks.rles(), others.rles(), strict=True)
    return np.array([coco_masks.iou([mask], [other], [0])[0, 0] for mask, other in pairs])


def read_segmentation(segmentation: Any, width: int, height: int) -> bytes:
    """Encodes what a COCO JSON calls ``segmentation``.

    Args:
        segmentation: Polygons, or run lengths, compressed or not.
        width: Of the image.
        height: Of the image.

    Returns:
        Compressed run lengths.

    Raises:
        ValueError: If it is missing, malformed or of another size; the message says how.
    """
    if not segmentation:
        raise ValueError("has no segmentation")
    polygons = not isinstance(segmentation, dict)
    try:
        if polygons:
            # annotation tools leave slivers of one or two points beside the outline
            outlines = [points for points in segmentation if len(points) >= 6] or segmentation
            segmentation = [_polygon(points, width, height) for points in outlines]
        elif list(segmentation["size"]) != [height, width]:
            raise ValueError(f"size {segmentation['size']} instead of {[height, width]}")
        rle = coco_masks.segmToRle(segmentation, width, height)
        if not polygons:
            coco_masks.decode(rle)  # the one function that looks whether the runs fill the image
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        raise ValueError(f"has a malformed segmentation: {' '.join(str(error).split())[:90]}") from error
    return rle["counts"]


def _polygon(points: Any, width: int, height: int) -> list[float]:
    corners = np.array(points, np.float64).reshape(-1, 2)
    if len(corners) < 3 or not np.isfinite(corners).all():
        raise ValueError(f"no polygon of three points: {points}")
    # far outside of the image a polygon costs time and memory in proportion, and shows nothing
    size = np.array([width, height])
    return corners.clip(-size, 2 * size).ravel().tolist()
