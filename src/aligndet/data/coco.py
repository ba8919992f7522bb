"""COCO JSON: read, checked, and kept in plain arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligndet.data.document import Document, check_ids, image_size, read_box
from aligndet.data.images import ImageError, read_image
from aligndet.data.rle import EncodedMasks, areas, decode, read_segmentation
from aligndet.files import safe_name


class Category(NamedTuple):
    """A class of objects; its label is its position among the categories plus one, 0 being the background."""

    id: int
    name: str


@dataclass(frozen=True)
class CocoDataset:
    """Images, boxes and classes of a COCO JSON; one entry an image in every list."""

    folder: Path
    file_names: list[str]
    sizes: npt.NDArray[np.int32]  # (images, 2) width, height
    categories: tuple[Category, ...]  # sorted by id
    boxes: list[npt.NDArray[np.float32]]  # (n, 4) xyxy pixels
    labels: list[npt.NDArray[np.int64]]  # (n,) from 1
    iscrowd: list[npt.NDArray[np.bool_]]  # (n,)
    areas: list[npt.NDArray[np.float32]]  # (n,) of the masks if there are any, else of the boxes
    warnings: tuple[str, ...]  # what was dropped or clipped, by name
    masks: list[list[bytes]] | None = None  # (n,) compressed run lengths of each image, if asked for

    def arrays(self) -> Iterator[npt.NDArray[Any]]:
        """All that a detector learns of the images, or is measured by."""
        yield from self.boxes
        yield from self.labels
        yield from self.iscrowd
        for masks in self.masks or ():
            yield from (np.frombuffer(mask, np.uint8) for mask in masks)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.file_names)


def build_dataset(
    labels: Document,
    annotations: Path,
    *,
    strict: bool = False,
    categories: Sequence[Category] | None = None,
    masks: bool | None = False,
) -> CocoDataset:
    """Checks labels, and keeps them in plain arrays.

    An image whose file is missing, a box of no size or not finite, and an object whose mask (if asked for) is
    malformed, of another size or empty are left out, a box that reaches beyond its image is clipped; each is
    counted and named in ``warnings``, and the first ones are printed.

    Args:
        labels: The document.
        annotations: What it was read from, for the messages.
        strict: Make every warning an error.
        categories: What the categories have to be (those of the training images).
        masks: Read masks, too; None: if every object has one.

    Raises:
        ValueError: If they contradict themselves (an id twice, an unknown image or category), hold other
            categories, lack a mask, or none of the images is there; the message names the file and the value.
    """
    document, folder = labels.content, labels.folder
    found = _categories(annotations, document, categories)
    label = {category.id: position + 1 for position, category in enumerate(found)}
    warnings: list[str] = list(labels.notes)
    without_mask = next((a["id"] for a in document["annotations"] if not a.get("segmentation")), None)
    if masks and without_mask is not None:
        raise ValueError(f"{annotations}: annotation {without_mask} has no mask (segmentation)")
    masks = masks is not False and without_mask is None

    check_ids(document, annotations)
    entries: dict[int, dict[str, Any]] = {image["id"]: image for image in document["images"]}
    for image in entries.values():
        image_size(image, annotations)
    rows: dict[int, list[tuple[list[float], int, bool, float, bytes]]] = {key: [] for key in entries}
    seen: set[Any] = set()
    for annotation in document["annotations"]:
        key = annotation["id"]
        if key in seen:
            raise ValueError(f"{annotations}: annotation id {key} occurs twice")
        seen.add(key)
        if annotation["category_id"] not in label:
            raise ValueError(
                f"{annotations}: annotation {key} is of the unknown category {annotation['category_id']}"
            )
        image = entries[annotation["image_id"]]
        box, note = clip_box(annotation["bbox"], image["width"], image["height"])
        mask: bytes | None = b""
        pixels = 0.0 if box is None else (box[2] - box[0]) * (box[3] - box[1])
        if box is not None and masks:
            mask, pixels, flaw = _mask(annotation["segmentation"], int(image["width"]), int(image["height"]))
            note = flaw or note
        if note:
            warnings.append(f"annotation {key} of {image['file_name']}: {note}")
        if box is not None and mask is not None:
            area = _area(annotation.get("area"), pixels)
            rows[image["id"]].append(
                (box, label[annotation["category_id"]], bool(annotation.get("iscrowd", 0)), area, mask)
            )

    present = []
    for key, image in entries.items():
        if (folder / safe_name(image["file_name"], annotations)).is_file():
            present.append(key)
        else:
            warnings.append(f"image {image['file_name']}: not in {folder}")
    if not present:
        reason = f"; the first: {labels.notes[0]}" if labels.notes else ""
        raise ValueError(
            f"{annotations}: none of its {len(entries)} images is in {folder}{reason}; give the folder of the"
            " images (--images, --val-images)"
        )
    if warnings and strict:
        raise ValueError(f"{annotations}: {warnings[0]} (and {len(warnings) - 1} more)")
    for note in warnings[:5]:
        print(f"{annotations.name}: {note}")
    if len(warnings) > 5:
        print(f"{annotations.name}: {len(warnings) - 5} more of the like")
    return CocoDataset(
        folder,
        [entries[key]["file_name"] for key in present],
        np.array([(entries[key]["width"], entries[key]["height"]) for key in present], np.int32),
        found,
        [np.array([row[0] for row in rows[key]], np.float32).reshape(-1, 4) for key in present],
        [np.array([row[1] for row in rows[key]], np.int64) for key in present],
        [np.array([row[2] for row in rows[key]], np.bool_) for key in present],
        [np.array([row[3] for row in rows[key]], np.float32) for key in present],
        tuple(warnings),
        [[row[4] for row in rows[key]] for key in present] if masks else None,
    )


def check_objects(coco: CocoDataset, source: object) -> None:
    """Refuses labels that there is nothing to learn from or to measure by.

    Args:
        coco: The data set.
        source: What it was read from, for the message.

    Raises:
        ValueError: If it has no object, or crowds alone.
    """
    if all(crowds.all() for crowds in coco.iscrowd):
        raise ValueError(f"{source}: has no object in any of its {len(coco)} images")


def image_files(folder: Path, names: Iterable[str]) -> list[str]:
    """The files that names of images stand for, by which two data sets can be compared.

    Args:
        folder: That the names are relative to; links to folders are followed.
        names: Of the images.
    """
    real = cache(os.path.realpath)
    paths = (os.path.split(f"{folder}/{name}") for name in names)
    return [f"{real(parent)}/{name}" for parent, name in paths]


class CocoDetection(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Decoded images with torchvision's targets."""

    def __init__(self, coco: CocoDataset, *, crowds: bool = False) -> None:
        """Prepares the data set.

        Args:
            coco: Images and boxes.
            crowds: Keep crowd regions, which evaluation ignores and training must not see.
        """
        self.coco, self.crowds = coco, crowds

    def __len__(self) -> int:
        return len(self.coco)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the image, (3, H, W) uint8, and its boxes (n, 4), labels, iscrowd, area (n,)
        and, if the data set has them, masks (n, H, W) uint8; raises ImageError if the image is broken or not
        of the size that its boxes refer to.
        """
        coco = self.coco
        path = coco.folder / coco.file_names[index]
        image = read_image(path)
        found, annotated = (image.shape[2], image.shape[1]), tuple(coco.sizes[index].tolist())
        if found != annotated:
            raise ImageError(
                f"{path}: is {found[0]}x{found[1]} pixels (upright),"
                f" but its boxes are of {annotated[0]}x{annotated[1]}"
            )
        kept = np.ones(len(coco.labels[index]), np.bool_) if self.crowds else ~coco.iscrowd[index]
        target = {
            "boxes": torch.from_numpy(coco.boxes[index][kept]),
            "labels": torch.from_numpy(coco.labels[index][kept]),
            "iscrowd": torch.from_numpy(coco.iscrowd[index][kept]).long(),
            "area": torch.from_numpy(coco.areas[index][kept]),
        }
        if coco.masks is not None:
            chosen = [coco.masks[index][i] for i in np.flatnonzero(kept).tolist()]
            target["masks"] = torch.from_numpy(decode(EncodedMasks(found[1], found[0], chosen)))
        return image, target


def _categories(
    path: Path, document: dict[str, Any], expected: Sequence[Category] | None
) -> tuple[Category, ...]:
    found = tuple(sorted(Category(int(c["id"]), str(c["name"])) for c in document["categories"]))
    if not found:
        raise ValueError(f"{path}: has no categories")
    if len({category.id for category in found}) < len(found):
        raise ValueError(f"{path}: a category id occurs twice")
    if expected is not None and found != tuple(expected):
        other = next((c for c in found if c not in expected), None) or next(
            c for c in expected if c not in found
        )
        raise ValueError(
            f"{path}: its categories are not those of the detector; the first that differs: {other}"
        )
    return found


def _area(area: Any, pixels: float) -> float:
    """The annotated area (of the mask, if there is one), or the pixels where that makes no sense."""
    known = isinstance(area, (int, float)) and 0 < area < 2**62  # no image is larger; false for nan, too
    return float(area) if known else pixels


def clip_box(bbox: Any, width: int, height: int) -> tuple[list[float] | None, str | None]:
    """From xywh to clipped xyxy, with a note of what was wrong.

    Args:
        bbox: As in the JSON.
        width: Of the image.
        height: Of the image.

    Returns:
        The box, or None if nothing is left of it, and the note, or None if all was well.
    """
    try:
        x, y, w, h = read_box(bbox)
    except ValueError as error:
        return None, f"dropped: {error}"
    if w <= 0 or h <= 0:
        return None, f"dropped the box {[x, y, w, h]} (xywh), which has no size"
    box = [max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)]
    if box[2] <= box[0] or box[3] <= box[1]:
        return None, f"dropped the box {[x, y, w, h]} (xywh), which is outside of the {width}x{height} image"
    beyond = max(-x, -y, x + w - width, y + h - height)
    return box, f"clipped the box {[x, y, w, h]} (xywh) to the {width}x{height} image" if beyond > 1 else None


def _mask(segmentation: Any, width: int, height: int) -> tuple[bytes | None, float, str | None]:
    """Compressed run lengths and how many pixels these are, with a note of what was wrong."""
    try:
        counts = read_segmentation(segmentation, width, height)
    except ValueError as error:
        return None, 0.0, f"dropped: it {error}"
    pixels = float(areas(EncodedMasks(height, width, [counts]))[0])
    return (counts, pixels, None) if pixels else (None, 0.0, "dropped: its mask has no pixel")
