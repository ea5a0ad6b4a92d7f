"""The curves that the papers plot, drawn from a run's records: Figures 5 to 9 of hybrid forward so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tables.claims import PATHS, Context, Row, count_seeds
from tables.curves import Array, Curve, downsample, epoch_means, first_decay
from tables.gap_claims import SWEEP, TEACHERS, fixed_rows, is_fixed, middle_steps, needed
from tables.heatmaps import HeatMaps, activation_maps, plot_maps
from tables.pictures import GRID, INK, export, style_of

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
class Drawing:
    """One of the paper's figures, redrawn, or with a `title` one that the paper does not have."""

    figure: Mapping[str, Any]
    caption: str
    panels: Sequence[Panel | HeatMaps]
    title: str | None = None


def mean_line(label: str, curves: Sequence[Curve], values: Callable[[Curve], Array], start: float = 0.0) -> Line:
    """The mean over seeds against epochs, of which `start` come before the curves."""
    length = min(len(curve.step) for curve in curves)
    first = curves[0]
    mean = np.mean([values(curve)[:length] for curve in curves], axis=0)
    cut = Curve(first.step[:length], first.epoch[:length], first.lr[:length], {})
    epochs, means = epoch_means(cut, mean)
    # A mean stands in the middle of its epoch.
    return Line(label, *downsample(start + cut.epoch, mean), *downsample(start + epochs - 0.5, means))


def _step_line(label: str, curves: Sequence[Curve], name: str, steps: slice = slice(None)) -> Line:
    """The mean over seeds against steps, or against some of them."""
    length = min(len(curve.step) for curve in curves)
    x = curves[0].step[:length][steps]
    y = np.mean([curve.values[name][:length] for curve in curves], axis=0)[steps]
    return Line(label, *downsample(x, y), *downsample(x, y, BOLD_POINTS))


def _bold(steps: int | None, seeds: int) -> str:
    """What the bold lines are: means over epochs, or over equal spans of so many steps."""
    averaged = f"averaged over {count_seeds(seeds)}" if seeds > 1 else ""
    if steps is not None and steps <= BOLD_POINTS:
        return f"Lines are {averaged}." if averaged else ""
    kind = "epoch means" if steps is None else f"means over {BOLD_POINTS} equal spans"
    return f"Bold lines are {kind}{averaged and ', ' + averaged}."


def _decay_step(curve: Curve) -> float | None:
    index = first_decay(curve)
    return None if index is None else float(curve.step[index - 1])


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
        mean_line("with teacher (L1 + L2 + L3)", curves, lambda curve: curve.total(PATHS)),
        mean_line("without teacher", without, lambda curve: curve.values["loss"]),
    )
    accuracy = (
        mean_line("with teacher", curves, lambda curve: curve.values["accuracy"]),
        mean_line("without teacher", without, lambda curve: curve.values["accuracy"]),
    )
    panels = [Panel("loss", "Training loss", loss, decay), Panel("accuracy", "Training accuracy (%)", accuracy, decay)]
    return f"With the teacher: {row['label']}. Without: the baseline. {_bold(None, len(curves))}", panels


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
        return [mean_line(label, curves, lambda curve, name=name: curve.values[name]) for label, name in pairs]  # type: ignore[misc]

    panels = [
        Panel("loss", "Training loss", lines(PATHS), decay),
        Panel("accuracy", "Training accuracy (%)", lines(("accuracy1", "accuracy2", "accuracy")), decay),
    ]
    return f"The three paths of {row['label']}. {_bold(None, len(curves))}", panels


def _balance_curves(context: Context, row_ids: Sequence[str]) -> dict[str, tuple[Row, list[Curve]]]:
    """Row id -> the first variant with a dynamic balance that has curves, and these."""
    found = {}
    for row_id in row_ids:
        for row in context.named(row_id):
            curves = [curve for curve in context.curves(row).values() if {"balance", "l3"} <= curve.values.keys()]
            if curves and not is_fixed(context, row):
                found[row_id] = row, curves
                break
    return found


def _describe(context: Context, row_ids: Sequence[str], found: Mapping[str, tuple[Row, list[Curve]]]) -> str:
    """What the lines over steps are, and what to run for those that are not there."""
    curves = [curve for _, each in found.values() for curve in each]
    labels = ", ".join(row["label"] for row, _ in found.values())
    bold = _bold(max(len(curve.step) for curve in curves), max(len(each) for _, each in found.values()))
    absent = [row_id for row_id in row_ids if row_id not in found]
    parts = (f"Rows: {labels}.", bold, needed(context, *absent) if absent else "")
    return " ".join(part for part in parts if part)


def balances_of_teachers(context: Context) -> tuple[str, list[Panel]] | None:
    """Figure 7: balance and the student's training loss against steps, for each teacher."""
    names = {f"hybrid_{teacher}": text for teacher, text in TEACHERS.items()}
    found = _balance_curves(context, list(names))
    if not found:
        return None
    decay = _decay_step(next(iter(found.values()))[1][0])

    def lines(name: str) -> list[Line]:
        return [_step_line(names[row_id], curves, name) for row_id, (_, curves) in found.items()]

    panels = [
        Panel("balance", "Balance of the hybrid losses", lines("balance"), decay, "step"),
        Panel("loss", "Training loss of the student (L3)", lines("l3"), decay, "step"),
    ]
    return _describe(context, list(names), found), panels


def balances_of_backbones(context: Context) -> tuple[str, list[Panel]] | None:
    """Figure 8: balance against steps for both backbones, and its middle once more as the paper zooms into it."""
    row_ids = ("hybrid_resnet50", "hybrid_forward")
    found = _balance_curves(context, row_ids)
    if not found:
        return None
    length = min(len(curve.step) for _, curves in found.values() for curve in curves)
    first, last = middle_steps(context, length)

    def lines(steps: slice) -> list[Line]:
        return [_step_line(str(row["student"]), curves, "balance", steps) for row, curves in found.values()]

    decay = _decay_step(next(iter(found.values()))[1][0])
    title = "Balance of the hybrid losses"
    panels = [Panel("balance", title, lines(slice(None)), decay, "step", span=(first, last))]
    if last - first > 1:
        middle = lines(slice(first - 1, last))
        panels.append(Panel("zoom", f"{title}, steps {first} to {last}", middle, x_label="step"))
    return _describe(context, row_ids, found), panels


def fixed_balances(context: Context) -> tuple[str, list[Panel]] | None:
    """Figure 9: miss rates against the fixed balance; with the dynamic balance and without teacher as levels."""
    measured = [row for row in context.named("hybrid_forward") if row["mean"]]
    dynamic = next((row for row in measured if not is_fixed(context, row)), None)
    fixed = fixed_rows(context, dynamic or measured[0]) if measured else {}
    none = context.untaught(dynamic or measured[0]) if measured else None
    others = {"dynamic balance": dynamic, "without teacher": none}
    panels = []
    for metric in context.record.metrics:
        name = metric["name"]
        points = sorted((balance, row) for balance, row in fixed.items() if (row["mean"] or {}).get(name) is not None)
        if len(points) < 2:
            continue
        x = np.array([balance for balance, _ in points])
        y = np.array([row["mean"][name] for _, row in points])
        spread = np.array([(row["std"] or {}).get(name) or 0.0 for _, row in points])
        levels = [
            Level(label, row["mean"][name], (row["std"] or {}).get(name))
            for label, row in others.items()
            if row and (row["mean"] or {}).get(name) is not None
        ]
        line = Line("fixed balance", x, y, x, y, spread if spread.any() else None)
        title = f"Miss rate {metric['printed_as']} (%)"
        panels.append(Panel(name, title, [line], None, "fixed balance", levels, None, [float(value) for value in x]))
    if not panels:
        return None
    absent = [row_id for row_id, row in (("hybrid_forward", dynamic), ("baseline", none)) if not (row and row["mean"])]
    caption = "All miss rates: the paper's text does not say which one it plots."
    if any(line.spread is not None for panel in panels for line in panel.lines):
        caption += " Bars and bands: standard deviations over seeds."
    lacks = needed(context, *absent, values=f"method.balance={SWEEP}") if absent else ""
    return f"{caption} {lacks}".strip(), panels


FIGURES: dict[tuple[str, str], Callable[[Context], tuple[str, Sequence[Panel | HeatMaps]] | None]] = {
    ("hybrid_forward", "figure5"): with_and_without_teacher,
    ("hybrid_forward", "figure6"): three_paths,
    ("hybrid_forward", "figure7"): balances_of_teachers,
    ("hybrid_forward", "figure8"): balances_of_backbones,
    ("hybrid_forward", "figure9"): fixed_balances,
    ("kcd", "figure1"): activation_maps,
}
# Paper -> what else its runs show.
EXTRAS: dict[str, Callable[[Context], list[Drawing]]] = {}


def drawings(context: Context) -> list[Drawing]:
    """The figures that the run has the curves for."""
    found = []
    for figure in context.record.figures:
        draw = FIGURES.get((context.record.paper, figure["id"]))
        drawn = draw(context) if draw else None
        if drawn is not None:
            found.append(Drawing(figure, *drawn))
    return found + (EXTRAS[context.record.paper](context) if context.record.paper in EXTRAS else [])


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
