"""What a run of MAKD shows beside its tables; the paper plots none of it.

How far the auxiliary networks follow the student, and which layer of the source network comes to teach which of the
student's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tables.curves import Curve
from tables.judging import Context, Row
from tables.panels import Line, Panel
from tables.plotting import Drawing, bold, decay_epoch, mean_line

METHODS = ("as", "mas", "m2as", "m2a2s")
LOSSES = {
    "loss_match": "matching (student)",
    "loss_align": "alignment (auxiliary networks)",
    "loss_align_source": "alignment on source images",
}
WEIGHT = re.compile("weight_(.+)_([^_]+)")  # of a pair of layers


def rounds(curve: Curve) -> Curve:
    """A curve from the first round on, without the epochs that train the student alone."""
    kept = np.isfinite(curve.values["loss_match"])
    values = {name: values[kept] for name, values in curve.values.items()}
    return Curve(curve.step[kept], curve.epoch[kept], curve.lr[kept], values)


def _line(label: str, curves: Sequence[Curve], name: str) -> Line:
    return mean_line(label, curves, lambda curve: curve.values[name])


def subspaces_of_row(context: Context, row: Row) -> Drawing | None:
    """Losses, what of the student's features stays unexplained, and the weights of the pairs of layers."""
    known = [curve for curve in context.curves(row).values() if "loss_match" in curve.values]
    curves = [found for curve in known if len((found := rounds(curve)).step)]
    if not curves:
        return None
    names, decay = curves[0].values.keys(), decay_epoch(curves[0])
    key = re.sub("[^A-Za-z0-9.]+", "_", row["id"]).strip("_")
    losses = [_line(label, curves, name) for name, label in LOSSES.items() if name in names]
    unexplained = _line("squared error over the features' variance", curves, "unexplained")
    panels = [
        Panel(f"{key}_losses", "Matching and alignment loss", losses, decay, log_y=True),
        Panel(f"{key}_unexplained", "What the auxiliary networks leave unexplained", [unexplained], decay),
    ]
    pairs: dict[str, list[Line]] = {}
    ends: dict[str, float] = {}
    for name in names:
        if pair := WEIGHT.fullmatch(name):
            source, target = pair.groups()
            pairs.setdefault(source, []).append(_line(f"to {target}", curves, name))
            ends[f"{source} to {target}"] = float(np.mean([curve.values[name][-1] for curve in curves]))
    for source, lines in pairs.items():
        panels.append(Panel(f"{key}_{source}", f"Weights from {source}", lines, decay))
    caption = f"From the first round on. {bold(None, len(curves))}"
    if ends:
        most, least = max(ends, key=lambda pair: ends[pair]), min(ends, key=lambda pair: ends[pair])
        caption += (
            " At the start every weight is one; adapted: the last layer behind the auxiliary network. "
            f"At the end {most} counts most ({ends[most]:.3g}) and {least} least ({ends[least]:.3g})."
        )
    figure = {"id": "subspaces", "plots": "losses and weights of pairs of layers over the training"}
    return Drawing(figure, caption, panels, f"Auxiliary subspaces of {row['label']}")


def further(context: Context) -> list[Drawing]:
    """One drawing for each row with auxiliary networks."""
    found = [subspaces_of_row(context, row) for row in context.rows if row["method"] in METHODS]
    return [drawing for drawing in found if drawing is not None]
