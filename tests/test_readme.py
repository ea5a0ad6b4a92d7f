"""The README and docs: Python blocks run, the commands of shell blocks are the project's, links lead somewhere."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

import kt
from experiments.build import describe_student
from experiments.cells import run as cells_command
from experiments.run import main as run_command
from kt.classifier import Classifier
from kt.data import DataSpec
from kt.engine import seed_everything
from kt.errors import UserError
from kt.methods import build_method
from kt.models import build_network
from kt.train import fit
from kt.transfer import TransferModel
from method_settings import SCHEDULE, SETTINGS, make_data
from tables.__main__ import run as tables_command
from tables.dashboards import run as dashboards_command
from tables.records import all_tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text() for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))}
README = ROOT / "README.md"
FULL = "mmdet and mmseg are not installed (bash install.sh full)"


def blocks(language: str, pages: Iterable[str] = PAGES.values()) -> list[str]:
    """The blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", "\n".join(pages), re.DOTALL | re.MULTILINE)


def block_with(text: str) -> str:
    """The one Python block that contains a text."""
    (found,) = [block for block in blocks("python") if text in block]
    return found


def run_in(folder: Path, code: str) -> str:
    """A block as a program of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def replaced(code: str, changes: dict[str, str]) -> str:
    """Code with other texts, each of which has to be there."""
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


def write_classifier(folder: Path, name: str, num_classes: int, width: float = 1.0) -> torch.nn.Module:
    """What a cell keeps of a trained classifier; returns the network."""
    folder.mkdir(parents=True)
    network = build_network(name, num_classes=num_classes, width=width, image_size=32).eval()
    config = {"student": {"network": {"name": name, "width": width, "small_stem": False, "config": None}}}
    spec = DataSpec("cifar100", num_classes, 32, (0.5,) * 3, (0.2,) * 3, 1, 1, ("a",))
    describe_student(folder, config, Classifier(network, (spec.mean, spec.std)), None, spec)
    torch.save(network.state_dict(), folder / "student.pth")
    return network


def test_every_python_block_is_tested() -> None:
    marks = ("Bands(Dataset)", "MyNetwork", "NotNegative", "terms(", "build_data", "kt.load_student", "get_model")
    marks += ("mmseg.registry", 'type="KnowledgeTransfer"')
    assert len(blocks("python")) == len(marks) == len({block_with(mark) for mark in marks})


# ------------------------------------------------------------------------------------------------------ Python blocks


@pytest.fixture(scope="module")
def network_class() -> Any:
    """The network of one's own, cut as its page says."""
    # Annotations are read when stages are registered, so the block needs a module of its own.
    space: dict[str, Any] = {"__name__": "your_own"}
    exec(compile(block_with("MyNetwork"), "your-own.md", "exec"), space)
    return space["MyNetwork"]


def test_a_package_of_ones_own(tmp_path: Path) -> None:
    """Its method trains, and its dataset's key is checked; entry points are as their page has them."""
    points = re.sub(r'\[project.entry-points."(.*)"\]', r"[\1]", blocks("toml")[0])
    lines = dict(re.findall(r'^(\w+) = "(.*)"  #', points, re.MULTILINE))
    assert lines == {"bands": "my_package.names:BANDS", "tiny": "my_package.names:TINY"} | {
        "logits": "my_package.names:Logits",
        "far": "my_package.far",
    }
    names = [block_with("NotNegative"), block_with("Bands(Dataset)")]
    names += ["from kt.data import DatasetSpec", "BANDS = DatasetSpec({'classification': ''}, settings=Bands)"]
    files = {"my_package/__init__.py": "", "my_package/names.py": "\n".join(names)}
    files |= {"my_package/methods.py": block_with("terms("), "own-1.dist-info/METADATA": "Name: own\nVersion: 1\n"}
    points = f"[kt.datasets]\nbands = {lines['bands']}\n[kt.methods]\nlogits = {lines['logits']}\n"
    files["own-1.dist-info/entry_points.txt"] = points
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    code = """
import sys
sys.path[:0] = [".", TESTS]
from kt.data import build_data
from kt.train import fit
from method_settings import SCHEDULE, SETTINGS, Setting, make_data, make_model

SETTINGS["logits"] = Setting({"weight": 0.5})
data = make_data(device_batch=8)
fit(make_model("logits", data.spec.num_classes), data, "out", SCHEDULE)
try:
    build_data({"name": "bands", "period": 3}, ".", batch_size=1, seed=0)
except ValueError as error:
    print(error)
"""
    assert "dataset.period=3: expected one of 2, 4, 8" in run_in(tmp_path, code.replace("TESTS", repr(f"{ROOT}/tests")))
    assert "loss_logits" in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_network_of_ones_own_learns_by_every_method(name: str, network_class: Any, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    data = make_data()
    classes = data.spec.num_classes

    def make(seed: int) -> Classifier:
        seed_everything(seed)
        return Classifier(network_class(classes), (data.spec.mean, data.spec.std))

    teacher, student = make(1), make(2)
    if name == "fixed_feature":
        student.network.load_state_dict(teacher.network.state_dict())
    seed_everything(3)
    taught_by = teacher if setting.teacher else None
    # A searched process is of the pathways of other networks.
    own = {"process": "equal"} if setting.files else {}
    method = build_method(name, student, taught_by, data=data.spec, **{**setting.options, **own})
    hidden: dict[str, Any] = {f"anchor{i}": make(10 + i) for i in range(setting.anchors)}
    hidden |= {"teacher": teacher} if setting.teacher else {}
    before = {key: value.clone() for key, value in student.network.state_dict().items()}
    metrics = fit(TransferModel(student, method, hidden), data, tmp_path, SCHEDULE)
    assert 0 <= metrics["top1"] <= 100
    trained = network_class(classes)
    trained.load_state_dict(torch.load(tmp_path / "student.pth"), strict=True)
    assert any(not torch.equal(value, before[key]) for key, value in trained.state_dict().items())


def test_without_hydra(tmp_path: Path) -> None:
    """On a few random images in CIFAR-100's pickles."""
    folder, rng = tmp_path / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir()
    for split, size in (("train", 192), ("test", 100)):
        images = rng.integers(0, 256, (size, 3072), np.uint8)
        content = {b"data": images, b"fine_labels": [number % 100 for number in range(size)]}
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [f"{number}".encode() for number in range(100)]}))
    torch.save(build_network("resnet56", num_classes=100, image_size=32).state_dict(), tmp_path / "resnet56.pth")
    changes = {'"/data"': repr(str(tmp_path)), '{"epochs": 240}': '{"epochs": 1, "milestones": [0.5]}'}
    out = run_in(tmp_path, replaced(block_with("build_data"), changes))
    assert "'top1':" in out and (tmp_path / "runs" / "first" / "student.pth").exists()


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18", 1.0), ("resnet18", 0.25), ("mobilenet_v1", 0.25), ("resnet20", 1.0)]
)
def test_the_student_comes_back(tmp_path: Path, name: str, width: float) -> None:
    network = write_classifier(tmp_path / "outputs" / "cells" / "0123", name, 100, width)
    images = torch.rand(2, 3, 32, 32)
    student = kt.load_student(tmp_path / "outputs" / "cells" / "0123")
    assert type(student) is type(network) and not student.training
    assert torch.equal(student(images), network(images))


def test_the_stated_ways_back(tmp_path: Path) -> None:
    network = write_classifier(tmp_path / "outputs" / "cells" / "0123", "resnet18", 100)
    torch.save(torch.rand(1, 3, 32, 32), tmp_path / "x.pth")
    shown = "\nprint(student.eval()(torch.load('x.pth')).sum().item())"
    wanted = f"{network(torch.load(tmp_path / 'x.pth')).sum().item()}"
    for mark in ("kt.load_student", "get_model"):
        code = replaced(block_with(mark), {"<id>": "0123"})
        assert run_in(tmp_path, f"import torch\n{code}{shown}").strip() == wanted
    assert isinstance(network, torchvision.models.ResNet)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file or directory"), ("{", "it is damaged"), ("{}", "it is damaged")],
)
def test_a_folder_without_a_student_is_one_line(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "student.json").write_text(content)
    with pytest.raises(kt.errors.UserError) as caught:
        kt.load_student(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


DENSE = {
    "segmentation": "deeplabv2_vgg16",
    "detection": "fasterrcnn_resnet18",
    "pedestrians": "fasterrcnn_mobilenet_v1",
    "keypoints": "pifpaf_resnet50",
    "depth": "depth_resnet18",
}


@pytest.mark.parametrize(("task", "name"), DENSE.items())
def test_dense_students_come_back(tmp_path: Path, task: str, name: str) -> None:
    pytest.importorskip("mmdet", reason=FULL)
    from dense_settings import CLASSES, NORMALISATION, SIZE, WIDTH, make_network
    from kt.models.dense import dense_config

    folder = tmp_path / "outputs" / "cells" / "0123"
    folder.mkdir(parents=True)
    model = make_network(name, task, seed=1)
    network = {"name": name, "width": WIDTH, "small_stem": False, "config": None, "options": None}
    config = {"student": {"network": network}, "dataset": {"image_size": SIZE}}
    spec = DataSpec("scenes", CLASSES[task], SIZE, *NORMALISATION, 1, 1, ("a",))
    describe_student(folder, config, model, dense_config(name, CLASSES[task], WIDTH, SIZE, NORMALISATION), spec)
    torch.save(model.network.state_dict(), folder / "student.pth")
    student = kt.load_student(folder)
    assert type(student) is type(model.network) and not student.training
    own = model.network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in student.state_dict().items())
    if task == "segmentation":
        code = replaced(block_with("mmseg.registry"), {"<id>": "0123"})
        out = run_in(tmp_path, code + "\nprint(type(student).__name__)")
        assert out.split()[-1] == type(model.network).__name__


def test_a_config_of_mmdet_takes_a_method_in(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=FULL)
    from dense_settings import CLASSES, NORMALISATION, SIZE, WIDTH, make_network
    from kt.models.dense import dense_config

    names = {"retinanet_r50_fpn_1x_coco.py": ("retinanet_resnet18", "detection")}
    names["deeplabv3_r101.py"] = ("deeplabv2_resnet101", "segmentation")
    for file, (name, task) in names.items():
        model = dense_config(name, CLASSES[task], WIDTH, SIZE, NORMALISATION)
        (tmp_path / file).write_text(f"model = {model!r}\ndefault_scope = 'mmdet'\n")
    teacher = make_network("deeplabv2_resnet101", "segmentation", seed=1)
    torch.save(teacher.network.state_dict(), tmp_path / "deeplabv3_r101.pth")
    (tmp_path / "mine.py").write_text(block_with('type="KnowledgeTransfer"'))
    out = run_in(
        tmp_path,
        "from mmengine import Config\nfrom mmengine.registry import MODELS\n"
        "model = MODELS.build(Config.fromfile('mine.py').model)\nprint(type(model.transfer.method).__name__)",
    )
    assert out.split()[-1] == "HybridForward"


# ------------------------------------------------------------------------------------------------------- shell blocks


def commands(block: str, folder: Path) -> list[list[str]]:
    """The commands that a block calls, its variables and loops resolved by the shell; nothing is run."""
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    recorder = f'#!/bin/sh\n{{ printf "%s\\036" "$(basename "$0")" "$@"; printf "\\n"; }} >> {shlex.quote(str(log))}\n'
    for name in ("python", "torchrun", "wandb", "chromium"):
        (folder / name).write_text(recorder)
        (folder / name).chmod(stat.S_IRWXU)
    block = block.replace(".venv/bin/python", "python").replace("bash install.sh", "wandb install.sh")
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-eu", "-c", block], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [line.split("\036")[:-1] for line in log.read_text().split("\n")[:-1]]


PLANNED: set[str] = set()  # trainings planned so far: what pages repeat is planned once


def found_commands() -> list[Any]:
    """Every block by itself: what it needs of variables it sets."""
    found = ((path.stem, blocks("bash", [page])) for path, page in PAGES.items())
    return [pytest.param(block, id=f"{name}{number}") for name, own in found for number, block in enumerate(own)]


@pytest.mark.parametrize("block", found_commands())
def test_shell_blocks_in_shortened_form(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainings are planned instead of run: every key, choice and row of theirs has to exist."""
    called = commands(block, tmp_path / "bin")
    assert called
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet56").mkdir()
    (tmp_path / "resnet56" / "student.pth").write_bytes(b"weights")
    (tmp_path / "process.pth").write_bytes(b"process")
    for words in called:
        program, *arguments = words
        if program == "python" and arguments[:2] == ["-m", "experiments.run"]:
            short = [] if {"--cfg", "--help", "settings=true"} & {*arguments} else ["plan=true"]
            words = [word for word in words if not word.startswith("rehearse=")]
            # Other blocks have all the tables.
            words = [word.replace("+table=all", "+table=stage_count,kcd_dynamic") for word in words]
            if shlex.join(words) in PLANNED:
                continue
            status = run_command([*words[3:], *short])
            assert status == 0, (shlex.join(words), capsys.readouterr().err)
            PLANNED.add(shlex.join(words))
        elif program == "python" and arguments[:2] == ["-m", "tables"]:
            assert tables_command(arguments[2:]) in (0, 3), words
        elif program == "python" and arguments[:2] == ["-m", "experiments.cells"]:
            (tmp_path / "outputs" / "cells").mkdir(parents=True, exist_ok=True)
            assert cells_command(arguments[2:]) == 0
        elif program == "python" and arguments[:2] == ["-m", "tables.dashboards"]:
            with pytest.raises(UserError, match="imagenet_compression: no such table has been rendered"):
                dashboards_command(arguments[2:])
        elif program == "python" and arguments[:2] == ["-m", "experiments.bench"]:
            from experiments.bench import parse_arguments

            parse_arguments(arguments[2:])
        elif program == "chromium":
            (made,) = [word.partition("=")[2] for word in words if word.startswith("--screenshot=")]
            assert Path(words[-1]).parts[:2] == ("outputs", "tables") and Path(words[-1]).parts[2] in PAGES[README]
            assert 0 < (ROOT / made).stat().st_size < 150_000
        else:
            known = ("wandb install.sh", "wandb install.sh full", "python -m pytest -n 2")
            known += ("wandb leet outputs/wandb", "wandb sync --yes")
            assert " ".join(words) in known


def test_stated_install_arguments_exist(tmp_path: Path) -> None:
    named = set(re.findall(r"bash install\.sh((?: [a-z]+)*)[` ]", "\n".join(PAGES.values())))
    script = (ROOT / "install.sh").read_text()
    assert {"", " full", " full compiled"} == {name.rstrip() for name in named}
    assert all(name.strip() in script for name in named)
    # An unknown argument is refused before anything is installed.
    done = subprocess.run(["bash", str(ROOT / "install.sh"), "ful"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown arguments 'ful'" in done.stderr


# -------------------------------------------------------------------------------------------------------------- links


def prose(path: Path) -> str:
    """A page without its blocks, whose comments look like headings."""
    return re.sub(r"^```.*?^```$", "", PAGES[path], flags=re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[tuple[Path, str]]:
    """Files and anchors of this project that a page links to."""
    parts = (target.partition("#") for target in re.findall(r"\]\(([^)]+)\)", prose(path)) if "://" not in target)
    return [((path.parent / name).resolve() if name else path, anchor) for name, _, anchor in parts]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for aim, anchor in links(path):
        assert aim.exists(), aim
        titles = re.findall(r"^#+ (.*)$", prose(aim), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_readme_leads_to_every_page_and_table() -> None:
    assert len(PAGES[README].splitlines()) <= 200
    assert {*PAGES} - {README} <= {aim for aim, _ in links(README)}
    listed = re.findall(r"^\| \[(\w+)\]\(conf/table/\1\.yaml\) \| (.*?) \| (.*) \|$", PAGES[README], re.MULTILINE)
    assert listed == [(record.name, record.title, record.table["caption"]) for record in all_tables()]
