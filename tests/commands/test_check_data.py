from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from aligndet import cli
from aligndet.commands.check_data import check_data
from aligndet.data.formats import read_labelled


def test_a_good_set_and_a_bare_folder(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = check_data(sample / "train.json")
    assert report["problems"] == {}
    coco = read_labelled(sample / "train.json")
    assert report["images"] == report["readable_images"] == 12
    assert report["boxes"] == sum(report["classes"].values()) == sum(map(len, coco.boxes))
    assert cli.main(["check-data", str(sample / "train")]) == 0
    assert "data.yaml" not in capsys.readouterr().out
    shutil.copytree(sample / "train", tmp_path / "yolo")
    (tmp_path / "yolo" / "00001.txt").write_text("0 0.5 0.5 0.2 0.2")
    assert cli.main(["check-data", str(tmp_path / "yolo")]) == 0
    assert "has text files but no data.yaml" in capsys.readouterr().out
    assert cli.main(["check-data", str(tmp_path / "none")]) == 2
    assert cli.main(["check-data", str(tmp_path / "yolo"), f"--images={sample}"]) == 2
    assert "holds no labels of a known format" in capsys.readouterr().err
    assert cli.main(["check-data", str(sample / "train.json"), f"--output={tmp_path}"]) == 2
    assert "is a folder; give the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["annotations", "categories"])
def test_labels_that_label_nothing(part: str, sample: Path, tmp_path: Path) -> None:
    document = json.loads((sample / "train.json").read_text()) | {part: []}
    (tmp_path / "train.json").write_text(json.dumps(document))
    problems = check_data(tmp_path / "train.json", images=sample / "train")["problems"]
    nothing = [f"{tmp_path / 'train.json'}: labels no object that can be learnt from"]
    assert problems["no objects"] == nothing
    crowds = json.loads((sample / "train.json").read_text())
    for annotation in crowds["annotations"]:
        annotation["iscrowd"] = 1
    (tmp_path / "train.json").write_text(json.dumps(crowds))
    assert check_data(tmp_path / "train.json", images=sample / "train")["problems"]["no objects"] == nothing


def test_classes_of_equal_names_are_counted_apart(sample: Path, tmp_path: Path) -> None:
    document = json.loads((sample / "train.json").read_text())
    before = check_data(sample / "train.json")["classes"]
    first, second = sorted(document["categories"], key=lambda c: c["id"])[:2]
    counts = before[first["name"]], before[second["name"]]
    second["name"] = first["name"]
    (tmp_path / "train.json").write_text(json.dumps(document))
    report = check_data(tmp_path / "train.json", images=sample / "train")
    name = first["name"]
    assert tuple(report["classes"][f"{name} (id {c['id']})"] for c in (first, second)) == counts
    ids = f"{first['id']}, {second['id']}"
    assert report["problems"] == {"repeated class name": [f"{name}: of classes {ids}, which stay apart"]}


def test_problems_are_named_and_mended(sample: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    document = json.loads((data / "train.json").read_text())
    names = [entry["file_name"] for entry in document["images"]]
    (data / "train" / names[0]).write_bytes(b"no image")
    shutil.copyfile(data / "train" / names[1], data / "train" / names[2])
    mine = [a for a in document["annotations"] if a["image_id"] == document["images"][3]["id"]]
    mine[0]["bbox"] = [-20, 4, 60, 20]
    mine[0]["segmentation"] = [[-20, 4, 40, 4, 40, 24, -20, 24]]
    mine[1]["bbox"] = [5, 5, 0, 9]
    document["annotations"].append({**mine[2], "category_id": mine[0]["category_id"]})
    document["images"].append({**document["images"][5], "file_name": names[4]})
    (data / "train.json").write_text(json.dumps(document))
    arguments = ["--output", str(tmp_path / "r.json"), "--fix", str(tmp_path / "fixed")]
    assert cli.main(["check-data", str(data / "train.json"), *arguments]) == 1
    problems = json.loads((tmp_path / "r.json").read_text())["problems"]
    assert {kind: len(texts) for kind, texts in problems.items()} == {
        "broken image": 1,
        "wrong size": 1,  # the duplicate
        "duplicate image": 1,
        "box out of bounds": 1,
        "empty box": 1,
        "duplicate id": 3,  # of an annotation, and both images of one id
    }
    assert names[0] in problems["broken image"][0]
    fixed = read_labelled(tmp_path / "fixed" / "train.json", strict=True)
    # of boxes of another size, and of two images, nobody knows where they are
    assert fixed.file_names == [names[1], *names[3:5], *names[6:]]
    assert fixed.boxes[1][0].tolist() == [0, 4, 40, 24]
    assert len(fixed.boxes[1]) == len(mine)  # one was empty, one is there twice
    outlines = [
        a["segmentation"] for a in json.loads((tmp_path / "fixed" / "train.json").read_text())["annotations"]
    ]
    assert [[0, 4, 40, 4, 40, 24, 0, 24]] in outlines
    with pytest.raises(ValueError, match="not empty"):
        check_data(data / "train.json", fix=tmp_path / "fixed")


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 10**400, 0, -3])
def test_labels_without_a_size_that_makes_sense(size: float, sample: Path, tmp_path: Path) -> None:
    document = json.loads((sample / "train.json").read_text())
    document["images"][0]["height"] = size
    (tmp_path / "train.json").write_text(json.dumps(document))
    found = check_data(tmp_path / "train.json", images=sample / "train", fix=tmp_path / "fixed")
    assert set(found["problems"]) == {"wrong size"}
    assert len(read_labelled(tmp_path / "fixed" / "train.json", strict=True)) == len(document["images"])


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"id": "one"}, set()),
        ({"id": 1}, {"duplicate id"}),
        ({"bbox": ["1", "2", "3", "4"]}, {"empty box"}),
        ({"bbox": [10**400, 2, 3, 4]}, {"empty box"}),
        ({"area": 10**400}, set()),
        ({"segmentation": [1, 2, 30, 2, 30, 30]}, {"malformed outline"}),
        (
            {"segmentation": [1, 2, 30, 2, 30, 30], "bbox": [-9, 2, 30, 30]},
            {"malformed outline", "box out of bounds"},
        ),
        ({"segmentation": [[[-9, 2], [21, 2], [21, 32]]], "bbox": [-9, 2, 30, 30]}, {"box out of bounds"}),
        ({"segmentation": {"size": [9, 9], "counts": [0, 81]}}, {"malformed outline"}),
    ],
)
def test_odd_values_are_told_apart(
    changes: dict[str, Any], kinds: set[str], sample: Path, tmp_path: Path
) -> None:
    document = json.loads((sample / "train.json").read_text())
    assert document["annotations"][0]["id"] == 1
    document["annotations"][1:2] = [{**document["annotations"][1], "id": "two", **changes}]
    document["annotations"].append({**document["annotations"][2]})
    path, fixed = tmp_path / "train.json", tmp_path / "fixed"
    path.write_text(json.dumps(document))
    assert set(check_data(path, images=sample / "train", fix=fixed)["problems"]) == {*kinds, "duplicate id"}
    assert read_labelled(fixed / "train.json", strict=True).boxes


def test_sizes_and_imbalance_are_counted(sample: Path, tmp_path: Path) -> None:
    document = json.loads((sample / "train.json").read_text())
    image, (first, second) = document["images"][0]["id"], document["categories"][:2]
    sides = {31: first, 32: first, 95: first, 96: first, 97: second, 98: second}
    document["annotations"] = [
        {"id": side, "image_id": image, "category_id": category["id"], "bbox": [0, 0, side, side]}
        for side, category in sides.items()
    ]
    (tmp_path / "train.json").write_text(json.dumps(document))
    report = check_data(tmp_path / "train.json", images=sample / "train")
    assert report["box_sizes"] == {"small": 1, "medium": 2, "large": 3}
    assert report["box_side"] == {"min": 31, "median": 95.5, "max": 98}
    assert report["imbalance"] == 2.0
