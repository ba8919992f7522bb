"""Logs beside the files of a run: asked for by name, never without."""

from __future__ import annotations

import csv
import errno
import importlib.util
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import aligndet
from aligndet.loggers import TableLogger
from aligndet.reporting.runs import read_run

SMALL: dict[str, Any] = {"trunk": "mobilenetv3_small_050", "trunk_weights": "none", "fpn_channels": 64}
SMALL |= {"min_size": (64, 64), "max_size": 96, "batch_size": 1, "steps": 2, "workers": 0, "log_every": 1}
SMALL |= {"accelerator": "cpu"}


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_a_full_disk_leaves_the_table_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TableLogger(tmp_path, "logs", "csv", flush_logs_every_n_steps=1)
    logger.log_metrics({"loss": 1.0}, 0)
    table = tmp_path / "logs" / "csv" / "metrics.csv"
    before = table.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", lambda *_: fail(errno.ENOSPC))
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.csv'"):
            logger.log_metrics({"loss": 0.5, "val/AP": 0.25}, 1)
    assert table.read_text() == before
    assert [path.name for path in table.parent.iterdir()] == ["metrics.csv"]
    logger.save()  # as Lightning does when a run has failed
    assert table.read_text() == before


def test_a_later_column(tmp_path: Path) -> None:
    logger = TableLogger(tmp_path, "logs", "csv", flush_logs_every_n_steps=1)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"loss": 0.5, "val/AP": 0.25}, 1)
    with (tmp_path / "logs" / "csv" / "metrics.csv").open(newline="") as file:
        rows = [(row["step"], row["loss"], row["val/AP"]) for row in csv.DictReader(file)]
    assert rows == [("0", "1.0", ""), ("1", "0.5", "0.25")]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    logger = TableLogger(tmp_path, "logs", "csv", flush_logs_every_n_steps=1)
    for step in range(3):
        logger.log_metrics({"loss": 0.5 * step}, step)
    table = tmp_path / "logs" / "csv" / "metrics.csv"
    (tmp_path / "run.json").write_text("{}")
    whole = table.read_bytes()
    for end in range(len(whole) - 5, len(whole)):
        table.write_bytes(whole[:end])
        assert read_run(tmp_path).curves["loss"] == {0: 0.0, 1: 0.5}
    table.write_bytes(whole)
    assert read_run(tmp_path).curves["loss"] == {0: 0.0, 1: 0.5, 2: 1.0}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed(name: Any, sample: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ImportError, match=rf'--loggers {name}: pip install "aligndet\[{name}\]"'):
        aligndet.finetune(sample / "train.json", output=tmp_path / "run", loggers=(name,), **SMALL)


def test_loggers_by_name(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    aligndet.finetune(sample / "train.json", output=run, loggers=("wandb", "mlflow"), **SMALL)
    assert list((run / "logs" / "wandb").glob("offline-run-*"))
    with sqlite3.connect(run / "logs" / "mlflow.db") as database:
        logged = {row[0] for row in database.execute("select key from metrics")}
    assert "loss/total" in logged
