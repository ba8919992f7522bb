"""The folder of a training run: who owns it, what it was asked for, whether it may go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from aligndet.commands._settings import check_bounds, provenance
from aligndet.files import atomic_write, contents, locked, read_part
from aligndet.launch import check_launch

MAY_CHANGE = {
    "output",
    "resume",
    "overwrite",
    "strategy",
    "accelerator",
    "workers",
    "log_every",
    "checkpoint_every",
    "loggers",
}


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
        unsplit = ("channels_last", "compile", "ema")
        whole = [f"--{name.replace('_', '-')}" for name in unsplit if settings.get(name)]
        check_launch(settings["devices"], settings["nodes"], settings["strategy"], whole)
    output = Path(settings["output"])
    # the other processes of a distributed run join the first one's folder
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    output.mkdir(parents=True, exist_ok=True)
    with locked(output) if is_first else nullcontext():
        record, checkpoint = output / "run.json", output / "checkpoints" / "last.ckpt"
        used = contents(output)
        if record.is_file() and set(used) <= {record.name, "README.txt", "logs"}:
            used = []  # it failed before it had anything to keep
        plain = {k: v for k, v in _plain(settings).items() if k not in MAY_CHANGE}
        if is_first and used and settings["overwrite"]:
            if not record.is_file():
                raise ValueError(f"{output}: holds {used[0]!r} and no run of aligndet; it is not overwritten")
            # the record goes last: if this is killed, what is left still counts as a run
            for path in (*(output / name for name in used if name != record.name), record):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif used and settings["resume"] and record.is_file():
            before = read_part(record, "settings")
            gone = [k for k in before if k not in plain and k not in MAY_CHANGE and before[k] is not None]
            if gone:
                raise ValueError(f"{output}: was started with {gone[0]}, which this version does not have")
            changed = [k for k in plain if k in before and before[k] != plain[k]]
            if changed:
                k = changed[0]
                raise ValueError(
                    f"{output}: was started with {k}={before[k]!r}, now {plain[k]!r}; resume with the former,"
                    " or give --overwrite to start anew"
                )
        elif is_first and used:
            raise ValueError(
                f"{output}: is not empty; give --resume to go on with its run, --overwrite to start anew,"
                " or another output"
            )
        if is_first:
            for folder in ("", "checkpoints", "pretrained", "model", "trunk"):
                for path in (output / folder).glob(".*.partial*"):  # left by a write that was killed
                    if path.is_file():
                        path.unlink(missing_ok=True)
            # the record first: a folder without it is taken for somebody else's
            atomic_write(record, json.dumps({"settings": plain, **provenance()}, indent=2) + "\n")
            atomic_write(output / "README.txt", explanation)
        continues = settings["resume"] and checkpoint.is_file()
        if is_first and settings["resume"] and not continues and "checkpoint_every" in settings:
            print(f"{output}: no checkpoint yet, starts from the beginning")
        yield checkpoint if continues else None


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    images = plain.get("images")
    if isinstance(images, str) and "://" not in images:  # the same folder with and without a slash at its end
        plain["images"] = str(Path(images))
    return plain
