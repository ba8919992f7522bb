"""Lightning's trainer as every command uses it: one long pass, logs, checkpoints that are whole, progress."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from aligndet.callbacks import (
    Progress,
    SkippedImages,
    Termination,
    Throughput,
    ValidateLast,
    forget_processes,
)
from aligndet.checkpoints import LastCheckpoint, WholeCheckpointIO, read_checkpoint
from aligndet.data.labelled import HostBatch, ValidationDataset
from aligndet.launch import SameStart, environment, leave_as_usual, leave_at_once
from aligndet.loggers import TableLogger
from aligndet.training import StepSampler, compile_networks
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
        dataset: Asked for by (index, seed), see `StepSampler`; which images are taller than wide is its
            ``tall``, if it has one.
        data: What the data set holds, of `data_summary`.
        steps: Optimizer steps of the whole run.
        checkpoint: To go on from, or None.
        output: Folder of the run; logs go to ``logs``, checkpoints to ``checkpoints``.
        batch_size: Images a batch on each device.
        accumulate: Batches a step.
        devices: Number of devices a machine.
        nodes: Number of machines.
        strategy: Of Lightning ("auto", "ddp"), or "fsdp".
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
    checkpoint_every = min(steps, checkpoint_every or min(500, max(1, steps // 10)))
    last = LastCheckpoint(output / "checkpoints", checkpoint_every)
    ending = Termination(last)
    begun = {} if checkpoint is None else read_checkpoint(checkpoint)
    first = int(begun.get("global_step", 0))
    start = SameStart(output, first, data)
    start.check(begun)
    del begun
    # the logger empties a folder that it finds: a resumed run writes beside what was logged before it
    table = f"csv_from_{first}" if first else "csv"
    logs: list[Logger] = [
        TableLogger(output, "logs", table, flush_logs_every_n_steps=1),
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
        strategy=_fully_sharded() if strategy == "fsdp" else strategy,
        inference_mode=strategy != "fsdp",  # its tensors could not be gathered to be saved
        accelerator=accelerator,
        precision=precision,
        gradient_clip_val=clip,
        log_every_n_steps=log_every,
        logger=logs,
        callbacks=[
            start,
            Throughput(),
            SkippedImages(),
            Progress(steps * accumulate),
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
        accumulate=accumulate,
        tall=getattr(dataset, "tall", None),
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
            collate_fn=HostBatch,
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
        learns = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(
            f"{steps} steps of {images} images, {steps * images / samples:.3g} epochs of {samples} images;"
            f" {learns:,} parameters learn"
        )
        if first:
            said = f"goes on from step {first} of {steps}" if first < steps else "is complete already"
            print(f"{output}: {said}")
    try:
        trainer.fit(module, loader, held_out, ckpt_path=checkpoint, weights_only=True)
    except (Exception, SIGTERMException) as error:
        agreed = isinstance(error, SIGTERMException)
        if not agreed:
            leave_at_once(128 + signal.SIGTERM if ending.requested else 2)
            if trainer.strategy.launcher is not None:  # on GPUs, the others would wait for half an hour
                trainer.strategy.launcher.kill(signal.SIGKILL)
        forget_processes(trainer)
        if agreed or ending.requested:  # a success to whoever asks for the exit status; loaders may die of it
            if trainer.is_global_zero:
                print(f"terminated; the last checkpoint is of step {last.step} of {steps}: {output}")
            raise SystemExit(128 + signal.SIGTERM) from None
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ValueError(
            f"the GPU has not enough memory for {batch_size} images at a time: try a part of --batch-size and"
            " as many times --accumulate, --precision bf16-mixed, or smaller images (--min-size, --max-size,"
            f" --crop-size): {error}"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        leave_at_once(130)
        raise
    leave_as_usual()
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


def _fully_sharded() -> Strategy:
    from aligndet.sharding import FullyShardedStrategy  # takes a while to import

    return FullyShardedStrategy()


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
        """Converts all batch norms that are trained, in place; one that is met twice is converted once."""
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                trained = isinstance(child, _BatchNorm) and child.training
                if trained and not isinstance(child, nn.SyncBatchNorm):
                    parent.add_module(name, convert_sync_batchnorm(child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leaves the model as it is: what is kept of it are its weights."""
        return model
