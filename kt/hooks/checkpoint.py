"""Checkpoints that neither a SIGKILL at any moment nor a damaged file can spoil."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from kt import ranks
from kt.files import checksum, is_sealed, replacing, seal
from kt.phase import Phase, phase_folder
from kt.store import Records, first_fault, records_fault
from kt.transfer import TransferModel, export_student

NEWEST, BEFORE = "checkpoint.pth", "checkpoint.before.pth"


def load_checkpoint(path: Path, model: TransferModel) -> dict[str, Any]:
    """Loads a phase checkpoint into a model (student and method, strictly) and returns the rest of it."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state.pop("model"))
    model.method.facts = json.loads(state.pop("facts"))
    return state


def last_checkpoint(cell: Path, phases: Sequence[Phase], tell: Callable[[str], None]) -> tuple[int, bool]:
    """Where a run goes on: the index of the latest phase with a checkpoint that can be relied on, and if it is done.

    A checkpoint is good if it and the snapshots and records up to it are as they were written. One that is not gives
    way to the one before it, and that to the phase before; then later ones are removed, and one line says so.

    Args:
        cell: The cell's folder.
        phases: All phases.
        tell: Called with that line.

    Returns:
        -1 and False where the run starts from the beginning.
    """
    faults: list[str] = []
    found, done, where = -1, False, "the beginning"
    for index in reversed(range(len(phases))):
        folder = phase_folder(cell, index, phases[index])
        newest, before = folder / NEWEST, folder / BEFORE
        if not newest.exists() and not before.exists():
            continue
        for path in (newest, before):
            state, wrong = _examined(path, cell)
            faults += wrong
            if state is not None:
                if path == before:
                    before.replace(newest)
                found, done = index, state["done"]
                where = f"epoch {state['epoch']} of phase '{phases[index].name}'"
                break
            path.unlink(missing_ok=True)
        if found >= 0:
            break
    if faults:
        tell(f"{cell.name}: {', '.join(dict.fromkeys(faults))}: the training goes on from {where}")
    return found, done


def _examined(path: Path, cell: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """A checkpoint without its weights, or what is wrong with it or what it relies on."""
    if not is_sealed(path):
        return None, [f"{path.relative_to(cell)} is {'damaged' if path.exists() else 'missing'}"]
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    relied_on = (first_fault(cell, state["snapshots"]), state["records"] and records_fault(cell, state["records"]))
    if faults := [fault for fault in relied_on if fault]:
        return None, faults
    return {key: state[key] for key in ("epoch", "done")}, []


class CheckpointHook(Hook):
    """Saves at the end of every epoch, and picks up from the last save; the save before it stays beside it.

    Random states are no part of it: every epoch seeds itself (`kt.engine.PhaseLoop`). A plain training may also keep
    weights-only snapshots, equally spaced: anchors of its trajectory. A checkpoint knows those before it by checksum,
    so that they too are a function of the training alone.

    Args:
        cell: The cell's folder.
        records: The record to cut back when a run resumes.
        resumes: Whether the phase goes on from its checkpoint.
        snapshots: Number of snapshots, the last epoch among them.
    """

    priority = "LOW"

    def __init__(self, cell: Path, records: Records | None, resumes: bool, snapshots: int = 0):
        self.cell, self.records, self.resumes, self.count = cell, records, resumes, snapshots
        self.snapshots: dict[str, str] = {}

    def _path(self, runner: Runner) -> Path:
        loop = runner.train_loop
        return phase_folder(self.cell, loop.phase_index, loop.phase) / NEWEST

    def before_train(self, runner: Runner) -> None:
        """Resumes, or enters the phase from scratch."""
        loop = runner.train_loop
        if not self.resumes:
            if loop.phase.enter is not None:
                loop.phase.enter(loop.model)
            return
        state = load_checkpoint(self._path(runner), loop.model)
        runner.optim_wrapper.load_state_dict(state["optimizers"])
        loop.epoch, loop.iter = state["epoch"], state["step"]
        loop.drawn.update(state["drawn"])
        self.snapshots = state["snapshots"]
        if self.records is not None:
            self.records.cut(state["records"])

    def after_train_epoch(self, runner: Runner) -> None:
        """Saves everything that the rest of the run depends on, what the checkpoint itself relies on first."""
        if not ranks.is_first():
            return
        loop, path = runner.train_loop, self._path(runner)
        anchors = {max(1, round(loop.max_epochs * i / self.count)) for i in range(1, self.count + 1)}
        if loop.epoch in anchors:
            name = f"snapshots/epoch_{loop.epoch}.pth"
            (self.cell / name).parent.mkdir(exist_ok=True)
            with replacing(self.cell / name) as file:
                torch.save(export_student(loop.model), file)
            self.snapshots[name] = checksum(self.cell / name)
        state = {
            "model": loop.model.state_dict(),
            "facts": json.dumps(loop.model.method.facts),
            "optimizers": runner.optim_wrapper.state_dict(),
            "drawn": loop.drawn,
            "epoch": loop.epoch,
            "step": loop.iter,
            "snapshots": self.snapshots,
            "records": self.records.mark if self.records is not None else None,
            "done": loop.epoch == loop.max_epochs,
        }
        with replacing(path, path.with_name(BEFORE)) as file:
            torch.save(state, file)
            seal(file)
