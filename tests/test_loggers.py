"""Logs beside the files of a run: asked for by name, never without."""

from __future__ import annotations

import importlib.util
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import aligndet

SMALL: dict[str, Any] = {"trunk": "mobilenetv3_small_050", "trunk_weights": "none", "fpn_channels": 64}
SMALL |= {"min_size": (64, 64), "max_size": 96, "batch_size": 1, "steps": 2, "workers": 0, "log_every": 1}
SMALL |= {"accelerator": "cpu"}


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
