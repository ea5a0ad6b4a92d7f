"""A number is of the data that it was trained on: other data make another cell, absent ones train nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fake_training
from configs import composed, table
from experiments.cell import run_cell
from experiments.meaning import cell_id, told_of_data
from kt.data import fingerprint
from kt.errors import UserError
from kt.store import folder_of, read_result

# Kind of dataset -> its files, which change what the reader gives; the first is a label's.
FILES = {
    "imagefolder": ("own/train/cat/a.png", "own/train/dog/b.png", "own/val/cat/c.png", "own/val/dog/d.png"),
    "segfolder": ("own/labels/train/a.png", "own/images/train/a.png", "own/labels/val/b.png", "own/images/val/b.png"),
    "coco": ("own/annotations/instances_train.json", "own/annotations/instances_val.json", "own/train/a.png"),
    "cifar100": tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")),
}


@pytest.fixture(autouse=True)
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "REUSED", 0)
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(__import__("sys").modules, name, module)


def make(root: Path, name: str) -> Path:
    for file in FILES[name]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    return root


def config_of(tmp_path: Path, name: str, *more: str, data: str = "data") -> dict[str, Any]:
    keys = [f"dataset={name}", f"data_root={tmp_path / data}", f"output_root={tmp_path / 'out'}", *more]
    config = (
        composed(*keys, "student=resnet20")
        if name in ("imagefolder", "cifar100")
        else composed(*keys, "student=deeplabv2_resnet101" if name == "segfolder" else "student=fasterrcnn_resnet50")
    )
    if name != "cifar100":
        config["dataset"]["folder"] = "own"
    if name in ("segfolder", "coco"):
        config["dataset"] |= {"train_split": "train", "test_split": "val"}
    return config


@pytest.mark.parametrize("name", FILES)
def test_other_data_are_another_cell_and_the_first_data_the_first_one(tmp_path: Path, name: str) -> None:
    first, config = make(tmp_path / "data", name) / FILES[name][0], config_of(tmp_path, name)
    old = run_cell(config)["id"]
    first.write_bytes(first.read_bytes()[::-1])  # of the same size
    new = run_cell(config)["id"]
    assert new.startswith(f"{old}-") and len(new) == len(old) + 9
    assert (folder_of(tmp_path / "out", new) / "calls").read_text() == "x"
    assert any("1 of" in line and "trained anew" in line for line in told_of_data(config))
    first.write_bytes(first.read_bytes()[::-1])
    assert run_cell(config)["id"] == old and (folder_of(tmp_path / "out", old) / "calls").read_text() == "x"


@pytest.mark.parametrize("name", ("imagefolder", "segfolder", "coco"))
def test_more_and_fewer_images_are_other_data(tmp_path: Path, name: str) -> None:
    image, config = make(tmp_path / "data", name) / FILES[name][-1], config_of(tmp_path, name)
    ids = [run_cell(config)["id"]]
    shutil.copy(image, image.with_name("z.png"))
    ids.append(run_cell(config)["id"])
    assert any("1 images more" in line for line in told_of_data(config))
    image.unlink()
    assert len({*ids, run_cell(config)["id"]}) == 3


def test_where_the_data_lie_is_of_no_account(tmp_path: Path) -> None:
    make(tmp_path / "data", "imagefolder")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    old = run_cell(config_of(tmp_path, "imagefolder"))["id"]
    assert cell_id(config_of(tmp_path, "imagefolder", data="copy")) == old
    (tmp_path / "copy/own/val/dog/d.png").write_bytes(b"other")
    assert cell_id(config_of(tmp_path, "imagefolder", data="copy")) != old


def test_absent_data_show_the_newest_result_and_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, config = make(tmp_path / "data", "cifar100") / FILES["cifar100"][0], config_of(tmp_path, "cifar100")
    run_cell(config)
    first.write_bytes(b"other")
    newest = run_cell(config)["id"]
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": "error"}))
    assert run_cell(config)["id"] == newest
    assert any("unverified" in line for line in told_of_data(config))


def test_a_run_never_goes_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, config = make(tmp_path / "data", "imagefolder") / FILES["imagefolder"][0], config_of(tmp_path, "imagefolder")
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": "interrupt"}))
    with pytest.raises(KeyboardInterrupt):
        run_cell(config)
    half = folder_of(tmp_path / "out", cell_id(config))
    (half / "checkpoint").write_text("of the first data")
    first.write_bytes(b"other")
    monkeypatch.delenv("FAKE_TRAINING")
    assert run_cell(config)["id"] != half.name and read_result(half) is None
    # Nobody knows the data of what is left there.
    first.write_bytes(FILES["imagefolder"][0].encode())
    assert cell_id(config) == half.name
    (half / "data.json").write_text("{")
    assert run_cell(config)["id"] == half.name and not (half / "checkpoint").exists()


def test_a_cell_is_of_the_data_of_what_it_needs(tmp_path: Path) -> None:
    make(tmp_path / "data", "cifar100"), make(tmp_path / "data", "imagefolder")
    config = config_of(tmp_path, "cifar100", "method=kd", "teacher=resnet56")
    config["teacher"]["dataset"] = config_of(tmp_path, "imagefolder")["dataset"]
    config["teacher"]["schedule"] = config["schedule"]
    old = run_cell(config)
    (tmp_path / "data" / FILES["imagefolder"][0]).write_bytes(b"other")
    new = run_cell(config)
    assert new["id"].startswith(f"{old['id']}-") and new["needs"]["teacher"].startswith(f"{old['needs']['teacher']}-")
    assert cell_id(config_of(tmp_path, "cifar100")).count("-") == 0
    shutil.rmtree(tmp_path / "data/own")
    config["seed"] += 1
    with pytest.raises(UserError, match="there are no data of imagefolder:own"):
        run_cell(config)


def test_a_table_is_of_one_state_of_the_data(tmp_path: Path) -> None:
    make(tmp_path / "data", "cifar100")
    common = [f"data_root={tmp_path / 'data'}", f"output_root={tmp_path / 'out'}", "dataset=cifar100"]

    def cells(made: Any) -> list[dict[str, Any]]:
        return [cell for shown in made.shown for cell in shown.entry()["cells"]]

    before = table("cifar100_kcd", *common)
    for job in list(before.jobs.values())[:3]:
        run_cell(job.config)
    (tmp_path / "data" / FILES["cifar100"][1]).write_bytes(b"other")
    after = table("cifar100_kcd", *common)
    done = {job.id for job in before.jobs.values() if read_result(folder_of(tmp_path / "out", job.id))}
    assert done and not done & after.jobs.keys() and not any("unverified" in cell for cell in cells(after))
    shutil.rmtree(tmp_path / "data")
    gone = table("cifar100_kcd", *common)
    assert done <= gone.jobs.keys() and any(cell.get("unverified") for cell in cells(gone))
