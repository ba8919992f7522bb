from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from aligndet.data.photometric import OPERATIONS, recolour

THEIRS: dict[str, Callable[..., Any]] = {
    "autocontrast": lambda image, _: F.autocontrast(image),
    "equalize": lambda image, _: F.equalize(image),
    "solarize": lambda image, _: F.solarize(image, 128),
    "posterize": lambda image, _: F.posterize(image, 4),
    "saturation": F.adjust_saturation,
    "contrast": F.adjust_contrast,
    "brightness": F.adjust_brightness,
    "sharpness": F.adjust_sharpness,
}


def pictures() -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    ramp = np.linspace(30, 200, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    dim = (noise // 4 + 100).astype(np.uint8)
    return [noise, ramp, dim, np.full((9, 8, 3), 77, np.uint8), np.full((9, 8, 3), 255, np.uint8)]


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("number", range(5))
def test_the_same_as_torchvision_to_a_grey_level(name: str, number: int) -> None:
    operation, factors = OPERATIONS[name]
    for factor in factors:
        planes = np.ascontiguousarray(pictures()[number].transpose(2, 0, 1))
        theirs = THEIRS[name](torch.from_numpy(planes.copy()), factor).numpy()
        operation(planes, factor)
        assert np.abs(planes.astype(int) - theirs.astype(int)).max() <= 1


def test_the_factors() -> None:
    factors = {name: drawn for name, (_, drawn) in OPERATIONS.items() if drawn != (1.0,)}
    ranges = dict.fromkeys(("saturation", "contrast", "brightness"), (0.05, 1.95))
    assert factors == {**ranges, "sharpness": (0.1, 0.5, 1.5, 1.9)}


def test_every_operation_is_drawn_about_equally_often() -> None:
    rng, before = np.random.default_rng(0), np.ascontiguousarray(pictures()[2].transpose(2, 0, 1))
    found = []
    for _ in range(900):
        planes = before.copy()
        recolour(planes, rng)
        found.append(planes.tobytes())
    assert 70 <= found.count(before.tobytes()) <= 130  # the identity's ninth
    assert len(set(found)) > 250  # those with a range of factors
