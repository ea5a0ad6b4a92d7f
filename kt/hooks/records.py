"""The per-step record of a run: buffered on the device, written at log points."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from kt.store import Records


class NonFiniteLossError(ArithmeticError):
    """A loss or balance became infinite or NaN; the message names the first such step."""


class RecordHook(Hook):
    """Collects every step's scalars on the device and writes them at log points: one synchronisation each.

    Args:
        records: Where rows go; None on ranks that do not write.
        interval: Steps between log points (the end of an epoch is always one).
    """

    # Before evaluation and checkpoint, which rely on what is written.
    priority = "HIGH"

    def __init__(self, records: Records | None, interval: int = 50):
        self.records, self.interval = records, interval
        self.rows: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self.images = 0
        self.started = time.perf_counter()
        self.rates: list[tuple[int, float]] = []

    def before_train_epoch(self, runner: Runner) -> None:
        """Starts the clock: evaluation is not training time."""
        self.started, self.images = time.perf_counter(), 0

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the step's scalars as they are, on the device."""
        loop = runner.train_loop
        place = {"step": loop.iter, "epoch": loop.iter / loop.steps_per_epoch}
        self.rows.append(({**place, **loop.learning_rates()}, outputs))
        self.images += loop.chunks * len(data_batch["inputs"])
        if loop.iter % self.interval == 0:
            self.flush(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """An epoch's end is a log point."""
        self.flush(runner)

    def flush(self, runner: Runner) -> None:
        """Moves what is buffered to the host, checks it and writes it."""
        if not self.rows:
            return
        phase = runner.train_loop.phase.name
        buffered = [each.float() for _, scalars in self.rows for each in scalars.values()]
        values = iter(torch.stack(buffered).tolist() if buffered else [])
        seconds = time.perf_counter() - self.started
        self.rates.append((self.images, seconds))
        rate = round(self.images / max(seconds, 1e-9), 1)
        rows = []
        for place, scalars in self.rows:
            row: dict[str, Any] = {"kind": "train", "phase": phase, **place}
            for name in scalars:
                row[name] = value = next(values)
                if not math.isfinite(value):
                    step, lr = place["step"], place["lr"]
                    raise NonFiniteLossError(
                        f"{name} is {value} at step {step} of phase '{phase}' (learning rate {lr:g})"
                    )
            rows.append({**row, "images_per_second": rate})
        self.rows = []
        self.started, self.images = time.perf_counter(), 0
        if self.records is not None:
            self.records.write(rows)
