"""`aligndet check-data`: is this data set fit to train on?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from aligndet.data.checks import check_boxes, check_images, labelled_size, statistics
from aligndet.data.document import CocoWriter, Document
from aligndet.data.formats import Split, is_bare_folder, load_labelled
from aligndet.data.images import ImageError, read_image_size
from aligndet.data.listing import list_images, walk
from aligndet.files import accepts_strings, atomic_write, check_file, contents, locked


@accepts_strings
def check_data(
    path: Path,
    *,
    images: Path | None = None,
    split: Split = "all",
    output: Path | None = None,
    fix: Path | None = None,
) -> dict[str, Any]:
    """Checks labelled images, or a bare folder of images, and says what is in them.

    The exit status is 0 if there is nothing to mend, 1 if there are problems (broken images, boxes out of
    bounds or empty, no box at all, malformed outlines, wrong sizes, duplicates, unreadable labels), 2 if the
    data cannot be read at all. Images without boxes and classes of unequal size are counted, and are no
    problem.

    Args:
        path: COCO JSON, PASCAL VOC or YOLO (file or folder), or a folder of images.
        images: Folder of the images; by default looked for.
        split: "train", "val" or "all", where the format names parts.
        output: JSON file for the report.
        fix: New folder for a mended copy: COCO JSON (train.json) and images (train/). Boxes are clipped;
            empty ones, broken images and those of another size than their labels say are left out; duplicates
            stay.

    Returns:
        The figures, and the problems by kind.

    Raises:
        ValueError: If the data cannot be read, or the folder of fix is not empty.
    """
    if fix is not None and fix.is_dir():
        _refuse_taken(fix)
    if output is not None:
        check_file(output)
    bare = is_bare_folder(path)
    if bare and images is not None:
        raise ValueError(f"{path}: holds no labels of a known format, which --images would be of")
    labels = _bare(path) if bare else load_labelled(path, images, split)
    if bare and next(walk(path, {".txt"}), None) is not None:
        print(
            f"{path}: has text files but no data.yaml; if they are YOLO's labels, write one with"
            " `names: [cat, dog]`"
        )
    sizes, findings, duplicates = check_images(labels, path)
    kept, wrong = check_boxes(labels, sizes)
    if sizes and not bare and all(entry.get("iscrowd") for entry in kept):
        wrong.append(("no objects", f"{path}: labels no object that can be learnt from"))
    findings = [("unreadable label", note) for note in labels.notes] + findings + wrong
    problems: dict[str, list[str]] = {}
    for kind, text in findings:
        problems.setdefault(kind, []).append(text)
    report = statistics(labels, sizes, kept) | {"duplicates": duplicates, "problems": problems}
    _print(path, report)
    if output is not None:
        atomic_write(output, json.dumps(report, indent=2))
    if fix is not None:
        _write(fix, labels, sizes, kept)
    return report


def _bare(folder: Path) -> Document:
    document = CocoWriter({})
    for name in list_images(folder):
        try:
            width, height = read_image_size(folder / name)
        except ImageError:  # is named when it is decoded
            width, height = 0, 0
        document.add_image(name, width, height)
    return Document(document.content, folder)


def _print(path: Path, report: dict[str, Any]) -> None:
    print(
        f"{path}: {report['images']} images ({report['readable_images']} readable), {report['boxes']} boxes"
    )
    for key in ("image_width", "image_height", "box_side"):
        if report[key]:
            spread = ", ".join(f"{name} {value:g}" for name, value in report[key].items())
            print(f"  {key.replace('_', ' ')}: {spread}")
    if report["boxes"]:
        print("  boxes: " + ", ".join(f"{count} {name}" for name, count in report["box_sizes"].items()))
        print(f"  images without boxes: {report['images_without_boxes']}")
        print(f"  largest class to smallest: {report['imbalance']:.1f}")
    for name, count in report["classes"].items():
        print(f"  class {name}: {count} boxes")
    for kind, texts in report["problems"].items():
        print(f"problem: {kind} ({len(texts)})")
        for text in texts[:10]:
            print(f"  {text}")
        if len(texts) > 10:
            print(f"  and {len(texts) - 10} more; --output has all")


def _refuse_taken(folder: Path) -> None:
    if contents(folder):
        raise ValueError(f"{folder}: is not empty; give a new folder")


def _write(
    folder: Path, labels: Document, sizes: dict[int, tuple[int, int]], kept: list[dict[str, Any]]
) -> None:
    with locked(folder):
        _refuse_taken(folder)
        entries = []
        for entry in labels.content["images"]:
            key = entry["id"]
            if key in sizes and sizes[key] == labelled_size(entry, sizes[key]):
                target = folder / "train" / entry["file_name"]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(labels.folder / entry["file_name"], target)
                entries.append({**entry, "width": sizes[key][0], "height": sizes[key][1]})
        copied = {entry["id"] for entry in entries}
        annotations = [entry for entry in kept if entry["image_id"] in copied]
        content = {**labels.content, "images": entries, "annotations": annotations}
        atomic_write(folder / "train.json", json.dumps(content))
