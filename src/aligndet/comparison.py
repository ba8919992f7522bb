"""The arithmetic of a fair comparison: which cells there are, which labels they get, what is tested."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from aligndet.data.splits import held_out_positions, in_order, nested_subsets, with_images

BASELINE = "scratch"
LEVEL = 0.05  # of significance


@dataclass(frozen=True, order=True)
class Cell:
    """One fine-tuning; cells that differ in the arm alone are a pair."""

    fraction: float  # of the labelled images
    steps: int
    seed: int
    fold: int
    arm: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Cell:
        """The cell of an entry of results.json."""
        return cls(*(entry[field.name] for field in fields(cls)))

    def name(self, rate: float) -> str:
        """The name of its run folder at a learning rate."""
        return f"{self.arm}_{self.fraction:g}_steps{self.steps}_fold{self.fold}_seed{self.seed}_lr{rate:g}"


def plan(
    arms: Sequence[str],
    fractions: Sequence[float],
    folds: Sequence[int],
    steps: Sequence[int],
    seeds: Sequence[int],
) -> list[Cell]:
    """All cells, those of a pair one after another; all labels are one fold.

    Args:
        arms: Their names.
        fractions: Shares of the labelled images, in (0, 1].
        folds: Numbers of the draws of labelled images.
        steps: Lengths of fine-tuning.
        seeds: Seeds of training.

    Raises:
        ValueError: If a list is empty or repeats a value, or a value is out of range.
    """
    lists = {"arms": arms, "fractions": fractions, "folds": folds, "steps": steps, "seeds": seeds}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be different values, at least one, not {list(values)}")
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must be above 0 and at most 1, not {list(fractions)}")
    if min(steps) < 1:
        raise ValueError(f"steps must be at least 1, not {min(steps)}")
    return [
        Cell(fraction, length, seed, fold, arm)
        for fraction, length, seed in itertools.product(fractions, steps, seeds)
        for fold in (folds if fraction < 1 else (0,))  # all labels are the same in every fold
        for arm in arms
    ]


def part_of(cells: Sequence[Cell], part: str) -> list[Cell]:
    """Every N-th cell from the I-th on.

    Args:
        cells: All cells.
        part: "I/N", counted from 1.

    Raises:
        ValueError: If it is no such part.
    """
    first, _, count = part.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f"part must be I/N with I from 1 to N, such as 2/8, not {part!r}")
    return list(cells[int(first) - 1 :: int(count)])


def labelled_subset(document: Mapping[str, Any], fraction: float, fold: int) -> dict[str, Any]:
    """Draws labelled images; the smaller fractions of a fold are parts of the larger ones.

    Args:
        document: COCO JSON.
        fraction: Share of its images, rounded, at least one.
        fold: Number of the draw, the same as in `aligndet split`.

    Returns:
        The same JSON with fewer images.
    """
    images = in_order(document)
    count = max(1, round(fraction * len(images)))
    (chosen,) = nested_subsets(len(images), [count], folds=fold + 1, seed=0)[fold]
    return with_images(document, [images[i] for i in chosen])


def hold_out(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits labelled images for a search of learning rates: a fifth, rounded, is held out, at least one.

    Returns:
        The part to train on, and the part to choose by.

    Raises:
        ValueError: If there are fewer than two images.
    """
    images = document["images"]
    if len(images) < 2:
        raise ValueError("a search of learning rates needs two labelled images at least; give one rate alone")
    train, held_out = (
        with_images(document, [images[i] for i in chosen])
        for chosen in held_out_positions(len(images), 0.2, seed=1)
    )
    return train, held_out


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided exact sign-flip permutation test of paired differences: is their mean zero?

    Args:
        differences: One per pair; for more than 16, 65,536 random flips stand for all.

    Returns:
        The share of sign patterns whose mean is at least as far from zero; never below 2 / 2**n.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) <= 16:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(65_536, len(values)))
        signs[0] = 1.0
    return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12))


def labels_for(curve: Mapping[int, float], figure: float) -> float | None:
    """How many labelled images reach a figure, interpolated linearly in their logarithm.

    Args:
        curve: Figure by number of labelled images.
        figure: The figure to reach.

    Returns:
        The smallest such number, or None if the curve begins above the figure or does not reach it.
    """
    points = sorted(curve.items())
    if points and points[0][1] == figure:
        return float(points[0][0])
    if not points or points[0][1] > figure:
        return None
    for (few, low), (many, high) in itertools.pairwise(points):
        if low <= figure <= high and low < high:
            share = (figure - low) / (high - low)
            return math.exp((1 - share) * math.log(few) + share * math.log(many))
    return None


def summarise(
    figures: Mapping[Cell, float],
    labels: Mapping[float, int],
    searched: Mapping[Cell, Sequence[float] | None] | None = None,
) -> list[dict[str, Any]]:
    """One row for each arm, number of labels and budget.

    Args:
        figures: AP in 0..1 of the finished cells.
        labels: Number of labelled images by fraction.
        searched: The learning rates that each cell's was chosen from; only cells with equal lists are pairs.

    Returns:
        Rows with points of AP (0..100): mean, spread (standard deviation over seeds and folds), and against
        scratch, over the pairs that are finished: pairs, difference, its spread, p, units (seeds, or folds of
        one seed: what p takes for independent), starts (pre-trainings), scratch_labels (of a proven gain);
        unlike: the number of cells, if any, that form no pair, as their rates are from different lists.
    """
    choice = searched or {}
    groups: dict[tuple[float, int, str], dict[tuple[int, int], float]] = {}
    for cell, value in figures.items():
        groups.setdefault((cell.fraction, cell.steps, cell.arm), {})[cell.seed, cell.fold] = 100 * value
    rows = []
    for (fraction, steps, arm), values in groups.items():
        row: dict[str, Any] = {
            "labels": labels[fraction],
            "fraction": fraction,
            "steps": steps,
            "arm": arm,
            "n": len(values),
            "mean": statistics.mean(values.values()),
            "spread": _spread(values.values()),
        }
        baseline = groups.get((fraction, steps, BASELINE), {})
        both = [key for key in values if key in baseline]
        lists = ([choice.get(Cell(fraction, steps, *key, name)) for name in (arm, BASELINE)] for key in both)
        alike = [key for key, (rates, other) in zip(both, lists, strict=True) if rates == other]
        differences = [values[key] - baseline[key] for key in alike]
        if len(alike) < len(both):
            row["unlike"] = len(both) - len(alike)
        if arm != BASELINE and differences:
            units = _independent(dict(zip(alike, differences, strict=True)))
            curve = {
                labels[f]: statistics.mean(v.values())
                for (f, s, a), v in groups.items()
                if s == steps and a == BASELINE
            }
            difference, p = statistics.mean(differences), sign_flip_p(units)
            proven = p <= LEVEL and difference > 0
            row |= {
                "pairs": len(differences),
                "difference": difference,
                "difference_spread": _spread(differences),
                "p": p,
                "units": len(units),
                "starts": 1 if arm.startswith("from-") else len({seed for seed, _ in alike}),
                "scratch_labels": labels_for(curve, curve[labels[fraction]] + difference) if proven else None,
            }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["labels"], row["steps"], row["arm"] != BASELINE, row["arm"]))


def rows_of(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `summarise` for the cells in results.json, with learning rates and AP of masks.

    Args:
        entries: Cells of results.json, each with its figures, number of labels, learning rate and, if that
            was chosen from several, these (searched) and the AP of each on the held-out labels (search_AP).

    Returns:
        Rows with learning_rates; choices: those of them about which the search says little; and masks_mean
        (points), if AP of masks was measured, too.
    """
    cells = [Cell.of(entry) for entry in entries]
    rows = summarise(
        {cell: entry["figures"].get("AP") or 0.0 for cell, entry in zip(cells, entries, strict=True)},
        {entry["fraction"]: entry["labels"] for entry in entries},
        {cell: entry.get("searched") for cell, entry in zip(cells, entries, strict=True)},
    )
    for row in rows:
        of_row = [e for e in entries if all(e[name] == row[name] for name in ("fraction", "steps", "arm"))]
        masks = [entry["figures"].get("mask_AP") for entry in of_row]
        if None not in masks:
            row["masks_mean"] = 100 * statistics.mean(masks)
        row["learning_rates"] = sorted({entry["learning_rate"] for entry in of_row})
        choices = [choice for entry in of_row if (choice := _choice(entry)) is not None]
        row["choices"] = [choice for i, choice in enumerate(choices) if choice not in choices[:i]]
    return rows


def _choice(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The learning rate of a cell, if it lies at an end of its list or was no better than another."""
    rates, tried = entry.get("searched") or [], entry.get("search_AP") or []
    scores = [score for score in tried if score is not None]
    rate, best = entry["learning_rate"], max(scores, default=0.0)
    if tried and not scores:
        return {"kind": "lost", "rate": rate}
    if scores.count(best) > 1:
        return {"kind": "tie", "rate": rate, "AP": 100 * best}
    if len(rates) > 1 and rate in (min(rates), max(rates)):
        return {"kind": "smallest" if rate == min(rates) else "largest", "rate": rate}
    return None


def _independent(differences: Mapping[tuple[int, int], float]) -> list[float]:
    """The differences, by (seed, fold), that count as independent: folds of a seed share its pre-training, so
    of several seeds each counts once, averaged over its folds.
    """
    by_seed: dict[int, list[float]] = {}
    for (seed, _), value in differences.items():
        by_seed.setdefault(seed, []).append(value)
    return [*map(statistics.mean, by_seed.values())] if len(by_seed) > 1 else [*differences.values()]


def _spread(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return statistics.stdev(numbers) if len(numbers) > 1 else None
