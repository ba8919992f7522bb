"""Which curves and bars there are for the runs at hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aligndet.reporting.details import detail_plots
from aligndet.reporting.plots import DRAWN, Line, Plot, colours_of, draw_bars, draw_panels
from aligndet.reporting.runs import Comparison, Curve, Run

_LOSS = "loss/total"
_AP = "AP (points)"
_SPREAD = "Mean and standard deviation over seeds and folds."


def comparison_plots(comparison: Comparison, prefix: str) -> list[Plot]:
    """AP against labels, AP against steps, AP by class, precision and recall, and losses of a comparison.

    Args:
        comparison: With at least one finished cell; without, there are no plots.
        prefix: Of the names of the files.
    """
    rows, colours = comparison.rows, colours_of(comparison.arms)
    if not rows:
        return []
    plots = []
    for name, over, by, title, axis, panel in (
        ("ap_labels", "labels", "steps", "labelled images", "labelled images", "{} steps"),
        ("ap_steps", "steps", "labels", "steps of fine-tuning", "steps", "{} labelled images"),
    ):
        if len({row[over] for row in rows}) > 1:
            panels = _panels(rows, over, by, panel)
            given: dict[str, Any] = {"x": axis, "y": _AP, "note": _SPREAD, "logarithmic": True}
            plots.append(draw_panels(f"{prefix}_{name}", f"AP against {title}", panels, colours, **given))
    arms: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        arms.setdefault((row["labels"], row["steps"]), []).append(f"{row['arm']} {row['n']}")
    # the largest of those that have all arms, if there is one
    labels, steps = max(arms, key=lambda place: (len(arms[place]) == len(comparison.arms), place))
    where = f"{labels} labelled images, {steps} steps; fine-tunings: {', '.join(arms[labels, steps])}"
    bars = {
        row["class"]: row["AP"]
        for row in class_table(comparison)
        if (row["labels"], row["steps"]) == (labels, steps)
    }
    if bars:
        note = f"{where}; mean over seeds and folds."
        plots.append(draw_bars(f"{prefix}_ap_class", "AP by class", bars, colours, x=_AP, note=note))
    details: dict[str, list[dict[str, Any]]] = {}
    losses: dict[str, dict[str, list[Curve]]] = {}
    for entry, run in comparison.cells:
        place = (entry["labels"], entry["steps"])
        if place == (labels, steps) and run.details:
            details.setdefault(entry["arm"], []).append(run.details)
        if _LOSS in run.curves:
            panel = f"{place[0]} images, {place[1]} steps"
            losses.setdefault(panel, {}).setdefault(entry["arm"], []).append(run.curves[_LOSS])
    plots += detail_plots(prefix, where, details, colours)
    shown = {panel: [_mean_line(*item) for item in arms.items()] for panel, arms in losses.items()}
    return plots + _losses(f"{prefix}_loss", "Loss of fine-tuning", shown, colours, _SPREAD)


def run_plots(runs: Sequence[Run]) -> list[Plot]:
    """AP on the way, AP by class, precision and recall, and losses of runs that belong to no comparison.

    Args:
        runs: Each becomes a curve, of many the nine best; those of pre-training, whose losses are others,
            have plots of their own.
    """
    colours, plots = run_colours(runs), list[Plot]()
    tuned = [run for run in runs if run.name in colours]
    count = sum(map(is_tuned, runs))
    note = f"The {len(tuned)} of {count} fine-tunings with the highest AP." if len(tuned) < count else ""
    validated = [Line(run.name, _percent(run.curves["val/AP"])) for run in tuned if "val/AP" in run.curves]
    if validated:
        title = "AP of validation against steps"
        panels = {"": validated}
        plots.append(draw_panels("runs_ap_steps", title, panels, colours, x="steps", y=_AP, note=note))
    by_class = run_class_table(tuned)
    if by_class:
        plots.append(draw_bars("runs_ap_class", "AP by class", by_class, colours, x=_AP, note=note))
    details = {run.name: [run.details] for run in tuned if run.details}
    plots += detail_plots("runs", note.rstrip("."), details, colours)
    lines = [Line(run.name, run.curves[_LOSS]) for run in tuned if _LOSS in run.curves]
    plots += _losses("runs_loss", "Loss of fine-tuning", {"": lines} if lines else {}, colours, note)
    for index, run in enumerate((run for run in runs if not is_tuned(run)), 1):
        plots += pretraining_losses(f"run{index}", run)
    return plots


def pretraining_losses(prefix: str, run: Run) -> list[Plot]:
    """The losses of a run of pre-training.

    Args:
        prefix: Of the name of the file.
        run: Of `aligndet pretrain` or `pretrain-backbone`.
    """
    curves = {
        name.removeprefix("loss/"): curve for name, curve in run.curves.items() if name.startswith("loss/")
    }
    # the total first; of many, the largest at the end are drawn
    names = sorted(curves, key=lambda name: (name != "total", -curves[name][max(curves[name])]))
    parts = [Line(name, curves[name]) for name in names]
    panels = {"": parts} if parts else {}
    colours = colours_of(names)
    return _losses(f"{prefix}_loss", f"Losses of pre-training, {run.name}", panels, colours)


def run_colours(runs: Iterable[Run]) -> dict[str, str]:
    """Colours of the fine-tunings that are drawn: of many, those of the highest AP.

    Args:
        runs: Measured by `aligndet evaluate`, or else by their last validation.
    """
    tuned = [run for run in runs if is_tuned(run)]
    best = {run.name for run in sorted(tuned, key=_measured, reverse=True)[:DRAWN]}
    return colours_of(run.name for run in tuned if run.name in best)


def _measured(run: Run) -> float:
    measured: float | None = run.figures.get("AP")
    last = next(reversed(run.curves.get("val/AP", {}).values()), 0.0)
    return last if measured is None else measured


def is_tuned(run: Run) -> bool:
    """Whether a run had labels."""
    return "annotations" in run.record.get("settings", {})


def class_table(comparison: Comparison) -> list[dict[str, Any]]:
    """Mean AP by class of each arm, in points.

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


def _panels(rows: Sequence[dict[str, Any]], over: str, by: str, title: str) -> dict[str, list[Line]]:
    """A panel for each value of one axis, in it a line for each arm along the other."""
    panels: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        panels.setdefault(row[by], {}).setdefault(row["arm"], []).append(row)
    return {
        title.format(value): [
            Line(
                arm,
                {row[over]: row["mean"] for row in group},
                {row[over]: math.nan if row["spread"] is None else row["spread"] for row in group},
            )
            for arm, group in panels[value].items()
        ]
        for value in sorted(panels)
    }


def _mean_line(label: str, curves: Sequence[Curve]) -> Line:
    steps = sorted({step for curve in curves for step in curve})
    values = {step: [curve[step] for curve in curves if step in curve] for step in steps}

    def each(function: Callable[[list[float]], float]) -> Curve:
        return {step: function(found) for step, found in values.items()}

    return Line(
        label, each(statistics.fmean), each(lambda v: statistics.stdev(v) if len(v) > 1 else math.nan)
    )


def _losses(
    name: str,
    title: str,
    panels: Mapping[str, Sequence[Line]],
    colours: Mapping[str, str],
    note: str = "",
) -> list[Plot]:
    return [draw_panels(name, title, panels, colours, x="step", y="loss", note=note)] if panels else []


def _percent(curve: dict[int, float]) -> dict[int, float]:
    return {step: 100 * value for step, value in curve.items()}
