"""What a run keeps of its state, and when: a resumed run ends with the weights of an unbroken one."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from aligndet.files import check_zip, whole_file


def is_validated(trainer: Trainer) -> bool:
    """Whether a validation follows the step that has just ended; one follows the last."""
    every = int(trainer.val_check_interval) // trainer.accumulate_grad_batches
    step = trainer.global_step
    return trainer.enable_validation and (step % every == 0 or step >= trainer.max_steps)


class _Checkpoint(ModelCheckpoint):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on in a folder that has been moved, too; Lightning would forget the best score."""
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class LastCheckpoint(_Checkpoint):
    """The newest state, to go on from.

    Where a step is validated, it is written after that: a run that goes on from a checkpoint of before would
    skip the validation.
    """

    def __init__(self, folder: Path, every: int) -> None:
        """Of a run.

        Args:
            folder: Of its checkpoints.
            every: Steps between two.
        """
        super().__init__(
            folder,
            filename="last",
            every_n_train_steps=every,
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Does not save the resumed step again: with accumulation, the next batch may not finish a step."""
        super().on_train_start(trainer, module)
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *batch: Any) -> None:
        """Saves now if no validation follows."""
        if not is_validated(trainer):
            self._save(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves what it has not saved after the step."""
        self._save(trainer, module)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        """If it is time to, and after the last step."""
        super().on_train_batch_end(trainer, module, None, None, 0)
        if trainer.global_step >= trainer.max_steps:
            self.keep(trainer)

    @property
    def step(self) -> int:
        """That is saved."""
        return self._last_global_step_saved

    def keep(self, trainer: Trainer) -> None:
        """Saves the step that has just ended, unless that is done.

        Args:
            trainer: In all processes.
        """
        if trainer.global_step > self._last_global_step_saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class BestCheckpoint(_Checkpoint):
    """The state of the best validation."""

    def __init__(self, folder: Path) -> None:
        """Of a run.

        Args:
            folder: Of its checkpoints.
        """
        super().__init__(folder, filename="best", monitor="val/AP", mode="max", enable_version_counter=False)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Takes the newer one while no object has been found, where there is nothing to choose by."""
        best = self.best_model_score
        if current is not None and best is not None and not (current > 0 or best > 0):
            return True
        return super().check_monitor_top_k(trainer, current)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of a run, without running code from it.

    Raises:
        ValueError: If it is none, or damaged.
    """
    try:
        check_zip(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        int(content["global_step"])
        return content
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and missing keys: all mean the same here
        raise ValueError(f"{path}: no checkpoint of a run, or damaged: {error}") from error


def best_validation(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `BestCheckpoint` has kept, from its file alone: a run may be resumed when it is over.

    Args:
        checkpoint: Of `BestCheckpoint`, as `read_checkpoint` gives it.

    Returns:
        Its step, and its AP in 0..1, or None if there was no object to measure by.
    """
    (state,) = (s for name, s in checkpoint["callbacks"].items() if name.startswith(BestCheckpoint.__name__))
    score = float(state["best_model_score"])
    return {"step": int(checkpoint["global_step"]), "AP": score if math.isfinite(score) else None}


class WeightAverage(WeightAveraging):
    """The moving average of the weights, where these are: Lightning copies them before they move to a GPU.

    Buffers are taken as they are: some are integers (Swin's positions), whose average would be rounded.
    """

    def __init__(self, decay: float) -> None:
        """Prepares the average.

        Args:
            decay: Of the average in every step.
        """
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Follows the weights."""
        if self._average_model is not None:
            self._average_model.to(module.device)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, flushes it to disk, and only then renames it.

    Lightning's own renames as well, but does not flush: after a power cut the name may stand for half a file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Saves whole or not at all."""
        with _without_interrupt(), whole_file(Path(path)) as file:
            torch.save(checkpoint, file)


@contextmanager
def _without_interrupt() -> Iterator[None]:
    """Lets an interrupt wait: amid a file, torch's writer fails of it or aborts the process."""
    if threading.current_thread() is not threading.main_thread():  # which signals go to
        yield
        return
    waiting: list[Any] = []
    usual = signal.signal(signal.SIGINT, lambda *call: waiting.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if waiting and callable(usual):
            usual(*waiting[0])
