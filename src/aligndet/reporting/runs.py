"""What the folders of runs and comparisons hold, read for a report."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from aligndet.comparison import Cell
from aligndet.files import fingerprint, read_json

Curve = dict[int, float]  # value by step


@dataclass(frozen=True)
class Run:
    """A folder of `aligndet finetune`, `pretrain` or `pretrain-backbone`."""

    name: str
    folder: Path
    record: dict[str, Any]  # settings, command, versions
    curves: dict[str, Curve]  # by the name in the logs
    figures: dict[str, Any] = field(default_factory=dict)  # of `aligndet evaluate`; empty if it was not run

    @property
    def model(self) -> Path | None:
        """The folder of its detector, if fine-tuning has come to its end."""
        folder = self.folder / "model"
        return folder if (folder / "manifest.json").is_file() else None

    @property
    def details(self) -> dict[str, Any] | None:
        """What `aligndet evaluate --details` has found, if it was asked for."""
        return self.figures.get("details")


@dataclass(frozen=True)
class Comparison:
    """A folder of `aligndet compare`."""

    name: str
    record: dict[str, Any]  # settings; command and versions of the call that has made the table
    rows: list[dict[str, Any]]  # of `aligndet.comparison.rows_of`
    cells: list[tuple[dict[str, Any], Run]]  # an entry of results.json and its run
    folder: Path
    planned: int  # cells
    remarks: tuple[str, ...] = ()
    begun: str | None = None  # command of the first call, if it was another

    @property
    def arms(self) -> list[str]:
        """All arms, in the order of the table."""
        return list(dict.fromkeys(row["arm"] for row in self.rows))


Named = TypeVar("Named", Comparison, Run)


def read_folders(folders: list[Path]) -> tuple[list[Comparison], list[Run]]:
    """Reads whatever each folder holds.

    Args:
        folders: Of `aligndet compare` (of one detector or several), `quickstart` (stands for its three runs),
            `finetune`, `pretrain` or `pretrain-backbone`. What `evaluate --output RUN.json` has written
            beside one of them is passed over.

    Raises:
        ValueError: Naming the folder that holds none of these, or the file that cannot be read.
    """
    comparisons, runs = [], []
    # what `evaluate` has written, as in runs/*
    beside = {Path(f"{run}{end}") for run in folders for end in (".json", "_files")}
    for folder in folders:
        if (folder / "results.json").is_file():
            comparisons.append(_read_comparison(folder))
        elif several := sorted(folder.glob("*/results.json")):
            comparisons += [_read_comparison(path.parent) for path in several]
        elif (folder / "without" / "run.json").is_file() and (folder / "with" / "run.json").is_file():
            parts = [folder / name for name in ("pretrained", "without", "with")]
            runs += [read_run(part) for part in parts if (part / "run.json").is_file()]
        elif (folder / "run.json").is_file():
            runs.append(read_run(folder))
        elif folder not in beside:
            wanted = "has neither results.json (aligndet compare) nor run.json (a run)"
            wanted = wanted if folder.is_dir() else "is no folder" if folder.exists() else "is not there"
            raise ValueError(f"{folder}: {wanted}")
    return _named_apart(comparisons), _named_apart(runs)


def _named_apart(found: list[Named]) -> list[Named]:
    """Gives those that share a name their whole folder for one; the report tells them apart by it."""
    uses = Counter(one.name for one in found)
    return [replace(one, name=one.folder.as_posix()) if uses[one.name] > 1 else one for one in found]


def read_run(folder: Path) -> Run:
    """Reads a run.

    Args:
        folder: With run.json; the figures are in result.json, or beside the folder under its name.

    Raises:
        ValueError: Naming the file that cannot be read.
    """
    figures: dict[str, Any] = {}
    for path in (folder / "result.json", folder.parent / f"{folder.name}.json"):
        if not figures and path.is_file():
            document = read_json(path)
            figures = document if "AP" in document else {}
            weights = folder / "model" / "model.safetensors"
            # what `compare` has put into its cells is of them
            known = figures.get("weights") if path.parent != folder else None
            if known and weights.is_file() and known != fingerprint(weights):
                print(f"{path}: is of other weights than those of {folder} are now; left out")
                figures = {}
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
    return Run(name, folder, record, read_curves(folder / "logs"), figures)


def read_curves(logs: Path) -> dict[str, Curve]:
    """Joins the tables of a run and of its resumptions.

    Args:
        logs: Folder with csv/metrics.csv, and csv_from_N/metrics.csv of a run resumed at step N, which
            replaces what was logged under the same name from step N on before.

    Returns:
        Curves by name, in the order of steps.

    Raises:
        ValueError: Naming the file that is no such table.
    """
    curves: dict[str, Curve] = {}
    for start, path in sorted((_start(path), path) for path in logs.glob("csv*/metrics.csv")):
        for name, values in _read_table(path).items():
            kept = {step: value for step, value in curves.get(name, {}).items() if step < start}
            curves[name] = dict(sorted({**kept, **values}.items()))
    return curves


def _start(path: Path) -> int:
    number = path.parent.name.rpartition("_from_")[2]
    return int(number) if number.isdecimal() else 0


def _read_table(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    try:
        text = path.read_bytes().decode()
        whole = text[: text.rfind("\n") + 1]  # a run may have been killed, or be about to write, in a line
        for row in csv.DictReader(io.StringIO(whole, newline="")):
            step = int(row.pop("step"))
            for name, figure in row.items():
                if figure and math.isfinite(value := float(figure)):
                    curves.setdefault(name, {})[step] = value
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no table of metrics by step ({error})") from error
    return curves


def _read_comparison(folder: Path) -> Comparison:
    path = folder / "results.json"
    results = read_json(path)
    settings = folder / "compare.json"
    first = read_json(settings) if settings.is_file() else {}
    try:
        cells = []
        for entry in results["cells"]:
            name = Cell.of(entry).name(entry["learning_rate"])
            cells.append((entry, read_run(folder / "cells" / name)))
        record = {name: {**first, **results}.get(name) for name in ("command", "versions", "settings")}
        remarks = (*results["remarks"], *_mixed_versions([run for _, run in cells]))
        begun = first.get("command") if first.get("command") != record["command"] else None
        return Comparison(
            folder.resolve().name,
            record,
            results["rows"],
            cells,
            folder,
            results["planned"],
            remarks,
            begun,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no result of aligndet compare ({error!r})") from error


def _mixed_versions(runs: list[Run]) -> list[str]:
    """Says so if runs that are compared were made with different versions of a package."""
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in (run.record.get("versions") or {}).items():
            versions.setdefault(package, {})[version] = None
    mixed = [f"{package} {' and '.join(found)}" for package, found in versions.items() if len(found) > 1]
    return [f"Cells were made with different versions: {', '.join(mixed)}."] if mixed else []
