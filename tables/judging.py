"""What the papers' claims are judged with: rows of a run, their differences, verdicts.

A claim is judged from the results and training curves of one run of a table. A verdict is `holds`, `fails` or
`unknown`; what lies within the spread of the seeds is unknown. With one seed the spread of an accuracy is two binomial
standard errors of the test set, that of a curve two standard errors over its steps. mIoU, miss rates and average
precisions have no binomial error, so with one seed their spread is unknown; a difference of at most `ONE_SEED_POINTS`
is then taken for none, which is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kt.store import folder_of, records_file
from tables import papers
from tables.curves import Array, Curve, read_curve
from tables.records import TableRecord

Row = Mapping[str, Any]
Verdict = tuple[str, str]

HOLDS, FAILS, UNKNOWN = "holds", "fails", "unknown"
ONE_SEED_POINTS = 0.5


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


# Judges

Judge = Callable[[Context], Verdict]


class Judges(dict[str, Judge]):
    """Claim -> its judge, of one paper."""

    def of(self, claim: str) -> Callable[[Judge], Judge]:
        """Makes a function the judge of a claim."""

        def add(judge: Judge) -> Judge:
            self[claim] = judge
            return judge

        return add


def judge_all(context: Context) -> list[dict[str, Any]]:
    """The verdicts on a table's claims: id, claim, where, check, holds_in_paper, verdict, evidence."""
    part = papers.part(context.record.paper, "claims")
    judges: Judges = part.JUDGES if part else Judges()
    found = []
    for claim in context.record.claims:
        judge = judges.get(claim["id"])
        try:
            verdict, evidence = judge(context) if judge else (UNKNOWN, "No judge yet.")
        except Missing as missing:
            verdict, evidence = UNKNOWN, str(missing)
        shown = {key: claim[key] for key in ("id", "claim", "where", "check", "holds_in_paper")}
        found.append({**shown, "verdict": verdict, "evidence": evidence[:1].upper() + evidence[1:]})
    return found


def over_variants(rows: Sequence[Row], judge_row: Callable[[Row], Verdict]) -> Verdict:
    """A verdict over the variants of a row: theirs if they agree, else it depends on the axes and is unknown."""
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


# Rows


def needed(context: Context, *row_ids: str, values: str = "") -> str:
    """What to run for rows that a claim needs: `Needs the row baseline: +table=citypersons_pose rows=baseline.`"""
    rows = f"row{'s' if len(row_ids) > 1 else ''} {' and '.join(row_ids)}"
    return f"Needs the {rows}: +table={context.record.name} rows={','.join(row_ids)}{values and ' ' + values}."


def demand_rows(context: Context, *row_ids: str) -> None:
    """Raises `Missing` if the run lacks some rows."""
    absent = [row_id for row_id in row_ids if not context.named(row_id)]
    if absent:
        raise Missing(needed(context, *absent))


def rows_of(context: Context, row_id: str) -> list[Row]:
    """The variants of a row.

    Raises:
        Missing: The run has none.
    """
    found = context.named(row_id)
    if not found:
        raise Missing(needed(context, row_id))
    return found


def beside(context: Context, row_id: str, row: Row) -> Row:
    """The variant of a row that is to be compared with `row`."""
    found = [other for other in rows_of(context, row_id) if agree(row, other)]
    if not found:
        raise Missing(needed(context, row_id))
    return found[0]


def demand_done(rows: Sequence[Row], *metrics: str) -> None:
    """Raises `Missing` if some rows are not done or lack one of some metrics."""
    lacking = list(dict.fromkeys(text for row in rows if (text := undone(row, *metrics))))
    if lacking:
        raise Missing(f"Needs {'; '.join(lacking)}.")


# Differences


def signed(value: float, decimals: int = 2) -> str:
    """`+1.20`; what rounds to nothing is `+0.00`, whatever its sign was."""
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"


@dataclass(frozen=True)
class Gap:
    """A difference with what it may differ by chance.

    Attributes:
        mean: Mean over seeds.
        spread: Standard deviation over seeds; with one seed, two standard errors of the mean over its steps.
        seeds: How many seeds.
    """

    mean: float
    spread: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether the difference is positive: `holds`, `fails`, or `unknown` within the spread."""
        if self.mean > self.spread:
            return HOLDS
        return FAILS if self.mean < -self.spread else UNKNOWN

    def text(self, decimals: int = 2) -> str:
        """`+1.20 ± 0.10`."""
        return f"{signed(self.mean, decimals)} ± {self.spread:.{decimals}f}"


def gap(samples: Sequence[Array]) -> Gap:
    """The mean of per-step differences, one array per seed."""
    means = np.array([sample.mean() for sample in samples])
    if len(means) > 1:
        return Gap(float(means.mean()), float(means.std(ddof=1)), len(means))
    only = samples[0]
    spread = 2 * only.std(ddof=1) / math.sqrt(len(only)) if len(only) > 1 else 0.0
    return Gap(float(means[0]), float(spread), 1)


def gap_of_means(samples: Sequence[tuple[Array, Array]]) -> Gap:
    """By how much the mean of some steps is above that of others, one pair of arrays per seed."""
    means = np.array([first.mean() - second.mean() for first, second in samples])
    if len(means) > 1:
        return Gap(float(means.mean()), float(means.std(ddof=1)), len(means))
    errors = [part.var(ddof=1) / len(part) if len(part) > 1 else 0.0 for part in samples[0]]
    return Gap(float(means[0]), 2 * math.sqrt(sum(errors)), 1)


def gaps_by_epoch(
    pairs: Sequence[tuple[Curve, Curve]], first: Callable[[Curve], Array], second: Callable[[Curve], Array]
) -> dict[int, Gap]:
    """Epoch -> difference `first - second` of paired curves, step by step: the batches of a seed are the same."""
    by_epoch: dict[int, list[Array]] = {}
    for one, other in pairs:
        length = min(len(one.step), len(other.step))
        difference = first(one)[:length] - second(other)[:length]
        epochs = one.epoch_index[:length]
        for epoch in np.unique(epochs):
            by_epoch.setdefault(int(epoch), []).append(difference[epochs == epoch])
    return {epoch: gap(samples) for epoch, samples in sorted(by_epoch.items()) if len(samples) == len(pairs)}


def all_hold(verdicts: Sequence[str]) -> str:
    """Whether all statements hold: one that fails decides, else one that is unknown."""
    return next((verdict for verdict in (FAILS, UNKNOWN) if verdict in verdicts), HOLDS)


def any_holds(verdicts: Sequence[str]) -> str:
    """Whether at least one statement holds."""
    return next((verdict for verdict in (HOLDS, UNKNOWN) if verdict in verdicts), FAILS)


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


def _metric(context: Context, name: str) -> Mapping[str, Any]:
    return next(metric for metric in context.record.metrics if metric["name"] == name)


def improvement(context: Context, row: Row, other: Row, name: str) -> Gap:
    """By how many points a row is better than another; its spread is `ONE_SEED_POINTS` at least if one has one seed."""
    sign = 1 if _metric(context, name)["better"] == "higher" else -1
    spreads = [(each["std"] or {}).get(name) for each in (row, other)]
    known = [spread for spread in spreads if spread is not None]
    margin = math.hypot(*known) if len(known) == 2 else max([ONE_SEED_POINTS, *known])
    return Gap(sign * (row["mean"][name] - other["mean"][name]), margin, min(len(row["cells"]), len(other["cells"])))


# In words


def count_seeds(count: int) -> str:
    """`one seed`, `3 seeds`."""
    return "one seed" if count == 1 else f"{count} seeds"


def show_value(row: Row, metric: str, decimals: int) -> str:
    """A row's mean and its spread over seeds: `60.20 ± 0.10`."""
    spread = (row["std"] or {}).get(metric)
    return f"{row['mean'][metric]:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


def demand(curve: Curve, names: Sequence[str]) -> None:
    lacking = [name for name in names if name not in curve.values]
    if lacking:
        raise Missing(f"Needs {', '.join(lacking)} in the training records.")
