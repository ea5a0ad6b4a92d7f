"""Figures 5 to 9 of hybrid forward, drawn from a run's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tables.curves import Curve
from tables.judging import Context, Row, needed
from tables.panels import Level, Line, Panel
from tables.papers.hybrid_forward.claims import PATHS, SWEEP, TEACHERS, fixed_rows, hybrid_rows, is_fixed, middle_steps
from tables.plotting import Figures, bold, decay_epoch, decay_step, mean_line, step_line


def _hybrid(context: Context) -> tuple[Mapping[str, Any], list[Curve]] | None:
    """The first row of hybrid forward that has curves."""
    for row in hybrid_rows(context):
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
    decay = decay_epoch(curves[0])
    loss = (
        mean_line("with teacher (L1 + L2 + L3)", curves, lambda curve: curve.total(PATHS)),
        mean_line("without teacher", without, lambda curve: curve.values["loss"]),
    )
    accuracy = (
        mean_line("with teacher", curves, lambda curve: curve.values["accuracy"]),
        mean_line("without teacher", without, lambda curve: curve.values["accuracy"]),
    )
    panels = [Panel("loss", "Training loss", loss, decay), Panel("accuracy", "Training accuracy (%)", accuracy, decay)]
    return f"With the teacher: {row['label']}. Without: the baseline. {bold(None, len(curves))}", panels


def three_paths(context: Context) -> tuple[str, list[Panel]] | None:
    """Figure 6: training loss and accuracy of the normal path and the two hybrid paths."""
    found = _hybrid(context)
    if found is None or not {"accuracy1", "accuracy2"} <= found[1][0].values.keys():
        return None
    row, curves = found
    decay = decay_epoch(curves[0])
    labels = ("path 1 (starts in the student)", "path 2 (starts in the teacher)", "normal path (the student)")

    def lines(names: Sequence[str]) -> list[Line]:
        pairs = zip(labels, names, strict=True)
        return [mean_line(label, curves, lambda curve, name=name: curve.values[name]) for label, name in pairs]  # type: ignore[misc]

    panels = [
        Panel("loss", "Training loss", lines(PATHS), decay),
        Panel("accuracy", "Training accuracy (%)", lines(("accuracy1", "accuracy2", "accuracy")), decay),
    ]
    return f"The three paths of {row['label']}. {bold(None, len(curves))}", panels


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
    bold_lines = bold(max(len(curve.step) for curve in curves), max(len(each) for _, each in found.values()))
    absent = [row_id for row_id in row_ids if row_id not in found]
    parts = (f"Rows: {labels}.", bold_lines, needed(context, *absent) if absent else "")
    return " ".join(part for part in parts if part)


def balances_of_teachers(context: Context) -> tuple[str, list[Panel]] | None:
    """Figure 7: balance and the student's training loss against steps, for each teacher."""
    names = {f"hybrid_{teacher}": text for teacher, text in TEACHERS.items()}
    found = _balance_curves(context, list(names))
    if not found:
        return None
    decay = decay_step(next(iter(found.values()))[1][0])

    def lines(name: str) -> list[Line]:
        return [step_line(names[row_id], curves, name) for row_id, (_, curves) in found.items()]

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
        return [step_line(str(row["student"]), curves, "balance", steps) for row, curves in found.values()]

    decay = decay_step(next(iter(found.values()))[1][0])
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


FIGURES: Figures = {
    "figure5": with_and_without_teacher,
    "figure6": three_paths,
    "figure7": balances_of_teachers,
    "figure8": balances_of_backbones,
    "figure9": fixed_balances,
}
