"""Cells: identity, needs, folder, status, result and lock. The training is a stand-in."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import fake_training
from configs import composed
from experiments import progress
from experiments.cell import CellFailed, run_cell
from experiments.meaning import identity, needed_cells, needs_of, settle
from experiments.schema import TEACHER_DATA, sign, with_recipe
from kt.data.names import COMMON, DATASETS
from kt.errors import UserError
from kt.needs import WEIGHTS, Need, teacher_of
from kt.settings import KD, Dataset, FitNet, Schedule, defaults, kinds
from kt.store import folder_of, read_result, read_status, write_status

PAIR = ("teacher=resnet56", "student=resnet20")
OWN = ("coco", "segfolder", "depthfolder")  # whose splits may have any names


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(progress, "_current", progress.Display(quiet=True))


def calls(folder: Path) -> int:
    """How often the stand-in was asked to train a cell."""
    return len((folder / "calls").read_text())


def test_a_teachers_length_replaces_the_students_however_it_is_counted() -> None:
    kd = ("method=kd", *PAIR)
    counted = {
        (None, 7): ("teacher.schedule.iterations=7",),
        (3, None): ("schedule.iterations=9", "schedule.epochs=null", "teacher.schedule.epochs=3"),
        (None, 9): ("schedule.iterations=9", "schedule.epochs=null", "teacher.schedule.lr=0.5"),
    }
    for length, overrides in counted.items():
        found = teacher_of(composed(*kd, *overrides))["schedule"]
        assert (found["epochs"], found["iterations"]) == length, overrides


def test_weights_from_a_file_come_before_pretrained_ones() -> None:
    kd = ("method=kd", "teacher=resnet50", "student=resnet18", "dataset=imagenet", "scale=paper")
    given = teacher_of(composed(*kd, "teacher.checkpoint=own.pth"))
    assert given["student"]["checkpoint"] == "own.pth" and given["student"]["pretrained"] is None
    assert given["schedule"]["epochs"] == 0
    assert teacher_of(composed(*kd))["student"]["pretrained"] == "IMAGENET1K_V1"


def test_a_cell_names_only_the_weights_that_its_teacher_takes() -> None:
    kd = ("method=kd", "teacher=resnet50", "student=resnet18")
    taken = {
        "IMAGENET1K_V1": ("dataset=imagenet", "scale=paper"),
        None: ("dataset=scenes",),
    }
    for weights, overrides in taken.items():
        settled = settle(composed(*kd, *overrides))
        assert settled["teacher"]["pretrained"] == weights == teacher_of(settled)["student"]["pretrained"]
        assert settle(settled) == settled


def test_a_backbone_with_pretrained_weights_is_trained() -> None:
    """Of a detector or segmentor they are where it starts, not all of it."""
    pair = ("teacher=deeplabv3_resnet101", "student=deeplabv3_resnet50")
    made = teacher_of(composed("method=at", *pair, "dataset=cityscapes_seg", "scale=paper"))
    assert made["student"]["pretrained"] == "IMAGENET1K_V1" and made["schedule"]["iterations"] > 0


def test_identity_forgets_what_is_of_no_account(tmp_path: Path) -> None:
    base = identity(composed("method=kd", *PAIR))
    same = (
        ["student=resnet20", "method=kd", "teacher=resnet56"],
        ["method=kd", *PAIR, f"data_root={tmp_path}", f"output_root={tmp_path}", "device=cpu"],
        ["method=kd", *PAIR, "wandb.mode=disabled", "dataset.resident=true", "schedule.evaluate_every=3"],
        ["method=kd", *PAIR, "+table=imagenet_compression", "dataset=scenes", "table.row=kd"],
        ["method=kd", *PAIR, "method.temperature=4", "student.network.width=0.25", "schedule.epochs=8"],
        ["method=kd", *PAIR, "scale=paper", "dataset=scenes", "scale.width=0.25"],
        ["method=kd", *PAIR, "rehearse=synthetic", "activation_checkpointing=true"],
        ["method=kd", *PAIR, "teacher.precision=fp32"],
        ["method=kd", *PAIR, "compile=false"],
    )
    for overrides in same:
        assert identity(composed(*overrides)) == base, overrides


def test_identity_sees_what_matters() -> None:
    changes = ("method.temperature=3", "seed=1", "teacher.seed=1", "schedule.lr=0.123", "dataset.subset=100")
    changes += ("teacher.schedule.epochs=9", "precision=bf16", "teacher.norm=batch", "student=resnet8", "method=at")
    changes += ("teacher.precision=bf16", "compile=true", "compile=auto")
    ids = [identity(composed("method=kd", *PAIR))]
    for change in changes:
        overrides = [line for line in ("method=kd", *PAIR) if line.split("=")[0] != change.split("=")[0]]
        ids.append(identity(composed(*overrides, change)))
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "cell", [["precision=bf16", "method=kd", *PAIR], ["method=finetune", *PAIR[:1]], ["method=none"]]
)
def test_identity_sees_a_teachers_precision_only_where_it_decides(cell: list[str]) -> None:
    """Not beside a student in the same precision, nor where no teacher answers."""
    same = [composed(*cell, *more) for more in ((), ("teacher.precision=bf16",))]
    assert identity(same[0]) == identity(same[1])


@pytest.mark.parametrize("name", DATASETS)
def test_identity_sees_the_keys_that_decide_a_datasets_images(name: str) -> None:
    """And no others; a reader is given no others either."""
    config = composed()
    config["dataset"] = {**defaults(DATASETS[name].settings), **config["dataset"], "name": name, "subset": 1}
    keys = set(config["dataset"]) - {"task", "name"}
    told = {key for key in keys if identity(config) != identity({**config, "dataset": {**config["dataset"], key: "x"}})}
    own = {*kinds(DATASETS[name].settings)} - {*kinds(Dataset)}
    assert told == {*COMMON, *DATASETS[name].keys, *own} - {"task", "name"}
    assert ("folder" in told) == (name in ("imagenet", "imagefolder", "unlabelled", *OWN))
    assert ("test_split" in told) == (name in OWN)


def test_a_cell_is_what_one_normalisation_sees_not_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(processes: int, *overrides: str) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return identity(composed("method=kd", *PAIR, "schedule.batch_size=64", *overrides))

    whole = found(1)
    assert found(1, "schedule.device_batch=64") == whole
    assert found(2) == found(1, "schedule.device_batch=32") == found(2, "schedule.device_batch=32") != whole
    # A teacher's updates are cut by the same rule.
    teacher = ("teacher.schedule.batch_size=128",)
    assert found(2, *teacher) == found(1, *teacher, "schedule.device_batch=32", "teacher.schedule.device_batch=64")
    for processes, override, words in (
        (3, "seed=0", r"schedule\.batch_size=64: expected a multiple of 3"),
        (1, "schedule.device_batch=65", r"schedule\.device_batch=65: expected null or a divisor of .*=64$"),
        (2, "schedule.device_batch=64", r"schedule\.device_batch=64: .* over 2 processes"),
        (1, "schedule.device_batch=24", r"schedule\.device_batch=24: expected null or a divisor"),
    ):
        with pytest.raises(UserError, match=words):
            found(processes, override)
    assert found(3, "schedule.epochs=0", "schedule.batch_size=65")


@pytest.mark.parametrize(
    "overrides",
    [
        (*PAIR, "method=rkd"),
        (*PAIR, "method=kcd+rkd"),
        (*PAIR, "method=kcd", "method.strategy=subnet_fc"),
        (*PAIR, "method=hybrid_forward", "method.balance=dynamic"),
        ("dataset=scenes_det", "student=fasterrcnn_resnet18"),
        ("dataset=scenes_pose", "student=pifpaf_resnet50"),
    ],
)
def test_what_cannot_accumulate_says_so_before_anything_runs(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides += ("schedule.batch_size=8", "schedule.device_batch=4")
    with pytest.raises(
        UserError, match=r"^schedule\.device_batch: an update would take 2 passes, .*; expected null, or"
    ):
        settle(composed(*overrides))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert identity(composed(*overrides))


def test_identity_of_a_fixed_config_is_fixed() -> None:
    """Another id throws away everybody's results: then raise IDENTITY_VERSION and this number knowingly."""
    config = composed()
    config["student"] = {"network": {"name": "resnet8", "width": 1.0, "small_stem": False, "config": None}}
    config["student"] |= {"checkpoint": None, "pretrained": None}
    config["dataset"] = {"name": "cifar100", "num_classes": 100, "image_size": 32, "subset": None}
    config["dataset"] |= {"task": "classification", "crop_size": None, "validation": 0.0, "augmentation": "crop_flip"}
    config["schedule"] = {
        "epochs": 3,
        "iterations": None,
        "interval": None,
        "batch_size": 64,
        "device_batch": None,
        "optimizer": "sgd",
        "lr": 0.05,
        "policy": "step",
    }
    assert identity(config) == "1ba5ff3abf57e89e"


def test_a_key_added_later_keeps_ids_only_where_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its default is or becomes."""
    kd, inner = ("method=kd", *PAIR), ("method=kcd+fitnet", *PAIR)
    before = [composed(*kd), composed(*inner)]
    added = {
        KD: {"alpha": 0.9},
        FitNet: {"regressor": "none"},
        Schedule: {"gamma": 0.1},
        Dataset: {"subset": None},
    }
    for schema, keys in added.items():
        monkeypatch.setattr(schema, "added", keys)
    kept = [identity(config) for config in before]
    del before[0]["method"]["alpha"], before[0]["schedule"]["gamma"], before[1]["method"]["base"]["regressor"]
    assert [identity(config) for config in before] == kept
    changes = ("method.alpha=0.5", "schedule.gamma=0.2", "dataset.subset=10")
    changed = {identity(composed(*kd, change)) for change in changes}
    changed.add(identity(composed(*inner, "method.base.regressor=first")))
    assert len(changed) == 4 and not changed & {*kept}


def test_a_plain_student_has_no_teacher() -> None:
    alone = identity(composed("student=resnet20"))
    assert identity(composed(*PAIR)) == alone
    assert identity(composed("student=resnet20", "teacher=vgg16", "teacher.seed=4")) == alone
    assert needs_of(settle(composed(*PAIR))) == {}


def test_the_teacher_is_a_plain_cell() -> None:
    config = composed("method=kd", *PAIR, "teacher.seed=2", "teacher.schedule.epochs=9")
    need = needed_cells(settle(config))["teacher"]
    as_student = composed("student=resnet56", "seed=2", "schedule.epochs=9")
    assert identity(need) == identity(as_student)
    assert identity({**config, "cell": "teacher"}) == identity(as_student)
    assert need["schedule"]["epochs"] == 9 and need["method"] == {"name": "none"}


def test_settling_is_idempotent() -> None:
    for overrides in (["method=kd", *PAIR], ["cell=teacher", *PAIR], ["dataset=cifar100"]):
        once = settle(composed(*overrides))
        assert settle(once) == once


def test_only_embedded_data_slim_the_networks() -> None:
    real = settle(composed("method=kd", *PAIR, "dataset=cifar100"))
    assert real["student"]["network"]["width"] == real["teacher"]["network"]["width"] == 1.0
    small = settle(composed("method=kd", *PAIR))
    assert small["student"]["network"]["width"] == small["teacher"]["network"]["width"] == 0.25


def test_pretrained_teachers_are_scored_and_not_trained() -> None:
    config = composed("method=kd", "teacher=resnet50", "student=mobilenet_v1", "dataset=imagenet", "scale=paper")
    teacher = teacher_of(config)
    assert teacher["student"]["pretrained"] == "IMAGENET1K_V1" and teacher["schedule"]["epochs"] == 0
    for other in (["dataset.name=cifar100"], ["scale.pretrained=false"], ["teacher.network.width=0.5"]):
        changed = teacher_of(composed("method=kd", "teacher=resnet50", "dataset=imagenet", "scale=paper", *other))
        assert changed["student"]["pretrained"] is None and changed["schedule"]["epochs"] > 0


def test_a_teacher_with_its_own_data_has_their_recipe() -> None:
    """On embedded data a teacher's dataset gives way to its stand-in, on real data it does not."""

    def teacher(student: str, teacher: str, dataset: str, own: str, *more: str) -> dict[str, Any]:
        chosen = {"method": "hybrid_forward", "student": student, "dataset": dataset, "teacher": teacher}
        lines = [f"{sign(key)}{key}={value}" for key, value in with_recipe({**chosen, TEACHER_DATA: own}).items()]
        return needed_cells(settle(composed(*lines, *more)))["teacher"]

    need = teacher("deeplabv2_vgg16", "fasterrcnn_resnet50", "scenes_seg", "cityscapes_det")
    assert identity(need) == identity(composed("student=fasterrcnn_resnet50", "dataset=scenes_det"))
    need = teacher("deeplabv2_vgg16", "deeplabv2_resnet101", "scenes_seg", "gta5")
    assert identity(need) == identity(composed("student=deeplabv2_resnet101", "dataset=scenes_seg_synthetic"))
    need = teacher("deeplabv2_vgg16", "fasterrcnn_resnet50", "cityscapes_seg", "cityscapes_det")
    assert identity(need) == identity(composed("student=fasterrcnn_resnet50", "dataset=cityscapes_det"))
    length = ("++teacher.schedule.iterations=20", "++teacher.schedule.interval=10", "++schedule.iterations=400")
    need = teacher("deeplabv2_vgg16", "fasterrcnn_resnet50", "scenes_seg", "cityscapes_det", *length)
    assert (need["schedule"]["iterations"], need["schedule"]["clip_grad"]) == (20, 10.0)


def test_a_mistake_in_the_teachers_own_data_bears_its_key(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FAKE_TRAINING", '{"teacher": "mistake in the data"}')
    pair = ("method=hybrid_forward", "student=deeplabv2_vgg16", "teacher=fasterrcnn_resnet50", "dataset=scenes_seg")
    chosen = with_recipe({**dict(line.split("=") for line in pair), TEACHER_DATA: "cityscapes_det"})
    own = [f"{sign(key)}{key}={value}" for key, value in chosen.items()]
    with pytest.raises(UserError, match=r"^teacher\.dataset\.folder=null: "):
        run_cell(composed(*own, f"output_root={tmp_path}"))
    with pytest.raises(UserError, match=r"^dataset\.folder=null: "):
        run_cell(composed("method=kd", *PAIR, f"output_root={tmp_path}"))


def test_a_network_for_another_task_is_refused() -> None:
    with pytest.raises(UserError, match="student=fasterrcnn_resnet50: not a network for segmentation"):
        settle(composed("student=fasterrcnn_resnet50", "dataset=scenes_seg"))


def test_a_finished_student_is_scored_elsewhere_without_training(tmp_path: Path, monkeypatch: Any) -> None:
    config = composed("student=deeplabv2_vgg16", "dataset=scenes_seg", f"output_root={tmp_path}")
    elsewhere = composed("student=deeplabv2_vgg16", "dataset=scenes_seg", "evaluation=gta5", f"output_root={tmp_path}")
    assert identity(config) == identity(elsewhere)
    folder = folder_of(tmp_path, identity(config))
    run_cell(config)
    assert read_status(folder)["status"] == "done"
    assert read_status(folder, "gta5")["status"] == "unscored"
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"evaluation": "mistake"}))
    with pytest.raises(UserError, match="data_root"):
        run_cell(elsewhere)
    assert read_status(folder, "gta5")["status"] == "failed" and read_status(folder)["status"] == "done"
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"evaluation": "error"}))
    with pytest.raises(CellFailed, match="evaluation=gta5: RuntimeError: no such layer"):
        run_cell(elsewhere)
    assert read_status(folder, "gta5")["user"] is False
    monkeypatch.delenv("FAKE_TRAINING")
    run_cell(elsewhere)
    assert read_status(folder, "gta5")["status"] == "done"
    assert json.loads((folder / "evaluations" / "gta5.json").read_text()) == {"miou": 12.0}
    kept = json.loads((folder / "result.json").read_text())["evaluations"]["gta5"]["files"]
    assert set(kept) == {"evaluations/gta5.json", "evaluations/gta5.png"}
    assert calls(folder) == 1


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    ids = [identity(composed("method=kd", *PAIR, f"teacher.checkpoint={path}")) for path in (first, second)]
    assert ids[0] == ids[1]
    second.write_bytes(b"other weights")
    assert identity(composed("method=kd", *PAIR, f"teacher.checkpoint={second}")) != ids[0]
    with pytest.raises(UserError, match="checkpoint"):
        identity(composed("method=kd", *PAIR, f"teacher.checkpoint={tmp_path / 'c.pth'}"))


def test_method_needs_teacher() -> None:
    with pytest.raises(UserError, match="method=kd: needs a teacher"):
        settle(composed("method=kd"))


@pytest.mark.parametrize(
    ("change", "file", "words"),
    [
        ({"method": {"name": "nine"}}, None, r"no cell: method\.name=nine: expected one of .*did you mean 'none'"),
        ({"seed": -1}, None, r"method=kd: what it needs as 'it' is no cell: seed=-1: expected an integer >= 0"),
        ({"method": {"name": "kd"}}, None, r"no cell: method\.temperature: missing; expected a number > 0"),
        ({}, None, "method=kd: its cell needs another, that one the next, without an end"),
        ({}, "", "what it needs as 'it' is no cell: expected a kt.needs.Need, it is a dict"),
        ({"method": {"name": "none"}}, "student.pht", "'it' has left no student.pht .did you mean 'student.pth'"),
    ],
)
def test_needs_that_cannot_be_met_are_one_line(
    change: dict[str, Any], file: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(config: Any) -> dict[str, Need]:
        found = {**config, "seed": config["seed"] + 1, **change}
        return {"it": found if file == "" else Need(found, file or WEIGHTS)}

    config = composed("method=kd", *PAIR, f"output_root={tmp_path}")
    monkeypatch.setattr(KD, "needs", staticmethod(needs))
    with pytest.raises(UserError, match=words):
        run_cell(config) if file else identity(config)


def test_runs_its_needs_once(tmp_path: Path) -> None:
    root = f"output_root={tmp_path}"
    kd = run_cell(composed("method=kd", *PAIR, root))
    at = run_cell(composed("method=at", *PAIR, root))
    assert kd["needs"] == at["needs"] and kd["id"] != at["id"]
    teacher = folder_of(tmp_path, kd["needs"]["teacher"])
    assert calls(teacher) == 1
    for key in ("id", "status", "metrics", "labels", "config", "needs", "seconds", "versions", "commit", "hardware"):
        assert key in kd
    assert kd["status"] == "done" and kd["versions"]["python"]
    assert run_cell(composed("method=kd", *PAIR, root)) == kd
    assert calls(folder_of(tmp_path, kd["id"])) == 1
    assert "a third party prints" in (folder_of(tmp_path, kd["id"]) / "log.txt").read_text()


def test_a_failure_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("method=kd", *PAIR, f"output_root={tmp_path}")
    folder = folder_of(tmp_path, identity(config))
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"kd": "error"}))
    with pytest.raises(CellFailed, match="RuntimeError: the loss is not finite"):
        run_cell(config)
    status = read_status(folder)
    assert (status["status"], status["error"]) == ("failed", "RuntimeError: the loss is not finite")
    assert "Traceback" in (folder / "error.txt").read_text()
    spent = status["seconds"]
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"kd": 0.2}))
    result = run_cell(config)
    assert result["seconds"] >= spent + 0.2
    assert not (folder / "error.txt").exists()
    assert read_status(folder)["status"] == "done"


@pytest.mark.parametrize(
    ("does", "raised", "status"),
    [("mistake", UserError, "failed"), ("exit", CellFailed, "failed"), ("interrupt", KeyboardInterrupt, "interrupted")],
)
def test_every_way_out_has_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, raised: type[BaseException], status: str
) -> None:
    config = composed(f"output_root={tmp_path}")
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": does}))
    with pytest.raises(raised):
        run_cell(config)
    found = read_status(folder_of(tmp_path, identity(config)))
    assert found["status"] == status and found["user"] == (does == "mistake")
    assert sys.stdout is not None and not isinstance(sys.stdout, progress._Diverted)


def _run(config: dict[str, Any]) -> None:
    run_cell(config, progress.Display(quiet=True))


def test_a_killed_cell_has_failed_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(f"output_root={tmp_path}")
    folder = folder_of(tmp_path, identity(config))
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": 30}))
    process = multiprocessing.get_context("fork").Process(target=_run, args=(config,))
    process.start()
    while not ((folder / "calls").exists() and calls(folder)):  # opened comes before written
        time.sleep(0.01)
    assert read_status(folder)["status"] == "running"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert read_status(folder)["status"] == "failed"
    assert "killed" in read_status(folder)["error"]
    monkeypatch.delenv("FAKE_TRAINING")
    assert run_cell(config)["status"] == "done"
    assert calls(folder) == 2


def test_a_second_process_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(f"output_root={tmp_path}")
    folder = folder_of(tmp_path, identity(config))
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": 0.5}))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(config,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert calls(folder) == 1


def test_half_a_result_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"id": "x", "sta')
    assert read_result(tmp_path) is None
    assert read_status(tmp_path)["status"] == "damaged"


def test_another_machine_may_be_running_it(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_status(tmp_path, {"status": "running", "host": "elsewhere", "error": None})
    assert read_status(tmp_path)["status"] == "running"
    os.utime(path, (0, 0))
    assert read_status(tmp_path)["status"] == "failed"
    with FileLock(tmp_path / "lock"):
        assert read_status(tmp_path)["status"] == "running"
