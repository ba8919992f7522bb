"""Two augmented views of an image with its proposals (paper section 4.1, data augmentation)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from aligndet.data.images import first_readable, read_image
from aligndet.proposals.storage import ProposalTable


class View(NamedTuple):
    """An augmented image with its proposals; the same row is the same proposal in both views."""

    image: Tensor  # (3, H, W) uint8
    proposals: Tensor  # (N, 4) xyxy pixels of this view
    masks: Tensor | None = None  # (N, S, S) uint8, 0 or 1, over the box of each proposal, if asked for
    clusters: Tensor | None = None  # (N,) int64 pseudo-classes, if asked for


class TwoViews(NamedTuple):
    """What one image brings to a pre-training step."""

    online: View
    momentum: View
    file_name: str
    skipped: tuple[str, ...]  # messages about broken images that this one replaces


def short_sides(min_size: tuple[int, int]) -> list[int]:
    """The short sides to choose from: the range in steps of 32 (640, 672, ... 800 in the paper).

    Args:
        min_size: Smallest and largest short side.
    """
    smallest, largest = min_size
    if not 32 <= smallest <= largest:
        raise ValueError(f"min_size must be two growing numbers from 32 on, not {min_size}")
    return [*range(smallest, largest, 32), largest]


def geometric(min_size: tuple[int, int], max_size: int, flip: float = 0.5) -> v2.Transform:
    """Resizes to a random short side (long side bounded) and flips.

    Args:
        min_size: Smallest and largest short side.
        max_size: Bound of the long side.
        flip: Probability of the horizontal flip.
    """
    sizes = short_sides(min_size)
    if max_size < max(sizes):
        raise ValueError(f"max_size {max_size} is smaller than the largest short side {max(sizes)}")
    return v2.Compose([v2.RandomShortestSize(sizes, max_size), v2.RandomHorizontalFlip(flip)])


def photometric() -> v2.Transform:
    """One of nine: identity, autocontrast, equalize, solarize, colour, contrast, brightness, sharpness,
    posterize.

    SoftTeacher's list without its geometric parts: no crop and no jitter of boxes, so that every proposal is
    in both views (paper section 4.1).
    """
    return v2.RandomChoice(
        [
            v2.Identity(),
            v2.RandomAutocontrast(p=1.0),
            v2.RandomEqualize(p=1.0),
            v2.RandomSolarize(threshold=128, p=1.0),
            v2.ColorJitter(saturation=(0.05, 1.95)),
            v2.ColorJitter(contrast=(0.05, 1.95)),
            v2.ColorJitter(brightness=(0.05, 1.95)),
            v2.RandomChoice([v2.RandomAdjustSharpness(factor, p=1.0) for factor in (0.1, 0.5, 1.5, 1.9)]),
            v2.RandomPosterize(bits=4, p=1.0),
        ]
    )


class TwoViewDataset(Dataset[TwoViews]):
    """Decodes an image once and augments it twice.

    An item is asked for by (position, seed), see `aligndet.training.StepSampler`: the same pair gives the
    same views in every process, which is what lets a resumed run see the same data.
    """

    def __init__(
        self,
        images: Path,
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
            images: Folder that the table's file names are relative to.
            table: The proposals; views have masks and clusters if it has.
            min_size: Range of the views' short side.
            max_size: Bound of the views' long side.
            max_proposals: Most proposals of an image in a step.
            top_proposals: Take the first ones in rank order (DETR), not a random subset.
            strict: A broken image is an error, not a warning.
        """
        self.images, self.table, self.strict = images, table, strict
        self.max_proposals, self.top_proposals = max_proposals, top_proposals
        self.augment = v2.Compose([geometric(min_size, max_size), photometric()])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, int]) -> TwoViews:
        index, seed = item
        image, position, skipped = first_readable(
            lambda i: read_image(self.images / self.table.file_names[i]), index, len(self), strict=self.strict
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._views(image, position, skipped)

    def _views(self, image: Tensor, index: int, skipped: tuple[str, ...]) -> TwoViews:
        boxes = torch.from_numpy(self.table.boxes_of(index).copy())  # (N, 4), in rank order
        chosen = torch.arange(len(boxes))
        if len(boxes) > self.max_proposals and not self.top_proposals:
            chosen = torch.randperm(len(boxes))
        chosen = chosen[: self.max_proposals]
        masks, clusters = None, None
        if self.table.clusters is not None:
            clusters = torch.from_numpy(self.table.clusters_of(index, chosen.numpy()))
        if self.table.masks is not None:
            masks = torch.from_numpy(self.table.masks_of(index, chosen.numpy()))
        # the table knows the image's size from when the proposals were made
        width, height = self.table.sizes[index].tolist()
        scale = torch.tensor([image.shape[2] / width, image.shape[1] / height]).repeat(2)
        online, momentum = (self._view(image, boxes[chosen] * scale, masks) for _ in range(2))
        online, momentum = (view._replace(clusters=clusters) for view in (online, momentum))
        return TwoViews(online, momentum, self.table.file_names[index], skipped)

    def _view(self, image: Tensor, boxes: Tensor, masks: Tensor | None) -> View:
        height, width = image.shape[1:]
        # a box of the left half that goes the image's way, to tell whether it was flipped
        left = torch.tensor([0.0, 0.0, width / 2, height])
        tracked, left = (
            tv_tensors.BoundingBoxes(b, format="XYXY", canvas_size=(height, width))
            for b in (boxes, left[None])
        )
        image, tracked, left = self.augment(tv_tensors.Image(image), tracked, left)
        if masks is not None and left[0, 0] > 0:
            masks = masks.flip(-1)
        return View(image.as_subclass(Tensor), tracked.as_subclass(Tensor), masks)


def collate(items: Sequence[TwoViews]) -> list[TwoViews]:
    """Keeps a batch a list: images of one batch differ in size.

    Args:
        items: Of the batch.
    """
    return list(items)
