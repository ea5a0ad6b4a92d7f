"""Weights & Biases mirrors a run and never fails it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from kt.hooks import WandbRun

ROWS = [
    {"kind": "train", "phase": "boundaries", "step": 1, "epoch": 0.5, "lr": 0.1, "loss": 2.0},
    {"kind": "train", "phase": "boundaries", "step": 2, "epoch": 1.0, "lr": 0.1, "loss": 1.5},
    {"kind": "train", "phase": "train", "step": 1, "epoch": 0.5, "lr": 0.1, "loss": 1.0, "accuracy": 40.0},
    {"kind": "eval", "phase": "train", "step": 1, "epoch": 1, "top1": 30.0, "top5": 50.0},
]


def make(folder: Path, mode: str = "offline") -> WandbRun:
    settings = {"mode": mode, "project": "kt", "entity": None}
    return WandbRun(folder, settings, "ab-seed0", "imagenet_compression/ab", ["imagenet_compression", "ab"], {"a": 1})


class Recorder(SimpleNamespace):
    """Stands for wandb's run."""

    def __init__(self, broken: bool = False):
        super().__init__(logged=[], summary={}, finished=None, broken=broken, defined=[])

    def define_metric(self, *arguments: Any, **keywords: Any) -> None:
        self.defined.append((arguments, keywords))

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionResetError("wandb-core is gone")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code


def test_one_step_axis_over_all_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, given = Recorder(), {}
    monkeypatch.setattr(wandb, "init", lambda **keywords: given.update(keywords) or recorder)
    run = make(tmp_path)
    for row in ROWS:
        run.log(row)
    run.finish({"top1": 30.0})
    assert given["mode"] == "offline" and given["group"] == "imagenet_compression/ab"
    assert [values["step"] for values in recorder.logged] == [1, 2, 3, 3]
    assert recorder.logged[0]["boundaries/loss"] == 2.0 and recorder.logged[2]["train/accuracy"] == 40.0
    assert recorder.logged[3]["test/top1"] == 30.0 and recorder.logged[3]["epoch"] == 1
    assert recorder.summary == {"top1": 30.0} and recorder.finished == 0
    assert (("*",), {"step_metric": "step"}) in recorder.defined


def test_every_failure_of_the_service_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**keywords: Any) -> None:
        raise wandb.errors.UsageError("no key")

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(wandb, "init", refuse)
    run = make(tmp_path)
    run.log(ROWS[0])
    run.finish()
    monkeypatch.setattr(wandb, "init", lambda **keywords: Recorder(broken=True))
    run = make(tmp_path)
    for row in ROWS:
        run.log(row)
    run.finish({"top1": 1.0}, failed=True)
    messages = [record.message for record in caplog.records if "Weights & Biases is off" in record.message]
    assert len(messages) == 2 and "no key" in messages[0] and "wandb-core is gone" in messages[1]


def test_offline_without_a_key_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    run = make(tmp_path)
    for row in ROWS:
        run.log(row)
    assert run.run is not None and run.id is not None
    run.finish({"top1": 30.0})
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # The service writes in a process of its own, on a busy machine a moment after `finish`.
    deadline = time.monotonic() + 60
    while not all(part in written.read_bytes() for part in (b"boundaries/loss", b"imagenet_compression/ab")):
        assert time.monotonic() < deadline, written.read_bytes()
        time.sleep(0.1)
    assert make(tmp_path, mode="disabled").run is None
