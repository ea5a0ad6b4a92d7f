"""Plots and matrices, and how matplotlib draws them: as SVG in a page, in its colours, and as PNG.

Text is at least 11 pixels high, nothing is cut off, and no label stands over another.
"""

from __future__ import annotations

import contextlib
import html
import io
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tables.curves import Array, downsample

INK, GRID = "#374151", "#d1d5db"
# One colour per line; the page has variables for the same ones, which follow its light or dark mode.
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#be123c", "#0e7490")

# The page shows a picture at this width in pixels or wider, so that a unit is a pixel or more.
WIDTH, HEIGHT = 330, 215
TEXT = 11
CHARACTER = 6.6  # width of most characters, in the widest of the page's fonts
LINE = 14  # height of a line of text
FINE = 160  # points of a fine line
MARKED = 30  # points of a bold line at most that are marked
LARGEST = 1e100  # that an axis shows
STEPS = (1, 2, 2.5, 5, 10)  # between values on an axis, times a power of ten


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

    @property
    def named(self) -> list[Line | Level]:
        """What a legend names, in the order of the colours."""
        return [*self.lines, *self.levels]


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


def as_svg(panel: Panel | HeatMaps) -> str:
    """A picture as SVG to set into a page: in its colours, without a size; title and legend are the page's to set."""
    text, names = io.StringIO(), [each.label for each in panel.named] if isinstance(panel, Panel) else panel.pictures
    with _style(panel):
        draw(panel).savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    idle = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<g/>| transform=\"rotate\(-0 [^)]*\)\""
    found = re.sub(idle, "", found[found.index("<svg") :], flags=re.DOTALL)
    found = re.sub(r' (width|height)="[^"]*pt"', "", found, count=2)
    described = html.escape(f"{panel.title}: {', '.join(names)}")
    found = found.replace("<svg", f'<svg role="img" aria-label="{described}"', 1)
    found = re.sub(r' id="[A-Za-z.]+(?:2d)?_\d+"', "", found)  # a page has several pictures
    for number, (colour, name) in enumerate(zip(COLOURS, names, strict=False), 1):
        found = found.replace(f'<g id="line-{number}">', f"<g><title>{html.escape(name)}</title>")
        found = found.replace(colour, f"var(--line-{number})")
    found = found.replace(INK, "currentColor").replace(GRID, "var(--rule)")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", found).strip()


def as_png(panel: Panel | HeatMaps, comment: str = "") -> bytes:
    """A picture as PNG with its title and legend, on white; `comment` is kept in the file."""
    file = io.BytesIO()
    with _style(panel):
        figure = draw(panel)
        title = textwrap.fill(panel.title, int(WIDTH / CHARACTER))
        figure.text(0.01, 1.01, title, va="bottom", fontweight="bold")
        if isinstance(panel, Panel):
            columns = max(1, int(WIDTH / (34 + CHARACTER * max(len(each.label) for each in panel.named))))
            figure.legend(loc="upper left", bbox_to_anchor=(0, 0), frameon=False, ncols=columns, columnspacing=1.2)
        options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06, "metadata": {"Comment": comment}}
        # Hardly larger than the default's, in half the time.
        figure.savefig(file, format="png", dpi=144, facecolor="white", pil_kwargs={"compress_level": 3}, **options)
    return file.getvalue()


def draw(panel: Panel | HeatMaps) -> Any:
    """The figure of matplotlib, a point a unit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
    FigureCanvasAgg(figure)
    if isinstance(panel, Panel):
        _plot(panel, figure)
    else:
        _show_maps(panel, figure)
    return figure


def _style(panel: Panel | HeatMaps) -> contextlib.ExitStack:
    """Settings of matplotlib for one picture; its name makes the SVG's own names unique and repeatable."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home without room for its cache is no news
    from matplotlib import style  # late: not every command draws

    stack = contextlib.ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # of signs that the PNG's font lacks, or of what no axis can show
    options: dict[Any, Any] = {
        "font.size": TEXT,
        "axes.titlesize": TEXT,
        "axes.labelsize": TEXT,
        "xtick.labelsize": TEXT,
        "ytick.labelsize": TEXT,
        "legend.fontsize": TEXT,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": f"{panel.id} {panel.title}",
        "text.parse_math": False,  # labels may hold what users have written
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "lines.solid_capstyle": "round",
    }
    stack.enter_context(style.context(options, after_reset=True))  # whatever a matplotlibrc says
    return stack


def _plot(panel: Panel, figure: Any) -> None:
    """Lines and levels in axes whose margins hold their labels."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

    axes = figure.add_subplot()
    axes.margins(x=0.04 if panel.ticks else 0)
    if panel.log_y:
        axes.set_yscale("log", nonpositive="mask")
    if panel.ticks and min(panel.ticks) > 0 and max(panel.ticks) >= 10 * min(panel.ticks):
        axes.set_xscale("log")
    for number, line in enumerate(panel.lines):
        _draw_line(axes, line, number)
    for number, level in enumerate(panel.levels, len(panel.lines)):
        shown: dict[str, Any] = {"color": COLOURS[number], "linewidth": 1.6, "linestyle": (0, (6, 2))}
        axes.axhline(level.y, label=level.label, gid=f"line-{number + 1}", **shown)
        if level.spread:
            axes.axhspan(level.y - level.spread, level.y + level.spread, color=COLOURS[number], alpha=0.12, linewidth=0)
    if panel.span is not None:
        axes.axvspan(*panel.span, color=INK, alpha=0.07, linewidth=0)
    if panel.borders:
        axes.set_xlim(panel.borders[0][0], panel.borders[-1][0])
    axes.grid()
    axes.tick_params(length=0)
    axes.set_xlabel(panel.x_label)
    low, high = axes.get_ylim()
    decades = panel.log_y and high >= 8 * low
    subs = (1.0,) if high > 2000 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12) if decades else MaxNLocator(8, steps=STEPS))
    axes.xaxis.set_major_locator(FixedLocator(panel.ticks) if panel.ticks else MaxNLocator(6, steps=STEPS))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    left = 10 + max(map(_width, _shown(axes.yaxis)), default=0)
    right = max([12, *(_width(text) / 2 + 2 for text in _shown(axes.xaxis)[-1:])])
    figure.subplots_adjust(left=left / WIDTH, right=1 - right / WIDTH, bottom=(2 * LINE + 6) / HEIGHT)

    def place(x: float) -> float:
        return float(axes.transData.transform((x, low))[0])

    if panel.ticks:
        axes.set_xticks(panel.ticks, _apart([(place(tick), f"{tick:g}") for tick in panel.ticks]))
    marks = [*panel.borders[:-1], *([] if panel.decay is None else [(panel.decay, "first decay")])]
    named = _lanes([(place(at), name) for at, name in marks], WIDTH - 2.0)
    figure.subplots_adjust(top=1 - (8 + LINE * max((lane + 1 for *_, lane in named), default=0)) / HEIGHT)
    for (at, _), (x, name, lane) in zip(marks, named, strict=True):
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        where = (x - place(at), 5 + LINE * lane)
        axes.annotate(name, (at, 1), where, axes.get_xaxis_transform(), "offset points", annotation_clip=False)


def _draw_line(axes: Any, line: Line, number: int) -> None:
    """A line with what its means are of, its points if they are few, and its spreads."""
    known: dict[str, Any] = {"color": COLOURS[number], "clip_on": False}

    def seen(values: Array) -> Array:
        return np.where(np.abs(values) < LARGEST, values, np.nan)

    y, means_y = seen(line.y), seen(line.means_y)
    if len(line.x) > len(line.means_x):
        faint = 0.3 if len(line.means_x) > 1 else 0.9  # one mean is no line
        axes.plot(*downsample(line.x, y, FINE), alpha=faint, linewidth=0.8, **known)
    means, marker = (line.means_x, means_y), "o" if len(line.means_x) <= MARKED else ""
    axes.plot(
        *means,
        linewidth=1.9,
        marker=marker,
        markersize=4.4,
        markeredgewidth=0,
        label=line.label,
        gid=f"line-{number + 1}",
        **known,
    )
    if line.spread is not None:
        axes.errorbar(*means, yerr=seen(line.spread), fmt="none", ecolor=COLOURS[number], elinewidth=1.2, clip_on=False)


def _show_maps(panel: HeatMaps, figure: Any) -> None:
    """Matrices side by side, and their scale."""
    # A few outliers would leave the rest without contrast.
    limit = max(float(np.percentile(np.abs(values), 99)) for values in panel.pictures.values()) or 1.0
    scale: dict[str, Any] = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
    if not panel.signed:
        scale = {"vmin": 0.0, "vmax": limit, "cmap": "viridis"}
    axes = figure.subplots(1, len(panel.pictures), squeeze=False)[0]
    figure.subplots_adjust(left=0.14, right=0.84, bottom=0.04, top=0.88, wspace=0.12)
    image: Any = None
    for number, (each, (name, values)) in enumerate(zip(axes, panel.pictures.items(), strict=True)):
        image = each.imshow(values, aspect="auto", interpolation="nearest", **scale)
        each.set_title(name)
        each.set_xticks([])
        each.set_yticks([0, len(values) - 1] if number == 0 else [])
        each.spines[:].set_visible(True)
    axes[0].set_ylabel("channel")
    figure.colorbar(image, cax=figure.add_axes((0.86, 0.04, 0.02, 0.84)))


def _shown(axis: Any) -> list[str]:
    """The labels of an axis."""
    low, high = sorted(axis.get_view_interval())
    return [f"{tick:g}" for tick in axis.get_majorticklocs() if low <= tick <= high]


def _width(text: str) -> float:
    return CHARACTER * len(text)


def _apart(places: Sequence[tuple[float, str]]) -> list[str]:
    """Centred labels in order, empty where they would run into the one before."""
    kept: list[str] = []
    end = -math.inf
    for at, text in places:
        fits = at - _width(text) / 2 > end + 4
        kept.append(text if fits else "")
        end = at + _width(text) / 2 if fits else end
    return kept


def _lanes(marks: Sequence[tuple[float, str]], end: float) -> list[tuple[float, str, int]]:
    """Where names that begin at places stand, none over another or past the end: left end, name, line from below."""
    found: list[tuple[float, str, int]] = []
    ends: list[float] = []
    for at, name in marks:
        left = max(0.0, min(at, end - _width(name)))
        lane = next((lane for lane, taken in enumerate(ends) if taken + 6 <= left), len(ends))
        ends[lane:] = [left + _width(name), *ends[lane + 1 :]]
        found.append((left, name, lane))
    return found
