"""One table of settings drives the tests of every registered method."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kt.classifier import Classifier
from kt.data import DataSpec, build_data, unlabelled
from kt.engine import seed_everything
from kt.methods import build_method
from kt.models import build_network
from kt.transfer import TransferModel


@dataclass
class Setting:
    """A method with options for a test of seconds; `student` and `teacher` name networks."""

    options: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = "resnet20"
    student: str = "resnet8"
    phases: tuple[str, ...] = ("train",)
    untouched: str = "$^"  # a pattern of the student's keys that training leaves alone
    anchors: int = 0
    falls: str = "loss"  # what is lower after two epochs
    files: dict[str, Any] = field(default_factory=dict)  # what `torch.load` finds in those of other cells, by need


def make_process(*transforms: str, levels: int = 3) -> dict[str, Any]:
    """A process of three steps, from so many maps to as many, in which pathways rise above the usual clip or fall."""
    numbers = range(1, levels + 1)
    names = [f"t{i}-s{j}-{kind}" for i in numbers for j in numbers for kind in transforms]
    slopes = torch.linspace(-1, 1, len(names))
    logits = 0.5 + torch.tensor([-1.0, 0.1, 1.2])[:, None] * slopes
    # All weights fall: with other pathways the loss is another one, which still has to get smaller.
    weights = torch.tensor([1.0, 0.7, 0.4])[:, None] * logits.softmax(1)
    return {"logits": logits, "weights": weights, "pathways": names}


@contextlib.contextmanager
def written(files: Mapping[str, Any]) -> Iterator[dict[str, Path]]:
    """What is in files of other cells, by need, as such files."""
    with tempfile.TemporaryDirectory() as folder:
        for need, content in files.items():
            torch.save(content, Path(folder, need))
        yield {need: Path(folder, need) for need in files}


SETTINGS: dict[str, Setting] = {
    "none": Setting(teacher=None),
    "finetune": Setting(student="resnet20"),
    "fixed_feature": Setting({"frozen": "first_block"}, student="resnet20", untouched="conv1|bn1|layer1"),
    "kd": Setting(),
    "kd_fixed_feature": Setting(phases=("kd", "train")),
    "fitnet": Setting(),
    "at": Setting(),
    "nst": Setting(),
    "ft": Setting(phases=("paraphraser", "train")),
    "ab": Setting(phases=("boundaries", "train")),
    "hybrid_forward": Setting({"balance": "dynamic"}),
    "stagewise": Setting(phases=("stage1", "stage2", "stage3", "train")),
    "l2": Setting({"weight": 1.0}),
    "rkd": Setting(),
    "rco": Setting({"weight": 1.0}, anchors=1),
    "distpro": Setting({"transforms": ["conv1", "conv2"]}, files={"search": make_process("conv1", "conv2")}),
    "distpro_search": Setting({"transforms": ["conv1", "conv3"]}),
    # The match begins after the first epoch.
    "as": Setting({"auxiliary": "se"}, falls="loss_task"),
    "mas": Setting({"pair_weights": "uniform"}, falls="loss_task"),
    "m2as": Setting(falls="loss_task"),
    "m2a2s": Setting({"stages": [0, 1], "first_epochs": 0}, falls="loss_task"),
    # Embeddings are told from the random memory of the first epoch more easily than from other embeddings.
    "crd": Setting({"negatives": 100}, falls="loss_task"),
    "l2t": Setting({"meta_lr": 0.01}),
    "reviewkd": Setting(),
    "ofd": Setting({"margin": "measured"}),
    "kcd": Setting({"base": {"name": "l2", "weight": 1.0}, "update_every": 1}, phases=("solo", "train")),
    "kcd+fitnet": Setting(
        {"base": {"hint_layer": -1, "regressor": "none", "init_fraction": 0.5}, "metric": "kl"},
        phases=("solo", "hint", "train"),
    ),
    "kcd+ab": Setting({"groups": 2, "base": {"connector": "none"}}, phases=("solo", "boundaries", "train")),
    "kcd+rkd": Setting(
        {"strategy": "subnet_res", "beside": {"weight": 1.0}},
        student="resnet20_half",
        phases=("solo", "transform", "train"),
    ),
    "kcd+rco": Setting({"base": {"weight": 1.0}, "strategy": "random"}, anchors=1),
}

SCHEDULE = {"epochs": 2, "batch_size": 16, "lr": 0.02, "milestones": [0.5]}
DATASET = {
    "name": "scenes",
    "task": "classification",
    "image_size": 32,
    "augmentation": "crop_flip",
    "train_size": 64,
    "test_size": 32,
}


@functools.cache
def drawn() -> Path:
    """A folder in which a process keeps the scenes that it has drawn."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def make_data(
    seed: int = 0, rank: int = 0, world: int = 1, device_batch: int | None = None, device: str = "cpu"
) -> Any:
    """A few embedded scenes, and beside them half as many of another style without labels."""
    shared: dict[str, Any] = {"batch_size": 16, "seed": seed, "rank": rank, "world": world, "device": device}
    shared["cache_root"] = drawn()
    data = build_data(DATASET, Path("."), device_batch=device_batch, **shared)
    data.further["source"] = unlabelled({**DATASET, "style": "synthetic"}, 0.5, Path("."), **shared)
    return data


def make_classifier(name: str, num_classes: int, seed: int) -> Classifier:
    """A quarter-width network with weights drawn from a seed."""
    seed_everything(seed)
    return Classifier(build_network(name, num_classes=num_classes, width=0.25, image_size=32))


def make_teacher(name: str, num_classes: int, seed: int = 1) -> Classifier:
    """A network whose running statistics fit images, as a trained one's do; else its activations explode."""
    teacher = copy.deepcopy(_fitted(name, num_classes, seed))
    seed_everything(seed)  # whatever is drawn next, made anew or not
    return teacher


@functools.cache
def _fitted(name: str, num_classes: int, seed: int) -> Classifier:
    teacher = make_classifier(name, num_classes, seed)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(20):
            teacher.train()(images)
    return teacher


@functools.cache
def facts() -> DataSpec:
    """Those of the embedded scenes."""
    return make_data().spec


def make_model(name: str, num_classes: int, data: DataSpec | None = None, **changes: Any) -> TransferModel:
    """The setting's student, teacher and method; `changes` override options.

    `data` are those that it trains on, by default the embedded scenes.
    """
    setting = SETTINGS[name]
    teacher = None if setting.teacher is None else make_teacher(setting.teacher, num_classes)
    student = make_classifier(setting.student, num_classes, seed=2)
    seed_everything(3)
    with written(setting.files) as files:
        method = build_method(
            name, student, teacher, data=data or facts(), files=files, **{**setting.options, **changes}
        )
    teachers = {f"anchor{i}": make_teacher(setting.teacher, num_classes, 10 + i) for i in range(setting.anchors)}
    return TransferModel(student, method, teachers | ({"teacher": teacher} if teacher is not None else {}))


def make_cell(name: str, rank: int, world: int) -> tuple[TransferModel, Any, dict[str, Any]]:
    """A setting's model, data and schedule on one of several processes.

    `<setting>, one update` takes a single step, in passes of 4 images; `<setting>, dropout, one update` with dropout.
    """
    setting, _, single = name.partition(", ")
    data = make_data(rank=rank, world=world, device_batch=4 if single else None)
    length = {"epochs": None, "iterations": 1} if single else {}
    model = make_model(setting, data.spec.num_classes)
    if "dropout" in single:
        layer = next(each for each in model.student.modules() if isinstance(each, torch.nn.BatchNorm2d))
        layer.register_forward_hook(lambda layer, _, output: torch.dropout(output, 0.5, layer.training))
    return model, data, {**SCHEDULE, **length}
