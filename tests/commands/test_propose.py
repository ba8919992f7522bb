from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from aligndet.commands.cluster import _load, _Request
from aligndet.commands.propose import propose
from aligndet.data.augmentations import multiscale
from aligndet.data.images import read_image
from aligndet.files import locked
from aligndet.proposals.filters import filter_boxes
from aligndet.proposals.pipeline import Rank
from aligndet.proposals.segments import objectness
from aligndet.proposals.selective_search import Mode, selective_search
from aligndet.proposals.storage import clean, read_proposals


@pytest.fixture
def images(sample: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name in ("00000.jpg", "more/00001.jpg"):
        (folder / name).write_bytes((sample / "train" / Path(name).name).read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    return folder


def test_broken_images_are_skipped_counted_and_named(
    images: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = propose(images, output=tmp_path / "out", workers=1, annotations=sample / "train.json")
    assert summary.images == 3
    assert set(summary.skipped) == {"broken.jpg", "tiny.png"}
    assert summary.without == 1  # nothing to find in a white image
    assert summary.recall is not None
    assert 0.5 < summary.recall["recall50"] <= 1
    printed = capsys.readouterr().out
    assert "broken.jpg" in printed
    assert "2 images skipped" in printed
    table = read_proposals(tmp_path / "out")
    assert table.file_names == ["00000.jpg", "more/00001.jpg", "white.png"]
    assert len(table.boxes_of(2)) == 0
    assert summary.boxes == len(table.boxes)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    for out in (tmp_path / "strict", tmp_path / "out"):  # a new folder, and one that is complete
        with pytest.raises(ValueError, match=r"broken\.jpg"):
            propose(images, output=out, workers=1, strict=True)


def test_a_folder_without_an_image_that_can_be_read_is_no_result(images: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("broken.jpg\ntiny.png\n")
    out: dict[str, Any] = {"output": tmp_path / "out", "workers": 1, "names": tmp_path / "names.txt"}
    with pytest.raises(ValueError, match=r"images: none of its 2 images can be read; the first: .*broken"):
        propose(images, **out)
    (images / "tiny.png").write_bytes((images / "white.png").read_bytes())
    assert propose(images, **out).images == 1  # looked at once more
    (tmp_path / "names.txt").write_text("00000\n00001\n")
    with pytest.raises(ValueError, match=r"names\.txt: none of its 2 images is in"):
        propose(images, **{**out, "output": tmp_path / "other"})
    assert not (tmp_path / "other").exists()


def test_a_folder_that_has_lost_a_part_is_not_complete_until_the_next_run(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    propose(images, output=out, workers=1, shard_size=2)
    before = read_proposals(out)
    (out / "part-00001.parquet").unlink()
    with pytest.raises(ValueError, match="not complete; run the same `aligndet propose` again"):
        read_proposals(out)
    propose(images, output=out, workers=1, shard_size=2)
    np.testing.assert_array_equal(read_proposals(out).boxes, before.boxes)


def test_json_and_parquet_hold_the_same(images: Path, tmp_path: Path) -> None:
    propose(images, output=tmp_path / "out", workers=1, shard_size=2)
    propose(images, output=tmp_path / "out.json", workers=1)
    folder, file = read_proposals(tmp_path / "out"), read_proposals(tmp_path / "out.json")
    assert folder.file_names == file.file_names
    np.testing.assert_allclose(folder.boxes, file.boxes, atol=1e-3)
    assert not list(tmp_path.glob(".out.json*"))
    with pytest.raises(ValueError, match=r"out\.json: is there already"):
        propose(images, output=tmp_path / "out.json", workers=1)


def test_a_folder_of_other_parameters_or_another_owner_is_left_alone(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    propose(images, output=out, workers=1)
    with pytest.raises(ValueError, match="max_proposals=200, now 5"):
        propose(images, output=out, workers=1, max_proposals=5)
    (images / "white.png").unlink()
    with pytest.raises(ValueError, match="other images"):
        propose(images, output=out, workers=1)
    with locked(out), pytest.raises(ValueError, match="in use"):
        propose(images, output=out, workers=1)
    propose(images, output=out, workers=1, max_proposals=5, overwrite=True)
    assert len(read_proposals(out)) == 2
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        propose(images, output=tmp_path / "taken", workers=1, overwrite=True)


def test_masks(images: Path, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, out = sample / "train.json", tmp_path / "out"
    summary = propose(images, output=out, workers=1, masks=True, annotations=labels)
    assert summary.mask_iou is not None
    assert 0.4 < summary.mask_iou < 1
    assert f"mean IoU {summary.mask_iou:.3f}" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["mask_iou"] == summary.mask_iou
    table = read_proposals(out, masks=True)
    grids = table.masks_of(0, np.arange(len(table.boxes_of(0))))
    assert 0.1 < grids.mean() < 0.9
    boxes_alone = propose(images, output=tmp_path / "boxes", workers=1, annotations=labels)
    assert boxes_alone.mask_iou is None
    np.testing.assert_array_equal(read_proposals(tmp_path / "boxes").boxes, table.boxes)
    propose(images, output=tmp_path / "out.json", workers=1, masks=True)
    again = read_proposals(tmp_path / "out.json", masks=True)
    positions = np.arange(len(again.boxes_of(0)))
    assert (again.masks_of(0, positions) != grids).mean() < 0.1  # through the pixels of the image


def test_masks_are_a_parameter_like_others(images: Path, tmp_path: Path) -> None:
    propose(images, output=tmp_path / "boxes", workers=1)
    with pytest.raises(ValueError, match="was made with masks=None, now True"):
        propose(images, output=tmp_path / "boxes", workers=1, masks=True)
    propose(images, output=tmp_path / "masks", workers=1, masks=True)
    with pytest.raises(ValueError, match="was made with masks=True, now None"):
        propose(images, output=tmp_path / "masks", workers=1)
    with pytest.raises(ValueError, match=r"min_inside=0\.9, now 0\.5"):
        propose(images, output=tmp_path / "masks", workers=1, masks=True, min_inside=0.5)
    propose(images, output=tmp_path / "masks", workers=1, masks=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_inside": 90}, "--min-inside must be from 0 to 1, not 90"),
        ({"segmentation": (-1.0, 150.0, 50)}, "segmentation must be sigma, scale and smallest size"),
    ],
)
def test_settings_of_masks_that_make_no_sense(
    changes: Any, message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        propose(images, output=tmp_path / "out", workers=1, masks=True, **changes)
    assert not (tmp_path / "out").exists()


def test_boxes_of_a_large_image_are_where_they_belong(tmp_path: Path) -> None:
    """Found at 256 of 1,200 pixels, in JPEGs decoded at a part of their size, and in one on its side."""
    box = (300, 200, 700, 600)
    array = np.random.default_rng(0).integers(40, 90, (800, 1200, 3), dtype=np.uint8)
    array[box[1] : box[3], box[0] : box[2]] += 150
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(array).save(folder / "a.png")
    Image.fromarray(array).save(folder / "b.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(array).copy()).save(folder / "c.jpg", quality=95, exif=exif)
    propose(folder, output=tmp_path / "proposals", resolution=256, masks=True, workers=1)
    found = read_proposals(tmp_path / "proposals", masks=True)
    assert found.sizes.tolist() == [[1200, 800]] * 3
    wanted = torch.tensor([box], dtype=torch.float32)
    for index in range(3):
        overlaps = box_iou(wanted, torch.from_numpy(found.boxes_of(index)))[0]
        assert overlaps.max() > 0.9
        (mask,) = found.masks_of(index, np.array([int(overlaps.argmax())]))
        assert mask.mean() > 0.8


def test_clusters_see_boxes_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (600, 400)).save(tmp_path / "a.png")
    boxes = np.array([[60, 40, 300, 200]], np.float32)
    request = _Request(3, tmp_path / "a.png", np.array([1200, 800], np.int32), boxes * 2)
    loaded = _load(request, multiscale((100, 100), 200, flip=0.0))
    assert not isinstance(loaded, str)
    position, image, resized = loaded
    assert position == 3
    assert image.shape == (3, 100, 150)
    assert resized.tolist() == [[15, 10, 75, 50]]


def test_mode_and_rank_are_those_asked_for(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("00002.jpg")
    image = read_image(sample / "train" / "00002.jpg").permute(1, 2, 0).numpy()
    bounds: dict[str, Any] = {"max_aspect_ratio": 3.0, "min_area": 0.008, "max_area": 0.81, "nms_iou": 0.5}
    height, width = image.shape[:2]
    found = []
    for mode in get_args(Mode):
        boxes = clean(selective_search(image, mode=mode), width, height)
        for rank in get_args(Rank):
            score = partial(objectness, image) if rank == "straddling" else None
            output = tmp_path / f"{mode}-{rank}"
            asked: dict[str, Any] = {"names": tmp_path / "names.txt", "mode": mode, "rank": rank}
            propose(sample / "train", output=output, workers=1, max_proposals=None, **asked)
            found.append(read_proposals(output).boxes)
            expected = filter_boxes(boxes, width, height, score=score, **bounds)
            np.testing.assert_array_equal(found[-1], expected)
    assert len({boxes.tobytes() for boxes in found}) == 4
