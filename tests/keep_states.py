"""Runs a command as `python -m aligndet` does, and keeps what each process has at the end beside the run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import LightningModule

from aligndet import cli
from aligndet.commands import pretrain
from aligndet.trainer import fit


def fit_and_keep(module: LightningModule, *args: Any, **settings: Any) -> bool:
    written = fit(module, *args, **settings)
    output: Path = settings["output"]
    torch.save(module.state_dict(), output.with_name(f"{output.name}-of-{os.environ['RANK']}.pt"))
    return written


if __name__ == "__main__":
    with mock.patch.object(pretrain, "fit", fit_and_keep):
        sys.exit(cli.main(sys.argv[1:]))
