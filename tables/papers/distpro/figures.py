"""Figure 6 of DistPro: how the weights of the pathways to each of the teacher's maps go through a search."""

from __future__ import annotations

from collections.abc import Sequence

from tables.judging import Context, Missing
from tables.papers.distpro.claims import DRAWN, levels_of, searches
from tables.plotting import Figures, Panel, bold, decay_step, step_line


def searched_process(context: Context) -> tuple[str, Sequence[Panel]] | None:
    """The summed weights of the pathways to each map, against steps of the search."""
    try:
        curves = searches(context, f"distpro_{DRAWN}")
    except Missing:
        return None
    lines = [step_line(f"teacher's map {level}", curves, f"weight_t{level}") for level in levels_of(curves[0])]
    caption = (
        f"All pathways to a map together; single ones are in the search's process.pth. {bold(len(curves[0].step), 1)}"
    )
    panel = Panel("process", "Weights over the search", lines, decay_step(curves[0]), x_label="step of the search")
    return caption, [panel]


FIGURES: Figures = {"figure6": searched_process}
