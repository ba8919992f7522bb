"""What there is to say about a data set before a detector is trained on it."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from aligndet.data.coco import clip_box
from aligndet.data.document import Document, image_size
from aligndet.data.images import ImageError, read_image
from aligndet.data.rle import read_segmentation
from aligndet.files import safe_name

Finding = tuple[str, str]  # kind of problem, and where it is


def check_images(labels: Document, source: Path) -> tuple[dict[int, tuple[int, int]], list[Finding], int]:
    """Decodes every image.

    Args:
        labels: The data set.
        source: What it was read from, for the messages.

    Returns:
        Width and height of the readable images by id (without images that share an id), the problems, and the
        number of exact duplicates.
    """
    sizes: dict[int, tuple[int, int]] = {}
    uses = Counter(entry["id"] for entry in labels.content["images"])
    findings: list[Finding] = []
    seen: dict[str, str] = {}
    duplicates = 0
    for entry in labels.content["images"]:
        name = safe_name(entry["file_name"], source)
        if uses[entry["id"]] > 1:
            findings.append(("duplicate id", f"{name}: image id {entry['id']} is another image's, too"))
            continue
        try:
            height, width = read_image(labels.folder / name).shape[1:]
        except ImageError as error:
            findings.append(("broken image", str(error)))
            continue
        if (width, height) != (entry["width"], entry["height"]):
            text = f"{name}: is {width}x{height}, its labels say {entry['width']}x{entry['height']}"
            findings.append(("wrong size", text))
        sizes[entry["id"]] = (width, height)
        digest = hashlib.sha256((labels.folder / name).read_bytes()).hexdigest()
        if digest in seen:
            duplicates += 1
            findings.append(("duplicate image", f"{name}: the same file as {seen[digest]}"))
        seen.setdefault(digest, name)
    return sizes, findings, duplicates


def labelled_size(entry: dict[str, Any], found: tuple[int, int]) -> tuple[int, int]:
    """Width and height that the boxes of an image refer to.

    Args:
        entry: Of the image.
        found: Size of its file, where the labels say none that makes sense.
    """
    try:
        return image_size(entry, "")
    except ValueError:
        return found


def check_boxes(
    labels: Document, sizes: dict[int, tuple[int, int]]
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Checks the boxes of the readable images.

    Args:
        labels: The data set.
        sizes: Of the readable images, by id.

    Returns:
        The annotations that can be used, clipped to their images and with an id for each, and the problems.
    """
    images = {entry["id"]: entry for entry in labels.content["images"]}
    categories = {entry["id"] for entry in labels.content["categories"]}
    kept: list[dict[str, Any]] = []
    findings: list[Finding] = [
        ("repeated class name", f"{name}: of classes {', '.join(map(str, same))}, which stay apart")
        for name, same in _repeated_names(labels).items()
    ]
    findings += [
        ("duplicate id", f"class id {number} is that of {count} classes")
        for number, count in Counter(entry["id"] for entry in labels.content["categories"]).items()
        if count > 1
    ]
    ids: set[int] = set()
    annotations = labels.content["annotations"]
    numbers = (entry["id"] for entry in annotations if isinstance(entry["id"], int))  # others are strings
    unused = itertools.count(1 + max(numbers, default=0))
    for entry in annotations:
        image = images.get(entry["image_id"])
        where = f"annotation {entry['id']} of {image['file_name'] if image else entry['image_id']}"
        if image is None or entry["category_id"] not in categories:
            findings.append(("unknown image or class", where))
            continue
        if entry["id"] in ids:
            findings.append(("duplicate id", f"{where}: the id is another annotation's"))
            entry = {**entry, "id": next(unused)}
        ids.add(entry["id"])
        if entry["image_id"] not in sizes:
            continue
        width, height = labelled_size(image, sizes[entry["image_id"]])
        box, note = clip_box(entry["bbox"], width, height)
        if note:
            kind = "empty box" if box is None else "box out of bounds"
            findings.append((kind, f"{where}: {note}"))
        if box is not None:
            left, top, right, bottom = box
            fixed = {**entry, "bbox": [left, top, right - left, bottom - top]}
            if entry.get("segmentation"):
                try:
                    fixed["segmentation"] = _clip_outlines(entry["segmentation"], width, height)
                except ValueError as error:
                    findings.append(("malformed outline", f"{where}: {error}"))
            kept.append(fixed if note else entry)
    return kept, findings


def _repeated_names(labels: Document) -> dict[str, list[int]]:
    """Ids of the classes that share a name."""
    ids: dict[str, list[int]] = {}
    for entry in labels.content["categories"]:
        ids.setdefault(str(entry["name"]), []).append(entry["id"])
    return {name: sorted(same) for name, same in ids.items() if len(same) > 1}


def _clip_outlines(outlines: Any, width: int, height: int) -> Any:
    """Moves what lies beyond the image to its edge; raises ValueError if these are no outlines."""
    read_segmentation(outlines, width, height)
    if isinstance(outlines, dict):  # run lengths cannot reach beyond
        return outlines
    points = (np.array(outline, np.float64).reshape(-1, 2) for outline in outlines)
    return [corners.clip(0, (width, height)).ravel().tolist() for corners in points]


def statistics(
    labels: Document, sizes: dict[int, tuple[int, int]], kept: list[dict[str, Any]]
) -> dict[str, Any]:
    """Counts images, boxes, classes and sizes."""
    counts = Counter(entry["category_id"] for entry in kept)
    names = _repeated_names(labels)
    classes = {
        f"{c['name']} (id {c['id']})" if str(c["name"]) in names else str(c["name"]): counts[c["id"]]
        for c in sorted(labels.content["categories"], key=lambda c: c["id"])
    }
    sides = [math.sqrt(entry["bbox"][2] * entry["bbox"][3]) for entry in kept]
    present = [count for count in classes.values() if count]
    return {
        "images": len(labels.content["images"]),
        "readable_images": len(sizes),
        "boxes": len(kept),
        "classes": classes,
        "images_without_boxes": len(sizes.keys() - {entry["image_id"] for entry in kept}),
        "image_width": _spread([size[0] for size in sizes.values()]),
        "image_height": _spread([size[1] for size in sizes.values()]),
        "box_side": _spread(sides),
        "box_sizes": {  # COCO's bounds
            "small": sum(side < 32 for side in sides),
            "medium": sum(32 <= side < 96 for side in sides),
            "large": sum(side >= 96 for side in sides),
        },
        "imbalance": max(present) / min(present) if present else None,
    }


def _spread(values: list[Any]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": float(min(values)), "median": float(np.median(values)), "max": float(max(values))}
