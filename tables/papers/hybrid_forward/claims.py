"""Judges of hybrid forward's claims, c1 to c14.

Paths are named as the records name them: `l1` starts in the student, `l2` in the teacher, `l3` is the plain student.
The readings of `about the same` and `much larger`, which the paper gives no numbers for, are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tables.curves import Array, Curve, first_decay
from tables.judging import (
    FAILS,
    HOLDS,
    ONE_SEED_POINTS,
    UNKNOWN,
    Context,
    Gap,
    Judges,
    Missing,
    Row,
    Verdict,
    agree,
    all_hold,
    any_holds,
    count_seeds,
    demand,
    demand_done,
    demand_rows,
    gap,
    gap_of_means,
    gaps_by_epoch,
    improvement,
    needed,
    over_variants,
    sampling_noise,
    show_value,
    signed,
    undone,
)

JUDGES = Judges()

PATHS = ("l1", "l2", "l3")
PATH_NAMES = {"l1": "path 1", "l2": "path 2", "l3": "the normal path"}
PATH_ACCURACIES = {"l1": "accuracy1", "l2": "accuracy2", "l3": "accuracy"}
SAME = 0.1  # two balances are about the same when their means differ by at most this share
MUCH = 0.25  # and one is much larger when it is above the other by more than this share
START = 0.05  # share of the steps that is the start of a training
SPANS = 10  # curves are compared by their means over so many equal spans
LEAST_STEPS = 20
SWEEP = "dynamic,0.1,0.25,0.5,1,2"
METHODS = ("hybrid", "at", "fitnet")  # the paper's order, best first
TEACHERS = {"det": "detection teacher", "gta5": "GTA5 teacher"}


def hybrid_rows(context: Context) -> list[Row]:
    """The rows of hybrid forward, one per value of the axes."""
    return [row for row in context.rows if row["method"] == "hybrid_forward"]


def _of_hybrid_rows(context: Context, judge_row: Callable[[Row], Verdict]) -> Verdict:
    """A verdict over all variants of hybrid forward."""
    rows = hybrid_rows(context)
    if not rows:
        raise Missing("Needs the row hybrid_forward.")
    return over_variants(rows, judge_row)


# Table 1


@JUDGES.of("c1")
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

    return _of_hybrid_rows(context, judge_row)


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
    demand_done([row])
    curves = list(context.curves(row).values())
    if not curves:
        raise Missing(f"Needs the training records of {row['label']}.")
    demand(curves[0], (*PATHS, *PATH_ACCURACIES.values()))
    return curves


def _decay(context: Context, row: Row, curve: Curve) -> int:
    """Index of the first step after the first learning-rate decay."""
    schedule = context.result(row).get("config", {}).get("schedule", {})
    found = first_decay(curve) if schedule.get("policy", "step") == "step" else None
    if found is None:
        raise Missing("The learning rate never drops by a step in this run, so there is no first decay.")
    return found


def _summed(curve: Curve) -> np.ndarray:
    return curve.total(PATHS)


@JUDGES.of("c2")
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

    return _of_hybrid_rows(context, judge_row)


@JUDGES.of("c3")
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

    return _of_hybrid_rows(context, judge_row)


@JUDGES.of("c4")
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

    return _of_hybrid_rows(context, judge_row)


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


@JUDGES.of("c5")
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

    return _of_hybrid_rows(context, judge_row)


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


@JUDGES.of("c6")
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

    return _of_hybrid_rows(context, judge_row)


# Other domains and tasks


def is_fixed(context: Context, row: Row) -> bool:
    """Whether a row of hybrid forward was trained with a fixed balance."""
    method = (context.result(row).get("config") or {}).get("method", {})
    return row["axes"].get("method.balance", method.get("balance")) not in (None, "dynamic")


def _dynamic(context: Context, row_id: str) -> list[Row]:
    """The variants of a row whose balance is the paper's, dynamic."""
    demand_rows(context, row_id)
    found = [row for row in context.named(row_id) if not is_fixed(context, row)]
    if not found:
        raise Missing(needed(context, row_id, values="method.balance=dynamic"))
    return found


def _matching(context: Context, row_id: str, row: Row) -> list[Row]:
    """The variants of a row that are to be compared with `row`."""
    found = [other for other in context.named(row_id) if agree(row, other)]
    if not found:
        raise Missing(needed(context, row_id))
    return found


def _source(gaps: Sequence[Gap]) -> str:
    """Where the spreads of improvements are from."""
    seeds = min(each.seeds for each in gaps)
    if seeds > 1:
        return f"the spread of {count_seeds(seeds)}"
    return f"one seed, spread unknown: {ONE_SEED_POINTS} points or less count as none"


def _signed(found: Gap, decimals: int = 2) -> str:
    """`+1.20 ± 0.10`; with one seed `+1.20`."""
    return found.text(decimals) if found.seeds > 1 else signed(found.mean, decimals)


@JUDGES.of("c7")
def domain_teacher_helps_more(context: Context) -> Verdict:
    """mIoU with the GTA5 teacher against the detection teacher's, for each method."""
    demand_rows(context, *(f"{method}_{teacher}" for method in METHODS for teacher in TEACHERS))

    def judge_row(row: Row) -> Verdict:
        taught = [each for method in METHODS for each in _matching(context, f"{method}_gta5", row)]
        pairs = []
        for each in taught:
            partner = each["id"].partition("[")[0].replace("_gta5", "_det")
            pairs += [(each, other) for other in _matching(context, partner, each)]
        demand_done([each for couple in pairs for each in couple], "miou")
        gaps = [improvement(context, *couple, "miou") for couple in pairs]
        texts = [f"{each['label']} {_signed(found)}" for (each, _), found in zip(pairs, gaps, strict=True)]
        evidence = f"with the GTA5 teacher minus with the detection teacher, mIoU of {', '.join(texts)} points"
        return all_hold([each.verdict for each in gaps]), f"{evidence} ({_source(gaps)})."

    return over_variants(_dynamic(context, "hybrid_gta5"), judge_row)


@JUDGES.of("c8")
def methods_are_in_order(context: Context) -> Verdict:
    """mIoU of hybrid forward > AT > FitNet > no teacher, for each teacher: every better row against every worse one."""
    demand_rows(context, "baseline", *(f"{method}_{teacher}" for method in METHODS for teacher in TEACHERS))

    def judge_teacher(row: Row, teacher: str) -> tuple[list[Gap], str]:
        names = [*(f"{method}_{teacher}" for method in METHODS[1:]), "baseline"]
        ranks = [[row], *(_matching(context, name, row) for name in names)]
        rows = [each for rank in ranks for each in rank]
        demand_done(rows, "miou")
        gaps = [
            improvement(context, better, worse, "miou")
            for number, rank in enumerate(ranks)
            for better in rank
            for lower in ranks[number + 1 :]
            for worse in lower
        ]
        shown = ", ".join(f"{each['label']} {show_value(each, 'miou', 2)}" for each in rows)
        return gaps, f"{TEACHERS[teacher]}: {shown}"

    def judge_row(row: Row) -> Verdict:
        gaps, texts = [], []
        for teacher in TEACHERS:
            for own in _matching(context, f"hybrid_{teacher}", row):
                found, text = judge_teacher(own, teacher)
                gaps += found
                texts.append(text)
        smallest = min(gaps, key=lambda each: each.mean - each.spread)
        evidence = f"in the claimed order, mIoU with the {'; with the '.join(texts)}"
        lead = f"smallest lead {_signed(smallest)} points ({_source(gaps)})"
        return all_hold([each.verdict for each in gaps]), f"{evidence}; {lead}."

    return over_variants(_dynamic(context, "hybrid_gta5"), judge_row)


@JUDGES.of("c9")
def student_improves_on_teachers_domain(context: Context) -> Verdict:
    """mIoU on GTA5 with the GTA5 teacher against the detection teacher's and against none."""
    demand_rows(context, "hybrid_gta5", "hybrid_det", "baseline")

    def judge_row(row: Row) -> Verdict:
        others = _matching(context, "hybrid_det", row) + _matching(context, "baseline", row)
        demand_done([row, *others], "miou")
        gaps = [improvement(context, row, other, "miou") for other in others]
        texts = [
            f"{_signed(found)} against {show_value(other, 'miou', 2)} of {other['label']}"
            for other, found in zip(others, gaps, strict=True)
        ]
        evidence = f"with the GTA5 teacher mIoU {show_value(row, 'miou', 2)} on GTA5: {', '.join(texts)}"
        return all_hold([each.verdict for each in gaps]), f"{evidence} ({_source(gaps)})."

    return over_variants(_dynamic(context, "hybrid_gta5"), judge_row)


def _most(verdicts: Sequence[str]) -> str:
    """Whether more than half of the statements hold."""
    if 2 * verdicts.count(HOLDS) > len(verdicts):
        return HOLDS
    return UNKNOWN if 2 * (len(verdicts) - verdicts.count(FAILS)) > len(verdicts) else FAILS


@JUDGES.of("c12")
def pose_teacher_improves_most(context: Context) -> Verdict:
    """Miss rates against no teacher: most get better, and that of the reasonable subset by the most.

    The paper does not say whether it means points or shares of the miss rate (in its table both are true), so the
    largest improvement has to be the largest in both; where they disagree, the verdict is unknown.
    """
    demand_rows(context, "hybrid_forward", "baseline")
    metrics = context.record.metrics
    names = [metric["name"] for metric in metrics]

    def judge_row(row: Row) -> Verdict:
        (other,) = _matching(context, "baseline", row)[:1]
        demand_done([row, other], *names)
        points = {name: improvement(context, row, other, name) for name in names}
        shares = {}
        for name, found in points.items():
            scale = 100 / other["mean"][name] if other["mean"][name] else 0.0
            shares[name] = Gap(scale * found.mean, scale * found.spread, found.seeds)
        readings = {_is_largest(found, "mr_reasonable") for found in (points, shares)}
        largest = readings.pop() if len(readings) == 1 else UNKNOWN
        most = _most([each.verdict for each in points.values()])
        texts = [
            f"{metric['printed_as']} {_signed(points[name])} points ({signed(shares[name].mean, 1)} %)"
            for metric, name in zip(metrics, names, strict=True)
        ]
        evidence = f"miss rates are lower than without teacher by: {', '.join(texts)}; {_source([*points.values()])}"
        differ = "; whether R improves the most depends on counting points or shares" if readings else ""
        return all_hold([most, largest]), f"{evidence}{differ}."

    return over_variants(_dynamic(context, "hybrid_forward"), judge_row)


def _is_largest(found: Mapping[str, Gap], name: str) -> str:
    """Whether one improvement is above all others."""
    own = found[name]
    others = [each for other, each in found.items() if other != name]
    gaps = [Gap(own.mean - each.mean, math.hypot(own.spread, each.spread), own.seeds) for each in others]
    return all_hold([each.verdict for each in gaps])


def fixed_rows(context: Context, row: Row) -> dict[float, Row]:
    """Fixed balance -> the variant of hybrid forward that has it and otherwise compares with `row`."""
    axis = "method.balance"
    rest = {**row, "axes": {key: value for key, value in row["axes"].items() if key != axis}}
    rows = [other for other in context.named("hybrid_forward") if axis in other["axes"] and agree(rest, other)]
    return {float(other["axes"][axis]): other for other in rows if other["axes"][axis] != "dynamic"}


@JUDGES.of("c14")
def dynamic_balance_is_best(context: Context) -> Verdict:
    """Miss rate on the reasonable subset: dynamic below every fixed balance, some fixed one below no teacher.

    The text does not say which miss rate Figure 9 shows; this one it calls usually more important.
    """
    name = "mr_reasonable"
    needs = Missing(needed(context, "baseline", "hybrid_forward", values=f"method.balance={SWEEP}"))
    if not context.named("hybrid_forward") or not context.named("baseline"):
        raise needs

    def judge_row(row: Row) -> Verdict:
        fixed = fixed_rows(context, row)
        (none,) = _matching(context, "baseline", row)[:1]
        if len(fixed) < 2:
            raise needs
        demand_done([row, none, *fixed.values()], name)
        below = [improvement(context, row, other, name) for other in fixed.values()]
        helped = [improvement(context, other, none, name) for other in fixed.values()]
        best = min(fixed, key=lambda balance: fixed[balance]["mean"][name])
        evidence = (
            f"miss rate R {show_value(row, name, 2)} with the dynamic balance, {show_value(fixed[best], name, 2)} with "
            f"the best of {len(fixed)} fixed ones, {best:g}, and {show_value(none, name, 2)} without teacher"
        )
        verdict = all_hold([*(each.verdict for each in below), any_holds([each.verdict for each in helped])])
        return verdict, f"{evidence} ({_source([*below, *helped])})."

    return over_variants(_dynamic(context, "hybrid_forward"), judge_row)


# Balances


def _balances(context: Context, row: Row) -> dict[int, Array]:
    """Seed -> balance at each step."""
    demand_done([row])
    curves = context.curves(row)
    if not curves:
        raise Missing(f"Needs the training records of {row['label']}.")
    for curve in curves.values():
        demand(curve, ("balance",))
        if len(curve.step) < LEAST_STEPS:
            raise Missing(f"Needs at least {LEAST_STEPS} training steps of {row['label']}.")
    return {seed: curve.values["balance"] for seed, curve in curves.items()}


def _balance_pairs(context: Context, row: Row, other: Row) -> list[tuple[Array, Array]]:
    """Balances of two rows, paired by seed (their batches are the same) and equally long."""
    first, second = _balances(context, row), _balances(context, other)
    pairs = [(values, second[seed]) for seed, values in first.items() if seed in second]
    if not pairs:
        raise Missing(f"Needs the training records of {row['label']} and {other['label']} with the same seed.")
    length = min(len(values) for pair in pairs for values in pair)
    return [(one[:length], two[:length]) for one, two in pairs]


def _relative(pairs: Sequence[tuple[Array, Array]], part: slice) -> Gap:
    """By which share the first balances are above the second ones over some steps."""
    return gap([(one[part] - two[part]) / two[part].mean() for one, two in pairs])


def _distance(pairs: Sequence[tuple[Array, Array]], first: int = 0) -> Gap:
    """The mean of the shares by which balances differ, up or down, in `SPANS` equal spans from step `first` on."""
    edges = np.linspace(first, len(pairs[0][0]), SPANS + 1).astype(int)
    gaps = [_relative(pairs, slice(start, end)) for start, end in zip(edges[:-1], edges[1:], strict=True)]
    apart, spread = np.mean([abs(each.mean) for each in gaps]), np.mean([each.spread for each in gaps])
    return Gap(float(apart), float(spread), len(pairs))


def _percent(found: Gap) -> str:
    return f"{Gap(100 * found.mean, 100 * found.spread, found.seeds).text(1)} %"


@JUDGES.of("c10")
def balance_falls(context: Context) -> Verdict:
    """Mean balance over the first fifth of the steps against that over the last fifth, for each teacher."""
    demand_rows(context, "hybrid_det", "hybrid_gta5")

    def judge_row(row: Row) -> Verdict:
        values = list(_balances(context, row).values())
        parts = [(each[: len(each) // 5], each[-(len(each) // 5) :]) for each in values]
        means = [np.mean([part[index].mean() for part in parts]) for index in (0, 1)]
        fall = gap_of_means(parts)
        evidence = f"mean balance {means[0]:.3f} over the first fifth of the steps and {means[1]:.3f} over the last"
        return fall.verdict, f"{evidence}, a fall of {fall.text(3)} ({count_seeds(fall.seeds)})."

    found = {teacher: over_variants(_dynamic(context, f"hybrid_{teacher}"), judge_row) for teacher in TEACHERS}
    evidence = " ".join(f"{TEACHERS[teacher]}: {text}" for teacher, (_, text) in found.items())
    return all_hold([verdict for verdict, _ in found.values()]), evidence


@JUDGES.of("c11")
def balances_differ_only_at_the_start(context: Context) -> Verdict:
    """Balance with the detection teacher against the GTA5 teacher's: much larger over the first `START` of the steps
    (by more than `MUCH`), about the same later (`SAME`, mean over `SPANS` spans).
    """
    demand_rows(context, "hybrid_det", "hybrid_gta5")

    def judge_row(row: Row) -> Verdict:
        (other,) = _matching(context, "hybrid_gta5", row)[:1]
        pairs = _balance_pairs(context, row, other)
        first = max(2, round(START * len(pairs[0][0])))
        start, later = _relative(pairs, slice(first)), _distance(pairs, first)
        larger = Gap(start.mean - MUCH, start.spread, start.seeds).verdict
        same = Gap(SAME - later.mean, later.spread, later.seeds).verdict
        evidence = (
            f"over the first {first} of {len(pairs[0][0])} steps the balance with the detection teacher differs from "
            f"that with the GTA5 teacher by {_percent(start)} (much larger: above {100 * MUCH:+.0f} %), later up or "
            f"down by {_percent(later).lstrip('+')} on average (about the same: below {100 * SAME:.0f} %; "
            f"{count_seeds(start.seeds)})."
        )
        return all_hold([larger, same]), evidence

    return over_variants(_dynamic(context, "hybrid_det"), judge_row)


def middle_steps(context: Context, steps: int) -> tuple[int, int]:
    """First and last step of the middle that the paper zooms into.

    It does not print how long it trains; the steps that it calls the middle (4000 to 6000) are the middle of 10000. In
    shorter trainings they are scaled in proportion.
    """
    numbers = next(figure["numbers"] for figure in context.record.figures if "zoom_from_step" in figure["numbers"])
    first, last = numbers["zoom_from_step"], numbers["zoom_to_step"]
    scale = min(1.0, steps / (first + last))
    return max(1, round(scale * first)), round(scale * last)


@JUDGES.of("c13")
def model_gap_is_not_serious(context: Context) -> Verdict:
    """Balances of the two backbones: about the same (`SAME`, mean over `SPANS` spans), in the middle of the training
    larger with the teacher's own backbone.
    """
    demand_rows(context, "hybrid_forward", "hybrid_resnet50")

    def judge_row(row: Row) -> Verdict:
        (other,) = _matching(context, "hybrid_forward", row)[:1]
        pairs = _balance_pairs(context, row, other)
        first, last = middle_steps(context, len(pairs[0][0]))
        apart, middle = _distance(pairs), _relative(pairs, slice(first - 1, last))
        evidence = (
            f"the balances of {row['student']} and {other['student']} differ by {_percent(apart).lstrip('+')} on "
            f"average (nearly coinciding: below {100 * SAME:.0f} %); in steps {first} to {last} the first differs from "
            f"the second by {_percent(middle)} ({count_seeds(apart.seeds)})."
        )
        return all_hold([Gap(SAME - apart.mean, apart.spread, apart.seeds).verdict, middle.verdict]), evidence

    return over_variants(_dynamic(context, "hybrid_resnet50"), judge_row)
