"""Judges of the claims of stage by stage, c1 to c12: what is compared, and the thresholds.

The paper gives no numbers for `nearly the same`, `close to the teacher` and `almost remains the same`: those below are
our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kt.files import read_sealed
from kt.store import read_results
from tables.folders import CONTENT
from tables.judging import (
    FAILS,
    HOLDS,
    UNKNOWN,
    Context,
    Judges,
    Missing,
    Pair,
    Row,
    Statement,
    Verdict,
    agree,
    at_least,
    beside,
    better,
    better_by,
    chain,
    compared,
    demand_done,
    demand_rows,
    nearly,
    over_variants,
    rows_of,
    ruling,
    sound,
    undone,
)
from tables.records import find_table

JUDGES = Judges()

# Points of top-1 that are nearly the same: less than the smallest gain in the paper's Table 1 (KD, 1.19); its rows that
# are said to be the same differ by up to 0.38.
NEARLY = 1.0
CLOSE = 1.0  # points below the teacher that are close to it: a fifth of its lead over the student, 4.98
SIZE = 0.5  # share of a printed lead that a lead of about that size reaches at least
COST = 1.25  # times the cost of one end-to-end training that is almost the same, or less

CIFAR, IMAGENET, COCO = "cifar100_stagewise", "imagenet_stagewise", "coco_retinanet"
OTHERS = ("kd", "fitnet", "at", "nst")
LENGTHS = ("full", "split")


@JUDGES.of("c1")
def fixed_features_suffice(context: Context) -> Verdict:
    """Top-1 of a fresh classifier on frozen features against end-to-end training, of student and teacher."""
    return compared(context, [("student_fixed", "student"), ("teacher_fixed", "teacher")], test=nearly(NEARLY))


@JUDGES.of("c2")
def the_cut_does_not_matter(context: Context) -> Verdict:
    """Top-1 with only the first block frozen against end-to-end training."""
    return compared(context, [("teacher_fixed_first_block", "teacher")], test=nearly(NEARLY))


@JUDGES.of("c3")
def distilled_features_suffice(context: Context) -> Verdict:
    """Top-1 of a fresh classifier on the features that KD gave against KD."""
    return compared(context, [("kd_fixed", "kd")], test=nearly(NEARLY))


COUNTS = [f"stages_{count}" for count in range(1, 5)]


@JUDGES.of("c4")
def every_count_beats_the_student(context: Context) -> Verdict:
    """Top-1 of K = 1 to 4 against the plain student."""
    return compared(context, chain(COUNTS[::-1], "student"))


@JUDGES.of("c5")
def more_stages_are_better(context: Context) -> Verdict:
    """Top-1 and top-5 rise with each further stage."""
    return compared(context, chain(*COUNTS[::-1]), ("top1", "top5"))


@JUDGES.of("c6")
def four_stages_lead(context: Context) -> Verdict:
    """Top-1 of K = 4 above the student's and that of K = 1, by the printed 4.7 and 2.4."""
    leads = zip(("student", COUNTS[0]), context.printed("c6"), strict=True)
    return compared(context, [(COUNTS[-1], other, better_by(printed, SIZE)) for other, printed in leads])


@JUDGES.of("c7")
def best_on_cifar(context: Context) -> Verdict:
    """Top-1 and top-5 against KD, FitNets, AT and NST, and no further below the teacher than is close."""
    pairs: list[Pair] = [*chain("stagewise", OTHERS), ("stagewise", "teacher", at_least(-CLOSE))]
    return compared(context, pairs, ("top1", "top5"))


@JUDGES.of("c8")
def best_on_imagenet(context: Context) -> Verdict:
    """Top-1 and top-5 against every other student."""
    return compared(context, chain("stagewise", ("student", *OTHERS)), ("top1", "top5"))


@JUDGES.of("c10")
def best_on_coco(context: Context) -> Verdict:
    """mAP against the student (printed: 1.0 more) and against FitNets, AT and NST."""
    (printed,) = context.printed("c10")
    pairs: list[Pair] = [("stagewise", "student", better_by(printed, SIZE)), *chain("stagewise", OTHERS[1:])]
    return compared(context, pairs, "map")


# Claims over several tables


def elsewhere(context: Context, name: str) -> Context:
    """The same run's results of another table, as it was last rendered at this table's scale.

    Raises:
        Missing: There are none.
    """
    if context.record.name == name:
        return context
    scales = [(result.get("config") or {}).get("scale", {}).get("name") for result in context.results.values()]
    scale = next((each for each in scales if each), "mini")
    path = context.output_root / "tables" / name / scale / CONTENT
    rows = (read_sealed(path) or {}).get("rows")
    if rows is None:
        raise Missing(f"Needs the table {name} at the same scale: +table={name} scale={scale}.")
    ids = {cell["id"] for row in rows for cell in row["cells"]}
    return Context(find_table(name), rows, read_results(context.output_root, ids), context.output_root)


def _over_tables(
    context: Context, pairs: Mapping[str, Sequence[tuple[str, str]]], metrics: Mapping[str, str]
) -> Verdict:
    """Whether in each pair of row ids, table by table, the first is better."""
    found: list[Statement] = []
    looked: list[tuple[Context, list[Row], str]] = []
    for name, couples in pairs.items():
        there = elsewhere(context, name)
        demand_rows(there, *dict.fromkeys(row_id for couple in couples for row_id in couple))
        for first, second in couples:
            row = rows_of(there, first)[0]
            other = beside(there, second, row)
            statement = better(there, row, other, metrics[name])
            found.append(replace(statement, text=f"in {name} {statement.text}"))
            looked.append((there, [row, other], metrics[name]))
    verdict = ruling(found)
    for there, rows, metric in looked:
        verdict = sound(there, verdict, rows, metric)
    return verdict


METRICS = {CIFAR: "top1", IMAGENET: "top1", COCO: "map"}


@JUDGES.of("c9")
def others_change_order(context: Context) -> Verdict:
    """Top-1 of FitNets above AT's on CIFAR-100 and below it on ImageNet."""
    return _over_tables(context, {CIFAR: [("fitnet", "at")], IMAGENET: [("at", "fitnet")]}, METRICS)


@JUDGES.of("c12")
def first_everywhere(context: Context) -> Verdict:
    """Stage by stage leads every other student on CIFAR-100, ImageNet and COCO."""
    others = {name: ("student", *(OTHERS[1:] if name == COCO else OTHERS)) for name in METRICS}
    return _over_tables(context, {name: chain("stagewise", ids) for name, ids in others.items()}, METRICS)


# Cost


def _mean_results(context: Context, row: Row) -> list[Mapping[str, Any]]:
    demand_done([row])
    return [context.results[cell["id"]] for cell in row["cells"] if cell["id"] in context.results]


def seconds_per_step(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Phase -> seconds of one training step, mean over seeds."""
    found: dict[str, list[float]] = {}
    for result in results:
        for phase in result.get("phases") or []:
            found.setdefault(phase["name"], []).append(phase["seconds"] / phase["steps"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def total_cost(costs: Mapping[str, float], features: Sequence[str], length: str, head: float) -> float:
    """Cost of a training in units of one step of every phase times the schedule's length.

    Args:
        costs: Phase -> cost of a step.
        features: The feature phases.
        length: `full` or `split`.
        head: Length of the final phase as a share of the schedule.
    """
    share = 1.0 if length == "full" else 1.0 / len(features)
    return share * sum(costs[name] for name in features) + head * costs["train"]


def _staged(context: Context) -> tuple[Context, list[Row]]:
    """The rows with the most stages, from the table of stage counts if this one has none."""
    for name in (context.record.name, "stage_count"):
        there = elsewhere(context, name)
        rows = [row for row in there.rows if row["method"] == "stagewise" and row["mean"]]
        counts = {row["id"]: len(there.result(row).get("stages") or ()) for row in rows}
        most = [row for row in rows if counts[row["id"]] == max(counts.values()) > 1]
        if most:
            return there, most
    raise Missing("Needs a finished row of stage by stage with two stages or more: +table=stage_count.")


@JUDGES.of("c11")
def cost_is_that_of_one_training(context: Context) -> Verdict:
    """Operations and measured time of all phases over those of end-to-end mimicking (K = 1), for both phase lengths.

    Each phase's costs of a step are measured; the length that was not trained follows from them. Without a row of
    K = 1, times are told against the student's own training and operations alone decide.
    """
    there, rows = _staged(context)
    own = "" if there is context else f"In the table {there.record.name}: "

    def judge_row(row: Row) -> Verdict:
        results = _mean_results(there, row)
        flops, seconds = results[0].get("flops") or {}, seconds_per_step(results)
        features = list(results[0]["stages"])
        method = results[0]["config"]["method"]
        if not flops or not {*features, "train"} <= seconds.keys():
            raise Missing(f"Needs the costs in the result of {row['label']}; train it again.")
        single = next((each for each in there.named("stages_1") if agree(row, each) and not undone(each)), None)
        student = there.untaught(row)
        verdicts, texts = {}, []
        head = method["head_length"]
        for length in LENGTHS:
            counted = total_cost(flops, features, length, head)
            ratio = counted / (flops["end_to_end"] + head * flops["train"])
            ratios, text = [ratio], f"{ratio:.2f} times the operations"
            if single is not None:
                other = seconds_per_step(_mean_results(there, single))
                slower = total_cost(seconds, features, length, head) / total_cost(other, ["stage1"], "full", head)
                ratios.append(slower)
                text += f" and {slower:.2f} times the time"
            text += " of end-to-end mimicking"
            if student is not None and not undone(student):
                alone = seconds_per_step(_mean_results(there, student)).get("train")
                if alone:
                    spent = total_cost(seconds, features, length, head) / alone
                    more = counted / flops["task"]
                    text += f" ({more:.2f} and {spent:.2f} times the student's own training)"
            found = {HOLDS if each <= COST else FAILS for each in ratios}
            verdicts[length] = found.pop() if len(found) == 1 else UNKNOWN
            trained = "trained so" if length == method["phase_length"] else "reckoned from the same phases"
            texts.append(f"phase_length={length} ({trained}): {text}: {verdicts[length]}")
        evidence = f"{own}{len(features)} stages and head, {'; '.join(texts)}"
        evidence = f"{evidence}. Almost the same or less: at most {COST} times."
        return Verdict(verdicts[method["phase_length"]], evidence)

    return over_variants(rows, judge_row)
