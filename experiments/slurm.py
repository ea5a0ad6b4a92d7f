"""Slurm: cells go into its queue as jobs of submitit's, and the queue tells what became of them; imports no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

from experiments import lifeline
from experiments.launch import POLL_SECONDS, ByLauncher
from experiments.plan import Config, Job
from kt.errors import UserError
from kt.store import folder_of, note_queue, read_queue

# https://slurm.schedmd.com/squeue.html, "Job State Codes"; in all other states a job is still to run or to go on.
CANCELLED, GONE = "CANCELLED", "no longer in the queue"
ENDS = {CANCELLED, GONE, "BOOT_FAIL", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDS |= {"REVOKED", "TIMEOUT"}
PENDING = "PENDING"
ASK_SECONDS = (1.0, 30.0)  # between two questions, at first and after a while: everybody asks the one controller
LAG_SECONDS = 15.0  # until what a node has written is seen here, as submitit has it


class Standing(NamedTuple):
    """How a job stands in the queue: its state and, in Slurm's words, why it waits."""

    state: str
    reason: str = ""


def read_standings(listed: str) -> dict[str, Standing]:
    """Job id (of an array's job `<id>_<number>`) -> how it stands, from what `QUEUE` prints."""
    lines = (line.split("|", 2) for line in listed.splitlines())
    return {number: Standing(state, "" if why == "None" else why) for number, state, why in lines}


# Of a job that has ended the queue knows for some minutes (`MinJobAge`). Accounting (`sacct`) is not on every cluster.
QUEUE = ("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r")


def standings() -> dict[str, Standing] | None:
    """How all jobs of this user stand; None while Slurm does not answer."""
    asked = subprocess.run(QUEUE, capture_output=True, text=True)
    return read_standings(asked.stdout) if asked.returncode == 0 else None


def submit(launcher: Any, overrides: Sequence[Sequence[str]], first: int) -> list[str]:
    """Puts cells into the queue as Hydra's launcher would, which then waits for no more than the first to fail.

    Args:
        launcher: Hydra's submitit launcher for Slurm.
        overrides: Of each cell.
        first: How many this command has submitted before.

    Returns:
        The id of each one's job.

    Raises:
        UserError: Slurm refuses them.
    """
    import submitit
    from hydra.core.singleton import Singleton
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    params = dict(launcher.params)
    own = {"folder": params.pop("submitit_folder"), "slurm_max_num_timeout": params.pop("max_num_timeout")}
    executor = submitit.AutoExecutor(cluster="slurm", **own)
    shared = BaseQueueConf.__dataclass_fields__
    executor.update_parameters(**{key if key in shared else f"slurm_{key}": value for key, value in params.items()})
    numbers = range(first, first + len(overrides))
    state = Singleton.get_state()
    calls = [
        (list(lines), "hydra.sweep.dir", number, str(number), state)
        for number, lines in zip(numbers, overrides, strict=True)
    ]
    try:
        return [job.job_id for job in executor.map_array(launcher, *zip(*calls, strict=True))]
    except submitit.core.utils.FailedJobError as error:  # sbatch has failed
        said = str(error).strip().splitlines() or ["it does not say why"]
        raise UserError(f"hydra.launcher: sbatch refuses the job: {said[-1].removeprefix('sbatch: error: ')}") from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, in a job, what ends the job interrupts the cell like Ctrl-C, so that it says how far it got.

    That is `scancel`, a preemption, and the warning before the time limit; after the warning the job goes back into
    the queue, as often as `hydra.launcher.max_num_timeout` says.
    """
    number = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
    requeue = signal.getsignal(number)  # submitit's; would end the cell from within
    warned = False

    def warn(number: int, frame: FrameType | None) -> None:
        nonlocal warned
        warned = True
        raise KeyboardInterrupt

    signal.signal(number, warn)
    try:
        with lifeline.interruptible():
            yield
    except KeyboardInterrupt:
        if warned and callable(requeue):
            requeue(number, None)
        raise
    finally:
        signal.signal(number, requeue)


@dataclass
class _Queued:
    """A cell's job in the queue.

    Attributes:
        before: When the cell's latest attempt before this job had begun.
        again: Whether it is the cell's second job.
        ended: When the queue was first seen to call it ended.
    """

    job: Job
    before: float | None
    again: bool
    waited: dict[str, float] = field(default_factory=dict)
    started: bool = False
    ended: float | None = None


class InQueue(ByLauncher):
    """Hands jobs to Slurm in waves of what they need. Those that are in the queue already are not submitted again.

    A job that ends without a result is submitted once more, unless somebody has cancelled it.
    """

    def run(self) -> None:
        """Runs all waves. KeyboardInterrupt passes through; the jobs stay in the queue.

        Raises:
            UserError: There is no Slurm here.
        """
        if absent := next((name for name in ("sbatch", "squeue") if shutil.which(name) is None), None):
            raise UserError(f"hydra/launcher=cluster: expected Slurm's {absent} on this machine")
        self.queued: dict[str, _Queued] = {}
        self.listed: dict[str, Standing] = {}  # as far as Slurm has said
        self.mute = False  # whether it has left the last question unanswered
        super().run()

    def _launch(self, jobs: Sequence[Job]) -> None:
        """Submits cells and waits until the jobs of all of them have ended."""
        self.asked = began = time.monotonic()
        self._ask()
        for job in jobs:
            number = read_queue(folder_of(self.output_root, job.id)).get("job", "")
            if self.listed.get(number, Standing(GONE)).state not in ENDS:
                self.queued[number] = _Queued(job, None, again=False)
                self.display.line(f"  {job.text}: is in the queue already (job {number})")
        found = {each.job.id for each in self.queued.values()}
        self._submit([job for job in jobs if job.id not in found])
        try:
            while self.queued:
                time.sleep(POLL_SECONDS)
                now = time.monotonic()
                if now - self.asked >= min(ASK_SECONDS[1], max(ASK_SECONDS[0], (now - began) / 20)):
                    self._ask()
                for number, each in list(self.queued.items()):
                    self._look(number, each)
                self.report.show()
        finally:
            self._leave()

    def _ask(self) -> None:
        """Asks how the jobs stand, and counts what they wait for."""
        found, now = standings(), time.monotonic()
        if (found is None) != self.mute:
            self.mute = found is None
            self.display.line("  Slurm does not answer: waiting for it" if self.mute else "  Slurm answers again")
        if found is not None:
            self.listed = found
        for number, each in self.queued.items():
            state, reason = self.listed.setdefault(number, Standing(GONE))
            if state == PENDING:
                reason = reason or "the scheduler"
                each.waited[reason] = each.waited.get(reason, 0.0) + now - self.asked
        self.asked = now

    def _submit(self, jobs: Sequence[Job], again: bool = False) -> None:
        """Puts cells into the queue; they have failed where Slurm refuses them."""
        if not jobs:
            return
        try:
            numbers = submit(self.launcher, [job.overrides for job in jobs], self.launched)
        except UserError as error:
            for job in jobs:
                self._fail(job, str(error), user=True)
            return
        self.launched += len(jobs)
        for number, job in zip(numbers, jobs, strict=True):
            self.queued[number] = _Queued(job, self._read(job).get("started"), again)
            self.listed[number] = Standing(PENDING)
            note_queue(folder_of(self.output_root, job.id), number, {})

    def _read(self, job: Job) -> Config:
        return job.read_status(self.output_root)

    def _look(self, number: str, each: _Queued) -> None:
        """Says what is new of a cell; takes it off the list once its job has ended."""
        job, state, status = each.job, self.listed[number].state, self._read(each.job)
        tried = status.get("started") != each.before
        if status["status"] == "running" and tried and not each.started:
            each.started = True
            self.report.started(job)
        if status["status"] != "done":
            if state not in ENDS:
                return
            each.ended = each.ended or time.monotonic()
            settled = status["status"] == "failed" and tried and not status.get("killed")
            if not settled and state != CANCELLED and time.monotonic() - each.ended < LAG_SECONDS:
                return
        note_queue(folder_of(self.output_root, job.id), number, each.waited)
        del self.queued[number]
        if status["status"] == "done" or settled:
            job.status = status
            self.report.ended(job, status)
        elif state == CANCELLED:
            self._fail(job, f"job {number} was cancelled")
        elif each.again:
            folder = str(self.launcher.params["submitit_folder"]).replace("%j", number)
            self._fail(job, f"job {number} ended like the one before ({state}): see {folder}")
        else:
            self.report.again(1, 0, f"job {number}: {state}")
            self._submit([job], again=True)

    def _fail(self, job: Job, error: str, user: bool = False) -> None:
        job.status = {"status": "failed", "error": error, "user": user}
        self.report.ended(job, job.status)

    def _leave(self) -> None:
        """Keeps what is known of the jobs that outlive this command, and says which these are."""
        for number, each in self.queued.items():
            note_queue(folder_of(self.output_root, each.job.id), number, each.waited)
            each.job.status = self._read(each.job)
        if self.queued:
            self.display.line(f"  still in the queue (scancel ends them): {' '.join(self.queued)}")
        self.queued.clear()
