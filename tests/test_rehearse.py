"""Rehearsals: what is measured of a cell, what is made of it, and what they say is missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from PIL import Image

from configs import composed, table
from experiments import measure, rehearse  # `measure` here, and not in every process that measures
from experiments.cell import run_cell
from experiments.meaning import settle
from experiments.plan import Job, case_key, rehearsed_cases
from experiments.rehearse import Case, Run, Stage, cases_of, extrapolated, merged, spread
from experiments.run import main
from kt.data import DATASETS, build_data
from kt.data.loaders import ImageLoader, ResidentLoader
from kt.data.synthetic import stand_in
from kt.models import build_network
from kt.store import folder_of

SMALL = ("student=resnet8", "dataset.image_size=16", "dataset.train_size=40", "dataset.test_size=12", "threads=1")
SMALL += ("schedule.batch_size=8", "schedule.epochs=3", "wandb.mode=disabled", "device=cpu")
DENSE = ("dataset=scenes_seg", "student=pspnet_mobilenet_v2", "dataset.image_size=[32,64]", "dataset.crop_size=null")
DENSE += ("dataset.train_size=12", "dataset.test_size=6", "schedule.batch_size=4", "schedule.iterations=6")
DENSE += ("schedule.interval=3", "student.network.width=0.125", "threads=1", "wandb.mode=disabled", "device=cpu")
REASON = "mmdet and mmseg are not installed (bash install.sh full)"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Where to measure, with time enough on a busy machine."""
    monkeypatch.setattr(rehearse, "CASE_SECONDS", 300.0)
    return Stage(tmp_path, tmp_path / "log.txt", False)


def case_of(tmp_path: Path, *overrides: str) -> Case:
    config = settle(composed(*overrides, f"output_root={tmp_path / 'out'}"))
    return Case(case_key(config), {"one": config}, {"one": ["a"]})


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """All tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for each in state.values() if isinstance(state, dict) else state:
            yield from tensors(each)


def test_what_is_linear_is_found_from_two_points() -> None:
    line = np.polynomial.Polynomial([500.0, 3.0])
    measured = {0: 0.0, **{images: float(line(images)) for images in (2, 4)}}
    for images in (1, 2, 64):
        assert extrapolated(measured, images) == pytest.approx(float(line(images)))
    # Of two numbers that noise has swapped, the larger batch tells, in proportion.
    assert extrapolated({0: 0.0, 2: 5.0, 4: 4.0}, 8) == 8.0
    assert extrapolated({0: 1.0, 2: 3.0}, 8) == 9.0


def test_what_is_not_linear_is_given_with_its_ends() -> None:
    assert spread({0: 1.0, 2: 3.0, 4: 5.0}, 8) == (9.0, 9.0) and spread({0: 1.0, 2: 3.0, 8: 7.0}, 8) == (7.0, 7.0)
    # Another algorithm sets in from 2 to 4: lines through (0, 1) and (2, 2), (0, 1) and (4, 9), (2, 2) and (4, 9).
    assert spread({0: 1.0, 2: 2.0, 4: 9.0}, 8) == (5.0, 23.0)
    assert spread({0: 0.0, 2: 2.0, 4: 2.0}, 8) == (2.0, 8.0)  # what falls or stays is level
    # With three numbers measured, what there is without images tells no more.
    assert spread({0: 99.0, 2: 2.0, 4: 9.0, 8: 23.0}, 16) == (51.0, 51.0)


@pytest.mark.parametrize(
    ("groups", "own", "free"),
    [
        ("0::/\n", {}, 20),  # a machine's own processes
        ("0::/\n", {"": "max 9 3"}, 20),
        ("0::/elsewhere/on/the/host\n", {"": "16 10 4"}, 10),  # a container, which does not see where it is
        ("0::/job_1/step_0\n", {"": "max 9 0", "job_1": "12 5 1", "job_1/step_0": "max 5 1"}, 8),  # Slurm's
        ("3:cpu,memory:/a:b\n1:cpu:/\n0::/\n", {"memory": "99 0 0", "memory/a:b": "9 7 5"}, 7),
    ],
)
def test_free_memory_is_what_the_control_groups_leave(
    tmp_path: Path, groups: str, own: dict[str, str], free: int
) -> None:
    """Sizes in GiB: of each group its limit, what it has taken, and what of that is files that may be given up."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:    {20 << 20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for group, sizes in own.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        limit, used, files = (each if each == "max" else str(int(each) << 30) for each in sizes.split())
        names = ("limit_in_bytes", "usage_in_bytes", "total_") if group.startswith("memory") else ("max", "current", "")
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"active_file 77\n{names[2]}inactive_file {files}\n")
    assert rehearse.free_memory(tmp_path) == (free - 1) << 30


@pytest.mark.parametrize(
    "overrides",
    [
        (*SMALL, "method=kd_fixed_feature", "teacher=resnet20"),
        (*SMALL, "method=kcd", "teacher=resnet20", "method.update_every=2"),  # reads the images before epochs 0 and 2
        (*DENSE, "method=none"),
    ],
    ids=["classification", "kcd", "segmentation"],
)
def test_a_rehearsal_foretells_what_a_training_leaves(
    tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str]
) -> None:
    if DENSE[0] in overrides:
        pytest.importorskip("mmdet", reason=REASON)
    case = case_of(tmp_path, *overrides)
    case.rehearse(stage)
    found = case.record()
    assert found["problem"] == "" and not case.missing, stage.log.read_text()
    assert [run.ended for run in case.runs.values()] == ["done"] * len(case.runs)
    assert set(case.runs) == {2, 4, case.batch}
    assert 0 < case.runs[2].memory <= case.runs[4].memory * 1.1 and found["device_batch"] == case.batch
    read: list[int] = []  # batches of a pass over images as they are, by a training alone
    plain = ImageLoader.plain

    def watched(self: ImageLoader, by_class: bool = False) -> ImageLoader:
        found = plain(self, by_class)
        read.append(len(found))
        return found

    monkeypatch.setattr(ImageLoader, "plain", watched)
    result = run_cell(case.config)
    length = found["lengths"][0]
    assert [
        batches for times, batches in zip(length["surveys"], length["batches"], strict=True) for _ in range(times)
    ] == read
    assert all(
        (phase["survey"] != (0.0, 0.0)) == (times > 0)
        for phase, times in zip(found["phases"], length["surveys"], strict=True)
    )
    names = [each["name"] for each in found["phases"]]
    steps = dict(zip(names, found["lengths"][0]["steps"], strict=True))
    assert steps == {each["name"]: each["steps"] for each in result["phases"]}
    cell = folder_of(tmp_path / "out", result["id"])
    scored = [row for row in (cell / "metrics.jsonl").read_text().splitlines() if '"kind": "eval"' in row]
    assert found["lengths"][0]["evaluations"] == len(scored)
    kept = [torch.load(path, weights_only=True) for path in cell.rglob("*.pth")]
    numbers = sum(each.numel() * each.element_size() for state in kept for each in tensors(state))
    assert found["disk"] == numbers


def faked(tmp_path: Path, *overrides: str, limit: float, tested: int = 20, **runs: Run) -> Case:
    """A case of batch 8 of which so much is known: two phases of 10 and 5 updates, and 3 scores of so many images."""
    case = case_of(tmp_path, *SMALL, *overrides)
    for run in runs.values():
        run.facts = {"phases": ["one", "train"], "device": "abacus", "gpu": False, "limit": None}
        run.lengths = [{"steps": [10, 5], "batches": [7, 7], "evaluations": 3, "test_size": tested}]
    case.limit, case.runs = int(limit * 2**30), {run.images: run for run in runs.values()}
    return case


def run(
    images: int, memory: float, steps: dict[int, list[float]], evaluation: float | None, ended: str = "done"
) -> Run:
    """A run that started in 6 s; before 2 epochs of its last phase it reads the training set, a second an image."""
    surveys = {0: {"batch": 0.0, "rest": 0.0, "times": [0]}, 1: {"batch": 1.0 * images, "rest": 0.5, "times": [2]}}
    found = Run(images, {}, (), steps, evaluation, int(memory * 2**30), 2**30, 7, ended=ended, start=4.0 + images)
    found.surveys = {index: surveys[index] for index in steps}
    return found


def test_seconds_and_memory_go_to_the_batch(tmp_path: Path) -> None:
    two = run(2, 3, {0: [9.0, 1.0], 1: [9.0, 4.0]}, 2.0)
    four = run(4, 5, {0: [9.0, 1.5, 1.6, 1.4], 1: [9.0, 4.0]}, 3.0)
    case = faked(tmp_path, "method=none", limit=8, two=two, four=four)
    # A phase that seems to take as long for 4 as for 2 images takes at least in proportion to 4.
    assert case.step_seconds() == [pytest.approx(2.5), pytest.approx(8.0)]
    assert case.image_seconds() == pytest.approx(0.55)
    surveys = 2 * (7 * 8 * 1.0 + 0.5)
    assert case.seconds() == {"one": pytest.approx(6 + 10 * 2.5 + 5 * 8 + surveys + 3 * 20 * 0.55)}
    assert case.problem() == "does not fit: needs 9.0 GiB, 8.0 GiB are free" and case.fitting() == 4
    case.limit = 2 * 2**30
    assert case.fitting() == 1
    assert faked(tmp_path, limit=8, tested=3, two=two, four=four).image_seconds() == 3.0 / 3  # more there are not
    whole = faked(tmp_path, "method=crd", "teacher=resnet20", limit=8, two=two, four=four)
    assert whole.fitting() is None  # its images depend on one another
    whole.limit *= 2
    assert whole.fitting() == 8 and whole.problem() == ""
    halves = faked(tmp_path, "method=none", "schedule.device_batch=4", limit=8, two=two, four=four)
    assert halves.step_seconds() == [pytest.approx(2 * 1.5), pytest.approx(2 * 4.0)] and halves.problem() == ""


def test_a_cell_without_a_training_is_of_the_case_of_its_network(tmp_path: Path, stage: Stage) -> None:
    """A table that compares trained with untrained networks has both."""
    cells = [settle(composed(*SMALL, "method=none", f"schedule.epochs={epochs}")) for epochs in (0, 3)]
    jobs = [Job(str(n), [], config, f"{n}", [], {"status": "missing"}) for n, config in enumerate(cells)]
    (case,) = cases_of(jobs)
    case.runs = {8: stage.measure([case.config, *case.cells.values()], 8, 300.0)}
    untrained, trained = case.lengths.values()
    assert (untrained["steps"], trained["steps"], untrained["surveys"]) == ([0], [15], [0])
    (least, most), (step,), image = case.seconds().values(), case.step_seconds(), case.image_seconds()
    assert None not in (least, most, step, image, case.start)
    assert least == pytest.approx(case.start + 12 * image) and step > 0  # type: ignore[operator]
    assert most == pytest.approx(case.start + 15 * step + trained["evaluations"] * 12 * image)  # type: ignore[operator]
    assert [len(length["cells"]) for length in case.record()["lengths"]] == [1, 1]


def test_memory_without_images_is_that_of_weights_gradients_and_momentum(
    tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_held", lambda device: 1000)
    case = case_of(tmp_path, *SMALL, "method=none", "schedule.optimizer=sgd", "schedule.momentum=0.9")
    found = stage.measure([case.config], 2, 300.0)
    network = build_network("resnet8", num_classes=10, width=case.config["student"]["network"]["width"])
    assert found.fixed == 1000 + 2 * sum(4 * each.numel() for each in network.parameters())


def test_the_peak_is_that_of_the_passes(tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and building may have taken more, and gave it back, if not to the system."""
    config = case_of(tmp_path, *SMALL, "method=none").config
    plain = stage.measure([config], 2, 300.0)
    build = measure.Rehearsal.build

    def wasteful(self: Any) -> Any:
        np.ones(400 << 20, np.uint8)
        blocks = [bytes(1000) for _ in range(300_000)]
        self.last = blocks.pop()  # keeps the heap from shrinking
        return build(self)

    monkeypatch.setattr(measure.Rehearsal, "build", wasteful)
    found = stage.measure([config], 2, 300.0)
    assert 0 < found.fixed < plain.fixed + (100 << 20)
    assert 0 < found.memory < found.fixed + (200 << 20)


@pytest.mark.parametrize("resident", ["null", "true", "false"])
@pytest.mark.parametrize("augmentation", ["none", "imagenet"])
def test_images_that_stay_decoded_count(
    tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch, augmentation: str, resident: str
) -> None:
    for split, side in ("train", 300), ("val", 200):
        for number in range(4):
            folder = tmp_path / "own" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side)).save(folder / f"{number}.png")
    keys = ("dataset=imagefolder", "dataset.folder=own", f"data_root={tmp_path}", "dataset.image_size=32")
    keys += (f"dataset.augmentation={augmentation}", f"dataset.resident={resident}", "schedule.batch_size=4")
    config = case_of(tmp_path, "student=resnet8", "method=none", "device=cpu", "schedule.epochs=1", *keys).config
    data = build_data(config["dataset"], tmp_path, batch_size=4, seed=0, workers=0)
    kept = [
        loader.images.nbytes
        if isinstance(loader, ResidentLoader)
        else sum(a.nbytes for a in loader.dataset.kept.values())
        for loader in (data.train, data.test)
    ]
    assert (sum(kept) > 0) == (resident != "false")
    monkeypatch.setattr(measure, "_held", lambda device: 0)
    monkeypatch.setattr(measure, "peak_memory", lambda device: 0)
    found = stage.measure([config], 2, 300.0)
    assert found.ended == "done" and found.memory == sum(kept) < found.fixed


class Told:
    """Takes the place of a stage: a process over so many images has this cost, in seconds and GiB, and these ends."""

    def __init__(self, seconds: float, memory: float, limit: float, ends: dict[int, str]):
        self.seconds, self.memory, self.limit, self.ends = seconds, memory, limit, ends

    def measure(self, configs: Sequence[Any], images: int, seconds: float) -> Run:
        found = run(images, 1 + self.memory * images, {0: [9.0, self.seconds * images]}, 0.0)
        found.facts = {"phases": ["train"], "device": "abacus", "gpu": False, "limit": int(self.limit * 2**30)}
        length = {"steps": [10], "batches": [5], "evaluations": 0, "test_size": 20}
        found.lengths = [length] * (len(configs) - 1)
        found.surveys = {0: {"batch": 0.0, "rest": 0.0, "times": [0] * len(found.lengths)}}
        found.ended, found.seconds = self.ends.get(images, "done"), 3 * self.seconds * images
        if found.ended != "done":
            found.memory //= 9  # it has not come so far
        return found


@pytest.mark.parametrize(
    ("seconds", "memory", "limit", "ends", "measured", "fitting"),
    [
        (0.1, 1, 9, {}, [2, 4, 8], 8),
        (0.1, 1, 8.5, {}, [2, 4], 4),  # the device's memory, not the machine's
        (1.0, 1, 99, {}, [2, 4], 8),  # the time is over before eight images are
        (3.0, 1, 99, {}, [2], 8),  # and here before four are
        (0.73, 1, 99, {}, [2, 4], 8),  # what six images have taken counts as well
        (0.1, 1, 9, {4: "memory"}, [2, 4], 2),
        (0.1, 1, 9, {2: "memory"}, [2, 1], 1),
    ],
)
def test_how_many_images_are_measured(
    tmp_path: Path, seconds: float, memory: float, limit: float, ends: dict[int, str], measured: list[int], fitting: int
) -> None:
    case, told = case_of(tmp_path, *SMALL, "method=none"), Told(seconds, memory, limit, ends)
    case.rehearse(told)  # type: ignore[arg-type]
    assert ([*case.runs], case.fitting()) == (measured, fitting)
    assert case.limit == limit * 2**30 and case.lengths["one"]["steps"] == [10]
    assert case.memory(8) == (1 + 8 * memory) * 2**30


@pytest.mark.parametrize("passes", [1, 4])
def test_more_images_are_measured_where_the_whole_batch_takes_too_long(tmp_path: Path, passes: int) -> None:
    """At a third of a second an image 14 are left after 2 and 4: too few for 32, enough for 8, of one pass or not."""
    keys = ("schedule.batch_size=32", f"schedule.device_batch={32 // passes}", "method=none")
    case = case_of(tmp_path, *SMALL, *keys)
    case.rehearse(Told(1 / 3, 1, 99, {}))  # type: ignore[arg-type]
    assert [*case.runs] == [2, 4, 8] and case.is_extrapolated == (passes == 1)


def test_a_rehearsal_of_other_rows_keeps_those_before() -> None:
    def made(key: str, seconds: float, *lengths: str, device: str | None = "abacus") -> dict[str, Any]:
        told = [{"key": length, "seconds": seconds} for length in lengths]
        return {"key": key, "device": device, "lengths": told, "seconds": seconds}

    def told(cases: Sequence[dict[str, Any]]) -> dict[tuple[str, Any], dict[str, float]]:
        return {(c["key"], c["device"]): {each["key"]: each["seconds"] for each in c["lengths"]} for c in cases}

    before = [made("kd", 1, "long", "short"), made("at", 1, "long"), made("ab", 1, "long", device=None)]
    now = [made("kd", 2, "short", "tiny"), made("ab", 2, "long"), made("at", 2, "long", device="slide rule")]
    assert told(merged(before, now)) == {
        ("kd", "abacus"): {"short": 2, "tiny": 2, "long": 1},
        ("at", "abacus"): {"long": 1},
        ("at", "slide rule"): {"long": 2},
        ("ab", "abacus"): {"long": 2},
    }


def test_rows_are_rehearsed_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their file holds all of them; which one others have slowed down is said."""

    def rehearsed_at_once(case: Case, stage: Stage) -> None:
        found = Told(0.1, 1, 9, {}).measure([*range(1 + len(case.cells))], case.batch, 60.0)
        found.waited = 0.75 if case.config["method"]["name"] == "at" else 0.05
        case.runs = {case.batch: found}

    monkeypatch.setattr(rehearse, "_known", {})
    monkeypatch.setattr(Case, "rehearse", rehearsed_at_once)
    table = ("+table=imagenet_compression", f"output_root={tmp_path / 'out'}")
    printed: dict[str, str] = {}
    for row in "kd", "at":
        assert main([*table, "rehearse=true", f"rows={row}"]) == 0
        printed[row] = capsys.readouterr().out
    assert "waited 75 % of its time for a processor" in printed["at"] and "waited" not in printed["kd"]
    (path,) = (tmp_path / "out" / "rehearsals").glob("*.json")
    assert sorted(case["method"] for case in rehearsed_cases(path)) == ["at", "kd", "none"]
    assert main([*table, "rows=kd,at", "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "(from 3 rehearsed cases on abacus" in said and "abacus, slowed down by other processes" in said


def test_what_time_allows_is_said(tmp_path: Path) -> None:
    none = faked(tmp_path, limit=8, two=run(2, 0, {}, None, "slow"))
    assert (
        none.problem() == "2 images take more than 300 s a step"
        and none.seconds() == {"one": None}
        and none.memory(8) is None
    )
    one = faked(tmp_path, limit=99, two=run(2, 3, {0: [9.0]}, None, "slow"))
    assert one.step_seconds() == [36.0, None] and one.seconds() == {"one": None} and one.memory(8) == 9 * 2**30
    assert one.problem() == "not all of it could be measured in time"


def test_what_does_not_fit_is_named_and_leaves_the_machine_alive(
    tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearse, "free_memory", lambda: 64 << 20)
    keys = ("dataset.image_size=2400", "schedule.batch_size=8", "schedule.epochs=3", "threads=1", "device=cpu")
    case = case_of(tmp_path, "student=resnet8", "dataset=cifar100", *keys)
    case.rehearse(dataclasses.replace(stage, synthetic=True))
    assert [run.ended for run in case.runs.values()] == ["memory", "memory"], stage.log.read_text()
    assert case.problem().startswith("does not fit: 1 images need more than the ")
    assert case.fitting() is None and case.seconds() == {"one": None}


def test_cells_that_take_the_same_are_one_case() -> None:
    points = ("seed=0,1", "method=kd,at", "method.alpha=0.1,0.9", "dataset.subset=100,200")
    jobs = [*table("imagenet_compression", *points).jobs.values()]
    for job in jobs:
        job.status = {"status": "missing"}
    found = {case.config["method"]["name"]: case for case in cases_of(jobs)}
    counts = {name: [len(ids) for ids in case.ids.values()] for name, case in found.items()}
    assert counts == {"none": [1, 1], "kd": [4, 4], "at": [2, 2]} and len(jobs) == 14
    assert all(case.config["dataset"]["subset"] == 200 for case in found.values())
    jobs[-1].status = {"status": "done"}
    assert sum(len(ids) for case in cases_of(jobs) for ids in case.ids.values()) == 13


def rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], list[dict]]:
    """Exit status, missing lines and cases of a command."""
    status = main([*arguments, f"output_root={tmp_path / 'out'}", f"data_root={tmp_path}", "threads=1", "device=cpu"])
    printed = capsys.readouterr().out.splitlines()
    (path,) = (tmp_path / "out" / "rehearsals").glob("*.json")
    written = json.loads(path.read_text())
    lines = [line.removeprefix("missing: ") for line in printed if line.startswith("missing: ")]
    assert lines == written["missing"]
    assert not list((tmp_path / "out").glob("cells/*"))  # nothing counts
    return status, lines, written["cases"]


def test_a_normalisation_of_one_value_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Stage
) -> None:
    one = ("student=resnet18", "schedule.batch_size=1", "rehearse=true")
    status, lines, (case,) = rehearsed(tmp_path, capsys, *SMALL, *one)
    assert (status, lines) == (3, [])
    assert case["problem"].startswith("student.network.layer3.0.bn1 sees one value per channel at 1 images")


def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(case: Case, stage: Stage) -> None:
        if measured:
            raise KeyboardInterrupt
        measured.append(case.config["method"]["name"])
        case.runs[2] = Run(2, ended="done", why="", missing=("nothing.txt: is not there",))

    monkeypatch.setattr(Case, "rehearse", measure)
    jobs = table("imagenet_compression", f"output_root={tmp_path}").jobs
    for job in jobs.values():
        job.status = {"status": "missing"}
    with pytest.raises(KeyboardInterrupt, match=r"^1 of 7 cases are in .*some-mini\.json; the same .* again$"):
        rehearse.rehearse("some", [*jobs.values()], True, str(tmp_path), "mini")
    written = json.loads((tmp_path / "rehearsals" / "some-mini.json").read_text())
    assert [case["method"] for case in written["cases"]] == measured
    assert written["missing"] == ["nothing.txt: is not there"]


def test_an_interrupt_before_the_first_case_ends_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Case, "rehearse", interrupt)
    assert main([*SMALL, "rehearse=true", f"output_root={tmp_path}"]) == 130
    said = "kt: interrupted; no case is measured; the same command measures all of them again\n"
    assert capsys.readouterr().err.endswith(said)
    assert not list(tmp_path.glob("rehearsals/*.json"))


def test_the_first_step_and_score_only_find_out_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, told = itertools.cycle([5.0, 0.3]), list[dict[str, Any]]()
    monkeypatch.setattr(measure, "_limit", lambda room: None)
    monkeypatch.setattr(measure, "timed", lambda call, device: (call(), next(seconds))[1])
    case = case_of(tmp_path, *SMALL, "method=none")
    measure.measure([case.config], 2, tmp_path, False, 0, told.append)
    assert [message["seconds"] for message in told if "phase" in message] == [5.0, 0.3]
    assert [message["evaluation"] for message in told if "evaluation" in message] == [0.3]


@pytest.mark.parametrize("kind", ["true", "synthetic"])
def test_everything_missing_is_in_one_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Stage, kind: str
) -> None:
    pair = ("method=at", "teacher=resnet20", "student=resnet8", "dataset=cifar100", "dataset.image_size=16")
    short = ("schedule.batch_size=8", "schedule.epochs=1", "scale=paper")
    absent = tmp_path / "absent.pth"
    status, lines, (case,) = rehearsed(
        tmp_path, capsys, *pair, *short, f"teacher.checkpoint={absent}", f"rehearse={kind}"
    )
    assert status == 2 and case["problem"] == "" and case["lengths"][0]["steps"] == [6250]
    assert [f"cifar100 in {tmp_path}: is not there" in line for line in lines].count(True) == 1
    assert [str(absent) in line for line in lines].count(True) == 1
    assert any("expected the official cifar-100-python/" in line for line in lines) == (kind == "true")


def test_data_of_other_classes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Stage) -> None:
    layouts.cifar100(tmp_path)
    short = ("student=resnet8", "dataset=cifar100", "schedule.batch_size=8", "schedule.epochs=1")
    status, lines, _ = rehearsed(tmp_path, capsys, *short, "rehearse=true")
    assert status == 2 and lines == ["dataset.num_classes=100: cifar100 has 20 classes (leave it null)"]


def test_data_that_are_there_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Stage) -> None:
    layouts.cifar100(tmp_path)
    short = ("student=resnet8", "dataset=cifar100", "schedule.batch_size=4", "schedule.epochs=1")
    status, lines, (case,) = rehearsed(tmp_path, capsys, *short, "dataset.num_classes=20", "rehearse=true")
    assert (status, lines) == (0, []) and case["lengths"][0]["steps"] == [5]


@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if spec.published])
def test_images_stand_in_for_every_published_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(DATASETS, name, DATASETS[name])
    stand_in(name)
    for task in DATASETS[name].readers:
        if dense := task != "classification":
            pytest.importorskip("mmdet", reason=REASON)
        dataset: dict[str, Any] = {**DATASETS[name].defaults, "name": name, "task": task, "augmentation": "none"}
        dataset = {key: value for key, value in dataset.items() if key != "stand_in"}
        dataset |= {"image_size": [32, 64] if dense else 16, "num_classes": None if task == "depth" else 8}
        if not dense:
            dataset["resident"] = False  # so small, even ImageNet would be held in memory: a million images, read first
        data = build_data(dataset, tmp_path, batch_size=2, seed=0, workers=0, cache_root=tmp_path / "cache")
        domain = dataset.get("domain") or ""
        assert (data.spec.train_size, data.spec.test_size) == DATASETS[name].published[domain]
        assert data.spec.num_classes == (1 if task == "depth" else 8)
        batch = next(data.train.epoch(0))
        assert batch["inputs"][0].shape == (3, *((32, 64) if dense else (16, 16)))


def test_the_fewest_images_have_time_of_their_own(tmp_path: Path) -> None:
    given: dict[int, float] = {}

    class Watch(Stage):
        def measure(self, configs: Any, images: int, seconds: float) -> Run:
            given[images] = seconds
            return Run(images, facts={"phases": ["train"]}, ended="done", seconds=5.0)

    case_of(tmp_path, *SMALL).rehearse(Watch(tmp_path, tmp_path / "log.txt", False))
    left = rehearse.CASE_SECONDS - 5.0
    assert given == {2: rehearse.FEWEST_SECONDS, 4: left, 8: left - 5.0}


def test_one_image_has_time_of_its_own_where_two_are_too_much(tmp_path: Path) -> None:
    given: dict[int, float] = {}

    class Narrow(Stage):
        def measure(self, configs: Any, images: int, seconds: float) -> Run:
            given[images] = seconds
            known = {"facts": {"phases": ["train"]}, "fixed": 1 << 30, "seconds": 30.0}
            if images > 1:
                return Run(images, **known, ended="memory")
            return Run(images, **known, ended="done", steps={0: [9.0, 8.0]}, memory=17 << 30)

    case = case_of(tmp_path, *SMALL)
    case.rehearse(Narrow(tmp_path, tmp_path / "log.txt", False))
    assert given == {2: rehearse.FEWEST_SECONDS, 1: rehearse.FEWEST_SECONDS}
    assert case.memory(8) == 129 << 30 and case.problem().startswith("does not fit: needs 129.0 GiB, ")


def test_batches_of_a_long_epoch_are_no_memory_of_passes(tmp_path: Path, stage: Stage) -> None:
    """Two images of 200,000 are one batch of 100,000, whose indices no training of the real batch holds."""
    short = ("dataset.subset=200000", "dataset.image_size=32", "dataset.resident=false", "method=none")
    case = case_of(tmp_path, "student=resnet8", "dataset=imagenet", *short, "threads=1", "device=cpu")
    found = dataclasses.replace(stage, synthetic=True).measure([case.config], 2, 100.0)
    assert found.ended == "done" and found.memory - found.fixed < 50 << 20, stage.log.read_text()
