"""Judges of hybrid forward's claims, c1 to c14: what is compared, and the thresholds.

Paths are named as the records name them: `l1` starts in the student, `l2` in the teacher, `l3` is the plain student.
The readings of `about the same` and `much larger`, which the paper gives no numbers for, are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tables.curves import Array, Curve, first_decay
from tables.judging import (
    UNKNOWN,
    Context,
    Difference,
    Judges,
    Missing,
    Row,
    Statement,
    Verdict,
    agree,
    all_hold,
    any_holds,
    beside,
    by_epoch,
    chain,
    compared,
    demand,
    demand_done,
    demand_rows,
    improvement,
    most_hold,
    needed,
    of_means,
    over_steps,
    over_variants,
    ruling,
    show_value,
    signed,
    sound,
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
    return over_variants(rows, lambda row: sound(context, judge_row(row), [row]))


# Table 1


@JUDGES.of("c1")
def beats_all_students(context: Context) -> Verdict:
    """Top-1 of hybrid forward against every other student row that is printed."""
    students = [row["id"] for row in context.record.rows if row["role"] != "teacher"]
    others = [row_id for row_id in students if row_id != "hybrid_forward"]
    return compared(context, chain("hybrid_forward", others))


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
        found = by_epoch(pairs, _summed, lambda curve: curve.values["loss"])
        lowest = min(found, key=lambda epoch: found[epoch].mean)
        above = sum(each.mean > 0 for each in found.values())
        evidence = (
            f"the mean of L1 + L2 + L3 lies above the loss without teacher in {above} of {len(found)} epochs; smallest "
            f"difference {found[lowest].text(3)} in epoch {lowest}"
        )
        return ruling([each.above(evidence) for each in found.values()], evidence)

    return _of_hybrid_rows(context, judge_row)


@JUDGES.of("c3")
def accuracy_overtakes_after_decay(context: Context) -> Verdict:
    """Training accuracy with minus without the teacher: negative before the first decay, positive at the end."""

    def judge_row(row: Row) -> Verdict:
        pairs = _pairs(context, row)
        curve = pairs[0][0]
        decay = _decay(context, row, curve)
        found = by_epoch(pairs, lambda taught: taught.values["accuracy"], lambda plain: plain.values["accuracy"])
        decayed = int(curve.epoch_index[decay])
        earlier = [epoch for epoch in found if epoch < decayed]
        if not earlier or max(found) < decayed:
            raise Missing("Needs at least one whole epoch before and one after the first decay.")
        before, end = found[earlier[-1]], found[max(found)]
        evidence = (
            f"training accuracy with minus without teacher is {before.text()} points in epoch {earlier[-1]}, the last "
            f"before the first decay, and {end.text()} in the last epoch, {max(found)}"
        )
        return ruling([before.at_most(evidence, 0.0), end.above(evidence)], evidence)

    return _of_hybrid_rows(context, judge_row)


@JUDGES.of("c4")
def hybrid_paths_lead_before_decay(context: Context) -> Verdict:
    """L1, L2 < L3 and their accuracies above the normal path's, over all steps before the first decay."""

    def judge_row(row: Row) -> Verdict:
        curves = _path_curves(context, row)
        decay = _decay(context, row, curves[0])
        found: list[Statement] = []
        texts = []
        for path in PATHS[:2]:
            lower = over_steps([curve.values["l3"][:decay] - curve.values[path][:decay] for curve in curves])
            accuracies = PATH_ACCURACIES[path], PATH_ACCURACIES["l3"]
            ahead = over_steps(
                [curve.values[accuracies[0]][:decay] - curve.values[accuracies[1]][:decay] for curve in curves]
            )
            texts.append(f"{PATH_NAMES[path]}: loss lower by {lower.text(3)}, accuracy higher by {ahead.text()} points")
            found += [lower.above(texts[-1]), ahead.above(texts[-1])]
        epoch = curves[0].epoch[decay - 1]
        evidence = f"Over the {epoch:g} epochs before the first decay, against the normal path, {'; '.join(texts)}"
        return ruling(found, evidence)

    return _of_hybrid_rows(context, judge_row)


def _final_losses(curves: Sequence[Curve]) -> dict[str, list[np.ndarray]]:
    """Path -> the last epoch's losses, one array per seed."""
    last = [curve.epoch_index == curve.epoch_index[-1] for curve in curves]
    return {path: [curve.values[path][kept] for curve, kept in zip(curves, last, strict=True)] for path in PATHS}


def _compare(losses: Mapping[str, Sequence[np.ndarray]], higher: str, lower: str) -> Difference:
    """By how much one path's final loss is above another's."""
    return over_steps([one - other for one, other in zip(losses[higher], losses[lower], strict=True)])


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
        texts = [f"L3 - {path.upper()} = {each.text(3)}" for path, each in above.items()]
        evidence = f"Last epoch: {_list_losses(losses)}; {', '.join(texts)}"
        return ruling([above[low].above(evidence), _compare(losses, high, "l3").above(evidence)], evidence)

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
            f"Last epoch: {_list_losses(losses)}; layers: {layers}; {deep.upper()} - {flat.upper()} = {widest.text(3)}"
        )
        statements = [each.above(evidence) for each in found.values()]
        return ruling(statements, evidence, any_holds([each.verdict for each in statements]))

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


@JUDGES.of("c7")
def domain_teacher_helps_more(context: Context) -> Verdict:
    """mIoU with the GTA5 teacher against the detection teacher's, for each method."""
    return compared(context, [(f"{name}_gta5", f"{name}_det") for name in METHODS], "miou", rows=_dynamic)


@JUDGES.of("c8")
def methods_are_in_order(context: Context) -> Verdict:
    """mIoU of hybrid forward > AT > FitNet > no teacher, for each teacher: every better row against every worse one."""
    orders = [chain(*(f"{name}_{teacher}" for name in METHODS), "baseline") for teacher in ("gta5", "det")]
    return compared(context, [pair for order in orders for pair in order], "miou", rows=_dynamic)


@JUDGES.of("c9")
def student_improves_on_teachers_domain(context: Context) -> Verdict:
    """mIoU on GTA5 with the GTA5 teacher against the detection teacher's and against none."""
    return compared(context, chain("hybrid_gta5", ("hybrid_det", "baseline")), "miou", rows=_dynamic)


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
        other = beside(context, "baseline", row)
        demand_done([row, other], *names)
        points = {name: improvement(context, row, other, name) for name in names}
        shares = {
            name: found.scaled(100 / other["mean"][name] if other["mean"][name] else 0.0)
            for name, found in points.items()
        }
        texts = [
            f"{metric['printed_as']} {points[name].text()} points ({signed(shares[name].mean, 1)} %)"
            for metric, name in zip(metrics, names, strict=True)
        ]
        lower = [points[name].above(text) for name, text in zip(names, texts, strict=True)]
        largest = [_is_largest(found, "mr_reasonable") for found in (points, shares)]
        readings = [all_hold([each.verdict for each in reading]) for reading in largest]
        one = readings[0] if readings[0] == readings[1] else UNKNOWN
        evidence = f"miss rates are lower than without teacher by: {', '.join(texts)}"
        if readings[0] != readings[1]:
            evidence += "; whether R improves the most depends on counting points or shares"
        verdict = all_hold([most_hold([each.verdict for each in lower]), one])
        return sound(context, ruling([*lower, *largest[0]], evidence, verdict), [row, other])

    return over_variants(_dynamic(context, "hybrid_forward"), judge_row)


def _is_largest(found: Mapping[str, Difference], name: str) -> list[Statement]:
    """That one improvement is above each other."""
    return [found[name].minus(each).above(other) for other, each in found.items() if other != name]


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
        none = beside(context, "baseline", row)
        if len(fixed) < 2:
            raise needs
        demand_done([row, none, *fixed.values()], name)
        below = [improvement(context, row, other, name).above(other["label"]) for other in fixed.values()]
        helped = [improvement(context, other, none, name).above(other["label"]) for other in fixed.values()]
        best = min(fixed, key=lambda balance: fixed[balance]["mean"][name])
        evidence = (
            f"miss rate R {show_value(row, name, 2)} with the dynamic balance, {show_value(fixed[best], name, 2)} with "
            f"the best of {len(fixed)} fixed ones, {best:g}, and {show_value(none, name, 2)} without teacher"
        )
        verdict = all_hold([*(each.verdict for each in below), any_holds([each.verdict for each in helped])])
        return sound(context, ruling([*below, *helped], evidence, verdict), [row, none, *fixed.values()])

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


def _relative(pairs: Sequence[tuple[Array, Array]], part: slice) -> Difference:
    """By which share the first balances are above the second ones over some steps."""
    return over_steps([(one[part] - two[part]) / two[part].mean() for one, two in pairs])


def _distance(pairs: Sequence[tuple[Array, Array]], first: int = 0) -> Difference:
    """The mean of the shares by which balances differ, up or down, in `SPANS` equal spans from step `first` on."""
    edges = np.linspace(first, len(pairs[0][0]), SPANS + 1).astype(int)
    spans = [_relative(pairs, slice(start, end)) for start, end in zip(edges[:-1], edges[1:], strict=True)]
    mean, noise, error = np.mean([(abs(each.mean), each.noise, each.error) for each in spans], axis=0).tolist()
    return replace(spans[0], mean=mean, noise=noise, error=error)


def _percent(found: Difference) -> str:
    return f"{found.scaled(100).text(1)} %"


@JUDGES.of("c10")
def balance_falls(context: Context) -> Verdict:
    """Mean balance over the first fifth of the steps against that over the last fifth, for each teacher."""
    demand_rows(context, "hybrid_det", "hybrid_gta5")

    def judge_row(row: Row) -> Verdict:
        values = list(_balances(context, row).values())
        parts = [(each[: len(each) // 5], each[-(len(each) // 5) :]) for each in values]
        means = [np.mean([part[index].mean() for part in parts]) for index in (0, 1)]
        fall = of_means(parts)
        evidence = f"mean balance {means[0]:.3f} over the first fifth of the steps and {means[1]:.3f} over the last"
        return sound(context, ruling([fall.above(evidence)], f"{evidence}, a fall of {fall.text(3)}"), [row])

    found = {teacher: over_variants(_dynamic(context, f"hybrid_{teacher}"), judge_row) for teacher in TEACHERS}
    evidence = " ".join(f"{TEACHERS[teacher]}: {each.evidence}" for teacher, each in found.items())
    seeds = max((each.seeds for each in found.values() if each.seeds), default=None)
    return Verdict(all_hold([each.verdict for each in found.values()]), evidence, seeds)


@JUDGES.of("c11")
def balances_differ_only_at_the_start(context: Context) -> Verdict:
    """Balance with the detection teacher against the GTA5 teacher's: much larger over the first `START` of the steps
    (by more than `MUCH`), about the same later (`SAME`, mean over `SPANS` spans).
    """
    demand_rows(context, "hybrid_det", "hybrid_gta5")

    def judge_row(row: Row) -> Verdict:
        other = beside(context, "hybrid_gta5", row)
        pairs = _balance_pairs(context, row, other)
        first = max(2, round(START * len(pairs[0][0])))
        start, later = _relative(pairs, slice(first)), _distance(pairs, first)
        evidence = (
            f"over the first {first} of {len(pairs[0][0])} steps the balance with the detection teacher differs from "
            f"that with the GTA5 teacher by {_percent(start)} (much larger: above {100 * MUCH:+.0f} %), later up or "
            f"down by {_percent(later).lstrip('+')} on average (about the same: below {100 * SAME:.0f} %)"
        )
        verdict = ruling([start.above(evidence, MUCH), later.within(evidence, SAME)], evidence)
        return sound(context, verdict, [row, other])

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
        other = beside(context, "hybrid_forward", row)
        pairs = _balance_pairs(context, row, other)
        first, last = middle_steps(context, len(pairs[0][0]))
        apart, middle = _distance(pairs), _relative(pairs, slice(first - 1, last))
        evidence = (
            f"the balances of {row['student']} and {other['student']} differ by {_percent(apart).lstrip('+')} on "
            f"average (nearly coinciding: below {100 * SAME:.0f} %); in steps {first} to {last} the first differs from "
            f"the second by {_percent(middle)}"
        )
        return sound(context, ruling([apart.within(evidence, SAME), middle.above(evidence)], evidence), [row, other])

    return over_variants(_dynamic(context, "hybrid_resnet50"), judge_row)
