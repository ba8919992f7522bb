"""Images for image-domain pre-training: two random crops of each, and whole ones with a class to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_area
from torchvision.transforms import v2

from aligndet.data.formats import read_labelled
from aligndet.data.images import first_readable, read_image
from aligndet.data.sources import ImageSource
from aligndet.proposals.table import SharedNames


class TwoCrops(NamedTuple):
    """What one image brings to a step."""

    first: Tensor  # (3, S, S) normalised
    second: Tensor  # (3, S, S)
    file_name: str
    skipped: tuple[str, ...]  # messages about broken images that this one replaces


class TwoCropsDataset(Dataset[TwoCrops]):
    """Asked for by (position, seed), see `aligndet.training.StepSampler`."""

    def __init__(
        self,
        folder: Path | ImageSource,
        file_names: Sequence[str],
        augment: Callable[..., Any],
        *,
        strict: bool = False,
    ) -> None:
        """Prepares the data set.

        Args:
            folder: Of the images.
            file_names: Relative to it.
            augment: From a PIL image to two tensors; draws from the generators of torch and NumPy.
            strict: A broken image is an error, not a warning.
        """
        self.folder, self.augment, self.strict = folder, augment, strict
        self.file_names = SharedNames.of(file_names)

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, item: tuple[int, int]) -> TwoCrops:
        index, seed = item
        image, position, skipped = first_readable(
            lambda i: read_image(self.folder / self.file_names[i]), index, len(self), strict=self.strict
        )
        numbers = np.random.get_state()  # Lightning's isolate_rng would bring all of it into every worker
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed cares for GPUs, too: milliseconds
            np.random.seed([seed % 2**32, seed // 2**32])
            first, second = self.augment(v2.functional.to_pil_image(image))
        np.random.set_state(numbers)
        return TwoCrops(first, second, self.file_names[position], skipped)


class ClassifiedDataset(Dataset[tuple[Tensor, int]]):
    """The middle of images, each with a class."""

    def __init__(
        self,
        folder: Path | ImageSource,
        classes: dict[str, int],
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """Prepares the data set.

        Args:
            folder: Of the images.
            classes: By file name.
            size: Of the square that is looked at, the short side of the image.
            mean: Of the normalisation.
            std: Likewise.
        """
        self.folder, self.classes = folder, sorted(classes.items())
        self.prepare = v2.Compose(
            [
                v2.Resize(size),
                v2.CenterCrop(size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self.classes[index]
        return self.prepare(read_image(self.folder / name)), label


def read_classes(labels: str, folder: Path, file_names: Sequence[str], *, strict: bool) -> dict[str, int]:
    """Finds a class for each image that has one.

    Args:
        labels: "folders" (the first sub-folder is the class), or COCO, PASCAL VOC or YOLO (the class of the
            largest box).
        folder: Of the images.
        file_names: Relative to it.
        strict: A broken box is an error.

    Returns:
        Classes from 0, by file name.

    Raises:
        ValueError: If fewer than four images, or fewer than two classes, are labelled.
    """
    if labels == "folders":
        named = {name: name.split("/")[0] for name in file_names if "/" in name}
        numbers = {folder: number for number, folder in enumerate(sorted(set(named.values())))}
        found = {name: numbers[folder] for name, folder in named.items()}
    else:
        coco = read_labelled(Path(labels), folder, split="train", strict=strict)
        boxed = zip(coco.file_names, coco.boxes, coco.labels, strict=True)
        found = {
            name: int(c[int(box_area(torch.from_numpy(boxes)).argmax())]) - 1
            for name, boxes, c in boxed
            if len(boxes)
        }
        found = {name: found[name] for name in file_names if name in found}
    if len(found) < 4 or len(set(found.values())) < 2:
        raise ValueError(
            f"labels {labels}: {len(found)} of the {len(file_names)} images have a class, of"
            f" {len(set(found.values()))} classes; at least four of two are needed"
        )
    return found
