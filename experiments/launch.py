"""Trains a table's missing cells: by this machine's own workers, or by the Hydra launcher that the command names."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import lifeline
from experiments.cell import agree, is_first
from experiments.pages import Pages
from experiments.plan import Agenda, Config, Job, expected, in_words, waves
from experiments.progress import Display
from experiments.workers import INTERRUPTED, Message, Pool
from kt.store import folder_of, read_result
from tables.summary import scores_in_words

POLL_SECONDS = 0.5
# Launchers of this machine, whose workers end with the run; a cluster's jobs go on without it.
LOCAL = ("JoblibLauncher", "LocalLauncher")


class Report:
    """Says which cells start and end, and counts them.

    Args:
        name: The table's name.
        jobs: All jobs by id.
        output_root: Where cells live.
        display: Where to say it.
        pages: Where to show it.
    """

    def __init__(
        self, name: str, jobs: Mapping[str, Job], output_root: str, display: Display, pages: Pages | None = None
    ):
        self.name, self.jobs, self.output_root, self.display = name, jobs, output_root, display
        self.pages = pages
        self.total = sum(not job.is_done for job in jobs.values())
        self.count = 0

    def started(self, job: Job) -> None:
        """A cell has begun."""
        self.display.line(f"  {job.text}: started ({folder_of(self.output_root, job.id)})")
        if self.pages is not None:
            self.pages.update(started=job.id)

    def ended(self, job: Job, status: Config) -> None:
        """A cell is done or has failed."""
        for text in status.get("warnings", ()):  # most launchers have no other way to tell
            self.display.warn(text)
        self._advance()
        self.display.line(f"[{self.count}/{self.total}] {job.text}: {self._outcome(job, status)}")
        if self.pages is not None:
            self.pages.update(ended=job.id)

    def again(self, cells: int, reported: int, reason: str) -> None:
        """Cells are started once more, some of which have been reported as ended."""
        self._advance(-reported)
        self.display.line(f"  {cells} {'cell is' if cells == 1 else 'cells are'} started again ({reason})")

    def lacks_need(self, job: Job) -> bool:
        """Whether a cell that this one needs has failed; this one then fails with the same words."""
        for need in job.needs:
            if not self.jobs[need].is_done:
                job.status = {**self.jobs[need].status, "status": "failed"}
                self._advance()
                self.display.line(f"  {job.text}: not trained, because {self.jobs[need].text} failed")
                return True
        return False

    def _advance(self, cells: int = 1) -> None:
        self.count += cells
        self.display.advance_table(cells)

    def _outcome(self, job: Job, status: Config) -> str:
        result = read_result(folder_of(self.output_root, job.id))
        if result is None or status["status"] != "done":
            return f"{status['status']}" + (f": {status['error']}" if status["error"] else "")
        told = scores_in_words(folder_of(self.output_root, job.id), job.config["evaluation"])
        return f"{'; '.join(told)} ({in_words(result['seconds'])})"


def refresh(jobs: Mapping[str, Job], output_root: str) -> None:
    """Reads every job's status from its folder; all ranks see what the first one reads."""
    found = agree({job.id: job.read_status(output_root) for job in jobs.values()})
    for job_id, status in found.items():
        jobs[job_id].status = status


class SideBySide:
    """Trains jobs in worker processes of this machine, each as soon as what it needs is done.

    Args:
        report: What to tell of it, and the jobs.
        workers: How many at once.
    """

    def __init__(self, report: Report, workers: int):
        self.report, self.workers = report, workers
        self.jobs, self.output_root, self.display = report.jobs, report.output_root, report.display
        self.running: dict[str, Job] = {}
        self.told: dict[str, Message] = {}  # id -> why a cell ended that has no file to say so
        self.lost = False  # whether the server has been lost before

    def run(self) -> None:
        """Runs everything. KeyboardInterrupt passes through, after the cells have ended."""
        todo = [job for job in self.jobs.values() if not job.is_done]
        if not todo:
            return
        self.agenda = Agenda(self.jobs, expected(todo, self.output_root))
        dense = any(job.config["dataset"]["task"] != "classification" for job in todo)
        self.display.start_table(self.report.name, len(todo))
        try:
            with Pool(self.output_root, dense) as self.pool:
                while self._fill() or self.running:
                    for message in self.pool.messages(POLL_SECONDS):
                        self._hear(message)
        finally:
            for job in self.running.values():
                job.status = job.read_status(self.output_root)
            self.display.stop_table()

    def _fill(self) -> bool:
        """Gives free workers something to do; whether anything is left to start."""
        while len(self.running) < self.workers and (job := self.agenda.take(self.running)) is not None:
            if self.report.lacks_need(job):
                continue
            self.running[job.id] = job
            self.report.started(job)
            self.pool.start(job.id, job.config)
        return bool(self.agenda.waiting)

    def _hear(self, message: Message) -> None:
        if "lost" in message:
            self._restart()
        elif "ended" in message:
            self._end(self.running.pop(message["ended"]), message["status"])
        elif message["of"] in self.running:
            job = self.running[message["of"]]
            if "line" in message:
                self.display.line(message["line"])
            elif "warning" in message:
                self.display.warn(message["warning"])
            elif "error" in message:
                self.told[job.id] = message
            elif "steps" in message:
                self.display.advance(message["steps"], message["text"], job.id)
            elif message["total"] is None:
                self.display.stop(job.id)
            else:
                self.display.start(message["total"], job.text, job.id)

    def _end(self, job: Job, status: int) -> None:
        self.display.stop(job.id)
        job.status = job.read_status(self.output_root)
        if status == INTERRUPTED and not job.is_done:
            raise KeyboardInterrupt
        told = self.told.pop(job.id, None)
        if told is None and job.status["status"] not in ("done", "failed"):
            # Done, but as another cell.
            changed = "its data have changed since the command began: run it again"
            told = {"error": f"its process ended with status {status}" if status else changed, "user": status == 0}
        elif told is None and status < 0 and not job.is_done:
            told = {"error": f"the process was killed ({signal.Signals(-status).name})", "user": False}
        if told is not None:
            job.status = {"status": "failed", "error": told["error"], "user": told["user"]}
        self.report.ended(job, job.status)

    def _restart(self) -> None:
        """Takes up what ran when the server was lost; if that happens again, what ran has failed."""
        jobs, self.running = list(self.running.values()), {}
        for job in jobs:
            self.display.stop(job.id)
        if self.lost:
            for job in jobs:
                self.told[job.id] = {"error": "the process that starts cells was killed twice", "user": False}
                self._end(job, -9)
            return
        self.lost = True
        self.report.again(len(jobs), 0, "the process that starts them was killed")
        for job in jobs:
            self.agenda.waiting[job.id] = job


class _Watch(threading.Thread):
    """Shows which cells start and end while a launcher blocks; their files tell, whichever process writes them."""

    def __init__(self, jobs: Sequence[Job], report: Report):
        super().__init__(daemon=True)
        self.waiting = {job.id: job for job in jobs}
        self.running: set[str] = set()
        self.report = report
        self.began = time.time()
        self.halt = threading.Event()

    def run(self) -> None:
        while not self.halt.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Reports every change since the last look."""
        for job in list(self.waiting.values()):
            status = job.read_status(self.report.output_root)
            if status["status"] != "missing" and status.get("started", 0) < self.began and status["status"] != "done":
                continue  # left by an earlier run
            if status["status"] in ("done", "failed"):
                del self.waiting[job.id]
                self.report.ended(job, status)
            elif status["status"] == "running" and job.id not in self.running:
                self.running.add(job.id)
                self.report.started(job)

    def end(self) -> None:
        """Stops watching after a last look."""
        self.halt.set()
        self.join()
        self.look()


class ByLauncher:
    """Hands jobs to a Hydra launcher in waves of what they need.

    Args:
        report: What to tell of it, and the jobs.
        launcher: Hydra's launcher.
        batch: How many cells the launcher gets at once; None for all.
    """

    def __init__(self, report: Report, launcher: Any, batch: int | None):
        self.report, self.launcher, self.batch = report, launcher, batch
        self.jobs, self.output_root, self.display = report.jobs, report.output_root, report.display
        self.launched = 0

    def run(self) -> None:
        """Runs all waves. KeyboardInterrupt passes through."""
        if type(self.launcher).__name__ in LOCAL:
            lifeline.lead()
        self.display.start_table(self.report.name, self.report.total)
        try:
            for group in waves(self.jobs):
                ready = [job for job in group if not self.report.lacks_need(job)]
                size = self.batch or max(1, len(ready))
                for start in range(0, len(ready), size):
                    self._launch(ready[start : start + size])
        finally:
            self.display.stop_table()

    def _launch(self, jobs: Sequence[Job]) -> None:
        """Launches cells, and once more those that a broken launcher took along or never started."""
        left = list(jobs)
        for attempt in range(2):
            began = time.time()
            watch = _Watch(left, self.report)
            if is_first():
                watch.start()
            try:
                broken = self._call(left)
                self._wait(left)
            finally:
                if is_first():
                    watch.end()
                refresh(self.jobs, self.output_root)
            left = [job for job in left if self._is_owed(job, began, broken)]
            if not left:
                return
            if attempt == 0:
                reported = sum(job.id not in watch.waiting for job in left)
                self.report.again(len(left), reported, broken or "the launcher left them out")
        for job in left:
            job.status = {"status": "failed", "error": broken or "it was not started", "user": False}

    def _is_owed(self, job: Job, began: float, broken: str | None) -> bool:
        """Whether the launcher owes an attempt at a job: it was not begun, or was killed when the launcher broke."""
        if job.is_done:
            return False
        status = job.status
        untouched = status["status"] in ("missing", "interrupted") or status.get("started", 0) < began
        return untouched or (broken is not None and bool(status.get("killed")))

    def _call(self, jobs: Sequence[Job]) -> str | None:
        """One call of the launcher; returns what it raised, which must not cost the table its other cells."""
        try:
            self.launcher.launch([job.overrides for job in jobs], initial_job_idx=self.launched)
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        finally:
            self.launched += len(jobs)
        return None

    def _wait(self, jobs: Sequence[Job]) -> None:
        """Waits for cells that still run although the launcher has returned, as submitit's do after a failure."""
        while any(job.read_status(self.output_root)["status"] == "running" for job in jobs):
            time.sleep(POLL_SECONDS)
