"""What a comparison has found, in words and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligndet.comparison import LEVEL

_CHOSEN = {
    "smallest": "{rate}, the smallest learning rate tried, was best at {where}; a smaller one may be better",
    "largest": "{rate}, the largest learning rate tried, was best at {where}; a larger one may be better",
    "lost": "training diverged at all learning rates tried at {where}; {rate}, the first of them, was taken",
    "tie": "several learning rates were equally good at {where}; {rate}, the first of them, was taken",
}


def sentence(row: Mapping[str, Any]) -> str:
    """What a row of `summarise` says, in words; empty for scratch itself."""
    said = [_verdict(row)] if "difference" in row else []
    if "unlike" in row:
        said.append(
            f"{row['arm']}: {row['unlike']} of its cells are not compared, as their learning rates come from"
            " another list than those of scratch; give both arms the same --learning-rates."
        )
    return " ".join(said)


def _verdict(row: Mapping[str, Any]) -> str:
    pairs, difference, p = row["pairs"], row["difference"], row["p"]
    where = f"{row['labels']} labelled images and {row['steps']} steps"
    spread = row["difference_spread"]
    amount = f"{difference:+.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
    amount += " AP of boxes" if "masks_mean" in row else " AP"
    few = f" of {row['units']} seeds" if row["units"] < pairs else ""
    evidence = f"(n = {pairs}{few}, p = {p:.2g})"
    if p > LEVEL:
        text = f"{row['arm']}: {amount} at {where} cannot be told apart from noise {evidence}"
        if 2 / 2 ** row["units"] > LEVEL:
            text += f"; so few {'seeds' if few else 'pairs'} never can, give more seeds"
        return text + "."
    if row["starts"] == 1:
        evidence += ", all from one pre-training"
    if difference < 0:
        return f"{row['arm']} does not help, it costs: {amount} at {where} {evidence}."
    worth = row["scratch_labels"]
    needs = (
        f"scratch needs about {worth:.0f} labelled images for the same AP, interpolated"
        if worth is not None
        else "what scratch needs for the same AP lies outside the fractions that were run"
    )
    return f"{row['arm']} helps by {amount} at {where} {evidence}; {needs}."


def rate_remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the choice of a learning rate says little.

    Returns:
        A sentence for each arm and rate at an end of its list, and for each that was as good as another.
    """
    places: dict[tuple[str, str, float], list[str]] = {}
    for row in rows:
        for choice in row.get("choices", ()):
            where = f"{row['labels']} labelled images and {row['steps']} steps"
            where += f" (AP {choice['AP']:.1f})" if "AP" in choice else ""
            places.setdefault((row["arm"], choice["kind"], choice["rate"]), []).append(where)
    return [
        f"{arm}: {_CHOSEN[kind].format(rate=f'{rate:g}', where=', '.join(where))}."
        for (arm, kind, rate), where in places.items()
    ]


def rates_of(row: Mapping[str, Any]) -> str:
    """The learning rates of a row's cells."""
    return ", ".join(f"{rate:g}" for rate in row.get("learning_rates", ()))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `summarise` and its sentences, as Markdown."""
    masks = any("masks_mean" in row for row in rows)
    heads = ["labels", "steps", "arm", "learning rate", "n", "AP of boxes" if masks else "AP", "spread"]
    heads += ["difference", "spread", "p", *(["AP of masks"] if masks else [])]
    sides = ["---" if head == "arm" else "---:" for head in heads]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(sides)}|"]
    for row in rows:
        shown = [_points(row.get(name)) for name in ("mean", "spread", "difference", "difference_spread")]
        p = f"{row['p']:.2g}" if "p" in row else ""
        cells = [str(row["labels"]), str(row["steps"]), row["arm"], rates_of(row), str(row["n"])]
        last = [_points(row.get("masks_mean"))] if masks else []
        lines.append(f"| {' | '.join([*cells, *shown, p, *last])} |")
    said = [*filter(None, map(sentence, rows)), *rate_remarks(rows), *_of_many(rows)]
    return "\n".join([*lines, "", *said]) + "\n"


def _of_many(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to think of several tests at once."""
    tests = sum("p" in row for row in rows)
    said = f"{tests} tests, each at {LEVEL:.0%}, not corrected for their number: {LEVEL * tests:.2g} of them"
    return [f"{said} would find a difference by chance alone."] if tests > 1 else []


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
