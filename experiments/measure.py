"""What a rehearsal measures of a cell, in a process of its own: a few steps of each phase, and scores of one batch.

The cell is built as for its training and stepped by the engine's own loop. Networks of other cells have random weights,
whose passes take as long. What a phase makes of the training set before its steps, as knowledge consistent distillation
matches channels, is measured on the same batch. Nothing of it is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benched import timed
from experiments.build import (
    as_hidden,
    assemble,
    build_classifier,
    build_student,
    build_teacher,
    count_snapshots,
    peak_memory,
    read_data,
    read_source,
    set_threads,
)
from experiments.devices import own_memory, pick_device, processor, scheduled, share_waited
from experiments.meaning import Unnamed, is_of_library, needs_of, states_of
from experiments.plan import on_processor
from kt import clock
from kt.data import Data, DataSpec
from kt.data.images import kept_bytes
from kt.data.names import CLASSIFICATION, DATASETS
from kt.data.synthetic import is_stood_in, stand_in
from kt.engine import Engine, OneBatch, OneValueError, PhaseLoop, measured_loop, seed_everything
from kt.errors import UserError, is_out_of_memory
from kt.models.names import IMAGENET
from kt.needs import SNAPSHOTS, WEIGHTS, teacher_of
from kt.phase import TRAIN
from kt.settings import METHODS, SOURCE, Schedule, defaults, kinds
from kt.train import Stretch, plan_phases
from kt.transfer import TransferModel, export_student

Message = dict[str, Any]
# Steps of each phase, and scores: two, and more while they take not so many seconds; the first learns how to compute.
STEPS, MOST_STEPS, STEPPING_SECONDS = 2, 6, 1.0
DECODED = 8  # images at most of which the time to read one is taken


def size_of(state: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(size_of(value) for value in state.values())
    return sum(size_of(value) for value in state) if isinstance(state, list | tuple) else 0


def without_process(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method that replays no searched process: equal pathways, of which none is dropped, take the most time."""
    found = dict(method)
    if "process" in kinds(METHODS[method["name"]]):
        found |= {"process": "equal", "file": None}
    return {**found, "base": without_process(found["base"])} if found.get("base") else found


class Rehearsal:
    """One cell, built to be measured.

    Args:
        config: Its resolved config.
        images: Of a pass.
        folder: For whatever is written.
        synthetic: Whether images of the right shape take the place of all data that are not embedded.

    Attributes:
        missing: What is not there or does not fit, in lines.

    Raises:
        UserError: There is no such device.
    """

    def __init__(self, config: Mapping[str, Any], images: int, folder: Path, synthetic: bool):
        # Loaders of the real batch would decode all of it.
        schedule = {**config["schedule"], "batch_size": images, "device_batch": None}
        own = {"output_root": str(folder), "method": without_process(config["method"]), "schedule": schedule}
        self.config = {**config, **own}
        self.folder, self.synthetic = folder, synthetic
        self.missing: dict[str, None] = {}
        self._seen: dict[str, Any] = {}
        self.device = pick_device(config["device"])
        set_threads(config)

    def read(self, dataset: Mapping[str, Any], reader: Callable[..., Any] = read_data, schedule: Any = None) -> Any:
        """What a reader gives of a dataset; of its stand-in where that is asked for, or the data are not as expected.

        The schedule, where given, takes the place of the one of so many images a pass.

        Raises:
            UserError: Nobody knows enough of the dataset to stand in for it.
        """
        own = {**dataset, "resident": False}  # or all images would be decoded, to be used a few times: see `kept`
        config = {**self.config, "schedule": schedule or self.config["schedule"]}
        key = reader.__name__ + json.dumps([own, config["schedule"]], sort_keys=True)
        if self.synthetic:
            stand_in(dataset["name"])
        while key not in self._seen:
            try:
                self._seen[key] = reader(config, own, self.device, workers=0)
            except UserError as error:
                if is_stood_in(dataset["name"]):
                    raise
                self.missing[str(error)] = None
                stand_in(dataset["name"])
        return self._seen[key]

    def build(self) -> tuple[TransferModel, Data]:
        """The cell's model and data."""
        config, method = self.config, self.config["method"]
        data = self.read(config["dataset"])
        if source := method.get(SOURCE):
            data.further[SOURCE] = self.read(source, read_source)
        hidden: dict[str, Any] = {}
        for name, need in needs_of(config).items():
            if isinstance(need, Unnamed):
                self.missing[need.reason] = None
                hidden[name] = self._untrained(teacher_of(config, trained=False), data.spec)
            elif isinstance(need, Path):
                if name == "teacher":
                    hidden[name] = self._given_teacher(need, data.spec)
                elif not need.exists():
                    self.missing[f"method.file={need}: there is no such file"] = None
            elif need.file == WEIGHTS:
                hidden[name] = self._untrained(need.config, data.spec)
            elif need.file == SNAPSHOTS:
                count = count_snapshots(need.config) - 1  # the last one is the student itself
                hidden |= {f"{name}{number}": self._untrained(need.config, data.spec) for number in range(count)}
            else:
                raise UserError(f"method={method['name']}: needs {need.file} of cell={name}, which cannot be rehearsed")
        try:
            return assemble(config, data.spec, hidden, {})[0], data
        except UserError as error:
            if not (config["student"]["pretrained"] or config["student"]["checkpoint"]):
                raise
            self.missing[str(error)] = None
        return assemble(config, data.spec, hidden, {}, given=False)[0], data

    def length(self, model: TransferModel, config: Mapping[str, Any]) -> tuple[Message, list[Stretch]]:
        """How many updates each phase of a cell makes and how often its student is scored on how many images; phases.

        Of each phase `batches` are those of one pass over its training set.
        """
        data = self.read(config["dataset"], schedule=config["schedule"])
        if source := config["method"].get(SOURCE):
            data.further[SOURCE] = self.read(source, read_source, config["schedule"])
        settings = {**defaults(Schedule), **config["schedule"]}
        stretches = plan_phases(model, data, settings)
        scores = 1 + sum(_evaluations(stretch, settings["evaluate_every"]) for stretch in stretches)
        return {
            "steps": [stretch.steps for stretch in stretches],
            "batches": [len(stretch.loaders[TRAIN].plain()) for stretch in stretches],
            "evaluations": scores,
            "test_size": data.spec.test_size,
        }, stretches

    def kept(self, data: Data) -> tuple[int, float]:
        """Bytes of the images that the cell, unlike its rehearsal, keeps decoded on its device; seconds to read them.

        Where it computes on a GPU, images that are cut at random stay outside of it.
        """
        size, seconds = 0, 0.0
        sets = [(self.config["dataset"], data.train), (self.config["dataset"], data.test)]
        if SOURCE in data.further:
            sets.append((self.config["method"][SOURCE], data.further[SOURCE]))
        for dataset, loader in sets:
            if dataset["task"] != CLASSIFICATION or not (room := kept_bytes(loader, dataset["resident"])):
                continue
            if self.device.type == "cpu" or not loader.dataset.is_random:
                size += room
            some = loader.indices[:DECODED].tolist()
            began = time.perf_counter()
            for index in some:
                loader.dataset[index]
            seconds += (time.perf_counter() - began) / len(some) * len(loader.indices)
        return size, seconds

    def _given_teacher(self, path: Path, spec: Any) -> Any:
        """The user's teacher; where its file is none of it, one with random weights."""
        try:
            return build_teacher(self.config, spec, path)
        except UserError as error:
            self.missing[str(error)] = None
        return self._untrained(teacher_of(self.config, trained=False), spec)

    def _untrained(self, config: Mapping[str, Any], spec: Any) -> Any:
        """The student of a cell that this one needs, with random weights."""
        dataset = config["dataset"]
        if dataset["task"] == CLASSIFICATION and dataset["num_classes"]:  # its own rehearsal reads the data
            own = DataSpec(dataset["name"], dataset["num_classes"], dataset["image_size"], *IMAGENET, 0, 0, ())
        else:
            drawn = {"train_size": 4, "test_size": 4, "subset": None, "validation": 0.0}
            own = self.read({**dataset, **drawn} if DATASETS[dataset["name"]].embedded else dataset).spec
        return as_hidden(build_student(config, own, None, given=False)[0], spec)


def measure(
    configs: Sequence[Mapping[str, Any]],
    images: int,
    folder: Path,
    synthetic: bool,
    room: int,
    tell: Callable[[Message], None],
) -> None:
    """Measures a cell's passes over so many images.

    Args:
        configs: The resolved config, and those of cells like it that differ in length alone and are to be told.
        images: Of a pass; at most those that the schedule has.
        folder: For whatever is written, by other processes too; it also keeps what is drawn.
        synthetic: See `Rehearsal`.
        room: Bytes that this process may take beside those that it has, where it computes on the CPU.
        tell: Called with what is known as soon as it is: see the code of `experiments.rehearse.Run`.
    """
    rehearsal, began = None, time.perf_counter()
    try:
        config = configs[0]
        rehearsal = Rehearsal(config, images, folder, synthetic)
        if rehearsal.device.type == "cpu":
            _limit(room)
        if is_of_library(config) and not states_of(config):
            _take_weights(rehearsal, tell)
            none: Message = {"steps": [], "batches": [], "evaluations": 0, "test_size": 0}
            tell({"lengths": [none] * len(configs[1:]), "start": time.perf_counter() - began})
        else:
            model, data = rehearsal.build()
            kept, reading = rehearsal.kept(data)
            tell({"missing": [*rehearsal.missing], "start": time.perf_counter() - began + reading})
            lengths = [rehearsal.length(model, each) for each in configs[1:]]
            tell({"lengths": [length for length, _ in lengths]})
            _measure(rehearsal, model, data, images, kept, [stretches for _, stretches in lengths], tell)
        tell({"ended": "done", "why": ""})
    except OneValueError as error:
        tell({"ended": "norm", "why": error.layer})
    except UserError as error:
        tell({"missing": [*(rehearsal.missing if rehearsal else ())]})
        tell({"ended": "user", "why": str(error)})
    except Exception as error:  # nothing that one cell does may cost the others their rehearsal
        traceback.print_exc()
        why = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if is_out_of_memory(error):
            tell({"ended": "memory", "why": why})
        else:
            tell({"ended": "error", "why": why})


def _limit(room: int) -> None:
    """Lets the operating system refuse this process more memory, before the whole machine runs out of it."""
    if (held := own_memory("VmData")) is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (held + room, hard))


def _goes_on(taken: Sequence[float]) -> bool:
    """Whether what has taken so many seconds each time is done once more."""
    return len(taken) < STEPS or (len(taken) < MOST_STEPS and sum(taken) < STEPPING_SECONDS)


class _Watched(OneBatch):
    """The one batch, and the seconds that whoever goes through it has taken for it."""

    def __init__(self, batch: Any, device: torch.device):
        super().__init__(batch)
        self.device = device
        self.taken: list[float] = []

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """The batch, once."""
        for batch in super().epoch(epoch, first):
            began = clock.seconds(self.device)
            yield batch
            self.taken.append(clock.seconds(self.device) - began)

    def plain(self, by_class: bool = False) -> _Watched:
        """The same."""
        return self


class _Asked(Exception):
    """Somebody wants to read the training set."""


class _Unread:
    """A loader that says so where its images are asked for."""

    def __init__(self, loader: Any):
        self.loader, self.batch_size, self.passes = loader, loader.batch_size, loader.passes

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """Raises."""
        raise _Asked

    def plain(self, by_class: bool = False) -> _Unread:
        """The same."""
        return self


def _survey(loop: PhaseLoop, device: torch.device) -> tuple[float, float]:
    """Seconds of what a phase makes of the training set before its first epoch: of one batch, and of all the rest."""
    before, loop.epoch = loop.phase.before_epoch, 0
    if before is None:
        return 0.0, 0.0
    watched = _Watched(loop.loaders[TRAIN].batch, device)  # type: ignore[attr-defined]
    loop.loaders = {**loop.loaders, TRAIN: watched}
    found: list[tuple[float, float]] = []
    while not found or (len(found) < STEPS and watched.taken and sum(found[0]) < STEPPING_SECONDS):
        watched.taken.clear()
        whole = timed(lambda: before(loop.model, loop), device)
        found.append((sum(watched.taken), max(0.0, whole - sum(watched.taken))))
    return found[-1]  # the first one finds out how to compute


def _count_surveys(loop: PhaseLoop, stretch: Stretch) -> int:
    """Before how many of a phase's epochs it reads the training set."""
    before, count = loop.phase.before_epoch, 0
    loop.loaders = {name: _Unread(loader) for name, loader in stretch.loaders.items()}
    loop.max_epochs = stretch.epochs
    for loop.epoch in range(stretch.epochs if before is not None else 0):
        try:
            before(loop.model, loop)  # type: ignore[misc]
        except _Asked:
            count += 1
    return count


def _measure(
    rehearsal: Rehearsal,
    model: TransferModel,
    data: Data,
    images: int,
    kept: int,
    lengths: Sequence[Sequence[Stretch]],
    tell: Callable[[Message], None],
) -> None:
    """Steps and scores; `kept` is what images will take beside all that is there, `lengths` the phases of cells."""
    device, config = rehearsal.device, rehearsal.config
    settings = {**defaults(Schedule), **config["schedule"]}
    stretches = plan_phases(model, data, settings)
    own = Path(tempfile.mkdtemp(dir=rehearsal.folder))
    how = (config["precision"], config["activation_checkpointing"])
    engine = Engine(settings, device, own, config["seed"], *how)
    model.place(device)
    student = size_of(export_student(model))
    # An epoch of very small batches is very many of them, and what is drawn is drawn many at a time.
    batches = [{name: OneBatch(next(loader.epoch(0))) for name, loader in each.loaders.items()} for each in stretches]
    # Passes would hide in what all this has freed and glibc has kept.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # from here on the kernel's peak is that of the passes
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    facts = {"phases": [each.phase.name for each in stretches]}
    tell({"facts": facts | _device_facts(device), "fixed": (held := kept + _held(device))})
    seed_everything(config["seed"])
    before = scheduled()
    disk = student * (1 + min(count_snapshots(config), settings["epochs"] or 0))
    for index, stretch in enumerate(stretches):
        loaders = batches[index]
        batch = loaders[TRAIN].batch
        loop = measured_loop(model, stretch.phase, batch, engine, index)
        loop.loaders = loaders
        if stretch.phase.enter is not None:
            stretch.phase.enter(model)
        loop.epoch = loop.max_epochs - 1  # some methods do less in their first ones
        if stretch.phase.before_epoch is not None:
            stretch.phase.before_epoch(model, loop)
        taken: list[float] = []
        while _goes_on(taken):
            taken.append(timed(lambda: loop.step(batch), device))  # noqa: B023 - called at once
            tell({"phase": index, "seconds": taken[-1], "memory": kept + peak_memory(device)})
            tell({"waited": share_waited(before, scheduled())})
        optimizers = size_of(loop.runner.optim_wrapper.state_dict())
        # The checkpoint and the one before it.
        disk += min(2, stretch.epochs) * (size_of(model.state_dict()) + optimizers)
        tell({"fixed": held + optimizers + size_of([each for each in model.parameters() if each.requires_grad])})
        of_batch, rest = _survey(loop, device)
        times = [_count_surveys(loop, each[index]) if index < len(each) else 0 for each in lengths]
        survey = {"batch": of_batch, "rest": rest, "times": times}
        tell({"surveyed": index, "survey": survey, "memory": kept + peak_memory(device)})
    disk += size_of(model.method.keeps()) if stretches else 0
    tested = data.test.part(torch.arange(min(images, data.spec.test_size)))
    scored: list[float] = []
    while _goes_on(scored):
        scored.append(timed(lambda: data.score(model.student, loader=tested), device))
    waited = share_waited(before, scheduled())
    tell(
        {
            "evaluation": statistics.median(scored[1:]),
            "memory": kept + peak_memory(device),
            "disk": disk,
            "waited": waited,
        }
    )


def _take_weights(rehearsal: Rehearsal, tell: Callable[[Message], None]) -> None:
    """A cell of a library's weights without the data that would score them: see `experiments.build.keep_weights`."""
    student, dataset = rehearsal.config["student"], rehearsal.config["dataset"]
    shape = (student["network"], dataset["num_classes"], dataset["image_size"], None)
    try:
        network = build_classifier(*shape, student["pretrained"])
    except UserError as error:
        rehearsal.missing[str(error)] = None
        network = build_classifier(*shape)
    facts = {"phases": [], **_device_facts(rehearsal.device)}
    tell({"facts": facts, "missing": [*rehearsal.missing], "disk": size_of(network.state_dict())})
    taken = peak_memory(rehearsal.device)
    tell({"fixed": taken, "memory": taken, "evaluation": 0.0})


def _evaluations(stretch: Stretch, every: int) -> int:
    """How often the student is scored within a phase, see `kt.hooks.EvaluateHook`."""
    last = stretch.phase.name != TRAIN
    return ((stretch.epochs - 1) // every + last) if stretch.phase.evaluate else 0


def _held(device: torch.device) -> int:
    """Bytes that are taken before the first pass."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return own_memory("VmRSS") or 0


def _device_facts(device: torch.device) -> Message:
    """What computes, and of a GPU the bytes that are free and those that are taken already."""
    if device.type != "cuda":
        return {"device": on_processor(processor(), torch.get_num_threads()), "gpu": False, "limit": None}
    free, _ = torch.cuda.mem_get_info(device)
    limit = free + torch.cuda.memory_reserved(device)
    return {"device": torch.cuda.get_device_name(device), "gpu": True, "limit": limit}
