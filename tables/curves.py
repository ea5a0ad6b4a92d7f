"""Training curves of cells (`metrics.jsonl`): epoch means and the first learning-rate decay."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kt.files import replacing
from kt.store import read_records

Array = np.ndarray

MAX_POINTS = 500
LONG_RECORD = 1 << 20  # bytes
FIXED = ("step", "epoch", "lr")


@dataclass(frozen=True)
class Curve:
    """One phase of a cell's training, one entry per step.

    Attributes:
        step: (n,) step numbers, from 1.
        epoch: (n,) fractional epochs at the steps' ends, above 0.
        lr: (n,) learning rates.
        values: Name -> (n,) values, for example `loss` and `accuracy` in percent; NaN at steps that lack one.
    """

    step: Array
    epoch: Array
    lr: Array
    values: Mapping[str, Array]

    @property
    def epoch_index(self) -> Array:
        """(n,) which epoch each step belongs to, from 1."""
        return np.ceil(self.epoch - 1e-9).astype(int)

    def total(self, names: Sequence[str]) -> Array:
        """(n,) sum of several values."""
        return np.sum([self.values[name] for name in names], axis=0)


def read_curve(path: Path, phase: str = "train") -> Curve | None:
    """A phase's steps in a cell's records, by default the main phase's; None if there are none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return _read_curve(os.fspath(path), stat.st_size, stat.st_mtime_ns, phase)


@functools.lru_cache(maxsize=128)
def _read_curve(path: str, size: int, modified: int, phase: str) -> Curve | None:
    """Keeps the columns of a long record beside it: they load a hundred times faster than its lines."""
    kept, stamp = f"{path}.npz" if phase == "train" else f"{path}.{phase}.npz", np.array([size, modified])
    columns = _load_columns(kept, stamp) if size >= LONG_RECORD else None
    if columns is None:
        columns = _parse(path, phase)
        if size >= LONG_RECORD:
            _keep_columns(kept, stamp, columns)
    if not columns:
        return None
    values = {name: column for name, column in columns.items() if name not in FIXED}
    step, epoch, lr = (columns[name] for name in FIXED)
    return Curve(step, epoch, lr, values)


def _load_columns(path: str, stamp: Array) -> dict[str, Array] | None:
    try:
        with np.load(path) as file:
            columns = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return columns if np.array_equal(columns.pop("stamp", None), stamp) else None


def _keep_columns(path: str, stamp: Array, columns: Mapping[str, Array]) -> None:
    # The results may lie where only others can write.
    with contextlib.suppress(OSError), replacing(Path(path)) as file:
        np.savez(file, stamp=stamp, **columns)  # type: ignore[arg-type]


def _parse(path: str, phase: str) -> dict[str, Array]:
    """Name -> column of a phase's steps; nothing if there are none."""
    rows = [row for row in read_records(Path(path), "train") if row["phase"] == phase]
    # Not every step has to log the same.
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, int | float)))
    return {name: np.array([row.get(name, math.nan) for row in rows], dtype=float) for name in names}


def first_decay(curve: Curve) -> int | None:
    """Index of the first step with a lower learning rate than the plateau before it; None if there is no such step.

    A schedule that falls all the time, or that rises in a warm-up, has no such step.
    """
    lr = curve.lr
    for index in range(2, len(lr)):
        if lr[index] < 0.9 * lr[index - 1] and math.isclose(lr[index - 1], lr[index - 2], rel_tol=1e-9):
            return index
    return None


def epoch_means(curve: Curve, values: Array) -> tuple[Array, Array]:
    """(e,) epochs and (e,) means over their steps."""
    epochs, inverse = np.unique(curve.epoch_index, return_inverse=True)
    return epochs, np.bincount(inverse, weights=values) / np.bincount(inverse)


def downsample(x: Array, y: Array, points: int = MAX_POINTS) -> tuple[Array, Array]:
    """At most `points` means of neighbours."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / counts, np.add.reduceat(y, edges[:-1]) / counts
