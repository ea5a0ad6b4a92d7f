"""Judges of the claims of stage by stage, c1 to c12.

What may differ by chance: means over several seeds, their standard deviations; with one seed two binomial standard
errors of an accuracy, and for average precisions what `tables.judging` takes for none. The paper gives no numbers
for `nearly the same`, `close to the teacher` and `almost remains the same`: those below are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kt.files import read_json
from kt.store import read_results
from tables.judging import (
    FAILS,
    HOLDS,
    UNKNOWN,
    Context,
    Gap,
    Judges,
    Missing,
    Row,
    Verdict,
    agree,
    all_hold,
    beside,
    count_seeds,
    demand_done,
    demand_rows,
    improvement,
    over_variants,
    rows_of,
    sampling_noise,
    show_value,
    undone,
)
from tables.records import find_table

JUDGES = Judges()

NEARLY = 0.5  # points of top-1 that are nearly the same; the paper's own rows differ by up to 0.38
CLOSE = 1.0  # points below the teacher that are close to it
SIZE = 0.5  # share of a printed lead that a lead of about that size reaches at least
COST = 1.25  # times the cost of one end-to-end training that is almost the same, or less

CIFAR, IMAGENET, COCO = "cifar100_stagewise", "imagenet_stagewise", "coco_retinanet"
OTHERS = ("kd", "fitnet", "at", "nst")
LENGTHS = ("full", "split")


# Rows and their differences


def lead(context: Context, row: Row, other: Row, metric: str) -> Gap:
    """By how many points a row is above another.

    Raises:
        Missing: One of them is not done.
    """
    demand_done((row, other), metric)
    if metric not in ("top1", "top5"):
        return improvement(context, row, other, metric)
    noises = [sampling_noise(context, each, metric)[0] for each in (row, other)]
    known = [noise for noise in noises if noise is not None]
    margin = math.hypot(*known) if len(known) == 2 else max([NEARLY, *known])
    seeds = min(len(row["cells"]), len(other["cells"]))
    return Gap(row["mean"][metric] - other["mean"][metric], margin, seeds)


def _source(gaps: Sequence[Gap]) -> str:
    seeds = min(each.seeds for each in gaps)
    return f"± is the spread of {count_seeds(seeds)}" if seeds > 1 else "one seed; ± is what chance may do"


def _label(metric: str) -> str:
    return {"top1": "top-1", "top5": "top-5", "map": "mAP"}[metric]


def _nearly_same(context: Context, row: Row, other: Row) -> tuple[str, Gap, str]:
    found = lead(context, row, other, "top1")
    text = f"{row['label']} {show_value(row, 'top1', 2)} against {show_value(other, 'top1', 2)}: {found.text()} points"
    return Gap(NEARLY - abs(found.mean), found.spread, found.seeds).verdict, found, text


def _judge_fixed(context: Context, pairs: Sequence[tuple[str, str]]) -> Verdict:
    """Whether each first row has nearly the top-1 accuracy of its second one."""
    demand_rows(context, *dict.fromkeys(each for pair in pairs for each in pair))

    def judge_row(row: Row) -> Verdict:
        found = [_nearly_same(context, beside(context, one, row), beside(context, other, row)) for one, other in pairs]
        texts = "; ".join(text for _, _, text in found)
        evidence = f"top-1 of {texts} (nearly the same: at most {NEARLY}; {_source([gap for _, gap, _ in found])})."
        return all_hold([verdict for verdict, _, _ in found]), evidence

    return over_variants(rows_of(context, pairs[0][0]), judge_row)


@JUDGES.of("c1")
def fixed_features_suffice(context: Context) -> Verdict:
    """Top-1 of a fresh classifier on frozen features against end-to-end training, of student and teacher."""
    return _judge_fixed(context, [("student_fixed", "student"), ("teacher_fixed", "teacher")])


@JUDGES.of("c2")
def the_cut_does_not_matter(context: Context) -> Verdict:
    """Top-1 with only the first block frozen against end-to-end training."""
    return _judge_fixed(context, [("teacher_fixed_first_block", "teacher")])


@JUDGES.of("c3")
def distilled_features_suffice(context: Context) -> Verdict:
    """Top-1 of a fresh classifier on the features that KD gave against KD."""
    return _judge_fixed(context, [("kd_fixed", "kd")])


COUNTS = [f"stages_{count}" for count in range(1, 5)]


@JUDGES.of("c4")
def every_count_beats_the_student(context: Context) -> Verdict:
    """Top-1 of K = 1 to 4 against the plain student."""
    demand_rows(context, "student", *COUNTS)

    def judge_row(row: Row) -> Verdict:
        student = beside(context, "student", row)
        gaps = [lead(context, beside(context, row_id, row), student, "top1") for row_id in COUNTS]
        texts = ", ".join(f"K = {number} {found.text()}" for number, found in enumerate(gaps, 1))
        evidence = f"top-1 above the student's {show_value(student, 'top1', 2)} by: {texts} points ({_source(gaps)})."
        return all_hold([found.verdict for found in gaps]), evidence

    return over_variants(rows_of(context, COUNTS[-1]), judge_row)


@JUDGES.of("c5")
def more_stages_are_better(context: Context) -> Verdict:
    """Top-1 and top-5 rise with each further stage."""
    demand_rows(context, *COUNTS)

    def judge_row(row: Row) -> Verdict:
        rows = [beside(context, row_id, row) for row_id in COUNTS]
        verdicts, texts, gaps = [], [], []
        for metric in ("top1", "top5"):
            steps = [lead(context, more, fewer, metric) for fewer, more in zip(rows[:-1], rows[1:], strict=True)]
            verdicts += [found.verdict for found in steps]
            gaps += steps
            values = ", ".join(show_value(each, metric, 2) for each in rows)
            texts.append(f"{_label(metric)} {values}")
        smallest = min(gaps, key=lambda found: found.mean - found.spread)
        evidence = f"for K = 1 to 4 {'; '.join(texts)}; smallest step {smallest.text()} points ({_source(gaps)})."
        return all_hold(verdicts), evidence

    return over_variants(rows_of(context, COUNTS[-1]), judge_row)


def _about(found: Gap, printed: float) -> str:
    """Whether a lead is of about the printed size: at least the share `SIZE` of it."""
    return Gap(found.mean - SIZE * printed, found.spread, found.seeds).verdict


def _printed(context: Context, claim: str) -> list[float]:
    return next(each["numbers"] for each in context.record.document["claims"] if each["id"] == claim)


@JUDGES.of("c6")
def four_stages_lead(context: Context) -> Verdict:
    """Top-1 of K = 4 minus the student's and minus K = 1, against the printed 4.7 and 2.4."""
    demand_rows(context, "student", COUNTS[0], COUNTS[-1])

    def judge_row(row: Row) -> Verdict:
        others = [beside(context, "student", row), beside(context, COUNTS[0], row)]
        printed = _printed(context, "c6")
        gaps = [lead(context, row, other, "top1") for other in others]
        texts = [
            f"{found.text()} over {other['label']} (printed {number:+.1f})"
            for found, other, number in zip(gaps, others, printed, strict=True)
        ]
        verdicts = [_about(found, number) for found, number in zip(gaps, printed, strict=True)]
        evidence = f"top-1 of 4 stages is {' and '.join(texts)}; at least half of that counts ({_source(gaps)})."
        return all_hold(verdicts), evidence

    return over_variants(rows_of(context, COUNTS[-1]), judge_row)


def _best(context: Context, row: Row, others: Sequence[str], metrics: Sequence[str]) -> tuple[str, str, list[Gap]]:
    """Whether a row leads others in all metrics, with the closest of them in words."""
    rows = [beside(context, row_id, row) for row_id in others]
    verdicts, texts, gaps = [], [], []
    for metric in metrics:
        found = [(other, lead(context, row, other, metric)) for other in rows]
        closest, least = min(found, key=lambda pair: pair[1].mean)
        gaps += [each for _, each in found]
        verdicts += [each.verdict for _, each in found]
        value = show_value(row, metric, 2)
        label = _label(metric)
        texts.append(f"{label} {value}, {least.text()} over the best other, {closest['label']}")
    return all_hold(verdicts), "; ".join(texts), gaps


@JUDGES.of("c7")
def best_on_cifar(context: Context) -> Verdict:
    """Top-1 and top-5 against KD, FitNets, AT and NST, and top-1 against the teacher."""
    demand_rows(context, "stagewise", "teacher", *OTHERS)

    def judge_row(row: Row) -> Verdict:
        verdict, text, gaps = _best(context, row, OTHERS, ("top1", "top5"))
        below = lead(context, row, beside(context, "teacher", row), "top1")
        near = Gap(below.mean + CLOSE, below.spread, below.seeds).verdict
        evidence = f"{text}; top-1 {below.text()} against the teacher (close: at least {-CLOSE:+.1f}; {_source(gaps)})."
        return all_hold([verdict, near]), evidence

    return over_variants(rows_of(context, "stagewise"), judge_row)


@JUDGES.of("c8")
def best_on_imagenet(context: Context) -> Verdict:
    """Top-1 and top-5 against every other student."""
    others = ("student", *OTHERS)
    demand_rows(context, "stagewise", *others)

    def judge_row(row: Row) -> Verdict:
        verdict, text, gaps = _best(context, row, others, ("top1", "top5"))
        return verdict, f"{text} ({_source(gaps)})."

    return over_variants(rows_of(context, "stagewise"), judge_row)


@JUDGES.of("c10")
def best_on_coco(context: Context) -> Verdict:
    """mAP against the student (printed: 1.0 more) and against FitNets, AT and NST."""
    others = OTHERS[1:]
    demand_rows(context, "stagewise", "student", *others)

    def judge_row(row: Row) -> Verdict:
        verdict, text, gaps = _best(context, row, others, ("map",))
        over = lead(context, row, beside(context, "student", row), "map")
        (printed,) = _printed(context, "c10")
        evidence = (
            f"{text}; {over.text()} over the student (printed {printed:+.1f}, at least half of that counts; "
            f"{_source([*gaps, over])})."
        )
        return all_hold([verdict, _about(over, printed)]), evidence

    return over_variants(rows_of(context, "stagewise"), judge_row)


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
    path = context.output_root / "tables" / name / scale / "table.json"
    rows = (read_json(path) or {}).get("rows")
    if rows is None:
        raise Missing(f"Needs the table {name} at the same scale: +table={name} scale={scale}.")
    ids = {cell["id"] for row in rows for cell in row["cells"]}
    return Context(find_table(name), rows, read_results(context.output_root, ids), context.output_root)


@JUDGES.of("c9")
def others_change_order(context: Context) -> Verdict:
    """Top-1 of FitNets above AT's on CIFAR-100 and below it on ImageNet."""
    gaps, texts = [], []
    for name, better, worse in ((CIFAR, "fitnet", "at"), (IMAGENET, "at", "fitnet")):
        there = elsewhere(context, name)
        demand_rows(there, better, worse)
        row = rows_of(there, better)[0]
        other = beside(there, worse, row)
        gaps.append(lead(there, row, other, "top1"))
        texts.append(f"in {name} {row['label']} minus {other['label']} {gaps[-1].text()}")
    return all_hold([found.verdict for found in gaps]), f"top-1 {'; '.join(texts)} points ({_source(gaps)})."


@JUDGES.of("c12")
def first_everywhere(context: Context) -> Verdict:
    """Stage by stage leads every other student on CIFAR-100, ImageNet and COCO."""
    verdicts, texts, gaps = [], [], []
    for name, metric in ((CIFAR, "top1"), (IMAGENET, "top1"), (COCO, "map")):
        there = elsewhere(context, name)
        others = [row_id for row_id in ("student", *OTHERS) if row_id != "kd" or name != COCO]
        demand_rows(there, "stagewise", *others)
        row = rows_of(there, "stagewise")[0]
        verdict, text, found = _best(there, row, others, (metric,))
        better = sum(beside(there, row_id, row)["mean"][metric] > row["mean"][metric] for row_id in others)
        verdicts.append(verdict)
        gaps += found
        texts.append(f"{name}: rank {1 + better} of {1 + len(others)} students, {text}")
    return all_hold(verdicts), f"{'; '.join(texts)} ({_source(gaps)})."


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
        return verdicts[method["phase_length"]], f"{evidence}. Almost the same or less: at most {COST} times."

    return over_variants(rows, judge_row)
