"""A run that is killed and resumed keeps the best weights of an unbroken one."""

from __future__ import annotations

import math
import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from aligndet.checkpoints import (
    BestCheckpoint,
    LastCheckpoint,
    WeightAverage,
    WholeCheckpointIO,
    best_validation,
    read_checkpoint,
)
from aligndet.commands.finetune import _callbacks
from aligndet.data.labelled import ValidationDataset
from aligndet.trainer import SyncBatchNorms, _trainer, fit
from aligndet.training import StepSampler, TrainingModule

SCORES = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.6}
"""By step."""


class Item(NamedTuple):
    value: Tensor
    skipped: tuple[str, ...] = ()


class Items(Dataset[Item]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Item:
        return Item(torch.ones(1))


class Counting(TrainingModule):
    """Its one weight is the number of steps."""

    def __init__(
        self,
        killed_in_step: int | None = None,
        killed_in_validation: int | None = None,
        killed_in_batch: int | None = None,
    ) -> None:
        super().__init__(steps=0)
        self.weight = nn.Parameter(torch.zeros(1))
        self.killed_in_step, self.killed_in_validation = killed_in_step, killed_in_validation
        self.killed_in_batch = killed_in_batch
        self.validated: list[int] = []

    def training_step(self, batch: list[Item], batch_idx: int) -> Tensor:
        if self.global_step == self.killed_in_step or batch_idx == self.killed_in_batch:
            raise RuntimeError("killed")
        return -self.weight.sum()

    def validation_step(self, batch: list[Item], batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None:
        if self.global_step == self.killed_in_validation:
            raise RuntimeError("killed")
        self.validated.append(self.global_step)
        self.log("val/AP", SCORES[self.global_step])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(
    module: Counting,
    output: Path,
    accumulate: int,
    *,
    validated: bool = True,
    patience: int | None = None,
    ema: float | None = None,
    **settings: Any,
) -> None:
    checkpoint = output / "checkpoints" / "last.ckpt"
    usual: dict[str, Any] = {
        **{
            "data": "8 images",
            "steps": 8,
            "batch_size": 1,
            "devices": 1,
            "nodes": 1,
            "workers": 0,
            "seed": 0,
        },
        **{"strategy": "auto", "accelerator": "cpu", "precision": "32", "clip": None, "loggers": ()},
        **{"checkpoint_every": 2, "validate_every": 2, "log_every": 1},
        **{"channels_last": False, "compile": False},
        "checkpoint": checkpoint if checkpoint.is_file() else None,
        "validation": ValidationDataset(Items()) if validated else None,
        "callbacks": _callbacks(output, validated, patience, ema),
    }
    fit(module, Items(), output=output, accumulate=accumulate, **usual | settings)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("killed", "validated"),
    [
        ({"killed_in_step": 5}, [6, 8]),
        ({"killed_in_validation": 4}, [4, 6, 8]),
        ({"killed_in_validation": 8}, [8]),  # the last
    ],
)
@pytest.mark.parametrize("last", [0.6, 0.1])
def test_the_best_weights_survive(
    killed: dict[str, int],
    validated: list[int],
    last: float,
    accumulate: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(SCORES, 8, last)
    with pytest.raises(RuntimeError, match="killed"):
        train(Counting(**killed), tmp_path / "run", accumulate)
    (tmp_path / "run").rename(tmp_path / "moved")  # as if it were another machine
    module, best = Counting(), tmp_path / "moved" / "checkpoints" / "best.ckpt"
    kept = read_checkpoint(best.with_name("last.ckpt"))["global_step"]
    capsys.readouterr()
    train(module, tmp_path / "moved", accumulate)
    assert f"moved: goes on from step {kept} of 8" in capsys.readouterr().out
    assert module.validated == validated
    module.load_state_dict(read_checkpoint(best)["state_dict"])
    assert module.weight.item() == (8 if last > 0.5 else 4)
    expected = {"step": 8, "AP": 0.6} if last > 0.5 else {"step": 4, "AP": 0.5}
    assert best_validation(read_checkpoint(best)) == pytest.approx(expected)


def test_a_run_that_is_killed_twice_within_a_step_of_several_batches(tmp_path: Path) -> None:
    for killed in ({"killed_in_step": 5}, {"killed_in_batch": 4 * 4 + 1}):
        with pytest.raises(RuntimeError, match="killed"):
            train(Counting(**killed), tmp_path, 4, validated=False)
    module = Counting()
    train(module, tmp_path, 4, validated=False)
    assert module.weight.item() == 8


@pytest.mark.parametrize("validated", [True, False])
def test_the_last_step_is_kept(validated: bool, tmp_path: Path) -> None:
    train(Counting(), tmp_path, 2, checkpoint_every=3, validated=validated)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 8


@pytest.mark.parametrize(("steps", "kept"), [(8, 5), (20, 4), (30, 3)])
def test_a_short_run_is_kept_every_tenth_of_it(steps: int, kept: int, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        train(Counting(killed_in_step=5), tmp_path, 1, checkpoint_every=None, validated=False, steps=steps)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == kept


def test_a_long_run_is_kept_every_500_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = create_autospec(LastCheckpoint, side_effect=InterruptedError)
    monkeypatch.setattr("aligndet.trainer.LastCheckpoint", kept)
    with pytest.raises(InterruptedError):
        train(Counting(), tmp_path / "run", 1, checkpoint_every=None, steps=6000)
    assert kept.call_args.args[1] == 500


def test_the_seed_decides_the_order_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = create_autospec(DataLoader, side_effect=InterruptedError)
    monkeypatch.setattr("aligndet.trainer.DataLoader", loader)
    with pytest.raises(InterruptedError):
        train(Counting(), tmp_path / "run", 2, seed=3)
    order = list(loader.call_args.kwargs["batch_sampler"])
    assert order == list(StepSampler(4, batch_size=1, batches=16, seed=3))


class Elsewhere:
    """The trainer of the second process of the second machine, of three on each; it trains nothing."""

    global_rank, local_rank = 4, 1

    @property
    def is_global_zero(self) -> bool:
        raise InterruptedError


def test_a_process_has_its_part_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tall = torch.arange(12) % 3 == 0
    monkeypatch.setattr(Items, "__len__", lambda _: 12)
    monkeypatch.setattr(Items, "tall", tall, raising=False)
    monkeypatch.setattr("aligndet.trainer._trainer", lambda **_: Elsewhere())
    monkeypatch.setattr("aligndet.trainer.DataLoader", loader := create_autospec(DataLoader))
    with pytest.raises(InterruptedError):
        train(Counting(), tmp_path / "run", 2, devices=3, nodes=2)
    training, validation = (call.kwargs for call in loader.call_args_list)
    expected = StepSampler(12, batch_size=1, batches=16, rank=4, world=6, accumulate=2, tall=tall)
    assert list(training["batch_sampler"]) == list(expected)
    assert list(validation["sampler"]) == [4, 10]


@pytest.mark.parametrize("asked", [False, True])
def test_the_module_is_prepared_as_asked(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, compiled = Counting(), list[nn.Module]()
    module.layer = nn.Conv2d(2, 2, 3)
    monkeypatch.setattr("aligndet.trainer._trainer", lambda **_: Elsewhere())
    monkeypatch.setattr("aligndet.trainer.compile_networks", compiled.append)
    with pytest.raises(InterruptedError):
        train(module, tmp_path / "run", 1, validated=False, channels_last=asked, compile=asked)
    assert module.layer.weight.is_contiguous(memory_format=torch.channels_last) == asked
    assert compiled == [module] * asked


@pytest.mark.parametrize(
    ("settings", "synchronised"),
    [
        ({"devices": 2}, True),
        ({"nodes": 2}, True),
        ({}, False),
        ({"devices": 2, "accelerator": "cpu"}, False),
        ({"devices": 2, "sync_batch_norm": False}, False),
    ],
)
def test_batch_norms_are_synchronised_between_gpus(
    settings: dict[str, Any], synchronised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    trainer = create_autospec(_trainer, side_effect=InterruptedError)
    monkeypatch.setattr("aligndet.trainer._trainer", trainer)
    usual: dict[str, Any] = {"accelerator": "gpu", "sync_batch_norm": True}
    with pytest.raises(InterruptedError):
        train(Counting(), tmp_path, 2, steps=70, validate_every=None, **usual | settings)
    plugins = trainer.call_args.kwargs["plugins"]
    assert any(isinstance(plugin, SyncBatchNorms) for plugin in plugins) == synchronised
    assert trainer.call_args.kwargs["val_check_interval"] == 7 * 2  # batches: a tenth of the run


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        train(Counting(killed_in_step=5), tmp_path, 1)
    with pytest.raises(ValueError, match="began with 8 images; there are 9 images now"):
        train(Counting(), tmp_path, 1, data="9 images")


def test_a_run_that_is_terminated_says_so_by_its_status(tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()  # which signals go to

    class Terminated(Counting):
        def training_step(self, batch: list[Item], batch_idx: int) -> Tensor:
            if self.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SystemExit) as stop:
        train(Terminated(), tmp_path, 1)
    assert stop.value.code == 143


@pytest.mark.parametrize(
    ("told_in", "kept", "validated", "in_validation"),
    [
        *(
            (told_in, told_in + 1, validated, False)
            for told_in in (3, 4, 5, 7)
            for validated in (False, True)
        ),
        *((told_in, told_in + 1, True, True) for told_in in (3, 5, 7)),  # none follows an odd step
    ],
)
def test_a_run_that_is_terminated_keeps_its_last_step(
    told_in: int, kept: int, validated: bool, in_validation: bool, tmp_path: Path
) -> None:
    class Terminated(Counting):
        def training_step(self, batch: list[Item], batch_idx: int) -> Tensor:
            if self.global_step == told_in and not in_validation:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: list[Item], batch_idx: int) -> None:
            if self.global_step == kept and in_validation:
                os.kill(os.getpid(), signal.SIGTERM)

    with nullcontext() if kept == 8 else pytest.raises(SystemExit):  # the last step is the end anyway
        train(Terminated(), tmp_path, 1, validated=validated, checkpoint_every=4)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == kept


def test_a_checkpoint_that_has_changed_is_named(tmp_path: Path) -> None:
    train(Counting(), tmp_path, 1, steps=4)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[content.index(np.float32(4).tobytes())] ^= 1  # a bit of the weight
    checkpoint.write_bytes(content)
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["weight"] != 4
    with pytest.raises(ValueError, match=r"last\.ckpt: no checkpoint of .* is not what was written,"):
        read_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"last\.ckpt: no checkpoint"):
        train(Counting(), tmp_path, 1)


def test_more_devices_than_images_for_validation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 images for validation are too few for 5 devices"):
        train(Counting(), tmp_path, 1, devices=5)


def test_nothing_to_measure_by_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in SCORES:
        monkeypatch.setitem(SCORES, step, math.nan)
    train(Counting(), tmp_path, 1)
    assert best_validation(read_checkpoint(tmp_path / "checkpoints" / "best.ckpt"))["AP"] is None


def test_the_average_of_the_weights_leaves_integers_alone() -> None:
    class Positions(nn.Linear):
        positions: Tensor

        def __init__(self) -> None:
            super().__init__(1, 1)
            self.register_buffer("positions", torch.arange(169), persistent=False)

    module, average = Positions(), WeightAverage(decay=0.9999)
    model = AveragedModel(module, use_buffers=average._use_buffers, **average._kwargs)
    for _ in range(3):
        model.update_parameters(module)
    assert torch.equal(next(model.module.buffers()), module.positions)


def test_a_full_gpu_is_told_what_takes_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Large(Counting):
        def training_step(self, batch: list[Item], batch_idx: int) -> Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(ValueError, match=r"not enough memory for 1 images.*--accumulate.*allocate 2 GiB"):
        train(Large(), tmp_path, accumulate=2)
    assert "8 steps of 2 images, 4 epochs of 4 images; 1 parameters learn" in capsys.readouterr().out


class Scheduled(Counting):
    """Has the optimizer and schedule of every module, and writes down the rate of each step."""

    configure_optimizers = TrainingModule.configure_optimizers

    def on_train_start(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def scheduled(**killed: int) -> Scheduled:
    module = Scheduled(**killed)
    module.optimizer_settings, module.schedule_settings = ("sgd", 1.0, 0.0), ("cosine", 8, 2, ())
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rate_follows_its_schedule_and_goes_on_where_it_was(accumulate: int, tmp_path: Path) -> None:
    expected = [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6))]
    train(whole := scheduled(), tmp_path / "whole", accumulate, validated=False)
    assert whole.rates == pytest.approx(expected)
    with pytest.raises(RuntimeError, match="killed"):
        train(scheduled(killed_in_step=5), tmp_path / "run", accumulate, validated=False)
    train(resumed := scheduled(), tmp_path / "run", accumulate, validated=False)
    assert resumed.rates == pytest.approx(expected[4:])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    train(module := Counting(), tmp_path, 2, validated=False, clip=0.25)
    assert module.weight.item() == pytest.approx(8 * 0.25)


def test_the_average_of_the_weights_is_the_result(tmp_path: Path) -> None:
    train(module := Counting(), tmp_path, 2, validated=False, ema=0.5)
    average = 1.0
    for weight in range(2, 9):
        average = 0.5 * average + 0.5 * weight
    assert module.weight.item() == pytest.approx(average)


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    train(module := Counting(), tmp_path, 2, patience=1)
    assert module.validated == [2, 4, 6]
    module.load_state_dict(read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["state_dict"])
    assert module.weight.item() == 4


@pytest.mark.parametrize(
    ("devices", "slurm", "workers"), [(1, False, 8), (4, False, 3), (40, False, 1), (4, True, 8)]
)
def test_the_devices_of_a_machine_share_its_cores(
    devices: int, slurm: bool, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def stop(count: int) -> None:
        asked.append(count)
        raise InterruptedError

    monkeypatch.setattr("aligndet.trainer.cores", lambda: 16)
    monkeypatch.setattr("aligndet.trainer.worker_settings", stop)
    monkeypatch.setattr("aligndet.trainer._trainer", lambda **_: Elsewhere())
    monkeypatch.setattr("aligndet.trainer.environment", lambda: SLURMEnvironment() if slurm else None)
    with pytest.raises(InterruptedError):
        train(Counting(), tmp_path, 1, validated=False, devices=devices, workers=None)
    assert asked == [workers]


@pytest.mark.parametrize(
    ("best", "now", "taken"),
    [(0.0, 0.0, True), (math.nan, 0.0, True), (0.0, 0.1, True), (0.1, 0.0, False), (0.2, 0.1, False)],
)
def test_the_newest_is_the_best_until_something_is_found(
    best: float, now: float, taken: bool, tmp_path: Path
) -> None:
    checkpoint = BestCheckpoint(tmp_path)
    checkpoint.best_k_models = {"best.ckpt": torch.tensor(best)}
    checkpoint.kth_best_model_path = "best.ckpt"
    checkpoint.best_model_score = torch.tensor(best)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=lambda found: found))
    assert bool(checkpoint.check_monitor_top_k(trainer, torch.tensor(now))) == taken


def test_an_interrupt_waits_until_the_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer ends with an error of its own, or with the process."""
    save = torch.save

    def interrupted(content: Any, file: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        WholeCheckpointIO().save_checkpoint({"global_step": 3}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {"global_step": 3}
    with pytest.raises(KeyboardInterrupt):  # as it was before
        os.kill(os.getpid(), signal.SIGINT)
