"""Which figures a run has the curves for, lines of means over seeds, and a picture's data as CSV."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tables import papers
from tables.curves import Array, Curve, downsample, epoch_means, first_decay
from tables.judging import Context, count_seeds
from tables.panels import HeatMaps, Line, Panel

BOLD_POINTS = 60  # of a bold line over steps


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


# Data


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
