"""Trains a student through all phases of a method: the library's entry point, and what every cell runs."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from kt import ranks
from kt.classifier import Classifier
from kt.data.loaders import by_iterations
from kt.engine import Engine, run_phase
from kt.evaluation.outcomes import Outcomes, keep_outcomes
from kt.files import replacing, write_json
from kt.hooks import CheckpointHook, EvaluateHook, ProgressHook, RecordHook, Records, SnapshotHook, SyncBuffersHook
from kt.hooks.checkpoint import load_checkpoint
from kt.phase import TRAIN, Phase, phase_folder
from kt.settings import Schedule, check_accumulation, defaults
from kt.store import outcomes_file
from kt.transfer import TransferModel, export_student


def fit(
    model: TransferModel,
    data: Any,
    folder: str | os.PathLike[str],
    schedule: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    mirror: Callable[[dict[str, Any]], None] | None = None,
    progress: Any = None,
    snapshots: int = 0,
    extra_hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Trains, resumes or merely scores a student, and leaves everything in `folder`.

    Args:
        model: Student, method and teachers.
        data: `kt.data.Data`.
        folder: Gets `phases/`, `metrics.jsonl`, `evaluations/test.json` (and `.npz`, of each image) and
            `student.pth`. Called again with the same folder, it goes on after the last epoch saved and ends at the
            numbers of an uninterrupted run.
        schedule: Changes to the defaults of `kt.settings.Schedule`; 0 epochs score the student as it is. With
            `iterations` the length is that many updates, and every `interval` of them counts as an epoch. What an
            update consists of (`batch_size`, `device_batch`), the data's loaders say.
        seed: Of everything random in training.
        device: Where to train.
        precision: `fp32` or `bf16`.
        mirror: Called with every record written.
        progress: An object with `start(total, text)`, `advance(steps, text)` and `stop()`.
        snapshots: How many weights-only snapshots of the main phase to keep.
        extra_hooks: Further mmengine hooks for every phase.

    Returns:
        The last epoch's metrics.
    """
    cell = Path(folder)
    settings = {**defaults(Schedule), **(schedule or {})}
    phases: list[Phase] = model.method.phases() if settings["epochs"] != 0 else []
    loaders = [{TRAIN: data.train, **{name: made(data) for name, made in each.loaders.items()}} for each in phases]
    if settings["iterations"]:
        for each in loaders:
            each[TRAIN], settings["epochs"] = by_iterations(each[TRAIN], settings["iterations"], settings["interval"])
    for phase, each in zip(phases, loaders, strict=True):
        exact = phase.step is None and model.method.accumulates
        check_accumulation(each[TRAIN].passes, exact, data.spec.task)
    first = ranks.is_first()
    for index, phase in enumerate(phases):
        phase_folder(cell, index, phase).mkdir(parents=True, exist_ok=True)
    (cell / "evaluations").mkdir(parents=True, exist_ok=True)
    records = Records(cell / "metrics.jsonl", mirror) if first else None
    finished, fresh_offset = _finished_phases(cell, phases), 0

    def hooks(index: int, phase: Phase) -> list[Hook]:
        made: list[Hook] = [
            RecordHook(records),
            SyncBuffersHook(),
            EvaluateHook(data.score, settings["evaluate_every"], records),
            CheckpointHook(cell, records, fresh_offset if index == finished else None),
            *extra_hooks,
        ]
        if snapshots and phase.name == "train":
            made.append(SnapshotHook(cell, snapshots))
        if progress is not None and first:
            made.append(ProgressHook(progress))
        return made

    engine = Engine(settings, torch.device(device), cell, seed, precision, hooks)
    epochs = [len(each[TRAIN]) // each[TRAIN].passes for each in loaders]
    steps = [phase.steps(settings["epochs"] * each) for phase, each in zip(phases, epochs, strict=True)]
    if progress is not None and first:
        progress.start(sum(steps), cell.name)
    try:
        model.place(engine.device)
        if finished:
            state = load_checkpoint(phase_folder(cell, finished - 1, phases[finished - 1]) / "checkpoint.pth", model)
            fresh_offset = state["offset"]
        if records is not None and finished == len(phases):
            records.cut(fresh_offset)
        for index in range(finished, len(phases)):
            run_phase(model, phases[index], index, loaders[index], engine)
        outcomes: Outcomes = {}
        metrics = data.score(model.student, outcomes=outcomes)
        if records is not None:
            total = math.ceil(steps[-1] / epochs[-1]) if phases else 0
            row = {"kind": "eval", "phase": "train", "step": steps[-1] if steps else 0, "epoch": total, **metrics}
            records.write([row])
            write_json(cell / "evaluations" / "test.json", metrics)
            keep_outcomes(outcomes_file(cell), outcomes)
            with replacing(cell / "student.pth") as file:
                torch.save(export_student(model), file)
    finally:
        if records is not None:
            records.close()
        if progress is not None and first:
            progress.stop()
    return metrics


def _finished_phases(cell: Path, phases: Sequence[Phase]) -> int:
    """How many phases, from the first, are done."""
    for index, phase in enumerate(phases):
        path = phase_folder(cell, index, phase) / "checkpoint.pth"
        if not path.exists() or not torch.load(path, map_location="cpu", weights_only=True, mmap=True)["done"]:
            return index
    return len(phases)


def _records(cell: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The records of a cell's training steps (`train`) or of its scores (`eval`)."""
    with open(cell / "metrics.jsonl") as file:
        for line in file:
            row = json.loads(line)
            if row["kind"] == kind:
                yield row


def best_metrics(cell: Path) -> dict[str, float]:
    """The best of each score of the main phase, which some papers report; the result is the last one."""
    found: dict[str, float] = {}
    for row in _records(cell, "eval"):
        if row["phase"] == TRAIN:
            for name in row.keys() - {"kind", "phase", "step", "epoch"}:
                better = min if name.startswith("mr_") else max  # miss rates
                found[name] = better(row[name], found.get(name, row[name]))
    return found


def images_per_second(cell: Path) -> float | None:
    """The median training speed of the main phase, from the cell's records."""
    rates = [row["images_per_second"] for row in _records(cell, "train") if row["phase"] == "train"]
    return statistics.median(rates) if rates else None


def phase_records(cell: Path, batch_size: int) -> list[dict[str, Any]]:
    """Name, epochs, steps and seconds of pure training of each phase, from the cell's records.

    Args:
        cell: The cell's folder.
        batch_size: Images of an update, for the records hold speeds.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in _records(cell, "train"):
        phase = found.setdefault(row["phase"], {"name": row["phase"], "seconds": 0.0})
        phase |= {"epochs": math.ceil(row["epoch"]), "steps": row["step"]}
        phase["seconds"] += batch_size / max(row["images_per_second"], 0.1)
    return list(found.values())


__all__ = ["Classifier", "best_metrics", "fit", "images_per_second", "phase_records"]
