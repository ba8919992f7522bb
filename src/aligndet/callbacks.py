"""What a run does beside training: progress, speed, broken images, the last validation, an end when told."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, TQDMProgressBar
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from aligndet.checkpoints import LastCheckpoint, is_validated
from aligndet.files import print_skipped
from aligndet.processes import all_reduce_mean


class Patience(EarlyStopping):
    """Ends a run that no longer gets better; one that had ended before it was resumed trains no further."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Ends a resumed run at once."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class Throughput(Callback):
    """Logs images a second and the share of the time that the trainer waits for data."""

    def __init__(self) -> None:
        self._ended = self._started = time.perf_counter()
        self._waited = self._worked = 0.0
        self._images = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begins the wait for the first batch."""
        self._ended = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leaves validation out."""
        self._ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the wait for data."""
        self._started = time.perf_counter()
        self._waited += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the step."""
        if module.device.type == "cuda":  # what is still under way is no wait for data
            torch.cuda.synchronize(module.device)
        self._ended = time.perf_counter()
        self._worked += self._ended - self._started
        self._images += len(batch)
        if (batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            elapsed = self._waited + self._worked
            module.log("speed/images_per_second", self._images * trainer.world_size / elapsed)
            module.log("speed/data_wait", self._waited / elapsed)
            self._waited = self._worked = 0.0
            self._images = 0


class SkippedImages(Callback):
    """Collects broken images by name and says at the end how many there were."""

    def __init__(self) -> None:
        self.messages: dict[str, None] = {}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the messages out of the batch."""
        for item in batch:
            self.messages.update(dict.fromkeys(item.skipped))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Prints the first ten."""
        print_skipped(self.messages)


class ValidateLast(Callback):
    """Validates after the last step, too: the interval seldom divides the run, and Lightning stops where it
    does not.
    """

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Says that the run is at its end: Lightning validates before it stops."""
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


def forget_processes(trainer: Trainer) -> None:
    """Lets the processes that Lightning has started end as they will; it would kill this one for it.

    Args:
        trainer: That started them, if anybody did.
    """
    if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
        launcher.procs.clear()


class Termination(Checkpoint):
    """Ends a run that is told to (SIGTERM) after a step, in all processes after the same one.

    Lightning's own handler starts a collective operation at an arbitrary point, amid others. This one waits
    for the end of a step, of one that is validated for that of its validation. It is a kind of checkpoint,
    which Lightning calls last.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        """Waits for a signal.

        Args:
            last: Keeps the step that the run ends after.
        """
        self.last, self.requested = last, False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes the signal over; Lightning gives it back at the end."""

        def request(number: int, _: Any) -> None:
            if not self.requested and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)
            self.requested = True

        if threading.current_thread() is threading.main_thread():  # which signals go to
            signal.signal(signal.SIGTERM, request)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks after a step that is not validated."""
        if not (batch_idx + 1) % trainer.accumulate_grad_batches and not is_validated(trainer):
            self._ask(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Asks after the others."""
        self._ask(trainer, module)

    def _ask(self, trainer: Trainer, module: LightningModule) -> None:
        """Ends the run if any process has got the signal; after the last step it ends anyway."""
        if trainer.global_step >= trainer.max_steps:
            return
        requested = self.requested
        if trainer.world_size > 1:
            requested = bool(all_reduce_mean(torch.tensor(float(requested), device=module.device)) > 0)
        if requested:
            self.last.keep(trainer)
            forget_processes(trainer)
            raise SIGTERMException


class Progress(TQDMProgressBar):
    """A bar over the steps of the run, with the time that is left."""

    def __init__(self, batches: int) -> None:
        """Of a run.

        Args:
            batches: Of all of it. Where nobody watches, as in a log file, the bar is drawn a hundred times.
        """
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else max(1, batches // 100))

    def on_train_start(self, *call: Any) -> None:
        """Begins where a resumed run does, whose epoch has started already."""
        super().on_train_start(*call)
        self.train_progress_bar.reset(int(self.total_train_batches))
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        self.train_progress_bar.n = self.train_progress_bar.initial = done
        self.train_progress_bar.set_description("batches")

    def on_train_epoch_start(self, *call: Any) -> None:
        """Has named the bar."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leaves the number of a logger's version out."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
