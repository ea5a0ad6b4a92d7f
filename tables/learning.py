"""Learning curves side by side: what the main phases of some rows have recorded, and their scores on the test set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kt.store import read_records
from tables.curves import Array, Curve, read_curve
from tables.panels import COLOURS, Line, Panel
from tables.plotting import Drawing, mean_line

LINES = len(COLOURS)  # a panel's at most
# Records of the training that are plotted, where a run has them, and what they are.
RECORDS = {
    "loss": "Training loss",
    "accuracy": "Training accuracy (%)",
    "balance": "Balance of the hybrid losses",
}
SCORE = "score"
WIDE = 50.0  # times the lowest value


class Learner(NamedTuple):
    """Something that has been trained: what it is called among others of its group, and its records, one a seed."""

    label: str
    records: Sequence[Path]
    group: str = ""


def learning_curves(learners: Sequence[Learner], scores: Mapping[str, str], title: str) -> Drawing | None:
    """Panels of a record each, of so many learners of a group as it has colours for; None if nothing is recorded.

    Args:
        learners: In order.
        scores: Name -> label of the scores on the test set; the first that a learner has is shown.
        title: Of the drawing.
    """
    known = [
        (each, curves)
        for each in learners
        if (curves := [curve for path in each.records if (curve := read_curve(path)) is not None])
    ]
    groups = list(dict.fromkeys(each.group for each, _ in known))
    found: dict[tuple[str, str, str], list[Line]] = {}  # record, its title, group -> lines
    for each, curves in known:
        for record, told in RECORDS.items():
            if all(record in curve.values for curve in curves):
                line = mean_line(each.label, curves, _reader(record))
                found.setdefault((record, told, each.group), []).append(line)
        for name, told in scores.items():
            score = score_line(each.label, each.records, name)
            if score is not None and len(score.x) > 1:
                found.setdefault((SCORE, f"{told} on the test set", each.group), []).append(score)
                break
    panels, counts = [], dict.fromkeys((*RECORDS, SCORE), 0)
    order = [(group, record) for group in groups for record in counts]
    for key in sorted(found, key=lambda key: order.index((key[2], key[0]))):
        record, told, group = key
        lines = found[key]
        for start in range(0, len(lines), LINES):
            counts[record] += 1
            part = f" ({start // LINES + 1})" if len(lines) > LINES else ""
            of = f", {group}" if len(groups) > 1 and group else ""
            some = lines[start : start + LINES]
            wide = record == "loss" and are_wide(some)
            panels.append(Panel(f"{record}_{counts[record]}", told + of + part, some, log_y=wide))
    if not panels:
        return None
    averaged = ", averaged over seeds" if any(len(curves) > 1 for _, curves in known) else ""
    caption = f"Bold lines are epoch means{averaged}."
    return Drawing({"id": "training", "plots": "records of the training"}, caption, panels, title)


def are_wide(lines: Sequence[Line]) -> bool:
    """Whether only a logarithmic axis shows all values: they are positive and far apart."""
    every = np.concatenate([line.y for line in lines])
    every = every[np.isfinite(every)]
    return bool(len(every) and every.min() > 0 and every.max() > WIDE * every.min())


def _reader(record: str) -> Callable[[Curve], Array]:
    return lambda curve: curve.values[record]


def score_line(label: str, records: Sequence[Path], name: str, start: float = 0.0) -> Line | None:
    """A score on the test set in the main phase, after `start` epochs of others, mean over seeds; None without one."""
    found = []
    for path in records:
        rows = [row for row in read_records(path, "eval") if row["phase"] == "train"] if path.exists() else []
        found.append({row["epoch"]: row[name] for row in rows if isinstance(row.get(name), int | float)})
    epochs = sorted(set.intersection(*(set(each) for each in found))) if found else []
    if not epochs:
        return None
    x, y = np.array(epochs, dtype=float), np.array([np.mean([each[epoch] for each in found]) for epoch in epochs])
    return Line(label, start + x, y, start + x, y)
