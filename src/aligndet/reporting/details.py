"""Plots of what `aligndet evaluate --details` has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aligndet.reporting.plots import Floats, Line, Plot, draw_bars, draw_matrix, draw_panels

_PANELS = 12  # the mean and the largest classes


def detail_plots(
    prefix: str,
    where: str,
    details: Mapping[str, Sequence[dict[str, Any]]],
    colours: Mapping[str, str],
) -> list[Plot]:
    """Precision against recall, F1 against the score, what errors cost, and who is taken for whom.

    Args:
        prefix: Of the names of the files.
        where: What was evaluated, for the notes; may be empty.
        details: In the form of `aligndet.evaluation.details.Details.to_dict`, by arm or run; those of one arm
            are averaged, its confusions summed up. None: no plots.
        colours: Of the arms or runs; those without one are left out.

    Returns:
        Plots of boxes at IoU 0.5.
    """
    count, details = len(details), {label: details[label] for label in details if label in colours}
    if not details:
        return []
    start = f"{where}; " if where else ""
    start += f"{len(details)} of {count} are drawn; " if len(details) < count else ""
    ap50 = ", ".join(f"{label} {100 * _ap50(found):.1f}" for label, found in details.items())
    best = ", ".join(f"{label} {f1:.2f} at {score:.2f}" for label, (f1, score) in _best(details).items())
    area, peak = f"The area under a curve is AP50: {ap50}.", f"The best mean F1: {best}."
    f1_title = "F1 against the score from which boxes count"
    plots = []
    for name, title, x, y, kind, told in (
        ("precision_recall", "Precision against recall", "recall", "precision", "precision_at_recall", area),
        ("f1", f1_title, "score", "F1", "F1", peak),
    ):
        note = f"{start}IoU 0.5, classes with most objects. {told}"
        panels = _panels(details, x, kind)
        plots.append(draw_panels(f"{prefix}_{name}", title, panels, colours, x=x, y=y, note=note, unit=True))
    errors: dict[str, dict[str, float]] = {}
    for label, found in details.items():
        for kind in found[0]["errors"]:
            costs = np.array([item["errors"][kind]["AP50_lost"] for item in found], np.float64)
            if np.isfinite(costs).any():
                errors.setdefault(kind, {})[label] = 100 * float(np.nanmean(costs))
    note = _upper(f"{start}the gain in AP50 if there were no such error (TIDE).")
    title, x = "What each kind of error costs", "AP50 lost (points)"
    if errors:
        plots.append(draw_bars(f"{prefix}_errors", title, errors, colours, x=x, note=note))
    for number, (label, found) in enumerate(details.items(), 1):
        confusion = found[0]["confusion"]
        counts = np.array([item["confusion"]["counts"] for item in found], np.int64).sum(0)
        over = f", summed over {len(found)} fine-tunings" if len(found) > 1 else ""
        note = f"{start}boxes from score {found[0]['score']:g}; counts{over}, coloured by share of the row."
        title = f"Confusion matrix, {label}"
        axes = {"x": "class of the box", "y": "class of the object"}
        name = f"{prefix}_confusion{number}"
        plots.append(draw_matrix(name, title, counts, confusion["names"], **axes, note=_upper(note)))
    return plots


def _panels(details: Mapping[str, Sequence[dict[str, Any]]], over: str, kind: str) -> dict[str, list[Line]]:
    """The mean over classes first, then the classes with most objects."""
    first = next(iter(details.values()))[0]
    objects = {name: row["objects"] for name, row in first["classes"].items() if row["objects"]}
    largest = sorted(objects, key=lambda name: -objects[name])[: _PANELS - 1]

    def lines(name: str | None) -> list[Line]:
        found = []
        for label, items in details.items():
            if name is not None and not all(name in item["curves"]["classes"] for item in items):
                continue  # a detector of other classes
            values = _mean([_curve(item, name, kind) for item in items])
            kept = np.isfinite(values)
            places = np.array(first["curves"][over])
            found.append(Line(label, dict(zip(places[kept].tolist(), values[kept].tolist(), strict=True))))
        return found

    panels = {"mean of all classes": lines(None)} if len(objects) != 1 else {}
    return panels | {f"{name} ({objects[name]:.0f})": lines(name) for name in largest}


def _curve(item: dict[str, Any], name: str | None, kind: str) -> Floats:
    curves = item["curves"]["mean"] if name is None else item["curves"]["classes"][name]
    return np.array(curves[kind], np.float64)  # None becomes nan


def _mean(curves: Sequence[Floats]) -> Floats:
    return np.ma.masked_invalid(curves).mean(0).filled(np.nan)


def _ap50(found: Sequence[dict[str, Any]]) -> float:
    return float(_mean([_curve(item, None, "precision_at_recall") for item in found]).mean())


def _best(details: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, tuple[float, float]]:
    """The highest mean F1 of each arm, and its score."""
    best = {}
    for label, items in details.items():
        curve = np.nan_to_num(_mean([_curve(item, None, "F1") for item in items]))
        place = int(curve.argmax())
        best[label] = (float(curve[place]), float(items[0]["curves"]["score"][place]))
    return best


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
