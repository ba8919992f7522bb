"""Selective search (Uijlings et al., 2013) through OpenCV: boxes around whatever coheres."""

from __future__ import annotations

import ctypes
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

_C_LIBRARY = ctypes.CDLL(None)
Mode = Literal["fast", "quality"]


def selective_search(
    image: npt.NDArray[np.uint8], *, mode: Mode = "fast", resolution: int | None = None
) -> npt.NDArray[np.float32]:
    """Proposes boxes.

    Args:
        image: (H, W, 3) RGB.
        mode: "fast", or "quality": more segmentations, three to four times as slow.
        resolution: Longest side to run at; a larger image is scaled down first. None: as it is.

    Returns:
        (N, 4) xyxy pixels of the image, best first, as OpenCV ranks them.
    """
    height, width = image.shape[:2]
    image = shrink(image, resolution)
    _C_LIBRARY.srand(0)  # OpenCV ranks by C's rand(): seeded, so that an image always gives the same order
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))
    if mode == "fast":
        search.switchToSelectiveSearchFast()
    else:
        search.switchToSelectiveSearchQuality()
    boxes = np.asarray(search.process(), np.float32).reshape(-1, 4)  # xywh
    boxes[:, 2:] += boxes[:, :2]
    return boxes * np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)


def shrink(image: npt.NDArray[np.uint8], resolution: int | None) -> npt.NDArray[np.uint8]:
    """Scales a large image down.

    Args:
        image: (H, W, 3).
        resolution: Bound of the longest side; None: no bound.

    Returns:
        (h, w, 3), the image itself if it is small enough.
    """
    height, width = image.shape[:2]
    scale = min(1.0, resolution / max(height, width)) if resolution else 1.0
    if scale == 1.0:
        return image
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]
