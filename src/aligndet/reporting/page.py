"""The page itself: tables, plots and pictures in one HTML file that needs no other."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

from aligndet.comparison import BASELINE
from aligndet.reporting.figures import class_table, is_tuned, run_class_table, run_colours
from aligndet.reporting.pictures import Pictures
from aligndet.reporting.plots import Plot, colours_of
from aligndet.reporting.runs import Comparison, Run
from aligndet.verdicts import rate_remarks, rates_of, sentence

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ImportError as error:
    raise ImportError(f'a report needs Jinja2: pip install "aligndet[report]" ({error})') from error


class Entry(NamedTuple):
    """A cell of a table."""

    text: str
    value: float | None = None  # of a number, to sort by
    colour: str | None = None  # that stands for the text in the plots


@dataclass(frozen=True)
class Table:
    """Rows of entries; None is an empty one."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Entry | None]]
    note: str = ""


@dataclass(frozen=True)
class Part:
    """Plots and pictures under one heading."""

    title: str
    plots: Sequence[Plot] = ()
    pictures: Sequence[Pictures] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A comparison, or the runs that belong to none."""

    title: str
    subtitle: str
    answers: Sequence[str]  # what the reader wants to know first
    more: Sequence[str]  # the other sentences
    remarks: Sequence[str]  # what to bear in mind
    table: Table
    classes: Table
    parts: Sequence[Part]
    manifest: Sequence[Mapping[str, str]]


def render(sections: Sequence[Section]) -> str:
    """Fills the template; names are escaped.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=PackageLoader("aligndet.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("page.html").render(sections=sections, version=version("aligndet"))


def comparison_section(comparison: Comparison, parts: Sequence[Part]) -> Section:
    """A comparison under the name of its detector: sentences, tables, then its parts.

    Args:
        comparison: Whose cells may be finished in part.
        parts: Plots and pictures.
    """
    settings = comparison.record.get("settings") or {}
    arms = [arm for arm in comparison.arms if arm != BASELINE]
    main = "aligndet" if "aligndet" in arms else next(iter(arms), BASELINE)
    longest = max((row["steps"] for row in comparison.rows), default=0)
    answers: list[str] = []
    more: list[str] = []
    for row in comparison.rows:
        (answers if (row["arm"], row["steps"]) == (main, longest) else more).append(sentence(row))
    count = len(comparison.cells)
    missing = f" of {comparison.planned}" if comparison.planned > count else ""
    facts = [settings.get("trunk"), f"folder {comparison.name}", f"{count}{missing} fine-tunings"]
    manifest = [_manifest(comparison.name, comparison.record)]
    if comparison.begun is not None:
        manifest.append(_manifest(f"{comparison.name}, its first call", {"command": comparison.begun}))
    return Section(
        str(settings.get("detector") or comparison.name),
        " · ".join(str(fact) for fact in facts if fact),
        [text for text in answers if text],
        [text for text in more if text],
        [*comparison.remarks, *rate_remarks(comparison.rows)],
        _arms(comparison),
        _classes(comparison),
        parts,
        manifest,
    )


def runs_section(runs: Sequence[Run], parts: Sequence[Part]) -> Section:
    """Runs that belong to no comparison.

    Args:
        runs: At least one.
        parts: Plots and pictures.
    """
    manifest = [_manifest(run.name, run.record) for run in runs]
    return Section("Runs", "", [], [], [], _runs(runs), _run_classes(runs), parts, manifest)


def _arms(comparison: Comparison) -> Table:
    masks = any("masks_mean" in row for row in comparison.rows)
    heads = ["labelled images", "steps", "arm", "learning rate", "n", "AP of boxes" if masks else "AP"]
    heads += [f"against {BASELINE}", "p", f"{BASELINE} needs", *(["AP of masks"] if masks else [])]
    colours = colours_of(comparison.arms)
    rows = [
        [
            _whole(row["labels"]),
            _whole(row["steps"]),
            Entry(row["arm"], None, colours.get(row["arm"])),
            _rates(row),
            _whole(row["n"]),
            _points(row["mean"], row["spread"]),
            _points(row.get("difference"), row.get("difference_spread"), "+.1f"),
            _probability(row.get("p")),
            _whole(row.get("scratch_labels")),
            *([_points(row.get("masks_mean"))] if masks else []),
        ]
        for row in comparison.rows
    ]
    note = (
        "AP in points (0 to 100), mean ± standard deviation over n seeds and folds. Differences and p (exact"
        " sign-flip test over seeds) are of pairs with the same seed and fold; tests are not corrected for"
        f" their number. What {BASELINE} needs for the same AP is in labelled images, interpolated; empty"
        " where no gain is proven or that lies outside what was run."
    )
    if masks:
        note += " All but the last column are of boxes."
    return Table(heads, rows, note)


def _runs(runs: Sequence[Run]) -> Table:
    colours, rows = run_colours(runs), []
    for run in runs:
        step, loss = next(reversed(run.curves.get("loss/total", {}).items()), (None, None))
        figures = [run.figures.get(name) for name in ("AP", "AP50", "AP75")]
        rows.append(
            [
                Entry(run.name, None, colours.get(run.name)),
                Entry("fine-tuning" if is_tuned(run) else "pre-training"),
                _whole(step),
                None if loss is None else Entry(f"{loss:.3f}", loss),
                *(_points(None if value is None else 100 * value) for value in figures),
            ]
        )
    heads = ("run", "kind", "last step", "loss there", "AP", "AP50", "AP75")
    note = (
        "AP in points (0 to 100), of the weights in model/: those of the best validation if the run had one,"
        " so that on the same images it is somewhat too high. Runs may be measured on different images."
    )
    return Table(heads, rows, note)


def _classes(comparison: Comparison) -> Table:
    arms = comparison.arms
    rows = [
        [
            Entry(row["class"]),
            _whole(row["labels"]),
            _whole(row["steps"]),
            *(_points(row["AP"].get(arm)) for arm in arms),
        ]
        for row in class_table(comparison)
    ]
    return Table(("class", "labelled images", "steps", *arms), rows)


def _run_classes(runs: Sequence[Run]) -> Table:
    names = [run.name for run in runs if run.figures.get("AP_by_class")]
    rows = [
        [Entry(name), *(_points(values.get(run)) for run in names)]
        for name, values in run_class_table(runs).items()
    ]
    return Table(("class", *names), rows)


def _manifest(name: str, record: dict[str, Any]) -> dict[str, str]:
    settings = record.get("settings")
    return {
        "name": name,
        "command": str(record.get("command") or "not recorded"),
        "versions": ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items()),
        "settings": json.dumps(settings, indent=2, ensure_ascii=False) if settings else "",
    }


def _points(value: float | None, spread: float | None = None, form: str = ".1f") -> Entry | None:
    if value is None:
        return None
    return Entry(f"{value:{form}}" + ("" if spread is None else f" ± {spread:.1f}"), value)


def _rates(row: Mapping[str, Any]) -> Entry | None:
    rates = row["learning_rates"]
    return Entry(rates_of(row), rates[0]) if rates else None


def _whole(value: float | None) -> Entry | None:
    return None if value is None else Entry(f"{value:.0f}", value)


def _probability(value: float | None) -> Entry | None:
    if value is None:
        return None
    return Entry("<0.001" if value < 0.001 else f"{value:.3f}", value)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
