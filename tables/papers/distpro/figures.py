"""Figures 5 and 6 of DistPro: accuracy against the length of the training, and weights over a search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kt.settings import METHODS, defaults
from tables.judging import Context, Missing
from tables.panels import Level, Line, Panel
from tables.papers.distpro.claims import DRAWN, STUDENTS, gains, levels_of, searches
from tables.plotting import Figures, bold, decay_step, step_line


def fast_distillation(context: Context) -> tuple[str, Sequence[Panel]] | None:
    """Figure 5: top-1 of DistPro and ReviewKD against epochs, and where the first reaches the best of the other."""
    panels, reached = [], []
    for student in STUDENTS:
        if len(found := gains(context, student)) < 2:
            continue
        epochs = np.array([*found])
        lines, scores = [], []
        for number, label in enumerate(("DistPro", "ReviewKD")):
            rows = [pair[number] for pair, _ in found.values()]
            scores.append(np.array([row["mean"]["top1"] for row in rows]))
            spread = np.array([(row["std"] or {}).get("top1") or 0.0 for row in rows])
            lines.append(Line(label, epochs, scores[-1], epochs, scores[-1], spread if spread.any() else None))
        panels.append(Panel(student, f"Top-1 of {student} (%)", lines, x_label="epochs", ticks=[*found]))
        ours, theirs = scores
        if ours[0] < theirs[-1] <= ours.max():
            least = np.interp(theirs[-1], np.maximum.accumulate(ours), epochs)
            reached.append(f"{student} after {least:.3g} of {epochs[-1]:g}")
    if not panels:
        return None
    caption = "Both follow the same schedule; at every length the same process is stretched."
    if reached:
        caption += f" DistPro is as good as ReviewKD in the end: {', '.join(reached)} epochs."
    return caption, panels


def searched_process(context: Context) -> tuple[str, Sequence[Panel]] | None:
    """The summed weights of the pathways to each map and their mean logits, against steps of the search."""
    try:
        curves = [*searches(context, f"distpro_{DRAWN}").values()]
    except Missing:
        return None

    def panel(name: str, title: str, value: str, *marks: Level) -> Panel:
        lines = [step_line(f"teacher's map {level}", curves, value + level) for level in levels_of(curves[0])]
        return Panel(name, title, lines, decay_step(curves[0]), x_label="step of the search", levels=marks)

    clip = Level("dropped in retraining up to here", defaults(METHODS["distpro"])["clip"], None)
    caption = (
        "All pathways to a map together, weights summed and logits averaged; single ones are in the search's "
        f"process.pth. {bold(len(curves[0].step), 1)}"
    )
    return caption, [
        panel("process", "Weights over the search", "weight_t"),
        panel("process-logits", "Logits over the search", "logit_t", clip),
    ]


FIGURES: Figures = {"figure5": fast_distillation, "figure6": searched_process}
