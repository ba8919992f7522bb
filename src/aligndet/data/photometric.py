"""Colour changes of views: torchvision's operations, to a grey level, in OpenCV's arithmetic of bytes.

torchvision computes most of them in 32-bit floats, which takes longer than decoding and resizing together
(`benchmarks/data.py`). All of them change the image in place.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

Planes = npt.NDArray[np.uint8]  # (3, H, W) RGB, contiguous

_LUMINANCE = np.array([0.2989, 0.587, 0.114])
_CUT = 0.5  # torchvision cuts fractions off where OpenCV rounds


def autocontrast(planes: Planes, _: float = 1.0) -> None:
    """Stretches each channel to the whole range of levels."""
    for plane in planes:
        low, high = cv2.minMaxLoc(plane)[:2]
        if high > low:
            scale = 255 / (high - low)
            cv2.convertScaleAbs(plane, plane, scale, -low * scale)


def equalize(planes: Planes, _: float = 1.0) -> None:
    """Makes all levels of a channel about equally frequent, as Pillow does."""
    for plane in planes:
        counts = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        if step:
            table = (counts.cumsum() - counts + step // 2) // step
            cv2.LUT(plane, table.clip(0, 255).astype(np.uint8), plane)


def solarize(planes: Planes, _: float = 1.0) -> None:
    """Inverts the bright half of the levels."""
    np.minimum(planes, ~planes, out=planes)


def posterize(planes: Planes, _: float = 1.0) -> None:
    """Keeps the four leading bits of every value."""
    planes &= np.uint8(0xF0)


def brightness(planes: Planes, factor: float) -> None:
    """Multiplies all values.

    Args:
        planes: (3, H, W).
        factor: 0 is black, 1 the image.
    """
    for plane in planes:
        cv2.convertScaleAbs(plane, plane, factor)


def contrast(planes: Planes, factor: float) -> None:
    """Moves all values away from the mean luminance or towards it.

    Args:
        planes: (3, H, W).
        factor: 0 is grey, 1 the image.
    """
    mean = sum(weight * cv2.mean(plane)[0] for plane, weight in zip(planes, _LUMINANCE, strict=True))
    for plane in planes:
        cv2.addWeighted(plane, factor, plane, 0.0, (1 - factor) * (mean - _CUT) - _CUT, plane)


def saturation(planes: Planes, factor: float) -> None:
    """Moves the channels away from the luminance or towards it.

    Args:
        planes: (3, H, W).
        factor: 0 is a grey image, 1 the image.
    """
    weights = factor * np.eye(3) + (1 - factor) * np.tile(_LUMINANCE, (3, 1))
    cut = np.full((3, 1), -(1 - factor) * _CUT - _CUT)
    mixed = cv2.transform(cv2.merge(list(planes)), np.concatenate([weights, cut], axis=1))
    cv2.split(mixed, list(planes))


def sharpness(planes: Planes, factor: float) -> None:
    """Moves the image away from a smoothed one or towards it; its outermost pixels stay.

    Args:
        planes: (3, H, W).
        factor: 0 is the smoothed image, 1 the image.
    """
    # the filter has 5 in its middle and 1 around: a mean over 9 pixels and 4 times the middle, over 13
    weights = factor + (1 - factor) * 4 / 13, (1 - factor) * 9 / 13
    for plane in planes:
        changed = cv2.addWeighted(plane, weights[0], cv2.blur(plane, (3, 3)), weights[1], -_CUT)
        plane[1:-1, 1:-1] = changed[1:-1, 1:-1]


OPERATIONS: dict[str, tuple[Callable[[Planes, float], None], tuple[float, ...]]] = {
    "autocontrast": (autocontrast, (1.0,)),
    "equalize": (equalize, (1.0,)),
    "solarize": (solarize, (1.0,)),
    "saturation": (saturation, (0.05, 1.95)),
    "contrast": (contrast, (0.05, 1.95)),
    "brightness": (brightness, (0.05, 1.95)),
    "sharpness": (sharpness, (0.1, 0.5, 1.5, 1.9)),
    "posterize": (posterize, (1.0,)),
}
"""Each operation with its factors: two are the ends of a range, others are to choose from."""


def recolour(planes: Planes, rng: np.random.Generator) -> None:
    """One of nine: identity, autocontrast, equalize, solarize, colour, contrast, brightness, sharpness,
    posterize.

    SoftTeacher's list without its geometric parts: no crop and no jitter of boxes, so that every proposal is
    in both views (paper section 4.1).

    Args:
        planes: (3, H, W).
        rng: Source of the choice and of the factor.
    """
    drawn = int(rng.integers(len(OPERATIONS) + 1))
    if drawn < len(OPERATIONS):
        operation, factors = list(OPERATIONS.values())[drawn]
        operation(planes, rng.uniform(*factors) if len(factors) == 2 else float(rng.choice(factors)))
