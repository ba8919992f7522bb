from __future__ import annotations

import io
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from aligndet.callbacks import Progress, Termination, Throughput
from aligndet.checkpoints import LastCheckpoint


def test_speed_is_told_from_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("aligndet.callbacks.time", SimpleNamespace(perf_counter=lambda: now))
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(device=torch.device("cpu"), log=logged.__setitem__)
    trainer: Any = SimpleNamespace(log_every_n_steps=2, world_size=2)
    throughput = Throughput()

    def step(batch_idx: int, *, waits: float, works: float) -> None:
        nonlocal now
        now += waits
        throughput.on_train_batch_start(trainer, module, [], batch_idx)
        now += works
        throughput.on_train_batch_end(trainer, module, None, ["an image"] * 3, batch_idx)

    now = 5.0
    throughput.on_train_start(trainer, module)
    step(0, waits=1.0, works=2.0)
    assert not logged
    step(1, waits=0.0, works=1.0)
    assert logged == {"speed/images_per_second": 6 * 2 / 4.0, "speed/data_wait": 0.25}
    step(2, waits=0.5, works=0.5)
    now += 100.0
    throughput.on_validation_end(trainer, module)
    step(3, waits=1.0, works=3.0)
    assert logged == {"speed/images_per_second": 6 * 2 / 5.0, "speed/data_wait": 0.3}


@pytest.mark.parametrize(("processes", "step", "ends"), [(2, 3, True), (1, 3, False), (2, 8, False)])
def test_all_processes_end_where_one_was_told_to(
    processes: int, step: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligndet.callbacks.all_reduce_mean", lambda told: told + 0.5)
    last, strategy = create_autospec(LastCheckpoint), SimpleNamespace(launcher=None)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_step=step, max_steps=8, world_size=processes, strategy=strategy)
    with pytest.raises(SIGTERMException) if ends else nullcontext():
        Termination(last).on_validation_end(trainer, module)
    assert last.keep.called == ends


@pytest.mark.parametrize(("watched", "drawn"), [(True, 2000), (False, 100)])
def test_a_log_file_gets_few_bars(watched: bool, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = io.StringIO()
    stream.isatty = lambda: watched
    monkeypatch.setattr("sys.stderr", stream)
    progress = Progress(2000)
    assert sum(progress._should_update(step, 2000) for step in range(1, 2001)) == drawn
