"""How the processes of a run were started, and whether they belong together."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer


def environment() -> ClusterEnvironment | None:
    """Finds out who has started this process.

    Returns:
        torchrun's environment or Slurm's; None if nobody has, and Lightning starts the others on this
        machine. Slurm's does not requeue: Lightning would write a checkpoint of its own for it, beside the
        one that ``--resume`` goes on from.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None


def check_launch(devices: int, nodes: int, strategy: str, whole: Sequence[str] = ()) -> None:
    """Refuses a run whose processes would wait for each other forever, or compute something else.

    Args:
        devices: Of a machine.
        nodes: Machines.
        strategy: Of Lightning, or "fsdp".
        whole: Options asked for that need whole parameters on every device.

    Raises:
        ValueError: If the strategy is unknown, splits parameters that are needed whole or copies this
            process, if torch is too old for it, if an interactive session asks for several devices, if
            machines were asked for and nobody has started processes on them, or if there are more or fewer
            processes than devices.
    """
    if strategy != "fsdp" and not strategy.startswith(("auto", "ddp")):
        raise ValueError(f"--strategy {strategy}: there are auto, ddp and fsdp")
    if strategy == "fsdp":
        from torch.distributed.fsdp import FSDPModule  # takes a while

        if whole:
            raise ValueError(
                f"--strategy fsdp splits parameters, which {whole[0]} needs whole; leave it out, or take ddp"
            )
        if not hasattr(FSDPModule, "set_reshard_after_forward"):
            raise ValueError(
                f"--strategy fsdp: torch {torch.__version__} is too old; take 2.8 or newer, or ddp"
            )
    if any(start in strategy for start in ("spawn", "fork", "notebook")):
        raise ValueError(
            f"--strategy {strategy}: copies of this process would all see the same images; use --strategy"
            " ddp, which starts the command anew for each"
        )
    started = environment()
    if started is None:
        if devices > 1 and hasattr(sys, "ps1"):
            raise ValueError(
                f"devices={devices}: each needs a process of its own, which starts from the command line; run"
                " aligndet in a shell, or take one device here"
            )
        if nodes > 1:
            raise ValueError(
                f"--nodes {nodes}: start the command on each machine with torchrun, or as Slurm tasks (srun)"
            )
    elif started.world_size() != devices * nodes:
        by = "Slurm" if isinstance(started, SLURMEnvironment) else "torchrun"
        raise ValueError(
            f"--nodes {nodes} --devices {devices}: are {devices * nodes} processes, and {by} has started"
            f" {started.world_size()}; devices are those of one machine, one process each"
        )


def leave_at_once(status: int) -> None:
    """Lets this process, whose run has failed, end without a farewell to the others on GPUs: NCCL would wait
    for them, and they for this one, until the limit of 30 minutes.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_backend() == "nccl":
        atexit.register(_leave, status)  # what was registered last comes first: before Lightning's farewell


def leave_as_usual() -> None:
    """Takes `leave_at_once` back: a later run has succeeded."""
    atexit.unregister(_leave)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class SameStart(Callback):
    """Makes sure that all processes go on from the same step with the same data, where machines do not share
    their folders, and a resumed run with the data that it began with.
    """

    def __init__(self, output: Path, step: int, data: str) -> None:
        """Remembers what has to be the same.

        Args:
            output: Folder of the run.
            step: To go on from.
            data: Of `data_summary`.
        """
        self.output, self.step, self.data = output, step, data

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Compares with what the run began with, before weights of other classes are loaded.

        Args:
            checkpoint: To go on from, of `read_checkpoint`; empty: none.

        Raises:
            ValueError: If the data has changed.
        """
        before = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("data", self.data)
        if before != self.data:
            raise ValueError(
                f"{self.output}: began with {before}; there are {self.data} now; resume with the former data"
                " and the version of aligndet that it began with"
            )

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps."""
        return {"data": self.data}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares processes, before anything is loaded.

        Raises:
            ValueError: If they differ.
        """
        own = torch.tensor([self.step, crc32(self.data.encode())], device=trainer.strategy.root_device)
        steps, data = trainer.strategy.all_gather(own).view(-1, 2).T.tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"{self.output}: processes go on from different steps {sorted(set(steps))}; all machines need"
                " the same folder of the run"
            )
        if len(set(data)) > 1:
            raise ValueError(f"all machines need the same data, which differs; this one has {self.data}")


def data_summary(counts: str, names: Iterable[str], arrays: Iterable[np.ndarray]) -> str:
    """What a run trains on, in words, and a fingerprint of it.

    Args:
        counts: How much it is of what.
        names: Of images and classes.
        arrays: Boxes and labels.
    """
    fingerprint = crc32("\n".join(names).encode())
    for array in arrays:
        fingerprint = crc32(np.ascontiguousarray(array).data, fingerprint)
    return f"{counts} (fingerprint {fingerprint:08x})"
