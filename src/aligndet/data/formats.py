"""Labelled images in any of the formats, recognised by what is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from aligndet.data.coco import Category, CocoDataset, build_dataset
from aligndet.data.document import Document, load_document
from aligndet.data.voc import is_voc, load_voc
from aligndet.data.yolo import find_yaml, load_yolo

Split = Literal["train", "val", "all"]


def read_labelled(
    path: Path,
    images: Path | None = None,
    *,
    split: Split = "all",
    strict: bool = False,
    categories: Sequence[Category] | None = None,
    masks: bool | None = False,
) -> CocoDataset:
    """Reads COCO JSON, PASCAL VOC or YOLO, and checks it as `aligndet.data.coco.build_dataset` does.

    Order of classes: COCO by id, VOC by name, YOLO as in data.yaml. VOC and YOLO have no ids of their own,
    so that with ``categories`` their classes are matched by name, or by order if all names are the same.

    Args:
        path: A COCO JSON or a folder with one; VOC as `load_voc` takes it; data.yaml or its folder.
        images: Folder of the images; by default looked for.
        split: Which part, if the format names parts.
        strict: Make every warning an error.
        categories: What the categories have to be (those of the training images).
        masks: Read masks, too; None: if every object has one.

    Raises:
        ValueError: If it is none of the formats or not in order; the message names the file and the value.
    """
    labels = load_labelled(path, images, split)
    if categories is not None and path.suffix.lower() != ".json":
        labels = _match_names(labels, path, categories)
    return build_dataset(labels, path, strict=strict, categories=categories, masks=masks)


def load_labelled(path: Path, images: Path | None = None, split: Split = "all") -> Document:
    """Reads COCO JSON, PASCAL VOC or YOLO without checking boxes.

    Raises:
        ValueError: As of `read_labelled`.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of annotations")
    if find_yaml(path) is not None:
        return load_yolo(path, images, split)
    if path.is_dir() and (document := _find_json(path, split)) is not None:
        return load_document(document, images)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ValueError(f"{path}: lists no classes: `names: [cat, dog]`")
    if is_voc(path):
        return load_voc(path, images, split)
    if path.is_dir():
        raise ValueError(
            f"{path}: holds no COCO JSON, no VOC XML and no data.yaml (YOLO's labels need one that lists the"
            " classes: `names: [cat, dog]`)"
        )
    return load_document(path, images)


def is_bare_folder(path: Path) -> bool:
    """Whether a path is a folder without labels of any format."""
    return path.is_dir() and find_yaml(path) is None and not is_voc(path) and not _jsons(path)


_SPLITS: dict[str, set[str]] = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "all": set(),
}
"""Words in the names of files that hold a part."""


def _jsons(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")])


def _find_json(folder: Path, split: str) -> Path | None:
    found = _jsons(folder)
    if len(found) > 1:
        words = {path: set(re.split("[^a-z]+", path.stem.lower())) for path in found}
        named = [path for path in found if words[path] & _SPLITS[split]]
        if len(named) != 1:
            listed = ", ".join(path.name for path in found[:5])
            raise ValueError(f"{folder}: holds several JSON files ({listed}); give one of them")
        found = named
    return found[0] if found else None


def _match_names(labels: Document, path: Path, categories: Sequence[Category]) -> Document:
    """The same labels under the ids of other categories with the same names."""
    old = sorted(labels.content["categories"], key=lambda entry: int(entry["id"]))
    ids = _matching_ids([str(entry["name"]) for entry in old], path, categories)
    new = dict(zip((entry["id"] for entry in old), ids, strict=True))
    annotations = labels.content["annotations"]
    stray = next((entry for entry in annotations if entry["category_id"] not in new), None)
    if stray is not None:
        raise ValueError(
            f"{path}: annotation {stray['id']} is of the unknown category {stray['category_id']}"
        )
    content = {
        **labels.content,
        "categories": [category._asdict() for category in categories],
        "annotations": [{**entry, "category_id": new[entry["category_id"]]} for entry in annotations],
    }
    return labels._replace(content=content)


def _matching_ids(names: list[str], path: Path, categories: Sequence[Category]) -> list[int]:
    wanted = [category.name for category in categories]
    if names == wanted:
        return [category.id for category in categories]
    known = {category.name: category.id for category in categories}
    unknown = sorted(set(names) - known.keys())
    if unknown:
        raise ValueError(
            f"{path}: its categories are not those of the detector; the first unknown one: {unknown[0]!r}"
        )
    uses = Counter(names) | Counter(wanted)
    repeated = next((name for name in names if uses[name] > 1), None)
    if repeated is not None:
        raise ValueError(
            f"{path}: several categories, its own or the detector's, are called {repeated!r}, so they cannot"
            " be matched by name; give them different names, or list all of the detector's in its order"
        )
    return [known[name] for name in names]
