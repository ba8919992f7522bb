"""How labelled images change from one step to the next: sizes, flips, crops, colours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from aligndet.data.views import short_sides

AugmentationName = Literal["multiscale", "detr", "lsj", "ssd"]


def multiscale(
    min_size: tuple[int, int], max_size: int, flip: float = 0.5, *, antialias: bool = True
) -> v2.Transform:
    """Resizes to a random short side (long side bounded) and flips.

    Args:
        min_size: Smallest and largest short side.
        max_size: Bound of the long side.
        flip: Probability of the horizontal flip.
        antialias: Smooth images that are made smaller.
    """
    resize = _ShortestSize(short_sides(min_size, max_size), max_size, antialias=antialias)
    return v2.Compose([resize, v2.RandomHorizontalFlip(flip)])


def detr(min_size: tuple[int, int], max_size: int, *, antialias: bool = True) -> v2.Transform:
    """The same, every second time from a random part of the image, as DETR and Swin are trained.

    The part has sides of 384 to 600 pixels where the image's short side is 400, 500 or 600 and the largest
    short side 800, and as much of other sizes.

    Args:
        min_size: Smallest and largest short side.
        max_size: Bound of the long side.
        antialias: Smooth images that are made smaller.
    """
    whole = multiscale(min_size, max_size, antialias=antialias)
    largest = min_size[1]
    resize = _ShortestSize([largest * n // 8 for n in (4, 5, 6)], max_size * 3 // 4, antialias=antialias)
    part = _RandomSizeCrop(largest * 12 // 25, largest * 3 // 4)
    return v2.RandomChoice([whole, v2.Compose([resize, part, whole])])


def lsj(min_size: tuple[int, int], max_size: int, *, antialias: bool = True) -> v2.Transform:
    """Large-scale jitter: 0.1 to 2 times the size that fits into a square, of which a part of at most that
    square is taken; the square has as many pixels as the largest image.

    Smaller images are padded where they meet larger ones in a batch, not before.

    Args:
        min_size: Smallest and largest short side; only the latter counts.
        max_size: Bound of the long side.
        antialias: Smooth images that are made smaller.
    """
    short_sides(min_size, max_size)  # checks them
    side = round(math.sqrt(min_size[1] * max_size))
    resize = _ScaleJitter((side, side), antialias=antialias)
    return v2.Compose([resize, _RandomSizeCrop(side, side), v2.RandomHorizontalFlip()])


def ssd(min_size: tuple[int, int], max_size: int, *, antialias: bool = True) -> v2.Transform:
    """Colours, zooming out and crops of a least overlap with an object, as SSD, RT-DETR and D-FINE are
    trained, and then `multiscale`.

    Args:
        min_size: Smallest and largest short side.
        max_size: Bound of the long side.
        antialias: Smooth images that are made smaller.
    """
    whole = multiscale(min_size, max_size, antialias=antialias)
    changes = [
        # photographs may be large, and canvases have up to 16 times as many pixels
        _Shrink([min_size[1]], max_size, antialias=antialias),
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill={tv_tensors.Image: 114, tv_tensors.Mask: 0}),
        v2.RandomApply([_IoUCrop(), v2.SanitizeBoundingBoxes()], p=0.8),
    ]
    return v2.Compose([*changes, whole])


AUGMENTATIONS: dict[str, Callable[..., v2.Transform]] = {
    "multiscale": multiscale,
    "detr": detr,
    "lsj": lsj,
    "ssd": ssd,
}
"""By the names of torchvision's reference for detection, where it has them."""


class _RandomSizeCrop(v2.Transform):
    """Takes a part of random sides from a random place; an image with a smaller side keeps it.

    torchvision's RandomCrop has one size. Boxes outside have no area then.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        """Prepares the crop.

        Args:
            smallest: Least side in pixels.
            largest: Largest side.
        """
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draws the part.

        Args:
            flat_inputs: The image first.
        """
        (top, height), (left, width) = (self._interval(side) for side in F.get_size(flat_inputs[0]))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Crops an image, its boxes or its masks.

        Args:
            inpt: One of them.
            params: The part.
        """
        return F.crop(inpt, **params)

    def _interval(self, side: int) -> tuple[int, int]:
        """Start and length along one side."""
        bounds = min(side, self.smallest), min(side, self.largest)
        length = int(torch.randint(bounds[0], bounds[1] + 1, ()))
        return int(torch.randint(side - length + 1, ())), length


class _KeepsRows:
    """Leaves a row of pixels of a panorama, at least, where torchvision's classes leave none and fail."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = super().make_params(flat_inputs)["size"]  # type: ignore[misc]
        return {"size": tuple(max(1, side) for side in size)}


class _ShortestSize(_KeepsRows, v2.RandomShortestSize):
    pass


class _Shrink(_ShortestSize):
    """Leaves smaller images as they are."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        now = F.get_size(flat_inputs[0])
        return {"size": min(now, list(super().make_params(flat_inputs)["size"]))}


class _ScaleJitter(_KeepsRows, v2.ScaleJitter):
    pass


class _IoUCrop(v2.RandomIoUCrop):
    """Leaves a panorama's few rows as they are; torchvision's may take none of them and fail."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        if min(F.get_size(flat_inputs[0])) < 4:
            return {}
        params: dict[str, Any] = super().make_params(flat_inputs)
        return params
