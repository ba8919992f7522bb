"""Labelled images for fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from aligndet.data.augmentations import AUGMENTATIONS, AugmentationName
from aligndet.data.coco import CocoDataset, CocoDetection, image_files
from aligndet.data.images import ImageError, first_readable


class Labelled(NamedTuple):
    """An image with its boxes, and masks if known."""

    image: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (N, 4) xyxy pixels
    labels: Tensor  # (N,) int64, from 1
    file_name: str
    skipped: tuple[str, ...]  # messages about broken images that this one replaces
    masks: Tensor | None = None  # (N, H, W) uint8, 0 or 1, if the data set has them


class LabelledDataset(Dataset[Labelled]):
    """Training images, other ones every time; the index is (position, seed) of `StepSampler`."""

    def __init__(
        self,
        coco: CocoDataset,
        *,
        min_size: tuple[int, int],
        max_size: int,
        augmentation: AugmentationName = "multiscale",
        antialias: bool = True,
        strict: bool = False,
    ) -> None:
        """Prepares the data set.

        Args:
            coco: Images and boxes.
            min_size: Range of the short side.
            max_size: Bound of the long side.
            augmentation: A key of `AUGMENTATIONS`.
            antialias: Smooth images that are made smaller; should be as the detector does it in prediction.
            strict: A broken image is an error, not a warning.
        """
        self.images, self.file_names, self.strict = CocoDetection(coco), coco.file_names, strict
        changes = AUGMENTATIONS[augmentation](min_size, max_size, antialias=antialias)
        self.augment = v2.Compose([changes, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.0)])

    @property
    def tall(self) -> Tensor:
        """(images,) bool: which images are taller than wide."""
        sizes = self.images.coco.sizes
        return torch.from_numpy(sizes[:, 1] > sizes[:, 0])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> Labelled:
        index, seed = item
        (image, target), position, skipped = first_readable(
            self.images.__getitem__, index, len(self), strict=self.strict
        )
        size = tuple(image.shape[1:])
        objects = {
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),
            "labels": target["labels"],
        }
        if "masks" in target:
            objects["masks"] = tv_tensors.Mask(target["masks"])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for GPUs: milliseconds
            image, objects = self.augment(tv_tensors.Image(image), objects)
        return Labelled(
            image.as_subclass(Tensor),
            objects["boxes"].as_subclass(Tensor),
            objects["labels"],
            self.file_names[position],
            skipped,
            objects["masks"].as_subclass(Tensor) if "masks" in objects else None,
        )


class ValidationDataset(Dataset[Any]):
    """Images and targets, unchanged; a broken image is None, and named once."""

    def __init__(self, images: Dataset[Any], *, strict: bool = False) -> None:
        """Prepares the data set.

        Args:
            images: With their targets; raises ImageError where an image is broken.
            strict: A broken image is an error, not a warning.
        """
        self.images, self.strict = images, strict
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.images[index]
        except ImageError as error:
            if self.strict:
                raise
            if index not in self._named:
                print(f"skipped in validation: {error}")
            self._named.add(index)
            return None


def remark_on_shared_images(training: CocoDataset, validation: CocoDataset) -> str | None:
    """Says how many validation images are trained on, if any are.

    Args:
        training: Images to train on.
        validation: Images to measure by.
    """
    files = (set(image_files(part.folder, part.file_names)) for part in (training, validation))
    count = len(set.intersection(*files))
    total = len(validation)
    return f"{count} of {total} validation images are trained on, not new to the detector" if count else None


class HostBatch:
    """Images with their targets that stay in the CPU's memory: Lightning and DDP move tensors in lists,
    tuples and dicts to the GPU, but not those in a class of our own.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        """Leaves the broken images out.

        Args:
            items: Items of the batch; None where an image is broken.
        """
        self.items = [item for item in items if item is not None]

    def pin_memory(self) -> HostBatch:
        """Lets a GPU read the images faster, as a loader asks."""
        return HostBatch([(image.pin_memory(), target) for image, target in self.items])
