"""What a run has to do, in which order, and how long that may take; trains nothing and imports no torch."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.meaning import identify, needed_cells, settle, teaches_in_bf16
from kt.data.names import DATASETS, SPLIT_SIZES, content
from kt.files import read_json
from kt.models.names import folder_of_weights
from kt.settings import METHODS, SOURCE, defaults
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


# Keys of a schedule that an update's time depends on; of schedule and dataset those that say how many there are.
UPDATE = ("batch_size", "device_batch", "optimizer")
LENGTH, SIZES = ("epochs", "iterations", "interval", "evaluate_every"), ("subset", "validation", *SPLIT_SIZES)


def _structure(method: Mapping[str, Any]) -> Config:
    """What of a method's settings decides what it computes: numbers with a fraction only weigh it."""
    told = {key: value for key, value in method.items() if value is not None and not isinstance(value, float)}
    unused = {*METHODS[method["name"]].cell_keys} - {SOURCE}
    return {key: _structure(value) if key == "base" else value for key, value in told.items() if key not in unused}


def costs(config: Mapping[str, Any]) -> Config:
    """What the time and the memory of a settled cell's updates depend on, and what they are counted in."""
    student, teacher = config["student"], config["teacher"]
    dataset = {**defaults(DATASETS[config["dataset"]["name"]].settings), **config["dataset"]}  # keys may be younger
    return {
        "student": [student["network"], student["pretrained"]],
        "teacher": [teacher["network"], teacher["norm"] if teacher["network"] else None]
        + (["bf16"] if teaches_in_bf16(config) else []),
        "dataset": {key: value for key, value in content(dataset).items() if value is not None},
        "update": {key: config["schedule"].get(key) for key in UPDATE},
        "unit": "iterations" if config["schedule"]["iterations"] else "epochs",
        "precision": config["precision"],
        "activation_checkpointing": config.get("activation_checkpointing", False),
        "compile": config.get("compile", False),
        "method": _structure(config["method"]),
    }


def case_key(config: Mapping[str, Any]) -> str:
    """Of a settled cell, the same for all whose updates take the same and that read the same files of the user's."""
    told = {key: value for key, value in costs(config).items() if key != "unit"}
    told["dataset"] = {key: value for key, value in told["dataset"].items() if key not in SIZES}
    told["files"] = [config["teacher"]["checkpoint"], config["student"]["checkpoint"], config["method"].get("file")]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def length_key(config: Mapping[str, Any]) -> str:
    """Of a settled cell, the same for all of a case that make as many updates and scores."""
    told = {key: config["schedule"][key] for key in LENGTH} | {key: config["dataset"][key] for key in SIZES}
    return json.dumps({key: value for key, value in told.items() if value is not None})


def rehearsals_of(output_root: str | os.PathLike[str]) -> Path:
    """Where rehearsals leave what they have measured (`experiments.rehearse`)."""
    return Path(output_root) / "rehearsals"


@dataclass(frozen=True)
class Times:
    """What is known of how long jobs take.

    Attributes:
        seconds: Job id -> expected seconds; None where nothing tells.
        sources: What tells, in words.
    """

    seconds: Mapping[str, float | None]
    sources: str = ""

    def weight(self, job: Job) -> float:
        """Seconds to order jobs by: where nothing tells, what a method computes beside the student alone decides."""
        known = self.seconds[job.id]
        return _passes(job.config) * 60.0 if known is None else known


def expected(jobs: Iterable[Job], output_root: str) -> Times:
    """How long jobs will take, as measured on the same networks and images with updates of the same size.

    Finished cells of the same method come first, then a rehearsal, then finished cells of another method, of which each
    took as much longer or shorter as it computes more or less.
    """
    records = [
        result
        for folder in finished_cells(output_root)
        if (result := read_result(folder)) is not None
        and _length(result["config"]) > 0
        and result["config"]["method"]["name"] in METHODS  # and not of a package that is gone
        and result["config"]["dataset"]["name"] in DATASETS
    ]
    known = [(costs(record["config"]), record) for record in records]
    rehearsed = {
        (case["key"], length["key"]): (length["seconds"], case["device"])
        for path in sorted(rehearsals_of(output_root).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for case in (read_json(path) or {"cases": ()})["cases"]
        for length in case["lengths"]
        if length["seconds"] is not None
    }
    seconds: dict[str, float | None] = {}
    cells: dict[str, Config] = {}
    cases: dict[str, str] = {}
    for job in jobs:
        own = costs(job.config)
        similar = [(theirs["method"], record) for theirs, record in known if {**theirs, "method": own["method"]} == own]
        same = [record for method, record in similar if method == own["method"]]
        key = case_key(job.config)
        alike = same or [record for _, record in similar]
        if not same and (found := rehearsed.get((key, length_key(job.config)))):
            seconds[job.id], cases[key] = found
        elif alike:
            per_pass = [record["seconds"] / _length(record["config"]) / _passes(record["config"]) for record in alike]
            seconds[job.id] = sum(per_pass) / len(per_pass) * _passes(job.config) * max(1, _length(job.config))
            cells |= {record["id"]: record for record in alike}
        else:
            seconds[job.id] = None
    devices = [*map(_computed_on, cells.values()), *cases.values()]
    counts = ((len(cells), "finished cell"), (len(cases), "rehearsed case"))
    told = " and ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count)
    return Times(seconds, f"{told} on {' and '.join(dict.fromkeys(devices))}" if told else "")


def on_processor(name: str, threads: int) -> str:
    """A processor as a device."""
    return f"{name} ({threads} thread{'s' * (threads != 1)})"


def _computed_on(record: Mapping[str, Any]) -> str:
    """The device of a finished cell."""
    hardware = record["hardware"]
    return str(hardware["gpus"][0]) if hardware["gpus"] else on_processor(hardware["cpu"], record["threads"])


def _length(config: Config) -> int:
    """The length of a training, in epochs or in iterations."""
    return int(config["schedule"]["iterations"] or config["schedule"]["epochs"] or 0)


def _passes(config: Mapping[str, Any]) -> float:
    """Time of a cell's training over that of its student alone, roughly; of a method around another that of both."""
    method = config["method"]
    return max(METHODS[each["name"]].passes for each in (method, method.get("base") or method))


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


def _lacks_weights(config: Config) -> str | None:
    """What to say of the pretrained weights of a cell's student that have not been fetched yet."""
    name, weights = config["student"]["network"]["name"], config["student"]["pretrained"]
    if not weights or (folder := folder_of_weights(name, weights)) is None:
        return None
    return f"weights {weights} of {name}: not in {folder} yet; they are fetched by the first cell that needs them"


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
    lines += dict.fromkeys(line for job in todo if (line := _lacks_weights(job.config)))
    times = expected(todo, output_root)
    known = [seconds for seconds in times.seconds.values() if seconds is not None]
    unknown = len(todo) - len(known)
    if not todo:
        left = "nothing to train"
    elif not known:
        left = "unknown, rehearse (rehearse=true, or rehearse=synthetic without the data)"
    else:
        left = f"about {in_words(sum(known))} one after the other"
        if workers > 1 and not unknown:
            left += f", {in_words(makespan(jobs, times, workers))} by {workers} workers"
        left += f" (from {times.sources})"
        left += f" for {len(known)} of them; {unknown} unknown, rehearse (rehearse=true)" if unknown else ""
    lines.append(f"{len(jobs)} cells, {len(jobs) - len(todo)} done, {len(todo)} to train: {left}")
    return lines


def jobs_of(config: Config) -> dict[str, Job]:
    """The job of one cell outside a table, and those of what it needs, which come first."""
    jobs: dict[str, Job] = {}

    def add(settled: Config, text: str) -> str:
        found = identify(settled)
        needs = list(dict.fromkeys(add(need, name) for name, need in needed_cells(settled).items()))
        job = Job(found.id, [], settled, text, needs, told=found.told, absent=found.absent, scored_on=found.scored_on)
        job.status = job.read_status(config["output_root"])
        jobs[found.id] = job
        return found.id

    settled = settle(config)
    add(settled, settled["method"]["name"])
    return jobs
