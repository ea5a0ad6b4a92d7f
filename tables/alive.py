"""Whether a table can tell anything: its untaught students have learned, and their teachers know more than they do.

A table is alive when every untaught student is at least `TIMES` times as good as chance, and every teacher with a score
on the student's own data is better than it by more than the judge's noise. Chance is what needs no look at an image:

- of top-1 a guess among the classes;
- of mIoU the commonest class of the test images for every pixel;
- of RMSE the mean depth of the test images for every pixel; three times as good is a third of its error;
- of average precision and of miss rate no box at all, which scores nothing: `NOTHING` points stand for that.

Where no student is untaught, the taught ones are held against chance; where a table analyses networks, their top-1 is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tables.curves import Array
from tables.judging import HOLDS, TOLD, Context, Missing, Row, better, count_seeds, skill, undone

PAPER = "paper"  # the scale at which everything is as printed
TIMES = 3.0
NOTHING = 1.0  # point: three times none would be none; our choice
ALIVE, DEAD, UNKNOWN = "alive", "not alive", "unknown"
TOP1 = {"name": "top1", "unit": "percent", "better": "higher"}

Check = tuple[bool | None, str]


def judge_life(context: Context, teachers: Mapping[str, Row]) -> dict[str, Any]:
    """Whether a table is alive: `verdict`, `evidence`, and in `reasons` what stands against it or is not known.

    Args:
        context: The run.
        teachers: Id of a row -> its teacher as a row, where that has a score on the row's data.
    """
    rows = [row for row in context.rows if row["cells"] and row["role"] != "teacher"]
    untaught = [row for row in rows if row["role"] == "baseline" and row["method"] == "none"]
    checks = [_above_chance(context, row) for row in untaught or rows]
    pairs = {
        (alone["id"], teacher["id"]): (teacher, alone)
        for row in rows
        if not context.record.analyses
        and (alone := context.untaught(row)) in untaught
        and (teacher := teachers.get(row["id"])) is not None
        # A student alone hands its features on to one that keeps them.
        and teacher["cells"][0]["id"] not in [cell["id"] for cell in alone["cells"]]
    }
    checks += [_above_student(context, *pair) for pair in pairs.values()]
    failed, unknown = ([text for passed, text in checks if passed is each] for each in (False, None))
    reasons = failed or unknown
    told = reasons or [text for _, text in checks]
    if len(told) > TOLD:
        told = [*told[:TOLD], f"and {len(told) - TOLD} more"]
    if not untaught:
        told = [*told, "no student is untaught"]
    elif not pairs and not context.record.analyses:
        told = [*told, "no teacher has a score on its student's data"]
    verdict = DEAD if failed else UNKNOWN if unknown or not checks else ALIVE
    return {"verdict": verdict, "evidence": f"{'; '.join(told)}.", "reasons": reasons}


def _above_chance(context: Context, row: Row) -> Check:
    """Whether a student is so many times as good as chance."""
    metric: Mapping[str, Any] = TOP1 if context.record.analyses else context.record.metrics[0]
    name = metric["name"]
    if context.record.analyses:  # the rows' own numbers are of the analysis
        own = [{**cell, "metrics": context.results.get(cell["id"], {}).get("metrics", {})} for cell in row["cells"]]
        row = {**row, "cells": own}
    if lacking := undone(row, name):
        return None, lacking
    score = float(np.mean([cell["metrics"][name] for cell in row["cells"]]))
    chance = _chance(context, row, metric)
    if chance is None:
        return None, f"{row['label']}: nothing is kept that tells chance"
    own_skill, no_skill = skill(metric, score), skill(metric, chance)
    if own_skill is None or not no_skill:
        return None, f"{row['label']}: no score to be held against chance"
    times = own_skill / no_skill
    return times >= TIMES, f"{row['label']}: {score:.4g}, {times:.2f} times chance ({chance:.3g})"


def _above_student(context: Context, teacher: Row, alone: Row) -> Check:
    """Whether a teacher is better than the student alone, beyond the noise."""
    try:
        found = better(context, teacher, alone, context.record.metrics[0]["name"])
    except Missing as missing:
        return None, str(missing)
    above = found.verdict == HOLDS
    return above, f"{found.text}{'' if above else ', not clearly above'}"


def _chance(context: Context, row: Row, metric: Mapping[str, Any]) -> float | None:
    """The score of who looks at no image, in the metric; None if the row's cells have not kept what tells it."""
    if metric["name"] == "top1":
        classes = context.result(row).get("num_classes")
        return 100 / classes if classes else None
    if metric["name"] not in ("miou", "rmse"):
        return NOTHING if metric["better"] == "higher" else 100 - NOTHING
    kept = next(iter(context.outcomes(row)), {})
    if metric["name"] == "miou":
        return commonest(kept["truth"]) if "truth" in kept else None
    return flat(kept["depth_mean"], kept["depth_std"]) if "depth_mean" in kept else None


def commonest(areas: Array) -> float:
    """mIoU in percent of one class for every pixel, that with the most of them.

    Args:
        areas: (n, classes) pixels of each class in each image.
    """
    total = areas.sum(axis=0, dtype=float)
    return float(100 * total.max() / total.sum() / np.count_nonzero(total))


def flat(means: Array, deviations: Array) -> float:
    """RMSE in metres, as the mean over images, of one depth for every pixel: the mean over all images.

    Args:
        means, deviations: (n,) of each image's known depth, in metres; not a number where none is known.
    """
    return float(np.nanmean(np.hypot(deviations, means - np.nanmean(means))))


def reach(scale: str, results: Iterable[Mapping[str, Any]], seeds: int) -> str:
    """What a scale other than the paper's can decide and what not, in words; empty at the paper's and without results.

    Args:
        scale: Its name.
        results: Those of the table's cells.
        seeds: How many a row has.
    """
    sizes = [result["train_size"] for result in results if result.get("train_size")]
    if scale == PAPER or not sizes:
        return ""
    return (
        f"With at most {max(sizes):,} training images and {count_seeds(seeds)} a row, scale={scale} shows that every "
        "row trains, what it costs, and differences beyond the noise beside them; it decides neither smaller ones nor "
        "how methods rank in the paper's own setting."
    )
