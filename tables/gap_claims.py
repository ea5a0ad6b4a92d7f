"""Judges of hybrid forward's claims about other domains and tasks, c7 to c14.

What may differ by chance: means over several seeds, their standard deviations. mIoU and miss rates have no binomial
error, so with one seed their spread is unknown; a difference of at most `ONE_SEED_POINTS` is then taken for none, which
is our choice, as are the readings of `about the same` and `much larger` that the paper gives no numbers for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tables.claims import (
    Context,
    Missing,
    Row,
    Verdict,
    agree,
    count_seeds,
    demand,
    over_variants,
    register,
    show_value,
    undone,
)
from tables.curves import FAILS, HOLDS, UNKNOWN, Array, Gap, all_hold, any_holds, gap, gap_of_means, signed

ONE_SEED_POINTS = 0.5
SAME = 0.1  # two balances are about the same when their means differ by at most this share
MUCH = 0.25  # and one is much larger when it is above the other by more than this share
START = 0.05  # share of the steps that is the start of a training
SPANS = 10  # curves are compared by their means over so many equal spans
LEAST_STEPS = 20

SWEEP = "dynamic,0.1,0.25,0.5,1,2"
METHODS = ("hybrid", "at", "fitnet")  # the paper's order, best first
TEACHERS = {"det": "detection teacher", "gta5": "GTA5 teacher"}


def needed(context: Context, *row_ids: str, values: str = "") -> str:
    """What to run for rows that a claim needs: `Needs the row baseline: +table=citypersons_pose rows=baseline.`"""
    rows = f"row{'s' if len(row_ids) > 1 else ''} {' and '.join(row_ids)}"
    return f"Needs the {rows}: +table={context.record.name} rows={','.join(row_ids)}{values and ' ' + values}."


def is_fixed(context: Context, row: Row) -> bool:
    """Whether a row of hybrid forward was trained with a fixed balance."""
    method = (context.result(row).get("config") or {}).get("method", {})
    return row["axes"].get("method.balance", method.get("balance")) not in (None, "dynamic")


def _demand_rows(context: Context, *row_ids: str) -> None:
    absent = [row_id for row_id in row_ids if not context.named(row_id)]
    if absent:
        raise Missing(needed(context, *absent))


def _dynamic(context: Context, row_id: str) -> list[Row]:
    """The variants of a row whose balance is the paper's, dynamic."""
    _demand_rows(context, row_id)
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


# Numbers


def _demand_done(rows: Sequence[Row], *metrics: str) -> None:
    lacking = list(dict.fromkeys(text for row in rows if (text := undone(row, *metrics))))
    if lacking:
        raise Missing(f"Needs {'; '.join(lacking)}.")


def _metric(context: Context, name: str) -> Mapping[str, Any]:
    return next(metric for metric in context.record.metrics if metric["name"] == name)


def improvement(context: Context, row: Row, other: Row, name: str) -> Gap:
    """By how many points a row is better than another; its spread is `ONE_SEED_POINTS` at least if one has one seed."""
    sign = 1 if _metric(context, name)["better"] == "higher" else -1
    spreads = [(each["std"] or {}).get(name) for each in (row, other)]
    known = [spread for spread in spreads if spread is not None]
    margin = math.hypot(*known) if len(known) == 2 else max([ONE_SEED_POINTS, *known])
    return Gap(sign * (row["mean"][name] - other["mean"][name]), margin, min(len(row["cells"]), len(other["cells"])))


def _source(gaps: Sequence[Gap]) -> str:
    """Where the spreads of improvements are from."""
    seeds = min(each.seeds for each in gaps)
    if seeds > 1:
        return f"the spread of {count_seeds(seeds)}"
    return f"one seed, spread unknown: {ONE_SEED_POINTS} points or less count as none"


def _signed(found: Gap, decimals: int = 2) -> str:
    """`+1.20 ± 0.10`; with one seed `+1.20`."""
    return found.text(decimals) if found.seeds > 1 else signed(found.mean, decimals)


@register("hybrid_forward", "c7")
def domain_teacher_helps_more(context: Context) -> Verdict:
    """mIoU with the GTA5 teacher against the detection teacher's, for each method."""
    _demand_rows(context, *(f"{method}_{teacher}" for method in METHODS for teacher in TEACHERS))

    def judge_row(row: Row) -> Verdict:
        taught = [each for method in METHODS for each in _matching(context, f"{method}_gta5", row)]
        pairs = []
        for each in taught:
            partner = each["id"].partition("[")[0].replace("_gta5", "_det")
            pairs += [(each, other) for other in _matching(context, partner, each)]
        _demand_done([each for couple in pairs for each in couple], "miou")
        gaps = [improvement(context, *couple, "miou") for couple in pairs]
        texts = [f"{each['label']} {_signed(found)}" for (each, _), found in zip(pairs, gaps, strict=True)]
        evidence = f"with the GTA5 teacher minus with the detection teacher, mIoU of {', '.join(texts)} points"
        return all_hold([each.verdict for each in gaps]), f"{evidence} ({_source(gaps)})."

    return over_variants(_dynamic(context, "hybrid_gta5"), judge_row)


@register("hybrid_forward", "c8")
def methods_are_in_order(context: Context) -> Verdict:
    """mIoU of hybrid forward > AT > FitNet > no teacher, for each teacher: every better row against every worse one."""
    _demand_rows(context, "baseline", *(f"{method}_{teacher}" for method in METHODS for teacher in TEACHERS))

    def judge_teacher(row: Row, teacher: str) -> tuple[list[Gap], str]:
        names = [*(f"{method}_{teacher}" for method in METHODS[1:]), "baseline"]
        ranks = [[row], *(_matching(context, name, row) for name in names)]
        rows = [each for rank in ranks for each in rank]
        _demand_done(rows, "miou")
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


@register("hybrid_forward", "c9")
def student_improves_on_teachers_domain(context: Context) -> Verdict:
    """mIoU on GTA5 with the GTA5 teacher against the detection teacher's and against none."""
    _demand_rows(context, "hybrid_gta5", "hybrid_det", "baseline")

    def judge_row(row: Row) -> Verdict:
        others = _matching(context, "hybrid_det", row) + _matching(context, "baseline", row)
        _demand_done([row, *others], "miou")
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


@register("hybrid_forward", "c12")
def pose_teacher_improves_most(context: Context) -> Verdict:
    """Miss rates against no teacher: most get better, and that of the reasonable subset by the most.

    The paper does not say whether it means points or shares of the miss rate (in its table both are true), so the
    largest improvement has to be the largest in both; where they disagree, the verdict is unknown.
    """
    _demand_rows(context, "hybrid_forward", "baseline")
    metrics = context.record.metrics
    names = [metric["name"] for metric in metrics]

    def judge_row(row: Row) -> Verdict:
        (other,) = _matching(context, "baseline", row)[:1]
        _demand_done([row, other], *names)
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


@register("hybrid_forward", "c14")
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
        _demand_done([row, none, *fixed.values()], name)
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


# Curves


def _balances(context: Context, row: Row) -> dict[int, Array]:
    """Seed -> balance at each step."""
    _demand_done([row])
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


@register("hybrid_forward", "c10")
def balance_falls(context: Context) -> Verdict:
    """Mean balance over the first fifth of the steps against that over the last fifth, for each teacher."""
    _demand_rows(context, "hybrid_det", "hybrid_gta5")

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


@register("hybrid_forward", "c11")
def balances_differ_only_at_the_start(context: Context) -> Verdict:
    """Balance with the detection teacher against the GTA5 teacher's: much larger over the first `START` of the steps
    (by more than `MUCH`), about the same later (`SAME`, mean over `SPANS` spans).
    """
    _demand_rows(context, "hybrid_det", "hybrid_gta5")

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


@register("hybrid_forward", "c13")
def model_gap_is_not_serious(context: Context) -> Verdict:
    """Balances of the two backbones: about the same (`SAME`, mean over `SPANS` spans), in the middle of the training
    larger with the teacher's own backbone.
    """
    _demand_rows(context, "hybrid_forward", "hybrid_resnet50")

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
