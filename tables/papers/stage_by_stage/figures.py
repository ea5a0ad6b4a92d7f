"""What a run of stage by stage shows beside its table: mimic loss and accuracy over all phases, with their borders.

The paper has no such plot; it shows whether each stage has learnt all it can before the next one builds on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kt.store import folder_of, records_file
from tables.curves import Array, read_curve
from tables.judging import Context, Row, count_seeds
from tables.learning import score_line
from tables.panels import Line, Panel
from tables.plotting import Drawing, mean_line

SCORES = ("top1", "ap", "miou")


def _cells(context: Context, row: Row) -> list[tuple[Path, Mapping[str, Any]]]:
    """Records and result of a row's finished cells that have phases."""
    done = [cell["id"] for cell in row["cells"] if cell["status"] == "done"]
    results = {cell_id: context.results.get(cell_id, {}) for cell_id in done}
    return [
        (records_file(folder_of(context.output_root, cell_id)), result)
        for cell_id, result in results.items()
        if result.get("stages")
    ]


def _joined(label: str, lines: Sequence[Line]) -> Line:
    """Lines of successive phases as one, with gaps between them."""

    def join(parts: Sequence[Array]) -> Array:
        return np.concatenate([piece for part in parts for piece in (part, [np.nan])][:-1])

    return Line(
        label,
        join([line.x for line in lines]),
        join([line.y for line in lines]),
        join([line.means_x for line in lines]),
        join([line.means_y for line in lines]),
    )


def _scores(paths: Sequence[Path], start: float) -> Line | None:
    """Scores of the student on the test set in the last phase, mean over seeds."""
    found = (score_line("on the test set", paths, name, start) for name in SCORES)
    return next((line for line in found if line is not None), None)


def phases_of_row(context: Context, row: Row) -> Drawing | None:
    """Mimic loss over the feature phases and what the head reaches in the last one."""
    cells = _cells(context, row)
    if not cells:
        return None
    paths = [path for path, _ in cells]
    stages = cells[0][1]["stages"]
    start, borders, mimic = 0.0, [], []
    for name, parts in stages.items():
        curves = [curve for path in paths if (curve := read_curve(path, name)) is not None]
        if not curves:
            return None
        borders.append((start, f"{name}: {parts[0] if len(parts) == 1 else f'{parts[0]} to {parts[-1]}'}"))
        mimic.append(mean_line("mimic loss", curves, lambda curve: curve.values["loss"], start))
        start += float(np.ceil(curves[0].epoch[-1] - 1e-9))
    final = [curve for path in paths if (curve := read_curve(path)) is not None]
    if not final:
        return None
    short = [(at, text.partition(":")[0]) for at, text in borders]
    ends = [*short, (start, "head"), (start + float(np.ceil(final[0].epoch[-1] - 1e-9)), "")]
    accuracy = "accuracy" if "accuracy" in final[0].values else "loss"
    reached = [mean_line("on training batches", final, lambda curve: curve.values[accuracy], start)]
    scores = _scores(paths, start)
    if scores is not None and accuracy == "accuracy":
        reached.append(scores)
    title = "Accuracy of the head (%)" if accuracy == "accuracy" else "Task loss of neck and heads"
    key = re.sub("[^A-Za-z0-9.]+", "_", row["id"]).strip("_")
    panels = [
        Panel(f"{key}_mimic", "Mimic loss", [_joined("mimic loss", mimic)], borders=ends, log_y=True),
        Panel(f"{key}_{accuracy}", title, reached, borders=ends),
    ]
    if scores is not None and accuracy != "accuracy":
        panels.append(Panel(f"{key}_score", "Score on the test set (%)", [scores], borders=ends))
    ranges = "; ".join(text for _, text in borders)
    caption = f"Phases: {ranges}; then the head. Bold lines are epoch means"
    caption += f", averaged over {count_seeds(len(cells))}." if len(cells) > 1 else "."
    figure = {"id": "phases", "plots": "mimic loss and accuracy over the phases"}
    return Drawing(figure, caption, panels, f"Phases of {row['label']}")


def further(context: Context) -> list[Drawing]:
    """One drawing for each row that was trained stage by stage."""
    found = [phases_of_row(context, row) for row in context.rows if row["method"] == "stagewise"]
    return [drawing for drawing in found if drawing is not None]
