"""The folder of a run: killed while it is emptied, and with what a killed write has left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aligndet.commands._runs import run_folder


def _settings(output: Path, **changed: Any) -> dict[str, Any]:
    return {"output": output, "resume": False, "overwrite": False, **changed}


def test_an_emptying_that_was_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_folder(_settings(tmp_path), "a run"):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "zebra.txt").touch()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt), run_folder(_settings(tmp_path, overwrite=True), "a run"):
            pass
    with run_folder(_settings(tmp_path, overwrite=True), "a run"):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "run.json", "README.txt"}


def test_what_a_killed_write_has_left_goes(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".last.0123.partial.ckpt"
    with run_folder(_settings(tmp_path), "a run"):
        left.parent.mkdir()
        left.touch()
    with run_folder(_settings(tmp_path, resume=True), "a run"):
        assert not left.exists()


def test_a_run_that_has_failed_at_its_start_does_not_keep_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first"), run_folder(_settings(tmp_path, trunk="resnet19"), "a run"):
        raise ValueError("the first mistake")
    (tmp_path / "logs").mkdir()
    with run_folder(_settings(tmp_path, trunk="resnet18"), "a run") as checkpoint:
        assert checkpoint is None
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="is not empty"), run_folder(_settings(tmp_path), "a run"):
        pass


def test_a_folder_of_images_is_the_same_with_a_slash_behind_it(tmp_path: Path) -> None:
    with run_folder(_settings(tmp_path, images="data/train"), "a run"):
        (tmp_path / "checkpoints").mkdir()
    with run_folder(_settings(tmp_path, images="data/train/", resume=True), "a run"):
        pass
    with (
        pytest.raises(ValueError, match="started with images"),
        run_folder(_settings(tmp_path, images="s3://data/train", resume=True), "a run"),
    ):
        pass
