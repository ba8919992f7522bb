"""Curves, bars and matrices of a report, drawn to be read on light and on dark ground."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError as error:
    raise ImportError(f'a report needs matplotlib: pip install "aligndet[report]" ({error})') from error

Floats = npt.NDArray[np.float64]
Curve = Mapping[int, float] | Mapping[float, float]  # y by x

_INK = "#808285"  # of the PNGs, legible on white and on black; on the page, the style below
_ADAPTIVE = (
    b"<style>svg { color: #50555b } @media (prefers-color-scheme: dark) { svg { color: #b3b9c0 } }</style>"
)
_COLOURS = ["#8b919a", "#e0702f", "#2f7fd0", "#35a05a", "#8d6fc0", "#c8504d", "#33a9b5", "#a0724f", "#cf6fae"]
DRAWN = len(_COLOURS)  # of more curves, an eye can tell none
_CLASSES = ["#2f7fd0", "#e0702f", "#35a05a", "#c74fa5", "#c9a400", "#7a5fd0"]
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.hashsalt": "aligndet",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "grid.color": _INK,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "font.size": 9,
}
_POINTS = 400  # of a curve; a screen shows no more
_FEW = 20  # points that are marked one by one
_HALF, _WHOLE = 6.0, 12.2  # inches: of a figure beside another, and of one over the width of the page
_BARS = 600  # of a figure; a picture of more is too large for a file
_NUMBERS = 20  # rows of a matrix, up to which its counts are written out


@dataclass(frozen=True)
class Line:
    """A curve; lines of one label share colour and entry of the legend."""

    label: str
    values: Curve
    spread: Curve | None = None  # drawn as bars, or as a band


@dataclass(frozen=True)
class Plot:
    """A figure in two formats."""

    name: str  # of its file, without suffix
    title: str
    note: str  # what one sees
    svg: bytes
    png: bytes
    wide: bool


def colours_of(labels: Iterable[str]) -> dict[str, str]:
    """Gives each label the colour that it has in all plots; the first, which the others are against, is grey.

    Args:
        labels: Arms or runs; those beyond the ninth have no colour, and are not drawn.
    """
    return dict(zip(dict.fromkeys(labels), _COLOURS, strict=False))


def draw_panels(
    name: str,
    title: str,
    panels: Mapping[str, Sequence[Line]],
    colours: Mapping[str, str],
    *,
    x: str,
    y: str,
    note: str = "",
    logarithmic: bool = False,
    unit: bool = False,
) -> Plot:
    """Draws curves, in panels that share the y axis; the note says how many lack a colour and are left out.

    Args:
        name: Of the file.
        title: Of the plot.
        panels: What to draw, by the panel's title.
        colours: Of the labels.
        x: Label of the axis.
        y: Label of the axis.
        note: What one sees.
        logarithmic: The x axis.
        unit: The x axis goes from 0 to 1, y starts at 0.
    """
    labels = {line.label for lines in panels.values() for line in lines}
    note, panels = _with_left_out(note, labels, colours), _drawn(panels, colours)
    columns = len(panels) if len(panels) <= 4 else 4
    wide, rows = columns > 2, -(-len(panels) // columns)
    with rc_context(_STYLE):
        size = (_WHOLE if wide else _HALF, (2.5 if wide else 3.1) * rows + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
        for axes, (panel, lines) in zip(grid, panels.items(), strict=False):
            for line in lines:
                _draw_line(axes, line, colours[line.label])
            if logarithmic:
                _mark_each(axes, sorted({point for line in lines for point in line.values}))
            if unit:
                axes.set_xlim(0, 1)
            axes.set_title(_short(panel) if len(panels) > 1 else "")
        if unit:
            grid[0].set_ylim(0, None)  # when all is drawn: a limit set earlier would cut later panels off
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:  # those with nothing below
            axes.set_xlabel(x)
        figure.supylabel(y, fontsize=9)
        _legend(figure, colours, labels)
        return _render(figure, name, title, note, wide)


def draw_bars(
    name: str,
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    *,
    x: str,
    note: str = "",
) -> Plot:
    """Draws horizontal bars, side by side in each group; the note says how many lack a colour.

    Args:
        name: Of the file.
        title: Of the plot.
        groups: Value by bar, by group.
        colours: Of the bars.
        x: Label of the axis.
        note: What one sees.
    """
    labels = {bar for values in groups.values() for bar in values}
    kept = max(1, _BARS // max(1, min(len(labels), DRAWN)))
    if len(groups) > kept:
        note = f"{note} The first {kept} of {len(groups)}.".strip()
        groups = {name: groups[name] for name in list(groups)[:kept]}
    bars, note = [bar for bar in colours if bar in labels], _with_left_out(note, labels, colours)
    with rc_context(_STYLE):
        figure = Figure(figsize=(_HALF, 1 + 0.15 * len(groups) * (len(bars) + 1)), layout="constrained")
        axes, middle = figure.subplots(), np.arange(len(groups))
        for index, bar in enumerate(bars):
            values = [group.get(bar, np.nan) for group in groups.values()]
            offset = (index + 0.5) / len(bars) - 0.5
            axes.barh(middle + 0.8 * offset, values, height=0.8 / len(bars), color=colours[bar])
        axes.set_yticks(middle, [_short(group) for group in groups])
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=x, ylim=(len(groups) - 0.5, -0.5))
        _legend(figure, colours, set(bars))
        return _render(figure, name, title, note)


def draw_points(
    name: str,
    title: str,
    panels: Mapping[str, Floats],
    labels: Sequence[str],
    *,
    note: str = "",
) -> Plot:
    """Draws clouds of points side by side; the axes have no meaning.

    Args:
        name: Of the file.
        title: Of the plot.
        panels: (N, 2) by the panel's title; the same N things in each.
        labels: (N,) what the colours stand for.
        note: What one sees.
    """
    names, shown = np.array(labels), sorted(set(labels))
    colours = {label: _CLASSES[i % len(_CLASSES)] for i, label in enumerate(shown)}
    with rc_context(_STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(_HALF, 3.6), layout="constrained")
        for axes, (panel, points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for label, colour in colours.items():
                axes.scatter(*points[names == label].T, s=12, color=colour, linewidths=0)
            axes.set(title=panel, xticks=[], yticks=[])
        _legend(figure, colours, set(shown))
        return _render(figure, name, title, note)


def draw_matrix(
    name: str,
    title: str,
    counts: npt.NDArray[np.int64],
    names: Sequence[str],
    *,
    x: str,
    y: str,
    note: str = "",
) -> Plot:
    """Draws a square table of counts; the depth of a colour is the share of its row.

    Args:
        name: Of the file.
        title: Of the plot.
        counts: (N, N).
        names: (N,) of rows and columns.
        x: What the columns are.
        y: What the rows are.
        note: What one sees.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ground = LinearSegmentedColormap.from_list("shares", [(0.18, 0.5, 0.82, 0), (0.18, 0.5, 0.82, 1)])
    with rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(_HALF, _HALF), layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares, cmap=ground, vmin=0, vmax=1)
        if len(names) <= _NUMBERS:
            for row, column in zip(*counts.nonzero(), strict=True):
                ink = "white" if shares[row, column] > 0.75 else _INK
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7)
        shown = [_short(label) for label in names]
        axes.set_xticks(range(len(names)), shown, rotation=90)
        axes.set_yticks(range(len(names)), shown)
        axes.tick_params(labelsize=min(9, max(3, 240 / len(names))))
        axes.set(xlabel=x, ylabel=y)
        return _render(figure, name, title, note)


def _drawn(panels: Mapping[str, Sequence[Line]], colours: Mapping[str, str]) -> dict[str, list[Line]]:
    return {title: [line for line in lines if line.label in colours] for title, lines in panels.items()}


def _with_left_out(note: str, labels: Collection[str], colours: Mapping[str, str]) -> str:
    count = sum(label in colours for label in labels)
    return note if count == len(labels) else f"{note} {count} of {len(labels)} are drawn.".strip()


def _draw_line(axes: Axes, line: Line, colour: str) -> None:
    places = np.array(sorted(line.values))
    kept = np.unique(np.linspace(0, len(places) - 1, min(len(places), _POINTS)).round().astype(int))
    places = places[kept]
    values, spread = (
        np.array([float(curve.get(place, math.nan)) for place in places.tolist()])
        for curve in (line.values, line.spread or {})
    )
    if line.spread is not None and len(places) <= _FEW:
        axes.errorbar(places, values, spread, marker="o", markersize=4, capsize=3, color=colour)
        return
    marker = "o" if len(places) == 1 else None
    axes.plot(places, values, linewidth=1.3, marker=marker, color=colour)
    if line.spread is not None:
        axes.fill_between(places, values - spread, values + spread, color=colour, alpha=0.15, linewidth=0)


def _mark_each(axes: Axes, places: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.margins(x=0.1)


def _legend(figure: Figure, colours: Mapping[str, str], used: set[str]) -> None:
    """Labels below the axes, where no curve is; a single one needs none."""
    shown = {label: colour for label, colour in colours.items() if label in used}
    if len(shown) < 2:
        return
    names = [_short(label, 40) for label in shown]
    names = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides _names
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in shown.values()]
    columns = min(len(names), max(1, int(13 * figure.get_figwidth() / (max(map(len, names)) + 7))))
    more = -(-len(names) // columns) - 1  # rows, which the axes need not give way to
    figure.set_figheight(figure.get_figheight() + 0.17 * more)
    figure.legend(handles, names, loc="outside lower left", ncols=columns)


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _render(figure: Figure, name: str, title: str, note: str, wide: bool = False) -> Plot:
    pictures = []
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, transparent=True, dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # the second format takes the places of the first
        pictures.append(buffer.getvalue())
    svg = pictures[0].replace(_INK.encode(), b"currentColor").replace(b"<defs>", _ADAPTIVE + b"<defs>", 1)
    return Plot(name, title, note, svg, pictures[1], wide)
