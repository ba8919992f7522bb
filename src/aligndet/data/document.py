"""The form that all labels are turned into: COCO's lists and a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from aligndet.files import read_json

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


def load_document(annotations: Path, images: Path | None = None) -> Document:
    """Reads a COCO JSON and checks that every entry has what it needs.

    Args:
        annotations: The JSON.
        images: Folder of the images; by default looked for as `aligndet.data.coco.read_coco` says.

    Raises:
        ValueError: If it is no COCO JSON; the message names the file and the entry.
    """
    return Document(_load(annotations), images if images is not None else _guess_folder(annotations))


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
    return document


def _guess_folder(annotations: Path) -> Path:
    stem = annotations.stem.removeprefix("instances_")
    candidates = [
        annotations.with_name(stem),
        annotations.with_name("images"),
        annotations.parent.parent / stem,
    ]
    return next((folder for folder in candidates if folder.is_dir()), annotations.parent)
