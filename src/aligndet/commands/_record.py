"""What a comparison was begun with: compare.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aligndet.commands._runs import MAY_CHANGE
from aligndet.commands._settings import provenance
from aligndet.files import atomic_write, contents, locked, read_json


def first_search(output: Path, default: tuple[int, int]) -> tuple[int, int]:
    """Seed and fold on which learning rates are searched: those that the comparison was begun with.

    Args:
        output: Folder of the comparison.
        default: Where it was not begun yet.
    """
    record = output / "compare.json"
    if not (record.is_file() and _is_begun(output)):
        return default
    seed, fold = read_json(record).get("first", default)
    return seed, fold


def _is_begun(output: Path) -> bool:
    names = ("checkpoints", "model", "pretrained", "result.json")
    return any(path for name in names for path in output.glob(f"*/*/{name}"))


def keep_settings(output: Path, settings: dict[str, Any], first: tuple[int, int]) -> tuple[int, int]:
    """Records the settings of a comparison, or refuses them if it was begun with others.

    Args:
        output: Folder of the comparison.
        settings: That decide its results.
        first: Seed and fold of the search.

    Returns:
        Seed and fold of the search, which are another part's if that has begun meanwhile.

    Raises:
        ValueError: Naming the setting that differs, or what is in the folder instead.
    """
    plain = json.loads(json.dumps(settings, default=lambda path: str(Path(path).resolve())))
    record = output / "compare.json"
    # list the folder before looking for the record, which another part that begins meanwhile writes first
    used = contents(output) if output.is_dir() else []
    if used and not record.is_file():
        several = sorted(path.parent.name for path in output.glob("*/compare.json"))
        if several:
            raise ValueError(
                f"{output}: holds the comparisons of {', '.join(several)}; to go on with one of them give its"
                f" folder, as in --output {output / several[0]}"
            )
        raise ValueError(f"{output}: holds {used[0]!r} and no comparison; give another --output")
    with locked(output / ".locks" / "settings", wait=True):
        former = read_json(record) if record.is_file() else {}
        content = former if _is_begun(output) else provenance()
        before = content.get("settings", {})
        for name, value in plain.items():
            if name in before and _lasting(before[name]) != _lasting(value):
                raise ValueError(
                    f"{output}: was started with {name}={before[name]!r}, now {value!r}; go on with"
                    " the former or give another --output"
                )
        if "first" not in content or plain.keys() - before.keys():
            content = {"first": first, **content, "settings": before | plain}
            atomic_write(record, json.dumps(content, indent=2) + "\n")
    seed, fold = content["first"]
    return seed, fold


def _lasting(value: Any) -> Any:
    """A setting in a form to compare: of a stage, without what a run may change when it goes on."""
    if isinstance(value, str) and Path(value).exists():  # a file of weights, however it is spelt
        return os.path.realpath(value)
    return {k: v for k, v in value.items() if k not in MAY_CHANGE} if isinstance(value, dict) else value or {}
