"""Judges of knowledge consistent distillation's claims, c1 to c14: what is compared, and the thresholds.

The paper gives no numbers for `about as good` (c2, c5, c7), `slightly` (c8) and `strongly` (c12): our readings.
"""

from __future__ import annotations

from tables.judging import (
    HOLDS,
    Context,
    Judges,
    Row,
    Statement,
    Verdict,
    at_least,
    at_most,
    beside,
    better_by,
    chain,
    compared,
    improvement,
    level,
    nearly,
    over_variants,
    rows_of,
    ruling,
    sound,
)

JUDGES = Judges()

PAIRS = ("fitnet", "ab", "rkd", "rco")  # what the transform is combined with
NEARLY = 0.75  # points of top-1 that are about as good: less than the 0.83 that the transform is said to gain
SIZE = 0.5  # share of a printed lead that a lead of about that size reaches at least
STRONGLY = 2.0  # an overlap rises strongly if it becomes at least so many times as large
FAR_BELOW = 50.0  # percent: an overlap far below 100
# What chance may do to a distance (KL, L2) of one seed: a third of the smallest difference that the paper reads, 0.86
# against 0.89. No distance of each image is kept.
DISTANCE_SHARE = 0.01


@JUDGES.of("c1")
def bipartite_is_best(context: Context) -> Verdict:
    """Bipartite above greedy above random and no transform."""
    return compared(context, chain("bipartite", "greedy", ("random", "baseline")))


@JUDGES.of("c2")
def random_is_as_good_as_none(context: Context) -> Verdict:
    """Random and no transform nearly equal."""
    return compared(context, [("random", "baseline")], test=nearly(NEARLY))


@JUDGES.of("c3")
def learned_are_worst(context: Context) -> Verdict:
    """Both learned transforms below the random one."""
    return compared(context, [("random", "subnet_fc"), ("random", "subnet_res")])


@JUDGES.of("c4")
def correlation_is_best(context: Context) -> Verdict:
    """Correlation above each other metric, and all above no transform."""
    return compared(context, chain("correlation", ("l1", "l2", "cosine", "kl"), "baseline"))


@JUDGES.of("c5")
def only_its_own_initialisation(context: Context) -> Verdict:
    """The own initial weights above the others, and those near no transform; the same for the teacher's."""
    others = [(own, f"{own}{number}") for own in ("S", "T") for number in (1, 2, 3)]
    return compared(context, [*others, *((other, "baseline", nearly(NEARLY)) for _, other in others)])


@JUDGES.of("c6")
def both_must_be_trained(context: Context) -> Verdict:
    """Trained student and teacher above every other of the four."""
    return compared(context, chain("S_T", ("S0_T0", "S0_T", "S_T0")))


@JUDGES.of("c7")
def dynamic_is_not_better(context: Context) -> Verdict:
    """Dynamic not above static by more than is about as good."""
    return compared(context, [("dynamic", "static")], test=at_most(NEARLY))


@JUDGES.of("c8")
def more_transforms_help_slightly(context: Context) -> Verdict:
    """The most transforms above one, and no row with more below the one with fewer by more than is about as good."""
    steps = [(more, fewer, at_least(-NEARLY)) for fewer, more in (("K1", "K10"), ("K10", "K100"), ("K100", "K1000"))]
    return compared(context, [("K1000", "K1"), *steps])


@JUDGES.of("c9")
def transform_improves_others(context: Context) -> Verdict:
    """Every combination above the method alone, for both students."""
    students = ("half", "full") if context.record.name == "cifar100_kcd" else ("r18", "mbv2")
    return compared(context, [(f"kcd_{name}_{student}", f"{name}_{student}") for student in students for name in PAIRS])


@JUDGES.of("c10")
def named_gains(context: Context) -> Verdict:
    """Ours + RKD above RKD for the half-wide student, ours + RCO above the lone full one."""
    _, over_rkd, _, over_none = context.printed("c10")
    pairs = [
        ("kcd_rkd_half", "rkd_half", better_by(over_rkd, SIZE)),
        ("kcd_rco_full", "none_full", better_by(over_none, SIZE)),
    ]
    return compared(context, pairs)


@JUDGES.of("c11")
def detection_is_ordered(context: Context) -> Verdict:
    """AP: ours above L2 above the lone student, for both backbones, and above the lone student by what is printed."""
    r18, ours_r18, _, _, over_r50 = context.printed("c11")
    leads = {"r18": round(ours_r18 - r18, 1), "r50": over_r50}
    pairs = [
        pair
        for name, lead in leads.items()
        for pair in (
            (f"kcd_{name}", f"l2_{name}"),
            (f"l2_{name}", f"student_{name}"),
            (f"kcd_{name}", f"student_{name}", better_by(lead, SIZE)),
        )
    ]
    return compared(context, pairs, "ap")


@JUDGES.of("c12")
def overlap_rises_strongly(context: Context) -> Verdict:
    """Every overlap at least `STRONGLY` times as large after the transform, and below half before."""

    def judge_row(row: Row) -> Verdict:
        found, shown = [], []
        for metric in context.record.metrics:
            after = level(context, row, metric["name"])
            before = level(context, beside(context, "student_teacher", row), metric["name"])
            rise = after.minus(before.scaled(STRONGLY))
            found += [rise.above(rise.text(1)), before.at_most(before.text(1), FAR_BELOW)]
            shown.append(f"{before.mean:.1f} to {after.mean:.1f}")
        share = f"strongly: {STRONGLY:g} times as much; small: below {FAR_BELOW:g} %"
        verdict = ruling(found, f"overlaps in percent, rising k: {', '.join(shown)} ({share})")
        return sound(context, verdict, [row])

    return over_variants(rows_of(context, "transformed"), judge_row)


@JUDGES.of("c13")
def initialisations_differ(context: Context) -> Verdict:
    """Every overlap of two students far below 100 percent (`FAR_BELOW`)."""

    def judge_row(row: Row) -> Verdict:
        levels = [level(context, row, metric["name"]) for metric in context.record.metrics]
        shown = ", ".join(f"{each.mean:.1f}" for each in levels)
        text = f"overlaps in percent, rising k: {shown} (far below 100: below {FAR_BELOW:g})"
        return sound(context, ruling([each.at_most(shown, FAR_BELOW) for each in levels], text), [row])

    return over_variants(rows_of(context, "two_students"), judge_row)


@JUDGES.of("c14")
def distances_fall(context: Context) -> Verdict:
    """Both distances: lower with the transform before training, lower after every method, lowest with the transform."""

    def judge_row(row: Row) -> Verdict:
        solo, moved = beside(context, "solo", row), beside(context, "solo_transformed", row)
        taught = [(beside(context, f"kcd_{name}", row), beside(context, name, row)) for name in PAIRS]
        found, texts = [], []
        for name, shown in (("kl_divergence", "KL"), ("l2_distance", "L2")):

            def lower(one: Row, other: Row, name: str = name, shown: str = shown) -> Statement:
                difference = improvement(context, one, other, name, DISTANCE_SHARE)
                return difference.above(f"{shown} {other['label']} - {one['label']} {difference.text()}")

            before = lower(moved, solo)
            after = [lower(each, solo) for pair in taught for each in pair]
            without = [lower(*pair) for pair in taught]
            found += [before, *after, *without]
            counts = [sum(each.verdict == HOLDS for each in group) for group in (after, without)]
            texts.append(
                f"{shown} {solo['mean'][name]:.3g}, with the transform {moved['mean'][name]:.3g} before training; "
                f"lower in {counts[0]} of {len(after)} taught students, and with the transform lower than "
                f"without in {counts[1]} of {len(without)}"
            )
        verdict = ruling(found, f"{'; '.join(texts)} (row labels are a guess)")
        return sound(context, verdict, [row, solo, *(each for pair in taught for each in pair)])

    return over_variants(rows_of(context, "solo_transformed"), judge_row)
