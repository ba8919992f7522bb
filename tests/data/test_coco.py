from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aligndet.data.coco import Category, CocoDataset, CocoDetection, image_files
from aligndet.data.formats import read_labelled
from aligndet.data.images import ImageError
from aligndet.data.rle import encode


def write(folder: Path, **changes: Any) -> Path:
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(folder / "train" / name)
    document: dict[str, Any] = {
        "images": [
            {"id": i + 1, "file_name": n, "width": 40, "height": 30} for i, n in enumerate(("a.png", "b.png"))
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 12], "area": 90, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": [5, 5, 20, 20], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "fish"}, {"id": 3, "name": "bird"}],
    }
    document.update(changes)
    path = folder / "train.json"
    path.write_text(json.dumps(document))
    return path


def annotation(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 12], **changes}]


def test_boxes_labels_and_crowds(tmp_path: Path) -> None:
    coco = read_labelled(write(tmp_path))
    assert coco.categories == (Category(3, "bird"), Category(7, "fish"))
    assert len(coco) == 2
    np.testing.assert_array_equal(coco.boxes[0], [[2, 3, 12, 15], [5, 5, 25, 25]])
    assert coco.labels[0].tolist() == [2, 1]
    assert coco.areas[0].tolist() == [90, 400]
    assert coco.warnings == ()
    image, target = CocoDetection(coco)[0]
    assert image.shape == (3, 30, 40)
    assert target["labels"].tolist() == [2]  # the crowd is not for training
    assert CocoDetection(coco, crowds=True)[0][1]["iscrowd"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("bbox", "note"),
    [
        ([5, 5, 0, 10], "no size"),
        ([5, 5, 10, -1], "no size"),
        ([float("nan"), 5, 10, 10], "four finite numbers"),
        ([10**400, 5, 10, 10], "four finite numbers"),
        (["1", "2", "3", "4"], "four finite numbers"),
        ([True, 2, 3, 4], "four finite numbers"),
        ([100, 100, 10, 10], "outside"),
        ([1, 2, 3], "four finite numbers"),
        ("1234", "four finite numbers"),
    ],
)
def test_a_bad_box_is_dropped_and_named(bbox: Any, note: str, tmp_path: Path) -> None:
    path = write(tmp_path, annotations=annotation(id=99, bbox=bbox))
    coco = read_labelled(path)
    assert len(coco.boxes[0]) == 0
    assert note in coco.warnings[0]
    assert "annotation 99 of a.png" in coco.warnings[0]
    with pytest.raises(ValueError, match="annotation 99"):
        read_labelled(path, strict=True)


def test_a_box_that_reaches_out_is_clipped(tmp_path: Path) -> None:
    coco = read_labelled(write(tmp_path, annotations=annotation(bbox=[-5, 20, 20, 20])))
    np.testing.assert_array_equal(coco.boxes[0], [[0, 20, 15, 30]])
    assert "clipped" in coco.warnings[0]


def test_a_missing_image_is_left_out_and_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "train" / "b.png").unlink()
    coco = read_labelled(path)
    assert coco.file_names == ["a.png"]
    assert "b.png" in coco.warnings[0]
    (tmp_path / "train" / "a.png").unlink()
    with pytest.raises(ValueError, match="none of its 2 images"):
        read_labelled(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": annotation(category_id=5)}, "annotation 1 .*unknown category 5"),
        ({"annotations": annotation(image_id=9)}, "annotation 1 is of image 9"),
        ({"annotations": annotation() * 2}, "annotation id 1 occurs twice"),
        (
            {"images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}] * 2},
            "image id 1 occurs twice",
        ),
        ({"annotations": annotation(iscrowd="0")}, "'iscrowd' of annotation 1 is neither 0 nor 1: '0'"),
        ({"categories": []}, "no categories"),
        ({"categories": [{"id": 7, "name": "x"}, {"id": 7, "name": "y"}]}, "category id occurs twice"),
        ({"categories": 3}, "no list 'categories'"),
        ({"annotations": [{"id": 1}]}, "has no 'image_id'"),
        ({"annotations": annotation(image_id=[1])}, "'image_id' of an entry of 'annotations' is no int"),
        (
            {"annotations": annotation(category_id=None)},
            "'category_id' of an entry of 'annotations' is no int",
        ),
        (
            {"images": [{"id": "1", "file_name": "a.png", "width": 40, "height": 30}]},
            "'id' of an entry of 'images' is no int",
        ),
        (
            {"images": [{"id": 1, "file_name": "a.png", "width": float("nan"), "height": 30}]},
            r"train\.json: image a\.png has the size nanx30",
        ),
        (
            {"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 0}]},
            "image a.png has the size 0x0",
        ),
        (
            {"images": [{"id": 1, "file_name": "../a.png", "width": 40, "height": 30}]},
            "leads out of the folder",
        ),
        (
            {"images": [{"id": 1, "file_name": "/etc/a.png", "width": 40, "height": 30}]},
            "leads out of the folder",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_labelled(write(tmp_path, **{"annotations": [], **changes}))


def test_an_image_of_another_size_than_annotated_is_named(tmp_path: Path) -> None:
    coco = read_labelled(write(tmp_path))
    Image.new("RGB", (30, 40)).save(tmp_path / "train" / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: is 30x40 pixels \(upright\), but its boxes are of 40x30"):
        CocoDetection(coco)[0]


@pytest.mark.parametrize(
    "area", [None, "x", -3, 0, float("nan"), [1], 1e300, pytest.param(10**400, id="huge")]
)
def test_an_area_that_makes_no_sense_becomes_the_boxs_own(area: Any, tmp_path: Path) -> None:
    coco = read_labelled(write(tmp_path, annotations=annotation(area=area)))
    assert coco.areas[0].tolist() == [120]


def test_any_encoding_mark_and_locale(tmp_path: Path) -> None:
    path = write(tmp_path, categories=[{"id": 3, "name": "möwe"}, {"id": 7, "name": "fish"}])
    text = json.dumps(json.loads(path.read_text()), ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert read_labelled(path).categories[0].name == "möwe"


def test_the_folder_is_looked_for_beside_the_json(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert read_labelled(path).folder == tmp_path / "train"
    elsewhere = tmp_path / "annotations" / "instances_train.json"
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    assert read_labelled(elsewhere).folder == tmp_path / "train"
    assert read_labelled(elsewhere, tmp_path / "train").file_names == ["a.png", "b.png"]
    document = json.loads(elsewhere.read_text())
    for image in document["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    path.write_text(json.dumps(document))
    assert read_labelled(path).folder == tmp_path  # names that begin with the folder


def files(data: CocoDataset) -> set[str]:
    return set(image_files(data.folder, data.file_names))


def test_images_of_two_sets_can_be_compared(tmp_path: Path) -> None:
    data = read_labelled(write(tmp_path))
    one = replace(data, file_names=data.file_names[1:])
    assert len(files(data) & files(one)) == 1
    moved = replace(one, folder=tmp_path, file_names=[f"train/../train/{one.file_names[0]}"])
    assert len(files(data) & files(moved)) == 1
    assert not files(data) & files(replace(one, folder=tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "train")
    assert files(replace(one, folder=tmp_path / "link")) == files(one)


def test_what_is_no_coco_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"x\.json: no such file"):
        read_labelled(path)
    path.write_text("{broken")
    with pytest.raises(ValueError, match=r"x\.json: is no JSON"):
        read_labelled(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no COCO JSON"):
        read_labelled(path)


def test_other_categories_than_the_detectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not those of the detector"):
        read_labelled(write(tmp_path), categories=[Category(3, "bird"), Category(7, "cat")])


SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]
RUNS = {"size": [30, 40], "counts": [0, 30, 1170]}  # the first column


def masked(*segmentations: Any) -> list[dict[str, Any]]:
    return [
        {**annotation(id=i + 1)[0], "iscrowd": i % 2, "segmentation": s} for i, s in enumerate(segmentations)
    ]


def test_masks_of_any_form(tmp_path: Path) -> None:
    expected = torch.zeros(4, 30, 40, dtype=torch.uint8)
    expected[0, 5:15, 5:15] = expected[2, 5:15, 5:15] = expected[2, 20:, 30:] = 1
    expected[1:4:2, :, 0] = 1
    two = [*SQUARE, [30, 20, 40, 20, 40, 30, 30, 30]]
    compressed = encode(expected[3:].numpy()).segmentations()[0]
    path = write(tmp_path, annotations=masked(SQUARE, RUNS, two, compressed))
    coco = read_labelled(path, masks=True)
    assert coco.warnings == ()
    _, target = CocoDetection(coco, crowds=True)[0]
    assert torch.equal(target["masks"], expected)
    assert torch.equal(CocoDetection(coco)[0][1]["masks"], expected[[0, 2]])  # without the crowds
    assert CocoDetection(coco)[1][1]["masks"].shape == (0, 30, 40)
    assert "masks" not in CocoDetection(read_labelled(path))[0][1]


@pytest.mark.parametrize(
    ("segmentation", "note"),
    [
        ([[1, 2, 3]], "malformed"),
        ("polygon", "malformed"),
        ({"size": [40, 30], "counts": [1200]}, r"size [40, 30] instead of [30, 40]"),
        ({"size": [30, 40], "counts": [7]}, "malformed"),
        ({"size": [30, 40], "counts": [1200]}, "no pixel"),
        ([[50, 50, 60, 50, 60, 60]], "no pixel"),
    ],
)
def test_an_object_with_a_bad_mask_is_dropped_and_named(segmentation: Any, note: str, tmp_path: Path) -> None:
    path = write(tmp_path, annotations=masked(SQUARE, segmentation))
    coco = read_labelled(path, masks=True)
    assert len(coco.boxes[0]) == len(coco.labels[0]) == 1
    assert note in coco.warnings[0]
    assert "annotation 2 of a.png: dropped" in coco.warnings[0]
    with pytest.raises(ValueError, match="annotation 2"):
        read_labelled(path, masks=True, strict=True)
    assert len(read_labelled(path, strict=True).boxes[0]) == 2  # nobody asked for masks


@pytest.mark.parametrize("missing", [None, [], {}])
def test_a_missing_mask(missing: Any, tmp_path: Path) -> None:
    path = write(tmp_path, annotations=masked(SQUARE, missing))
    with pytest.raises(ValueError, match=r"train\.json: annotation 2 has no mask"):
        read_labelled(path, masks=True)
    assert read_labelled(path, masks=None).masks is None  # only if all have one
    assert read_labelled(write(tmp_path, annotations=masked(SQUARE)), masks=None).masks is not None
