"""The form that all labels are turned into: COCO's lists and a folder of images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aligndet.files import holds, plain_name, read_json

_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {  # what every entry has to have
    "images": {"id": (int,), "file_name": (str,), "width": (int, float), "height": (int, float)},
    "annotations": {"id": (int, str), "image_id": (int,), "category_id": (int,), "bbox": (object,)},
    "categories": {"id": (int,), "name": (str, int)},
}


class Document(NamedTuple):
    """Labels in COCO's form, whatever they were read from."""

    content: dict[str, Any]  # COCO's lists: images, annotations, categories
    folder: Path  # that the file names are relative to
    notes: tuple[str, ...] = ()  # what the reader had to leave out, by name


class CocoWriter:
    """COCO's lists as they grow; ids count from 1.

    Attributes:
        content: Images, annotations, categories.
    """

    def __init__(self, categories: Mapping[int, str]) -> None:
        """Starts without images.

        Args:
            categories: Names by id.
        """
        self.content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": key, "name": name} for key, name in categories.items()],
        }

    def add_image(self, file_name: str, width: int, height: int) -> int:
        """Adds an image and returns its id."""
        images = self.content["images"]
        images.append({"id": len(images) + 1, "file_name": file_name, "width": width, "height": height})
        return len(images)

    def add_object(self, category_id: int, box: Sequence[float], **fields: Any) -> None:
        """Adds an object of the last image.

        Args:
            category_id: Of its class.
            box: xyxy pixels.
            fields: What else COCO has of it, such as iscrowd.
        """
        x0, y0, x1, y1 = box
        self.content["annotations"].append(
            {
                "id": len(self.content["annotations"]) + 1,
                "image_id": len(self.content["images"]),
                "category_id": category_id,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                **fields,
            }
        )


def load_document(annotations: Path, images: Path | None = None) -> Document:
    """Reads a COCO JSON and checks that every entry has what it needs.

    Args:
        annotations: The JSON.
        images: Folder of the images; by default one named like the JSON, "images", or the JSON's own.

    Raises:
        ValueError: If it is no COCO JSON; the message names the file and the entry.
    """
    content = _load(annotations)
    folder = images if images is not None else _guess_folder(annotations, content)
    for image in content["images"]:
        image["file_name"] = plain_name(image["file_name"], folder)
    return Document(content, folder)


def check_ids(document: Mapping[str, Any], source: object) -> None:
    """Makes sure that it is clear which image an annotation is of.

    Args:
        document: COCO JSON.
        source: What it was read from, for the message.

    Raises:
        ValueError: If two images have one id, or an annotation is of an image that is not listed.
    """
    ids: set[int] = set()
    for image in document["images"]:
        if image["id"] in ids:
            raise ValueError(f"{source}: image id {image['id']} occurs twice")
        ids.add(image["id"])
    for annotation in document["annotations"]:
        if annotation["image_id"] not in ids:
            raise ValueError(
                f"{source}: annotation {annotation['id']} is of image {annotation['image_id']}, which is not"
                " listed"
            )


def image_size(image: Mapping[str, Any], source: object) -> tuple[int, int]:
    """Width and height of an image in pixels.

    Args:
        image: An entry of a COCO JSON's images.
        source: What it stands in, for the message.

    Raises:
        ValueError: If they are no numbers from 1 to 2^31 - 1.
    """
    width, height = image["width"], image["height"]
    if not all(isinstance(side, (int, float)) and 1 <= side < 2**31 for side in (width, height)):
        raise ValueError(f"{source}: image {image['file_name']} has the size {width!s:.20}x{height!s:.20}")
    return int(width), int(height)


def read_box(bbox: Any) -> list[float]:
    """The box of an object.

    Args:
        bbox: As a COCO JSON has it.

    Returns:
        x, y, width and height in pixels.

    Raises:
        ValueError: If it is not four finite numbers.
    """
    largest = sys.float_info.max  # JSON has integers that no float can hold
    if (
        not isinstance(bbox, (list, tuple))
        or len(bbox) != 4
        or not all(type(value) in (int, float) and abs(value) <= largest for value in bbox)
    ):
        raise ValueError(f"bbox {bbox!r:.80} is not four finite numbers")
    return [float(value) for value in bbox]


def _load(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file of annotations") from error
    for section, fields in _FIELDS.items():
        if not isinstance(document.get(section), list):
            raise ValueError(f"{path}: is no COCO JSON: it has no list {section!r}")
        for entry in document[section]:
            for key, kinds in fields.items():
                if not isinstance(entry, dict) or key not in entry:
                    raise ValueError(f"{path}: an entry of {section!r} has no {key!r}: {str(entry)[:200]}")
                if not isinstance(entry[key], kinds):
                    wanted = " or ".join(kind.__name__ for kind in kinds)
                    raise ValueError(
                        f"{path}: {key!r} of an entry of {section!r} is no {wanted}: {str(entry)[:200]}"
                    )
    for entry in document["annotations"]:
        if entry.get("iscrowd") not in (None, 0, 1):
            raise ValueError(
                f"{path}: 'iscrowd' of annotation {entry['id']} is neither 0 nor 1: {entry['iscrowd']!r:.80}"
            )
    return document


def _guess_folder(annotations: Path, content: dict[str, Any]) -> Path:
    """The first usual folder with one of the images in it, or else that there is."""
    stem = annotations.stem.removeprefix("instances_")
    candidates = [
        annotations.with_name(stem),
        annotations.with_name("images"),
        annotations.parent.parent / stem,
        annotations.parent.parent / "images",
    ]
    folders = [*(folder for folder in candidates if folder.is_dir()), annotations.parent]
    some = [image["file_name"] for image in content["images"][:20]]
    return next((f for f in folders if any(holds(f, name) for name in some)), folders[0])
