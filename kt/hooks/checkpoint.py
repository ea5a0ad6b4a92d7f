"""Checkpoints that a SIGKILL at any moment cannot spoil."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from kt import ranks
from kt.files import replacing
from kt.hooks.records import Records
from kt.phase import phase_folder
from kt.transfer import TransferModel, export_student


def load_checkpoint(path: Path, model: TransferModel) -> dict[str, Any]:
    """Loads a phase checkpoint into a model (student and method, strictly) and returns the rest of it."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state.pop("model"))
    return state


class CheckpointHook(Hook):
    """Saves at the end of every epoch and picks up from the last save.

    Random states are no part of it: every epoch seeds itself (`kt.engine.PhaseLoop`).

    Args:
        cell: The cell's folder.
        records: The record to cut back when a run resumes.
        fresh_offset: Where the record of this phase begins if the phase starts from scratch; None is wherever it is.
    """

    priority = "LOW"

    def __init__(self, cell: Path, records: Records | None, fresh_offset: int | None = None):
        self.cell, self.records, self.fresh_offset = cell, records, fresh_offset

    def _path(self, runner: Runner) -> Path:
        loop = runner.train_loop
        return phase_folder(self.cell, loop.phase_index, loop.phase) / "checkpoint.pth"

    def before_train(self, runner: Runner) -> None:
        """Resumes, or enters the phase from scratch."""
        loop, path = runner.train_loop, self._path(runner)
        if not path.exists():
            if self.records is not None and self.fresh_offset is not None:
                self.records.cut(self.fresh_offset)
            if loop.phase.enter is not None:
                loop.phase.enter(loop.model)
            return
        state = load_checkpoint(path, loop.model)
        runner.optim_wrapper.load_state_dict(state["optimizers"])
        loop.epoch, loop.iter = state["epoch"], state["step"]
        loop.drawn.update(state["drawn"])
        if self.records is not None:
            self.records.cut(state["offset"])

    def after_train_epoch(self, runner: Runner) -> None:
        """Saves everything that the rest of the run depends on."""
        if not ranks.is_first():
            return
        loop = runner.train_loop
        state = {
            "model": loop.model.state_dict(),
            "optimizers": runner.optim_wrapper.state_dict(),
            "drawn": loop.drawn,
            "epoch": loop.epoch,
            "step": loop.iter,
            "offset": self.records.offset if self.records is not None else 0,
            "done": loop.epoch == loop.max_epochs,
        }
        with replacing(self._path(runner)) as file:
            torch.save(state, file)


class SnapshotHook(Hook):
    """Keeps a few weights-only snapshots of a plain training, equally spaced: anchors of its trajectory.

    Args:
        cell: The cell's folder.
        count: Number of snapshots, the last epoch among them.
    """

    priority = "LOW"

    def __init__(self, cell: Path, count: int = 4):
        self.cell, self.count = cell, count

    def after_train_epoch(self, runner: Runner) -> None:
        """Writes the plain network's weights where an anchor falls."""
        loop = runner.train_loop
        anchors = {max(1, round(loop.max_epochs * i / self.count)) for i in range(1, self.count + 1)}
        if loop.epoch in anchors and ranks.is_first():
            folder = self.cell / "snapshots"
            folder.mkdir(exist_ok=True)
            with replacing(folder / f"epoch_{loop.epoch}.pth") as file:
                torch.save(export_student(loop.model), file)
