"""Ten mistakes that users make: one clear line on stderr, exit status 2, no stack trace."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import fake_training
from configs import composed
from experiments import progress
from experiments.meaning import cell_id
from experiments.run import main
from kt.errors import UserError
from kt.files import write_sealed
from tables.__main__ import run as run_tables

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
    "another size than the teacher's": (
        ["method=kd", "teacher=vit_small", "dataset@teacher.dataset=scenes_small", "teacher.dataset.image_size=32"],
        ["teacher=vit_small: sees images of 32 pixels", "dataset.image_size=48"],
    ),
    "patches": (["student=deit_tiny", "dataset.image_size=40"], ["dataset.image_size=40", "multiple of 16", "deit"]),
    "size of embedded scenes": (["dataset=scenes_seg", "dataset.image_size=[1,1]"], ["image_size=[1, 1]", ">= 8"]),
    "subset of too few": (["dataset.subset=3001"], ["dataset.subset=3001: expected 1 to 3000"]),
    "nothing to train on": (["dataset.subset=1", "dataset.validation=0.5"], ["dataset.validation=0.5: of 1 training"]),
    "device": (["device=meta"], ["device='meta': expected auto, cpu, cuda or cuda:<index>"]),
    "empty folder": (["data_root="], ["data_root=: expected a text of length >= 1"]),
    "empty file": (["method=kd", "teacher=resnet56", "teacher.checkpoint="], ["teacher.checkpoint=: expected a text"]),
    "no layers": (["method=at", "teacher=resnet56", "method.stages=[]"], ["method.stages=[]", "of length >= 1"]),
    "momentum": (
        ["schedule.optimizer=sgd", "schedule.nesterov=true", "schedule.momentum=0"],
        ["schedule.nesterov=true: expected a schedule.momentum above 0"],
    ),
    "two lengths of a teacher": (
        ["method=kd", "teacher=resnet56", "teacher.schedule={epochs:1,iterations:1}"],
        ["teacher.schedule.epochs=1, teacher.schedule.iterations=1: expected one of the two"],
    ),
    "update of a transform": (
        ["method=kcd", "teacher=resnet56", "method.strategy=random", "method.update_every=1"],
        ["method.update_every=1: expected null with strategy=random"],
    ),
    "score for another task": (["evaluation=scenes_seg"], ["evaluation=scenes_seg: a dataset for segmentation"]),
    "score of other classes": (
        ["dataset=cifar100", "evaluation=imagenet"],
        ["evaluation=imagenet: it has 1000 classes, the student is trained with 100"],
    ),
    "score without depth": (
        ["dataset=scenes_depth", "student=depth_resnet18", "dataset.depth_samples=9", "evaluation=scenes_depth"],
        ["evaluation=scenes_depth: its depth_samples=0", "dataset.depth_samples=9"],
    ),
    "analysis of a segmentor": (
        ["dataset=scenes_seg", "student=pspnet_resnet18", "evaluation=channel_overlap"],
        ["evaluation=channel_overlap: for classification only"],
    ),
    "options": (["student.network.options={a:1}"], ["student.network.options={'a': 1}: goes with student=config"]),
    "stem": (["student.network.small_stem=true"], ["small_stem=true: expected false for resnet20; only resnet18"]),
    "another config": (["--config-name=nope"], ["--config-name=nope: has no effect here"]),
    # What would change nothing
    "teacher of nobody": (["teacher=resnet56"], ["teacher=resnet56: has no effect", "method=none"]),
    "stand-in": (["dataset.stand_in=zzz"], ["dataset.stand_in=zzz: has no effect", "file of a dataset"]),
    "stand-in in a table": ([TABLE, "rows=kd", "dataset.stand_in=scenes"], ["dataset.stand_in=scenes: has no effect"]),
    "another dataset's key": (["dataset=cifar100", "dataset.train_size=9"], ["train_size=9: has no effect", "scenes"]),
    "another dataset's key in an axis": (
        [TABLE, "rows=kd", "dataset=cifar100", "dataset.folder=a,b"],
        ["dataset.folder=a,b: has no effect", "not cifar100"],
    ),
    "another dataset's key of a teacher": (
        ["method=kd", "teacher=resnet56", "dataset@teacher.dataset=cifar100", "teacher.dataset.domain=real"],
        ["teacher.dataset.domain=real: has no effect"],
    ),
    "another policy's key": (
        ["schedule.policy=cosine", "schedule.milestones=[1]"],
        ["schedule.milestones=[1]: has no effect", "policy=step"],
    ),
    "milestones after the end": (
        ["schedule.epochs=9", "schedule.policy=step", "schedule.milestones=[9,300]"],
        ["schedule.milestones=[9,300]: has no effect", "before the end, at 9 epochs"],
    ),
    "another length's key": (["schedule.interval=5"], ["schedule.interval=5: has no effect"]),
    "key of no training": (["schedule.epochs=0", "schedule.lr=1"], ["schedule.lr=1: has no effect"]),
    "another optimizer's key": (
        [TABLE, "rows=kd", "schedule.optimizer=adam", "schedule.momentum=0.5"],
        ["schedule.momentum=0.5: has no effect", "optimizer=sgd"],
    ),
    "key of a method's other choice": (
        ["method=ab", "teacher=resnet56", "method.temperature=9"],
        ["method.temperature=9: has no effect", "after=kd"],
    ),
    "key of a base's other choice": (
        ["method=kcd+ab", "teacher=resnet56", "method.base.connector=none", "method.base.temperature=9"],
        ["method.base.temperature=9: has no effect"],
    ),
    "search that is not asked for": (
        ["method=distpro", "teacher=resnet56", "method.process=equal", "method.search.seed=3"],
        ["method.search.seed=3: has no effect"],
    ),
    "schedule of a file": (
        ["method=kd", "teacher=resnet56", f"teacher.checkpoint={__file__}", "teacher.schedule.epochs=3"],
        ["teacher.schedule.epochs=3: has no effect", "teacher.checkpoint=null"],
    ),
    "norm of a teacher that is not asked": (
        ["method=finetune", "teacher=resnet20", "teacher.norm=batch"],
        ["teacher.norm=batch: has no effect", "teacher answers"],
    ),
    "norm of nobody": (["teacher.norm=batch"], ["teacher.norm=batch: has no effect", "teacher=<network>"]),
    "norm of nobody in a table": ([TABLE, "rows=baseline", "teacher.norm=batch"], ["teacher.norm=batch: has no"]),
    "runs of nobody": (["wandb.mode=disabled", "wandb.entity=x"], ["wandb.entity=x: has no effect", "offline"]),
    "runs of nobody in a table": (
        [TABLE, "rows=kd", "wandb.mode=disabled", "wandb.project=x"],
        ["wandb.project=x: has no effect"],
    ),
    "project": (["wandb.project=a/b"], ["wandb.project=a/b: expected a text that matches"]),
    "memory of what is drawn": (["dataset.resident=true"], ["dataset.resident=true: has no effect", "image files"]),
    "memory of scenes": (
        ["dataset=coco", "student=retinanet_resnet18", "dataset.resident=true"],
        ["dataset.resident=true: has no effect"],
    ),
    "workers of one cell": (["workers=2"], ["workers=2: has no effect", "+table"]),
    "fraction of one's own length": (
        ["scale.fraction=0.5", "schedule.iterations=3"],
        ["scale.fraction=0.5: has no effect", "recipe"],
    ),
    "fraction of one's own length in a table": (
        [TABLE, "rows=kd", "scale.fraction=0.5", "schedule.epochs=3"],
        ["scale.fraction=0.5: has no effect"],
    ),
    "two things at once": (["plan=true", "rehearse=synthetic"], ["plan=true, rehearse=synthetic: expected one"]),
    "two things at once of a table": ([TABLE, "plan=true", "settings=true"], ["plan=true, settings=true: expected"]),
    "no row": ([TABLE, "rows="], ["rows=: the table has no such row", "baseline"]),
    "empty list of rows": ([TABLE, "rows=[]"], ["rows=: the table has no such row"]),
    "scored on what it has learned": (
        ["dataset=coco", "student=retinanet_resnet18", "dataset.test_split=train2017"],
        ["dataset.train_split=train2017, dataset.test_split=train2017: expected two splits"],
    ),
    "more depth than pixels": (
        ["dataset=scenes_depth", "student=depth_resnet18", "dataset.depth_samples=99999"],
        ["dataset.depth_samples=99999: expected at most the pixels of image_size=[64, 128]"],
    ),
    "width beyond all machines": (["student.network.width=1000"], ["student.network.width=1000: expected", "<= 16"]),
    "folder elsewhere": (
        ["dataset=imagefolder", "dataset.folder=../x", "plan=true"],
        ["dataset.folder=../x: expected a folder below data_root"],
    ),
    "split elsewhere": (
        ["dataset=coco", "student=retinanet_resnet18", "dataset.train_split=a/../../b", "plan=true"],
        ["dataset.train_split=a/../../b: expected the name of a folder"],
    ),
    "path of two lines": (["dataset=cifar100", "data_root='a\nb'"], ["data_root=a b: expected a text", "in one line"]),
    "width of nobody": (["scale.width=0.5", "student.network.width=1"], ["scale.width=0.5: has no effect"]),
    "list": (["method=kd,at"], ["method=kd,at", "+table"]),
    "selection without a table": (["rows=kd"], ["rows=kd", "+table"]),
    "cell in a table": ([TABLE, "cell=student"], ["cell=student", "role="]),
    "two scales": ([TABLE, "scale=mini,fast"], ["scale=mini,fast", "one value"]),
    "shown sweep": (["-m", "--cfg", "job", "seed=0,1"], ["seed=0,1", "one cell"]),
    "number for a group": (["student=-1"], ["student=-1", "expected one of config, "]),
    "no number for a group": (["scale=nan"], ["scale=nan: expected one of fast, mini, paper"]),
    "list for a group": (["student=[1,[2]]"], ["student=[1,[2]]: expected one of"]),
    "null for a group": (["dataset=null"], ["dataset=null: expected one of"]),
    "null for one of Hydra's groups": (["hydra/launcher=null"], ["hydra/launcher=null: expected the name of a choice"]),
    "null for Hydra": (["hydra=null"], ["hydra=null: expected hydra.<key>=value"]),
    "path for a group": ([TABLE, "scale=../dataset/scenes_det"], ["scale=../dataset/scenes_det: expected one of fast"]),
    "list for a method's name": (["method.name=[kd]"], ["method.name=['kd']: expected one of none, "]),
    "path for a scale's name": (["scale.name=../../x"], ["scale.name=../../x: expected a text that matches"]),
    "path for a name in a table": ([TABLE, "scale.name=../../x"], ["scale.name=../../x: expected a text that"]),
    "path for a table's name": (["table.name=/x", "rehearse=true"], ["table.name=/x: expected a text that matches"]),
    "number of 5000 digits": (["seed=" + "1" * 5000], ["seed=1111", "cannot be read", "4300"]),
    "number of 30 digits": (["schedule.epochs=" + "9" * 30], ["schedule.epochs=9999", "expected an integer"]),
    "brackets without end": (["seed=" + "[" * 3000], ["seed=[[["]),
    "sweep without end": (
        ["-m", "seed=range(0,1000000000)"],
        ["seed=range(0,1000000000): expected at most 10000 values"],
    ),
    "grid without end": (
        ["-m", "seed=range(0,999)", "threads=range(1,999)"],
        ["seed, threads", "expected at most 10000"],
    ),
    "line breaks": (["seed=\n5"], ["key=value"]),
    "unknown flag": (["--foo"], ["unrecognized arguments: --foo"]),
    "choice of a flag": (["--cfg=x"], ["--cfg", "'x'"]),
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


def test_homes_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", f"{tmp_path}/a, b")
    own = ["data_root=~/data", "student.checkpoint='~/a.pth'", "output_root=~"]
    config = composed(*own, "teacher.checkpoint=~root", "table.label='~'")
    assert (config["data_root"], config["output_root"]) == (f"{tmp_path}/a, b/data", f"{tmp_path}/a, b")
    assert config["student"]["checkpoint"] == f"{tmp_path}/a, b/a.pth"
    assert config["teacher"]["checkpoint"] == os.path.expanduser("~root") and config["table"]["label"] == "~"


@pytest.mark.parametrize("table", [[], [TABLE, "rows=baseline"]])
def test_a_home_is_written_to(table: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main([*table, "output_root=~/out"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_config_file_runs_once(tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    ran = f"file = open({str(tmp_path / 'runs')!r}, 'a')\nfile.write('x')\nfile.close()\ndel file\n"
    (tmp_path / "own.py").write_text(f"{ran}model = dict(a=1)\n")
    own = [
        "dataset=scenes_seg",
        "student=config",
        f"student.network.config='{tmp_path / 'own.py'}'",
        f"output_root={tmp_path}",
    ]
    found = {cell_id(composed(*own, f"seed={seed}")) for seed in range(3)}
    assert len(found) == 3 and (tmp_path / "runs").read_text() == "x"
    (tmp_path / "own.py").write_text("model = dict(a=2)\n")
    assert cell_id(composed(*own)) not in found


@pytest.mark.parametrize("text", ["import sys\nsys.exit(0)\n", "model = dict(a={1: 2, 'b': 3})\n"])
def test_a_config_file_that_is_none(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmseg")
    (tmp_path / "own.py").write_text(text)
    own = [
        "dataset=scenes_seg",
        "student=config",
        f"student.network.config='{tmp_path / 'own.py'}'",
        f"output_root={tmp_path}",
    ]
    check(main([*own, "plan=true"]), capfd.readouterr(), ["network.config", "own.py"])


@pytest.mark.parametrize("name", ["sweep-/../../x", "sweep-../x"])
def test_a_sweep_elsewhere_is_none(name: str, tmp_path: Path) -> None:
    place = tmp_path / "out" / "sweeps" / name
    (tmp_path / "out" / "sweeps" / "sweep-").mkdir(parents=True)
    place.resolve().mkdir(parents=True, exist_ok=True)
    write_sealed(place / "rows.json", {"keys": [], "points": []})
    with pytest.raises(UserError, match="there is no such sweep"):
        run_tables([name, "--output-root", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps: '0': expected an integer >= 1"),
        (["--width", "nan"], "--width: 'nan': expected a number > 0"),
        (["--device", "abacus"], "--device: 'abacus': no such device here"),
        (["--student", "resnt20"], "--student=resnt20: .*'resnet20'"),
        (["--student", "fasterrcnn_resnet18"], "--teacher=resnet56: .* beside fasterrcnn_resnet18"),
        (["--ways", "fp32,bf61"], "--ways: 'bf61': expected some of fp32,teacher_bf16,bf16.*'bf16'"),
        (["--clock", "cpu", "--workers", "2"], "--clock=cpu: sees one thread of this process alone"),
        (["--zz"], "unrecognized arguments: --zz"),
    ],
)
def test_arguments_of_the_bench(arguments: list[str], words: str) -> None:
    from experiments.bench import parse_arguments

    with pytest.raises(UserError, match=words):
        parse_arguments(arguments)
