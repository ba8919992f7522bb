from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aligndet.data.coco import Category, CocoDetection
from aligndet.data.formats import is_bare_folder, read_labelled
from aligndet.data.images import ImageError
from aligndet.data.yolo import find_yaml, load_yolo


def xml(*objects: tuple[str, tuple[object, ...]], extra: str = "", head: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    body = "".join(
        f"<object><name>{name}</name>{extra}<bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True))
        + "</bndbox></object>"
        for name, box in objects
    )
    return f"<annotation>{head}{body}</annotation>"


def put(folder: Path, name: str, text: str, image: str | None = None) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    if image:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(folder / image)


def year(root: Path, name: str, lists: dict[str, list[str]]) -> None:
    for part, stems in lists.items():
        put(root / name, f"ImageSets/Main/{part}.txt", "\n".join(stems))
        for stem in stems:
            text = xml(("cat", (1, 1, 11, 11)))
            put(root / name, f"Annotations/{stem}.xml", text, f"JPEGImages/{stem}.jpg")


def test_supervisions_folders_give_the_same_boxes(sample: Path, tmp_path: Path) -> None:
    coco = read_labelled(sample / "train.json")
    document = json.loads((sample / "train.json").read_text())
    for entry in document[
        "annotations"
    ]:  # of outlines it writes pixel indices, which lose a pixel of the box
        del entry["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    theirs = sv.DetectionDataset.from_coco(str(sample / "train"), str(tmp_path / "boxes.json"))
    voc, yolo = tmp_path / "voc", tmp_path / "yolo"
    theirs.as_pascal_voc(str(voc / "JPEGImages"), str(voc / "Annotations"))
    theirs.as_yolo(str(yolo / "images"), str(yolo / "labels"), str(yolo / "data.yaml"))
    for folder, tolerance in ((voc, 1e-4), (yolo, 1e-2)):
        read = read_labelled(folder, categories=coco.categories)
        assert [Path(name).name for name in read.file_names] == coco.file_names
        assert read.categories == coco.categories
        assert read.warnings == ()
        for i in range(len(coco)):
            np.testing.assert_allclose(read.boxes[i], coco.boxes[i], atol=tolerance)
            assert read.labels[i].tolist() == coco.labels[i].tolist()


@pytest.mark.parametrize("names", ["null", "list.txt"])
def test_our_own_settings_are_no_data_set(names: str, tmp_path: Path) -> None:
    put(tmp_path, "a.yaml", f"batch_size: 4\nnames: {names}\n")
    assert find_yaml(tmp_path) is None
    put(tmp_path, "data.yaml", "names: [cat]\n")
    assert find_yaml(tmp_path) == tmp_path / "data.yaml"


def test_names_are_relative_to_the_folder_that_is_given(tmp_path: Path) -> None:
    put(tmp_path, "images/train/a.txt", "0 0.5 0.5 0.2 0.2", "images/train/a.jpg")
    put(tmp_path, "images/b.txt", "", "images/b.jpg")
    put(tmp_path, "data.yaml", "names: [cat]\n")
    assert load_yolo(tmp_path, tmp_path / "images").content["images"][1]["file_name"] == "train/a.jpg"
    (tmp_path / "images" / "b.jpg").rename(tmp_path / "b.jpg")
    assert load_yolo(tmp_path, tmp_path / "images").content["images"][0]["file_name"] == "train/a.jpg"


def test_folders_of_yolo_may_be_relative_and_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "one/a.txt", "0 0.5 0.5 0.2 0.2", "one/a.jpg")
    put(tmp_path, "two/b.txt", "0 0.5 0.5 0.2 0.2", "two/b.jpg")
    put(tmp_path, "data.yaml", f"names: [cat]\ntrain: one\nval: {tmp_path / 'two'}\n")
    monkeypatch.chdir(tmp_path)
    assert read_labelled(Path("data.yaml")).file_names == ["one/a.jpg", "two/b.jpg"]


def test_lists_of_yolo_are_relative_to_themselves_or_to_data_yaml(tmp_path: Path) -> None:
    put(tmp_path, "coco/labels/a.txt", "0 0.5 0.5 0.2 0.2", "coco/images/a.jpg")
    put(tmp_path, "coco/train.txt", "./images/a.jpg\n")
    put(tmp_path, "coco.yaml", "names: [cat]\npath: coco\ntrain: train.txt\n")
    data = read_labelled(tmp_path / "coco.yaml", split="train")
    assert (data.folder / data.file_names[0]).samefile(tmp_path / "coco/images/a.jpg")
    assert len(data.boxes[0]) == 1
    put(tmp_path, "coco/train.txt", "coco/images/a.jpg\n")
    assert len(read_labelled(tmp_path / "coco.yaml", split="train")) == 1
    put(tmp_path, "coco/train.txt", "coco\\images\\a.jpg\n")
    assert len(read_labelled(tmp_path / "coco.yaml", split="train")) == 1
    put(tmp_path, "coco/train.txt", f"{tmp_path}/coco/images/a.jpg\n")
    assert len(read_labelled(tmp_path / "coco.yaml", split="train").boxes[0]) == 1
    put(tmp_path, "coco/train.txt", "coco/images/gone.jpg\ncoco/images/a.jpg\n")
    assert read_labelled(tmp_path / "coco.yaml", split="train").file_names == ["a.jpg"]
    (tmp_path / "coco" / "train.txt").write_text("images/a.jpg\n", "utf-16")
    with pytest.raises(ValueError, match=r"train\.txt: is no text in UTF-8"):
        read_labelled(tmp_path / "coco.yaml", split="train")
    put(tmp_path, "coco/train.txt", "elsewhere/a.jpg\n")
    with pytest.raises(ValueError, match=r"none of its 0 images .*; the first: .*a\.jpg: no such image"):
        read_labelled(tmp_path / "coco.yaml", split="train")


def test_images_of_one_part_of_yolo_are_no_other(tmp_path: Path) -> None:
    put(tmp_path, "labels/train/a.txt", "0 0.5 0.5 0.2 0.2", "images/train/a.jpg")
    put(tmp_path, "data.yaml", "names: [cat]\ntrain: images/train\n")
    assert len(read_labelled(tmp_path, split="train")) == 1
    with pytest.raises(ValueError, match=r"data\.yaml: names no images for 'val', only for train"):
        read_labelled(tmp_path, split="val")
    put(tmp_path, "data.yaml", "names: [cat]\n")  # no part: all images are one
    assert len(read_labelled(tmp_path, split="val")) == 1


def test_xml_of_an_image_of_another_size(tmp_path: Path) -> None:
    text = xml(("cat", (3, 3, 9, 9)), head="<size><width>80</width><height>60</height></size>")
    put(tmp_path, "Annotations/one.xml", text, "JPEGImages/one.jpg")
    dataset = CocoDetection(read_labelled(tmp_path))
    with pytest.raises(ImageError, match=r"one.jpg: is 40x30 pixels \(upright\), but its boxes are of 80x60"):
        dataset[0]


def test_xml_as_tools_write_it(tmp_path: Path) -> None:
    put(tmp_path, "a b/one.XML", xml(("red fox", (2.5, 1, 11.25, 21)), ("cat", (3, 3, 9, 9))), "a b/one.JPG")
    hard = xml(("cat", (1, 1, 5, 5)), extra="<difficult>1</difficult>", head="<filename>stale.png</filename>")
    put(tmp_path, "deep/er/two.xml", hard, "pictures/deep/two.png")
    read = read_labelled(tmp_path)
    assert read.file_names == ["a b/one.JPG", "pictures/deep/two.png"]
    assert [c.name for c in read.categories] == ["cat", "red fox"]
    np.testing.assert_allclose(read.boxes[0], [[1.5, 0.0, 11.25, 21.0], [2.0, 2.0, 9.0, 9.0]])
    assert read.labels[0].tolist() == [2, 1]
    assert read.iscrowd[1].tolist() == [True]
    assert read.sizes.tolist() == [[40, 30], [40, 30]]


def test_an_image_is_of_one_xml(tmp_path: Path) -> None:
    """Also if another folder has lost the image of that name."""
    for folder in ("one", "two"):
        put(tmp_path, f"{folder}/1.xml", xml((folder, (1, 1, 9, 9))), f"{folder}/1.jpg")
    (tmp_path / "one" / "1.jpg").unlink()
    for _ in range(2):
        read = read_labelled(tmp_path)
        assert read.file_names == ["two/1.jpg"]
        assert [read.categories[label - 1].name for label in read.labels[0].tolist()] == ["two"]
        assert "one/1.xml: its image is not there; two/1.jpg is that of " in read.warnings[0]
        (tmp_path / "one").rename(tmp_path / "zzz")  # found after it
        (tmp_path / "zzz").rename(tmp_path / "one")


def test_the_one_list_of_other_tools_is_all_there_is(tmp_path: Path) -> None:
    year(tmp_path, "", {"default": ["1", "2"]})
    for name in ("cat", "background"):  # of a class, and empty at times
        put(tmp_path, f"ImageSets/Main/{name}_default.txt", "")
    assert len(read_labelled(tmp_path, split="train")) == len(read_labelled(tmp_path, split="val")) == 2
    year(tmp_path, "", {"trainval": ["1"]})
    assert len(read_labelled(tmp_path, split="train")) == 1
    with pytest.raises(
        ValueError, match=r"no list .*/val\.txt .*\(background_default\.txt, .*trainval\.txt\)"
    ) as caught:
        read_labelled(tmp_path, split="val")
    assert str(caught.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize("names", [("trainval", "val"), ("training", "validation")])
def test_lists_that_may_share_images_are_not_guessed_at(names: tuple[str, ...], tmp_path: Path) -> None:
    year(tmp_path, "", {name: ["1"] for name in names})
    with pytest.raises(ValueError, match=r"no list ImageSets/Main/train\.txt"):
        read_labelled(tmp_path, split="train")


@pytest.mark.parametrize("name", ["C:\\photos\\a.jpg", "/photos/a.jpg", "photos\\a.jpg"])
def test_where_an_xml_saw_its_image_does_not_matter(name: str, tmp_path: Path) -> None:
    put(tmp_path, "1.xml", xml(("cat", (1, 1, 9, 9)), head=f"<filename>{name}</filename>"), "a.jpg")
    assert read_labelled(tmp_path).file_names == ["a.jpg"]


def test_xml_of_other_tools_is_no_voc(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg.aux.xml", '<?xml version="1.0"?><!-- <annotation> --><PAMDataset/>', "a.jpg")
    assert is_bare_folder(tmp_path)
    put(tmp_path, "a.xml", xml(("cat", (1, 1, 9, 9)), head="<!-- b -->"), "a.jpg")
    assert not is_bare_folder(tmp_path)
    assert read_labelled(tmp_path).warnings == ()


@pytest.mark.parametrize("encoding", ["gbk", "no-such"])
def test_an_encoding_that_is_not_known_costs_one_xml(encoding: str, tmp_path: Path) -> None:
    put(tmp_path, "a.xml", xml(("cat", (1, 1, 9, 9))), "a.jpg")
    put(tmp_path, "b.xml", f'<?xml version="1.0" encoding="{encoding}"?><annotation/>', "b.jpg")
    read = read_labelled(tmp_path)
    assert read.file_names == ["a.jpg"]
    assert "b.xml: is no XML" in read.warnings[0]


def test_coordinates_from_zero_are_taken_as_they_are(tmp_path: Path) -> None:
    put(tmp_path, "one.xml", xml(("cat", (0, 0, 40, 30))), "one.jpg")
    put(tmp_path, "two.xml", xml(("cat", (5, 6, 7, 8))), "two.jpg")
    read = read_labelled(tmp_path)
    np.testing.assert_allclose(np.concatenate(read.boxes), [[0, 0, 40, 30], [5, 6, 7, 8]])


def test_the_protocols_of_voc(tmp_path: Path) -> None:
    year(tmp_path, "VOC2007", {"train": ["1"], "val": ["2"], "trainval": ["1", "2"], "test": ["3"]})
    year(tmp_path, "VOC2012", {"train": ["4"], "val": ["5"], "trainval": ["4", "5"]})

    def stems(*parts: str, split: str) -> list[str]:
        return [Path(n).stem for n in read_labelled(tmp_path.joinpath(*parts), split=split).file_names]  # type: ignore[arg-type]

    assert stems(split="train") == ["1", "2", "4", "5"]
    assert stems(split="val") == ["3"]
    assert stems("VOC2007", split="train") == ["1", "2"]
    assert stems("VOC2012", split="train") == ["4"]
    assert stems("VOC2012", split="val") == ["5"]
    assert stems("VOC2007", "ImageSets", "Main", "val.txt", split="train") == ["2"]
    assert stems(split="all") == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", ["a", "a.HEIC"])
def test_a_photo_that_is_not_read_is_no_voc_image(name: str, tmp_path: Path) -> None:
    put(tmp_path, "a.xml", xml(("cat", (1, 1, 11, 11)), head=f"<filename>{name}</filename>"), "a.jpg")
    (tmp_path / "a.HEIC").write_bytes(b"ftypheic")
    assert read_labelled(tmp_path).file_names == ["a.jpg"]
    (tmp_path / "a.jpg").rename(tmp_path / "a.HEIC")  # as some phones export
    assert read_labelled(tmp_path).file_names == ["a.HEIC"]


def test_names_in_voc_lists_may_end_in_numbers(tmp_path: Path) -> None:
    year(tmp_path, "VOC2007", {"val": ["photo 1", "b"]})
    put(tmp_path / "VOC2007", "ImageSets/Main/val.txt", "photo 1\nb -1\nlost\n")
    val = read_labelled(tmp_path, split="val")
    assert [Path(name).stem for name in val.file_names] == ["b", "photo 1"]
    assert [note.rpartition("/")[2] for note in val.warnings] == ["lost.xml: is in a list, but not there"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('<!DOCTYPE a [<!ENTITY x "xxxxxxxx"><!ENTITY y "&x;&x;">]><annotation>&y;</annotation>', "DOCTYPE"),
        (xml(head="<filename>../../etc/passwd.jpg</filename>"), "leads out"),
        ("<annotation><object>", "is no XML"),
    ],
)
def test_bad_xml_is_refused_by_name(tmp_path: Path, text: str, error: str) -> None:
    put(tmp_path, "bad.xml", text, "bad.jpg")
    with pytest.raises(ValueError, match=error) as caught:
        read_labelled(tmp_path)
    assert "bad.xml" in str(caught.value)


def test_yolo_parts_outlines_and_flaws(tmp_path: Path) -> None:
    settings = "train: ../train/images\nval: valid/images\nnames: {0: dog, 1: cat}\n"
    put(tmp_path, "data.yaml", settings)
    put(
        tmp_path, "train/labels/a.txt", "1 0.5 0.5 0.5 0.2\n0 0.1 0.1 0.5 0.1 0.5 0.5\n", "train/images/a.jpg"
    )
    put(tmp_path, "valid/labels/b.txt", "7 0.5 0.5 0.5 0.2\n0 0.5 nan 1 1\n", "valid/images/b.jpg")
    train = read_labelled(tmp_path, split="train")
    assert train.categories == (Category(1, "dog"), Category(2, "cat"))
    np.testing.assert_allclose(train.boxes[0], [[10, 12, 30, 18], [4, 3, 20, 15]], atol=1e-5)
    val = read_labelled(
        tmp_path / "data.yaml", split="val", categories=[Category(4, "cat"), Category(9, "dog")]
    )
    assert len(val.warnings) == 2
    assert "b.txt: line 1" in val.warnings[0]
    assert len(read_labelled(tmp_path)) == 2
    with pytest.raises(ValueError, match="unknown one: 'dog'"):
        read_labelled(tmp_path, categories=[Category(1, "cat")])


def test_yolo_keypoints_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "data.yaml", "kpt_shape: [2, 3]\nnames: [dog]\n")
    box, keypoints = "0 0.5 0.5 0.5 0.2", " 0.1 0.1 2 0 nan 0"
    put(tmp_path, "labels/a.txt", f"{box}{keypoints}\n{box}{keypoints} 1 1\n{box}\n", "images/a.jpg")
    read = read_labelled(tmp_path)
    np.testing.assert_allclose(read.boxes[0], [[10, 12, 30, 18]], atol=1e-5)
    assert capsys.readouterr().out.count("keypoints of its objects are ignored") == 1
    assert len(read.warnings) == 2
    for number, warning in zip((2, 3), read.warnings, strict=True):
        assert f"a.txt: line {number}: dropped" in warning
        assert "4 numbers of a box, and 6 of its keypoints" in warning


# as large as memory once it is written out, yet a few lines
LAUGHS = "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 99)}]" for a, b in pairwise("abcdefgh"))
LAUGHS = f"a: &a [ha, ha]\n{LAUGHS}\n"


@pytest.mark.parametrize(
    "text",
    [
        "names: {0: dog, one: cat}",
        "names: [dog]\nday: 2020-13-45",
        "names: [dog, null]",
        "names: " + "[" * 10_000,
        "names: [dog]\nkpt_shape: 17",
        "names: [dog]\nkpt_shape: [17, -3]",
        LAUGHS + "names: *h",
        LAUGHS + "names: {1: *h}",
        LAUGHS + "names: [dog]\npath: *h",
        LAUGHS + "names: [dog]\ntrain: *h",
        LAUGHS + "names: [dog]\nkpt_shape: *h",
    ],
)
def test_a_broken_data_yaml_is_named(tmp_path: Path, text: str) -> None:
    put(tmp_path, "data.yaml", text)
    with pytest.raises(ValueError, match=r"data\.yaml: ('\w+' has to|is no YAML)") as caught:
        load_yolo(tmp_path / "data.yaml")
    assert len(str(caught.value)) < 1000


def test_classes_with_equal_names(tmp_path: Path) -> None:
    put(tmp_path, "data.yaml", "names: [thing, thing, dog]\n")
    put(tmp_path, "labels/a.txt", "".join(f"{i} 0.5 0.5 0.5 0.2\n" for i in range(3)), "images/a.jpg")
    names = ("thing", "thing", "dog")
    same = tuple(Category(id, name) for id, name in zip((3, 5, 9), names, strict=True))
    assert read_labelled(tmp_path).labels[0].tolist() == [1, 2, 3]
    assert read_labelled(tmp_path, categories=same).labels[0].tolist() == [1, 2, 3]
    for others in (same[::-1], (Category(1, "thing"), Category(2, "dog"))):
        with pytest.raises(ValueError, match=rf"{tmp_path.name}: several categories.* are called 'thing'"):
            read_labelled(tmp_path, categories=others)
    put(tmp_path, "data.yaml", "names: [dog, dog2, thing]\n")
    with pytest.raises(ValueError, match="are called 'thing'"):
        read_labelled(tmp_path, categories=(*same, Category(10, "dog2")))


def test_coco_in_a_folder_is_matched_by_name(tmp_path: Path) -> None:
    document: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": i, "image_id": 1, "category_id": i, "bbox": [1, 2, 3, 4]} for i in (7, 3)],
        "categories": [{"id": 7, "name": "thing"}, {"id": 3, "name": "thing"}],
    }
    put(tmp_path, "train.json", json.dumps(document), "a.jpg")
    same = (Category(1, "thing"), Category(2, "thing"))
    assert read_labelled(tmp_path, categories=same).labels[0].tolist() == [2, 1]  # in the order of ids
    document["annotations"][0]["category_id"] = 5
    put(tmp_path, "train.json", json.dumps(document))
    with pytest.raises(ValueError, match="annotation 7 is of the unknown category 5"):
        read_labelled(tmp_path, categories=same)


def test_a_list_of_images_may_not_lead_out(tmp_path: Path) -> None:
    put(tmp_path, "data.yaml", "train: train.txt\nnames: [dog]\n")
    put(tmp_path, "train.txt", "./images/a.jpg\n../secret.jpg\n", "images/a.jpg")
    with pytest.raises(ValueError, match="leads out"):
        read_labelled(tmp_path, split="train")


def test_a_folder_of_coco_parts(sample: Path, tmp_path: Path) -> None:
    assert len(read_labelled(sample, split="val")) == 4
    with pytest.raises(ValueError, match="several JSON"):
        read_labelled(sample)
    with pytest.raises(ValueError, match="holds no COCO JSON"):
        read_labelled(tmp_path)
    for name in ("trainval", "small"):  # words, not letters
        put(tmp_path, f"{name}.json", "{}")
    for split in ("val", "all"):
        with pytest.raises(ValueError, match="several JSON"):
            read_labelled(tmp_path, split=split)
    with pytest.raises(ValueError, match="no such file"):
        read_labelled(tmp_path / "none")


corner = st.floats(1.0, 19.0, width=32)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(corner, corner, corner, corner), min_size=1, max_size=4))
def test_any_voc_box_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, boxes: list[tuple[float, float, float, float]]
) -> None:
    folder = tmp_path_factory.mktemp("voc")
    written = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    written = [(x, y, min(r, 40), min(b, 30)) for x, y, r, b in written]
    put(folder, "a.xml", xml(*(("cat", box) for box in written)), "a.jpg")
    np.testing.assert_allclose(read_labelled(folder).boxes[0], np.array(written) - [1, 1, 0, 0], atol=1e-4)
    shutil.rmtree(folder)
