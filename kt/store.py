"""A cell on the disk: its folder, what it leaves there, and how it stands. Planning and tables read it without torch.

`status.json` says what the latest attempt is doing or how it ended. `result.json` is written last and whole, and lists
what the cell keeps with checksums: a cell is done exactly when that file and all it lists are as they were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kt.errors import UserError
from kt.files import (
    STALE_SECONDS,
    checksum,
    is_full,
    read_json,
    read_sealed,
    rewrite_sealed,
    sweep,
    write_json,
    write_sealed,
)
from kt.needs import SNAPSHOTS, WEIGHTS

Json = dict[str, Any]

# Raise it when the same config comes to mean another computation: results of older code are then not taken for new.
IDENTITY_VERSION = 5

_RESULT, _STATUS, _RECORDS, _DATA = "result.json", "status.json", "metrics.jsonl", "data.json"
_QUEUE = "queue.json"

# What a trained cell has to hold, and what some hold as well. Checkpoints check themselves (`kt.hooks.checkpoint`).
DESCRIPTION = "student.json"
_HELD = (WEIGHTS, DESCRIPTION, "metrics.jsonl", "evaluations/test.json")
_HELD_BY_SOME = (
    "student_config.py",
    "*.pth",
    f"{SNAPSHOTS}/*.pth",
    "evaluations/teacher.json",
    "evaluations/test.npz",
    "evaluations/test.png",
    _DATA,
)


def cells_of(output_root: str | os.PathLike[str]) -> Path:
    """Where all cells live."""
    return Path(output_root) / "cells"


def folder_of(output_root: str | os.PathLike[str], cell_id: str) -> Path:
    """Where a cell lives."""
    return cells_of(output_root) / cell_id


def cache_of(output_root: str | os.PathLike[str]) -> Path:
    """What can be had again, kept for all cells."""
    return Path(output_root) / "cache"


def finished_cells(output_root: str | os.PathLike[str]) -> list[Path]:
    """The folders of all cells that are done."""
    return sorted(path.parent for path in cells_of(output_root).glob(f"*/{_RESULT}"))


# What a cell leaves


def first_fault(folder: Path, sums: Mapping[str, str]) -> str | None:
    """What is wrong with the first of a cell's files, by name with their checksums, that is not as it was.

    Raises:
        UserError: One may not be read.
    """
    for name, known in sums.items():
        try:
            if checksum(folder / name) != known:
                return f"{name} is damaged"
        except PermissionError as error:
            raise UserError(f"{folder / name}: cannot be read ({error.strerror})") from None
        except OSError:
            return f"{name} is missing"
    return None


def _read_result(folder: Path) -> tuple[Json | None, str | None]:
    """A result, or why there is none where one has been."""
    version = (read_json(folder / _RESULT) or {}).get("version", IDENTITY_VERSION)
    if version != IDENTITY_VERSION:
        return None, f"{_RESULT} is of identity version {version}, now it is {IDENTITY_VERSION}"
    result = read_sealed(folder / _RESULT)
    if result is None:
        was_done = (read_sealed(folder / _STATUS) or {}).get("status") == "done"
        return None, f"{_RESULT} is missing" if was_done else None
    return (result, None) if result else (None, f"{_RESULT} is damaged")


def read_result(folder: Path) -> Json | None:
    """A finished cell's result as it was written, whatever has become of its other files; None if it can't be read."""
    try:
        return _read_result(folder)[0]
    except UserError:
        return None


def inspect(folder: Path) -> tuple[Json | None, str | None]:
    """A finished cell's result; where it or a file that it lists cannot be relied on, None and what is wrong.

    Raises:
        UserError: It may not be read.
    """
    result, fault = _read_result(folder)
    if result is not None:
        fault = first_fault(folder, result["files"])
    return (None, fault) if fault else (result, None)


def listed(folder: Path, prefix: str) -> list[Path]:
    """The files that a finished cell keeps whose names, from its folder on, begin so."""
    result = read_result(folder) or {"files": {}}
    return [folder / name for name in result["files"] if name.startswith(prefix)]


def check(folder: Path, *names: str) -> None:
    """Refuses files of a finished cell that are not as it has left them; a folder without a result has none.

    Raises:
        UserError: Names the file.
    """
    result = read_result(folder)
    wanted = {name: result["files"][name] for name in names if name in result["files"]} if result else {}
    if fault := first_fault(folder, wanted):
        raise UserError(f"{folder / fault}: run the command that trained the cell again, which mends it")


def read_results(output_root: str | os.PathLike[str], cell_ids: Iterable[str]) -> dict[str, Json]:
    """Cell id -> result of those that are done."""
    found = {cell_id: read_result(folder_of(output_root, cell_id)) for cell_id in cell_ids}
    return {cell_id: result for cell_id, result in found.items() if result is not None}


def write_result(folder: Path, result: Mapping[str, Any]) -> Json:
    """Makes the cell one that is done; returns the result with the files that it lists.

    Raises:
        FileNotFoundError: The cell lacks a file that it has to hold.
    """
    some = [path for pattern in _HELD_BY_SOME for path in sorted(folder.glob(pattern))]
    names = [*_HELD, *(path.relative_to(folder).as_posix() for path in some)]
    written = {**result, "version": IDENTITY_VERSION, "files": _sums(folder, names), "evaluations": {}}
    write_sealed(folder / _RESULT, written)
    return written


def _sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: checksum(folder / name) for name in names}


def begin(folder: Path) -> None:
    """Before an attempt: the cell is not done, and what a killed process was writing is in nobody's way."""
    (folder / _RESULT).unlink(missing_ok=True)
    sweep(folder)


def evaluation_file(folder: Path, name: str) -> Path:
    """Where a cell keeps its student's score on another dataset."""
    return folder / "evaluations" / f"{name}.json"


def outcomes_file(folder: Path, name: str = "test") -> Path:
    """Where a cell keeps what became of each image of a test set (`kt.evaluation.outcomes`), its own by default."""
    return evaluation_file(folder, name).with_suffix(".npz")


def pictures_file(folder: Path, name: str = "test") -> Path:
    """Where a cell keeps pictures of the first images of a test set (`kt.evaluation.pictures`), its own by default."""
    return evaluation_file(folder, name).with_suffix(".png")


def failure_file(folder: Path, name: str) -> Path:
    """Where a cell keeps why a score could not be had."""
    return evaluation_file(folder, name).with_suffix(".failed")


def list_evaluation(
    folder: Path, name: str, *others: str, data: Json | None = None, warnings: Sequence[str] = ()
) -> None:
    """Adds a score on other data, which has just been written, to what a finished cell keeps.

    Args:
        folder: The cell's folder.
        name: Of the score.
        others: Names of files beside it that it left as well.
        data: Of which data it is, if not of the cell's own; as for `write_data`.
        warnings: What there was to warn of.
    """
    paths = [evaluation_file(folder, name), *(evaluation_file(folder, name).with_name(other) for other in others)]
    sums = _sums(folder, [path.relative_to(folder).as_posix() for path in paths])
    _list_evaluation(folder, name, {"files": sums, "data": data, "warnings": list(warnings)})


def drop_evaluation(folder: Path, name: str) -> None:
    """Takes a score off what a finished cell keeps: it is of data that are not what they were."""
    _list_evaluation(folder, name, None)


def _list_evaluation(folder: Path, name: str, listed: Json | None) -> None:
    result = read_result(folder)
    assert result is not None
    others = {key: value for key, value in result["evaluations"].items() if key != name}
    write_sealed(folder / _RESULT, {**result, "evaluations": {**others, **({name: listed} if listed else {})}})


def listed_evaluation(folder: Path, name: str) -> Json | None:
    """The `files` and `data` of a score that a cell has had, as `list_evaluation` keeps them."""
    listed: Json = (read_result(folder) or {}).get("evaluations", {})
    return listed.get(name)


def evaluation_names(folder: Path) -> list[str]:
    """The other data that a finished cell's student has been scored on, and analyses of it."""
    return list((read_result(folder) or {}).get("evaluations", {}))


def evaluation_fault(folder: Path, name: str) -> str | None:
    """What is wrong with a score that a cell has had."""
    listed = listed_evaluation(folder, name)
    return first_fault(folder, listed["files"]) if listed else None


def read_evaluation(folder: Path, name: str, fingerprint: str | None = None) -> Json | None:
    """A cell's metrics on other data; None if none can be read, or if those are of data with another fingerprint."""
    listed = listed_evaluation(folder, name)
    try:
        if listed is None or evaluation_fault(folder, name):
            return None
    except UserError:
        return None
    if fingerprint is not None and listed["data"] is not None and listed["data"]["fingerprint"] != fingerprint:
        return None
    return read_json(evaluation_file(folder, name))


def records_file(folder: Path) -> Path:
    """Where a cell records its training, a JSON object in every line."""
    return folder / _RECORDS


class Records:
    """The records of a cell while it trains: only appended to, and cut back to a checkpoint by a run that resumes.

    Args:
        path: The file.
        mirror: Called with every row that is written, or kept by `cut` (Weights & Biases).
    """

    def __init__(self, path: Path, mirror: Callable[[Json], None] | None = None):
        self.path, self.mirror = path, mirror
        self.file = open(path, "a+b")  # noqa: SIM115 - stays open for the whole cell
        self.sum = hashlib.sha256(path.read_bytes())

    @property
    def mark(self) -> Json:
        """Where the records end, and the checksum up to there; all of it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"offset": self.file.tell(), "sha256": self.sum.hexdigest()}

    def cut(self, mark: Mapping[str, Any] | None) -> None:
        """Drops everything after a mark, or without one everything: those steps are done again."""
        self.file.truncate(mark["offset"] if mark else 0)
        self.file.seek(0)
        kept = self.file.read()
        self.sum = hashlib.sha256(kept)
        self._reflect(json.loads(line) for line in kept.splitlines())

    def write(self, rows: Sequence[Json]) -> None:
        """Appends rows and hands them to the mirror."""
        written = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.sum.update(written)
        self.file.write(written)
        self.file.flush()
        self._reflect(rows)

    def _reflect(self, rows: Iterable[Json]) -> None:
        if self.mirror is not None:
            for row in rows:
                self.mirror(row)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def records_fault(folder: Path, mark: Mapping[str, Any]) -> str | None:
    """What is wrong with a cell's records up to a mark."""
    try:
        with open(records_file(folder), "rb") as file:
            found = hashlib.sha256(file.read(mark["offset"])).hexdigest()
    except OSError:
        return f"{_RECORDS} is missing"
    return None if found == mark["sha256"] else f"{_RECORDS} is damaged"


def read_records(path: Path, kind: str | None = None) -> Iterator[Json]:
    """The records, of a kind (`train`: a step, `eval`: a test score) or all, without a line that is half written."""
    mark = f'"kind": "{kind}"' if kind else ""  # most lines are of the other kind, and need not be parsed
    with open(path, encoding="utf-8") as file:
        for line in file:
            if mark not in line:
                continue
            try:
                yield json.loads(line)
            except ValueError:
                continue


def remove(folder: Path) -> bool:
    """Removes a cell and all that it has left, unless somebody works on it; returns whether it is gone."""
    try:
        with lock_of(folder).acquire(timeout=0):
            (folder / _RESULT).unlink(missing_ok=True)  # first: half a cell is none
            shutil.rmtree(folder)
    except Timeout:
        return False
    return True


# Of which data it is


def write_data(folder: Path, data: Json) -> None:
    """Records the data that an attempt is about to read; one that has begun on others, or nobody knows which, is void.

    Args:
        folder: The cell's folder.
        data: `fingerprint` (None where a dataset is not there) and the summary of each of the `datasets`.
    """
    if _read_data(folder) != data:
        void(folder)
    write_sealed(folder / _DATA, data)


def void(folder: Path) -> None:
    """Removes all that a cell has learned."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (_STATUS, _QUEUE, "lock", "config.yaml"):
            path.unlink()


def read_data(folder: Path) -> Json | None:
    """What `write_data` has recorded, of a finished cell even if that file is lost; None if that is not known."""
    try:
        return _read_data(folder)
    except UserError:
        return None


def _read_data(folder: Path) -> Json | None:
    return read_sealed(folder / _DATA) or (read_result(folder) or {}).get("data")


def newest_state(output_root: str | os.PathLike[str], settings_hash: str) -> str:
    """The id of the newest result of some settings on any data; without a result that of the first data."""
    paths = [path for path in cells_of(output_root).glob(f"{settings_hash}*/{_RESULT}") if read_result(path.parent)]
    return max(paths, key=lambda path: path.stat().st_mtime_ns).parent.name if paths else settings_hash


# How it stands


def lock_of(folder: Path) -> FileLock:
    """The lock of whoever works on the cell."""
    return FileLock(folder / "lock")


def _is_held(folder: Path) -> bool | None:
    """Whether a living process works on the cell: the kernel drops a dead one's lock.

    None where that cannot be told: one has to be able to write a lock to look at it.
    """
    try:
        with lock_of(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return None


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Says how the latest attempt stands; on a full disk in the room of what was said before."""
    try:
        write_sealed(folder / _STATUS, status)
    except OSError as error:
        if not is_full(error):
            raise
        rewrite_sealed(folder / _STATUS, status)


def glance(folder: Path, evaluation: str | None = None) -> str:
    """How a cell stands, as `read_status` says, without a look into its files: quick, and blind to damage."""
    if not os.path.exists(folder / _RESULT):  # unlike `Path.exists`, where one may not look as well
        return str(read_status(folder)["status"])
    return "done" if evaluation is None or os.path.exists(evaluation_file(folder, evaluation)) else "unscored"


def read_status(folder: Path, evaluation: str | None = None, fingerprint: str | None = None) -> Json:
    """How a cell stands: `status` is done, running, failed, interrupted or missing, with `error` where there is one.

    `warnings` are those of the latest attempt, and of the score that is asked for.

    A cell that was done and has lost one of its files since is `damaged`. One whose student lacks the score on another
    dataset that is asked for (of data with that fingerprint, if given) is `unscored`, or failed if scoring did. One
    that says it is running was killed, and so has failed, if nobody holds its lock; on another machine, whose locks may
    not be seen here, and where the lock may not be, if its files have not changed for long. One that may not be read
    counts as failed.
    """
    try:
        return _standing(folder, evaluation, fingerprint)
    except UserError as error:
        return {"status": "failed", "error": str(error), "user": True}


def _read_attempt(folder: Path) -> Json:
    """What the latest attempt says of itself; nothing if that is not known, or is not kt's."""
    status = read_sealed(folder / _STATUS) or {}
    return status if "status" in status else {}


def _standing(folder: Path, evaluation: str | None, fingerprint: str | None) -> Json:
    result, fault = inspect(folder)
    try:
        status = _read_attempt(folder)
    except UserError:
        if result is None:
            raise
        status = {}
    if result is not None:
        done = {**status, "status": "done", "error": None}
        if evaluation is None:
            return done
        if read_evaluation(folder, evaluation, fingerprint) is not None:
            scoring = (listed_evaluation(folder, evaluation) or {}).get("warnings", [])
            return {**done, "warnings": [*status.get("warnings", []), *scoring]}
        failure = read_sealed(failure_file(folder, evaluation))
        return {**done, "status": "unscored", **(failure or {})}
    if fault:
        return {**status, "status": "damaged", "error": fault}
    if not status:
        return {"status": "missing", "error": None}
    held = _is_held(folder) if status["status"] == "running" else True
    if held:
        return status
    if held is None or status.get("host") != socket.gethostname():
        watched = [folder / name for name in (_STATUS, _RECORDS, "log.txt")]
        if time.time() - max(path.stat().st_mtime for path in watched if path.exists()) < STALE_SECONDS:
            return status
    return {**status, "status": "failed", "error": "the process was killed", "killed": True}


def close(folder: Path) -> Json:
    """How a cell stands, after an interrupt: one that was killed, and says it is running, says it was interrupted."""
    status = read_status(folder)
    if not status.pop("killed", False):
        return status
    closed = {**status, "status": "interrupted", "error": None, "seconds": seconds_spent(folder)}
    write_status(folder, closed)
    return closed


def note_queue(folder: Path, job: str, waited: Mapping[str, float]) -> None:
    """Records a cell's job in the queue of a cluster.

    Args:
        folder: The cell's folder, which is made.
        job: The job's id.
        waited: For what it has waited since the last note -> seconds; added to what the cell has waited before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = read_queue(folder).get("waited", {})
    total = {reason: known.get(reason, 0.0) + waited.get(reason, 0.0) for reason in {**known, **waited}}
    write_json(folder / _QUEUE, {"job": job, "waited": total})


def read_queue(folder: Path) -> Json:
    """The latest `job` that a cluster has had of a cell, and for what its jobs have `waited`, as far as is known."""
    try:
        return read_json(folder / _QUEUE) or {}
    except UserError:
        return {}


def seconds_spent(folder: Path) -> float:
    """Time that earlier attempts spent; a killed one counts up to its last sign of life."""
    status = _read_attempt(folder)
    seconds = float(status.get("seconds") or 0.0)
    if status.get("status") == "running" and "started" in status:
        written = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
        seconds += max(0.0, max(written, default=0.0) - status["started"])
    return seconds
