"""The folder of a training run: who owns it, what it was asked for, whether it may go on."""

from __future__ import annotations

import json
import math
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from aligndet.files import atomic_write, locked, read_json
from aligndet.launch import check_launch

_MAY_CHANGE = {
    "output",
    "resume",
    "overwrite",
    "strategy",
    "accelerator",
    "workers",
    "log_every",
    "loggers",
}

_AT_LEAST = {
    **dict.fromkeys(("batch_size", "accumulate", "devices", "nodes", "steps", "fpn_channels"), 1),
    **dict.fromkeys(("checkpoint_every", "log_every", "validate_every", "patience", "max_proposals"), 1),
    **dict.fromkeys(("shard_size", "resolution", "num_classes", "pretrain_steps", "finetune_steps"), 1),
    **dict.fromkeys(("clusters", "components", "sample"), 1),
    **dict.fromkeys(("workers", "seed", "warmup_steps", "weight_decay", "contrast_weight", "box_weight"), 0),
    "trunk_factor": 0,
    "max_aspect_ratio": 1,
}
_SHARES = ("nms_iou", "min_area", "max_area", "min_inside", "ema", "decay")
_POSITIVE = ("temperature", "learning_rate", "epochs", "clip")


def check_bounds(settings: dict[str, Any]) -> None:
    """Refuses numbers that no command can work with; what is None or no number is left alone.

    Args:
        settings: Arguments by name; the same name means the same in every command.

    Raises:
        ValueError: Naming the setting and the bound.
    """
    for name, value in settings.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        option = "--" + name.replace("_", "-")
        if value < _AT_LEAST.get(name, -math.inf):
            raise ValueError(f"{option} must be at least {_AT_LEAST[name]}, not {value}")
        if name in _SHARES and not 0 <= value <= 1:
            raise ValueError(f"{option} must be from 0 to 1, not {value}")
        if name in _POSITIVE and not value > 0:
            raise ValueError(f"{option} must be above 0, not {value}")


@contextmanager
def run_folder(settings: dict[str, Any], explanation: str) -> Iterator[Path | None]:
    """Owns the output folder for the length of a run.

    Args:
        settings: All arguments of the command, with "output", "resume" and "overwrite" among them.
        explanation: Text of the folder's README.txt.

    Yields:
        The checkpoint to go on from, or None.

    Raises:
        ValueError: If the folder is not empty and neither resume nor overwrite was asked for, if a resumed
            run has other settings than before, if another process uses the folder, if a setting is out of
            its bounds, or if its processes do not belong together.
    """
    check_bounds(settings)
    if "strategy" in settings:
        check_launch(settings["devices"], settings["nodes"], settings["strategy"])
    output = Path(settings["output"])
    # the other processes of a distributed run join the first one's folder
    first = getattr(rank_zero_only, "rank", 0) == 0
    output.mkdir(parents=True, exist_ok=True)
    with locked(output) if first else nullcontext():
        record, checkpoint = output / "run.json", output / "checkpoints" / "last.ckpt"
        used = [p.name for p in output.iterdir() if not p.name.startswith(".")]
        plain = {k: v for k, v in _plain(settings).items() if k not in _MAY_CHANGE}
        if first and used and settings["overwrite"]:
            if not record.is_file():
                raise ValueError(
                    f"{output}: holds {sorted(used)[0]!r} and no run of aligndet; it is not overwritten"
                )
            for path in output.iterdir():
                if not path.name.startswith("."):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif used and settings["resume"] and record.is_file():
            before = read_json(record).get("settings", {})
            changed = [k for k in plain if k in before and before[k] != plain[k]]
            if changed:
                k = changed[0]
                raise ValueError(
                    f"{output}: was started with {k}={before[k]!r}, now {plain[k]!r}; resume with the former"
                )
        elif first and used:
            raise ValueError(
                f"{output}: is not empty; give --resume to go on with its run, --overwrite to start anew,"
                " or another output"
            )
        if first:
            # the record first: a folder without it is taken for somebody else's
            atomic_write(record, json.dumps({"settings": plain, **provenance()}, indent=2) + "\n")
            atomic_write(output / "README.txt", explanation)
        yield checkpoint if settings["resume"] and checkpoint.is_file() else None


def provenance() -> dict[str, Any]:
    """What it takes to do the same again: command line and versions."""
    packages = ("aligndet", "torch", "torchvision", "lightning", "timm")
    program = Path(sys.argv[0]).name
    start = ["python", "-m", "aligndet"] if program == "__main__.py" else [program]
    return {
        "command": shlex.join([*start, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def steps_of(steps: int | None, otherwise: float) -> int:
    """The length of a run in optimizer steps.

    Args:
        steps: As asked, or None.
        otherwise: What epochs or a schedule come to.
    """
    total = max(1, round(otherwise)) if steps is None else steps
    if total < 1:
        raise ValueError(f"steps must be at least 1, not {total}")
    return total
