"""Trains what tables lack: by this machine's own workers, or by the Hydra launcher that the command names."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments import lifeline
from experiments.cell import agree, is_first
from experiments.pages import PAUSE, Pages
from experiments.plan import Agenda, Config, Job, expected, in_words, waves
from experiments.progress import Display
from experiments.workers import INTERRUPTED, Message, Pool
from kt.store import folder_of, read_result, read_status
from tables.summary import scores_in_words

POLL_SECONDS = 0.5
# Launchers of this machine, whose workers end with the run; a cluster's jobs go on without it.
LOCAL = ("JoblibLauncher", "LocalLauncher")


class Report:
    """Says which cells start and end, and counts them.

    Args:
        name: What is trained: the table's name, or of how many.
        jobs: All jobs by their keys.
        output_root: Where cells live.
        display: Where to say it.
        pages: Where to show it.
        over: Told, in this thread, of jobs that have come to their end, be it a bad one.
    """

    def __init__(
        self,
        name: str,
        jobs: Mapping[str, Job],
        output_root: str,
        display: Display,
        pages: Pages | None = None,
        over: Callable[[Iterable[Job]], None] = lambda jobs: None,
    ):
        self.name, self.jobs, self.output_root, self.display = name, jobs, output_root, display
        self.pages, self.over = pages, over
        self.total = sum(not job.is_done for job in jobs.values())
        self.count = 0
        self.begun: list[str] = []  # ids of cells that the pages do not show yet
        self.gone: list[str] = []

    def started(self, job: Job) -> None:
        """A cell has begun."""
        self.display.line(f"  {job.text}: started ({folder_of(self.output_root, job.id)})")
        self.begun.append(job.id)

    def ended(self, job: Job, status: Config) -> None:
        """A cell is done or has failed."""
        for text in status.get("warnings", ()):  # most launchers have no other way to tell
            self.display.warn(text)
        self._advance()
        self.display.line(f"[{self.count}/{self.total}] {job.text}: {self._outcome(job, status)}")
        self.gone.append(job.id)

    def show(self) -> None:
        """Brings the pages up to date, which takes a while, if anything has happened."""
        begun, self.begun = self.begun, []
        gone, self.gone = self.gone, []
        if self.pages is not None and (begun or gone):
            self.pages.update(begun, gone)

    def again(self, cells: int, reported: int, reason: str) -> None:
        """Cells are started once more, some of which have been reported as ended."""
        self._advance(-reported)
        self.display.line(f"  {cells} {'cell is' if cells == 1 else 'cells are'} started again ({reason})")

    def lacks_need(self, job: Job) -> bool:
        """Whether a cell that this one needs has failed; this one then fails with the same words."""
        for need in (self.jobs[key] for key in job.needs):
            # A cell whose score on other data has failed is there all the same.
            if not need.is_done and read_status(folder_of(self.output_root, need.id))["status"] != "done":
                job.status = {**need.status, "status": "failed"}
                self._advance()
                self.display.line(f"  {job.text}: not trained, because {need.text} failed")
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
    found = agree({key: job.read_status(output_root) for key, job in jobs.items()})
    for key, status in found.items():
        jobs[key].status = status


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
        self.over: list[Job] = []  # jobs whose ends the tables have not been told of
        self.told: dict[str, Message] = {}  # key -> why a cell ended that has no file to say so
        self.lost = False  # whether the server has been lost before

    def run(self) -> None:
        """Runs everything. KeyboardInterrupt passes through, after the cells have ended."""
        todo = [job for job in self.jobs.values() if not job.is_done]
        if not todo:
            return
        self.agenda = Agenda(self.jobs, expected(todo, self.output_root))
        self.due = 0.0
        dense = any(job.config["dataset"]["task"] != "classification" for job in todo)
        self.display.start_table(self.report.name, len(todo))
        try:
            with Pool(self.output_root, dense) as self.pool:
                while self._fill() or self.running:
                    self._show()
                    for message in self.pool.messages(POLL_SECONDS):
                        self._hear(message)
                self._show()
        finally:
            for job in self.running.values():
                job.status = job.read_status(self.output_root)
            self.display.stop_table()

    def _fill(self) -> bool:
        """Gives free workers something to do; whether anything is left to start."""
        while len(self.running) < self.workers and (job := self.agenda.take(self.running)) is not None:
            if self.report.lacks_need(job):
                self.over.append(job)
                continue
            self.running[job.key] = job
            self.report.started(job)
            self.pool.start(job.key, job.id, job.config)
        return bool(self.agenda.waiting)

    def _show(self) -> None:
        """Shows what has happened, now that free workers have something to do."""
        over, self.over = self.over, []
        if over:
            self.report.over(over)
            self._order()
        self.report.show()

    def _order(self) -> None:
        """Orders what is left by what the cells that are done have taken, for as much time as pages may cost."""
        began = time.monotonic()
        if began >= self.due:
            self.agenda.order(expected(self.agenda.waiting.values(), self.output_root))
            now = time.monotonic()
            self.due = now + PAUSE * (now - began)

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
                self.told[job.key] = message
            elif "steps" in message:
                self.display.advance(message["steps"], message["text"], job.key)
            elif message["total"] is None:
                self.display.stop(job.key)
            else:
                self.display.start(message["total"], job.text, job.key)

    def _end(self, job: Job, status: int) -> None:
        self.display.stop(job.key)
        job.status = job.read_status(self.output_root)
        if status == INTERRUPTED and not job.is_done:
            raise KeyboardInterrupt
        told = self.told.pop(job.key, None)
        if told is None and job.status["status"] not in ("done", "failed"):
            # Done, but as another cell.
            changed = "its data have changed since the command began: run it again"
            told = {"error": f"its process ended with status {status}" if status else changed, "user": status == 0}
        elif told is None and status < 0 and not job.is_done:
            told = {"error": f"the process was killed ({signal.Signals(-status).name})", "user": False}
        if told is not None:
            job.status = {"status": "failed", "error": told["error"], "user": told["user"]}
        self.report.ended(job, job.status)
        self.over.append(job)

    def _restart(self) -> None:
        """Takes up what ran when the server was lost; if that happens again, what ran has failed."""
        jobs, self.running = list(self.running.values()), {}
        for job in jobs:
            self.display.stop(job.key)
        if self.lost:
            for job in jobs:
                self.told[job.key] = {"error": "the process that starts cells was killed twice", "user": False}
                self._end(job, -9)
            return
        self.lost = True
        self.report.again(len(jobs), 0, "the process that starts them was killed")
        for job in jobs:
            self.agenda.waiting[job.key] = job


class _Watch(threading.Thread):
    """Shows which cells start and end while a launcher blocks; their files tell, whichever process writes them."""

    def __init__(self, jobs: Sequence[Job], report: Report):
        super().__init__(daemon=True)
        self.waiting = {job.key: job for job in jobs}
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
                del self.waiting[job.key]
                self.report.ended(job, status)
            elif status["status"] == "running" and job.key not in self.running:
                self.running.add(job.key)
                self.report.started(job)
        self.report.show()

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
                self.report.over(group)
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
                refresh({job.key: job for job in left}, self.output_root)  # of others no file may say why they failed
            left = [job for job in left if self._is_owed(job, began, broken)]
            if not left:
                return
            if attempt == 0:
                reported = sum(job.key not in watch.waiting for job in left)
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
