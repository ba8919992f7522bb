"""What box-domain pre-training, image-domain pre-training and fine-tuning share: data order, optimizer,
trainer.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler

OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "step", "constant"]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed) for every step of a run, from any step on.

    A run is one long pass: epoch after epoch in an order that depends on the seed alone, and with a seed for
    each sample's augmentation. A resumed run therefore sees what the unbroken run would have seen, and
    `world` processes together see what one process with a `world` times larger batch sees.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        batches: int,
        seed: int = 0,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Plans the run.

        Args:
            length: Of the data set.
            batch_size: Of one process.
            batches: Of one process in the whole run.
            seed: Of the order and of the samples.
            first: Batches that are done already.
            rank: Of this process.
            world: Number of processes.
        """
        self.length, self.batch_size, self.batches, self.seed, self.first = (
            length,
            batch_size,
            batches,
            seed,
            first,
        )
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        # of the whole run: Lightning counts the batches of a resumed run from where it stopped
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = torch.empty(0), -1
        for batch in range(self.first, self.batches):
            start = (batch * self.world + self.rank) * self.batch_size
            items = []
            for position in range(start, start + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(
                        self.length, generator=torch.Generator().manual_seed(self.seed + epoch)
                    )
                items.append((int(order[position % self.length]), self.seed * 2**32 + position))
            yield items


def build_optimizer(
    groups: Iterable[tuple[Iterable[nn.Parameter], float]],
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """Builds AdamW, or SGD with momentum 0.9; biases and norms (one-dimensional parameters) do not decay.

    Args:
        groups: Parameters, each with the factor of its learning rate.
        name: Of the optimizer.
        learning_rate: Of factor 1.
        weight_decay: Of matrices and kernels.
    """
    settings: list[dict[str, Any]] = []
    for parameters, factor in groups:
        trainable = [p for p in parameters if p.requires_grad]
        for chosen, decay in (
            ([p for p in trainable if p.ndim > 1], weight_decay),
            ([p for p in trainable if p.ndim <= 1], 0.0),
        ):
            if chosen:
                settings.append({"params": chosen, "lr": learning_rate * factor, "weight_decay": decay})
    if not settings:
        raise ValueError("no parameter is trainable")
    on_cpu = all(p.device.type == "cpu" for setting in settings for p in setting["params"])
    # fused is faster on a CPU; on a GPU Lightning does not clip gradients with it in half precision
    return AdamW(settings, fused=on_cpu) if name == "adamw" else SGD(settings, momentum=0.9)


def build_schedule(optimizer: Optimizer, name: ScheduleName, steps: int, warmup_steps: int) -> LambdaLR:
    """Linear warm-up, then a cosine to zero, two drops to a tenth (at 2/3 and 8/9 of the run), or nothing.

    Args:
        optimizer: Whose learning rates are scaled.
        name: Of the schedule.
        steps: Of the run.
        warmup_steps: Of them for the warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
        return 0.1 ** sum(step >= steps * part for part in (2 / 3, 8 / 9)) if name == "step" else 1.0

    return LambdaLR(optimizer, factor)


def build_loader(
    dataset: Dataset[Any], sampler: StepSampler, collate: Callable[..., Any], workers: int
) -> DataLoader[Any]:
    """Loads the batches of a run.

    Args:
        dataset: Asked for by (index, seed).
        sampler: Of the batches.
        collate: From items to a batch.
        workers: Processes; 0 loads in this one.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        # workers of a process that has started threads (autograd, OpenCV) must not be forks of it
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=2 if workers else None,
    )


def steps_done(checkpoint: Path | None) -> int:
    """Optimizer steps that a checkpoint has behind it.

    Args:
        checkpoint: Of a run, or None.

    Raises:
        ValueError: If the file is no checkpoint of a run.
    """
    if checkpoint is None:
        return 0
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # zip, pickle and missing keys: all mean the same here
        raise ValueError(f"{checkpoint}: no checkpoint of a run: {error}") from error


def load_state(module: LightningModule, checkpoint: Path) -> None:
    """Loads a checkpoint's weights into a module.

    Args:
        module: Of the run that wrote the checkpoint.
        checkpoint: A file.
    """
    module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])


class TrainingModule(LightningModule):
    """A LightningModule whose randomness depends on (seed, step, process) alone, and that names what went
    wrong.
    """

    seed: int = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes a resumed step draw what the unbroken run would have drawn."""
        position = batch_idx * self.trainer.world_size + self.global_rank  # of the batch among all processes'
        torch.manual_seed(self.seed * 2**32 + position)

    def total_loss(self, losses: dict[str, Tensor], names: Sequence[str]) -> Tensor:
        """Adds up the losses, logs each, and stops the run at the first that is not finite.

        Args:
            losses: Scalars by name.
            names: Of the images of this batch.

        Raises:
            FloatingPointError: Naming the step, the losses and the images.
        """
        total = torch.stack(tuple(losses.values())).sum()
        if not torch.isfinite(total):
            values = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            raise FloatingPointError(
                f"step {self.global_step}: the loss is not finite ({values}) on the images"
                f" {', '.join(names)}; lower the learning rate, clip gradients or look at these images"
            )
        for name, value in losses.items():
            self.log(f"loss/{name}", value.detach(), prog_bar=len(losses) <= 3, sync_dist=True)
        self.log("loss/total", total.detach(), prog_bar=True, sync_dist=True)
        return total


class Throughput(Callback):
    """Logs images a second and the share of the time that the trainer waits for data."""

    def __init__(self) -> None:
        self._ended = self._started = time.perf_counter()
        self._waited = self._worked = 0.0
        self._images = 0

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
        for message in list(self.messages)[:10]:
            print(f"skipped: {message}")
        if len(self.messages) > 10:
            print(f"skipped: {len(self.messages) - 10} more images")


class Progress(TQDMProgressBar):
    """A bar over the steps of the run, with the time that is left."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Names the bar."""
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description("batches")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leaves the number of a logger's version out."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, flushes it to disk, and only then renames it.

    Lightning's own renames as well, but does not flush: after a power cut the name may stand for half a file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Saves whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def build_trainer(
    output: Path,
    *,
    steps: int,
    accumulate: int,
    devices: int | str,
    nodes: int,
    strategy: str,
    accelerator: str,
    precision: Literal["32", "bf16-mixed", "16-mixed"],
    clip: float | None,
    checkpoint_every: int,
    log_every: int,
    callbacks: Sequence[Callback] = (),
    **kwargs: Any,
) -> Trainer:
    """Builds the trainer of every command: one long pass of `steps` optimizer steps, logs, last checkpoint.

    Args:
        output: Folder of the run; logs go to ``logs``, checkpoints to ``checkpoints``.
        steps: Optimizer steps.
        accumulate: Batches a step.
        devices: Number of devices a node, or "auto".
        nodes: Number of machines.
        strategy: Of Lightning ("auto", "ddp").
        accelerator: Of Lightning ("auto", "cpu", "gpu").
        precision: Of Lightning.
        clip: Bound of the gradient norm.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines of the logs.
        callbacks: More of them.
        kwargs: Further arguments of Lightning's Trainer.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # meant: the frozen trunk, and a validation without workers of its own
    warnings.filterwarnings("ignore", r".*module\(s\) in eval mode|.*does not have many workers|.*LeafSpec")
    last = ModelCheckpoint(
        output / "checkpoints",
        filename="last",
        every_n_train_steps=min(checkpoint_every, steps),
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    return Trainer(
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
        logger=[CSVLogger(output, "logs", "csv"), TensorBoardLogger(output, "logs", "tensorboard")],
        callbacks=[last, Throughput(), SkippedImages(), Progress(), *callbacks],
        plugins=[WholeCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **kwargs,
    )
