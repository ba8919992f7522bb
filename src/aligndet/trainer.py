"""Lightning's trainer as every command uses it: one long pass, logs, checkpoints that are whole, progress."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from aligndet.checkpoints import LastCheckpoint, WholeCheckpointIO
from aligndet.data.labelled import ValidationDataset, collate_readable
from aligndet.files import print_skipped
from aligndet.launch import SameStart, environment
from aligndet.processes import mean_over_processes
from aligndet.training import StepSampler, compile_networks, steps_done
from aligndet.workers import cores, worker_settings

LoggerName = Literal["wandb", "mlflow"]


def fit(
    module: LightningModule,
    dataset: Dataset[Any],
    *,
    data: str,
    steps: int,
    checkpoint: Path | None,
    output: Path,
    batch_size: int,
    accumulate: int,
    devices: int,
    nodes: int,
    strategy: str,
    accelerator: str,
    precision: Literal["32", "bf16-mixed", "16-mixed"],
    channels_last: bool,
    compile: bool,
    clip: float | None,
    checkpoint_every: int | None,
    log_every: int,
    loggers: Sequence[LoggerName],
    workers: int | None,
    seed: int,
    sync_batch_norm: bool = False,
    validation: ValidationDataset | None = None,
    validate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> bool:
    """Trains for a number of optimizer steps, from the start or from a checkpoint.

    Args:
        module: To train.
        dataset: Asked for by (index, seed), see `StepSampler`.
        data: What the data set holds, of `data_summary`.
        steps: Optimizer steps of the whole run.
        checkpoint: To go on from, or None.
        output: Folder of the run; logs go to ``logs``, checkpoints to ``checkpoints``.
        batch_size: Images a batch on each device.
        accumulate: Batches a step.
        devices: Number of devices a machine.
        nodes: Number of machines.
        strategy: Of Lightning ("auto", "ddp").
        accelerator: Of Lightning ("auto", "cpu", "gpu").
        precision: Of Lightning.
        channels_last: Convolutions work on maps whose channels are neighbours in memory.
        compile: Trunk, pyramid and heads go through torch.compile.
        clip: Bound of the gradient norm.
        checkpoint_every: Steps between checkpoints; by default a tenth of the run, at most 500.
        log_every: Steps between lines of the logs.
        loggers: Further places to log to.
        workers: Loader processes on each device; None: one less than its share of the cores, at most eight.
        seed: Of the order of the data and of the samples.
        sync_batch_norm: Batch norms count over all processes, where these have GPUs (torch asks for them).
        validation: Images to validate on, also after the last step, each process on its part; or None.
        validate_every: Steps between validations; by default a tenth of the run.
        callbacks: More of them.

    Returns:
        Whether this process is the one that writes the result.

    Raises:
        ValueError: If the data is not what the run began with, or a GPU has too little memory; the message
            says what takes less.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # meant: the frozen trunk, --workers 0, runs without validation, resumed runs
    expected = (
        "module\\(s\\) in eval mode",
        "does not have many workers",
        "LeafSpec",
        "have no `val_dataloader`",
        *("dataloader is not resumable", "exists and is not empty"),  # `StepSampler` goes on where it was
    )
    warnings.filterwarnings("ignore", "|".join(f".*{text}" for text in expected))
    validate_every = min(steps, validate_every or max(1, steps // 10))
    validated = validate_every if validation is not None else None
    checkpoint_every = min(steps, checkpoint_every or min(500, max(1, steps // 10)))
    last, ending = LastCheckpoint(output / "checkpoints", checkpoint_every, validated), Termination(validated)
    first = steps_done(checkpoint)
    start = SameStart(output, first, data)
    if checkpoint is not None:
        start.check(checkpoint)
    # the logger empties a folder that it finds: a resumed run writes beside what was logged before it
    table = f"csv_from_{first}" if first else "csv"
    logs: list[Logger] = [
        CSVLogger(output, "logs", table, flush_logs_every_n_steps=1),
        TensorBoardLogger(output, "logs", "tensorboard"),
        *(_logger(name, output) for name in loggers),
    ]
    on_gpus = accelerator != "cpu" and torch.cuda.is_available()
    synchronised = sync_batch_norm and devices * nodes > 1 and on_gpus
    started = environment()
    if validation is not None and len(validation) < devices * nodes:
        raise ValueError(f"{len(validation)} images for validation are too few for {devices * nodes} devices")
    samples = len(dataset)  # type: ignore[arg-type]
    trainer = _trainer(
        default_root_dir=output,
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        accelerator=accelerator,
        precision=precision,
        gradient_clip_val=clip,
        log_every_n_steps=log_every,
        logger=logs,
        callbacks=[
            start,
            Throughput(),
            SkippedImages(),
            Progress(),
            ValidateLast(),
            *callbacks,
            last,  # has the state of all others in it
            ending,
        ],
        plugins=[p for p in (WholeCheckpointIO(), SyncBatchNorms() if synchronised else None, started) if p],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        val_check_interval=validate_every * accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validation is not None else 0,
    )
    sampler = StepSampler(
        samples,
        batch_size=batch_size,
        batches=steps * accumulate,
        seed=seed,
        first=first * accumulate,
        rank=trainer.global_rank,
        world=devices * nodes,
    )
    if workers is None:
        sharing = 1 if isinstance(started, SLURMEnvironment) else devices  # a task of Slurm has its own cores
        workers = min(8, max(1, (cores() - 1) // sharing))
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=list,
        pin_memory=on_gpus,
        **worker_settings(workers),
    )
    held_out = None
    if validation is not None:
        held_out = DataLoader(
            validation,
            batch_size,
            sampler=range(trainer.global_rank, len(validation), devices * nodes),
            collate_fn=collate_readable,
            pin_memory=on_gpus,
            persistent_workers=workers > 0,
            **worker_settings(workers),
        )
    if on_gpus:
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it anyway
    if channels_last:
        module.to(memory_format=torch.channels_last)  # convolutions hand on the format of their weights
    if compile:
        compile_networks(module)
    images = batch_size * accumulate * devices * nodes
    if trainer.is_global_zero:
        print(f"{steps} steps of {images} images, {steps * images / samples:.3g} epochs of {samples} images")
    try:
        trainer.fit(module, loader, held_out, ckpt_path=checkpoint, weights_only=True)
    except (Exception, SIGTERMException) as error:
        agreed = isinstance(error, SIGTERMException)
        if not agreed and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # on GPUs, the others would wait for half an hour
        forget_processes(trainer)
        if agreed or ending.told:  # a success to whoever asks for the exit status; loaders may die of it
            if trainer.is_global_zero:
                kept = steps_done(path if (path := output / "checkpoints" / "last.ckpt").is_file() else None)
                print(f"terminated; the last checkpoint is of step {kept} of {steps}: {output}")
            raise SystemExit(128 + signal.SIGTERM) from None
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ValueError(
            f"the GPU has not enough memory for {batch_size} images at a time: try a part of --batch-size and"
            " as many times --accumulate, --precision bf16-mixed, or smaller images (--min-size, --max-size):"
            f" {error}"
        ) from error
    return trainer.is_global_zero


RUN_SETTINGS = tuple(
    name
    for name, p in signature(fit).parameters.items()
    if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in ("data", "steps", "checkpoint")
)
"""The arguments that every training command has, and hands to `fit` as they are."""


def _logger(name: LoggerName, output: Path) -> Logger:
    """A logger that goes by the settings of its own library (WANDB_MODE, MLFLOW_TRACKING_URI, ...)."""
    folder = output.resolve() / "logs"
    try:
        if name == "wandb":
            return WandbLogger(output.name, folder, project="aligndet")
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        folder.mkdir(parents=True, exist_ok=True)
        return MLFlowLogger("aligndet", output.name, place)
    except ModuleNotFoundError as error:
        raise ImportError(f'--loggers {name}: pip install "aligndet[{name}]" ({error})') from error


def _trainer(**settings: Any) -> Trainer:
    try:
        return Trainer(**settings)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


class SyncBatchNorms(LayerSync):
    """Lets batch norms count over all processes, those of timm too: torch's own conversion would lose the
    activation that is part of them.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts all batch norms in place; one that is met twice (a shared trunk) is converted once."""
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                    parent.add_module(name, convert_sync_batchnorm(child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leaves the model as it is: what is kept of it are its weights."""
        return model


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

    Lightning's own handler asks the other processes wherever this one happens to be, amid other questions of
    theirs. A kind of checkpoint, since Lightning calls these last: what is due is kept before; of a step that
    is validated, after that.
    """

    def __init__(self, validated_every: int | None) -> None:
        """Waits to be told.

        Args:
            validated_every: Steps between validations; None: there are none.
        """
        self.told, self._validated_every = False, validated_every

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes the signal over; Lightning gives it back at the end."""

        def told(number: int, _: Any) -> None:
            if not self.told and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)
            self.told = True

        if threading.current_thread() is threading.main_thread():  # which signals go to
            signal.signal(signal.SIGTERM, told)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks after a step that is not validated."""
        every = self._validated_every
        if not (batch_idx + 1) % trainer.accumulate_grad_batches and (
            every is None or trainer.global_step % every
        ):
            self._ask(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Asks after the others."""
        self._ask(trainer, module)

    def _ask(self, trainer: Trainer, module: LightningModule) -> None:
        """Ends the run if any process has been told; after the last step it ends anyway."""
        if trainer.global_step >= trainer.max_steps:
            return
        told = self.told
        if trainer.world_size > 1:
            told = bool(mean_over_processes(torch.tensor(float(told), device=module.device)) > 0)
        if told:
            forget_processes(trainer)
            raise SIGTERMException


class Progress(TQDMProgressBar):
    """A bar over the steps of the run, with the time that is left."""

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
