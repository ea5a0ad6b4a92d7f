"""The curves that the papers plot, drawn from a run's training records: Figures 5 and 6 of hybrid forward so far."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tables.claims import PATHS, Context
from tables.curves import Array, Curve, downsample, epoch_means, first_decay

# One colour per line; in the page they are CSS variables, so that they follow its light or dark mode.
COLOURS = ("#2563eb", "#ea580c", "#059669")
INK, GRID = "#374151", "#d1d5db"


@dataclass(frozen=True)
class Line:
    """A named curve: fine points (x, y) and its epoch means (means_x, means_y)."""

    label: str
    x: Array
    y: Array
    means_x: Array
    means_y: Array


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        id: Names its file.
        title: What is plotted.
        lines: The curves.
        decay: Epoch of the first learning-rate decay.
    """

    id: str
    title: str
    lines: Sequence[Line]
    decay: float | None


@dataclass(frozen=True)
class Drawing:
    """One of the paper's figures, redrawn."""

    figure: Mapping[str, Any]
    caption: str
    panels: Sequence[Panel]


def _line(label: str, curves: Sequence[Curve], values: Callable[[Curve], Array]) -> Line:
    """The mean over seeds."""
    length = min(len(curve.step) for curve in curves)
    first = curves[0]
    mean = np.mean([values(curve)[:length] for curve in curves], axis=0)
    cut = Curve(first.step[:length], first.epoch[:length], first.lr[:length], {})
    epochs, means = epoch_means(cut, mean)
    # A mean stands in the middle of its epoch.
    return Line(label, *downsample(cut.epoch, mean), *downsample(epochs - 0.5, means))


def _decay_epoch(curve: Curve) -> float | None:
    index = first_decay(curve)
    return None if index is None else float(curve.epoch[index - 1])


def _hybrid(context: Context) -> tuple[Mapping[str, Any], list[Curve]] | None:
    """The first row of hybrid forward that has curves."""
    for row in context.hybrid_rows():
        curves = [curve for curve in context.curves(row).values() if {*PATHS, "accuracy"} <= curve.values.keys()]
        if curves:
            return row, curves
    return None


def with_and_without_teacher(context: Context) -> tuple[str, list[Panel]] | None:
    """Figure 5: training loss and accuracy with and without the teacher."""
    found = _hybrid(context)
    plain = context.untaught(found[0]) if found else None
    without = list(context.curves(plain).values()) if plain else []
    if found is None or not without:
        return None
    row, curves = found
    decay = _decay_epoch(curves[0])
    loss = (
        _line("with teacher (L1 + L2 + L3)", curves, lambda curve: curve.total(PATHS)),
        _line("without teacher", without, lambda curve: curve.values["loss"]),
    )
    accuracy = (
        _line("with teacher", curves, lambda curve: curve.values["accuracy"]),
        _line("without teacher", without, lambda curve: curve.values["accuracy"]),
    )
    panels = [Panel("loss", "Training loss", loss, decay), Panel("accuracy", "Training accuracy (%)", accuracy, decay)]
    return f"With the teacher: {row['label']}. Without: the baseline.", panels


def three_paths(context: Context) -> tuple[str, list[Panel]] | None:
    """Figure 6: training loss and accuracy of the normal path and the two hybrid paths."""
    found = _hybrid(context)
    if found is None or not {"accuracy1", "accuracy2"} <= found[1][0].values.keys():
        return None
    row, curves = found
    decay = _decay_epoch(curves[0])
    labels = ("path 1 (starts in the student)", "path 2 (starts in the teacher)", "normal path (the student)")

    def lines(names: Sequence[str]) -> list[Line]:
        pairs = zip(labels, names, strict=True)
        return [_line(label, curves, lambda curve, name=name: curve.values[name]) for label, name in pairs]  # type: ignore[misc]

    panels = [
        Panel("loss", "Training loss", lines(PATHS), decay),
        Panel("accuracy", "Training accuracy (%)", lines(("accuracy1", "accuracy2", "accuracy")), decay),
    ]
    return f"The three paths of {row['label']}.", panels


FIGURES: dict[tuple[str, str], Callable[[Context], tuple[str, list[Panel]] | None]] = {
    ("hybrid_forward", "figure5"): with_and_without_teacher,
    ("hybrid_forward", "figure6"): three_paths,
}


def drawings(context: Context) -> list[Drawing]:
    """The figures that the run has the curves for."""
    found = []
    for figure in context.record.figures:
        draw = FIGURES.get((context.record.paper, figure["id"]))
        drawn = draw(context) if draw else None
        if drawn is not None:
            found.append(Drawing(figure, *drawn))
    return found


def plot(panel: Panel) -> tuple[bytes, str]:
    """A panel as PNG and as SVG to set into a page (transparent, with CSS variables for colours)."""
    import matplotlib  # late: a table without curves does not need it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9.5,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": panel.id,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.3))
        figure.subplots_adjust(left=0.09, right=0.985, bottom=0.14, top=0.87)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for colour, line in zip(COLOURS, panel.lines, strict=False):
            if len(line.x) > len(line.means_x):
                axes.plot(line.x, line.y, color=colour, alpha=0.22, linewidth=0.8)
            marker = "o" if len(line.means_x) <= 30 else ""
            means = line.means_x, line.means_y
            axes.plot(*means, color=colour, linewidth=1.9, label=line.label, marker=marker, markersize=3.2)
        if panel.decay is not None:
            axes.axvline(panel.decay, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
            place = axes.get_xaxis_transform()
            axes.text(panel.decay, 1.01, "first decay", transform=place, fontsize=8, ha="center", va="bottom")
        axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", pad=14)
        axes.set_xlabel("epoch")
        axes.grid(color=GRID, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8.5)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=144, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return png.getvalue(), _for_page(svg.getvalue(), panel)


def _for_page(svg: str, panel: Panel) -> str:
    """Inline SVG: no prolog, no metadata, no fixed size, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    name = f"{panel.title}: {', '.join(line.label for line in panel.lines)}"
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
    for number, colour in enumerate(COLOURS, 1):
        svg = svg.replace(colour, f"var(--line-{number})")
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--rule)")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg).strip()
