"""Detectors before and after pre-training, loaded from its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch

from aligndet.checkpoints import read_checkpoint
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.detectors.weights import MODULES, initialise, load_weights
from aligndet.files import read_part

Pair: TypeAlias = tuple[Any, Any]
"""A detector before pre-training, with random neck and heads, and after it."""


def load_pretrainable(run: Path) -> Pair:
    """Builds the pre-trainable detector of a run, with its projection head.

    Args:
        run: Folder of `aligndet pretrain`, with its last checkpoint.

    Raises:
        ValueError: Naming the file that is missing or belongs to another detector.
    """
    settings, checkpoint = read_settings(run), run / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: is gone; the projection head is nowhere else")
    names = ("detector", "trunk", "fpn_channels", "fpn_norm", "options")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])  # as the run has started
        before: Any = build_pretrainable(**{name: settings[name] for name in names})
    after: Any = build_pretrainable(**{name: settings[name] for name in names})
    try:
        state = read_checkpoint(checkpoint)["state_dict"]
        after.load_state_dict({k[len("online.") :]: v for k, v in state.items() if k.startswith("online.")})
    except Exception as error:  # zip, pickle, missing keys: all mean the same here
        raise ValueError(f"{checkpoint}: is no checkpoint of {run}: {error}") from error
    before.detector.backbone.body.load_state_dict(after.detector.backbone.body.state_dict())
    return before, after


def load_untuned(run: Path) -> Pair:
    """Builds the plain detector that fine-tuning starts from; both sides have the run's trunk.

    Raises:
        ValueError: Naming the file that is missing or broken.
    """
    settings, (state, manifest) = read_settings(run), load_weights(run)
    sizes = {"min_size": settings["min_size"][1], "max_size": settings["max_size"]}
    sides = []
    for modules in (("trunk",), tuple(MODULES)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            detector = build_detector(**manifest["architecture"], num_classes=1, **sizes)
        initialise(detector, state, modules)
        sides.append(detector.eval())
    before, after = sides
    return before, after


def read_settings(run: Path) -> dict[str, Any]:
    """Reads what a run of `aligndet pretrain` was asked for.

    Raises:
        ValueError: If the folder is of no such run.
    """
    path = run / "run.json"
    settings = read_part(path, "settings") if path.is_file() else {}
    if "proposals" not in settings:
        raise ValueError(f"{run}: is no run of aligndet pretrain")
    return settings
