"""Trains a student through all phases of a method: the library's entry point, and what every cell runs."""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from kt import ranks
from kt.classifier import Classifier
from kt.data import Data
from kt.data.loaders import Loader, by_iterations
from kt.engine import Engine, run_phase
from kt.errors import UserError
from kt.evaluation.outcomes import Outcomes, keep_outcomes
from kt.files import at_home, replacing, write_json
from kt.hooks import CheckpointHook, CompileHook, EvaluateHook, ProgressHook, RecordHook, SyncBuffersHook
from kt.hooks.checkpoint import NEWEST, last_checkpoint, load_checkpoint
from kt.hooks.compile import PLACE
from kt.needs import WEIGHTS
from kt.phase import TRAIN, Phase, phase_folder
from kt.settings import Schedule, check_accumulation, check_compile, check_schedule, check_settings, defaults, epochs_of
from kt.store import Records, evaluation_file, outcomes_file, read_records, records_file
from kt.transfer import TransferModel, evaluating, export_student

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stretch:
    """A phase on its data.

    Attributes:
        loaders: By name, `train` among them.
        steps: Updates in all.
        epochs: Passes over the training loader, the last of which may be cut short.
    """

    phase: Phase
    loaders: Mapping[str, Loader]
    steps: int
    epochs: int


def plan_phases(model: TransferModel, data: Data, settings: dict[str, Any]) -> list[Stretch]:
    """The phases of a training under a whole schedule, whose `epochs` are set where it counts iterations.

    Raises:
        UserError: The update cannot be accumulated, or the training set is too small.
    """
    phases: list[Phase] = model.method.phases() if settings["epochs"] != 0 else []
    loaders = [{TRAIN: data.train, **{name: made(data) for name, made in each.loaders.items()}} for each in phases]
    if settings["iterations"]:
        settings["epochs"] = epochs_of(settings)
        for each in loaders:
            each[TRAIN] = by_iterations(each[TRAIN], settings["iterations"], settings["epochs"])
    found = []
    for phase, each in zip(phases, loaders, strict=True):
        train = each[TRAIN]
        check_accumulation(train.passes, phase.step is None and model.method.accumulates, data.spec.task)
        updates = len(train) // train.passes
        steps = phase.steps(settings["epochs"] * updates)
        found.append(Stretch(phase, each, steps, math.ceil(steps / updates)))
    return found


def check_sizes(model: TransferModel, size: int, device: torch.device) -> None:
    """Refuses images in which a classifier, the student or another one, finds nothing to see.

    Args:
        model: Whose classifiers.
        size: Pixels a side.
        device: Where they are.

    Raises:
        UserError: Says which network cannot, and why.
    """
    for who, network in {"student": model.student, **model.teachers}.items():
        if not isinstance(network, Classifier):
            continue
        try:
            with evaluating(network):
                network(torch.zeros(1, 3, size, size, device=device))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            kind = type(network.network).__name__
            raise UserError(f"dataset.image_size={size}: no size for the {who}, a {kind} ({reason})") from None


def fit(
    model: TransferModel,
    data: Any,
    folder: str | os.PathLike[str],
    schedule: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    activation_checkpointing: bool = False,
    compile: bool | str = False,
    mirror: Callable[[dict[str, Any]], None] | None = None,
    progress: Any = None,
    snapshots: int = 0,
    extra_hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Trains, resumes or merely scores a student, and leaves everything in `folder`.

    Args:
        model: Student, method and teachers.
        data: `kt.data.Data`.
        folder: Gets `phases/`, `metrics.jsonl`, `evaluations/test.json` (and of each image `.npz`, and pictures,
            `.png`), `student.pth` and what the method keeps. Called again with the same folder, it goes on after the
            last epoch saved, or further back where files are damaged, and ends at the numbers of an uninterrupted run.
        schedule: Changes to the defaults of `kt.settings.Schedule`; 0 epochs score the student as it is. With
            `iterations` the length is that many updates, and every `interval` of them counts as an epoch. What an
            update consists of (`batch_size`, `device_batch`), the data's loaders say.
        seed: Of everything random in training.
        device: Where to train.
        precision: `fp32` or `bf16`.
        activation_checkpointing: Less memory for longer steps, to the same numbers (`kt.recomputing`).
        compile: Whether passes of the training are compiled, or `auto` (`kt.compiling`).
        mirror: Called with every record written.
        progress: An object with `start(total, text)`, `advance(steps, text)`, `line(text)` and `stop()`.
        snapshots: How many weights-only snapshots of the main phase to keep.
        extra_hooks: Further mmengine hooks for every phase.

    Returns:
        The last epoch's metrics.

    Raises:
        UserError: The schedule has a key or value that it cannot have, the update cannot be accumulated, images are
            too small or too few for a network, or passes cannot be compiled.
    """
    cell = at_home(folder)
    settings = {**defaults(Schedule), **(schedule or {})}
    check_settings(settings, Schedule, "schedule.")
    check_schedule({**settings, "epochs": None} if settings["iterations"] else settings)
    check_compile(compile, activation_checkpointing)
    stretches = plan_phases(model, data, settings)
    phases = [stretch.phase for stretch in stretches]
    first = ranks.is_first()
    for index, phase in enumerate(phases):
        phase_folder(cell, index, phase).mkdir(parents=True, exist_ok=True)
    (cell / "evaluations").mkdir(parents=True, exist_ok=True)
    tell = logger.warning if progress is None else progress.line
    latest, done = ranks.from_first(last_checkpoint(cell, phases, tell) if first else None)
    begun = latest if latest >= 0 and not done else None  # the phase that is under way
    finished = latest + 1 if begun is None else latest
    records = Records(records_file(cell), mirror) if first else None

    def hooks(index: int, phase: Phase) -> list[Hook]:
        made: list[Hook] = [
            RecordHook(records),
            SyncBuffersHook(),
            EvaluateHook(data.score, settings["evaluate_every"], records),
            CheckpointHook(cell, records, index == begun, snapshots if phase.name == "train" else 0),
            CompileHook(cell, records),
            *extra_hooks,
        ]
        if progress is not None and first:
            made.append(ProgressHook(progress))
        return made

    engine = Engine(settings, torch.device(device), cell, seed, precision, activation_checkpointing, compile, hooks)
    steps = [stretch.steps for stretch in stretches]
    if progress is not None and first:
        progress.start(sum(steps), cell.name)
    try:
        model.place(engine.device)
        check_sizes(model, data.spec.image_size, engine.device)
        if begun is None:
            mark = None
            if done:
                mark = load_checkpoint(phase_folder(cell, latest, phases[latest]) / NEWEST, model)["records"]
            if records is not None:
                records.cut(mark)
        for index in range(finished, len(phases)):
            run_phase(model, phases[index], index, stretches[index].loaders, engine)
        outcomes = Outcomes()
        metrics = data.score(model.student, outcomes=outcomes)
        if records is not None:
            total = stretches[-1].epochs if stretches else 0
            row = {"kind": "eval", "phase": "train", "step": steps[-1] if steps else 0, "epoch": total, **metrics}
            records.write([row])
            write_json(evaluation_file(cell, "test"), outcomes.beside(metrics))
            keep_outcomes(outcomes_file(cell), outcomes.images, outcomes.sheet)
            for name, content in {**(model.method.keeps() if phases else {}), WEIGHTS: export_student(model)}.items():
                with replacing(cell / name) as file:
                    torch.save(content, file)
    finally:
        if records is not None:
            records.close()
        if progress is not None and first:
            progress.stop()
    return metrics


def best_metrics(cell: Path) -> dict[str, float]:
    """The best of each score of the main phase, which some papers report; the result is the last one."""
    found: dict[str, float] = {}
    for row in read_records(records_file(cell), "eval"):
        if row["phase"] == TRAIN:
            for name in row.keys() - {"kind", "phase", "step", "epoch"}:
                better = min if name.startswith("mr_") else max  # miss rates
                found[name] = better(row[name], found.get(name, row[name]))
    return found


def images_per_second(cell: Path) -> float | None:
    """The median training speed of the main phase, from the cell's records."""
    rates = [row["images_per_second"] for row in read_records(records_file(cell), "train") if row["phase"] == "train"]
    return statistics.median(rates) if rates else None


def phase_records(cell: Path, batch_size: int) -> list[dict[str, Any]]:
    """Name, epochs, steps and seconds of pure training of each phase, and what `compile=auto` has found.

    From the cell's records.

    Args:
        cell: The cell's folder.
        batch_size: Images of an update, for the records hold speeds.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in read_records(records_file(cell), "train"):
        phase = found.setdefault(row["phase"], {"name": row["phase"], "seconds": 0.0})
        phase |= {"epochs": math.ceil(row["epoch"]), "steps": row["step"]}
        phase["seconds"] += batch_size / max(row["images_per_second"], 0.1)
    for row in read_records(records_file(cell), "compile"):
        found[row["phase"]]["compile"] = {key: value for key, value in row.items() if key not in PLACE}
    return list(found.values())


__all__ = ["Classifier", "best_metrics", "fit", "images_per_second", "phase_records"]
