"""The preset for clusters on a Slurm of its own: one node, on this machine, for as long as the test takes."""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments import slurm
from experiments.launch import Report
from experiments.plan import Job
from experiments.progress import Display
from experiments.slurm import InQueue, Standing, interruptible, read_standings, standings
from kt.errors import UserError
from kt.store import (
    cells_of,
    finished_cells,
    folder_of,
    note_queue,
    read_queue,
    read_records,
    read_result,
    read_status,
    records_file,
)
from tables.folders import rendered_folders
from tables.render import facts_of

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
DAEMONS = ("munged", "slurmctld", "slurmd")
ABSENT = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=PATH) is None]
PATIENCE = 240.0
EPOCHS = 30

# What the node claims to have is what the preset asks for, for two jobs at a time; nothing keeps these to it.
CONFIG = """
ClusterName=kt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1
ReturnToService=2
SlurmdTimeout=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=98304 Gres=gpu:2
PartitionName=gpu Nodes={host} MaxTime=INFINITE
"""


def wait_for(true: Callable[[], object], patience: float = PATIENCE) -> None:
    """Returns once a condition holds."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


class Cluster:
    """A Slurm of one node that listens on 127.0.0.1 alone; what it needs and leaves is in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        host = socket.gethostname().partition(".")[0]
        with socket.socket() as first, socket.socket() as second:
            for each in (first, second):
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in (first, second)]
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        text = CONFIG.format(host=host, ports=ports, folder=folder, user=getpass.getuser())
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # touches none as long as nothing is kept to it
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o600)

    def start(self, name: str) -> None:
        """Starts a daemon."""
        arguments = ["-D"]
        if name == "munged":
            files = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log"}
            files["seed-file"] = "seed"
            arguments = ["--foreground", "--force", *(f"--{key}={self.folder / file}" for key, file in files.items())]
        with open(self.folder / f"{name}.out", "ab") as file:
            self.running[name] = subprocess.Popen(
                [name, *arguments],
                env=self.environment,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG: ends with the test
            )

    def lose(self, name: str) -> None:
        """Kills a daemon that was started here."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def node(self) -> str:
        """The node's state."""
        return self.ask("sinfo", "--noheader", "--format=%T").strip()

    def __enter__(self) -> Cluster:
        try:
            self.start("munged")
            wait_for((self.folder / "munge.socket").exists)
            self.start("slurmctld")
            self.start("slurmd")
            wait_for(lambda: self.node() == "idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the jobs, which need their node's daemon for that, then the daemons; all of them were started here."""
        if {"munged", "slurmctld"} <= self.running.keys():
            if "slurmd" not in self.running:
                self.start("slurmd")
            self.ask("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}")
            self.ask("scancel", f"--user={getpass.getuser()}")
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.ask("squeue", "--noheader"), 20.0)
        for name in reversed(list(self.running)):
            self.running[name].terminate()
            try:
                self.running[name].wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.lose(name)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if ABSENT:
        pytest.skip(f"there is no {', '.join(ABSENT)} here: apt-get install slurm-wlm munge")
    with Cluster(tmp_path / "slurm") as found:
        yield found


def cells(output_root: Path) -> dict[str, Path]:
    """Method (or `teacher`) -> folder of the cells that have begun."""
    found = {}
    for path in cells_of(output_root).glob("*/config.yaml"):
        text = path.read_text()
        name = "teacher" if "role: teacher" in text else text.partition("method:\n  name: ")[2].partition("\n")[0]
        found[name] = path.parent
    return found


def test_a_table_survives_its_cluster(tmp_path: Path, cluster: Cluster) -> None:
    """A job is cancelled and the node lost on the way: the same command completes the table, each step done once."""
    small = ("dataset=scenes_small", "dataset.image_size=16", "dataset.train_size=64", "dataset.test_size=20")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "experiments.run", "+table=imagenet_compression", "rows=baseline,kd,at,ft"]
    command += [*small, f"schedule.epochs={EPOCHS}", "wandb.mode=disabled", f"output_root={out}"]
    command += ["hydra/launcher=cluster", "hydra.launcher.partition=gpu"]

    def learns(name: str) -> bool:
        path = records_file(cells(out)[name]) if name in cells(out) else None
        return path is not None and path.exists() and path.stat().st_size > 0

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = begin()
    try:
        wait_for(lambda: learns("kd"))
        job = read_queue(cells(out)["kd"])["job"]
        cluster.ask("scancel", job)
        wait_for(lambda: read_status(cells(out)["kd"])["status"] == "interrupted")
        wait_for(lambda: learns("at"))
        cluster.lose("slurmd")
        wait_for(lambda: cluster.node().startswith("down"))
        cluster.start("slurmd")
        printed, _ = first.communicate(timeout=PATIENCE)
    finally:
        first.kill()
    assert first.returncode == 3 and f"kd seed 0: failed: job {job} was cancelled" in printed, printed
    before = {folder: read_result(folder) for folder in finished_cells(out)}
    assert len(before) == 4, printed

    again = begin()
    printed, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0 and "[1/1] kd seed 0" in printed, printed
    assert {folder: read_result(folder) for folder in before} == before
    for name, folder in cells(out).items():
        steps = [row["step"] for row in read_records(records_file(folder), "train") if row["phase"] == "train"]
        assert steps == list(range(1, EPOCHS + 1)), name
    (folder,) = rendered_folders(out, "imagenet_compression", "mini")
    page = (folder / "index.html").read_text()
    assert "5 of 5 done" in page and "cells waited for" in page and "Resources" in page


# ------------------------------------------------------------------------------------------- without a Slurm, anywhere


def test_standings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "4_1|PENDING|Resources\n4_0|RUNNING|None\n5|PENDING|Nodes required for job are DOWN|DRAINED\n"
    assert read_standings(listed) == {
        "4_1": Standing("PENDING", "Resources"),
        "4_0": Standing("RUNNING"),
        "5": Standing("PENDING", "Nodes required for job are DOWN|DRAINED"),
    }
    queue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for status, found in (0, {"5": Standing("TIMEOUT")}), (1, None):
        queue.write_text(f"#!/bin/sh\necho '5|TIMEOUT|None'\nexit {status}\n")
        queue.chmod(0o755)
        assert standings() == found


RUNNING, LOST, DONE = "RUNNING", "NODE_FAIL", "COMPLETED"
# What else may end a job for good, by Slurm's own list of states.
LOSSES = ("BOOT_FAIL", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")


@pytest.mark.parametrize(
    ("answers", "submitted", "error"),
    [
        ([RUNNING, DONE], 1, None),
        ([RUNNING, None, RUNNING, DONE], 1, None),  # Slurm does not answer once
        ([RUNNING, "CANCELLED"], 1, "job 0_0 was cancelled"),
        ([LOST, RUNNING, DONE], 2, None),
        ([LOST, "", DONE], 2, "job 1_0 ended like the one before (no longer in the queue)"),
        (["SUSPENDED", "REQUEUE_HOLD", "PENDING", DONE], 1, None),
        *(([state, RUNNING, DONE], 2, None) for state in LOSSES),
    ],
)
def test_ends_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str | None], submitted: int, error: str | None
) -> None:
    """What becomes of a cell whose job stands so whenever the queue is asked; an empty answer lists no job."""
    job = Job("cell", [], {}, "kd", [], {"status": "missing"})
    report = Report("name", {"cell": job}, str(tmp_path), Display(quiet=True))
    sent: list[str] = []
    left = iter(answers)

    def submit(*_: object) -> list[str]:
        sent.append(f"{len(sent)}_0")
        return sent[-1:]

    def standings() -> dict[str, Standing] | None:
        state = next(left) if sent else ""
        if state == DONE:
            status["status"] = "done"
        return None if state is None else {sent[-1]: Standing(state, "why")} if state else {}

    status: dict[str, str | None] = {"status": "missing", "error": None}
    monkeypatch.setattr(Job, "read_status", lambda *_: dict(status))
    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "standings", standings)
    for name, value in {"POLL_SECONDS": 0.0, "LAG_SECONDS": 0.0, "ASK_SECONDS": (0.0, 0.0)}.items():
        monkeypatch.setattr(slurm, name, value)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    launcher = type("SlurmLauncher", (), {"params": {"submitit_folder": "logs/%j"}})()
    InQueue(report, launcher, None).run()
    assert len(sent) == submitted
    assert (job.status.get("error") or "").startswith(error) if error else job.is_done, job.status
    assert ("why" in read_queue(folder_of(tmp_path, "cell"))["waited"]) == ("PENDING" in answers)


def test_what_waits_is_not_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was interrupted leaves its jobs in the queue; the next one waits for them."""
    job = Job("cell", [], {}, "kd", [], {"status": "missing"})
    note_queue(folder_of(tmp_path, "cell"), "7_3", {"Priority": 2.0})
    asked = iter(["RUNNING", "RUNNING", "COMPLETED"])
    status: dict[str, str | None] = {"status": "missing", "error": None}

    def standings() -> dict[str, Standing]:
        state = next(asked)
        status["status"] = "done" if state == "COMPLETED" else "running"
        return {"7_3": Standing(state)}

    monkeypatch.setattr(Job, "read_status", lambda *_: dict(status))
    monkeypatch.setattr(slurm, "standings", standings)
    monkeypatch.setattr(slurm, "ASK_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm, "submit", lambda *_: pytest.fail("submitted"))
    InQueue(Report("name", {"cell": job}, str(tmp_path), Display(quiet=True)), None, None).run()
    assert job.is_done
    assert read_queue(folder_of(tmp_path, "cell")) == {"job": "7_3", "waited": {"Priority": 2.0}}


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="expected Slurm's sbatch on this machine"):
        InQueue(Report("name", {}, str(tmp_path), Display(quiet=True)), None, None).run()


def test_the_time_limit_interrupts_and_then_requeues() -> None:
    """submitit's own handler ends the process, so it may come only after the cell has said how far it got."""
    said: list[str] = []
    own = signal.signal(signal.SIGUSR2, lambda *_: said.append("requeued"))
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            try:
                os.kill(os.getpid(), signal.SIGUSR2)
                time.sleep(5)
            finally:
                said.append("written")
        with pytest.raises(KeyboardInterrupt), interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGUSR2, own)
    assert said == ["written", "requeued"]


def test_the_page_says_what_was_waited_for(tmp_path: Path) -> None:
    """Of all jobs that a cell has had, and of all cells."""
    note_queue(folder_of(tmp_path, "a"), "1_0", {"Resources": 60.0})
    note_queue(folder_of(tmp_path, "a"), "2", {"Resources": 30.0, "BeginTime": 12.0})
    note_queue(folder_of(tmp_path, "b"), "1_1", {"Resources": 30.0})
    cells = [{"id": name, "status": "missing"} for name in "abc"]
    assert facts_of([{"cells": cells}], tmp_path)["cells waited for"] == "BeginTime 0.2 min, Resources 2.0 min"
