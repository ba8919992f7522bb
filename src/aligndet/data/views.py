"""Two augmented views of an image with its proposals (paper section 4.1, data augmentation)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from aligndet.data.images import check_shape, first_readable, read_image
from aligndet.data.photometric import recolour
from aligndet.data.sources import ImageSource
from aligndet.proposals.table import ProposalTable


class View(NamedTuple):
    """An augmented image with its proposals; the same row is the same proposal in both views."""

    image: Tensor  # (3, H, W) uint8
    proposals: Tensor  # (N, 4) xyxy pixels of this view
    masks: Tensor | None = None  # (N, S, S) uint8, 0 or 1, over the box of each proposal, if asked for
    clusters: Tensor | None = None  # (N,) int64 pseudo-classes, if asked for


class TwoViews(NamedTuple):
    """One image's part of a pre-training step."""

    online: View
    momentum: View
    file_name: str
    skipped: tuple[str, ...]  # messages about broken images that this one replaces


def short_sides(min_size: tuple[int, int], max_size: int) -> list[int]:
    """The short sides to choose from: the range in steps of 32 (640, 672, ... 800 by default).

    Args:
        min_size: Smallest and largest short side.
        max_size: Bound of the long side.
    """
    smallest, largest = min_size
    if not 32 <= smallest <= largest:
        raise ValueError(f"min_size must be two growing numbers from 32 on, not {min_size}")
    if max_size < largest:
        raise ValueError(f"max_size {max_size} is smaller than the largest short side {largest}")
    return [*range(smallest, largest, 32), largest]


class TwoViewDataset(Dataset[TwoViews]):
    """Decodes an image once and augments it twice.

    The index of an item is (position, seed), see `aligndet.training.StepSampler`: the same pair gives the
    same views in every process, so that a resumed run sees the same data.
    """

    def __init__(
        self,
        images: Path | ImageSource,
        table: ProposalTable,
        *,
        min_size: tuple[int, int] = (640, 800),
        max_size: int = 1333,
        max_proposals: int = 50,
        top_proposals: bool = False,
        strict: bool = False,
    ) -> None:
        """Prepares the data set.

        Args:
            images: Place that the table's file names are relative to.
            table: The proposals; views have masks and clusters if it has.
            min_size: Range of the views' short side.
            max_size: Bound of the views' long side.
            max_proposals: Most proposals of an image in a step.
            top_proposals: Take the first ones in rank order, not a random subset each time.
            strict: A broken image is an error, not a warning.
        """
        self.images, self.table, self.strict = images, table, strict
        self.max_proposals, self.top_proposals = max_proposals, top_proposals
        self.short_sides, self.max_size = short_sides(min_size, max_size), max_size

    @property
    def tall(self) -> Tensor:
        """(images,) bool, which are taller than wide."""
        return torch.from_numpy(self.table.sizes[:, 1] > self.table.sizes[:, 0])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, int]) -> TwoViews:
        index, seed = item
        image, position, skipped = first_readable(self._read, index, len(self), strict=self.strict)
        return self._views(image, position, skipped, np.random.default_rng(seed))

    def _read(self, index: int) -> Tensor:
        path = self.images / self.table.file_names[index]
        short, long = sorted(self.table.sizes[index].tolist())
        largest = min(self.max_size, math.ceil(self.short_sides[-1] * long / short))
        image = read_image(path, long_side=largest)
        check_shape(image, self.table.sizes[index], path)
        return image

    def _views(
        self, image: Tensor, index: int, skipped: tuple[str, ...], rng: np.random.Generator
    ) -> TwoViews:
        boxes = self.table.boxes_of(index)  # (N, 4), in rank order
        chosen = np.arange(len(boxes))
        if len(boxes) > self.max_proposals and not self.top_proposals:
            chosen = rng.permutation(len(boxes))
        chosen = chosen[: self.max_proposals]
        masks, clusters = None, None
        if self.table.masks is not None:
            masks = torch.from_numpy(self.table.masks_of(index, chosen))
        if self.table.clusters is not None:
            clusters = torch.from_numpy(self.table.clusters_of(index, chosen))
        # boxes are of the size that the image had when its proposals were made
        relative = boxes[chosen] / np.tile(self.table.sizes[index], 2)
        online, momentum = (self._view(image, relative, masks, rng) for _ in range(2))
        online, momentum = (view._replace(clusters=clusters) for view in (online, momentum))
        return TwoViews(online, momentum, self.table.file_names[index], skipped)

    def _view(
        self, image: Tensor, boxes: npt.NDArray[Any], masks: Tensor | None, rng: np.random.Generator
    ) -> View:
        height, width = image.shape[1:]
        scale = min(rng.choice(self.short_sides) / min(height, width), self.max_size / max(height, width))
        size = [max(1, int(side * scale)) for side in (height, width)]
        # an image is enlarged last, so that there are fewer pixels to augment
        grows = scale > 1
        planes = _planes(image if grows else F.resize(image, size, antialias=True))
        if rng.random() < 0.5:
            for plane in planes:
                cv2.flip(plane, 1, plane)
            left, top, right, bottom = boxes.T
            boxes = np.stack([1 - right, top, 1 - left, bottom], axis=1)
            masks = None if masks is None else masks.flip(-1)
        recolour(planes, rng)
        if grows:
            small, planes = planes, np.empty((3, *size), np.uint8)
            for source, target in zip(small, planes, strict=True):
                cv2.resize(source, size[::-1], target, interpolation=cv2.INTER_LINEAR)
        return View(torch.from_numpy(planes), torch.from_numpy(boxes * np.tile(size[::-1], 2)).float(), masks)


def _planes(image: Tensor) -> npt.NDArray[np.uint8]:
    """An image (3, H, W) with each channel in one piece; OpenCV is several times as fast as torch."""
    planes = np.empty(tuple(image.shape), np.uint8)
    cv2.split(image.permute(1, 2, 0).contiguous().numpy(), list(planes))
    return planes
