"""What a run has to do, in which order, and how long that may take; trains nothing and imports no torch."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.devices import has_gpu, processor
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
        key: Tells it from all others of a command: the cell's id, unless another job trains the cell and this one adds
            a score to it.
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
    key: str = ""

    def __post_init__(self) -> None:
        self.key = self.key or self.id

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status["status"] == "done"

    def read_status(self, output_root: str) -> Config:
        """How the cell stands, with the score that this table asks for on another dataset."""
        return read_status(folder_of(output_root, self.id), self.config["evaluation"], self.scored_on)


def pooled(tables: Mapping[str, Mapping[str, Job]]) -> dict[str, Job]:
    """The jobs of all tables of a command by their keys, each cell once, what is needed first.

    A job that also scores its cell on other data stands for those that only want the cell. Where that takes cells that
    training it does not, or the cell is scored on two kinds of data, a job of its own adds the score.

    Args:
        tables: Name -> jobs by id.
    """
    found: dict[str, Job] = {}
    for name, jobs in tables.items():
        for job in jobs.values():
            text = job.text if len(tables) == 1 else f"{name} {job.text}"
            known, asked = found.get(job.id), job.config["evaluation"]
            if known is None:
                found[job.id] = replace(job, text=text)
            elif known.config["evaluation"] is None and {*job.needs} <= {*known.needs}:
                found[job.id] = replace(job, text=known.text) if asked is not None else known
            elif asked is not None and asked != known.config["evaluation"]:
                key = _scoring(job)
                found.setdefault(key, replace(job, text=text, needs=[job.id, *job.needs], key=key))
    return found


def _scoring(job: Job) -> str:
    """The key of a job that does no more than add a score to its cell."""
    return f"{job.id} {job.config['evaluation']}"


def pooled_of(job: Job, jobs: Mapping[str, Job]) -> Job:
    """Which of all jobs of a command does what a table's own is there for."""
    return jobs.get(_scoring(job)) or jobs[job.id]


def waves(jobs: Mapping[str, Job]) -> list[list[Job]]:
    """Jobs that are not done, grouped so that each group needs only earlier ones."""
    todo = {job.key: job for job in jobs.values() if not job.is_done}
    levels: dict[str, int] = {}

    def level(job: Job) -> int:
        if job.key not in levels:
            levels[job.key] = 1 + max((level(todo[need]) for need in job.needs if need in todo), default=-1)
        return levels[job.key]

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


BUSY = 0.1  # a share of its time that a process has waited for processors, above which others have slowed it down
REHEARSAL_VERSION = 2  # of what a file of cases holds; others are passed over, and written anew


def rehearsed_cases(path: Path) -> list[Config]:
    """The cases that a rehearsal's file holds."""
    found = read_json(path) or {}
    return list(found["cases"]) if found.get("version") == REHEARSAL_VERSION else []


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
        if job.key != job.id:
            return 0.0  # a score takes little beside trainings, and nobody waits for it
        known = self.seconds[job.id]
        return _passes(job.config) * 60.0 if known is None else known


@dataclass(frozen=True)
class _Device:
    """What a measurement was made on: its name, and whether that is a GPU."""

    name: str
    is_gpu: bool


Trained = tuple[Config, _Device]  # the record of a finished cell, and what has trained it


def _kinds(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether a GPU will train a cell, the likelier first: `auto` takes the GPU of the machine that trains it."""
    if config["device"] == "auto":
        return (True, False) if has_gpu() else (False, True)
    return (config["device"] != "cpu",)


def _of_one_device(alike: Iterable[Trained], is_gpu: bool) -> list[Config]:
    """The records of one device, for times on several have no mean: of this machine's processor, else the commonest."""
    found: dict[_Device, list[Config]] = {}
    for record, device in alike:
        if device.is_gpu == is_gpu:
            found.setdefault(device, []).append(record)
    here = processor()
    return max(found.items(), key=lambda each: (each[0].name.startswith(here), len(each[1])), default=(None, []))[1]


def _scaled(records: Sequence[Config], config: Config) -> float:
    """What a cell takes where finished ones have taken so long, by their lengths and by what methods compute."""
    per_pass = [each["seconds"] / _length(each["config"]) / _passes(each["config"]) for each in records]
    return sum(per_pass) / len(per_pass) * _passes(config) * max(1, _length(config))


def expected(jobs: Iterable[Job], output_root: str) -> Times:
    """How long jobs will take, as measured on the same networks and images with updates of the same size.

    Finished cells of the same method come first, then a rehearsal, then finished cells of another method, of which each
    took as much longer or shorter as it computes more or less. All of a job's were measured on one device, of the kind
    that will train it; where `device=auto` leaves that open and nothing else tells, of the other kind.
    """
    records = [
        (result, _computed_on(result))
        for folder in finished_cells(output_root)
        if (result := read_result(folder)) is not None
        and _length(result["config"]) > 0
        and result["config"]["method"]["name"] in METHODS  # and not of a package that is gone
        and result["config"]["dataset"]["name"] in DATASETS
    ]
    known = [(costs(trained[0]["config"]), trained) for trained in records]
    measured = [case for path in rehearsals_of(output_root).glob("*.json") for case in rehearsed_cases(path)]
    rehearsed = {
        (case["key"], length["key"], case["gpu"]): (
            length["seconds"],
            case["device"] + (", slowed down by other processes" if case["waited"] > BUSY else ""),
        )
        for case in sorted(measured, key=lambda case: case["time"])
        for length in case["lengths"]
        if length["seconds"] is not None
    }
    seconds: dict[str, float | None] = {}
    cells: dict[str, str] = {}
    cases: dict[str, str] = {}
    for job in jobs:
        own, key, seconds[job.id] = costs(job.config), case_key(job.config), None
        similar = [(theirs["method"], each) for theirs, each in known if {**theirs, "method": own["method"]} == own]
        for is_gpu in _kinds(job.config):
            same = _of_one_device((each for method, each in similar if method == own["method"]), is_gpu)
            if not same and (found := rehearsed.get((key, length_key(job.config), is_gpu))):
                seconds[job.id], cases[key] = found
                break
            if alike := same or _of_one_device((each for _, each in similar), is_gpu):
                seconds[job.id] = _scaled(alike, job.config)
                cells |= {record["id"]: _computed_on(record).name for record in alike}
                break
    devices = [*cells.values(), *cases.values()]
    counts = ((len(cells), "finished cell"), (len(cases), "rehearsed case"))
    told = " and ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count)
    return Times(seconds, f"{told} on {' and '.join(dict.fromkeys(devices))}" if told else "")


def on_processor(name: str, threads: int) -> str:
    """A processor as a device."""
    return f"{name} ({threads} thread{'s' * (threads != 1)})"


def _computed_on(record: Mapping[str, Any]) -> _Device:
    """The device of a finished cell; one that was told to has left the machine's GPUs alone."""
    hardware = record["hardware"]
    if hardware["gpus"] and record["config"]["device"] != "cpu":
        return _Device(str(hardware["gpus"][0]), True)
    return _Device(on_processor(hardware["cpu"], record["threads"]), False)


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
        jobs: All jobs by their keys.
        times: How long they take.
    """

    def __init__(self, jobs: Mapping[str, Job], times: Times):
        self.waiting = {job.key: job for job in jobs.values() if not job.is_done}
        self.urgency: dict[str, float] = {}
        self.order(times)

    def order(self, times: Times) -> None:
        """Orders the jobs that wait by what is known now."""
        followers: dict[str, list[str]] = {}
        for job in self.waiting.values():
            for need in job.needs:
                followers.setdefault(need, []).append(job.key)
        found: dict[str, float] = {}

        def urgency(key: str) -> float:
            if key not in found:
                behind = max(map(urgency, followers.get(key, ())), default=0.0)
                found[key] = times.weight(self.waiting[key]) + behind
            return found[key]

        for key in self.waiting:
            urgency(key)
        self.urgency |= found  # jobs that were taken may come back

    def take(self, unfinished: Iterable[str] = ()) -> Job | None:
        """The next job all of whose needs are done, taken off the list; None if there is none now.

        Args:
            unfinished: Keys of jobs that were taken and still run.
        """
        open_keys = {*self.waiting, *unfinished}
        ready = [job for job in self.waiting.values() if not any(need in open_keys for need in job.needs)]
        if not ready:
            return None
        chosen = max(ready, key=lambda job: self.urgency[job.key])  # the first of equals: the table's order
        return self.waiting.pop(chosen.key)


def makespan(jobs: Mapping[str, Job], times: Times, workers: int) -> float:
    """Seconds until all jobs are done when so many workers take them off an `Agenda`."""
    agenda, now = Agenda(jobs, times), 0.0
    running: list[tuple[float, str]] = []
    while True:
        while len(running) < workers and (job := agenda.take(each for _, each in running)) is not None:
            heapq.heappush(running, (now + times.weight(job), job.key))
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
        jobs: All jobs by their keys; those of one cell count as one.
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
    cells, open_cells = len({job.id for job in jobs.values()}), len(times.seconds)
    unknown = open_cells - len(known)
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
    lines.append(f"{cells} cells, {cells - open_cells} done, {open_cells} to train: {left}")
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
