"""What a cell needs of other cells. Imports no torch: a plan says what is needed before anything is trained.

A need is the whole config of another cell and the file wanted of it. A method's settings (`kt.settings.Method.needs`)
make theirs from the config of the cell that needs them: by `alone` and `teacher_of`, or by any changes to that config,
such as another method, dataset or schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kt.models.names import DENSE_NETWORKS, WEIGHTS_DATASET

Config = dict[str, Any]

WEIGHTS = "student.pth"
PROCESS = "process.pth"  # a searched distillation process
SNAPSHOTS = "snapshots"  # the folder of a plain student's weights along its training

NO_TEACHER: Config = {
    "network": None,
    "dataset": None,
    "schedule": None,
    "seed": 0,
    "checkpoint": None,
    "pretrained": None,
    "norm": "eval",
    "precision": "fp32",
}


@dataclass(frozen=True)
class Need:
    """A cell that another one needs.

    Attributes:
        config: The whole config of that cell, as the config of a command.
        file: What is wanted of its folder. `WEIGHTS` and `SNAPSHOTS` reach the model as hidden networks under the
            need's name, built as that cell's student is; any other file reaches the method's constructor in `files`.
    """

    config: Mapping[str, Any]
    file: str = WEIGHTS


def _untrained(config: Config) -> Config:
    return {**config, "schedule": {**config["schedule"], "epochs": 0, "iterations": None}}


def alone(config: Mapping[str, Any], seed_offset: int = 0, trained: bool = True) -> Config:
    """The student of a cell trained alone.

    Args:
        config: The cell's config.
        seed_offset: Its seed minus that of the cell.
        trained: False takes its initial weights.
    """
    made = {**config, "teacher": NO_TEACHER, "method": {"name": "none"}, "seed": config["seed"] + seed_offset}
    return made if trained else _untrained(made)


def teacher_dataset(config: Mapping[str, Any]) -> Config:
    """A teacher's dataset: the student's with the keys of `teacher.dataset`."""
    return {**config["dataset"], **(config["teacher"]["dataset"] or {})}


def teacher_of(config: Mapping[str, Any], seed_offset: int = 0, trained: bool = True) -> Config:
    """The teacher of a cell as a cell of its own: a plain student of that network.

    Keys of `teacher.dataset` and `teacher.schedule` replace those of the student's. Weights from a file or (where the
    scale allows and the data are ImageNet) from torchvision are scored, not trained: zero epochs.

    Args:
        config: The cell's config.
        seed_offset: Its seed minus that of the cell's own teacher; with another one it is always trained here.
        trained: False takes its initial weights.
    """
    teacher, dataset = config["teacher"], teacher_dataset(config)
    if seed_offset or not trained:
        teacher = {**teacher, "checkpoint": None, "pretrained": None}
    own = teacher["schedule"] or {}
    schedule = {**config["schedule"], **own}
    # A length in epochs replaces one in iterations, and the other way round.
    schedule |= {"iterations": None} if own.get("epochs") else {"epochs": None} if own.get("iterations") else {}
    network = teacher["network"]
    dense = network["name"] in DENSE_NETWORKS
    full = network["width"] in (None, 1, 1.0) and not network["small_stem"]
    usable = config["scale"]["pretrained"] and full and (dense or dataset["name"] == WEIGHTS_DATASET)
    pretrained = teacher["pretrained"] if usable and not teacher["checkpoint"] else None
    if teacher["checkpoint"] or (pretrained and not dense):
        schedule |= {"epochs": 0, "iterations": None}
    student = {"network": network, "checkpoint": teacher["checkpoint"], "pretrained": pretrained}
    made = {**config, "student": student, "dataset": dataset, "schedule": schedule}
    return alone({**made, "seed": teacher["seed"]}, seed_offset, trained)
