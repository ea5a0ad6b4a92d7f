"""Claims as code: each judge looks at this run's results and curves and says `holds`, `fails` or `unknown`, and why."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Verdict = tuple[str, str]
HOLDS, FAILS, UNKNOWN = "holds", "fails", "unknown"


class Missing(Exception):
    """A judge lacks something; the message says what."""


@dataclass
class Context:
    """What a judge may look at: the collected table and the cells' records."""

    table: Mapping[str, Any]
    output_root: Path

    def row(self, method: str) -> Mapping[str, Any]:
        """The first student row of a method with results."""
        for row in self.table["rows"]:
            if row["method"] == method and row["role"] != "teacher":
                if not row["mean"]:
                    raise Missing(f"row {row['id']} has no results")
                return row
        raise Missing(f"there is no row of method {method}")

    def epochs(self, method: str) -> list[dict[str, float]]:
        """Epoch means of every scalar of the main phase, over all seeds of a method that are done."""
        per_cell = []
        for cell in self.row(method)["cells"]:
            if cell["status"] == "done":
                per_cell.append(epoch_means(self.output_root / "cells" / cell["id"] / "metrics.jsonl"))
        if not per_cell or not per_cell[0]:
            raise Missing(f"row {method} has no recorded steps")
        length = min(len(epochs) for epochs in per_cell)
        return [
            {key: statistics.fmean(epochs[i][key] for epochs in per_cell) for key in per_cell[0][i]}
            for i in range(length)
        ]

    def milestone(self, method: str) -> int:
        """Number of epochs before the first drop of the learning rate (a warm-up only rises)."""
        rates = [epoch["lr"] for epoch in self.epochs(method)]
        for i in range(1, len(rates)):
            if rates[i] < rates[i - 1] * 0.999:
                # The epoch of a drop within it belongs to neither side.
                return i
        raise Missing("the learning rate never drops")


def epoch_means(path: Path) -> list[dict[str, float]]:
    """Means of the main phase's per-step scalars over each epoch of a `metrics.jsonl`."""
    epochs: dict[int, list[dict[str, float]]] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        row = json.loads(line)
        if row["kind"] == "train" and row["phase"] == "train":
            epochs.setdefault(math.ceil(row["epoch"] - 1e-9), []).append(row)
    skipped = {"kind", "phase", "step", "epoch", "images_per_second"}
    return [
        {key: statistics.fmean(row[key] for row in rows) for key in rows[0] if key not in skipped}
        for _, rows in sorted(epochs.items())
    ]


def spread(context: Context, row: Mapping[str, Any], metric: str) -> float | None:
    """Half of the interval within which a row's mean may as well lie, in the metric's unit.

    Over several seeds twice the standard error; for one seed twice the binomial standard error of its test set.
    """
    values = [cell["metrics"][metric] for cell in row["cells"] if metric in cell["metrics"]]
    if len(values) > 1:
        return 2 * statistics.stdev(values) / math.sqrt(len(values))
    for cell in row["cells"]:
        path = context.output_root / "cells" / cell["id"] / "result.json"
        if path.exists() and (size := json.loads(path.read_text()).get("test_size")):
            share = values[0] / 100
            return 200 * math.sqrt(max(share * (1 - share), 1e-9) / size)
    return None


def exceeds(context: Context, better: Mapping[str, Any], worse: Mapping[str, Any], metric: str) -> Verdict:
    """Whether one row's mean lies above another's by more than both spreads allow."""
    a, b = better["mean"][metric], worse["mean"][metric]
    text = f"{better['label']} {a:.2f} against {worse['label']} {b:.2f} ({metric})"
    sides = [spread(context, row, metric) for row in (better, worse)]
    noise = math.hypot(*(side or 0.0 for side in sides))
    if abs(a - b) <= noise:
        return UNKNOWN, f"{text}: the difference lies within the spread of {noise:.2f}"
    return (HOLDS if a > b else FAILS), text


JUDGES: dict[tuple[str, str], Callable[[Context], Verdict]] = {}


def judge_of(paper: str, claim: str) -> Callable[[Callable[[Context], Verdict]], Callable[[Context], Verdict]]:
    """Registers a judge."""

    def register(function: Callable[[Context], Verdict]) -> Callable[[Context], Verdict]:
        JUDGES[paper, claim] = function
        return function

    return register


def judge(paper: str, claim: Mapping[str, Any], table: Mapping[str, Any], output_root: Path) -> dict[str, str]:
    """`{verdict, evidence}` of one claim."""
    function = JUDGES.get((paper, claim["id"]))
    if function is None:
        return {"verdict": UNKNOWN, "evidence": "this project does not judge the claim yet"}
    try:
        verdict, evidence = function(Context(table, output_root))
    except Missing as missing:
        verdict, evidence = UNKNOWN, str(missing)
    return {"verdict": verdict, "evidence": evidence}


@judge_of("hybrid_forward", "c1")
def _hybrid_beats_all(context: Context) -> Verdict:
    ours = context.row("hybrid_forward")
    verdicts = [exceeds(context, ours, context.row(method), "top1") for method in ("kd", "at", "ft", "ab")]
    text = "; ".join(evidence for _, evidence in verdicts)
    found = {verdict for verdict, _ in verdicts}
    return (FAILS if FAILS in found else UNKNOWN if UNKNOWN in found else HOLDS), text


@judge_of("hybrid_forward", "c2")
def _summed_loss_is_higher(context: Context) -> Verdict:
    taught, alone = context.epochs("hybrid_forward"), context.epochs("none")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(taught, alone, strict=False)]
    below = [i + 1 for i, (a, b) in enumerate(pairs) if a <= b]
    text = f"summed loss {pairs[0][0]:.2f} against {pairs[0][1]:.2f} in the first epoch, "
    text += f"{pairs[-1][0]:.2f} against {pairs[-1][1]:.2f} in the last"
    return (FAILS, f"{text}; not higher in epochs {below}") if below else (HOLDS, text)


@judge_of("hybrid_forward", "c3")
def _accuracy_overtakes_after_the_first_decay(context: Context) -> Verdict:
    taught, alone = context.epochs("hybrid_forward"), context.epochs("none")
    border = context.milestone("hybrid_forward")
    gaps = [a["accuracy"] - b["accuracy"] for a, b in zip(taught, alone, strict=False)]
    if border >= len(gaps):
        raise Missing("no epoch after the first learning-rate decay")
    before, after = statistics.fmean(gaps[:border]), statistics.fmean(gaps[border:])
    text = f"training accuracy with minus without teacher: {before:+.2f} before the first decay, {after:+.2f} after it"
    return (HOLDS if before < 0 < after else FAILS), text


@judge_of("hybrid_forward", "c4")
def _hybrid_paths_learn_first(context: Context) -> Verdict:
    epochs = context.epochs("hybrid_forward")[: context.milestone("hybrid_forward")]
    losses = [statistics.fmean(epoch[key] for epoch in epochs) for key in ("l1", "l2", "l3")]
    hits = [statistics.fmean(epoch[key] for epoch in epochs) for key in ("accuracy1", "accuracy2", "accuracy")]
    text = "before the first decay: L1 {:.3f}, L2 {:.3f}, L3 {:.3f}; ".format(*losses)
    text += "accuracy {:.1f}, {:.1f}, {:.1f}".format(*hits)
    return (HOLDS if max(losses[:2]) < losses[2] and min(hits[:2]) > hits[2] else FAILS), text


@judge_of("hybrid_forward", "c5")
def _plain_path_lies_between(context: Context) -> Verdict:
    last = context.epochs("hybrid_forward")[-1]
    l1, l2, l3 = last["l1"], last["l2"], last["l3"]
    text = f"last epoch: L1 {l1:.3f}, L2 {l2:.3f}, L3 {l3:.3f}"
    return (HOLDS if min(l1, l2) < l3 < max(l1, l2) else FAILS), text


@judge_of("hybrid_forward", "c6")
def _deeper_is_not_always_lower(context: Context) -> Verdict:
    # Path 1 has 46 layers, the plain student 28 and path 2 has 32: were deeper always lower, L1 < L2 < L3.
    row = context.row("hybrid_forward")
    if (row["teacher"], row["student"]) != ("resnet50", "mobilenet_v1"):
        raise Missing("the order of path depths is known for ResNet-50 and MobileNet-v1")
    last = context.epochs("hybrid_forward")[-1]
    order = sorted(("l1", "l2", "l3"), key=lambda key: last[key])
    text = "last epoch, by rising loss: " + " < ".join(f"{key.upper()} {last[key]:.3f}" for key in order)
    return (FAILS if order == ["l1", "l2", "l3"] else HOLDS), f"{text}; depths are 46, 32 and 28 layers"
