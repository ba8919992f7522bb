from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from aligndet.proposals.engines import run
from aligndet.workers import cores, worker_context, worker_settings


def test_what_workers_need_is_imported_without_the_training_framework() -> None:
    modules = "commands.propose", "commands.cluster", "data.crops", "data.labelled", "data.views", "workers"
    code = "import sys\n" + "\n".join(f"import aligndet.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", f"{code}\nassert 'lightning' not in sys.modules"], check=True)


def test_the_script_that_asks_for_work_is_not_run_by_its_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import aligndet; aligndet.propose('images', output='proposals')")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert list(run(abs, [-1, 2], workers=1)) == [1, 2]
    assert list(DataLoader(Loaded(), batch_size=None, **worker_settings(1))) == [sys.platform == "linux"] * 2  # type: ignore[arg-type]


class Loaded:
    """Whether a process has imported what proposals need before it was asked for anything."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return "aligndet.proposals.selective_search" in sys.modules


def test_workers_start_with_what_they_need() -> None:
    settings = worker_settings(2)
    assert list(DataLoader(Loaded(), batch_size=None, **settings)) == [sys.platform == "linux"] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quota", "count"), [("250000 100000", 3), ("max 100000", 8), ("", 8), ("50000 100000", 1)]
)
def test_a_containers_bound_counts(
    quota: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("aligndet.workers._QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores() == count


class Begun(Loaded):
    """Threads of a process, and how many it computes with."""

    def __getitem__(self, index: int) -> Any:
        return [thread.name for thread in threading.enumerate()], torch.get_num_threads()


def test_a_loaders_process_has_one_thread_and_watches_the_one_that_started_it() -> None:
    for names, threads in DataLoader(Begun(), batch_size=None, **worker_settings(1)):  # type: ignore[arg-type]
        assert any("_end_after" in name for name in names)
        assert threads == 1


class Stuck(Loaded):
    def __init__(self, note: Path) -> None:
        self.note = note

    def __getitem__(self, index: int) -> Any:
        self.note.write_text(str(os.getpid()))
        time.sleep(600)


def load(note: Path) -> None:
    # a fork, for this process has no threads and no server of forks yet, which takes seconds
    settings = {**worker_settings(1), "multiprocessing_context": get_context("fork")}
    next(iter(DataLoader(Stuck(note), batch_size=None, **settings)))  # type: ignore[arg-type]


def test_a_loaders_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    note = tmp_path / "number"
    first = worker_context().Process(target=load, args=(note,))  # type: ignore[attr-defined]
    first.start()
    deadline = time.monotonic() + 240
    while not (note.is_file() and note.read_text()):
        assert first.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = psutil.Process(int(note.read_text()))
    first.kill()
    first.join()
    try:
        assert not psutil.wait_procs([worker], timeout=30)[1]
    finally:
        if worker.is_running():
            worker.kill()
