"""Result folders as cells leave them, and rows as the table sweeper hands them over, without any training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kt.files import write_sealed
from kt.store import IDENTITY_VERSION, evaluation_file, folder_of, list_evaluation, records_file
from tables.records import find_table

Json = dict[str, Any]


def write_cell(
    root: Path,
    cell_id: str,
    metrics: Mapping[str, float] | None,
    records: Iterable[Mapping[str, Any]] = (),
    evaluations: Mapping[str, Mapping[str, float]] | None = None,
    **result: Any,
) -> Path:
    """A finished cell, or without metrics one that has only a folder; returns the folder.

    Args:
        root: The output root.
        cell_id: Names the folder.
        metrics: The scores of its result.
        records: The lines of its records.
        evaluations: Its scores on other data, by name.
        result: What else its result says.
    """
    folder = folder_of(root, cell_id)
    folder.mkdir(parents=True, exist_ok=True)
    if metrics is not None:
        known = {"id": cell_id, "status": "done", "metrics": metrics, "labels": {}, "seconds": 60.0}
        kept = {"version": IDENTITY_VERSION, "files": {}, "evaluations": {}}
        write_sealed(folder / "result.json", {**known, **kept, **result})
    for name, scores in (evaluations or {}).items():
        evaluation_file(folder, name).parent.mkdir(exist_ok=True)
        evaluation_file(folder, name).write_text(json.dumps(scores))
        if metrics is not None:
            list_evaluation(folder, name)
    if lines := [json.dumps(record) for record in records]:
        # A process that was killed leaves half a line.
        records_file(folder).write_text("\n".join([*lines, '{"kind": "train", "phase": "tr']))
    return folder


def make_row(
    table: str,
    row_id: str,
    seeds: Sequence[int] = (0,),
    axes: Mapping[str, str] | None = None,
    prefix: str = "",
    **changes: Any,
) -> Json:
    """A row of a table, as the paper prints it; its cells are named after it, `kd-s0` for seed 0.

    Args:
        table: The table's name.
        row_id: The row; of one that the paper does not print `changes` say everything.
        seeds: One cell each.
        axes: What the command line varies, with its values in this row.
        prefix: Before the names of the cells, for roots that hold several tables.
        changes: Keys that replace those of the row.
    """
    printed = {line["id"]: line for line in find_table(table).rows}.get(row_id)
    known = {}
    if printed is not None:
        known = {key: printed[key] for key in ("role", "method", "teacher", "student")}
        known["ours"] = printed.get("ours", False)
    suffix = f"[{', '.join(f'{key}={value}' for key, value in axes.items())}]" if axes else ""
    cell_id = prefix + re.sub(r"\W+", "-", f"{row_id}{suffix}").strip("-")
    return {
        "id": row_id + suffix,
        "label": row_id.upper() + suffix,
        **known,
        "printed": None if printed is None else row_id,
        "axes": dict(axes or {}),
        "differs": {"dataset.name": ["scenes", "imagenet"]},
        "cells": [{"id": f"{cell_id}-s{seed}", "seed": seed} for seed in seeds],
        **changes,
    }
