from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aligndet import cli
from aligndet.commands import quickstart as module
from aligndet.commands.quickstart import quickstart
from aligndet.files import locked

SMALL: dict[str, Any] = {
    "trunk": "resnet18",
    "trunk_weights": "none",
    "images": 8,
    "pretrain_steps": 1,
    "finetune_steps": 1,
}


def test_the_table_shows_the_difference_in_points() -> None:
    figures = {"without": {"AP": 0.1, "AP50": 0.25}, "with": {"AP": 0.15, "AP50": 0.2}}
    assert module._table(figures).splitlines() == [
        "fine-tuned                  AP    AP50",
        "without pre-training      10.0    25.0",
        "with pre-training         15.0    20.0",
        "difference                +5.0    -5.0",
    ]


@pytest.mark.parametrize("line", re.findall(r"^  aligndet (.+)$", module._NEXT, re.MULTILINE))
def test_the_commands_it_recommends_parse(line: str) -> None:
    command, *arguments = shlex.split(line)
    function, parser = cli.parser_of(command)
    parser.parse_args(cli._as_options(function, arguments))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    picture = tmp_path / "data" / "train" / "holiday.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds 'data' and no quickstart"):
            quickstart(tmp_path, **SMALL, overwrite=overwrite)
    assert picture.read_bytes() == b"mine"


def test_a_quickstart_of_other_settings_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": {**SMALL, "pretrain_steps": 80}}))
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="pretrain_steps=80, now 1"):
        quickstart(tmp_path, **SMALL)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"data", "run.json"}
    assert not any((tmp_path / "data").iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="in use"):
        quickstart(tmp_path, **SMALL)


@pytest.mark.slow
def test_everything_in_small_and_a_second_call_does_not_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quickstart"
    first = quickstart(output, **SMALL)
    assert set(first) == {"without", "with"}
    assert all(set(figures) == {"AP", "AP50", "AP75"} for figures in first.values())
    text = (output / "README.txt").read_text()
    for path in output.iterdir():
        assert path.name.startswith(".") or path.name == "README.txt" or path.name in text
    assert "aligndet pretrain" in text
    assert "difference" in capsys.readouterr().out
    with Image.open(output / "predictions.jpg") as picture:
        assert picture.width > picture.height
    runs = [output / "pretrained" / "run.json", output / "with" / "run.json", output / "without" / "run.json"]
    pretraining, with_it, without = (json.loads(path.read_text())["settings"] for path in runs)
    assert pretraining["steps"] == 1
    differing = {name for name in with_it if with_it[name] != without[name]}
    assert differing == {"init_from"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("done already")

    for step in ("sample_data", "pretrain", "finetune"):
        monkeypatch.setattr(module, step, refuse)
    assert quickstart(output, **SMALL) == first
