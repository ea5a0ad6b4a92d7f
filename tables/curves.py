"""The curves that papers plot, as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables.claims import Context, Missing


def draw(table: Mapping[str, Any], output_root: Path) -> list[tuple[str, str]]:
    """`(caption, svg)` of every figure that the results allow."""
    context = Context(table, output_root)
    drawn = []
    for caption, series in _figures(context):
        drawn.append((caption, _svg(series)))
    return drawn


def _figures(context: Context) -> list[tuple[str, dict[str, dict[str, list[float]]]]]:
    if context.table["paper"] != "hybrid_forward":
        return []
    figures = []
    try:
        taught = context.epochs("hybrid_forward")
    except Missing:
        return []
    try:
        alone = context.epochs("none")
        loss = {"with teacher (L1 + L2 + L3)": _of(taught, "loss"), "without teacher": _of(alone, "loss")}
        hits = {"with teacher": _of(taught, "accuracy"), "without teacher": _of(alone, "accuracy")}
        figures.append(("Figure 5: training with and without the teacher", {"loss": loss, "accuracy (%)": hits}))
    except Missing:
        pass
    paths = (("hybrid path 1", "1"), ("hybrid path 2", "2"), ("plain student", "3"))
    loss = {name: _of(taught, f"l{number}") for name, number in paths}
    keys = ("accuracy1", "accuracy2", "accuracy")
    hits = {name: _of(taught, key) for (name, _), key in zip(paths, keys, strict=True)}
    figures.append(("Figure 6: the three forward paths", {"loss": loss, "accuracy (%)": hits}))
    return figures


def _of(epochs: list[dict[str, float]], key: str) -> list[float]:
    return [epoch[key] for epoch in epochs]


def _svg(panels: Mapping[str, Mapping[str, list[float]]]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, (label, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, values in series.items():
            marker = "o" if len(values) < 30 else None
            axes.plot(range(1, len(values) + 1), values, label=name, marker=marker, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"training {label}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    content = buffer.getvalue()
    return content[content.index("<svg") :]
