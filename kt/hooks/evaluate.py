"""Scoring the plain student during training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from kt.ranks import mean_over_ranks
from kt.store import Records


class SyncBuffersHook(Hook):
    """Averages running statistics over ranks at the end of an epoch: every rank then holds the same model."""

    priority = "ABOVE_NORMAL"

    def after_train_epoch(self, runner: Runner) -> None:
        """Averages floating-point buffers; counters are equal already."""
        for buffer in runner.model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean_over_ranks(buffer))


class EvaluateHook(Hook):
    """Scores the student after every few epochs.

    Args:
        score: Metrics of a student (`kt.data.Data.score`).
        every: Epochs between evaluations.
        records: Where rows go.
    """

    priority = "NORMAL"

    def __init__(self, score: Callable[[Any], dict[str, float]], every: int, records: Records | None):
        self.score, self.every, self.records = score, every, records

    def after_train_epoch(self, runner: Runner) -> None:
        """Evaluates at the interval and at a phase's end; the end of the main phase is the result, scored by `fit`."""
        loop = runner.train_loop
        last = loop.epoch == loop.max_epochs
        due = loop.phase.name != "train" if last else loop.epoch % self.every == 0
        if not (loop.phase.evaluate and due):
            return
        metrics = self.score(loop.model.student)
        if self.records is not None:
            row = {"kind": "eval", "phase": loop.phase.name, "step": loop.iter, "epoch": loop.epoch, **metrics}
            self.records.write([row])
