"""Figure 1 of knowledge consistent distillation: activation maps of students and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kt.store import evaluation_file, folder_of, read_evaluation
from tables.judging import Context, Row
from tables.panels import HeatMaps
from tables.plotting import Figures

ANALYSIS, MAPS = "channel_overlap", "activation_maps.npz"


def _maps(context: Context, row_id: str) -> dict[str, Any] | None:
    """The average maps that the first finished cell of a row has left: student, other (c, h, w), shown_class."""
    for row in context.named(row_id):
        for path in _paths(context, row):
            with np.load(path) as file:
                return {name: file[name] for name in file.files}
    return None


def _paths(context: Context, row: Row) -> list[Path]:
    folders = [folder_of(context.output_root, cell["id"]) for cell in row["cells"] if cell["status"] == "done"]
    scored = [folder for folder in folders if read_evaluation(folder, ANALYSIS) is not None]
    return [evaluation_file(folder, ANALYSIS).with_name(MAPS) for folder in scored]


def activation_maps(context: Context) -> tuple[str, Sequence[HeatMaps]] | None:
    """Figure 1: average maps of one class in two students, the teacher and the transformed teacher, and differences."""
    teacher, students, moved = (_maps(context, name) for name in ("student_teacher", "two_students", "transformed"))
    if teacher is None or moved is None:
        return None
    flat = {"S1": teacher["student"], "T": teacher["other"], "T(T)": moved["other"]}
    if students is not None:
        flat = {"S1": flat["S1"], "S2": students["other"], "T": flat["T"], "T(T)": flat["T(T)"]}
    pictures = {name: values.reshape(len(values), -1) for name, values in flat.items()}
    pairs = (("T", "S1"), ("T(T)", "S1"), ("S1", "S2"))
    differences = {
        f"{one} - {other}": pictures[one] - pictures[other]
        for one, other in pairs
        if {one, other} <= pictures.keys() and pictures[one].shape == pictures[other].shape
    }
    shown = str(teacher["shown_class"])
    far = ", ".join(f"{name} {np.abs(values).mean():.3g}" for name, values in differences.items())
    caption = (
        f"Average maps of the training images of class {shown} at the last stage, after the ReLU. Every row is one "
        f"channel, its map laid out in a line. T(T): the transformed teacher. Mean absolute differences: {far}."
    )
    panels = [HeatMaps("maps", "Average activations", pictures)]
    if differences:
        panels.append(HeatMaps("differences", "Differences", differences, signed=True))
    return caption, panels


FIGURES: Figures = {"figure1": activation_maps}
