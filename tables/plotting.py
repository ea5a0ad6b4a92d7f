"""What figures are made of (lines, levels, matrices), and how they become PNG, SVG that follows the page, and CSV."""

from __future__ import annotations

import csv
import html
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tables import panels, papers
from tables.curves import Array, Curve, downsample, epoch_means, first_decay
from tables.judging import Context, count_seeds
from tables.panels import GRID, INK, Line, Panel

BOLD_POINTS = 60  # of a bold line over steps


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


def as_svg(panel: Panel | HeatMaps) -> str:
    """A panel as SVG to set into a page, in its colours."""
    return panels.as_svg(panel) if isinstance(panel, Panel) else _maps_as_svg(panel)


def as_png(panel: Panel | HeatMaps, comment: str = "") -> bytes:
    """A panel as PNG; `comment` is kept in the file."""
    return panels.as_png(panel, comment) if isinstance(panel, Panel) else _maps_as_png(panel, comment)


def as_csv(panel: Panel | HeatMaps) -> str:
    """A panel's data: of lines the `points`, their `means` with spreads, and the `level`s; of matrices each row."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if isinstance(panel, HeatMaps):
        columns = max(values.shape[1] for values in panel.pictures.values())
        writer.writerow(["picture", "channel", *range(columns)])
        for name, values in panel.pictures.items():
            writer.writerows([name, channel, *(f"{value:.6g}" for value in row)] for channel, row in enumerate(values))
        return buffer.getvalue()
    writer.writerow(["line", "kind", panel.x_label, panel.title, "spread"])
    rows: list[tuple[Any, ...]] = []
    for line in panel.lines:
        if len(line.x) > len(line.means_x):
            rows += [(line.label, "points", x, y, None) for x, y in zip(line.x, line.y, strict=True)]
        spreads = itertools.repeat(None) if line.spread is None else line.spread
        rows += [(line.label, "means", *each) for each in zip(line.means_x, line.means_y, spreads, strict=False)]
    rows += [(level.label, "level", None, level.y, level.spread) for level in panel.levels]
    for label, kind, *numbers in rows:
        writer.writerow([label, kind, *("" if value is None else f"{value:.6g}" for value in numbers)])
    return buffer.getvalue()


def _drawn_maps(panel: HeatMaps) -> tuple[Any, dict[Any, Any], str]:
    """A figure of matplotlib, the style to save it in, and what a screen reader says."""
    import matplotlib  # late: most tables have none
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A few outliers would leave the rest without contrast.
    limit = max(float(np.percentile(np.abs(values), 99)) for values in panel.pictures.values()) or 1.0
    scale: dict[str, Any] = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
    if not panel.signed:
        scale = {"vmin": 0.0, "vmax": limit, "cmap": "viridis"}
    style = _style_of(panel.id)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(panels.WIDTH / 72, panels.HEIGHT / 72))
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panel.pictures), squeeze=False)[0]
        figure.subplots_adjust(left=0.14, right=0.84, bottom=0.04, top=0.88, wspace=0.12)
        image: Any = None
        for number, (each, (name, values)) in enumerate(zip(axes, panel.pictures.items(), strict=True)):
            image = each.imshow(values, aspect="auto", interpolation="nearest", **scale)
            each.set_title(name, fontsize=panels.TEXT)
            each.set_xticks([])
            each.set_yticks([0, len(values) - 1] if number == 0 else [])
            each.spines[:].set_visible(True)
        axes[0].set_ylabel("channel")
        figure.colorbar(image, cax=figure.add_axes((0.86, 0.04, 0.02, 0.84)))
        return figure, style, f"{panel.title}: {', '.join(panel.pictures)}"


def _style_of(picture: str) -> dict[Any, Any]:
    """Settings of matplotlib for one picture; its name makes the SVG's own names unique and repeatable."""
    return {
        "font.size": panels.TEXT,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": picture,
        "text.parse_math": False,  # labels may hold what users have written
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _maps_as_png(panel: HeatMaps, comment: str) -> bytes:
    import matplotlib

    (figure, style, _), file = _drawn_maps(panel), io.BytesIO()
    with matplotlib.rc_context(style):
        figure.suptitle(panel.title, y=1.0, va="bottom", fontweight="bold", fontsize=panels.TEXT)
        options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06, "metadata": {"Comment": comment}}
        figure.savefig(file, format="png", dpi=144, facecolor="white", **options)
    return file.getvalue()


def _maps_as_svg(panel: HeatMaps) -> str:
    """No prolog, no metadata, no fixed size, and the page's colours."""
    import matplotlib

    (figure, style, description), text = _drawn_maps(panel), io.StringIO()
    with matplotlib.rc_context(style):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
    found = re.sub(r' (width|height)="[^"]*pt"', "", found, count=2)
    found = found.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
    for colour, variable in {INK: "currentColor", GRID: "var(--rule)"}.items():
        found = found.replace(colour, variable)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", found).strip()
