"""The papers' claims as code: each is judged from the results and training curves of one run of a table.

Here are what all judges share and those of hybrid forward's Table 1; `tables.gap_claims` has those of its other tables.
A verdict is `holds`, `fails` or `unknown`; what lies within the spread of the seeds is unknown. With one seed the
spread of an accuracy is two binomial standard errors of the test set, that of a curve two standard errors over its
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kt.store import folder_of, records_file
from tables.curves import (
    FAILS,
    HOLDS,
    UNKNOWN,
    Curve,
    Gap,
    all_hold,
    any_holds,
    first_decay,
    gap,
    gaps_by_epoch,
    read_curve,
    signed,
)
from tables.records import TableRecord

Row = Mapping[str, Any]
Verdict = tuple[str, str]

PATHS = ("l1", "l2", "l3")
PATH_NAMES = {"l1": "path 1", "l2": "path 2", "l3": "the normal path"}
PATH_ACCURACIES = {"l1": "accuracy1", "l2": "accuracy2", "l3": "accuracy"}


class Missing(Exception):
    """A claim cannot be judged yet; the message says what it needs."""


@dataclass(frozen=True)
class Context:
    """What a judge sees.

    Attributes:
        record: The printed table.
        rows: The collected rows, as in `table.json`.
        results: Cell id -> content of its `result.json`, done cells only.
        output_root: Where the cells live.
    """

    record: TableRecord
    rows: Sequence[Row]
    results: Mapping[str, Mapping[str, Any]]
    output_root: Path

    def curve(self, cell_id: str) -> Curve | None:
        """A cell's training curve, if it left one."""
        return read_curve(records_file(folder_of(self.output_root, cell_id)))

    def curves(self, row: Row) -> dict[int, Curve]:
        """Seed -> curve of a row's finished cells."""
        found = {cell["seed"]: self.curve(cell["id"]) for cell in row["cells"] if cell["status"] == "done"}
        return {seed: curve for seed, curve in found.items() if curve is not None}

    def result(self, row: Row) -> Mapping[str, Any]:
        """One finished cell's result; empty if there is none."""
        return next((self.results[cell["id"]] for cell in row["cells"] if cell["id"] in self.results), {})

    def hybrid_rows(self) -> list[Row]:
        """The rows of hybrid forward, one per value of the axes."""
        return [row for row in self.rows if row["method"] == "hybrid_forward"]

    def named(self, row_id: str) -> list[Row]:
        """The rows of that id in the table's file, one per value of the axes."""
        return [row for row in self.rows if row["id"].partition("[")[0] == row_id]

    def untaught(self, row: Row) -> Row | None:
        """The student without a teacher that a row is to be compared with."""
        return next((other for other in self.rows if other["role"] == "baseline" and agree(row, other)), None)


def agree(row: Row, other: Row) -> bool:
    """Whether two rows have the same values of the axes that both have."""
    return all(other["axes"][key] == value for key, value in row["axes"].items() if key in other["axes"])


def undone(row: Row, *metrics: str) -> str | None:
    """Which seeds of a row are not done or lack one of some metrics; None if all is there."""
    lacking = []
    for cell in row["cells"]:
        absent = [name for name in metrics if cell["metrics"].get(name) is None]
        if cell["status"] != "done":
            lacking.append(f"seed {cell['seed']} {cell['status']}")
        elif absent:
            lacking.append(f"seed {cell['seed']} without a finite {' and '.join(absent)}")
    if not row["cells"]:
        return f"{row['label']} (no cell)"
    return f"{row['label']} ({', '.join(lacking)})" if lacking else None


Judge = Callable[[Context], Verdict]
JUDGES: dict[tuple[str, str], Judge] = {}


def register(paper: str, claim: str) -> Callable[[Judge], Judge]:
    """Makes a function the judge of a paper's claim."""

    def add(judge: Judge) -> Judge:
        JUDGES[paper, claim] = judge
        return judge

    return add


def judge_all(context: Context) -> list[dict[str, Any]]:
    """The verdicts on a table's claims: id, claim, where, check, holds_in_paper, verdict, evidence."""
    found = []
    for claim in context.record.claims:
        judge = JUDGES.get((context.record.paper, claim["id"]))
        try:
            verdict, evidence = judge(context) if judge else (UNKNOWN, "No judge yet.")
        except Missing as missing:
            verdict, evidence = UNKNOWN, str(missing)
        shown = {key: claim[key] for key in ("id", "claim", "where", "check", "holds_in_paper")}
        found.append({**shown, "verdict": verdict, "evidence": evidence[:1].upper() + evidence[1:]})
    return found


def over_variants(rows: Sequence[Row], judge_row: Callable[[Row], Verdict]) -> Verdict:
    """A verdict over the variants of a row: theirs if they agree, else it depends on the axes and is unknown."""
    if not rows:
        raise Missing("Needs the row hybrid_forward.")
    found: list[Verdict] = []
    for row in rows:
        try:
            found.append(judge_row(row))
        except Missing as missing:
            found.append((UNKNOWN, str(missing)))
    if len(found) == 1:
        return found[0]
    verdicts = {verdict for verdict, _ in found}
    evidence = " ".join(f"{row['label']}: {text}" for row, (_, text) in zip(rows, found, strict=True))
    return (verdicts.pop() if len(verdicts) == 1 else UNKNOWN), evidence


def count_seeds(count: int) -> str:
    """`one seed`, `3 seeds`."""
    return "one seed" if count == 1 else f"{count} seeds"


def sampling_noise(context: Context, row: Row, metric: str) -> tuple[float | None, str]:
    """What a row's mean may differ by chance, in percent, and where that is known from."""
    values = [cell["metrics"][metric] for cell in row["cells"]]
    if len(values) > 1:
        return float(np.std(values, ddof=1)), f"the spread of {count_seeds(len(values))}"
    size = context.result(row).get("test_size")
    if not size:
        return None, "one seed, spread unknown"
    share = values[0] / 100
    return 200 * math.sqrt(share * (1 - share) / size), f"one seed, two standard errors of {size} test images"


@register("hybrid_forward", "c1")
def beats_all_students(context: Context) -> Verdict:
    """Top-1 of hybrid forward against every other student row."""

    def judge_row(row: Row) -> Verdict:
        students = [other for other in context.rows if other["role"] != "teacher" and agree(row, other)]
        others = [other for other in students if other["method"] != "hybrid_forward"]
        wanted = {str(printed["method"]) for printed in context.record.rows if printed["role"] != "teacher"}
        absent = sorted(wanted - {str(other["method"]) for other in students})
        lacking = [text for other in (row, *others) if (text := undone(other, "top1"))]
        lacking += [f"{name} (not in this run)" for name in absent]
        if lacking:
            raise Missing(f"Needs {'; '.join(lacking)}.")
        own, source = sampling_noise(context, row, "top1")
        verdicts, closest = [], None
        for other in others:
            difference = row["mean"]["top1"] - other["mean"]["top1"]
            noise, other_source = sampling_noise(context, other, "top1")
            known = own is not None and noise is not None
            margin = math.hypot(own or 0.0, noise or 0.0) if known else 0.0
            verdicts.append(Gap(difference, margin, 1).verdict)
            if closest is None or difference < closest[1]:
                closest = (other, difference, margin, source if own is None or noise is not None else other_source)
        if closest is None:
            raise Missing("Needs other student rows.")
        other, difference, margin, source = closest
        evidence = (
            f"top-1 {show_value(row, 'top1', 2)} against {show_value(other, 'top1', 2)} of the best other row, "
            f"{other['label']}: {signed(difference)} points ({source}{f': {margin:.2f}' if margin else ''})."
        )
        return all_hold(verdicts), evidence

    return over_variants(context.hybrid_rows(), judge_row)


def show_value(row: Row, metric: str, decimals: int) -> str:
    """A row's mean and its spread over seeds: `60.20 ± 0.10`."""
    spread = (row["std"] or {}).get(metric)
    return f"{row['mean'][metric]:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


def _pairs(context: Context, row: Row) -> list[tuple[Curve, Curve]]:
    """Curves with and without the teacher, paired by seed."""
    other = context.untaught(row)
    lacking = [text for found in (row, other) if found is not None and (text := undone(found))]
    if other is None:
        lacking.append("baseline (not in this run)")
    if lacking or other is None:
        raise Missing(f"Needs {'; '.join(lacking)}.")
    taught, untaught = context.curves(row), context.curves(other)
    pairs = [(curve, untaught[seed]) for seed, curve in taught.items() if seed in untaught]
    if not pairs:
        raise Missing("Needs the training records of both rows with the same seed.")
    demand(pairs[0][0], (*PATHS, "accuracy"))
    demand(pairs[0][1], ("loss", "accuracy"))
    return pairs


def _path_curves(context: Context, row: Row) -> list[Curve]:
    """Curves of hybrid forward, one per seed."""
    if text := undone(row):
        raise Missing(f"Needs {text}.")
    curves = list(context.curves(row).values())
    if not curves:
        raise Missing(f"Needs the training records of {row['label']}.")
    demand(curves[0], (*PATHS, *PATH_ACCURACIES.values()))
    return curves


def demand(curve: Curve, names: Sequence[str]) -> None:
    lacking = [name for name in names if name not in curve.values]
    if lacking:
        raise Missing(f"Needs {', '.join(lacking)} in the training records.")


def _decay(context: Context, row: Row, curve: Curve) -> int:
    """Index of the first step after the first learning-rate decay."""
    schedule = context.result(row).get("config", {}).get("schedule", {})
    found = first_decay(curve) if schedule.get("policy", "step") == "step" else None
    if found is None:
        raise Missing("The learning rate never drops by a step in this run, so there is no first decay.")
    return found


def _summed(curve: Curve) -> np.ndarray:
    return curve.total(PATHS)


@register("hybrid_forward", "c2")
def loss_above_untaught(context: Context) -> Verdict:
    """L1 + L2 + L3 against the loss without a teacher, in every epoch."""

    def judge_row(row: Row) -> Verdict:
        pairs = _pairs(context, row)
        gaps = gaps_by_epoch(pairs, _summed, lambda curve: curve.values["loss"])
        lowest = min(gaps, key=lambda epoch: gaps[epoch].mean)
        above = sum(each.mean > 0 for each in gaps.values())
        evidence = (
            f"the mean of L1 + L2 + L3 lies above the loss without teacher in {above} of {len(gaps)} epochs; smallest "
            f"difference {gaps[lowest].text(3)} in epoch {lowest} ({count_seeds(gaps[lowest].seeds)})."
        )
        return all_hold([each.verdict for each in gaps.values()]), evidence

    return over_variants(context.hybrid_rows(), judge_row)


@register("hybrid_forward", "c3")
def accuracy_overtakes_after_decay(context: Context) -> Verdict:
    """Training accuracy with minus without the teacher: negative before the first decay, positive at the end."""

    def judge_row(row: Row) -> Verdict:
        pairs = _pairs(context, row)
        curve = pairs[0][0]
        decay = _decay(context, row, curve)
        gaps = gaps_by_epoch(pairs, lambda taught: taught.values["accuracy"], lambda plain: plain.values["accuracy"])
        decayed = int(curve.epoch_index[decay])
        earlier = [epoch for epoch in gaps if epoch < decayed]
        if not earlier or max(gaps) < decayed:
            raise Missing("Needs at least one whole epoch before and one after the first decay.")
        before, end = gaps[earlier[-1]], gaps[max(gaps)]
        evidence = (
            f"training accuracy with minus without teacher is {before.text()} points in epoch {earlier[-1]}, the last "
            f"before the first decay, and {end.text()} in the last epoch, {max(gaps)} ({count_seeds(end.seeds)})."
        )
        behind = {HOLDS: FAILS, FAILS: HOLDS, UNKNOWN: UNKNOWN}[before.verdict]
        return all_hold([behind, end.verdict]), evidence

    return over_variants(context.hybrid_rows(), judge_row)


@register("hybrid_forward", "c4")
def hybrid_paths_lead_before_decay(context: Context) -> Verdict:
    """L1, L2 < L3 and their accuracies above the normal path's, over all steps before the first decay."""

    def judge_row(row: Row) -> Verdict:
        curves = _path_curves(context, row)
        decay = _decay(context, row, curves[0])
        verdicts, texts = [], []
        for path in PATHS[:2]:
            lower = gap([curve.values["l3"][:decay] - curve.values[path][:decay] for curve in curves])
            accuracies = PATH_ACCURACIES[path], PATH_ACCURACIES["l3"]
            ahead = gap([curve.values[accuracies[0]][:decay] - curve.values[accuracies[1]][:decay] for curve in curves])
            verdicts += [lower.verdict, ahead.verdict]
            texts.append(f"{PATH_NAMES[path]}: loss lower by {lower.text(3)}, accuracy higher by {ahead.text()} points")
        epoch = curves[0].epoch[decay - 1]
        evidence = f"Over the {epoch:g} epochs before the first decay, against the normal path, {'; '.join(texts)}"
        return all_hold(verdicts), f"{evidence} ({count_seeds(len(curves))})."

    return over_variants(context.hybrid_rows(), judge_row)


def _final_losses(curves: Sequence[Curve]) -> dict[str, list[np.ndarray]]:
    """Path -> the last epoch's losses, one array per seed."""
    last = [curve.epoch_index == curve.epoch_index[-1] for curve in curves]
    return {path: [curve.values[path][kept] for curve, kept in zip(curves, last, strict=True)] for path in PATHS}


def _compare(losses: Mapping[str, Sequence[np.ndarray]], higher: str, lower: str) -> Gap:
    """By how much one path's final loss is above another's."""
    return gap([one - other for one, other in zip(losses[higher], losses[lower], strict=True)])


def _list_losses(losses: Mapping[str, Sequence[np.ndarray]]) -> str:
    means = {path: float(np.mean([each.mean() for each in found])) for path, found in losses.items()}
    return ", ".join(f"{path.upper()} {value:.3f}" for path, value in means.items())


@register("hybrid_forward", "c5")
def normal_path_lies_between(context: Context) -> Verdict:
    """min(L1, L2) < L3 < max(L1, L2) in the last epoch."""

    def judge_row(row: Row) -> Verdict:
        curves = _path_curves(context, row)
        losses = _final_losses(curves)
        above = {path: _compare(losses, "l3", path) for path in PATHS[:2]}
        low, high = sorted(above, key=lambda path: -above[path].mean)
        verdict = all_hold([above[low].verdict, _compare(losses, high, "l3").verdict])
        texts = [f"L3 - {path.upper()} = {each.text(3)}" for path, each in above.items()]
        return verdict, f"Last epoch: {_list_losses(losses)}; {', '.join(texts)} ({count_seeds(len(curves))})."

    return over_variants(context.hybrid_rows(), judge_row)


def path_depths(context: Context, row: Row) -> dict[str, int]:
    """Path -> number of layers: from the result, or the paper's where the run has its networks and switches."""
    result = context.result(row)
    known = result.get("path_depths")
    if known:
        return dict(zip(PATHS, known, strict=True))
    config = result.get("config", {})
    changed = config.get("method", {}).get("switch_at") is not None or any(
        (config.get(side, {}).get("network") or {}).get("small_stem") for side in ("teacher", "student")
    )
    for figure in context.record.figures:
        numbers = figure["numbers"]
        printed = [line for line in context.record.rows if line["method"] == "hybrid_forward"]
        same = any((line["teacher"], line["student"]) == (row["teacher"], row["student"]) for line in printed)
        if "hybrid_path1_layers" in numbers and same and not changed:
            names = ("hybrid_path1_layers", "hybrid_path2_layers", "student_layers")
            return {path: numbers[name] for path, name in zip(PATHS, names, strict=True)}
    raise Missing(f"Needs the path depths of {row['teacher']} and {row['student']}.")


@register("hybrid_forward", "c6")
def depth_does_not_order_losses(context: Context) -> Verdict:
    """In the last epoch, some deeper path has a higher loss than a shallower one."""

    def judge_row(row: Row) -> Verdict:
        curves = _path_curves(context, row)
        depths = path_depths(context, row)
        losses = _final_losses(curves)
        order = sorted(PATHS, key=lambda path: depths[path])
        pairs = [(deep, flat) for i, flat in enumerate(order) for deep in order[i + 1 :] if depths[deep] > depths[flat]]
        found = {pair: _compare(losses, *pair) for pair in pairs}
        (deep, flat), widest = max(found.items(), key=lambda item: item[1].mean)
        layers = ", ".join(f"{path.upper()} {depths[path]}" for path in PATHS)
        evidence = (
            f"Last epoch: {_list_losses(losses)}; layers: {layers}; {deep.upper()} - {flat.upper()} = {widest.text(3)} "
            f"({count_seeds(len(curves))})."
        )
        return any_holds([each.verdict for each in found.values()]), evidence

    return over_variants(context.hybrid_rows(), judge_row)
