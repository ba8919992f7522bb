"""YOLO: data.yaml and one text file of boxes an image, turned into COCO's form."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import yaml

from aligndet.data.document import CocoWriter, Document
from aligndet.data.images import ImageError, read_image_size
from aligndet.data.listing import list_images
from aligndet.files import holds, plain_name, read_lines, safe_name

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def find_yaml(path: Path) -> Path | None:
    """The data.yaml of a data set, or None if it has none.

    Args:
        path: The file, or the folder that holds it.
    """
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") and "names" in _settings(path) else None
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    # aligndet's own settings may lie there, too, whose names are a file or none
    return next((f for f in files if not isinstance(_settings(f).get("names"), str | None)), None)


def load_yolo(path: Path, images: Path | None = None, split: str = "all") -> Document:
    """Reads YOLO labels: lines of a class and a box, or of a class and an outline.

    The classes are those of data.yaml, in its order. An image without a text file has no objects. Where
    data.yaml has ``kpt_shape``, lines are of a class, a box and keypoints, which are ignored.

    Args:
        path: data.yaml, or the folder that holds it.
        images: Folder of the images; by default as data.yaml says, or ``images`` (``SPLIT/images``,
            ``images/SPLIT``).
        split: "train", "val" or "all".

    Raises:
        ValueError: If data.yaml, a list or a folder is not as it has to be; the message names it.
    """
    settings_file = find_yaml(path)
    if settings_file is None:
        raise ValueError(f"{path}: is no data.yaml with the names of classes")
    settings = _settings(settings_file)
    names = _names(settings["names"], settings_file)
    keypoints = _keypoints(settings.get("kpt_shape"), settings_file)
    found = [images] if images is not None else _folders(settings, settings_file, split)
    files = [file for entry in found for file in _image_files(entry, settings_file)]
    if not files:
        raise ValueError(f"{settings_file}: has no images ({', '.join(map(str, found))})")
    if images is None:  # a data.yaml may name relative and absolute folders
        files = [file.absolute() for file in files]
    folder = images if images is not None else Path(os.path.commonpath([file.parent for file in files]))
    document = CocoWriter(dict(enumerate(names, 1)))
    annotations = document.content["annotations"]
    notes: list[str] = []
    for file in files:
        try:
            size = read_image_size(file)
        except ImageError as error:
            notes.append(f"image {error}")
            continue
        image_id = document.add_image(file.relative_to(folder).as_posix(), *size)
        for annotation in _objects(_label_file(file), len(names), keypoints, size, notes):
            annotations.append(annotation | {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0})
    return Document(document.content, folder, tuple(notes))


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or no date
        raise ValueError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    return content if isinstance(content, dict) else {}


def _names(names: Any, path: Path) -> list[str]:
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: 'names' has to list the classes, from 0 on")
    return _texts(names, "names", path)


def _texts(values: list[Any], key: str, path: Path) -> list[str]:
    if not all(isinstance(value, (str, int, float)) for value in values):
        # not shown: aliases make gigabytes of a few lines
        raise ValueError(f"{path}: {key!r} has to hold text and numbers alone")
    return [str(value) for value in values]


def _keypoints(shape: Any, path: Path) -> int:
    """How many numbers of keypoints follow a box."""
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{path}: 'kpt_shape' has to be two numbers, as in [17, 3]")
    print(f"{path.name}: the keypoints of its objects are ignored")
    return math.prod(shape)


def _folders(settings: dict[str, Any], path: Path, split: str) -> list[Path]:
    """What data.yaml says of a split, or the usual folders."""
    root = path.parent.joinpath(*_texts([settings.get("path") or ""], "path", path))
    root = root if root.is_dir() else path.parent
    found: list[Path] = []
    for part in SPLITS if split == "all" else (split,):
        keys = SPLITS[part]
        value = next((settings[key] for key in keys if settings.get(key)), None)
        entries = _texts(value if isinstance(value, list) else [value] if value else [], part, path)
        if split == "all":  # a part that was not downloaded is no mistake then
            entries = [entry for entry in entries if _find(entry, root)]
        usual = [root / place for key in keys for place in (f"images/{key}", f"{key}/images")]
        found += [_existing(entry, root, path) for entry in entries]
        if not entries:
            found += [place for place in usual if place.is_dir()][:1]
    whole = root / "images"
    named = [key for keys in SPLITS.values() for key in keys if settings.get(key)]
    if not found and named and split != "all":
        raise ValueError(f"{path}: names no images for {split!r}, only for {', '.join(named)}")
    if not found:
        found = [whole if whole.is_dir() else root]
    return list(dict.fromkeys(found))


def _find(entry: str, root: Path) -> Path | None:
    # one widely used exporter writes ../train/images for train/images
    places = (root / entry, root / entry.removeprefix("../"))
    return next((place for place in places if place.exists()), None)


def _existing(entry: str, root: Path, path: Path) -> Path:
    found = _find(entry, root)
    if found is None:
        raise ValueError(f"{path}: {entry!r} is not in {root}")
    return found


def _image_files(entry: Path, source: Path) -> list[Path]:
    if entry.is_dir():
        return [entry / name for name in list_images(entry)]
    names = [line.removeprefix("./") for line in read_lines(entry)]
    # relative to the list; some exporters mean the folder of data.yaml, some write absolute names
    folders = (entry.parent, source.parent)
    folder = next((f for f in folders for name in names[:20] if holds(f, name)), entry.parent)
    return [folder / safe_name(plain_name(name, folder), entry) for name in names]


def _label_file(image: Path) -> Path:
    """labels/ in the place of the last images/ of the path, else beside the image."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    there = Path(*parts).with_suffix(".txt")
    return there if there.is_file() else image.with_suffix(".txt")


def _objects(
    path: Path, classes: int, keypoints: int, size: tuple[int, int], notes: list[str]
) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    wanted = f"{classes} classes from 0 and 4 numbers of a box, "
    wanted += f"and {keypoints} of its keypoints" if keypoints else "or 6 and more of an outline"
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, *values = (float(value) for value in line.split())
        except ValueError:
            label, values = -1.0, []
        outline = not keypoints and len(values) >= 6 and len(values) % 2 == 0
        shape = values if outline else values[:4]
        if (
            label not in range(classes)
            or not (len(values) == 4 + keypoints or outline)
            or not all(map(math.isfinite, shape))
        ):
            dropped = line.strip()[:80]
            notes.append(f"{path}: line {number}: dropped {dropped!r}, which is not one of {wanted}")
            continue
        objects.append({"category_id": int(label) + 1, **_shape(shape, size, outline)})
    return objects


def _shape(values: list[float], size: tuple[int, int], outline: bool) -> dict[str, Any]:
    if outline:
        points = [value * size[index % 2] for index, value in enumerate(values)]
        left, top = min(points[::2]), min(points[1::2])
        box = [left, top, max(points[::2]) - left, max(points[1::2]) - top]
        return {"bbox": box, "segmentation": [points]}
    x, y, w, h = (value * size[index % 2] for index, value in enumerate(values))
    return {"bbox": [x - w / 2, y - h / 2, w, h]}
