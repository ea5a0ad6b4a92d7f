"""From result files to the content of `table.json`: a pure function of the cells' folders."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables.claims import judge
from tables.records import find

Row = Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content, or None where there is no readable one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def cell_state(output_root: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """`{id, seed, status, metrics}` of one cell; `status` is done, failed or missing."""
    folder = output_root / "cells" / cell["id"]
    result = read_json(folder / "result.json")
    if result is not None and result.get("status") == "done":
        return {"id": cell["id"], "seed": cell.get("seed"), "status": "done", "metrics": result["metrics"]}
    status = "failed" if read_json(folder / "status.json") is not None else "missing"
    return {"id": cell["id"], "seed": cell.get("seed"), "status": status, "metrics": {}}


def aggregate(cells: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[Any, Any]:
    """Mean and sample standard deviation of every metric over the seeds that are done; None where there are too few."""
    values = {name: [c["metrics"][name] for c in cells if name in c["metrics"]] for name in names}
    values = {name: found for name, found in values.items() if found}
    if not values:
        return None, None
    mean = {name: statistics.fmean(found) for name, found in values.items()}
    std = {name: statistics.stdev(found) for name, found in values.items() if len(found) > 1}
    return mean, std or None


def names_of(dataset: str | Sequence[str]) -> str:
    """One dataset's name, or several with commas."""
    return dataset if isinstance(dataset, str) else ", ".join(dataset)


def same_dataset(ours: str, printed: str | Sequence[str]) -> bool:
    """Whether a dataset of ours is the printed one."""
    printed = names_of(printed)
    return ours.replace("-", "").replace("_", "").lower() == printed.replace("-", "").replace("_", "").lower()


def collect(name: str, rows: Sequence[Row], output_root: Path, scale: str, dataset: str) -> dict[str, Any]:
    """The content of `table.json`.

    Args:
        name: The table.
        rows: `{id, label, role, method, teacher, student, ours, paper_row, cells: [{id, seed}], axes}`.
        output_root: Holds `cells/`.
        scale: Name of the scale.
        dataset: Name of the dataset that was trained on.
    """
    printed = find(name)
    metrics = [
        {key: metric.get(key) for key in ("name", "unit", "better", "decimals")} for metric in printed.table["metrics"]
    ]
    names = [metric["name"] for metric in metrics]
    collected = []
    labels: dict[str, str] = {}
    for row in rows:
        cells = [cell_state(output_root, cell) for cell in row["cells"]]
        mean, std = aggregate(cells, names)
        number = row.get("paper_row")
        paper = printed.table["rows"][number]["values"] if number is not None else {}
        for cell in cells:
            result = read_json(output_root / "cells" / cell["id"] / "result.json") or {}
            labels.update(result.get("labels") or {})
        shown = {key: row.get(key) for key in ("id", "label", "role", "method", "teacher", "student")}
        shown |= {"ours": bool(row.get("ours")), "axes": dict(row.get("axes") or {})}
        # A row of a swept axis stands beside the printed one, which has no such axis.
        values = {metric: None if row.get("axes") else paper.get(metric) for metric in names}
        collected.append({**shown, "paper": values, "mean": mean, "std": std, "cells": cells})
    for metric in metrics:
        metric["label"] = labels.get(metric["name"], metric["name"])
    comparable = scale == "paper" and same_dataset(dataset, printed.table["dataset"])
    table = {
        "table": name,
        "paper": printed.paper,
        "scale": scale,
        "dataset": dataset,
        "comparable": comparable,
        "metrics": metrics,
        "rows": collected,
    }
    claims = [
        {"id": claim["id"], "claim": claim["claim"], **judge(printed.paper, claim, table, output_root)}
        for claim in printed.claims
    ]
    return {**table, "claims": claims}


def best_rows(table: Mapping[str, Any], metric: Mapping[str, Any]) -> set[str]:
    """Ids of the students that are best in a metric (more than one where they tie)."""
    name, sign = metric["name"], 1 if metric["better"] == "higher" else -1
    scores = {
        row["id"]: sign * row["mean"][name]
        for row in table["rows"]
        if row["role"] != "teacher" and row["mean"] and name in row["mean"]
    }
    top = max(scores.values(), default=math.nan)
    return {row for row, score in scores.items() if score == top}
