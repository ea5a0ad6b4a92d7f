"""What a config may contain beside the settings of `kt.settings`, and the choices that its keys have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from omegaconf import OmegaConf

from experiments.groups import GROUPS, choices, dataset_choice, stood_in
from kt.data.names import DATASETS
from kt.errors import UserError
from kt.needs import Need, alone
from kt.settings import SOURCE, Count, Dataset, Method, Positive, Schedule, Settings, Share, Whole


def is_group(key: str) -> bool:
    """Whether an override key (`teacher`, `dataset@teacher.dataset`) chooses a file instead of setting a value."""
    return key.split("@")[0] in GROUPS


def sign(key: str) -> str:
    """What Hydra wants before an override of `key`; every key is let in, since `validate` refuses the wrong ones.

    Nothing where a group of the defaults list is replaced, `+` where one is added, `++` for values.
    """
    if not is_group(key):
        return "++"
    added = key.startswith(("dataset@", "schedule@", "teacher@", "student@")) and key not in CHOSEN
    return "+" if key == "table" or added else ""


TEACHER_DATA, TEACHER_SCHEDULE = "dataset@teacher.dataset", "schedule@teacher.schedule"
SEARCH_DATA, SEARCH_SCHEDULE = "dataset@method.search.dataset", "schedule@method.search.schedule"
# The same where a method around another one searches.
BASE_DATA, BASE_SCHEDULE = (key.replace("method.", "method.base.") for key in (SEARCH_DATA, SEARCH_SCHEDULE))
CHOSEN = (SEARCH_SCHEDULE, BASE_SCHEDULE)  # of the keys of methods, those that are in a defaults list
SOURCE_DATA = f"dataset@method.{SOURCE}"


def with_recipe(chosen: Mapping[str, str], default: str = "scenes", stand_in: bool = False) -> dict[str, str]:
    """Overrides by key in which a teacher or search with its own dataset has that dataset's recipe, as a student would.

    For a student on embedded data these datasets and that of source images give way to their embedded stand-ins.

    Args:
        chosen: Key -> value.
        default: The student's dataset where none is chosen.
        stand_in: Whether the student's dataset gives way too.
    """
    found = dict(chosen)
    student = found.get("dataset", default)
    if stand_in:
        found["dataset"] = student = stood_in(student)
    embedded = student in choices("dataset") and DATASETS[dataset_choice(student)["name"]].embedded
    recipes = {TEACHER_DATA: TEACHER_SCHEDULE, SEARCH_DATA: SEARCH_SCHEDULE, BASE_DATA: BASE_SCHEDULE}
    for data, schedule in {**recipes, SOURCE_DATA: None}.items():
        if embedded and data in found:
            found[data] = stood_in(found[data])
        if schedule is not None and found.get(data) in choices("dataset"):
            found.setdefault(schedule, found[data])
    return found


def scaled(epochs: int, fraction: float) -> int:
    """A schedule's length at a scale; at least one epoch."""
    return max(1, round(epochs * fraction))


def case(value: Any, settings: Mapping[str, Any], otherwise: Any = None) -> Any:
    """The setting for a value, or for every other one: `${case:${student.network.name},{resnet18:0.2},0.1}`."""
    found = settings.get(value, otherwise)
    return OmegaConf.create(found) if isinstance(found, list | dict) else found


OmegaConf.register_new_resolver("scaled", scaled, replace=True)
OmegaConf.register_new_resolver("case", case, replace=True)


class Network(Settings):
    """A network of `kt.models` by name, or one that a config file of mmdet or mmseg describes."""

    name: str
    width: Positive | None
    small_stem: bool
    config: str | None
    options: dict[str, Any] | None


class Teacher(Settings):
    """A teacher: its network and, where they are not the student's, parts of its own dataset and schedule."""

    sources: ClassVar[Mapping[str, str]] = {
        "norm": "ours, a teacher's normalisations are as they were trained",
        "pretrained": "the library's weights",
    }

    network: Network | None
    dataset: dict[str, Any] | None
    schedule: dict[str, Any] | None
    seed: Whole
    checkpoint: str | None
    pretrained: str | None
    norm: Literal["eval", "batch"]


class Student(Settings):
    """A student: its network and where its initial weights come from, if not from the seed."""

    sources: ClassVar[Mapping[str, str]] = {"pretrained": "the library's weights"}

    network: Network
    checkpoint: str | None
    pretrained: str | None


class Scale(Settings):
    """How much of the paper's setting a run affords."""

    name: str
    fraction: Share
    width: Positive
    stand_in: bool
    pretrained: bool


class Wandb(Settings):
    """Where Weights & Biases logs go."""

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None


class TableLabels(Settings):
    """Which row of which table a cell belongs to; for names of logs only."""

    name: str | None
    row: str | None
    role: str | None
    label: str | None


def _overlapping(config: Mapping[str, Any]) -> dict[str, Need]:
    """The student trained alone against the (transformed) teacher; without one, against another initialisation."""
    taught = config["teacher"]["network"] is not None
    return {"solo": Need(alone(config))} if taught else {"other": Need(alone(config, seed_offset=1))}


def _distant(solo: bool, config: Mapping[str, Any]) -> dict[str, Need]:
    """Distance of the teacher's outputs and those of the student trained alone, or of the cell's own student."""
    if config["teacher"]["network"] is None:
        raise UserError(f"evaluation={config['evaluation']}: compares with the teacher; the cell has none")
    return {"solo": Need(alone(config))} if solo else {}


# A measurement on a finished cell, as `evaluation=` takes it: what it needs beside the cell's own needs.
ANALYSES: dict[str, Callable[[Mapping[str, Any]], dict[str, Need]]] = {
    "channel_overlap": _overlapping,
    "consistency_solo": functools.partial(_distant, True),
    "consistency": functools.partial(_distant, False),
}
MAPS = "activation_maps.npz"
LEFT = {"channel_overlap": (MAPS,)}  # what an analysis leaves beside its numbers


class Config(Settings):
    """The whole config of one command."""

    sources: ClassVar[Mapping[str, str]] = {"precision": "ours, single precision"}

    teacher: Teacher
    student: Student
    dataset: Dataset
    method: Method
    schedule: Schedule
    scale: Scale
    wandb: Wandb
    table: TableLabels
    cell: str
    seed: Whole
    data_root: str
    output_root: str
    device: str
    precision: Literal["fp32", "bf16"]
    activation_checkpointing: bool
    threads: Count | None
    workers: Count | None
    evaluation: str | None
    rows: str | list[str] | None
    role: str | list[str] | None
    plan: bool
    rehearse: bool | Literal["synthetic"]
    settings: bool
