"""Curves and bars of a report, drawn to be read on light and on dark ground."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f'a report needs matplotlib: pip install "aligndet[report]" ({error})') from error

_GREY = "#858585"  # legible on white and on black
_COLOURS = ["#3b82c4", "#e07b39", "#3fa45b", "#c8504d", "#8d6fc0", "#a0724f", "#cf6fae", "#33a9b5", "#a5a736"]
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name may hold a dollar sign
    "svg.hashsalt": "aligndet",
    "text.color": _GREY,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
}
_POINTS = 400  # of a curve; a screen shows no more


@dataclass(frozen=True)
class Line:
    """A curve; lines of one label share colour and entry of the legend."""

    label: str
    values: Mapping[int, float]  # y by x
    spread: Mapping[int, float] | None = None  # of y by x; drawn as bars


@dataclass(frozen=True)
class Plot:
    """A figure in two formats."""

    name: str  # of its file, without suffix
    title: str
    svg: bytes
    png: bytes


def draw_lines(
    name: str, title: str, lines: Sequence[Line], *, x: str, y: str, logarithmic: bool = False
) -> Plot:
    """Draws curves over steps or labels.

    Args:
        name: Of the file.
        title: Of the plot.
        lines: What to draw.
        x: Label of the axis.
        y: Label of the axis.
        logarithmic: The x axis.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        colours = _colours([line.label for line in lines])
        for line in lines:
            _draw_line(axes, line, colours[line.label])
        if logarithmic:
            axes.set_xscale("log")
            ticks = sorted({step for line in lines for step in line.values})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.set(xlabel=x, ylabel=y)
        _legend(axes, colours)
        return _render(figure, name, title)


def draw_bars(name: str, title: str, groups: Mapping[str, Mapping[str, float]], *, x: str) -> Plot:
    """Draws horizontal bars, side by side in each group.

    Args:
        name: Of the file.
        title: Of the plot.
        groups: Value by bar, by group; the bars of all groups have the same names.
        x: Label of the axis.
    """
    bars = list(dict.fromkeys(bar for values in groups.values() for bar in values))
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 1 + 0.16 * len(groups) * (len(bars) + 1)), layout="constrained")
        axes = figure.subplots()
        colours, middle = _colours(bars), np.arange(len(groups))
        for index, bar in enumerate(bars):
            values = [group.get(bar, np.nan) for group in groups.values()]
            offset = (index + 0.5) / len(bars) - 0.5
            axes.barh(middle + 0.8 * offset, values, height=0.8 / len(bars), color=colours[bar])
        axes.set_yticks(middle, list(groups))
        axes.invert_yaxis()
        axes.set(xlabel=x)
        _legend(axes, colours)
        return _render(figure, name, title)


def draw_points(
    name: str, title: str, panels: Mapping[str, npt.NDArray[np.float64]], labels: Sequence[str]
) -> Plot:
    """Draws clouds of points side by side; the axes have no meaning.

    Args:
        name: Of the file.
        title: Of the plot.
        panels: (N, 2) by the panel's title; the same N things in each.
        labels: (N,) what the colours stand for.
    """
    names, colours = np.array(labels), _colours(sorted(set(labels)))
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        for axes, (panel, points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for label, colour in colours.items():
                axes.scatter(*points[names == label].T, s=5, color=colour, linewidths=0)
            axes.set(title=panel, xticks=[], yticks=[])
        _legend(axes, colours)
        return _render(figure, name, title)


def draw_centers(
    name: str, title: str, image: npt.NDArray[np.uint8], panels: Mapping[str, npt.NDArray[np.float64]]
) -> Plot:
    """Draws points on copies of an image, side by side.

    Args:
        name: Of the file.
        title: Of the plot.
        image: (H, W, 3) RGB.
        panels: (n, 2) x and y in pixels, by the panel's title.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 0.4 + 3 * image.shape[0] / image.shape[1]), layout="constrained")
        for axes, (panel, points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            axes.imshow(image)
            axes.scatter(*points.T, s=9, color="#ffd400", edgecolors="black", linewidths=0.4)
            axes.set(title=panel, xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))
            axes.axis("off")
        return _render(figure, name, title)


def _draw_line(axes: Axes, line: Line, colour: str) -> None:
    steps = np.array(sorted(line.values))
    if line.spread is None:
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int))
        steps = steps[kept]
    values = [line.values[step] for step in steps]
    if line.spread is None:
        axes.plot(steps, values, linewidth=1.2, marker="o" if len(steps) == 1 else None, color=colour)
    else:
        spread = [line.spread.get(step, 0.0) for step in steps]
        axes.errorbar(steps, values, spread, marker="o", markersize=4, capsize=3, color=colour)


def _colours(labels: Sequence[str]) -> dict[str, str]:
    return {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(dict.fromkeys(labels))}


def _legend(axes: Axes, colours: Mapping[str, str]) -> None:
    """Labels below the axes, where no curve is."""
    handles = [axes.plot([], [], color=colour, linewidth=3)[0] for colour in colours.values()]
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    shown = [label if len(label) <= 40 else f"{label[:39]}…" for label in colours]
    shown = [f" {label}" if label.startswith("_") else label for label in shown]  # matplotlib hides _names
    columns = 2 if max(map(len, shown), default=0) <= 20 else 1  # longer names side by side would be cut off
    figure.legend(handles, shown, loc="outside lower center", ncols=columns)


def _render(figure: Figure, name: str, title: str) -> Plot:
    pictures = []
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, transparent=True, dpi=150, metadata=metadata)
        pictures.append(buffer.getvalue())
    return Plot(name, title, *pictures)
