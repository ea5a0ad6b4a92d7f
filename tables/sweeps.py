"""Renders a sweep without a table: its points by swept keys, scores against swept numbers, and training curves."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kt.errors import UserError
from kt.files import sealed, write_text
from kt.store import folder_of, read_evaluation, read_results
from tables.cell_page import write_cell_pages
from tables.collect import measured_row, warnings_of
from tables.figures import write_drawings
from tables.folders import CONTENT, ROWS, rendering, stored_rows
from tables.learning import LINES, Learner, learning_curves
from tables.overview import write_overview
from tables.pages import SWEEPS, facts_of, link_to_overview, linked_cells, pair, template
from tables.panels import Level, Line, Panel
from tables.plotting import Drawing
from tables.records import all_tables, metric_label
from tables.render import (
    as_csv,
    as_json,
    best_of,
    done_records,
    escape_markdown,
    heading,
    markdown_grid,
    ours,
    own_command,
    shown_number,
    spread_notes,
)

Json = dict[str, Any]
Row = Mapping[str, Any]

BANNER = "These numbers belong to no table of a paper: nothing printed stands beside them."
NEEDED = "needed"  # the role of cells that are no points of the sweep
PLOTTED = 4  # scores against swept numbers at most


def write_sweep(
    name: str,
    keys: Sequence[str],
    points: Sequence[Row],
    output_root: str | os.PathLike[str],
    command: str | None = None,
) -> Path:
    """Collects and renders a sweep into `<output_root>/sweeps/<name>/`.

    Args:
        name: The sweep's name.
        keys: The keys that were swept, `method` for the choice of the method itself; seeds are averaged.
        points: Rows as `tables.collect.collect` takes them, whose axes are the keys that they have.
        output_root: Where `cells/` is.
        command: What made the results; by default this process's command line if it is a run.

    Returns:
        The folder.

    Raises:
        NotWritten: The folder cannot be written.
    """
    command = command or own_command()
    folder = Path(output_root) / SWEEPS / name
    sweep = collect_sweep(name, keys, points, output_root)
    stored = {"keys": list(keys), "points": list(points), "command": command}
    with rendering(folder, as_markdown(sweep)):
        write_cell_pages(output_root, (cell["id"] for row in sweep["rows"] for cell in row["cells"]))
        plots = write_drawings(_drawings(sweep, output_root), folder)
        page = _as_html(sweep, output_root, folder, plots, command)
        texts = {
            "table.csv": as_csv(sweep),
            "index.html": page,
            CONTENT: as_json(sealed(sweep)),
            ROWS: as_json(sealed(stored)),
        }
        for file, text in texts.items():
            write_text(folder / file, text)
    with contextlib.suppress(OSError):  # of all results, among which it stands without being listed
        write_overview(output_root)
    return folder


def stored_points(name: str, output_root: Path) -> Json:
    """What `write_sweep` was last given for a sweep.

    Raises:
        UserError: There is no such sweep.
    """
    path = output_root / SWEEPS / name / ROWS
    stored = stored_rows(path.parent) if Path(name).name == name else None
    if stored is None or not {"keys", "points"} <= stored.keys():
        known = ", ".join(sorted(each.parent.name for each in path.parent.parent.glob(f"*/{ROWS}"))) or "none"
        raise UserError(f"{name}: there is no such sweep in {path.parent.parent}; it has {known}")
    return stored


def render_again(name: str, output_root: Path) -> Path:
    """Renders a sweep from the results that there are now; returns its folder.

    Raises:
        UserError: There is no such sweep.
        NotWritten: The folder cannot be written.
    """
    stored = stored_points(name, output_root)
    return write_sweep(name, stored["keys"], stored["points"], output_root, stored.get("command"))


def collect_sweep(name: str, keys: Sequence[str], points: Sequence[Row], output_root: str | os.PathLike[str]) -> Json:
    """The content of a sweep's `table.json`: sweep, keys, banner, metrics, rows and warnings."""
    ids = {cell["id"] for point in points for cell in point["cells"]}
    results = read_results(output_root, ids)
    scores = []
    for point in points:
        for cell in point["cells"]:
            result, asked = results.get(cell["id"]), point.get("evaluation")
            content = read_evaluation(folder_of(output_root, cell["id"]), asked) if asked else result
            if content is not None:
                own = (results.get(cell["id"]) or {}).get("labels") or {}
                scores.append((content.get("metrics", content), {**own, **(content.get("labels") or {})}))
    metrics = _metrics(scores)
    names = [metric["name"] for metric in metrics]
    rows: list[Json] = []
    for point in points:
        axes = {key: point["axes"].get(key) for key in keys}
        rows.append({**measured_row(point, names, output_root, results), "axes": axes})
    found = {"sweep": name, "keys": list(keys), "banner": BANNER, "metrics": metrics, "rows": rows}
    return {**found, "warnings": warnings_of(rows)}


def _metrics(scores: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]]) -> list[Json]:
    """The metrics that cells give, in their order, as the papers' tables describe those of the same names."""
    printed = {metric["name"]: metric for record in all_tables() for metric in record.metrics}
    found: dict[str, Json] = {}
    for metrics, labels in scores:
        for name, value in metrics.items():
            if isinstance(value, int | float) and name not in found:
                known = printed.get(name, {})
                found[name] = {
                    "name": name,
                    "label": labels.get(name) or metric_label(name),
                    "unit": known.get("unit"),
                    "better": known.get("better", "higher"),
                    "decimals": 2,
                    "spread": None,
                }
    return list(found.values())


def place(row: Row, keys: Sequence[str]) -> list[str]:
    """What stands in a row's columns of keys: its values, or what it was needed as."""
    values = [str(row["axes"][key] or "") for key in keys] or [str(row["method"])]
    return [row["label"], *values[1:]] if row["role"] == NEEDED else values


def best_points(sweep: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(row id, metric) of the best points."""
    best = set()
    points = [row for row in sweep["rows"] if row["role"] != NEEDED]
    for metric in sweep["metrics"]:
        name = metric["name"]
        scores = {row["id"]: row["mean"][name] for row in points if (row["mean"] or {}).get(name) is not None}
        best |= {(row_id, name) for row_id in best_of(scores, metric)}
    return best


def as_markdown(sweep: Json) -> str:
    """The points by swept keys."""
    best = best_points(sweep)
    heads = [*(sweep["keys"] or ["point"]), "networks", *map(heading, sweep["metrics"]), "seeds"]
    lines = [[*map(escape_markdown, heads)]]
    for row in sweep["rows"]:
        numbers = []
        for metric in sweep["metrics"]:
            text = ours(row, metric)
            numbers.append(f"**{text}**" if (row["id"], metric["name"]) in best else text)
        words = map(escape_markdown, (*place(row, sweep["keys"]), pair(row)))
        lines.append([*words, *numbers, ", ".join(str(cell["seed"]) for cell in row["cells"])])
    grid = markdown_grid(lines, left=len(lines[0]) - len(sweep["metrics"]) - 1)
    notes = map(escape_markdown, spread_notes(sweep))
    parts = [f"# {sweep['sweep']}", "", f"**{sweep['banner']}**", "", *grid, "", *notes]
    return "\n".join(parts).rstrip() + "\n"


def _as_html(
    sweep: Json, output_root: str | os.PathLike[str], folder: Path, plots: Sequence[Json], command: str | None
) -> str:
    best = best_points(sweep)
    rows = [
        {
            **row,
            "numbers": [shown_number(row, metric, best) for metric in sweep["metrics"]],
            "cells": linked_cells(row, output_root, folder),
            "place": place(row, sweep["keys"]),
        }
        for row in sweep["rows"]
    ]
    return template("sweep.html.j2").render(
        sweep=sweep,
        rows=rows,
        headings=[heading(metric) for metric in sweep["metrics"]],
        facts=facts_of(sweep["rows"], output_root),
        notes=spread_notes(sweep),
        plots=plots,
        command=command,
        up=link_to_overview(output_root, folder),
    )


# Curves


def number_of(text: str | None) -> float | None:
    """A swept value as a number, or None for a word."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _named(row: Row, keys: Sequence[str]) -> str:
    """A point by some of its keys."""
    return ", ".join(f"{key.rpartition('.')[2]}={row['axes'][key]}" for key in keys if row["axes"][key] is not None)


def _drawings(sweep: Json, output_root: str | os.PathLike[str]) -> list[Drawing]:
    found = [_against(sweep, key) for key in sweep["keys"]]
    learners = [
        Learner(_named(row, sweep["keys"]) or str(row["method"]), done_records(row, output_root))
        for row in sweep["rows"]
        if row["role"] != NEEDED
    ]
    scores = {metric["name"]: heading(metric)[:-2] for metric in sweep["metrics"]}
    found.append(learning_curves(learners, scores, "Training, point by point"))
    return [drawing for drawing in found if drawing is not None]


def _against(sweep: Json, key: str) -> Drawing | None:
    """Scores against a key whose values are numbers, with its other values as levels."""
    others = [other for other in sweep["keys"] if other != key]
    having = [row for row in sweep["rows"] if row["axes"][key] is not None]
    ticks = sorted({value for row in having if (value := number_of(row["axes"][key])) is not None})
    if len(ticks) < 2:
        return None
    short = key.rpartition(".")[2]
    panels, cut = [], False
    for metric in sweep["metrics"][:PLOTTED]:
        name = metric["name"]
        lines, levels = [], []
        for group, rows in _grouped(having, others).items():
            measured = [row for row in rows if (row["mean"] or {}).get(name) is not None]
            points = [(value, row) for row in measured if (value := number_of(row["axes"][key])) is not None]
            if len(points) > 1:
                lines.append(_line(group or short, sorted(points, key=lambda point: point[0]), name))
            for row in measured:
                if number_of(row["axes"][key]) is None:
                    label = f"{short}={row['axes'][key]}" + (f", {group}" if group else "")
                    levels.append(Level(label, row["mean"][name], (row["std"] or {}).get(name)))
        for row in sweep["rows"]:
            if row["role"] == NEEDED and (row["mean"] or {}).get(name) is not None:
                levels.append(Level(row["label"], row["mean"][name], None))
        if lines:
            cut |= len(lines) + len(levels) > LINES
            lines, levels = lines[:LINES], levels[: max(0, LINES - len(lines))]
            file = f"{key}_{name}".replace(".", "_")
            panels.append(Panel(file, heading(metric), lines, x_label=key, levels=levels, ticks=ticks))
    if not panels:
        return None
    caption = "Each point is one line of the table."
    if cut:
        caption += f" The first {LINES} lines of each plot are drawn."
    if any(line.spread is not None for panel in panels for line in panel.lines):
        caption += " Bars and bands: standard deviations over seeds."
    return Drawing({"id": "score", "plots": f"scores against {key}"}, caption, panels, f"Scores against {key}")


def _grouped(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[Row]]:
    """Rows with the same values of some keys, by these in words."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_named(row, keys), []).append(row)
    return groups


def _line(label: str, points: Sequence[tuple[float, Row]], metric: str) -> Line:
    x = np.array([value for value, _ in points])
    y = np.array([row["mean"][metric] for _, row in points])
    spread = np.array([(row["std"] or {}).get(metric) or 0.0 for _, row in points])
    return Line(label, x, y, x, y, spread if spread.any() else None)
