"""What a config may contain beside the settings of `kt.settings`, and errors that name the key and the cure.

Hydra's own struct check stops at `+key=value`, and its messages span many lines. So nothing is left to it: the command
line's keys are all let in, and the composed config is compared with classes of settings.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.groups import CONF, GROUPS, choices
from kt.errors import UserError, nearest
from kt.settings import (
    KCD,
    METHODS,
    Count,
    Dataset,
    Method,
    Need,
    Positive,
    Schedule,
    Settings,
    Share,
    Whole,
    check_value,
    defaults,
    describe,
    kinds,
    shown,
)


def is_group(key: str) -> bool:
    """Whether an override key (`teacher`, `dataset@teacher.dataset`) chooses a file instead of setting a value."""
    return key.split("@")[0] in GROUPS


def sign(key: str) -> str:
    """What Hydra wants before an override of `key`; every key is let in, since `validate` refuses the wrong ones.

    Nothing where a group of the defaults list is replaced, `+` where one is added, `++` for values.
    """
    if not is_group(key):
        return "++"
    return "+" if key == "table" or key.startswith(("dataset@", "schedule@")) else ""


TEACHER_DATA, TEACHER_SCHEDULE = "dataset@teacher.dataset", "schedule@teacher.schedule"


def with_recipe(chosen: Mapping[str, str], default: str | None = None) -> dict[str, str]:
    """Overrides by key in which a teacher with its own dataset has that dataset's recipe, as a student would.

    For a student on embedded data the teacher's dataset gives way to its embedded stand-in.

    Args:
        chosen: Key -> value.
        default: The student's dataset where none is chosen; None stands for a real one.
    """
    found = dict(chosen)
    data = found.get(TEACHER_DATA)
    if data not in choices("dataset"):
        return found
    own, student = dataset_choice(data), found.get("dataset", default)
    if own["stand_in"] and student in choices("dataset") and dataset_choice(student)["name"] == "scenes":
        found[TEACHER_DATA] = data = own["stand_in"]
    found.setdefault(TEACHER_SCHEDULE, data)
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

    network: Network | None
    dataset: dict[str, Any] | None
    schedule: dict[str, Any] | None
    seed: Whole
    checkpoint: str | None
    pretrained: str | None
    norm: Literal["eval", "batch"]


class Student(Settings):
    """A student: its network and where its initial weights come from, if not from the seed."""

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
    cell_minutes: Positive | None


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


@dataclass(frozen=True)
class Analysis:
    """A measurement on a finished cell, as `evaluation=` takes it.

    Attributes:
        needs: The cells that it needs beside those of the cell itself.
        needs_untaught: The same for a cell without a teacher.
        files: What it leaves beside its numbers.
    """

    needs: Mapping[str, Need]
    needs_untaught: Mapping[str, Need] | None = None
    files: tuple[str, ...] = ()


MAPS = "activation_maps.npz"

ANALYSES: dict[str, Analysis] = {
    # The student trained alone against the (transformed) teacher; without a teacher, against another initialisation.
    "channel_overlap": Analysis({"solo": Need("student")}, {"other": Need("student", 1)}, (MAPS,)),
    # Distance of outputs: of the student trained alone, and of the cell's own student.
    "consistency_solo": Analysis({"solo": Need("student")}),
    "consistency": Analysis({}),
}


class Config(Settings):
    """The whole config of one command."""

    teacher: Teacher
    student: Student
    dataset: Dataset
    method: Method
    schedule: Schedule
    scale: Scale
    wandb: Wandb
    table: TableLabels
    cell: Literal["student", "teacher", "solo", "source", "other"]
    seed: Whole
    data_root: str
    output_root: str
    device: str
    precision: Literal["fp32", "bf16"]
    threads: Count | None
    workers: Count | None
    evaluation: str | None
    rows: str | list[str] | None
    role: str | list[str] | None
    plan: bool


def _nested(kind: Any) -> type[Settings] | None:
    """The class of settings that a type is, or is if not null."""
    candidates = [kind, *get_args(kind)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), None)


def known_keys(method: str | None = None) -> Iterator[str]:
    """Every dotted key of a config, with the keys of one method or of all."""

    def walk(schema: type[Settings], prefix: str) -> Iterator[str]:
        for key, kind in kinds(schema).items():
            yield prefix + key
            nested = _nested(kind)
            if nested is Method:
                inner = prefix != ""
                kinds_known = [METHODS[method]] if method in METHODS and not inner else METHODS.values()
                for known in kinds_known:
                    if not inner or known is not KCD:
                        yield from walk(known, f"{prefix}{key}.")
            elif nested is not None:
                yield from walk(nested, f"{prefix}{key}.")
        if schema is Teacher:
            for key, part in (("dataset", Dataset), ("schedule", Schedule)):
                yield from walk(part, f"{prefix}{key}.")

    return walk(Config, "")


def unknown(key: str, method: str | None = None) -> UserError:
    """The error for a key that no config has; knows where a bare name belongs and what a misspelt one resembles."""
    known = list(dict.fromkeys(known_keys(method)))
    parent, _, leaf = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    siblings = [name for name in siblings if (parent, name) != ("method", "name")]
    homes = [] if parent == "method" else [other for other in known_keys() if other.endswith(f".{leaf}")]
    hint = f" (did you mean '{homes[0]}'?)" if homes else nearest(leaf, siblings)
    whose = f" for method {method}" if method and parent == "method" else ""
    listed = ", ".join(siblings)
    return UserError(f"{key}: unknown key{whose}{hint}" + (f"; {parent} has {listed}" if parent and listed else ""))


def _check(node: Any, schema: type[Settings], prefix: str, method: str | None) -> None:
    """Compares a node with a class of settings, key by key."""
    if not isinstance(node, Mapping):
        raise UserError(f"{prefix[:-1]}={node!r}: expected a group of keys")
    wanted = kinds(schema)
    for key in node:
        if key not in wanted:
            raise unknown(prefix + str(key), method)
    for key, kind in wanted.items():
        nested = _nested(kind)
        if key not in node:
            raise UserError(f"{prefix}{key}: missing; expected {describe(kind)}")
        value = node[key]
        if nested is Method and value is not None:
            inner = value.get("name") if isinstance(value, Mapping) else None
            if inner not in METHODS or (prefix and METHODS[str(inner)] is KCD):
                able = [name for name, known in METHODS.items() if not prefix or known is not KCD]
                raise UserError(f"{prefix}{key}.name={inner}: expected one of {', '.join(able)}{nearest(inner, able)}")
            nested = METHODS[str(inner)]
        if nested is not None and not (value is None and type(None) in get_args(kind)):
            _check(value, nested, f"{prefix}{key}.", method)
        elif nested is None:
            check_value(value, schema, key, prefix + key)


def _check_part(part: Mapping[str, Any] | None, schema: type[Settings], prefix: str) -> None:
    """Compares a node that may hold only some of a class's keys."""
    for key, value in (part or {}).items():
        if key not in kinds(schema):
            raise unknown(prefix + str(key))
        check_value(value, schema, key, prefix + key)


def validate(config: Mapping[str, Any]) -> None:
    """Refuses a config that has a wrong key, type, range or choice.

    Raises:
        UserError: Names the key, its value, what was expected and the nearest valid choice.
    """
    node = config.get("method")
    method = node.get("name") if isinstance(node, Mapping) else None
    if method not in METHODS:
        raise UserError(f"method.name={method}: expected one of {', '.join(METHODS)}{nearest(method, METHODS)}")
    _check(config, Config, "", method)
    _check_part(config["teacher"]["dataset"], Dataset, "teacher.dataset.")
    _check_part(config["teacher"]["schedule"], Schedule, "teacher.schedule.")
    for who in ("teacher", "student"):
        network = config[who]["network"]
        if network is not None and network["name"] not in choices("network"):
            hint = nearest(network["name"], choices("network"))
            raise UserError(f"{who}.network.name={network['name']}: there is no such network{hint}")
    schedule = config["schedule"]
    if (schedule["epochs"] is None) == (schedule["iterations"] is None):
        given = f"schedule.epochs={shown(schedule['epochs'])}, schedule.iterations={shown(schedule['iterations'])}"
        raise UserError(f"{given}: expected one of the two, and null for the other")
    known = [*choices("dataset"), *ANALYSES]
    if config["evaluation"] is not None and config["evaluation"] not in known:
        hint = nearest(config["evaluation"], known)
        raise UserError(f"evaluation={config['evaluation']}: expected a dataset or one of {', '.join(ANALYSES)}{hint}")
    _check_base(method, config["method"])
    for key in ("dataset.folder", "teacher.dataset.folder"):
        group, _, leaf = key.rpartition(".")
        folder = OmegaConf.select(OmegaConf.create(dict(config)), group)
        folder = folder.get(leaf) if folder else None
        if folder is not None and (Path(folder).is_absolute() or ".." in Path(folder).parts):
            raise UserError(f"{key}={folder}: expected a folder below data_root; set data_root= to its parent")


def _check_base(method: str, settings: Mapping[str, Any]) -> None:
    """Refuses a method around another one than its name says."""
    wanted = method.partition("+")[2] or "l2"
    if "base" in settings and settings["base"]["name"] != wanted:
        raise UserError(f"method.base.name={settings['base']['name']}: expected {wanted} with method={method}")


@functools.lru_cache
def _read_dataset(choice: str) -> dict[str, Any]:
    if choice == "_base":
        return defaults(Dataset)
    content = yaml.safe_load((CONF / "dataset" / f"{choice}.yaml").read_text())
    merged: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if base != "_self_":
            merged |= _read_dataset(base)
    return merged | content


def dataset_choice(choice: str) -> dict[str, Any]:
    """The settings of one of the datasets in `conf/dataset`, as Hydra would compose them."""
    return copy.deepcopy(_read_dataset(choice))


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed config as checked plain containers, without Hydra's own node.

    Raises:
        UserError: A key is wrong or an interpolation cannot be resolved.
    """
    try:
        node = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    assert isinstance(values, dict)
    plain_values = {str(key): value for key, value in values.items()}
    validate(plain_values)
    return plain_values
