"""Progress of the running cell."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner


class ProgressHook(Hook):
    """Reports steps to a display; the losses it names are those of the last log point, so nothing waits for the device.

    Args:
        display: An object with `advance(steps, text)`.
    """

    priority = "VERY_LOW"

    def __init__(self, display: Any):
        self.display = display

    def before_train(self, runner: Runner) -> None:
        """Steps that an earlier attempt did count as done."""
        if runner.train_loop.iter:
            self.display.advance(runner.train_loop.iter, "resumed")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """One more step."""
        loop = runner.train_loop
        self.display.advance(1, f"{loop.phase.name} epoch {loop.epoch + 1}/{loop.max_epochs}")
