"""`aligndet split`: held-out images, and low-data splits of labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aligndet.data.document import check_ids
from aligndet.data.formats import load_labelled
from aligndet.data.splits import held_out_positions, in_order, nested_subsets, with_images
from aligndet.files import accepts_strings, atomic_write, contents, locked, print_skipped, read_json

_EXPLANATION = """Splits of `aligndet split`.
{held_out}
foldK/train_Ppct.json    COCO JSON of P per cent of the images (train_Nimages.json: of N images)
foldK/train_Ppct.txt     their file names, one a line
manifest.json            source, seed, number of images and of objects of every split

Within a fold every smaller split lies in the larger ones. The folds are drawn independently.
Train on one with: aligndet finetune foldK/train_Ppct.json --images {folder} --output ...
"""


_HELD_OUT = """
val.json     COCO JSON of the images that were held out (val.txt: their file names)
train.json   of all others, which the splits below are drawn from (train.txt: their file names)
Train with: aligndet finetune train.json --val-annotations val.json --output ...
    --images {folder} --val-images {folder}
"""


@accepts_strings
def split(
    annotations: Path,
    *,
    output: Path,
    images: Path | None = None,
    percents: tuple[float, ...] | None = None,
    counts: tuple[int, ...] = (),
    folds: int = 5,
    hold_out: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Holds images out for validation, and draws low-data splits, as COCO JSON and as lists of file names.

    The splits of a fold are nested: the images of its 1 % are among those of its 5 %.

    Args:
        annotations: Labels of the images: COCO JSON, PASCAL VOC or YOLO (file or folder).
        output: Folder for foldK/train_Ppct.json and .txt, train.json and val.json (and .txt).
        images: Folder of the images; by default looked for.
        percents: Sizes in per cent of the images, such as 0.5,1,10; rounded to whole images, at least one. By
            default 1,5,10,20, and none with hold_out or counts.
        counts: Sizes in images, beside the percents.
        folds: Number of independent draws.
        hold_out: Per cent of the images for val.json; the others make train.json, from which the splits are
            drawn. Images of one scene or video should not be divided: give them a JSON of their own instead.
        seed: Seed of the draws.
        overwrite: Throw away the splits that output holds.

    Returns:
        The folder.

    Raises:
        ValueError: If a size does not fit the images, an annotation could be of several or of none, or output
            holds something else.
    """
    if percents is None:
        percents = () if hold_out is not None or counts else (1.0, 5.0, 10.0, 20.0)
    wrong = next((value for value in percents if not 0 < value <= 100), None)
    if wrong is not None:
        raise ValueError(f"a percentage must be above 0 and at most 100 per cent, not {wrong}")
    if folds < 1 or not (percents or counts or hold_out is not None):
        raise ValueError(f"there must be a fold and a percentage or count, not {folds} folds")
    if hold_out is not None and not 0 < hold_out < 100:
        raise ValueError(f"hold_out must be above 0 and below 100 per cent, not {hold_out}")
    labels = load_labelled(annotations, images, "train")
    check_ids(labels.content, annotations)
    entries = in_order(labels.content)
    whole: dict[str, list[dict[str, Any]]] = {}
    if hold_out is not None:
        if len(entries) < 2:
            raise ValueError(f"{annotations}: two images at least are needed to hold one out")
        kept, held_out = held_out_positions(len(entries), hold_out / 100, seed=seed)
        whole["val"] = [entries[position] for position in held_out]
        whole["train"] = entries = [entries[position] for position in kept]
    sizes = {f"train_{value:g}pct": max(1, round(len(entries) * value / 100)) for value in percents}
    sizes |= {f"train_{count}images": count for count in counts}
    subsets = nested_subsets(len(entries), list(sizes.values()), folds=folds, seed=seed)
    manifest: dict[str, Any] = {
        "source": str(annotations.resolve()),
        "images_folder": str(labels.folder.resolve()),
        "images": len(entries),
        "seed": seed,
        "folds": folds,
        "skipped": labels.notes,
        "splits": {},
    }
    folder = labels.folder.resolve()
    with locked(output):
        _clear(output, overwrite, annotations)
        for name, part in whole.items():
            manifest[name] = _write(output / f"{name}.json", labels.content, part)
        for fold, chosen in enumerate(subsets):
            for size, positions in zip(sizes, chosen, strict=True):
                part, name = [entries[position] for position in positions], f"fold{fold}/{size}.json"
                manifest["splits"][name] = _write(output / name, labels.content, part)
        held = _HELD_OUT.format(folder=folder) if whole else ""
        atomic_write(output / "README.txt", _EXPLANATION.format(folder=folder, held_out=held))
        atomic_write(output / "manifest.json", json.dumps(manifest, indent=2))
    print_skipped(labels.notes)
    if whole:
        print(f"{len(whole['val'])} images are held out, in {output / 'val.json'}")
    if sizes:
        print(f"{len(manifest['splits'])} splits of {len(entries)} images are in {output}")
    return output


def _write(path: Path, document: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, int]:
    """Writes a split as COCO JSON and its file names beside it; returns its numbers of images and objects."""
    part = with_images(document, images)
    atomic_write(path, json.dumps(part))
    atomic_write(path.with_suffix(".txt"), "".join(f"{image['file_name']}\n" for image in images))
    return {"images": len(images), "objects": len(part["annotations"])}


def _clear(output: Path, overwrite: bool, annotations: Path) -> None:
    used = contents(output)
    if used and not overwrite:
        raise ValueError(f"{output}: is not empty; give --overwrite or another output")
    if not used:
        return
    manifest = output / "manifest.json"
    made = read_json(manifest) if manifest.is_file() else {}
    if "splits" not in made:
        raise ValueError(f"{output}: holds {used[0]!r} and no splits; it is not overwritten")
    whole = [
        output / f"{name}{end}" for name in ("train", "val") if name in made for end in (".json", ".txt")
    ]
    if annotations.resolve() in [path.resolve() for path in whole]:
        raise ValueError(f"{annotations}: would be overwritten; give another output")
    for path in [*output.glob("fold*/train_*.json"), *output.glob("fold*/train_*.txt"), *whole]:
        path.unlink(missing_ok=True)
