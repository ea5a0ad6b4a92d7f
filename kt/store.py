"""A cell on the disk: its folder, what it leaves there, and how it stands. Planning and tables read it without torch.

`status.json` says what the latest attempt is doing or how it ended. `result.json` is written last and whole, so a cell
is done exactly when that file exists.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kt.files import read_json, write_json

Json = dict[str, Any]

STALE_SECONDS = 3600.0
_RESULT, _STATUS, _RECORDS = "result.json", "status.json", "metrics.jsonl"


def cells_of(output_root: str | os.PathLike[str]) -> Path:
    """Where all cells live."""
    return Path(output_root) / "cells"


def folder_of(output_root: str | os.PathLike[str], cell_id: str) -> Path:
    """Where a cell lives."""
    return cells_of(output_root) / cell_id


def finished_cells(output_root: str | os.PathLike[str]) -> list[Path]:
    """The folders of all cells that are done."""
    return sorted(path.parent for path in cells_of(output_root).glob(f"*/{_RESULT}"))


# What a cell leaves


def read_result(folder: Path) -> Json | None:
    """A finished cell's result, or None."""
    return read_json(folder / _RESULT) or None


def read_results(output_root: str | os.PathLike[str], cell_ids: Iterable[str]) -> dict[str, Json]:
    """Cell id -> result of those that are done."""
    found = {cell_id: read_result(folder_of(output_root, cell_id)) for cell_id in cell_ids}
    return {cell_id: result for cell_id, result in found.items() if result is not None}


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Makes the cell one that is done."""
    write_json(folder / _RESULT, result)


def evaluation_file(folder: Path, name: str) -> Path:
    """Where a cell keeps its student's score on another dataset."""
    return folder / "evaluations" / f"{name}.json"


def outcomes_file(folder: Path, name: str = "test") -> Path:
    """Where a cell keeps what became of each image of a test set (`kt.evaluation.outcomes`), its own by default."""
    return evaluation_file(folder, name).with_suffix(".npz")


def failure_file(folder: Path, name: str) -> Path:
    """Where a cell keeps why a score could not be had."""
    return evaluation_file(folder, name).with_suffix(".failed")


def read_evaluation(folder: Path, name: str) -> Json | None:
    """A cell's metrics on other data; None if it has none."""
    return read_json(evaluation_file(folder, name)) or None


def records_file(folder: Path) -> Path:
    """Where a cell records its training, a JSON object in every line."""
    return folder / _RECORDS


def read_records(path: Path, kind: str) -> Iterator[Json]:
    """The records of a kind (`train`: a step, `eval`: a score on the test set), without a line that is half written."""
    mark = f'"kind": "{kind}"'  # most lines are of the other kind, and need not be parsed
    with open(path, encoding="utf-8") as file:
        for line in file:
            if mark not in line:
                continue
            try:
                yield json.loads(line)
            except ValueError:
                continue


# How it stands


def lock_of(folder: Path) -> FileLock:
    """The lock of whoever works on the cell."""
    return FileLock(folder / "lock")


def _is_held(folder: Path) -> bool:
    """Whether a living process works on the cell: the kernel drops a dead one's lock."""
    try:
        with lock_of(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Says how the latest attempt stands."""
    write_json(folder / _STATUS, status)


def read_status(folder: Path, evaluation: str | None = None) -> Json:
    """How a cell stands: `status` is done, running, failed, interrupted or missing, with `error` where there is one.

    A cell whose student lacks the score on another dataset that is asked for is `unscored`, or failed if scoring did. A
    cell that says it is running was killed, and so has failed, if nobody holds its lock; on another machine, whose
    locks may not be seen here, if its files have not changed for long.
    """
    if read_result(folder) is not None:
        done = {**(read_json(folder / _STATUS) or {}), "status": "done", "error": None}
        if evaluation is None or evaluation_file(folder, evaluation).exists():
            return done
        failure = read_json(failure_file(folder, evaluation))
        return {**done, "status": "unscored", **(failure or {})}
    status = read_json(folder / _STATUS)
    if not status:
        return {"status": "missing", "error": None}
    if status["status"] != "running" or _is_held(folder):
        return status
    if status["host"] != socket.gethostname():
        watched = [folder / name for name in (_STATUS, _RECORDS, "log.txt")]
        if time.time() - max(path.stat().st_mtime for path in watched if path.exists()) < STALE_SECONDS:
            return status
    return {**status, "status": "failed", "error": "the process was killed", "killed": True}


def seconds_spent(folder: Path) -> float:
    """Time that earlier attempts spent; a killed one counts up to its last sign of life."""
    status = read_json(folder / _STATUS)
    if not status:
        return 0.0
    seconds = float(status.get("seconds") or 0.0)
    if status["status"] == "running":
        written = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
        seconds += max(0.0, max(written, default=0.0) - status["started"])
    return seconds
