"""What figures are made of (lines, levels, matrices), and how they become PNG and an SVG that follows the page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tables import papers
from tables.curves import Array, Curve, downsample, epoch_means, first_decay
from tables.judging import Context, count_seeds

INK, GRID = "#374151", "#d1d5db"
# One colour per line; in the page they are CSS variables, so that they follow its light or dark mode.
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#be123c", "#0e7490")
BOLD_POINTS = 60  # of a bold line over steps


@dataclass(frozen=True)
class Line:
    """A named curve: fine points (x, y) and means of them (means_x, means_y), which may have spreads (n,)."""

    label: str
    x: Array
    y: Array
    means_x: Array
    means_y: Array
    spread: Array | None = None


@dataclass(frozen=True)
class Level:
    """A named value that does not depend on x, with its spread."""

    label: str
    y: float
    spread: float | None


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        id: Names its file.
        title: What is plotted.
        lines: The curves.
        decay: Where on the x axis the learning rate first decays.
        x_label: What the x axis shows.
        levels: Horizontal lines.
        span: A shaded part of the x axis.
        ticks: Values marked on the x axis; logarithmic if all are above 0 and far apart.
        borders: Where phases of the training begin on the x axis, with their names; the last one is the end.
        log_y: Whether the y axis is logarithmic.
    """

    id: str
    title: str
    lines: Sequence[Line]
    decay: float | None = None
    x_label: str = "epoch"
    levels: Sequence[Level] = ()
    span: tuple[float, float] | None = None
    ticks: Sequence[float] = ()
    borders: Sequence[tuple[float, str]] = ()
    log_y: bool = False


@dataclass(frozen=True)
class HeatMaps:
    """Some matrices side by side on one colour scale.

    Attributes:
        id: Names its file.
        title: What is shown.
        pictures: Label -> (channels, pixels): every row is one channel's map, row after row of it.
        signed: Whether values below zero are shown, by a scale with white at zero.
    """

    id: str
    title: str
    pictures: Mapping[str, Array]
    signed: bool = False


@dataclass(frozen=True)
class Drawing:
    """One of the paper's figures, redrawn, or with a `title` one that the paper does not have."""

    figure: Mapping[str, Any]
    caption: str
    panels: Sequence[Panel | HeatMaps]
    title: str | None = None


# Figure -> what draws it, or None where the run lacks what it shows: its caption and panels.
Figures = Mapping[str, Callable[[Context], tuple[str, Sequence[Panel | HeatMaps]] | None]]


def drawings(context: Context) -> list[Drawing]:
    """The figures that the run has the curves for.

    A paper's `figures.py` has `FIGURES`, and `further(context)` if its runs show what the paper does not plot.
    """
    part = papers.part(context.record.paper, "figures")
    if part is None:
        return []
    figures: Figures = getattr(part, "FIGURES", {})
    found: list[Drawing] = []
    for figure in context.record.figures:
        draw = figures.get(figure["id"])
        drawn = draw(context) if draw else None
        if drawn is not None:
            found.append(Drawing(figure, *drawn))
    return found + (part.further(context) if hasattr(part, "further") else [])


# Lines


def mean_line(label: str, curves: Sequence[Curve], values: Callable[[Curve], Array], start: float = 0.0) -> Line:
    """The mean over seeds against epochs, of which `start` come before the curves."""
    length = min(len(curve.step) for curve in curves)
    first = curves[0]
    mean = np.mean([values(curve)[:length] for curve in curves], axis=0)
    cut = Curve(first.step[:length], first.epoch[:length], first.lr[:length], {})
    epochs, means = epoch_means(cut, mean)
    # A mean stands in the middle of its epoch.
    return Line(label, *downsample(start + cut.epoch, mean), *downsample(start + epochs - 0.5, means))


def step_line(label: str, curves: Sequence[Curve], name: str, steps: slice = slice(None)) -> Line:
    """The mean over seeds against steps, or against some of them."""
    length = min(len(curve.step) for curve in curves)
    x = curves[0].step[:length][steps]
    y = np.mean([curve.values[name][:length] for curve in curves], axis=0)[steps]
    return Line(label, *downsample(x, y), *downsample(x, y, BOLD_POINTS))


def bold(steps: int | None, seeds: int) -> str:
    """What the bold lines are: means over epochs, or over equal spans of so many steps."""
    averaged = f"averaged over {count_seeds(seeds)}" if seeds > 1 else ""
    if steps is not None and steps <= BOLD_POINTS:
        return f"Lines are {averaged}." if averaged else ""
    kind = "epoch means" if steps is None else f"means over {BOLD_POINTS} equal spans"
    return f"Bold lines are {kind}{averaged and ', ' + averaged}."


def decay_step(curve: Curve) -> float | None:
    index = first_decay(curve)
    return None if index is None else float(curve.step[index - 1])


def decay_epoch(curve: Curve) -> float | None:
    index = first_decay(curve)
    return None if index is None else float(curve.epoch[index - 1])


# Pictures


def plot(panel: Panel | HeatMaps) -> tuple[bytes, str]:
    """A panel as PNG and as SVG to set into a page (transparent, with CSS variables for colours)."""
    if isinstance(panel, HeatMaps):
        return plot_maps(panel)
    import matplotlib  # late: a table without curves does not need it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with matplotlib.rc_context(style_of(panel.id)):
        figure = Figure(figsize=(5.2, 3.3))
        figure.subplots_adjust(left=0.09, right=0.985, bottom=0.14, top=0.84 if panel.levels else 0.87)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for colour, line in zip(COLOURS, panel.lines, strict=False):
            if len(line.x) > len(line.means_x):
                axes.plot(line.x, line.y, color=colour, alpha=0.22, linewidth=0.8)
            marker = "o" if len(line.means_x) <= 30 else ""
            means = line.means_x, line.means_y
            axes.plot(*means, color=colour, linewidth=1.9, label=line.label, marker=marker, markersize=3.2)
            if line.spread is not None:
                axes.errorbar(*means, yerr=line.spread, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3)
        for colour, level in zip(COLOURS[len(panel.lines) :], panel.levels, strict=False):
            axes.axhline(level.y, color=colour, linewidth=1.6, linestyle=(0, (6, 2)), label=level.label)
            if level.spread:
                axes.axhspan(level.y - level.spread, level.y + level.spread, color=colour, alpha=0.12, linewidth=0)
        if panel.span is not None:
            axes.axvspan(*panel.span, color=INK, alpha=0.07, linewidth=0)
        if panel.ticks:
            if min(panel.ticks) > 0 and max(panel.ticks) >= 10 * min(panel.ticks):
                axes.set_xscale("log")
            axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axes.minorticks_off()
        marks = [(start, name, "left") for start, name in panel.borders[:-1]]
        if panel.decay is not None:
            marks.append((panel.decay, "first decay", "center"))
        for at, name, alignment in marks:
            axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
            axes.text(at, 1.01, name, transform=axes.get_xaxis_transform(), fontsize=8, ha=alignment, va="bottom")
        if panel.borders:
            axes.set_xlim(panel.borders[0][0], panel.borders[-1][0])
        if panel.log_y:
            axes.set_yscale("log")
            # Powers of ten with a factor are too wide for the margin.
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", pad=20 if panel.levels else 14)
        axes.set_xlabel(panel.x_label)
        axes.grid(color=GRID, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        if panel.levels:
            # Above the axes: inside, a level may run through it.
            above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "ncols": 3, "columnspacing": 1.4}
            axes.legend(frameon=False, fontsize=8.5, borderpad=0, borderaxespad=0.2, **above)
        else:
            axes.legend(frameon=False, fontsize=8.5)
        labels = [line.label for line in panel.lines] + [level.label for level in panel.levels]
        variables = {colour: f"var(--line-{number})" for number, colour in enumerate(COLOURS, 1)}
        return export(figure, f"{panel.title}: {', '.join(labels)}", variables)


def plot_maps(panel: HeatMaps) -> tuple[bytes, str]:
    """The matrices as PNG and as SVG to set into a page."""
    import matplotlib  # late, as above
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A few outliers would leave the rest without contrast.
    limit = max(float(np.percentile(np.abs(values), 99)) for values in panel.pictures.values()) or 1.0
    scale: dict[str, Any] = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
    if not panel.signed:
        scale = {"vmin": 0.0, "vmax": limit, "cmap": "viridis"}
    with matplotlib.rc_context(style_of(panel.id)):
        figure = Figure(figsize=(5.2, 3.3))
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panel.pictures), squeeze=False)[0]
        figure.subplots_adjust(left=0.11, right=0.87, bottom=0.05, top=0.8, wspace=0.12)
        image: Any = None
        for number, (each, (name, values)) in enumerate(zip(axes, panel.pictures.items(), strict=True)):
            image = each.imshow(values, aspect="auto", interpolation="nearest", **scale)
            each.set_title(name, fontsize=9.5)
            each.set_xticks([])
            each.set_yticks([0, len(values) - 1] if number == 0 else [])
            each.spines[:].set_visible(True)
        axes[0].set_ylabel("channel")
        figure.colorbar(image, cax=figure.add_axes((0.885, 0.05, 0.02, 0.75)))
        figure.text(0.01, 0.95, panel.title, fontsize=10.5, fontweight="bold")
        return export(figure, f"{panel.title}: {', '.join(panel.pictures)}", {})


def style_of(picture: str) -> dict[Any, Any]:
    """Settings of matplotlib for one picture; its name makes the SVG's own names unique and repeatable."""
    return {
        "font.size": 9.5,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": picture,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def export(figure: Any, description: str, variables: Mapping[str, str]) -> tuple[bytes, str]:
    """A figure as PNG and as SVG to set into a page: no prolog, no metadata, no fixed size, colours of the page.

    Args:
        figure: Of matplotlib.
        description: What a screen reader says.
        variables: Colour -> CSS variable that takes its place, besides those of text and grid.
    """
    png, text = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=144, facecolor="white")
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
    for colour, variable in {**variables, INK: "currentColor", GRID: "var(--rule)"}.items():
        svg = svg.replace(colour, variable)
    return png.getvalue(), re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg).strip()
