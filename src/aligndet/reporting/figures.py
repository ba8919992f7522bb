"""Which curves and bars there are for the runs at hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from aligndet.reporting.plots import Line, Plot, draw_bars, draw_lines
from aligndet.reporting.runs import Comparison, Run

_LOSS = "loss/total"
_AP = "AP (points)"


def comparison_plots(comparison: Comparison, prefix: str) -> list[Plot]:
    """AP against labels, AP against steps, AP by class, and losses of a comparison.

    Args:
        comparison: With at least one finished cell; without, there are no plots.
        prefix: Of the names of the files.
    """
    rows = comparison.rows
    if not rows:
        return []
    plots = [
        draw_lines(
            f"{prefix}_ap_labels",
            "AP against labelled images (mean and spread over seeds and folds)",
            _lines(rows, over="labels", of="steps"),
            x="labelled images",
            y=_AP,
            logarithmic=True,
        ),
        draw_lines(
            f"{prefix}_ap_steps",
            "AP against steps of fine-tuning (mean and spread over seeds and folds)",
            _lines(rows, over="steps", of="labels"),
            x="steps",
            y=_AP,
            logarithmic=True,
        ),
    ]
    groups = class_table(comparison)
    if groups:
        labels, steps = max((group["labels"], group["steps"]) for group in groups)
        bars = {g["class"]: g["AP"] for g in groups if (g["labels"], g["steps"]) == (labels, steps)}
        title = f"AP by class at {labels} labelled images and {steps} steps"
        plots.append(draw_bars(f"{prefix}_ap_class", title, bars, x=_AP))
    for labels, steps in sorted({(row["labels"], row["steps"]) for row in rows}):
        lines = [
            Line(entry["arm"], run.curves[_LOSS])
            for entry, run in comparison.cells
            if (entry["labels"], entry["steps"]) == (labels, steps) and _LOSS in run.curves
        ]
        title = f"Loss of fine-tuning at {labels} labelled images and {steps} steps"
        plots += _losses(f"{prefix}_loss_{labels}_{steps}", title, lines)
    return plots


def run_plots(runs: Sequence[Run]) -> list[Plot]:
    """AP on the way, AP by class and losses of runs that belong to no comparison.

    Args:
        runs: Each becomes a curve; those of pre-training, whose losses are others, have plots of their own.
    """
    plots = []
    validated = [Line(run.name, _percent(run.curves["val/AP"])) for run in runs if "val/AP" in run.curves]
    if validated:
        plots.append(
            draw_lines("runs_ap_steps", "AP of validation against steps", validated, x="steps", y=_AP)
        )
    by_class = run_class_table(runs)
    if by_class:
        plots.append(draw_bars("runs_ap_class", "AP by class", by_class, x=_AP))
    tuned = [Line(run.name, run.curves[_LOSS]) for run in runs if is_tuned(run) and _LOSS in run.curves]
    plots += _losses("runs_loss", "Loss of fine-tuning", tuned)
    for index, run in enumerate(run for run in runs if not is_tuned(run)):
        parts = [Line(name, curve) for name, curve in run.curves.items() if name.startswith("loss/")]
        plots += _losses(f"run{index + 1}_loss", f"Losses of pre-training, {run.name}", parts)
    return plots


def is_tuned(run: Run) -> bool:
    """Whether a run had labels."""
    return "annotations" in run.record.get("settings", {})


def class_table(comparison: Comparison) -> list[dict[str, Any]]:
    """Mean AP by class of each arm, in points.

    Args:
        comparison: Whose cells were evaluated.

    Returns:
        Rows with labels, steps, class, and AP by arm.
    """
    values: dict[tuple[int, int, str], dict[str, list[float]]] = {}
    for entry, _ in comparison.cells:
        for name, value in (entry["figures"].get("AP_by_class") or {}).items():
            if value is not None:
                arms = values.setdefault((entry["labels"], entry["steps"], name), {})
                arms.setdefault(entry["arm"], []).append(100 * value)
    return [
        {
            "labels": labels,
            "steps": steps,
            "class": name,
            "AP": {a: statistics.mean(v) for a, v in arms.items()},
        }
        for (labels, steps, name), arms in values.items()
    ]


def run_class_table(runs: Iterable[Run]) -> dict[str, dict[str, float]]:
    """AP by class and run, in points.

    Args:
        runs: Those that were not evaluated are left out.
    """
    table: dict[str, dict[str, float]] = {}
    for run in runs:
        for name, value in (run.figures.get("AP_by_class") or {}).items():
            if value is not None:
                table.setdefault(name, {})[run.name] = 100 * value
    return table


def _lines(rows: Sequence[dict[str, Any]], *, over: str, of: str) -> list[Line]:
    """One line for each arm and each value of the other axis."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row[of]), []).append(row)
    return [
        Line(
            f"{arm}, {value} {of}",
            {row[over]: row["mean"] for row in group},
            {row[over]: row["spread"] or 0.0 for row in group},
        )
        for (arm, value), group in groups.items()
    ]


def _losses(name: str, title: str, lines: Sequence[Line]) -> list[Plot]:
    return [draw_lines(name, title, lines, x="step", y="loss")] if lines else []


def _percent(curve: dict[int, float]) -> dict[int, float]:
    return {step: 100 * value for step, value in curve.items()}
