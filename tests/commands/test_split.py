from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligndet.commands.split import split
from aligndet.data.formats import read_labelled
from aligndet.data.splits import nested_subsets


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data())
def test_subsets_are_nested_and_stay_when_others_are_added(length: int, data: st.DataObject) -> None:
    counts = sorted(data.draw(st.lists(st.integers(1, length), min_size=1, max_size=4)))
    folds = nested_subsets(length, counts, folds=3, seed=5)
    for fold in folds:
        assert [len(set(subset.tolist())) for subset in fold] == counts
        for small, large in pairwise(fold):
            assert set(small) <= set(large)
    alone = nested_subsets(length, counts[:1], folds=1, seed=5)
    assert alone[0][0].tolist() == folds[0][0].tolist()


def test_files_explain_themselves(sample: Path, tmp_path: Path) -> None:
    output = tmp_path / "splits"
    split(sample / "train.json", output=output, percents=(0.5, 25.0, 50.0), counts=(5,), folds=2)
    names = ("train_0.5pct", "train_25pct", "train_50pct", "train_5images")
    parts = [read_labelled(output / "fold1" / f"{name}.json", sample / "train") for name in names]
    assert [len(part) for part in parts] == [1, 3, 6, 5]
    listed = (output / "fold1" / "train_25pct.txt").read_text().split()
    assert listed == parts[1].file_names
    whole = read_labelled(sample / "train.json")
    for part in parts:
        assert part.categories == whole.categories
        for name, labels in zip(part.file_names, part.labels, strict=True):
            assert labels.tolist() == whole.labels[whole.file_names.index(name)].tolist()
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["splits"]["fold0/train_50pct.json"]["images"] == 6
    folds = [(output / f"fold{k}" / "train_50pct.txt").read_text() for k in range(2)]
    assert folds[0] != folds[1]
    with pytest.raises(ValueError, match="not empty"):
        split(sample / "train.json", output=output)
    split(sample / "train.json", output=output, percents=(50.0,), folds=1, overwrite=True)
    assert [path.name for path in output.glob("fold*/*.txt")] == ["train_50pct.txt"]
    assert (output / "fold0" / "train_50pct.txt").read_text() == folds[0]


def test_images_are_held_out(sample: Path, tmp_path: Path) -> None:
    output = tmp_path / "splits"
    split(sample / "train.json", output=output, percents=(100.0,), folds=1, hold_out=25.0)
    train, val, fold = (
        read_labelled(output / name, sample / "train")
        for name in ("train.json", "val.json", "fold0/train_100pct.json")
    )
    assert (len(train), len(val)) == (9, 3)
    assert sorted([*train.file_names, *val.file_names]) == read_labelled(sample / "train.json").file_names
    assert train.categories == val.categories
    assert fold.file_names == train.file_names
    for part, name in ((train, "train.txt"), (val, "val.txt")):
        assert (output / name).read_text().split() == part.file_names
    assert json.loads((output / "manifest.json").read_text())["val"]["images"] == 3
    assert "--val-annotations val.json" in (output / "README.txt").read_text()
    with pytest.raises(ValueError, match=r"train\.json: would be overwritten"):
        split(output / "train.json", images=sample / "train", output=output, overwrite=True)
    split(sample / "train.json", output=output, overwrite=True)
    assert not [path for name in ("val.json", "val.txt", "train.txt") if (path := output / name).exists()]
    (output / "train.json").write_text("mine")
    split(sample / "train.json", output=output, overwrite=True)
    assert (output / "train.json").read_text() == "mine"
    alone = split(sample / "train.json", output=tmp_path / "alone", hold_out=25.0)
    assert sorted(path.name for path in alone.glob("*.json")) == ["manifest.json", "train.json", "val.json"]
    assert not list(alone.glob("fold*"))
    with pytest.raises(ValueError, match="hold_out must be above 0 and below 100 per cent, not 100"):
        split(sample / "train.json", output=tmp_path / "all", hold_out=100.0)


def test_what_the_labels_leave_out_is_named(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels").mkdir()
    for path in sorted((sample / "train").glob("*.jpg"))[:3]:
        shutil.copy(path, tmp_path)
    (tmp_path / "00001.jpg").write_bytes(b"")
    (tmp_path / "data.yaml").write_text("names: [cat]")
    split(tmp_path, output=tmp_path / "splits", percents=(100.0,), folds=1)
    assert "skipped: image " in capsys.readouterr().out
    (note,) = json.loads((tmp_path / "splits" / "manifest.json").read_text())["skipped"]
    assert "00001.jpg" in note


@pytest.mark.parametrize(
    ("section", "changes", "error"),
    [("images", {"id": 2}, "image id 2 occurs twice"), ("annotations", {"image_id": 99}, "is not listed")],
)
def test_annotations_are_of_one_image(
    section: str, changes: dict[str, Any], error: str, sample: Path, tmp_path: Path
) -> None:
    document = json.loads((sample / "train.json").read_text())
    document[section][0] |= changes
    (tmp_path / "train.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"train\.json: .*{error}"):
        split(tmp_path / "train.json", images=sample / "train", output=tmp_path / "splits")


def test_sizes_that_do_not_fit(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 100"):
        split(sample / "train.json", output=tmp_path / "a", percents=(101.0,))
    with pytest.raises(ValueError, match="from 1 to 12 images, not 13"):
        split(sample / "train.json", output=tmp_path / "a", counts=(13,))
