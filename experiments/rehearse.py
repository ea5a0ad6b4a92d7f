"""`rehearse=true`: what a table's cells will take at their real size, measured before any of them is trained.

Cells that differ in nothing that costs time or memory (`experiments.plan.costs`) are one case. A case is built as its
cells are and passes over 2, 4 and 16 images, each in a process of its own. To the schedule's batch time and memory are
extrapolated; where that should fit and takes seconds, it is measured as well, or as many images as do.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments import lifeline
from experiments.devices import own_memory
from experiments.plan import (
    BUSY,
    REHEARSAL_VERSION,
    Config,
    Job,
    case_key,
    in_words,
    length_key,
    rehearsals_of,
    rehearsed_cases,
)
from experiments.progress import Display
from experiments.workers import DENSE_IMPORTS, STEP_IMPORTS, preload
from kt.errors import UserError
from kt.files import write_json, writing
from kt.ranks import launched
from kt.settings import accumulates, check_accumulation, device_batch

IMAGES = (2, 4, 16)  # of the passes that are measured: of few a network's workspace takes more memory than its maps
CASE_SECONDS = 20.0  # for all passes of a case; what is known then has to do
FEWEST_SECONDS = 300.0  # for those over the fewest images, without which nothing is known
BUILDING_SECONDS = 600.0  # for reading the data and building the networks
RESERVE = 1 << 30  # bytes that stay free for the rest of the machine
POLL_SECONDS = 0.2
SYNTHETIC = "synthetic"
GIB = 2.0**30

# Bytes and seconds are both taken to be linear in the images of a pass.
Points = Mapping[int, float]


def extrapolated(points: Points, images: float) -> float:
    """The value at a number of images, on the line through the two largest numbers that were measured.

    Where noise lets that line fall, the line through the smallest and the largest takes its place.

    Args:
        points: Number of images -> value, of two numbers at least; 0 images stand for what is there without any.
        images: Where the value is wanted.
    """
    if images in points:
        return points[int(images)]
    first, *_, last = ordered = sorted(points)
    slope = (points[last] - points[ordered[-2]]) / (last - ordered[-2])
    if slope <= 0:
        slope = max(0.0, (points[last] - points[first]) / (last - first))
    return points[last] + slope * (images - last)


def spread(points: Points, images: float) -> tuple[float, float]:
    """The least and the most at a number of images of all lines through two of the numbers that were measured.

    Without any images counts as one where fewer than three others were measured. Lines that fall are level.

    Args:
        points, images: As for `extrapolated`.
    """
    if images in points:
        return (points[int(images)],) * 2
    measured = {count: value for count, value in points.items() if count}
    own = measured if len(measured) > 2 else points
    ends = [
        points[last] + max(0.0, (points[last] - points[first]) / (last - first)) * (images - last)
        for first, last in itertools.combinations(sorted(own), 2)
    ] + [extrapolated(points, images)]
    return min(ends), max(ends)


# Of a control group, in either version: the most it may take, what it has taken, and what of that is files read before.
_UNIFIED = "memory.max", "memory.current", "inactive_file"
_DIVIDED = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def _left_to_groups(root: Path) -> Iterator[int]:
    """Bytes that the control groups of this process leave it: those of a container, a cluster's job, a service."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        limit, used, files = _DIVIDED if kinds else _UNIFIED
        own = mounted / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(mounted):
                break
            with contextlib.suppress(OSError, ValueError):  # none of this one; "max" is no number
                most, taken = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
                told = re.search(rf"^{files} (\d+)$", (group / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE)
                yield most - taken + (int(told[1]) if told else 0)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that a new process on this machine, or in this container or job, may take.

    The kernel gives up the pages of files that have been read where a process needs them, so these are free.

    Args:
        root: Where `proc` and `sys` are.
    """
    kilobytes = re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(encoding="utf-8"))
    found = [1024 * int(kilobytes[1])] if kilobytes else []
    with contextlib.suppress(OSError):  # a kernel without control groups
        found += _left_to_groups(root)
    return max(0, min(found, default=0) - RESERVE)


@dataclass
class Run:
    """What one process has measured of a case, over so many images.

    Attributes:
        facts: The names of its `phases`; of the device its name and, of a GPU, the bytes that are its `limit`.
        lengths: See `Case.lengths`.
        steps: Seconds of each phase's steps.
        evaluation: Seconds of one evaluation batch.
        memory: Bytes at most.
        fixed: Bytes without any image: the networks, and the largest phase's gradients and state of the optimizers.
        disk: Bytes that the cell keeps.
        missing: Files, weights and classes that are not there, in lines.
        start: Seconds before the first pass: data are read, images that stay in memory decoded, networks built.
        surveys: What each phase makes of the whole training set before an epoch: the seconds of one `batch`, those of
            all the `rest`, and of each length before how many epochs (`times`).
        waited: The share of the passes' time that the process has waited for a processor.
        ended: `done`, `slow` (out of time), `memory`, `norm`, `user` or `error`; `why` says more.
        begun: When it was built; None where it was not.
        seconds: That the passes took, and not what each survey takes beside its batches.
    """

    images: int
    facts: Config = field(default_factory=dict)
    lengths: Sequence[Config] = ()
    steps: dict[int, list[float]] = field(default_factory=dict)
    evaluation: float | None = None
    memory: int = 0
    fixed: int = 0
    disk: int | None = None
    missing: tuple[str, ...] = ()
    start: float | None = None
    surveys: dict[int, Config] = field(default_factory=dict)
    waited: float = 0.0
    ended: str = "slow"
    why: str = ""
    begun: float | None = None
    seconds: float = 0.0

    def hear(self, message: Mapping[str, Any]) -> None:
        """Takes note of what the process tells."""
        if "phase" in message:
            self.steps.setdefault(message["phase"], []).append(message["seconds"])
        self.memory, self.fixed = (max(getattr(self, key), message.get(key, 0)) for key in ("memory", "fixed"))
        if "surveyed" in message:
            self.surveys[message["surveyed"]] = message["survey"]
        self.missing += tuple(message.get("missing", ()))
        for key in ("facts", "lengths", "evaluation", "disk", "ended", "why", "start", "waited"):
            setattr(self, key, message.get(key, getattr(self, key)))


def _print_to(path: Path) -> None:
    """From now on what this process and its libraries print goes to the end of a file."""
    with open(path, "a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """See `_print_to`, for a while."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [(stream, os.dup(stream)) for stream in (1, 2)]
    _print_to(path)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, kept in before:
            os.dup2(kept, stream)
            os.close(kept)


def _work(
    configs: Sequence[Config],
    images: int,
    folder: Path,
    log: Path,
    synthetic: bool,
    events: Connection,
    run: tuple[int, Any],
) -> None:
    """The process that measures; what it prints goes to a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends it
    lifeline.follow(*run)
    _print_to(log)
    from experiments.measure import measure

    measure(configs, images, folder, synthetic, free_memory(), events.send)


@dataclass(frozen=True)
class Stage:
    """Where cases are measured, and on which data.

    Attributes:
        folder: For whatever they write.
        log: For what they print.
        synthetic: Whether images of the right shape take the place of all data that are not embedded.
    """

    folder: Path
    log: Path
    synthetic: bool

    def measure(self, configs: Sequence[Config], images: int, seconds: float) -> Run:
        """A case in a process of its own, which is killed when its time is up or the machine's memory is used up.

        Args:
            configs, images: As for `experiments.measure.measure`.
            seconds: What its passes may take.
        """
        found, until = Run(images), time.monotonic() + BUILDING_SECONDS
        events, theirs = multiprocessing.Pipe(duplex=False)
        me = os.getpid(), lifeline.started(os.getpid())
        arguments = (configs, images, self.folder, self.log, self.synthetic, theirs, me)
        process = multiprocessing.get_context("fork").Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            while time.monotonic() < until:
                if found.facts and found.begun is None:
                    found.begun = time.monotonic()
                    until = found.begun + seconds
                if free_memory() == 0:  # another process may have taken it
                    found.ended, found.why = "memory", "the memory of the machine was used up"
                    break
                if events.poll(POLL_SECONDS):
                    found.hear(events.recv())
        except EOFError:
            process.join()
            if found.ended == "slow":
                killed = process.exitcode == -signal.SIGKILL
                found.ended = "memory" if killed else "error"
                found.why = f"its process ended with {process.exitcode}"
        finally:
            process.kill()
            process.join()
            events.close()
        if found.begun is not None:
            # What takes as long for any number of images, such as a thousand matchings, leaves others their time.
            matching = sum(survey["rest"] for survey in found.surveys.values())
            found.seconds = max(0.0, time.monotonic() - found.begun - matching)
        return found


@dataclass
class Case:
    """Cells whose updates take the same, and what is known of them.

    Attributes:
        cells: Of each length (`experiments.plan.length_key`) the config of one, the one with most images first.
        ids: Of all cells, by their length.
        texts: What their table calls them.
        limit: Bytes that such a process may have.
        runs: What was measured, by the images of a pass.
    """

    key: str
    cells: dict[str, Config] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    limit: int = 0
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """Of the cell that is built: what a method remembers of each training image counts."""

        def size(config: Config) -> tuple[bool, float]:
            images = config["dataset"]["subset"] or config["dataset"]["train_size"] or math.inf
            return config["schedule"]["epochs"] != 0, images  # one that is not trained has nothing to measure

        return max(self.cells.values(), key=size)

    @property
    def batch(self) -> int:
        """Images of a pass."""
        return device_batch(self.config["schedule"], 1)

    @property
    def passes(self) -> int:
        """Of an update."""
        return int(self.config["schedule"]["batch_size"]) // self.batch

    def rehearse(self, stage: Stage) -> None:
        """Measures it, as far as time and memory allow."""
        self.limit = free_memory() + (own_memory("VmRSS") or 0)  # which the process has from this one
        sizes = [*dict.fromkeys(min(each, self.batch) for each in IMAGES)]
        for images, more in zip(sizes, [*sizes[1:], math.inf], strict=True):
            if not self._add(stage, images) or more / images * self.runs[images].seconds > self._left:
                break  # more images would not come to their end
            if more / images * self.runs[images].memory > (self.facts.get("limit") or self.limit):
                break
        smallest = min(self.runs.values(), key=lambda run: run.images)
        if smallest.ended == "memory" and smallest.images > 1:
            self._add(stage, 1)
        self.limit = self.facts.get("limit") or self.limit
        halves = (2**power for power in range(self.batch.bit_length() - 1, 1, -1))
        for images in (self.batch, *halves):
            if images in self.runs:
                break
            if self._is_cheap(images):
                self._add(stage, images)
                break

    @property
    def _left(self) -> float:
        return CASE_SECONDS - sum(run.seconds for run in self.runs.values())

    def _is_cheap(self, images: int) -> bool:
        """Whether passes over more images, of the whole batch if possible, can be measured as well."""
        if any(run.ended == "memory" for run in self.runs.values()):
            return False
        needed, steps, image = self.memory(images), self.pass_seconds(images), self.image_seconds()
        if needed is None or needed > self.limit or image is None or None in steps:
            return False
        return 3 * sum(each for each in steps if each) + 2 * images * image < self._left

    def _add(self, stage: Stage, images: int) -> bool:
        configs = [self.config, *(self.cells.values() if self._counted is None else ())]  # once is enough
        known = any(run.ended == "done" for run in self.runs.values())
        seconds = self._left if known else FEWEST_SECONDS
        run = self.runs[images] = stage.measure(configs, images, seconds)
        return run.ended == "done"

    @property
    def facts(self) -> Config:
        """See `Run`; nothing where the cell could not be built."""
        return next((run.facts for run in self.runs.values() if run.facts), {})

    @property
    def lengths(self) -> dict[str, Config]:
        """What there is to do in each length.

        The `steps` of each phase, before how many of its epochs it goes through the training set (`surveys`) and the
        `batches` of that; the number of `evaluations` and their `test_size`. Without a training all phases have none.
        """
        run = self._counted or next((run for run in self.runs.values() if run.lengths), None)
        if run is None:
            return {}
        times = [run.surveys[index]["times"] for index in sorted(run.surveys)]
        none = [0] * len(self.facts.get("phases", ()))
        return {
            key: {
                **length,
                **{name: length[name] or none for name in ("steps", "batches")},
                "surveys": [each[number] for each in times],
            }
            for number, (key, length) in enumerate(zip(self.cells, run.lengths, strict=True))
        }

    @property
    def _counted(self) -> Run | None:
        """A run that has told all of the lengths."""
        runs = (run for run in self.runs.values() if run.facts and run.lengths)
        return next((run for run in runs if len(run.surveys) == len(run.facts["phases"])), None)

    @property
    def missing(self) -> list[str]:
        """Everything that is not there, in lines."""
        found = [line for run in self.runs.values() for line in run.missing]
        return found + [run.why for run in self.runs.values() if run.ended == "user"]

    @property
    def _telling(self) -> list[Run]:
        """The runs to go by: those that have come to their end, else those that have made a step."""
        ended = [run for run in self.runs.values() if run.ended == "done"]
        return ended or [run for run in self.runs.values() if run.steps]

    def _sizes(self) -> Points:
        """Bytes at most of passes over so many images, also without any; nothing where no pass has ended."""
        points = {run.images: run.memory for run in self._telling}
        return {0: max(run.fixed for run in self._telling), **points} if points else {}

    def memory(self, images: int) -> float | None:
        """Bytes at most of passes over so many images; None where not even one pass has ended."""
        return extrapolated(points, images) if (points := self._sizes()) else None

    def memory_spread(self) -> tuple[float, float] | None:
        """Between what bytes those of the batch lie; None as for `memory`."""
        return spread(points, self.batch) if (points := self._sizes()) else None

    def _pass_points(self) -> list[Points]:
        """Seconds of a pass over so many images in each phase."""
        found: list[Points] = []
        for index in range(len(self.facts.get("phases", ()))):
            taken = {run.images: run.steps[index] for run in self._telling if index in run.steps}
            found.append({images: statistics.median(each[1:] or each) for images, each in taken.items()})
        return found

    def pass_seconds(self, images: int) -> list[float | None]:
        """Seconds of a pass over so many images in each phase."""
        return [extrapolated({0: 0.0, **points}, images) if points else None for points in self._pass_points()]

    def step_seconds(self) -> list[float | None]:
        """Seconds of an update in each phase."""
        return [None if each is None else each * self.passes for each in self.pass_seconds(self.batch)]

    def step_spread(self) -> list[tuple[float, float] | None]:
        """Between what seconds those of an update lie in each phase."""
        found = [spread({0: 0.0, **points}, self.batch) if points else None for points in self._pass_points()]
        return [None if each is None else (each[0] * self.passes, each[1] * self.passes) for each in found]

    @property
    def is_extrapolated(self) -> bool:
        """Whether the batch itself was not measured."""
        return bool(self._telling) and self.batch not in {run.images for run in self._telling}

    def survey_seconds(self) -> list[tuple[float, float] | None]:
        """Seconds of what each phase makes of the training set before an epoch: of one batch, and of all the rest."""
        found: list[tuple[float, float] | None] = []
        for index in range(len(self.facts.get("phases", ()))):
            told = {run.images: run.surveys[index] for run in self._telling if index in run.surveys}
            if not told:
                found.append(None)
                continue
            points = {0: 0.0, **{images: each["batch"] for images, each in told.items()}}
            found.append((extrapolated(points, self.batch), told[max(told)]["rest"]))
        return found

    @property
    def start(self) -> float | None:
        """Seconds before the first pass; the first process may have drawn images that the others found."""
        return min((run.start for run in self.runs.values() if run.start is not None), default=None)

    @property
    def waited(self) -> float:
        """The largest share of its time that a process to go by has waited for a processor."""
        return max((run.waited for run in self._telling), default=0.0)

    def image_seconds(self) -> float | None:
        """Seconds that scoring takes an image."""
        tested = max((length["test_size"] for length in self.lengths.values()), default=0)
        runs = sorted(self._telling, key=lambda run: run.images)
        points = {min(run.images, tested): run.evaluation for run in runs if run.evaluation is not None}
        if not points:
            return None
        return extrapolated({0: 0.0, **points}, tested) / tested if tested else 0.0

    def seconds(self) -> dict[str, float | None]:
        """Of each length the seconds of a whole cell, its scores included; None where a part of it is not known."""
        each, surveys, image, start = self.step_seconds(), self.survey_seconds(), self.image_seconds(), self.start
        if image is None or start is None or None in each or None in surveys or self._counted is None:
            return dict.fromkeys(self.cells)
        return {
            key: start
            + sum(steps * one for steps, one in zip(length["steps"], each, strict=True) if one)
            + sum(
                times * (batches * one[0] + one[1])
                for times, batches, one in zip(length["surveys"], length["batches"], surveys, strict=True)
                if one
            )
            + length["evaluations"] * length["test_size"] * image
            for key, length in self.lengths.items()
        }

    def fitting(self) -> int | None:
        """The largest `schedule.device_batch` that this device has the memory for; None where there is none."""
        batch = self.config["schedule"]["batch_size"]
        exact = accumulates(self.config["method"])
        too_many = min((run.images for run in self.runs.values() if run.ended == "memory"), default=self.batch + 1)
        for images in (each for each in range(too_many - 1, 0, -1) if batch % each == 0):
            try:
                check_accumulation(batch // images, exact, self.config["dataset"]["task"])
            except UserError:
                continue
            if (needed := self.memory(images)) is not None and needed <= self.limit:
                return images
        return None

    @property
    def failed(self) -> Run | None:
        """The run that has failed as a training would, if there is one."""
        for run in self.runs.values():
            # Fewer images are tried where these do not fit.
            if run.ended == "error" or run.ended == "norm" and run.images >= min(IMAGES[0], self.batch):
                return run
        return None

    def problem(self) -> str:
        """What is to be said of it beside its numbers."""
        ended = {run.ended: run for run in self.runs.values()}
        if (run := self.failed) and run.ended == "norm":
            return f"{run.why} sees one value per channel at {run.images} images: it cannot normalise them"
        if run := run or ended.get("user"):
            return run.why
        needed = self.memory(self.batch)
        if needed is not None and needed > self.limit:
            return f"does not fit: needs {_between(needed, self.memory_spread())}, {_gib(self.limit)} are free"
        if run := ended.get("memory"):
            return f"does not fit: {run.images} images need more than the {_gib(self.limit)} that are free"
        if not self.facts:
            return f"not built within {BUILDING_SECONDS:.0f} s"
        if not self._telling:
            return f"{min(self.runs)} images take more than {FEWEST_SECONDS:.0f} s a step"
        unknown = None in self.seconds().values()
        return "not all of it could be measured in time" if unknown else ""

    def record(self) -> Config:
        """What is written of it."""
        config, facts = self.config, self.facts
        columns = facts.get("phases", ()), self.step_seconds(), self.step_spread(), self.survey_seconds()
        phases = [
            {"name": name, "seconds": seconds, "between": between, "survey": survey}
            for name, seconds, between, survey in zip(*columns, strict=True)
        ]
        lengths = [
            {"key": key, "cells": self.ids[key], "seconds": each, **self.lengths.get(key, {})}
            for key, each in self.seconds().items()
        ]
        measured = [
            {"images": run.images, "steps": [*run.steps.values()], "evaluation": run.evaluation, "memory": run.memory}
            | {"fixed": run.fixed, "surveys": run.surveys, "start": run.start, "waited": run.waited}
            | {"ended": run.ended, "why": run.why}
            for run in self.runs.values()
        ]
        return {
            "key": self.key,
            "lengths": lengths,
            "texts": self.texts,
            "student": config["student"]["network"],
            "teacher": config["teacher"]["network"],
            "method": config["method"]["name"],
            "dataset": {key: config["dataset"][key] for key in ("name", "task", "image_size", "crop_size")},
            "batch": config["schedule"]["batch_size"],
            "images": self.batch,
            "device": facts.get("device"),
            "gpu": facts.get("gpu"),
            "time": time.time(),
            "phases": phases,
            "extrapolated": self.is_extrapolated,
            "image_seconds": self.image_seconds(),
            "start": self.start,
            "waited": self.waited,
            "memory": self.memory(self.batch),
            "memory_between": self.memory_spread(),
            "limit": self.limit,
            "device_batch": self.fitting(),
            "disk": next((run.disk for run in self.runs.values() if run.disk is not None), None),
            "problem": self.problem(),
            "missing": self.missing,
            "measured": measured,
        }


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _short(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 100 else f"{seconds:.0f}"


def _between(size: float, ends: Sequence[float] | None) -> str:
    """A size, and between what it lies where that makes a difference."""
    low, high = (_gib(end) for end in ends or (size, size))
    return _gib(size) if low == high else f"{_gib(size)} ({low.removesuffix(' GiB')} to {high})"


def cases_of(jobs: Iterable[Job]) -> list[Case]:
    """The cases that the cells are of that are not done, in their order."""
    found: dict[str, Case] = {}
    for job in jobs:
        if not job.is_done:
            key, length = case_key(job.config), length_key(job.config)
            case = found.setdefault(key, Case(key))
            case.cells.setdefault(length, job.config)
            case.ids.setdefault(length, []).append(job.id)
            case.texts.append(job.text)
    return list(found.values())


def merged(before: Iterable[Config], now: Iterable[Config]) -> list[Config]:
    """The cases of a table's file: those of earlier commands that are not measured anew, and those of this one.

    A case that is keeps the lengths of cells that this command has not asked for. Nothing is known of the device of one
    that could not be built.
    """
    found = {(case["key"], case["device"]): case for case in before}
    for case in now:
        found.pop((case["key"], None), None)
        mark = case["key"], case["device"]
        asked = {length["key"] for length in case["lengths"]}
        others = [length for length in found.pop(mark, {"lengths": ()})["lengths"] if length["key"] not in asked]
        found[mark] = {**case, "lengths": [*case["lengths"], *others]}
    return list(found.values())


_known: dict[tuple[Any, ...], Case] = {}  # of the tables that this command has rehearsed before


def _title(record: Mapping[str, Any]) -> str:
    """What a case is."""
    networks = [record[role]["name"] for role in ("student", "teacher") if record[role]]
    size = record["dataset"]["crop_size"] or record["dataset"]["image_size"]
    sides = "x".join(map(str, size)) if isinstance(size, list) else f"{size}x{size}"
    return f"{record['method']} {' < '.join(networks)} {record['dataset']['name']} {sides}"


def _outcome(record: Mapping[str, Any]) -> str:
    """What is found of a case, in short."""
    steps = [phase["seconds"] for phase in record["phases"] if phase["seconds"] is not None]
    found = [f"{_short(max(steps))} s a step"] if steps else []
    found += [_gib(record["memory"])] if record["memory"] is not None else []
    return ", ".join(found + _notes(record))


def _notes(record: Mapping[str, Any]) -> list[str]:
    """What is to be said of a case beside its numbers."""
    busy = f"too slow: waited {100 * record['waited']:.0f} % of its time for a processor"
    return ([record["problem"]] if record["problem"] else []) + ([busy] if record["waited"] > BUSY else [])


def _show(name: str, records: Sequence[Config], missing: Sequence[str]) -> None:
    """Prints the cases as a table, and everything that is missing."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(width=220, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("case", "cells", "batch", "s/step", "ms/image scored", "memory", "device_batch", "a cell", "disk", "")
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "") else "right")
    titles = [_title(record) for record in records]
    for record, title in zip(records, titles, strict=True):
        steps = [phase["seconds"] for phase in record["phases"]]
        image, memory, disk = (record[key] for key in ("image_seconds", "memory", "disk"))
        seconds = [length["seconds"] for length in record["lengths"]]
        fitting, mark = record["device_batch"], "~" * record["extrapolated"]
        table.add_row(
            title if titles.count(title) == 1 else f"{title} ({record['texts'][0]})",
            str(sum(len(length["cells"]) for length in record["lengths"])),
            str(record["batch"]),
            " ".join("?" if each is None else mark + _short(each) for each in steps) or "-",
            "?" if image is None else f"{1e3 * image:.3g}",
            "?" if memory is None else mark + _between(memory, record["memory_between"]),
            "none" if fitting is None else "null" if fitting == record["images"] else str(fitting),
            "?" if None in seconds else " to ".join(dict.fromkeys(map(in_words, (min(seconds), max(seconds))))),
            "?" if disk is None else _gib(disk),
            ", ".join(_notes(record)),
        )
    console.print(table)
    lengths = [(length["seconds"], len(length["cells"])) for record in records for length in record["lengths"]]
    known = sum(seconds * cells for seconds, cells in lengths if seconds is not None)
    unknown = sum(cells for seconds, cells in lengths if seconds is None)
    disk = sum((record["disk"] or 0) * len(length["cells"]) for record in records for length in record["lengths"])
    devices = ", ".join(dict.fromkeys(record["device"] for record in records if record["device"]))
    left = f" and {unknown} cells of which nobody knows" if unknown else ""
    count = sum(cells for _, cells in lengths)
    console.print(f"{name}: {count} cells, {in_words(known)}{left}, {_gib(disk)} on the disk")
    console.print(
        f"measured on {devices or 'no device'}; updates whose images have to be read and changed first take longer"
    )
    if any(record["extrapolated"] for record in records):
        console.print("~: extrapolated from fewer images than a batch; in brackets what other pairs of them give")
    if any(record["waited"] > BUSY for record in records):
        console.print("other processes kept the processors busy: on a machine of its own it takes less; rehearse again")
    for line in missing:
        console.print(f"missing: {line}", soft_wrap=True)


def rehearse(name: str, jobs: Sequence[Job], kind: bool | str, output_root: str, scale: str) -> int:
    """Rehearses cells that are not done; prints what is found and writes it to `rehearsals/` in the output folder.

    Args:
        name: What they are together.
        jobs: The cells.
        kind: True, or `synthetic` for images that are drawn in the place of all data that are not embedded.
        output_root: Where cells live.
        scale: The scale's name, for the file's.

    Returns:
        2 where a file, weights or a class is missing, 3 where a case failed as its training would, else 0.

    Raises:
        UserError: There are several processes.
    """
    if launched() > 1:
        raise UserError(f"rehearse={str(kind).lower()}: expected one process; there are {launched()}")
    cases, display = cases_of(jobs), Display()
    if not cases:
        print(f"{name}: nothing to train")
        return 0
    dense = any(case.config["dataset"]["task"] != "classification" for case in cases)
    path = rehearsals_of(output_root) / f"{name}-{scale}.json"
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _printing_to(path.with_suffix(".log")):
        preload(("experiments.measure", *STEP_IMPORTS, *(DENSE_IMPORTS if dense else ())))
    records: list[Config] = []
    missing = dict.fromkeys(line for job in jobs for line in job.absent)
    with tempfile.TemporaryDirectory(prefix="kt-rehearsal-") as folder:
        stage = Stage(Path(folder), path.with_suffix(".log"), kind == SYNTHETIC)
        for number, case in enumerate(cases, 1):
            places = case.config["data_root"], case.config["device"], stage.synthetic
            mark = (case.key, *case.cells, *places)
            if mark not in _known:
                try:
                    case.rehearse(stage)
                except KeyboardInterrupt:
                    measured = (
                        f"{len(records)} of {len(cases)} cases are in {path}" if records else "no case is measured"
                    )
                    raise KeyboardInterrupt(f"{measured}; the same command measures all of them again") from None
                _known[mark] = case
            case.runs, case.limit = _known[mark].runs, _known[mark].limit
            records.append({**case.record(), "synthetic": stage.synthetic})
            missing |= dict.fromkeys(case.missing)
            display.line(f"[{number}/{len(cases)}] {_title(records[-1])}: {_outcome(records[-1])}")
            with writing(path.parent):  # each at once: who interrupts hours of them keeps what was measured
                head = {"version": REHEARSAL_VERSION, "name": name, "scale": scale}
                kept = merged(rehearsed_cases(path), records[-1:])
                write_json(path, {**head, "cases": kept, "missing": [*missing]})
    _show(name, records, [*missing])
    print(path)
    if missing:
        return 2
    return 3 if any(case.failed for case in cases) else 0
