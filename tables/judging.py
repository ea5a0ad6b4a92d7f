"""The one judge of all papers' claims: rows and curves of a run, their differences, verdicts.

A claim is one or more comparisons. A comparison holds or fails only where the difference is beyond its noise; within
it, the verdict is `unknown` and says what would decide.

- One seed: two standard errors of the test set. Of accuracies on the same images from the outcomes of each (from cells
  that kept none, as if on other images), of mIoU by a bootstrap over the images; `POINTS` for what is not made of
  images' scores (average precision, miss rates). Of curves two standard errors over their steps.
- Several seeds: the 95 % t interval of the difference, after Welch; of curves, whose batches are the same in a seed,
  that of the seeds' differences. Never less than the error of their mean on the test set.

Nothing holds on a row that has collapsed. A paper's folder keeps only what is compared, its thresholds, and why.
"""

from __future__ import annotations

import functools
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kt.store import folder_of, outcomes_file, records_file
from tables import noise, papers
from tables.curves import Array, Curve, read_curve
from tables.records import TableRecord, result_label

Row = Mapping[str, Any]

HOLDS, FAILS, UNKNOWN = "holds", "fails", "unknown"
POINTS = 0.5  # what chance may do to a score of one seed that is not made of images' scores; our choice
ERROR_SHARE = 0.02  # the same of an error in metres, as a share of it; our choice
FAR_BELOW = 0.5  # a row has collapsed below this share of the lone student's score, where no paper's rows are
TOLD = 4  # comparisons that are all told; of more, those that decide


class Missing(Exception):
    """A claim cannot be judged yet; the message says what it needs."""


class Verdict(NamedTuple):
    """What a claim comes to.

    Attributes:
        verdict: `holds`, `fails` or `unknown`.
        evidence: Why, in words.
        seeds: How many seeds of each row would decide it, if it is unknown and some would.
    """

    verdict: str
    evidence: str
    seeds: int | None = None


@dataclass(frozen=True)
class Context:
    """What a judge sees.

    Attributes:
        record: The printed table.
        rows: The collected rows, as in `table.json`.
        results: Cell id -> content of its `result.json`, done cells only.
        output_root: Where the cells live.
        comparable: Whether the numbers compare with the printed ones, so that their size counts too.
    """

    record: TableRecord
    rows: Sequence[Row]
    results: Mapping[str, Mapping[str, Any]]
    output_root: Path
    comparable: bool = False

    def curve(self, cell_id: str) -> Curve | None:
        """A cell's training curve, if it left one."""
        return read_curve(records_file(folder_of(self.output_root, cell_id)))

    def curves(self, row: Row) -> dict[int, Curve]:
        """Seed -> curve of a row's finished cells."""
        found = {cell["seed"]: self.curve(cell["id"]) for cell in row["cells"] if cell["status"] == "done"}
        return {seed: curve for seed, curve in found.items() if curve is not None}

    def outcomes(self, row: Row) -> list[Mapping[str, Array]]:
        """What became of each test image, cell by cell; nothing if one of the cells has not kept it."""
        folders = [folder_of(self.output_root, cell["id"]) for cell in row["cells"]]
        found = [_outcomes(outcomes_file(folder, row.get("evaluation") or "test")) for folder in folders]
        return [each for each in found if each] if all(found) else []

    def result(self, row: Row) -> Mapping[str, Any]:
        """One finished cell's result; empty if there is none."""
        return next((self.results[cell["id"]] for cell in row["cells"] if cell["id"] in self.results), {})

    def named(self, row_id: str) -> list[Row]:
        """The rows of that id in the table's file, one per value of the axes."""
        return [row for row in self.rows if row["id"].partition("[")[0] == row_id]

    def untaught(self, row: Row) -> Row | None:
        """The student without a teacher (or the paper's reference) that a row is to be compared with."""
        return next(
            (
                other
                for other in self.rows
                if other["role"] == "baseline"
                and other["student"] == row["student"]
                and agree(row, other)
                and self._dataset(row) == self._dataset(other)
            ),
            None,
        )

    def _dataset(self, row: Row) -> str | None:
        """A printed row's own dataset, in a table whose rows have several."""
        line = self.record.row(row["printed"]) if row.get("printed") else {}
        return line.get("dataset")

    def label(self, name: str) -> str:
        """A metric's name for readers."""
        return result_label(name, self.results.values(), self.metric(name).get("printed_as"))

    def metric(self, name: str) -> Mapping[str, Any]:
        """What the record says of a metric."""
        return next(metric for metric in self.record.metrics if metric["name"] == name)

    def printed(self, claim: str) -> list[float]:
        """The numbers that a claim is printed with."""
        return next(each["numbers"] for each in self.record.document["claims"] if each["id"] == claim)


def _outcomes(path: Path) -> Mapping[str, Array]:
    try:
        return _read_outcomes(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}


@functools.lru_cache(maxsize=256)
def _read_outcomes(path: Path, modified: int) -> Mapping[str, Array]:
    with np.load(path) as file:
        return dict(file)


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

Judge = Callable[[Context], tuple[str, str] | Verdict]


class Judges(dict[str, Judge]):
    """Claim -> its judge, of one paper."""

    def of(self, claim: str) -> Callable[[Judge], Judge]:
        """Makes a function the judge of a claim."""

        def add(judge: Judge) -> Judge:
            self[claim] = judge
            return judge

        return add


def judge_all(context: Context) -> list[dict[str, Any]]:
    """The verdicts on a table's claims: id, claim, where, check, holds_in_paper, verdict, evidence, seeds."""
    part = papers.part(context.record.paper, "claims")
    judges: Judges = part.JUDGES if part else Judges()
    mixed = mixed_data(context.results.values())
    found = []
    for claim in context.record.claims:
        judge = judges.get(claim["id"])
        try:
            if mixed:
                raise Missing(f"Needs rows that are of the same state of {' and '.join(mixed)}.")
            verdict = Verdict(*judge(context)) if judge else Verdict(UNKNOWN, "No judge yet.")
        except Missing as missing:
            verdict = Verdict(UNKNOWN, str(missing))
        shown = {key: claim[key] for key in ("id", "claim", "where", "check", "holds_in_paper")}
        evidence = verdict.evidence[:1].upper() + verdict.evidence[1:]
        found.append({**shown, "verdict": verdict.verdict, "evidence": evidence, "seeds": verdict.seeds})
    return found


def mixed_data(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """The datasets that results are of several states of: of data that are gone each cell's newest result is shown."""
    states: dict[str, set[str]] = {}
    for result in results:
        for name, summary in ((result.get("data") or {}).get("datasets") or {}).items():
            if summary is not None:
                states.setdefault(name, set()).add(json.dumps(summary, sort_keys=True))
    return sorted(name for name, found in states.items() if len(found) > 1)


def over_variants(rows: Sequence[Row], judge_row: Callable[[Row], Verdict]) -> Verdict:
    """A verdict over the variants of a row: theirs if they agree, else it depends on the axes and is unknown."""
    found: list[Verdict] = []
    for row in rows:
        try:
            found.append(judge_row(row))
        except Missing as missing:
            found.append(Verdict(UNKNOWN, str(missing)))
    if len(found) == 1:
        return found[0]
    verdicts = {each.verdict for each in found}
    evidence = " ".join(f"{row['label']}: {each.evidence}" for row, each in zip(rows, found, strict=True))
    if len(verdicts) > 1:
        return Verdict(UNKNOWN, evidence)
    return Verdict(verdicts.pop(), evidence, max((each.seeds for each in found if each.seeds), default=None))


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
    demand_rows(context, row_id)
    return context.named(row_id)


def matching(context: Context, row_id: str, row: Row) -> list[Row]:
    """The variants of a row that are to be compared with `row`, at least one.

    Raises:
        Missing: The run has none.
    """
    found = [other for other in context.named(row_id) if agree(row, other)]
    if not found:
        raise Missing(needed(context, row_id))
    return found


def beside(context: Context, row_id: str, row: Row) -> Row:
    """The first variant of a row that is to be compared with `row`."""
    return matching(context, row_id, row)[0]


def demand_done(rows: Sequence[Row], *metrics: str) -> None:
    """Raises `Missing` if some rows are not done or lack one of some metrics."""
    lacking = list(dict.fromkeys(text for row in rows if (text := undone(row, *metrics))))
    if lacking:
        raise Missing(f"Needs {'; '.join(lacking)}.")


def demand(curve: Curve, names: Sequence[str]) -> None:
    """Raises `Missing` if a curve lacks some values."""
    lacking = [name for name in names if name not in curve.values]
    if lacking:
        raise Missing(f"Needs {', '.join(lacking)} in the training records.")


def skill(metric: Mapping[str, Any], value: float) -> float | None:
    """A score in percent, or one over an error in metres, that rises with what a network can do; None of all else.

    Args:
        metric: Its name, unit and better, as a record has them.
        value: The score.
    """
    if metric["name"] == "rmse":
        return 1 / value if value else math.inf
    if metric["unit"] != "percent":
        return None
    return value if metric["better"] == "higher" else 100 - value


def _skill(context: Context, metric: str, value: float) -> float | None:
    return None if context.record.analyses else skill(context.metric(metric), value)


def collapse(context: Context, row: Row, metric: str) -> str | None:
    """In which way a row has collapsed, if it has: at chance, or far below the lone student."""
    alone = None if row["role"] == "teacher" else context.untaught(row)
    usual = _skill(context, metric, alone["mean"][metric]) if alone is not None and not undone(alone, metric) else None
    for cell in row["cells"]:
        result = context.results.get(cell["id"], {})
        top1, classes, images = (
            (result.get("metrics") or {}).get("top1"),
            *map(result.get, ("num_classes", "test_size")),
        )
        if top1 is not None and classes and images:
            chance = 1 / classes
            if top1 / 100 <= chance + 2 * math.sqrt(chance * (1 - chance) / images):
                return f"{row['label']} is at chance"
        skill = None if cell["metrics"].get(metric) is None else _skill(context, metric, cell["metrics"][metric])
        if skill is not None and skill <= 0:
            return f"{row['label']} is at chance"
        if skill is not None and usual is not None and alone is not row and skill < FAR_BELOW * usual:
            return f"{row['label']} is far below the student alone"
    return None


def sound(context: Context, verdict: Verdict, rows: Sequence[Row], metric: str | None = None) -> Verdict:
    """A verdict that does not hold on rows that have collapsed, and says which have.

    Args:
        context: The run.
        verdict: As if none had.
        rows: Those that it is about.
        metric: What tells a collapse; by default the table's first metric.
    """
    metric = metric or context.record.metrics[0]["name"]
    reasons = list(dict.fromkeys(text for row in rows if (text := collapse(context, row, metric))))
    if not reasons:
        return verdict
    evidence = f"{verdict.evidence} Collapsed: {'; '.join(reasons)}."
    return Verdict(UNKNOWN if verdict.verdict == HOLDS else verdict.verdict, evidence)


# Differences


def signed(value: float, decimals: int = 2) -> str:
    """`+1.20`; what rounds to nothing is `+0.00`, whatever its sign was."""
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"


@dataclass(frozen=True)
class Difference:
    """A difference with what it may be by chance.

    Attributes:
        mean: Mean over seeds.
        noise: Half of its interval.
        seeds: How many seeds, the fewer where the two have not equally many.
        source: What the noise is, in words.
        error: Standard error with one seed of each.
        images: The test images, where the noise is that of drawing them.
    """

    mean: float
    noise: float
    seeds: int
    source: str
    error: float
    images: int | None = None

    def text(self, decimals: int = 2) -> str:
        """`+1.20 ± 0.10`."""
        return f"{signed(self.mean, decimals)} ± {self.noise:.{decimals}f}"

    def scaled(self, by: float) -> Difference:
        """The difference in other units."""
        return replace(self, mean=by * self.mean, noise=by * self.noise, error=by * self.error)

    def minus(self, other: Difference) -> Difference:
        """By how much one difference is larger than another, as if they were independent."""
        noise_, error = math.hypot(self.noise, other.noise), math.hypot(self.error, other.error)
        return replace(self, mean=self.mean - other.mean, noise=noise_, error=error, images=None)

    def above(self, text: str, border: float = 0.0) -> Statement:
        """That it is above a border: the whole interval is, or else the whole is below, or it is unknown."""
        return Statement(self._side(self.mean - border), text, self, self.mean - border)

    def within(self, text: str, margin: float) -> Statement:
        """That it is nearly nothing: the whole interval lies within a margin, or outside, or it is unknown."""
        return Statement(self._side(margin - abs(self.mean)), text, self, margin - abs(self.mean))

    def at_most(self, text: str, margin: float) -> Statement:
        """That it is not above a margin."""
        return Statement(self._side(margin - self.mean), text, self, margin - self.mean)

    def _side(self, inside: float) -> str:
        if inside > self.noise:
            return HOLDS
        return FAILS if inside < -self.noise else UNKNOWN


@dataclass(frozen=True)
class Statement:
    """One comparison, judged.

    Attributes:
        verdict: `holds`, `fails` or `unknown`.
        text: What was compared, with the difference.
        difference: By how much.
        inside: How far it is on the right side of what decides.
    """

    verdict: str
    text: str
    difference: Difference
    inside: float

    @property
    def seeds(self) -> int | None:
        """How many seeds would decide a difference of this size; None if no affordable number."""
        return noise.seeds_to_decide(self.difference.error, abs(self.inside))

    @property
    def images(self) -> int | None:
        """How many test images would; None if that is no matter of images."""
        known = self.difference
        if known.images is None or not self.inside:
            return None
        return math.ceil(known.images * (known.noise / self.inside) ** 2)


def all_hold(verdicts: Sequence[str]) -> str:
    """Whether all statements hold: one that fails decides, else one that is unknown."""
    return next((verdict for verdict in (FAILS, UNKNOWN) if verdict in verdicts), HOLDS)


def any_holds(verdicts: Sequence[str]) -> str:
    """Whether at least one statement holds."""
    return next((verdict for verdict in (HOLDS, UNKNOWN) if verdict in verdicts), FAILS)


def most_hold(verdicts: Sequence[str]) -> str:
    """Whether more than half of the statements hold."""
    if 2 * verdicts.count(HOLDS) > len(verdicts):
        return HOLDS
    return UNKNOWN if 2 * (len(verdicts) - verdicts.count(FAILS)) > len(verdicts) else FAILS


def ruling(
    statements: Sequence[Statement], text: str = "", verdict: str | None = None, told: Sequence[Statement] | None = None
) -> Verdict:
    """The verdict on statements, with its evidence and what would decide it.

    Args:
        statements: What the verdict rests on.
        text: Evidence in place of the statements' own.
        verdict: What they come to together; by default, whether all hold.
        told: Statements to tell in place of all.
    """
    verdict = verdict or all_hold([each.verdict for each in statements])
    if not text:
        told = told or statements
        if len(told) > TOLD:
            holding = sum(each.verdict == HOLDS for each in told)
            text = f"{holding} of {len(told)} comparisons hold; "
            least = sorted(told, key=lambda each: each.inside - each.difference.noise)
            told = [each for each in least if each.verdict != HOLDS][:TOLD] or least[:1]
            text += f"{'the closest' if holding == len(statements) else 'of the others'}: "
        text += ", ".join(each.text for each in told)
    sources = "; ".join(dict.fromkeys(each.difference.source for each in statements))
    text = f"{text} (±: {sources})"
    open_ = [each for each in statements if each.verdict == UNKNOWN]
    if verdict != UNKNOWN or not open_:
        return Verdict(verdict, f"{text}.")
    counts = [each.seeds for each in open_]
    seeds = None if None in counts else max(count for count in counts if count is not None)
    images = [each.images for each in open_]
    means = [f"about {seeds} seeds" if seeds else f"no {noise.MOST_SEEDS} seeds"]
    if seeds and None not in images:
        means.append(f"{max(count for count in images if count is not None):,} test images")
    return Verdict(verdict, f"{text}; {' or '.join(means)} would decide.", seeds)


# Rows against rows


def _sampling(context: Context, row: Row, other: Row, metric: str) -> tuple[float, str, int | None]:
    """Standard error of the difference of two rows' means that the test set leaves, its source, and how many images."""
    kept = [context.outcomes(each) for each in (row, other)]
    cells = [each for side in kept for each in side]
    names = {"top1": ("top1",), "top5": ("top5",), "rmse": ("rmse",), "miou": ("intersect", "union")}.get(metric, ())
    if all(kept) and names and all(name in each for each in cells for name in names):
        indices = cells[0]["indices"]
        if len(indices) > 1 and all(np.array_equal(indices, each["indices"]) for each in cells):
            images = f"the same {len(indices):,} test images"
            if metric == "miou":
                areas = [[np.stack([each[name] for name in names], axis=1) for each in side] for side in kept]
                return (
                    noise.bootstrap_error(areas[0], areas[1]),
                    f"two standard errors of a bootstrap over {images}",
                    len(indices),
                )
            means = [np.mean([each[metric] for each in side], axis=0) for side in kept]
            known = np.isfinite(means).all(axis=0)
            error = noise.paired_error(*(each[known] for each in means)) if known.sum() > 1 else math.inf
            unit = 1 if metric == "rmse" else 100
            return unit * error, f"two standard errors on {images}", len(indices)
    seeds = [len(each["cells"]) for each in (row, other)]
    sizes = [context.result(each).get("test_size") or 0 for each in (row, other)]
    if metric in ("top1", "top5") and all(sizes):
        shares = [each["mean"][metric] / 100 for each in (row, other)]
        counts = [size * count for size, count in zip(sizes, seeds, strict=True)]
        source = f"two binomial standard errors of {min(sizes):,} test images, for which no outcomes of both are kept"
        return 100 * noise.binomial_error(*shares, *counts), source, min(sizes)
    if metric == "rmse":
        error = ERROR_SHARE * float(other["mean"][metric]) / 2
        return error / math.sqrt(min(seeds)), f"our allowance of {100 * ERROR_SHARE:g} % a seed", None
    return POINTS / 2 / math.sqrt(min(seeds)), _allowance(), None


def _allowance() -> str:
    return f"our allowance of {POINTS:g} points a seed"


def improvement(context: Context, row: Row, other: Row, metric: str, share: float | None = None) -> Difference:
    """By how much a row is better than another.

    Args:
        context: The run.
        row, other: The rows.
        metric: In which metric; where lower is better, by how much lower.
        share: Of a metric whose test error is not known and that is not in points, which share of the other's value
            chance may do with one seed.

    Raises:
        Missing: One of them is not done.
    """
    demand_done((row, other), metric)
    sign = 1 if context.metric(metric)["better"] == "higher" else -1
    values = [np.array([cell["metrics"][metric] for cell in each["cells"]]) for each in (row, other)]
    mean, seeds = sign * float(values[0].mean() - values[1].mean()), min(map(len, values))
    if share is None:
        error, source, images = _sampling(context, row, other, metric)
    else:
        error, images = share * abs(float(values[1].mean())) / 2 / math.sqrt(seeds), None
        source = f"our allowance of {100 * share:g} % a seed"
    if max(map(len, values)) == 1:
        return Difference(mean, 2 * error, 1, f"{source}; one seed", error, images)
    half = noise.t_interval(*values)
    spread = math.hypot(*(each.std(ddof=1) for each in values if len(each) > 1))
    one = max(spread, error * math.sqrt(seeds))
    if half < 2 * error:
        return Difference(mean, 2 * error, seeds, f"{source}; {count_seeds(seeds)}", one, images)
    return Difference(mean, half, seeds, f"95 % interval of {count_seeds(seeds)}", one)


def level(context: Context, row: Row, metric: str) -> Difference:
    """A row's own value, of a metric whose test error is not known.

    Raises:
        Missing: It is not done.
    """
    demand_done([row], metric)
    values = np.array([cell["metrics"][metric] for cell in row["cells"]])
    mean, seeds, error = float(values.mean()), len(values), POINTS / 2 / math.sqrt(len(values))
    half = noise.t_interval(values) if seeds > 1 else 0.0
    if half < 2 * error:
        return Difference(mean, 2 * error, seeds, _allowance(), POINTS / 2)
    return Difference(mean, half, seeds, f"95 % interval of {count_seeds(seeds)}", float(values.std(ddof=1)))


Test = Callable[[Context, Row, Row, str], Statement]
Pair = tuple[str, str] | tuple[str, str, Test]


def _between(context: Context, row: Row, other: Row, metric: str) -> tuple[Difference, str]:
    found = improvement(context, row, other, metric)
    decimals = max(2, context.metric(metric)["decimals"])
    return found, f"{row['label']} - {other['label']} {found.text(decimals)}"


def better(context: Context, row: Row, other: Row, metric: str) -> Statement:
    """That a row is better than another."""
    found, text = _between(context, row, other, metric)
    return found.above(text)


def nearly(margin: float) -> Test:
    """The test that two rows are nearly equal: by all that chance may do, no more than a margin apart."""

    def test(context: Context, row: Row, other: Row, metric: str) -> Statement:
        found, text = _between(context, row, other, metric)
        return found.within(f"{text} (nearly equal: within {margin:g})", margin)

    return test


def at_most(margin: float) -> Test:
    """The test that a row is not better than another by more than a margin."""

    def test(context: Context, row: Row, other: Row, metric: str) -> Statement:
        found, text = _between(context, row, other, metric)
        return found.at_most(f"{text} (at most {margin:g})", margin)

    return test


def at_least(margin: float) -> Test:
    """The test that a row is better than another by more than a margin (not worse by more, if it is negative)."""

    def test(context: Context, row: Row, other: Row, metric: str) -> Statement:
        found, text = _between(context, row, other, metric)
        return found.above(f"{text} (at least {margin:+g})", margin)

    return test


def better_by(printed: float, share: float) -> Test:
    """The test of a printed lead: its direction, and where numbers compare, a share of the printed size."""

    def test(context: Context, row: Row, other: Row, metric: str) -> Statement:
        found, text = _between(context, row, other, metric)
        counted = f", {100 * share:g} % of that counts" if context.comparable else ""
        return found.above(f"{text} (printed {printed:+g}{counted})", share * printed if context.comparable else 0.0)

    return test


def chain(*ranks: str | Sequence[str]) -> list[tuple[str, str]]:
    """The pairs (better, worse) of rows in order, best first; rows of equal rank are not compared."""
    groups = [[rank] if isinstance(rank, str) else list(rank) for rank in ranks]
    return [
        (one, other)
        for number, better_rows in enumerate(groups)
        for worse_rows in groups[number + 1 :]
        for one in better_rows
        for other in worse_rows
    ]


def compared(
    context: Context,
    pairs: Sequence[Pair],
    metric: str | Sequence[str] = "top1",
    test: Test = better,
    rows: Callable[[Context, str], Sequence[Row]] = rows_of,
) -> Verdict:
    """The verdict on pairs of rows that all have to pass a test.

    Args:
        context: The run.
        pairs: Ids of rows: the first against the second; a third entry is that pair's own test.
        metric: In which metric, or metrics.
        test: That of pairs that say none.
        rows: The variants of the first pair's first row that the claim is about.
    """
    metrics = [metric] if isinstance(metric, str) else list(metric)
    names = list(dict.fromkeys(row_id for pair in pairs for row_id in pair[:2]))
    demand_rows(context, *names)

    def judge_row(row: Row) -> Verdict:
        couples = [
            (one, other, pair[2] if len(pair) == 3 else test)
            for pair in pairs
            for one in ([row] if row in context.named(pair[0]) else matching(context, pair[0], row))
            for other in matching(context, pair[1], one)
            if agree(row, other)
        ]
        seen = [each for one, other, _ in couples for each in (one, other)]
        demand_done(seen, *metrics)
        verdict = ruling([each(context, one, other, name) for name in metrics for one, other, each in couples])
        labels = " and ".join(map(context.label, metrics))
        unit = "metres less of" if "rmse" in metrics else "points of"
        verdict = verdict._replace(evidence=f"{unit} {labels}: {verdict.evidence}")
        for name in metrics:
            verdict = sound(context, verdict, seen, name)
        return verdict

    return over_variants(rows(context, pairs[0][0]), judge_row)


# Curves


def over_steps(samples: Sequence[Array]) -> Difference:
    """The mean of differences step by step, one array per seed: the batches of a seed are the same."""
    return _of_seeds([float(each.mean()) for each in samples], [_mean_error(each) for each in samples])


def of_means(samples: Sequence[tuple[Array, Array]]) -> Difference:
    """By how much the mean of some steps is above that of others, one pair of arrays per seed."""
    means = [float(first.mean() - second.mean()) for first, second in samples]
    return _of_seeds(means, [math.hypot(*map(_mean_error, pair)) for pair in samples])


def _mean_error(steps: Array) -> float:
    return float(steps.std(ddof=1) / math.sqrt(len(steps))) if len(steps) > 1 else 0.0


def _of_seeds(means: Sequence[float], errors: Sequence[float]) -> Difference:
    seeds, error = len(means), math.hypot(*errors) / len(means)
    mean = float(np.mean(means))
    if seeds == 1:
        return Difference(mean, 2 * error, 1, "two standard errors over the steps of one seed", error)
    half = noise.t_interval(means)
    return Difference(
        mean, max(half, 2 * error), seeds, f"95 % interval of {count_seeds(seeds)}", float(np.std(means, ddof=1))
    )


def by_epoch(
    pairs: Sequence[tuple[Curve, Curve]], first: Callable[[Curve], Array], second: Callable[[Curve], Array]
) -> dict[int, Difference]:
    """Epoch -> difference `first - second` of paired curves."""
    found: dict[int, list[Array]] = {}
    for one, other in pairs:
        length = min(len(one.step), len(other.step))
        difference = first(one)[:length] - second(other)[:length]
        epochs = one.epoch_index[:length]
        for epoch in np.unique(epochs):
            found.setdefault(int(epoch), []).append(difference[epochs == epoch])
    return {epoch: over_steps(samples) for epoch, samples in sorted(found.items()) if len(samples) == len(pairs)}


# In words


def count_seeds(count: int) -> str:
    """`one seed`, `3 seeds`."""
    return "one seed" if count == 1 else f"{count} seeds"


def show_value(row: Row, metric: str, decimals: int) -> str:
    """A row's mean and its spread over seeds: `60.20 ± 0.10`."""
    spread = (row["std"] or {}).get(metric)
    return f"{row['mean'][metric]:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


def tally(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(verdict, how many claims of a table have it), the latter in words."""
    counted = []
    for verdict, plural in ((HOLDS, "hold"), (FAILS, "fail"), (UNKNOWN, "unknown")):
        count = sum(claim["verdict"] == verdict for claim in table["claims"])
        if count:
            counted.append((verdict, f"{count} {verdict if count == 1 else plural}"))
    return counted
