"""What a comparison has found, in words and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligndet.comparison import LEVEL


def sentence(row: Mapping[str, Any]) -> str:
    """What a row of `summarise` says, in words; empty for scratch itself.

    Args:
        row: One arm at one number of labels and steps.
    """
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
    few = f" of {row['units']} seeds" if row["units"] < pairs else ""
    evidence = f"(n = {pairs}{few}, p = {p:.2g})"
    if p > LEVEL:
        text = f"{row['arm']}: {amount} AP at {where} cannot be told apart from noise {evidence}"
        if 2 / 2 ** row["units"] > LEVEL:
            text += f"; so few {'seeds' if few else 'pairs'} never can, give more seeds"
        return text + "."
    if row["starts"] == 1:
        evidence += ", all from one pre-training"
    if difference < 0:
        return f"{row['arm']} does not help, it costs: {amount} AP at {where} {evidence}."
    worth = row["scratch_labels"]
    needs = (
        f"scratch needs about {worth:.0f} labelled images for the same AP, interpolated"
        if worth is not None
        else "what scratch needs for the same AP lies outside the fractions that were run"
    )
    return f"{row['arm']} helps by {amount} AP at {where} {evidence}; {needs}."


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `summarise` and its sentences, as Markdown.

    Args:
        rows: Of `summarise`.
    """
    lines = [
        "| labels | steps | arm | n | AP | spread | difference | spread | p |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shown = [_points(row.get(name)) for name in ("mean", "spread", "difference", "difference_spread")]
        p = f"{row['p']:.2g}" if "p" in row else ""
        cells = [str(row[name]) for name in ("labels", "steps", "arm", "n")]
        lines.append(f"| {' | '.join([*cells, *shown, p])} |")
    return "\n".join([*lines, "", *filter(None, map(sentence, rows)), *_of_many(rows)]) + "\n"


def _of_many(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to think of several tests at once."""
    tests = sum("p" in row for row in rows)
    said = f"{tests} tests, each at {LEVEL:.0%}, not corrected for their number: {LEVEL * tests:.2g} of them"
    return [f"{said} would find a difference by chance alone."] if tests > 1 else []


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
