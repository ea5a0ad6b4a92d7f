"""Pictures of activation maps: Figure 1 of knowledge consistent distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kt.store import folder_of
from tables.claims import Context, Row
from tables.pictures import export, style_of

Array = np.ndarray
MAPS = "activation_maps.npz"


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


def _maps(context: Context, row_id: str) -> dict[str, Any] | None:
    """The average maps that the first finished cell of a row has left: student, other (c, h, w), shown_class."""
    for row in context.named(row_id):
        for path in _paths(context, row):
            with np.load(path) as file:
                return {name: file[name] for name in file.files}
    return None


def _paths(context: Context, row: Row) -> list[Path]:
    folders = [folder_of(context.output_root, cell["id"]) for cell in row["cells"] if cell["status"] == "done"]
    return [path for folder in folders if (path := folder / "evaluations" / MAPS).exists()]


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


def plot_maps(panel: HeatMaps) -> tuple[bytes, str]:
    """The matrices as PNG and as SVG to set into a page."""
    import matplotlib  # late, as in tables.figures
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
