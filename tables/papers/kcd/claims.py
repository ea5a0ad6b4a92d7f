"""Judges of knowledge consistent distillation's claims, c1 to c14.

With several seeds a difference has to be above the spread of the seeds. With one, that of an accuracy is two binomial
standard errors of the test set; average precision, overlaps and distances have no such error, so every
difference counts there. The paper gives no numbers for `about as good` (c2, c7) and `strongly` (c12): our readings are
within what may differ by chance, and at least twice as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tables.judging import (
    FAILS,
    HOLDS,
    UNKNOWN,
    Context,
    Gap,
    Judges,
    Row,
    Verdict,
    all_hold,
    beside,
    count_seeds,
    demand_done,
    over_variants,
    rows_of,
    sampling_noise,
    show_value,
    signed,
)

JUDGES = Judges()

PAIRS = ("fitnet", "ab", "rkd", "rco")  # what the transform is combined with
STRONGLY = 2.0  # an overlap rises strongly if it becomes at least so many times as large
FAR_BELOW = 50.0  # percent: an overlap far below 100


def difference(context: Context, row: Row, other: Row, name: str = "top1") -> Gap:
    """By how much a row is better than another, with what it may differ by chance."""
    demand_done((row, other), name)
    better = next(metric["better"] for metric in context.record.metrics if metric["name"] == name)
    sign = 1 if better == "higher" else -1
    seeds = min(len(row["cells"]), len(other["cells"]))
    if seeds > 1 or name == "top1":
        spreads = [sampling_noise(context, each, name)[0] or 0.0 for each in (row, other)]
    else:
        spreads = [0.0]
    return Gap(sign * (row["mean"][name] - other["mean"][name]), math.hypot(*spreads), seeds)


def tell(found: Gap) -> str:
    """`+1.20 (may differ by 2.10)`."""
    return signed(found.mean) + (f" (by chance {found.spread:.2f})" if found.spread else "")


def same(found: Gap) -> str:
    """Whether two rows are about as good: no further apart than what may differ by chance."""
    return HOLDS if abs(found.mean) <= found.spread else FAILS


def compare(context: Context, pairs: Sequence[tuple[Row, Row]], name: str = "top1") -> tuple[list[Gap], str]:
    """The differences of pairs, and all of them in words."""
    gaps = [difference(context, *pair, name) for pair in pairs]
    texts = [
        f"{one['label']} - {other['label']} {tell(found)}" for (one, other), found in zip(pairs, gaps, strict=True)
    ]
    return gaps, ", ".join(texts)


def for_each(context: Context, row_id: str, judge_row: Callable[[Row], Verdict]) -> Verdict:
    """A verdict over all variants of a row."""
    return over_variants(rows_of(context, row_id), judge_row)


def ordered(
    context: Context, row_id: str, pairs: Sequence[tuple[str, str]], judge: Callable[[Gap], str] | None = None
) -> Verdict:
    """Whether in every pair of row ids the first is better (or what `judge` says of the difference)."""

    def judge_row(row: Row) -> Verdict:
        rows = [tuple(beside(context, each, row) for each in pair) for pair in pairs]
        gaps, text = compare(context, [(first, second) for first, second in rows])
        verdicts = [judge(found) if judge else found.verdict for found in gaps]
        return all_hold(verdicts), f"top-1 in points, {text} ({count_seeds(gaps[0].seeds)})."

    return for_each(context, row_id, judge_row)


@JUDGES.of("c1")
def bipartite_is_best(context: Context) -> Verdict:
    """Bipartite above greedy above random and no transform."""
    pairs = [("bipartite", "greedy"), ("greedy", "random"), ("greedy", "baseline")]
    return ordered(context, "bipartite", pairs)


@JUDGES.of("c2")
def random_is_as_good_as_none(context: Context) -> Verdict:
    """Random and no transform differ by no more than chance."""
    return ordered(context, "random", [("random", "baseline")], same)


@JUDGES.of("c3")
def learned_are_worst(context: Context) -> Verdict:
    """Both learned transforms below the random one."""
    return ordered(context, "random", [("random", "subnet_fc"), ("random", "subnet_res")])


@JUDGES.of("c4")
def correlation_is_best(context: Context) -> Verdict:
    """Correlation above each other metric, and all above no transform."""
    others = ("l1", "l2", "cosine", "kl")
    pairs = [*(("correlation", other) for other in others), *((one, "baseline") for one in ("correlation", *others))]
    return ordered(context, "correlation", pairs)


@JUDGES.of("c5")
def only_its_own_initialisation(context: Context) -> Verdict:
    """The own initial weights above the others, and those near no transform; the same for the teacher's."""

    def judge_row(row: Row) -> Verdict:
        verdicts, texts = [], []
        for own in ("S", "T"):
            others = [beside(context, f"{own}{i}", row) for i in (1, 2, 3)]
            gaps, text = compare(context, [(beside(context, own, row), other) for other in others])
            near, near_text = compare(context, [(other, beside(context, "baseline", row)) for other in others])
            verdicts += [*(found.verdict for found in gaps), *(same(found) for found in near)]
            texts += [text, near_text]
        return all_hold(verdicts), f"top-1 in points, {'; '.join(texts)}."

    return for_each(context, "S", judge_row)


@JUDGES.of("c6")
def both_must_be_trained(context: Context) -> Verdict:
    """Trained student and teacher above every other of the four."""
    return ordered(context, "S_T", [("S_T", other) for other in ("S0_T0", "S0_T", "S_T0")])


@JUDGES.of("c7")
def dynamic_is_not_better(context: Context) -> Verdict:
    """Dynamic not above static by more than chance."""

    def not_better(found: Gap) -> str:
        return FAILS if found.verdict == HOLDS else HOLDS

    return ordered(context, "dynamic", [("dynamic", "static")], not_better)


@JUDGES.of("c8")
def more_transforms_help_slightly(context: Context) -> Verdict:
    """The most transforms above one, and no row with more below a row with fewer by more than chance."""

    def judge_row(row: Row) -> Verdict:
        rows = [beside(context, row_id, row) for row_id in ("K1", "K10", "K100", "K1000")]
        gaps, text = compare(context, [(rows[3], rows[0]), *zip(rows[1:], rows[:-1], strict=True)])
        falls = FAILS if any(found.verdict == FAILS for found in gaps[1:]) else HOLDS
        return all_hold([gaps[0].verdict, falls]), f"top-1 in points, {text} ({count_seeds(gaps[0].seeds)})."

    return for_each(context, "K1", judge_row)


def _students(context: Context) -> list[str]:
    """The suffixes of row ids that tell the students of a comparison apart."""
    return ["half", "full"] if context.record.name == "cifar100_kcd" else ["r18", "mbv2"]


@JUDGES.of("c9")
def transform_improves_others(context: Context) -> Verdict:
    """Every combination above the method alone, for both students."""
    suffixes = _students(context)
    pairs = [(f"kcd_{name}_{suffix}", f"{name}_{suffix}") for suffix in suffixes for name in PAIRS]
    return ordered(context, pairs[0][0], pairs)


@JUDGES.of("c10")
def named_gains(context: Context) -> Verdict:
    """Ours + RKD above RKD for the half-wide student, ours + RCO above the lone full one."""
    return ordered(context, "kcd_rkd_half", [("kcd_rkd_half", "rkd_half"), ("kcd_rco_full", "none_full")])


@JUDGES.of("c11")
def detection_is_ordered(context: Context) -> Verdict:
    """AP: ours above L2 above the lone student, for both backbones."""

    def judge_row(row: Row) -> Verdict:
        pairs = []
        for name in ("r18", "r50"):
            ours, plain, alone = (beside(context, f"{kind}_{name}", row) for kind in ("kcd", "l2", "student"))
            pairs += [(ours, plain), (plain, alone)]
        gaps, text = compare(context, pairs, "ap")
        # Nothing can be said of detectors that find nothing.
        blind = all(each["mean"]["ap"] == 0 for pair in pairs for each in pair)
        verdict = UNKNOWN if blind else all_hold([found.verdict for found in gaps])
        shown = ", ".join(f"{each['label']} {show_value(each, 'ap', 1)}" for pair in pairs for each in pair[::2])
        return verdict, f"AP in points, {text} ({shown}; {count_seeds(gaps[0].seeds)})."

    return for_each(context, "kcd_r18", judge_row)


def _overlaps(context: Context, row: Row) -> Mapping[str, float]:
    names = [metric["name"] for metric in context.record.metrics]
    demand_done([row], *names)
    return {name: row["mean"][name] for name in names}


@JUDGES.of("c12")
def overlap_rises_strongly(context: Context) -> Verdict:
    """Every overlap at least `STRONGLY` times as large after the transform, and below half before."""

    def judge_row(row: Row) -> Verdict:
        after = _overlaps(context, row)
        before = _overlaps(context, beside(context, "student_teacher", row))
        rises = [HOLDS if after[name] >= STRONGLY * before[name] and after[name] > 0 else FAILS for name in after]
        small = [HOLDS if value < FAR_BELOW else FAILS for value in before.values()]
        shown = ", ".join(f"{before[name]:.1f} to {after[name]:.1f}" for name in after)
        share = f"strongly: {STRONGLY:g} times as much; small: below {FAR_BELOW:g} %"
        return all_hold([*rises, *small]), f"overlaps in percent, rising k: {shown} ({share})."

    return for_each(context, "transformed", judge_row)


@JUDGES.of("c13")
def initialisations_differ(context: Context) -> Verdict:
    """Every overlap of two students far below 100 percent (`FAR_BELOW`)."""

    def judge_row(row: Row) -> Verdict:
        found = _overlaps(context, row)
        verdicts = [HOLDS if value < FAR_BELOW else FAILS for value in found.values()]
        shown = ", ".join(f"{value:.1f}" for value in found.values())
        return all_hold(verdicts), f"overlaps in percent, rising k: {shown} (far below 100: below {FAR_BELOW:g})."

    return for_each(context, "two_students", judge_row)


@JUDGES.of("c14")
def distances_fall(context: Context) -> Verdict:
    """Both distances: lower with the transform before training, lower after every method, lowest with the transform."""

    def judge_row(row: Row) -> Verdict:
        solo, moved = beside(context, "solo", row), beside(context, "solo_transformed", row)
        taught = [(beside(context, f"kcd_{name}", row), beside(context, name, row)) for name in PAIRS]
        verdicts, texts = [], []
        for name, shown in (("kl_divergence", "KL"), ("l2_distance", "L2")):
            before = difference(context, moved, solo, name).verdict
            after = [difference(context, each, solo, name).verdict for pair in taught for each in pair]
            lower = [difference(context, *pair, name).verdict for pair in taught]
            verdicts += [before, *after, *lower]
            texts.append(
                f"{shown} {solo['mean'][name]:.3g}, with the transform {moved['mean'][name]:.3g} before training; "
                f"lower in {after.count(HOLDS)} of {len(after)} taught students, and with the transform lower than "
                f"without in {lower.count(HOLDS)} of {len(lower)}"
            )
        return all_hold(verdicts), f"{'; '.join(texts)} (row labels are a guess; {count_seeds(len(row['cells']))})."

    return for_each(context, "solo_transformed", judge_row)
