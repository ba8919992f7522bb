"""The page itself: tables, plots and pictures in one HTML file that needs no other."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from aligndet.comparison import sentence
from aligndet.reporting.figures import class_table, is_tuned, run_class_table
from aligndet.reporting.pictures import Pictures
from aligndet.reporting.plots import Plot
from aligndet.reporting.runs import Comparison, Run

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ImportError as error:
    raise ImportError(f'a report needs Jinja2: pip install "aligndet[report]" ({error})') from error

_ROW = ("labels", "steps", "arm", "n", "mean", "spread", "difference", "difference_spread", "p")
_HEADS = ("labels", "steps", "arm", "n", "AP", "spread", "difference", "spread of it", "p")


@dataclass(frozen=True)
class Table:
    """Rows of strings and numbers; None is an empty cell."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


def render(
    comparisons: Sequence[tuple[Comparison, list[Plot]]],
    runs: Sequence[Run],
    plots: Sequence[Plot],
    pretraining: Sequence[Plot],
    pictures: Pictures | str,
) -> str:
    """Fills the template; names are escaped.

    Args:
        comparisons: Each with its plots.
        runs: That belong to no comparison.
        plots: Of these runs.
        pretraining: What pre-training has changed.
        pictures: Of two detectors, or the sentence why there are none.

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
    environment.filters |= {"data_uri": _data_uri, "shown": _shown}
    everything = [(c.name, c.record) for c, _ in comparisons] + [(run.name, run.record) for run in runs]
    return environment.get_template("page.html").render(
        version=version("aligndet"),
        comparisons=[
            {
                "name": comparison.name,
                "table": Table(_HEADS, [[row.get(key) for key in _ROW] for row in comparison.rows]),
                "sentences": list(filter(None, map(sentence, comparison.rows))),
                "classes": _classes(comparison),
                "plots": of_comparison,
            }
            for comparison, of_comparison in comparisons
        ],
        run_table=_runs(runs),
        run_classes=_run_classes(runs),
        plots=plots,
        pretraining=pretraining,
        pictures=None if isinstance(pictures, str) else pictures,
        without_pictures=pictures,
        manifest=[_manifest(name, record) for name, record in everything],
    )


def _runs(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        loss = run.curves.get("loss/total", {})
        figures = [run.figures.get(name) for name in ("AP", "AP50", "AP75")]
        points = [None if value is None else 100 * value for value in figures]
        kind = "fine-tuning" if is_tuned(run) else "pre-training"
        last = next(reversed(loss.items()), (None, None))
        rows.append([run.name, kind, last[0], last[1], *points])
    return Table(("run", "kind", "last step", "loss there", "AP", "AP50", "AP75"), rows)


def _classes(comparison: Comparison) -> Table:
    arms = comparison.arms
    rows = [
        [row["class"], row["labels"], row["steps"], *(row["AP"].get(arm) for arm in arms)]
        for row in class_table(comparison)
    ]
    return Table(("class", "labels", "steps", *arms), rows)


def _run_classes(runs: Sequence[Run]) -> Table:
    names = [run.name for run in runs if run.figures.get("AP_by_class")]
    rows = [[c, *(values.get(name) for name in names)] for c, values in run_class_table(runs).items()]
    return Table(("class", *names), rows)


def _manifest(name: str, record: dict[str, Any]) -> dict[str, str]:
    return {
        "name": name,
        "command": str(record.get("command") or "not recorded"),
        "versions": ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items()),
        "settings": json.dumps(record.get("settings") or {}, indent=2, ensure_ascii=False),
    }


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _shown(value: str | float | None) -> str:
    """A cell's text: integers whole, other numbers to what can be told apart."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.2f}"
    return str(value)
