"""Judges of MAKD's claims, c1 to c8: what is compared, and the threshold."""

from __future__ import annotations

from tables.judging import Context, Judges, Pair, Verdict, better_by, chain, compared

JUDGES = Judges()

SIZE = 0.5  # share of a printed lead that a lead of about that size reaches at least; our choice

TARGETS = ("cub200", "stanford40", "mit67")
SOURCES = ("clipart", "real", "painting")
COLUMNS = {"mas_limited": TARGETS, "mas_domainnet": SOURCES}
BASELINES = ("scratch", "finetune", "at", "fitnet", "l2t", "crd")


def _chains(column: str, *ranks: str | tuple[str, ...]) -> list[tuple[str, str]]:
    """`chain` of a column's rows."""
    pairs = chain(*ranks)
    return [(f"{one}_{column}", f"{other}_{column}") for one, other in pairs]


def _over(columns: tuple[str, ...], *ranks: str | tuple[str, ...]) -> list[tuple[str, str]]:
    """The same of several columns."""
    return [pair for column in columns for pair in _chains(column, *ranks)]


@JUDGES.of("c1")
def one_subspace_beats_all_baselines(context: Context) -> Verdict:
    """Top-1 of AS against every baseline on each of the three small targets."""
    return compared(context, _over(TARGETS, "as", BASELINES))


@JUDGES.of("c2")
def more_subspaces_are_better(context: Context) -> Verdict:
    """Top-1 rises from AS over MAS and M2AS to M2A2S on each of them."""
    return compared(context, _over(TARGETS, "m2a2s", "m2as", "mas", "as"))


@JUDGES.of("c3")
def all_layers_lead_by_far(context: Context) -> Verdict:
    """Top-1 of M2AS above every baseline, the best one included, by the printed 6.16, 7.74 and 7.64."""
    pairs: list[Pair] = []
    for target, printed in zip(TARGETS, context.printed("c3"), strict=True):
        pairs += [(*pair, better_by(printed, SIZE)) for pair in _chains(target, "m2as", BASELINES)]
    return compared(context, pairs)


@JUDGES.of("c4")
def source_images_help(context: Context) -> Verdict:
    """Top-1 of M2A2S against M2AS, in the table at hand: on each target, or from each source."""
    return compared(context, _over(COLUMNS[context.record.name], "m2a2s", "m2as"))


@JUDGES.of("c5")
def finetuning_falls_below_scratch(context: Context) -> Verdict:
    """Top-1 of the student from scratch against the finetuned one; both are the same under each source."""
    return compared(context, _chains(SOURCES[0], "scratch", "finetune"))


@JUDGES.of("c6")
def l2t_falls_below_scratch(context: Context) -> Verdict:
    """Top-1 of the student from scratch against L2T from each source."""
    return compared(context, _over(SOURCES, "scratch", "l2t"))


@JUDGES.of("c7")
def best_with_many_labels(context: Context) -> Verdict:
    """Top-1 of M2AS and M2A2S against the others from each source; most printed leads lie inside the spreads."""
    return compared(context, _over(SOURCES, ("m2as", "m2a2s"), ("crd", "l2t", "finetune", "scratch")))


@JUDGES.of("c8")
def adapting_helps_by_itself(context: Context) -> Verdict:
    """Top-1 of AS, which matches one layer, against AT and L2T, which match many, on each target."""
    return compared(context, _over(TARGETS, "as", ("at", "l2t")))
