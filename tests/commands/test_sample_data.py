from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from aligndet.commands.sample_data import sample_data
from aligndet.data.formats import read_labelled
from aligndet.files import locked


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    small: dict[str, Any] = {"train_images": 3, "val_images": 2, "size": 96}
    first = digests(sample_data(tmp_path / "a", **small))
    assert first == digests(sample_data(tmp_path / "b", **small))
    assert first != digests(sample_data(tmp_path / "c", **small, seed=1))
    assert {"README.txt", "train.json", "val.json", "train/00002.jpg", "val/00001.jpg"} <= set(first)


def test_boxes_areas_and_masks_agree(sample: Path) -> None:
    for part in ("train", "val"):
        document = json.loads((sample / f"{part}.json").read_text())
        sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
        for image in document["images"]:
            with Image.open(sample / part / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])
        for annotation in document["annotations"]:
            size = sizes[annotation["image_id"]]
            mask = coco_mask.decode(coco_mask.frPyObjects(annotation["segmentation"], *size))
            assert mask.shape == size
            assert mask.sum() == annotation["area"]
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, width, height = annotation["bbox"]
            assert (x, x + width - 1) == (columns[0], columns[-1])
            assert (y, y + height - 1) == (rows[0], rows[-1])
        assert read_labelled(sample / f"{part}.json", strict=True).warnings == ()


def test_only_sample_data_are_overwritten(tmp_path: Path) -> None:
    small: dict[str, Any] = {"train_images": 2, "val_images": 1, "size": 64}
    output = sample_data(tmp_path / "data", **small)
    with pytest.raises(ValueError, match="is not empty; give --overwrite"):
        sample_data(output, **small)
    (output / "README.txt").unlink()  # as after an interruption
    sample_data(output, train_images=1, val_images=1, size=64, overwrite=True)
    assert [path.name for path in (output / "train").iterdir()] == ["00000.jpg"]

    mine = tmp_path / "mine" / "train" / "holiday.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"dear")
    with pytest.raises(ValueError, match="holds 'train' and no sample data; it is not overwritten"):
        sample_data(tmp_path / "mine", **small, overwrite=True)
    assert mine.read_bytes() == b"dear"


def test_a_folder_in_use_and_numbers_that_make_no_sense(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        sample_data(tmp_path)
    with pytest.raises(ValueError, match="size must be at least 64, not 32"):
        sample_data(tmp_path, size=32)
    with pytest.raises(ValueError, match="not 0 and 48"):
        sample_data(tmp_path, train_images=0)
