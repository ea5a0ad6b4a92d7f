"""What a config may contain beside the settings of `kt.settings`, and the choices that its keys have."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from omegaconf import OmegaConf
from pydantic import Field

from experiments.groups import GROUPS, choices, dataset_choice, stood_in
from kt.data.names import DATASETS
from kt.errors import UserError
from kt.needs import Need, alone
from kt.settings import SOURCE, Count, Dataset, Method, Name, Schedule, Settings, Share, Text, Whole, Width


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


def other_length(key: str) -> str | None:
    """The key that goes to null where this one of a schedule is set: it is as long as epochs or as iterations say.

    Those of a teacher are parts that `kt.needs.teacher_of` fits into the student's.
    """
    group, _, leaf = key.rpartition(".")
    other = {"epochs": "iterations", "iterations": "epochs"}.get(leaf)
    return f"{group}.{other}" if other and group.endswith("schedule") and group != "teacher.schedule" else None


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
OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)


class Network(Settings):
    """A network of `kt.models` by name, or one that a config file of mmdet or mmseg describes."""

    name: str = Field(description="one of the choices of teacher= and student=")
    width: Width | None = Field(
        description="share of the channels; null: the scale's on embedded data, all of them on other data"
    )
    small_stem: bool = Field(description="a stem of stride 1 for small images, where the network has another one")
    config: Text | None = Field(description="a file of mmdet or mmseg that describes the network named config")
    options: dict[str, Any] | None = Field(description="changes to that file, by dotted keys")


class Teacher(Settings):
    """A teacher: its network and, where they are not the student's, parts of its own dataset and schedule."""

    sources: ClassVar[Mapping[str, str]] = {
        "norm": "ours, a teacher's normalisations are as they were trained",
        "pretrained": "the library's weights",
        "precision": "ours, single precision",
    }

    network: Network | None = Field(description="what teacher= chooses; null: there is none")
    dataset: dict[str, Any] | None = Field(
        description="parts of its own dataset; null: the student's. dataset@teacher.dataset=<choice> for a whole one"
    )
    schedule: dict[str, Any] | None = Field(
        description="parts of its own schedule; null: the student's. schedule@teacher.schedule=<choice> for a whole one"
    )
    seed: Whole = Field(description="of its training, whatever the student's")
    checkpoint: Text | None = Field(
        description="a file with its weights; null: it is trained here, once for all who need it"
    )
    pretrained: Text | None = Field(
        description="the library's weights that it is made of at a scale that takes any; null: none"
    )
    norm: Literal["eval", "batch"] = Field(
        description="normalisations while it teaches: eval (as they were trained) | batch (statistics of the batch)"
    )
    precision: Literal["fp32", "bf16"] = Field(description="of what it computes, frozen, beside the student")


class Student(Settings):
    """A student: its network and where its initial weights come from, if not from the seed."""

    sources: ClassVar[Mapping[str, str]] = {"pretrained": "the library's weights"}

    network: Network = Field(description="what student= chooses")
    checkpoint: Text | None = Field(description="a file with its initial weights; null: they are drawn")
    pretrained: Text | None = Field(
        description="the library's weights that it starts from at a scale that takes any; null: none"
    )


class Scale(Settings):
    """How much of the paper's setting a run affords."""

    name: Name = Field(description="of the folder that a table is rendered into")
    fraction: Share = Field(description="share of a recipe's length")
    width: Width = Field(description="share of the networks' channels, on embedded data only")
    stand_in: bool = Field(
        description="whether a table's dataset gives way to its embedded stand-in, unless dataset= is given"
    )
    tuned: dict[str, Any] = Field(
        description="what rows of tables have on a stand-in, instead of what is meant for real data"
    )
    pretrained: bool = Field(description="whether libraries' weights are taken")


class Wandb(Settings):
    """Where Weights & Biases logs go."""

    mode: Literal["offline", "online", "disabled"] = Field(description="whether and when runs are uploaded")
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:\r\n]{1,128}$")] = Field(description="of the runs")
    entity: Text | None = Field(description="whose they are; null: your own")


class TableLabels(Settings):
    """Which row of which table a cell belongs to; for names of logs only."""

    name: Name | None = Field(description="set by the table itself")
    row: str | None = Field(description="set by the table itself")
    role: str | None = Field(description="set by the table itself")
    label: str | None = Field(description="set by the table itself")


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

    teacher: Teacher = Field(description="who teaches")
    student: Student = Field(description="who is trained")
    dataset: Dataset = Field(description="on what")
    method: Method = Field(description="how")
    schedule: Schedule = Field(description="how long, and by what steps")
    scale: Scale = Field(description="how much of the paper's setting")
    wandb: Wandb = Field(description="where Weights & Biases logs go")
    table: TableLabels = Field(description="which row of which table a cell is, for names of logs")
    cell: str = Field(
        description="student | teacher: the teacher alone, as the students of this config would use it | the name of "
        "another cell that the student needs"
    )
    seed: Whole = Field(description="of initial weights and the order of images; several are averaged: seed=0,1,2")
    data_root: Text = Field(description="the folder of datasets, by default what KT_DATA_ROOT names")
    output_root: Text = Field(description="the folder of results")
    device: str = Field(description="auto | cpu | cuda | cuda:<index>")
    precision: Literal["fp32", "bf16"] = Field(description="of the forward passes")
    compile: bool | Literal["auto"] = Field(
        description="true: passes of the training are compiled (Inductor) | auto: where that repays its time"
    )
    activation_checkpointing: bool = Field(description="true: less memory for longer steps, to the same numbers")
    threads: Count | None = Field(description="CPU threads of a cell; null: one on embedded data, else all")
    workers: Count | None = Field(
        description="cells of a table or sweep side by side; null: one per core on embedded data, else one"
    )
    evaluation: str | None = Field(
        description="a choice of dataset= to score the finished student on as well, or an analysis; null: none"
    )
    rows: str | list[str] | None = Field(description="with a table: ids of the rows to train")
    role: str | list[str] | None = Field(description="with a table: the rows to train by their role")
    plan: bool = Field(description="true: print what would be trained, and how long that may take")
    rehearse: bool | Literal["synthetic"] = Field(
        description="true: measure what each cell takes, train nothing | synthetic: on images drawn in the place of "
        "the data"
    )
    settings: bool = Field(description="true: print what a table is at scale=paper, and where each setting comes from")
