"""One table of settings drives the tests of detectors and segmentors under every method that can teach them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kt.data import Data, build_data
from kt.dense import DenseModel
from kt.engine import seed_everything
from kt.methods import build_method
from kt.models.dense import build_dense, dense_config
from kt.transfer import TransferModel
from method_settings import drawn, make_process, written

SIZE = (32, 64)
WIDTH = 0.125
NORMALISATION = ((0.44, 0.5, 0.54), (0.17, 0.2, 0.25))
SCHEDULE = {
    "epochs": None,
    "iterations": 4,
    "interval": 2,
    "batch_size": 2,
    "optimizer": "adamw",
    "lr": 1e-3,
    "clip_grad": 10.0,
    "policy": "poly",
}
DATASET = {
    "name": "scenes",
    "image_size": list(SIZE),
    "crop_size": None,
    "augmentation": "flip",
    "subset": None,
    "validation": 0.0,
    "style": "photo",
    "train_size": 12,
    "test_size": 4,
    "folder": None,
    "train_split": None,
    "test_split": None,
    "num_classes": None,
}
CLASSES = {"segmentation": 13, "detection": 8, "pedestrians": 1, "keypoints": 7, "depth": 1}
SPARSE = ", sparse"
SAMPLES = 200


@dataclass
class Setting:
    """A student on a task, its method and teacher (a network and the task it was made for).

    `<network>, sparse` reads 200 measured pixels beside colours.
    """

    student: str
    task: str
    method: str = "none"
    teacher: tuple[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)  # what `torch.load` finds in those of other cells, by need


DETECTOR, SEGMENTOR, POSE = (
    ("fasterrcnn_resnet18", "detection"),
    ("deeplabv2_resnet101", "segmentation"),
    ("pifpaf_resnet50", "keypoints"),
)
WIDER = ("fasterrcnn_resnet50", "detection")
PSPNET = ("pspnet_resnet18", "segmentation")
DEPTH = ("depth_resnet50", "depth")
DYNAMIC = {"balance": "dynamic"}
FEW = {"base": {"connections": [[4, 1], [4, 3], [2, 4]], "validation": 0.4}}
EQUAL = {"base": {"connections": [[4, 1], [4, 2], [4, 3]], "process": "equal"}}
SETTINGS: dict[str, Setting] = {
    "segmentor none": Setting("deeplabv2_vgg16", "segmentation"),
    "segmentor fitnet": Setting("deeplabv2_vgg16", "segmentation", "fitnet", DETECTOR, {"weight": 1.0}),
    "segmentor at": Setting("deeplabv2_vgg16", "segmentation", "at", DETECTOR),
    "segmentor hybrid_forward": Setting("deeplabv2_vgg16", "segmentation", "hybrid_forward", SEGMENTOR, DYNAMIC),
    "pspnet ifvd": Setting("pspnet_mobilenet_v2", "segmentation", "ifvd", PSPNET),
    "pspnet ifvd+reviewkd": Setting("pspnet_mobilenet_v2", "segmentation", "ifvd+reviewkd", PSPNET),
    "pspnet ifvd+distpro_search": Setting("pspnet_resnet18", "segmentation", "ifvd+distpro_search", PSPNET, FEW),
    "pspnet ifvd+distpro": Setting("pspnet_mobilenet_v2", "segmentation", "ifvd+distpro", PSPNET, EQUAL),
    "semantic fpn hybrid_forward": Setting(
        "semantic_fpn_mobilenet_v1", "segmentation", "hybrid_forward", DETECTOR, DYNAMIC
    ),
    "deeplabv3 hybrid_forward": Setting("deeplabv3_resnet50", "segmentation", "hybrid_forward", DETECTOR, DYNAMIC),
    "faster r-cnn none": Setting("fasterrcnn_mobilenet_v1", "pedestrians"),
    "faster r-cnn fitnet": Setting("fasterrcnn_mobilenet_v1", "pedestrians", "fitnet", POSE, {"weight": 1.0}),
    "faster r-cnn at": Setting("fasterrcnn_mobilenet_v1", "pedestrians", "at", POSE),
    "faster r-cnn hybrid_forward": Setting("fasterrcnn_mobilenet_v1", "pedestrians", "hybrid_forward", POSE, DYNAMIC),
    "retinanet fitnet": Setting(
        "retinanet_resnet18", "detection", "fitnet", DETECTOR, {"weight": 1.0, "hint_layer": "blocks"}
    ),
    "retinanet nst": Setting("retinanet_resnet18", "detection", "nst", DETECTOR, {"stages": "blocks"}),
    "retinanet stagewise": Setting("retinanet_resnet18", "detection", "stagewise", DETECTOR),
    "faster r-cnn l2": Setting("fasterrcnn_resnet18", "detection", "l2", WIDER, {"reduction": "sum"}),
    "faster r-cnn kcd": Setting(
        "fasterrcnn_resnet18", "detection", "kcd", WIDER, {"base": {"name": "l2", "reduction": "sum"}}
    ),
    "faster r-cnn kcd learned": Setting(
        "fasterrcnn_resnet18", "detection", "kcd", WIDER, {"strategy": "subnet_fc", "match": "adapter"}
    ),
    "depth kd": Setting("depth_resnet18, sparse", "depth", "kd", ("depth_resnet50, sparse", "depth")),
    "depth hybrid_forward": Setting("depth_resnet18", "depth", "hybrid_forward", DEPTH, DYNAMIC),
    "depth reviewkd": Setting("depth_resnet18, sparse", "depth", "reviewkd", DETECTOR),
    "depth fitnet": Setting("depth_resnet18", "depth", "fitnet", DEPTH, {"weight": 1.0}),
    "depth at": Setting("depth_resnet18", "depth", "at", DEPTH),
    "depth l2": Setting("depth_resnet18", "depth", "l2", DEPTH),
    "depth stagewise": Setting("depth_resnet18", "depth", "stagewise", DEPTH),
    "depth distpro_search": Setting("depth_resnet18", "depth", "distpro_search", DEPTH, FEW["base"]),
    "depth distpro": Setting(
        "depth_resnet18", "depth", "distpro", DEPTH, files={"search": make_process("complex", levels=4)}
    ),
    "retinanet hybrid_forward": Setting("retinanet_resnet18", "detection", "hybrid_forward", SEGMENTOR, DYNAMIC),
}


def make_data(task: str, rank: int = 0, world: int = 1, **changes: Any) -> Data:
    """A few embedded scenes, those of depth with measured pixels for who wants them."""
    if task == "depth":
        changes = {"name": "scenes_depth", "depth_samples": SAMPLES, **changes}
    batch_size = changes.pop("batch_size", SCHEDULE["batch_size"])
    dataset = {**DATASET, "task": task, **changes}
    return build_data(dataset, Path("."), batch_size=batch_size, seed=0, rank=rank, world=world, cache_root=drawn())


def make_network(name: str, task: str, seed: int) -> DenseModel:
    """A slim network with weights drawn from a seed."""
    seed_everything(seed)
    return DenseModel(build_dense(config_of(name, task)))


def config_of(name: str, task: str) -> dict[str, Any]:
    """The config that it is built from."""
    mean, std = NORMALISATION
    if name.endswith(SPARSE):
        name, mean, std = name.removesuffix(SPARSE), (*mean, 0.0), (*std, 1.0)
    return dense_config(name, CLASSES[task], WIDTH, SIZE, (mean, std))


def make_teacher(name: str, task: str) -> DenseModel:
    """A network whose running statistics fit images, as a trained one's do."""
    teacher = copy.deepcopy(_fitted(name, task))
    seed_everything(1)  # whatever is drawn next, made anew or not
    return teacher


@functools.cache
def _fitted(name: str, task: str) -> DenseModel:
    teacher = make_network(name, task, seed=1)
    images = torch.rand(8, 3 + name.endswith(SPARSE), *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(10):
            teacher.train().extract(images)
    return teacher


def make_model(name: str, **changes: Any) -> TransferModel:
    """The setting's student, teacher and method; `changes` override options."""
    setting = SETTINGS[name]
    teacher = make_teacher(*setting.teacher) if setting.teacher else None
    student = make_network(setting.student, setting.task, seed=2)
    seed_everything(3)
    with written(setting.files) as files:
        method = build_method(setting.method, student, teacher, files=files, **{**setting.options, **changes})
    return TransferModel(student, method, {"teacher": teacher} if teacher is not None else None)


def make_cell(name: str, rank: int, world: int) -> tuple[TransferModel, Data, dict[str, Any]]:
    """A setting's model, data and schedule on one of several processes.

    `<setting>, comparable` has nothing random in its steps, the same images a step however many processes share them,
    and an optimizer that does not blow up a gradient's last bits.
    """
    setting, _, comparable = name.partition(", ")
    model = make_model(setting)
    if not comparable:
        size = SCHEDULE["batch_size"] * world  # what a process sees has to do for batch statistics
        data = make_data(SETTINGS[setting].task, rank, world, batch_size=size)
        return model, data, {**SCHEDULE, "batch_size": size}
    for module in model.student.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    schedule = {**SCHEDULE, "optimizer": "sgd", "lr": 0.01, "batch_size": 4}
    data = make_data(SETTINGS[setting].task, rank, world, batch_size=4, augmentation="none")
    return model, data, schedule
