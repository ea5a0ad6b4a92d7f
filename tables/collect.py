"""A table's numbers from the result files of its cells, and nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kt.errors import UserError
from kt.files import read_json
from kt.settings import shown
from kt.store import evaluation_file, folder_of, read_evaluation, read_results, read_status
from tables.alive import judge_life, reach
from tables.judging import Context, judge_all, mixed_data
from tables.records import TableRecord, find_table, result_label

Json = dict[str, Any]

SYNONYMS = {"map": "ap"}  # papers' names of metrics that results know by another one
SHOWN = 4  # differing settings that the banner names
# What makes up a recipe, in words.
UNSTATED = {
    "optimizer": "optimizer",
    "lr": "learning rate",
    "schedule.total": "length of training",
    "batch_size": "batch size",
}


def collect(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    output_root: str | os.PathLike[str],
    scale: str,
    dataset: str | None = None,
    settings: Mapping[str, Sequence[str]] | None = None,
) -> Json:
    """The content of `table.json`.

    Args:
        name: The table's name.
        rows: id, label, role, method, teacher, student, ours, printed (id of the printed row or None), axes
            (key -> value) and cells (id, seed, `unverified` where
            its data are not there) of each row; a row that only cites a number has no cells. A row with
            `evaluation` takes its numbers from the cells' scores of that name on other data; a row with `optional` is
            left out while none of its cells has been done or has failed. `differs` has, by key, the values of a row and
            of the table's own at scale=paper, where they are not the same.
        output_root: Where `cells/` is.
        scale: The scale of the run.
        dataset: The run's dataset; None takes it from the results.
        settings: Key -> values of the run's settings that are not the table's own at the scale.

    Returns:
        table, paper, scale, settings, dataset, comparable, banner (the same in words), differs, device_batch, reported,
        metrics, rows, warnings (`warnings_of`), mixed (datasets of which the rows are of several states), claims, alive
        (`tables.alive.judge_life`), reach (what the scale can decide, in words).

    Raises:
        UserError: There is no such table or printed row, or rows do not say which they are.
    """
    record = find_table(name)
    if not all({"printed", "differs"} <= row.keys() for row in rows):
        raise UserError(f"table={name}: its rows do not say which printed ones they are; run the table again")
    rows = [row for row in rows if is_shown(row, output_root)]
    ids = {cell["id"] for row in rows for cell in row["cells"]}
    results = read_results(output_root, ids)
    collected = [_collect_row(record, row, output_root, results) for row in rows]
    for row in _not_as_printed(collected):
        row["paper"] = dict.fromkeys(row["paper"])
    differing = differences([row for row in collected if row["cells"]])
    # What one normalisation sees follows from the number of GPUs.
    unstated = [each for each in differing if each["key"].endswith("device_batch") and "gpus" in record.unstated]
    differing = [each for each in differing if each not in unstated]
    comparable = bool(results) and not differing
    if dataset is None:
        # A teacher may have been trained on other data than the table is about.
        students_first = sorted(collected, key=lambda row: row["role"] == "teacher")
        configs = [_config(results.get(cell["id"], {})) for row in students_first for cell in row["cells"]]
        dataset = next((config["dataset"]["name"] for config in configs if config), None)
    context = Context(record, collected, results, Path(output_root), comparable=comparable)
    names = [metric["name"] for metric in record.metrics]
    known = results | read_results(output_root, {_teacher_id(result) for result in results.values()} - {""})
    teachers = {row["id"]: found for row in rows if (found := _teacher(row, names, output_root, known))}
    return {
        "table": name,
        "paper": record.paper,
        "scale": scale,
        "settings": {key: list(values) for key, values in (settings or {}).items()},
        "dataset": dataset,
        "comparable": comparable,
        "banner": banner(record, differing, bool(results), scale),
        "differs": differing,
        "device_batch": sorted({each["ours"] for each in unstated}),
        "reported": record.reported,
        "metrics": _metrics(record, [*results.values(), *_evaluations(rows, output_root)]),
        "rows": collected,
        "warnings": warnings_of([*collected, *teachers.values()]),
        "mixed": mixed_data(results.values()),
        "claims": judge_all(context),
        "alive": judge_life(replace(context, results=known), teachers),
        "reach": reach(scale, results.values(), max((len(row["cells"]) for row in rows), default=0)),
    }


def _teacher_id(result: Mapping[str, Any]) -> str:
    """The id of the cell that taught a cell, or of the file; empty if nothing did."""
    return str((result.get("needs") or {}).get("teacher", ""))


def _teacher(
    row: Mapping[str, Any],
    names: Sequence[str],
    output_root: str | os.PathLike[str],
    results: Mapping[str, Mapping[str, Any]],
) -> Json | None:
    """What taught a row's cells, measured as a row; None without a score of it on the row's own data."""
    own = [results[cell["id"]] for cell in row["cells"] if cell["id"] in results]
    ids = sorted({_teacher_id(result) for result in own} & results.keys())
    data = [_config(result).get("dataset") for result in (*own, *(results[each] for each in ids))]
    if not ids or any(each != data[0] for each in data):
        return None
    cells = [{"id": cell_id, "seed": _config(results[cell_id]).get("seed", 0)} for cell_id in ids]
    itself = {"id": " ".join(ids), "label": f"teacher {row['teacher']}", "role": "teacher", "cells": cells}
    found = measured_row({**row, **itself}, names, output_root, results)
    return found if found["mean"] else None


def cell_status(row: Mapping[str, Any], cell_id: str, output_root: str | os.PathLike[str]) -> Json:
    """A cell's status as a row needs it: done only with the score that the row asks for, if that is one."""
    folder, evaluation = folder_of(output_root, cell_id), row.get("evaluation")
    state = read_status(folder, evaluation)
    if state["status"] == "done" and evaluation and read_evaluation(folder, evaluation) is None:
        return {**state, "status": "unscored"}
    return state


def is_shown(row: Mapping[str, Any], output_root: str | os.PathLike[str]) -> bool:
    """Whether a row is rendered: always, if it is not optional."""
    if not row.get("optional"):
        return True
    states = [cell_status(row, cell["id"], output_root)["status"] for cell in row["cells"]]
    return any(state in ("done", "failed", "interrupted") for state in states)


def shown_states(rows: Sequence[Mapping[str, Any]], output_root: str | os.PathLike[str]) -> list[str]:
    """The status of each cell that a rendering of the rows shows, once for each evaluation of it."""
    shown = {
        (cell["id"], row.get("evaluation")): row for row in rows if is_shown(row, output_root) for cell in row["cells"]
    }
    return [cell_status(row, cell_id, output_root)["status"] for (cell_id, _), row in shown.items()]


def _config(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return result.get("config") or {}


def _finite(value: Any) -> float | None:
    """A measured number, or None for what is none (JSON knows no NaN)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _collect_row(
    record: TableRecord,
    row: Mapping[str, Any],
    output_root: str | os.PathLike[str],
    results: Mapping[str, Mapping[str, Any]],
) -> Json:
    names = [metric["name"] for metric in record.metrics]
    printed = record.row(row["printed"]) if row["printed"] is not None else None
    return {
        **measured_row(row, names, output_root, results),
        "printed": row["printed"],
        "printed_row": printed["row"] if printed else None,
        "differs": row["differs"],
        "paper": {name: printed["values"].get(name) if printed else None for name in names},
    }


def _not_as_printed(rows: Sequence[Json]) -> Iterator[Json]:
    """Of several rows that stand for one printed row, those that differ from the paper where others do not."""
    groups: dict[str, list[Json]] = {}
    for row in rows:
        if row["printed_row"] is not None:
            groups.setdefault(row["printed"], []).append(row)
    for group in groups.values():
        # What the scale changes, it changes in all of them.
        differing = [{(key, shown(own)) for key, (own, _) in row["differs"].items()} for row in group]
        yield from (row for row, own in zip(group, differing, strict=True) if own > set.intersection(*differing))


def measured_row(
    row: Mapping[str, Any],
    names: Sequence[str],
    output_root: str | os.PathLike[str],
    results: Mapping[str, Mapping[str, Any]],
) -> Json:
    """What a row's cells have given: each, their mean, and their spread over seeds.

    Args:
        row: As `collect` takes it.
        names: The metrics.
        output_root: Where `cells/` is.
        results: Id -> result of the cells that are done.
    """
    cells = [_collect_cell(row, cell, output_root, results.get(cell["id"]), names) for cell in row["cells"]]
    measured = [cell["metrics"] for cell in cells if cell["status"] == "done"]
    values = {name: [each[name] for each in measured if each[name] is not None] for name in names}
    mean = {name: float(np.mean(found)) if found else None for name, found in values.items()}
    bests = {
        name: [cell["best"][name] for cell in cells if cell.get("best", {}).get(name) is not None] for name in names
    }
    several = len(measured) > 1
    std = {name: float(np.std(found, ddof=1)) if len(found) > 1 else None for name, found in values.items()}
    return {
        "id": row["id"],
        "label": row["label"] + "".join(f" (here {note})" for note in _notes(row, results)),
        "role": row["role"],
        "method": row["method"],
        "teacher": row["teacher"],
        "student": row["student"],
        "ours": bool(row.get("ours", False)),
        "axes": dict(row.get("axes") or {}),
        "evaluation": row.get("evaluation"),
        "mean": mean if measured else None,
        "std": std if several else None,
        # Beside the last epoch's, which count.
        "best": {
            name: float(np.mean(found)) if len(found) == len(measured) > 0 else None for name, found in bests.items()
        },
        "classes": _classes(row, [cell["id"] for cell in cells if cell["status"] == "done"], output_root),
        "cells": cells,
    }


def warnings_of(rows: Sequence[Mapping[str, Any]]) -> list[Json]:
    """What measured rows' cells have warned of, each `warning` once, with the labels of its `rows`."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for cell in row["cells"]:
            for text in cell.get("warnings", ()):
                found.setdefault(text, {})[row["label"]] = None
    return [{"warning": text, "rows": list(labels)} for text, labels in found.items()]


def _classes(row: Mapping[str, Any], done: Sequence[str], output_root: str | os.PathLike[str]) -> Json:
    """`iou` or `ap` -> class -> mean over the seeds that have it, as far as evaluations say."""
    name = row.get("evaluation") or "test"
    files = [evaluation_file(folder_of(output_root, cell_id), name) for cell_id in done]
    kept = [(read_json(file) or {}).get("classes", {}) for file in files]
    found: Json = {}
    for metric in dict.fromkeys(metric for each in kept for metric in each):
        seeds = [each[metric] for each in kept if metric in each]
        values = {one: [seed[one] for seed in seeds if seed.get(one) is not None] for one in seeds[0]}
        found[metric] = {one: float(np.mean(each)) if each else None for one, each in values.items()}
    return found


def _notes(row: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a row's results say of themselves where they could not be what its label says."""
    notes = (results.get(cell["id"], {}).get("note") for cell in row["cells"])
    return list(dict.fromkeys(str(note) for note in notes if note))


def _collect_cell(
    row: Mapping[str, Any],
    cell: Mapping[str, Any],
    output_root: str | os.PathLike[str],
    result: Mapping[str, Any] | None,
    names: Sequence[str],
) -> Json:
    shown: Json = {"id": cell["id"], "seed": cell["seed"]}
    shown |= {"unverified": True} if cell.get("unverified") else {}
    state = cell_status(row, cell["id"], output_root)
    shown |= {"warnings": state["warnings"]} if state.get("warnings") else {}
    if result is not None and state["status"] == "done":
        evaluation = row.get("evaluation")
        folder = folder_of(output_root, cell["id"])
        metrics = read_evaluation(folder, evaluation) if evaluation else result.get("metrics")
        # A column of some tables.
        metrics = {"epochs": _config(result).get("schedule", {}).get("epochs"), **(metrics or {})}
        found, best = (
            {name: _finite((scores or {}).get(name, (scores or {}).get(SYNONYMS.get(name, name)))) for name in names}
            for scores in (metrics, None if evaluation else result.get("best"))
        )
        return {**shown, "status": "done", "metrics": found, "best": best}
    status = "failed" if state["status"] in ("failed", "interrupted") else "missing"
    return {**shown, "status": status, "metrics": {}, "error": state.get("error")}


def _metrics(record: TableRecord, results: Sequence[Json]) -> list[Json]:
    """The printed metrics, under the names that the results give them where these mean something else."""
    found = []
    for metric in record.metrics:
        own = result_label(metric["name"], results, metric.get("printed_as"))
        kept = {key: metric.get(key) for key in ("name", "unit", "better", "decimals")}
        found.append({**kept, "label": own, "spread": metric.get("spread")})
    return found


def _evaluations(rows: Sequence[Mapping[str, Any]], output_root: str | os.PathLike[str]) -> list[Json]:
    """What the evaluations that rows ask for have left."""
    found = [
        read_evaluation(folder_of(output_root, cell["id"]), row["evaluation"])
        for row in rows
        if row.get("evaluation")
        for cell in row["cells"]
    ]
    return [each for each in found if each is not None]


def differences(rows: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The settings in which rows differ from the table's own at scale=paper: key, ours, paper, ids of the rows."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for key, (own, papers) in row["differs"].items():
            found.setdefault((key, shown(own), shown(papers)), []).append(row["id"])
    return [{"key": key, "ours": own, "paper": papers, "rows": ids} for (key, own, papers), ids in found.items()]


def banner(record: TableRecord, differing: Sequence[Mapping[str, Any]], measured: bool, scale: str) -> str:
    """In words, whether the numbers can be compared with the paper's."""
    if not measured:
        return "These numbers are not comparable with the paper: there are no results yet."
    ours = _and([UNSTATED[key] for key in UNSTATED if key in record.unstated])
    recipe = f" The paper does not print its {ours}: there the recipe is ours." if ours else ""
    if not differing:
        return f"These numbers are comparable with the paper: all settings are the table's own at scale=paper.{recipe}"
    first = sorted(differing, key=lambda each: -len(each["rows"]))[:SHOWN]  # those of most rows
    told = [f"{each['key']}={each['ours']} instead of {each['paper']}" for each in first]
    if len(differing) > SHOWN:
        told.append(f"and {len(differing) - SHOWN} more settings that are listed")
    return f"These numbers are not comparable with the paper: scale={scale}, {', '.join(told)}.{recipe}"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
