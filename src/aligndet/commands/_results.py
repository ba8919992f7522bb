"""The results of `aligndet compare`: a table, JSON and CSV of the cells that are finished."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aligndet.commands._cells import Bench
from aligndet.commands._settings import provenance
from aligndet.comparison import Cell, rows_of
from aligndet.files import atomic_write, locked, read_json
from aligndet.verdicts import markdown

_COLUMNS = ["arm", "labels", "fraction", "steps", "fold", "seed", "learning_rate", "AP", "AP50", "AP75"]


def write_results(bench: Bench, cells: Sequence[Cell]) -> None:
    """Writes table.md, results.json and results.csv, with the cells of earlier calls.

    Args:
        bench: The comparison of one detector.
        cells: All cells that this call has planned, also those of other parts.
    """
    path = bench.output / "results.json"
    # locked from reading to writing, so that no part overwrites what another has added meanwhile
    with locked(bench.output / ".locks" / "results", wait=True):
        finished = [
            {
                **asdict(cell),
                "labels": bench.labels.counts[cell.fraction],
                "learning_rate": bench.rate(cell),
                "searched": sorted(bench.rates),
                "search_AP": bench.search_ap(cell),
                "figures": {n: value for n, value in figures.items() if n not in ("details", "warnings")},
            }
            for cell in cells
            if (figures := bench.figures(cell)) is not None
        ]
        before = read_json(path) if path.is_file() else {}
        new = {Cell.of(entry) for entry in finished}
        former = [entry for entry in before.get("cells", []) if Cell.of(entry) not in new]
        entries = [entry for entry in former if _has_result(bench.output, entry)] + finished
        outdated = tuple(f"{name}: " for name in bench.sources)  # this call has made these remarks anew
        kept = [remark for remark in before.get("remarks", []) if not remark.startswith(outdated)]
        remarks = list(dict.fromkeys([*kept, *bench.remarks]))
        rows = rows_of(entries)
        lines = [markdown(rows), *(f"{remark}\n" for remark in remarks)]
        lines.append(f"{len(finished)} of {len(cells)} cells finished\n")
        planned = len({*map(Cell.of, entries), *cells})
        content = {"rows": rows, "cells": entries, "planned": planned, "remarks": remarks, **provenance()}
        text = io.StringIO()
        masks = ["mask_AP"] if any("mask_AP" in entry["figures"] for entry in entries) else []
        writer = csv.DictWriter(text, [*_COLUMNS, *masks], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for entry in entries:
            writer.writerow({**entry["figures"], **entry})
        atomic_write(bench.output / "table.md", "\n".join(lines))
        atomic_write(path, json.dumps(content, indent=2))
        atomic_write(bench.output / "results.csv", text.getvalue())


def _has_result(output: Path, entry: dict[str, Any]) -> bool:
    """Whether the folder of a cell from an earlier call still exists."""
    return (output / "cells" / Cell.of(entry).name(entry["learning_rate"]) / "result.json").is_file()


def write_tables(output: Path, detectors: Sequence[str]) -> None:
    """Puts the tables of several detectors into one file.

    Args:
        output: Folder of the comparisons.
        detectors: Their names; those without a table yet are left out.
    """
    with locked(output / ".locks" / "results", wait=True):
        tables = {name: output / name / "table.md" for name in detectors}
        texts = [f"## {name}\n\n{path.read_text()}" for name, path in tables.items() if path.is_file()]
        atomic_write(output / "table.md", "\n".join(texts))
