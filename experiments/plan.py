"""What a run has to do, in which order, and how long that may take; trains nothing and imports no torch."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.meaning import identify, needed_cells, settle
from kt.settings import METHODS
from kt.store import finished_cells, folder_of, read_result, read_status

Config = dict[str, Any]


@dataclass
class Job:
    """A cell to launch, with the overrides that mean it.

    Attributes:
        told, absent: What there is to say of its data (`experiments.meaning.Identified`).
        scored_on: The fingerprint of the other dataset that its score has to be of.
    """

    id: str
    overrides: list[str]
    config: Config
    text: str
    needs: list[str]
    status: Config = field(default_factory=dict)
    told: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    scored_on: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status["status"] == "done"

    def read_status(self, output_root: str) -> Config:
        """How the cell stands, with the score that this table asks for on another dataset."""
        return read_status(folder_of(output_root, self.id), self.config["evaluation"], self.scored_on)


def waves(jobs: Mapping[str, Job]) -> list[list[Job]]:
    """Jobs that are not done, grouped so that each group needs only earlier ones."""
    todo = {job.id: job for job in jobs.values() if not job.is_done}
    levels: dict[str, int] = {}

    def level(job: Job) -> int:
        if job.id not in levels:
            levels[job.id] = 1 + max((level(todo[need]) for need in job.needs if need in todo), default=-1)
        return levels[job.id]

    grouped: dict[int, list[Job]] = {}
    for job in todo.values():
        grouped.setdefault(level(job), []).append(job)
    return [grouped[depth] for depth in sorted(grouped)]


@dataclass(frozen=True)
class Times:
    """What is known of how long jobs take.

    Attributes:
        seconds: Job id -> expected seconds; None where nothing tells.
        cells: From how many finished cells this is known.
    """

    seconds: Mapping[str, float | None]
    cells: int

    def weight(self, job: Job) -> float:
        """Seconds to order jobs by: where nothing tells, what a method computes beside the student alone decides."""
        known = self.seconds[job.id]
        return _passes(job.config) * 60.0 if known is None else known


def expected(jobs: Iterable[Job], output_root: str) -> Times:
    """How long jobs will take.

    A job is likened to finished cells on the same data: with its student and method, else with its student, else any.
    """
    records = [
        result
        for folder in finished_cells(output_root)
        if (result := read_result(folder)) is not None
        and _length(result["config"]) > 0
        and result["config"]["method"]["name"] in METHODS  # and not of a package that is gone
    ]
    seconds: dict[str, float | None] = {}
    used: set[str] = set()
    for job in jobs:
        keys, passes = _likeness(job.config), _passes(job.config)
        alike: list[Config] = []
        for length in range(len(keys), 0, -1):
            alike = [record for record in records if _likeness(record["config"])[:length] == keys[:length]]
            if alike:
                break
        minutes = job.config["scale"]["cell_minutes"]
        if alike:
            # Of another method, a cell took as much longer or shorter as that computes more or less.
            per_pass = [record["seconds"] / _length(record["config"]) / _passes(record["config"]) for record in alike]
            seconds[job.id] = sum(per_pass) / len(per_pass) * passes * max(1, _length(job.config))
            used |= {record["id"] for record in alike}
        else:
            seconds[job.id] = 60 * minutes * passes if minutes is not None else None
    return Times(seconds, len(used))


def _length(config: Config) -> int:
    """The length of a training, in epochs or in iterations."""
    return int(config["schedule"]["iterations"] or config["schedule"]["epochs"] or 0)


def _passes(config: Mapping[str, Any]) -> float:
    """Time of a cell's training over that of its student alone, roughly; of a method around another that of both."""
    method = config["method"]
    return max(METHODS[each["name"]].passes for each in (method, method.get("base") or method))


def _likeness(config: Config) -> tuple[Any, ...]:
    """What a cell's time per epoch depends on, the weightiest first."""
    dataset = {key: config["dataset"][key] for key in ("name", "task", "image_size", "subset", "train_size")}
    teacher = (config["teacher"]["network"] or {}).get("name")
    return dataset, config["student"]["network"], config["method"]["name"], teacher


class Agenda:
    """The jobs that are not done, in the order in which free workers take them: first what most time hangs on.

    A job's urgency is its own time and that of the longest chain of jobs that wait for it, so that teachers come first
    and then the longest cells.

    Args:
        jobs: All jobs by id.
        times: How long they take.
    """

    def __init__(self, jobs: Mapping[str, Job], times: Times):
        self.waiting = {job.id: job for job in jobs.values() if not job.is_done}
        followers: dict[str, list[str]] = {}
        for job in self.waiting.values():
            for need in job.needs:
                followers.setdefault(need, []).append(job.id)
        self.urgency: dict[str, float] = {}

        def urgency(job_id: str) -> float:
            if job_id not in self.urgency:
                behind = max(map(urgency, followers.get(job_id, ())), default=0.0)
                self.urgency[job_id] = times.weight(self.waiting[job_id]) + behind
            return self.urgency[job_id]

        for job_id in self.waiting:
            urgency(job_id)

    def take(self, unfinished: Iterable[str] = ()) -> Job | None:
        """The next job all of whose needs are done, taken off the list; None if there is none now.

        Args:
            unfinished: Ids of jobs that were taken and still run.
        """
        open_ids = {*self.waiting, *unfinished}
        ready = [job for job in self.waiting.values() if not any(need in open_ids for need in job.needs)]
        if not ready:
            return None
        chosen = max(ready, key=lambda job: self.urgency[job.id])  # the first of equals: the table's order
        return self.waiting.pop(chosen.id)


def makespan(jobs: Mapping[str, Job], times: Times, workers: int) -> float:
    """Seconds until all jobs are done when so many workers take them off an `Agenda`."""
    agenda, now = Agenda(jobs, times), 0.0
    running: list[tuple[float, str]] = []
    while True:
        while len(running) < workers and (job := agenda.take(each for _, each in running)) is not None:
            heapq.heappush(running, (now + times.weight(job), job.id))
        if not running:
            return now
        now, _ = heapq.heappop(running)


def in_words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan_lines(jobs: Mapping[str, Job], output_root: str, workers: int) -> list[str]:
    """What a run would do: every cell with its state and needs, and how long the rest may take.

    Args:
        jobs: All jobs by id.
        output_root: Where cells live.
        workers: How many cells would be trained side by side.
    """
    width = max(len(job.text) for job in jobs.values())
    lines = [f"{'cell':16}  {'row':{width}}  {'state':11}  needs"]
    for job in jobs.values():
        lines.append(f"{job.id}  {job.text:{width}}  {job.status['status']:11}  {', '.join(job.needs) or '-'}")
    lines += dict.fromkeys(line for job in jobs.values() for line in job.told)
    lines += dict.fromkeys(f"{line}; needed to train" for job in jobs.values() for line in job.absent)
    todo = [job for job in jobs.values() if not job.is_done]
    times = expected(todo, output_root)
    if not todo:
        left = "nothing to train"
    elif None in times.seconds.values():
        left = "no estimate before a first cell is done"
    else:
        alone = sum(times.weight(job) for job in todo)
        left = f"about {in_words(alone)} one after the other"
        if workers > 1:
            left += f", {in_words(makespan(jobs, times, workers))} by {workers} workers"
        left += f" (from {times.cells or 'no'} finished cells like them)"
    lines.append(f"{len(jobs)} cells, {len(jobs) - len(todo)} done, {len(todo)} to train: {left}")
    return lines


def print_plan(configs: Sequence[Config], config: Config) -> None:
    """The plan of cells outside a table, with what they need."""
    jobs: dict[str, Job] = {}

    def add(settled: Config, text: str) -> str:
        found = identify(settled)
        needs = list(dict.fromkeys(add(need, name) for name, need in needed_cells(settled).items()))
        job = Job(found.id, [], settled, text, needs, told=found.told, absent=found.absent, scored_on=found.scored_on)
        job.status = job.read_status(config["output_root"])
        jobs[found.id] = job
        return found.id

    for each in configs:
        settled = settle(each)
        add(settled, settled["method"]["name"])
    for line in plan_lines(jobs, config["output_root"], 1):
        print(line)
