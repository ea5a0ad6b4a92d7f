"""Which GPU a cell takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import devices
from kt.errors import UserError

HOLD = """
import sys
import time
import torch
from experiments import devices

torch.cuda.device_count = lambda: 2
print(devices.free_gpu(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(devices.tempfile, "tempdir", None)
    monkeypatch.setattr(devices, "_held", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_cells_side_by_side_take_different_gpus() -> None:
    pipe = subprocess.PIPE
    first, second = (
        subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True) for _ in range(2)
    )
    assert first.stdout is not None and second.stdout is not None
    assert sorted(process.stdout.readline().strip() for process in (first, second)) == ["0", "1"]  # type: ignore[union-attr]
    assert devices.free_gpu() == 0  # both are held: shared
    for process in (first, second):
        process.communicate()
    assert devices.free_gpu() in (0, 1)
    held = devices._held
    assert held is not None and devices.free_gpu() == held[0]


def test_torchrun_and_visible_devices_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert devices.free_gpu() == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.free_gpu() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="device='cuda:1': there is no CUDA device here"):
        devices.pick_device("cuda:1")
    with pytest.raises(UserError, match="device='gpu': expected auto, cpu, cuda or cuda:<index>"):
        devices.pick_device("gpu")


def test_what_workers_import_leaves_the_gpus_to_their_forks() -> None:
    """As if NVML knew of a GPU: a fork of what has started CUDA could use none."""
    code = (
        "import os, sys, torch\n"
        "torch.cuda._device_count_nvml = lambda: 1\n"
        "from experiments.workers import DENSE_IMPORTS, IMPORTS, preload\n"
        "preload((*IMPORTS, *DENSE_IMPORTS))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(int(torch.cuda._is_in_bad_fork()))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120).returncode == 0


def test_a_fork_that_can_use_no_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(UserError, match="forked.*hydra/launcher=gpus"):
        devices.pick_device("auto")


SPIN = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"


def test_the_time_that_one_waits_for_a_processor() -> None:
    """Of four processes on one core each waits for three quarters of its time."""
    if devices.scheduled() is None:
        pytest.skip("the kernel does not tell")
    cores = os.sched_getaffinity(0)
    command = [sys.executable, "-c", SPIN % min(cores)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for other in others:
            assert other.stdout is not None and other.stdout.readline()
        os.sched_setaffinity(0, {min(cores)})
        before, begun = devices.scheduled(), time.process_time()
        while time.process_time() < begun + 0.2:
            pass
        after, ended = devices.scheduled(), time.process_time()
    finally:
        os.sched_setaffinity(0, cores)
        for other in others:
            other.kill()
            other.communicate()
    assert before is not None and after is not None
    assert after[0] - before[0] == pytest.approx(ended - begun, abs=0.05)
    assert devices.share_waited(before, after) > 0.6
    assert devices.share_waited((3.0, 1.0), (6.0, 2.0)) == 0.25
    assert devices.share_waited((3.0, 1.0), (3.0, 1.0)) == devices.share_waited(None, (3.0, 1.0)) == 0.0
