"""Ten mistakes that users make: one clear line on stderr, exit status 2, no stack trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fake_training
from experiments import progress
from experiments.run import main
from kt.errors import UserError

TABLE = "+table=imagenet_compression"

MISTAKES = {
    "table": (["+table=imagenet_compresion"], ["imagenet_compresion", "'imagenet_compression'"]),
    "table without plus": (["table=imagenet_compresion"], ["imagenet_compresion", "'imagenet_compression'"]),
    "method": (["method=kdd"], ["method=kdd", "'kd'"]),
    "method in a table": ([TABLE, "method=hybrid_foward"], ["method=hybrid_foward", "'hybrid_forward'"]),
    "method that the table lacks": ([TABLE, "method=fitnet"], ["method=fitnet", "hybrid_forward"]),
    "row": ([TABLE, "rows=basline"], ["rows=basline", "'baseline'"]),
    "role": ([TABLE, "role=student"], ["role=student", "baseline"]),
    "key": (["schedule.epoch=1"], ["schedule.epoch", "'epochs'"]),
    "key in a table": ([TABLE, "schedule.epoch=1"], ["schedule.epoch", "'epochs'"]),
    "method's key in a table": ([TABLE, "method.temprature=1"], ["method.temprature", "'temperature'"]),
    "another method's key": ([TABLE, "rows=kd", "method.balance=1"], ["method.balance", "hybrid_forward"]),
    "key behind plus": (
        ["method=kd", "teacher=resnet56", "+method.temprature=1"],
        ["method.temprature", "'temperature'"],
    ),
    "key behind plus in a table": ([TABLE, "+method.temprature=1"], ["method.temprature", "'temperature'"]),
    "group": (["metod=kd"], ["metod", "'method'"]),
    "network": (["student=resnt20"], ["student=resnt20", "'resnet20'"]),
    "network in an axis": ([TABLE, "student=resnet20,resnt20"], ["student=resnt20", "'resnet20'"]),
    "scale": ([TABLE, "scale=papr"], ["scale=papr", "'paper'"]),
    "dataset": (["dataset=cifar10"], ["dataset=cifar10", "'cifar100'"]),
    "launcher": ([TABLE, "hydra/launcher=jobib"], ["jobib", "'joblib'"]),
    "type": (["schedule.epochs=many"], ["schedule.epochs=many", "an integer"]),
    "type in a table": ([TABLE, "schedule.epochs=many"], ["schedule.epochs=many", "an integer"]),
    "type in an axis": ([TABLE, "seed=0,x"], ["seed=x", "an integer"]),
    "null": (["dataset.name=null"], ["dataset.name=null", "expected one of"]),
    "null for a network": (["student=config"], ["student.network.config=null", "goes with student=config"]),
    "range": (["schedule.lr=-1"], ["schedule.lr=-1", "> 0"]),
    "range in a table": ([TABLE, "method.temperature=0"], ["method.temperature=0", "> 0"]),
    "checkpoint": (
        ["method=kd", "teacher=resnet56", "teacher.checkpoint=nowhere.pth"],
        ["teacher.checkpoint=nowhere.pth", "file"],
    ),
    "teacher": (["method=kd"], ["method=kd", "teacher="]),
    "detector for a classifier": (
        ["method=at", "teacher=fasterrcnn_resnet50", "dataset@teacher.dataset=scenes_det", "student=resnet20"],
        ["teacher=fasterrcnn_resnet50: not a network for classification", "'resnet50'"],
    ),
    "teacher for its own data": (
        ["method=kd", "teacher=resnet20", "dataset@teacher.dataset=scenes_seg"],
        ["teacher=resnet20: not a network for segmentation"],
    ),
    "syntax": (["schedule.lr"], ["schedule.lr", "key=value"]),
    "list": (["method=kd,at"], ["method=kd,at", "+table"]),
    "selection without a table": (["rows=kd"], ["rows=kd", "+table"]),
    "cell in a table": ([TABLE, "cell=student"], ["cell=student", "role="]),
    "two scales": ([TABLE, "scale=mini,fast"], ["scale=mini,fast", "one value"]),
    "shown sweep": (["-m", "--cfg", "job", "seed=0,1"], ["seed=0,1", "one cell"]),
    "shown config": (["--cfg", "job", "method=kd", "method.temprature=1"], ["method.temprature", "'temperature'"]),
}


def check(status: int, captured: tuple[str, str], words: list[str]) -> None:
    """One line, status 2."""
    out, err = captured
    assert status == 2, out + err
    assert err.startswith("kt: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    for word in words:
        assert word in err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(
    mistake: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_train(*_: object) -> None:
        raise AssertionError("trained in spite of a mistake")

    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["experiments.build"], "train_cell", must_not_train)
    monkeypatch.setattr(progress, "_current", None)
    arguments, words = MISTAKES[mistake]
    check(main([*arguments, f"output_root={tmp_path}"]), capfd.readouterr(), words)


@pytest.mark.parametrize("arguments", [[], [TABLE]])
def test_unwritable_output_folder(arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    root = f"output_root={tmp_path / 'file' / 'out'}"
    check(main([*arguments, root]), capfd.readouterr(), [root, "folder to write to"])


@pytest.mark.parametrize("arguments", [["student=resnet8"], [TABLE]])
@pytest.mark.parametrize(
    "message",
    [
        "data_root=data: expected data/cifar-100-python/{train,test,meta}, or use scale=mini",
        "data_root=data: data/cifar-100-python is empty",
        "teacher.checkpoint='x.pth': the checkpoint belongs to another network",
    ],
)
def test_what_only_the_training_sees(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise UserError(message)

    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["experiments.build"], "train_cell", refuse)
    monkeypatch.setattr(progress, "_current", None)
    check(main([*arguments, f"output_root={tmp_path}"]), capfd.readouterr(), [message])
