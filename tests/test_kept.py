"""What a cell keeps can be trusted: damage is noticed, mended or trained again, and the numbers stay the same."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kt
from checks import Interrupt, bits, without_speed
from configs import composed
from experiments.cell import content_hash, run_cell
from experiments.progress import Display
from kt.data.cache import kept
from kt.errors import UserError
from kt.store import folder_of, read_evaluation, read_result, read_status
from kt.train import fit
from method_settings import SCHEDULE, make_data, make_model
from tables.collect import collect

SMALL = ("teacher=resnet20", "student=resnet8", "dataset.image_size=24", "dataset.train_size=96")
SMALL += ("dataset.test_size=32", "schedule.epochs=4", "schedule.batch_size=48", "wandb.mode=disabled", "device=cpu")


def truncate(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit in the middle of the largest stretch of data."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, flip, Path.unlink)


def run(root: Path, *overrides: str) -> tuple[Path, dict[str, Any], str]:
    """A cell's folder, its result, and what is said on the way."""
    said = io.StringIO()
    result = run_cell(composed(*SMALL, f"output_root={root}", *overrides), Display(said))
    return folder_of(root, result["id"]), result, said.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells trained without any trouble: a student on its teacher's snapshots, and one on a transformed teacher."""
    root = tmp_path_factory.mktemp("whole")
    run(root, "method=rco")
    run(root, "method=kcd")
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    return shutil.copytree(whole, tmp_path / "outputs")


def content(folder: Path) -> tuple[Any, ...]:
    """What a cell's numbers are: its student and snapshots bit for bit, its records, its scores."""
    snapshots = {path.name: bits(torch.load(path)) for path in folder.glob("snapshots/*")}
    result = json.loads((folder / "result.json").read_text())
    return bits(torch.load(folder / "student.pth")), snapshots, without_speed(folder), result["metrics"]


KEPT = ("student.pth", "student.json", "metrics.jsonl", "result.json", "snapshots/epoch_1.pth")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("name", "method"), [*((name, "rco") for name in KEPT), ("transform.pth", "kcd")])
def test_damage_in_a_finished_cell_is_mended(
    root: Path, whole: Path, name: str, method: str, damage: Callable[[Path], None]
) -> None:
    """Of the teacher's cell when its student has still to be trained, and of a cell that is done itself."""
    result = read_result(run(root, f"method={method}")[0])
    assert result is not None
    own = folder_of(root, result["id"])
    folder = folder_of(root, result["needs"]["teacher"]) if method == "rco" else own
    damage(folder / name)
    assert read_status(folder)["status"] == "damaged" and name in read_status(folder)["error"]
    if folder != own:
        shutil.rmtree(own)
    _, again, said = run(root, f"method={method}")
    assert sum(f"cell {folder.name}: {name} is " in line for line in said.splitlines()) == 1
    assert read_status(folder)["status"] == "done" and again["metrics"] == result["metrics"]
    for each in {folder, own}:
        assert content(each) == content(whole / "cells" / each.name)


def test_a_transform_is_written_again_as_it_was(root: Path, whole: Path) -> None:
    folder, before, _ = run(root, "method=kcd")
    truncate(folder / "transform.pth")
    _, after, _ = run(root, "method=kcd")
    found, wanted = (torch.load(each / "cells" / folder.name / "transform.pth") for each in (root, whole))
    assert bits(found.pop("transform")) == bits(wanted.pop("transform"))
    assert found == wanted and after["transform"] == before["transform"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_score_on_other_data_is_made_again(root: Path, damage: Callable[[Path], None]) -> None:
    folder, *_ = run(root, "method=kcd", "evaluation=channel_overlap")
    scores = read_evaluation(folder, "channel_overlap")
    for name in ("channel_overlap.json", "activation_maps.npz"):
        damage(folder / "evaluations" / name)
        assert read_evaluation(folder, "channel_overlap") is None and read_status(folder)["status"] == "done"
        assert read_status(folder, "channel_overlap")["status"] == "unscored"
        *_, said = run(root, "method=kcd", "evaluation=channel_overlap")
        assert said.count(f"{name} is ") == 1 and read_evaluation(folder, "channel_overlap") == scores


def test_what_has_been_scored_is_scored_once(root: Path) -> None:
    folder, *_ = run(root, "method=kcd", "evaluation=consistency")
    before = (folder / "evaluations" / "consistency.json").stat().st_mtime_ns
    *_, said = run(root, "method=kcd", "evaluation=consistency")
    assert (folder / "evaluations" / "consistency.json").stat().st_mtime_ns == before and said == ""


@pytest.mark.parametrize("name", ["student.pth", "student.json"])
def test_a_damaged_student_is_not_handed_out(root: Path, name: str) -> None:
    folder, *_ = run(root, "method=kcd")
    flip(folder / name)
    for read in (kt.load_student, lambda folder: content_hash(folder / "student.pth", "teacher.checkpoint")):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            read(folder)


def test_results_of_another_identity_version_are_not_done(root: Path) -> None:
    folder, *_ = run(root, "method=kcd")
    path = folder / "result.json"
    for version in (2, None):
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
        assert read_status(folder)["status"] == "damaged" and "identity version" in read_status(folder)["error"]
        assert read_result(folder) is None
    row = {"id": "kd", "label": "KD", "role": "method", "method": "kd", "teacher": None, "student": None}
    row |= {"printed": None, "differs": {}, "cells": [{"id": folder.name, "seed": 0}]}
    (found,) = collect("imagenet_compression", [row], root, "mini")["rows"]
    assert found["cells"][0]["status"] == "missing" and found["mean"] is None
    assert "identity version" in found["cells"][0]["error"]


# Half a training


@pytest.fixture(scope="module")
def data() -> Any:
    return make_data()


LONG = {**SCHEDULE, "epochs": 4}


@pytest.fixture(scope="module")
def uninterrupted(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(make_model("none", data.spec.num_classes), data, folder, LONG, snapshots=4)
    return folder


def half(data: Any, folder: Path) -> None:
    """Three epochs of four and a step."""
    with pytest.raises(KeyboardInterrupt):
        fit(
            make_model("none", data.spec.num_classes),
            data,
            folder,
            LONG,
            snapshots=4,
            extra_hooks=[Interrupt(3 * len(data.train) + 1)],
        )


class Told:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def start(self, total: int, text: str) -> None: ...

    def advance(self, steps: int, text: str) -> None: ...

    def stop(self) -> None: ...


def go_on(data: Any, folder: Path) -> list[str]:
    told = Told()
    fit(make_model("none", data.spec.num_classes), data, folder, LONG, snapshots=4, progress=told)
    return told.lines


NEWEST, BEFORE = "phases/0-train/checkpoint.pth", "phases/0-train/checkpoint.before.pth"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("names", "goes_on"),
    [
        ((NEWEST,), "epoch 2 of phase 'train'"),
        ((NEWEST, BEFORE), "the beginning"),
        (("metrics.jsonl",), "the beginning"),
        (("snapshots/epoch_1.pth",), "the beginning"),
        (("snapshots/epoch_3.pth",), "epoch 2 of phase 'train'"),
    ],
)
def test_damage_in_a_half_done_cell_is_mended(
    data: Any,
    tmp_path: Path,
    uninterrupted: Path,
    names: tuple[str, ...],
    goes_on: str,
    damage: Callable[[Path], None],
) -> None:
    half(data, tmp_path)
    for name in names:
        damage(tmp_path / name)
    lines = go_on(data, tmp_path)
    if damage is not Path.unlink or len(names) == 1:  # nothing tells that there have been checkpoints
        assert len(lines) == 1 and names[0] in lines[0] and goes_on in lines[0]
    assert bits(torch.load(tmp_path / "student.pth")) == bits(torch.load(uninterrupted / "student.pth"))
    assert without_speed(tmp_path) == without_speed(uninterrupted)
    for epoch in range(1, 5):
        name = f"snapshots/epoch_{epoch}.pth"
        assert bits(torch.load(tmp_path / name)) == bits(torch.load(uninterrupted / name))


def _die_after(count: int, folder: Path) -> None:
    """Trains in a process that ends for good right after so many files have taken their places."""
    replace, left = os.replace, [count]

    def fatal(*places: Any) -> None:
        replace(*places)
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)

    os.replace = fatal  # type: ignore[assignment]
    data = make_data()
    fit(make_model("none", data.spec.num_classes), data, folder, SCHEDULE, snapshots=2)


def test_killed_after_any_file_it_ends_the_same(data: Any, tmp_path: Path) -> None:
    """Also between a snapshot and the checkpoint of its epoch."""
    folder, count = tmp_path / "whole", 0
    fit(make_model("none", data.spec.num_classes), data, folder, SCHEDULE, snapshots=2)
    wanted = {path.name: bits(torch.load(path)) for path in folder.glob("snapshots/*")}
    while True:
        count += 1
        folder = tmp_path / str(count)
        process = multiprocessing.get_context("fork").Process(target=_die_after, args=(count, folder))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        fit(make_model("none", data.spec.num_classes), data, folder, SCHEDULE, snapshots=2)
        assert {path.name: bits(torch.load(path)) for path in folder.glob("snapshots/*")} == wanted
        assert bits(torch.load(folder / "student.pth")) == bits(torch.load(tmp_path / "whole" / "student.pth"))
    assert (
        count == 9
    )  # two epochs of snapshot and checkpoint, with one before, the scores, those of images, the student


# Drawn images


@pytest.mark.parametrize("keep", [0, 1, 40, 200, -30, -1])
def test_a_damaged_cache_is_drawn_again_with_a_line(tmp_path: Path, caplog: Any, keep: int) -> None:
    path = tmp_path / "images.npz"
    draws = []

    def draw() -> dict[str, Any]:
        draws.append(1)
        return {"images": np.arange(100), "labels": np.ones(3)}

    for _ in range(2):
        kept(path, draw)
    assert len(draws) == 1 and not caplog.records
    path.write_bytes(path.read_bytes()[:keep])
    assert np.array_equal(kept(path, draw)["images"], np.arange(100))
    assert len(draws) == 2 and [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert np.array_equal(kept(path, draw)["images"], np.arange(100)) and len(draws) == 2
