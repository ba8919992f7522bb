"""Settings of commands: their bounds, training recipes, and what it takes to reproduce a run."""

from __future__ import annotations

import math
import platform
import re
import shlex
import sys
from argparse import ArgumentError
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from jsonargparse import ArgumentParser

_AT_LEAST = {
    **dict.fromkeys(("batch_size", "accumulate", "devices", "nodes", "steps", "fpn_channels"), 1),
    **dict.fromkeys(("checkpoint_every", "log_every", "validate_every", "patience", "max_proposals"), 1),
    **dict.fromkeys(("shard_size", "resolution", "num_classes", "pretrain_steps", "finetune_steps"), 1),
    **dict.fromkeys(("clusters", "components", "sample", "min_size", "max_size"), 1),
    **dict.fromkeys(("workers", "seed", "warmup_steps", "weight_decay", "contrast_weight", "box_weight"), 0),
    "trunk_factor": 0,
    "frozen_stages": 0,
    "temperature": 0.025,  # below it, the contrastive loss would round what is least similar to nothing
    "max_aspect_ratio": 1,
}
_SHARES = ("nms_iou", "min_area", "max_area", "min_inside", "ema", "decay", "score")
_POSITIVE = ("learning_rate", "epochs", "clip")


def check_bounds(settings: dict[str, Any]) -> None:
    """Refuses numbers that no command can work with; settings that are not numbers pass.

    Args:
        settings: Arguments by name; the same name means the same in every command.

    Raises:
        ValueError: Naming the setting and the bound.
    """
    for name, value in settings.items():
        if name == "lr_drops" and not all(0 < share < 1 for share in value):
            raise ValueError(f"--lr-drops must be shares of the run, between 0 and 1, not {tuple(value)}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        option = "--" + name.replace("_", "-")
        if value < _AT_LEAST.get(name, -math.inf):
            raise ValueError(f"{option} must be at least {_AT_LEAST[name]}, not {value}")
        if name in _SHARES and not 0 <= value <= 1:
            raise ValueError(f"{option} must be from 0 to 1, not {value}")
        if name in _POSITIVE and not value > 0:
            raise ValueError(f"{option} must be above 0, not {value}")


def typed(function: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Reads settings as the command line would, which dictionaries have passed unread.

    Args:
        function: The command.
        settings: By name: values, or text as on a command line, such as "640,800" for a tuple.

    Returns:
        The same settings, of the types of the function's parameters.

    Raises:
        ValueError: Naming the first that is of another type or out of bounds.
    """
    hints = get_type_hints(function)
    parser, given = ArgumentParser(exit_on_error=False), {}
    for name, value in settings.items():
        parser.add_argument(f"--{name}", type=hints[name])
        if get_origin(hints[name]) is tuple and not isinstance(value, list | tuple):
            value = value if str(value).startswith("[") else f"[{value}]"
        given[name] = value
    try:
        read = vars(parser.parse_object(given))
    except ArgumentError as error:
        raise ValueError(in_one_line(str(error))) from error
    check_bounds(read)
    return read


def in_one_line(message: str) -> str:
    """A parser's complaint, in words of the command line."""
    message = re.sub(r"Parser key \"(\w+)\":", lambda m: f"--{m[1].replace('_', '-')}:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))
    return " ".join(message.split())


def with_recipe(settings: dict[str, Any], recipe: dict[str, float]) -> dict[str, Any]:
    """Fills in the numbers of a recipe where no others were asked for.

    Args:
        settings: Of a training command; where nothing was asked for: None, and "default" for clip.
        recipe: Of `training_defaults`.
    """
    unset = {"clip": "default"}  # its None is no clipping
    return settings | {name: value for name, value in recipe.items() if settings[name] == unset.get(name)}


def provenance() -> dict[str, Any]:
    """What it takes to reproduce a run: command line and versions."""
    packages = ("aligndet", "torch", "torchvision", "lightning", "timm")
    program = Path(sys.argv[0]).name
    start = ["python", "-m", "aligndet"] if program == "__main__.py" else [program]
    return {
        "command": shlex.join([*start, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }
