"""`aligndet sample-data`: a small labelled data set, made offline in seconds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from aligndet.data.document import CocoWriter
from aligndet.data.sample import BACKGROUNDS, MATTERS, compose_scene
from aligndet.files import accepts_strings, atomic_write, contents, locked

_EXPLANATION = """Sample data of `aligndet sample-data`: pieces of photographs composed over photographs.

train/, train.json   images and COCO instances (boxes, and masks as uncompressed RLE)
val/, val.json       likewise; no object and no background of train occurs here

The photographs are those that scikit-image and scikit-learn carry; see there for their origin and licences.
"""
_MARK = ".sample-data"  # what a folder of sample data is known by, finished or not


@accepts_strings
def sample_data(
    output: Path,
    *,
    train_images: int = 160,
    val_images: int = 48,
    size: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a small labelled data set of photographic objects; the same arguments give the same files.

    Args:
        output: Folder for train/, train.json, val/ and val.json.
        train_images: Number of training images.
        val_images: Number of validation images.
        size: Longer side of the images.
        seed: Of all chance.
        overwrite: Write into a folder that holds sample data already.

    Returns:
        The output folder.

    Raises:
        ValueError: If the output is taken or in use, holds anything else than sample data, or scikit-image
            or scikit-learn is not installed.
    """
    if size < 64:
        raise ValueError(f"size must be at least 64, not {size}")
    if min(train_images, val_images) < 1:
        raise ValueError(
            f"there must be images to train and to validate, not {train_images} and {val_images}"
        )
    with locked(output):
        used = contents(output)
        if used and not overwrite:
            raise ValueError(f"{output}: is not empty; give --overwrite or another output")
        if used and not (output / _MARK).is_file():
            raise ValueError(f"{output}: holds {used[0]!r} and no sample data; it is not overwritten")
        atomic_write(output / _MARK, "")
        for part, count in zip(BACKGROUNDS, (train_images, val_images), strict=True):
            for old in (output / part).glob("*.jpg"):
                old.unlink()
            document = CocoWriter({number: matter.name for number, matter in enumerate(MATTERS, 1)})
            for index in tqdm(range(count), desc=part, unit="image"):
                _write_scene(output, part, index, size, seed, document)
            atomic_write(output / f"{part}.json", json.dumps(document.content))
        atomic_write(output / "README.txt", _EXPLANATION)
    return output


def _write_scene(output: Path, part: str, index: int, size: int, seed: int, document: CocoWriter) -> None:
    scene = compose_scene(part, size, np.random.default_rng((seed, list(BACKGROUNDS).index(part), index)))
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=92)
    name = f"{index:05d}.jpg"
    atomic_write(output / part / name, buffer.getvalue())
    width, height = scene.image.size
    document.add_image(name, width, height)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(value) for value in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
        outline = {"size": [height, width], "counts": _run_lengths(mask)}
        document.add_object(label, box, area=int(mask.sum()), iscrowd=0, segmentation=outline)


def _run_lengths(mask: npt.NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths, which more tools read: down the columns, beginning with the zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [len(flat) - 1]])).tolist()
