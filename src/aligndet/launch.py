"""How the processes of a run were started, and whether they belong together."""

from __future__ import annotations

import sys
from pathlib import Path

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


def check_launch(devices: int, nodes: int, strategy: str) -> None:
    """Refuses a run whose processes would wait for each other forever, or compute something else.

    Args:
        devices: Of a machine.
        nodes: Machines.
        strategy: Of Lightning.

    Raises:
        ValueError: If the strategy splits the parameters or copies this process, if an interactive session
            asks for several devices, if machines were asked for and nobody has started processes on them, or
            if there are more or fewer processes than devices.
    """
    if not strategy.startswith(("auto", "ddp")):
        raise ValueError(
            f"--strategy {strategy}: every device has the whole detector (the momentum detector follows the"
            " online one parameter by parameter), and detectors fit one; use --strategy ddp"
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


class SameStart(Callback):
    """Makes sure that all processes go on from the same step with the same data; where machines do not share
    their folders, they would not.
    """

    def __init__(self, output: Path, step: int, samples: int) -> None:
        """Remembers what has to be the same.

        Args:
            output: Folder of the run.
            step: To go on from.
            samples: Of the data set.
        """
        self.output, self.step, self.samples = output, step, samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares, before anything is loaded.

        Raises:
            ValueError: If processes differ.
        """
        own = torch.tensor([self.step, self.samples], device=trainer.strategy.root_device)
        steps, samples = trainer.strategy.all_gather(own).view(-1, 2).T.tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"{self.output}: processes go on from different steps {sorted(set(steps))}; all machines need"
                " the same folder of the run"
            )
        if len(set(samples)) > 1:
            raise ValueError(
                f"processes have different numbers of images {sorted(set(samples))}; all machines need the"
                " same data"
            )
