"""What a config may contain: types, ranges and choices of every key, and errors that name the key and the cure.

Hydra's own struct check stops at `+key=value`, and its messages span many lines. So nothing is left to it: the command
line's keys are all let in, and the composed config is compared with the dataclasses below.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kt.errors import UserError, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = ("teacher", "student", "dataset", "method", "schedule", "scale", "network", "table")


def choices(group: str) -> list[str]:
    """The choices of a config group: the names of its files."""
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


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


@dataclass(frozen=True)
class Range:
    """An interval as a type annotation; `above` and `below` exclude their ends."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        parts = ((">=", self.least), (">", self.above), ("<=", self.most), ("<", self.below))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in parts if bound is not None)


Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(above=0, most=1)]
Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]


@dataclass
class Network:
    """A network of `kt.models` by name, or one that a config file of mmdet or mmseg describes."""

    name: str
    width: Positive | None
    small_stem: bool
    config: str | None
    options: dict[str, Any] | None


@dataclass
class Teacher:
    """A teacher: its network and, where they are not the student's, parts of its own dataset and schedule."""

    network: Network | None
    dataset: dict[str, Any] | None
    schedule: dict[str, Any] | None
    seed: Whole
    checkpoint: str | None
    pretrained: str | None
    norm: Literal["eval", "batch"]


@dataclass
class Student:
    """A student: its network and where its initial weights come from, if not from the seed."""

    network: Network
    checkpoint: str | None
    pretrained: str | None


@dataclass
class Dataset:
    """A dataset and what is done to its images."""

    name: Literal[
        "scenes", "cifar100", "imagenet", "imagefolder", "cityscapes", "gta5", "citypersons", "coco", "segfolder"
    ]
    task: Literal["classification", "segmentation", "detection", "pedestrians", "keypoints"]
    num_classes: Count | None
    image_size: Annotated[int, Range(least=8)] | list[Count]
    crop_size: list[Count] | None
    subset: Count | None
    validation: Annotated[float, Range(least=0, below=1)]
    augmentation: Literal["none", "flip", "crop_flip", "imagenet"]
    style: Literal["photo", "synthetic"]
    train_size: Count | None
    test_size: Count | None
    folder: str | None
    train_split: str | None
    test_split: str | None
    resident: bool | None
    stand_in: str | None

    # Which keys decide the images; the others are of no account for a dataset of that name.
    COMMON: ClassVar[tuple[str, ...]] = (
        *("name", "task", "num_classes", "image_size", "crop_size"),
        *("subset", "validation", "augmentation"),
    )
    OWN: ClassVar[dict[str, tuple[str, ...]]] = {
        "scenes": ("style", "train_size", "test_size"),
        "imagefolder": ("folder",),
        "coco": ("folder", "train_split", "test_split"),
        "segfolder": ("folder",),
    }


@dataclass
class Schedule:
    """Optimizer, learning rate and length, in epochs or in iterations."""

    epochs: Whole | None
    iterations: Count | None
    interval: Count | None
    batch_size: Count
    optimizer: Literal["sgd", "adam", "adamw"]
    lr: Positive
    momentum: Annotated[float, Range(least=0, below=1)]
    nesterov: bool
    weight_decay: NotNegative
    policy: Literal["step", "cosine", "poly", "constant"]
    milestones: list[Positive]
    gamma: Share
    warmup_epochs: NotNegative
    clip_grad: Positive | None
    accumulate: Count
    evaluate_every: Count


@dataclass
class Scale:
    """How much of the paper's setting a run affords."""

    name: str
    fraction: Share
    width: Positive
    stand_in: bool
    pretrained: bool
    cell_minutes: Positive | None


@dataclass
class Wandb:
    """Where Weights & Biases logs go."""

    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None


@dataclass
class TableLabels:
    """Which row of which table a cell belongs to; for names of logs only."""

    name: str | None
    row: str | None
    role: str | None
    label: str | None


@dataclass(frozen=True)
class Need:
    """A cell that a method or an analysis needs beside the teacher: the student alone, or another teacher.

    Attributes:
        of: `student` or `teacher`: whose network, dataset and schedule.
        seed_offset: Its seed minus that of the cell's own student or teacher.
        trained: False takes its initial weights.
    """

    of: Literal["student", "teacher"]
    seed_offset: int = 0
    trained: bool = True


@dataclass
class Method:
    """Settings of a method; subclasses add their own."""

    name: str
    needs_teacher: ClassVar[bool] = True
    passes: ClassVar[float] = 1.5  # time of a training over that of the student alone, roughly, to order cells by
    dense: ClassVar[bool] = False  # teaches detectors and segmentors too
    own_network: ClassVar[bool] = False  # its teacher is the student itself, as it was trained before
    cell_keys: ClassVar[tuple[str, ...]] = ()  # keys that say which cells are needed; the method itself lacks them

    @staticmethod
    def needs(settings: Mapping[str, Any]) -> dict[str, Need]:
        """The cells that these settings need beside the teacher, by name."""
        return {}


@dataclass
class NoMethod(Method):
    """The student alone."""

    needs_teacher: ClassVar[bool] = False
    passes: ClassVar[float] = 1.0
    dense: ClassVar[bool] = True


@dataclass
class Finetune(Method):
    """Training on from the teacher's weights."""

    head_lr_factor: Positive


@dataclass
class FixedFeature(Method):
    """Training on from the teacher's weights with features frozen."""

    own_network: ClassVar[bool] = True
    frozen: Literal["features", "first_block"]


@dataclass
class KD(Method):
    """Soft targets."""

    temperature: Positive
    alpha: NotNegative
    task_weight: NotNegative


@dataclass
class KDFixedFeature(KD):
    """Soft targets, then a fresh classifier on frozen features."""

    frozen: Literal["features", "first_block"]
    retrain: Literal["kd", "task"]


@dataclass
class FitNet(Method):
    """A hint."""

    dense: ClassVar[bool] = True
    weight: NotNegative
    hint_layer: Annotated[int, Range(least=-1)] | list[Whole] | Literal["all", "last", "blocks"] | None
    regressor: Literal["conv_bn_relu", "conv"]


@dataclass
class AT(Method):
    """Attention transfer."""

    dense: ClassVar[bool] = True
    weight: NotNegative
    form: Literal["mean", "sum"]
    stages: list[Whole] | Literal["all", "last", "blocks"]


@dataclass
class NST(Method):
    """Neuron selectivity transfer."""

    dense: ClassVar[bool] = True
    weight: NotNegative
    stages: list[Whole] | Literal["all", "last", "blocks"]


@dataclass
class FT(Method):
    """Factor transfer."""

    passes: ClassVar[float] = 3.5
    weight: NotNegative
    factor: Share
    init_fraction: Share
    paraphraser_lr: Positive
    form: Literal["repdistiller", "official"]


@dataclass
class AB(Method):
    """Activation boundaries."""

    weight: NotNegative
    margin: Positive
    init_fraction: Share
    after: Literal["task", "kd"]
    temperature: Positive
    stages: Literal["all", "last"]


@dataclass
class HybridForward(Method):
    """Hybrid forward."""

    passes: ClassVar[float] = 3.0
    dense: ClassVar[bool] = True
    balance: Literal["dynamic"] | NotNegative
    switch_at: list[list[Count]] | None
    track_hybrid_stats: bool
    interpolation: Literal["bilinear", "nearest"]


@dataclass
class Stagewise(Method):
    """Stage by stage."""

    passes: ClassVar[float] = 2.5
    dense: ClassVar[bool] = True
    stages: Count | None
    cut_at: list[Count] | None
    phase_length: Literal["full", "split"]
    head_length: Share


@dataclass
class L2(Method):
    """The last stage's maps."""

    dense: ClassVar[bool] = True
    weight: NotNegative | None
    reduction: Literal["mean", "sum"]
    match: Literal["rectangular", "adapter"]
    preactivation: bool


@dataclass
class RKD(Method):
    """Distances and angles between samples."""

    weight: NotNegative
    angle: NotNegative


@dataclass
class KCD(Method):
    """Knowledge consistent distillation around another method."""

    dense: ClassVar[bool] = True
    cell_keys: ClassVar[tuple[str, ...]] = ("teacher_state", "solo_offset", "teacher_offset")
    strategy: Literal["bipartite", "greedy", "random", "identity", "subnet_fc", "subnet_res"]
    metric: Literal["l1", "l2", "cosine", "correlation", "kl"]
    match: Literal["rectangular", "adapter"]
    groups: Count
    groups_for: Count | None
    update_every: Count | Annotated[float, Range(above=0, below=1)] | None
    student_state: Literal["trained", "initial"]
    teacher_state: Literal["trained", "initial"]
    solo_offset: Whole
    teacher_offset: Whole
    learn_fraction: Share
    base: Method
    beside: Method | None

    @staticmethod
    def needs(settings: Mapping[str, Any]) -> dict[str, Need]:
        """The student trained alone, and the teacher that the transform is computed from if it is another one."""
        found: dict[str, Need] = {}
        if settings["strategy"] in ("random", "identity"):
            return found
        if settings["student_state"] == "trained":
            found["solo"] = Need("student", settings["solo_offset"])
        if settings["teacher_state"] == "initial" or settings["teacher_offset"]:
            found["source"] = Need("teacher", settings["teacher_offset"], settings["teacher_state"] == "trained")
        return found


@dataclass(frozen=True)
class Analysis:
    """A measurement on a finished cell, as `evaluation=` takes it.

    Attributes:
        needs: The cells that it needs beside those of the cell itself.
        needs_untaught: The same for a cell without a teacher.
    """

    needs: Mapping[str, Need]
    needs_untaught: Mapping[str, Need] | None = None


ANALYSES: dict[str, Analysis] = {
    # The student trained alone against the (transformed) teacher; without a teacher, against another initialisation.
    "channel_overlap": Analysis({"solo": Need("student")}, {"other": Need("student", 1)}),
    # Distance of outputs: of the student trained alone, and of the cell's own student.
    "consistency_solo": Analysis({"solo": Need("student")}),
    "consistency": Analysis({}),
}

METHODS: dict[str, type[Method]] = {
    "none": NoMethod,
    "finetune": Finetune,
    "fixed_feature": FixedFeature,
    "kd": KD,
    "kd_fixed_feature": KDFixedFeature,
    "fitnet": FitNet,
    "at": AT,
    "nst": NST,
    "ft": FT,
    "ab": AB,
    "hybrid_forward": HybridForward,
    "stagewise": Stagewise,
    "l2": L2,
    "rkd": RKD,
    "rco": L2,
    **dict.fromkeys(("kcd", "kcd+fitnet", "kcd+ab", "kcd+rkd", "kcd+rco"), KCD),
}


@dataclass
class Config:
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


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value belongs to an annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Annotated:
        return fits(value, arguments[0]) and all(value in rule for rule in arguments[1:])
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """An annotated type in the words of an error message."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Annotated:
        return f"{describe(arguments[0])} {' and '.join(map(str, arguments[1:]))}"
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(arguments)
    if origin is list:
        return f"a list of {describe(arguments[0]).removeprefix('a ').removeprefix('an ')}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}
    return names.get(kind, "a group of keys")


def shown(value: Any) -> str:
    """A value as the command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _literals(kind: Any) -> list[str]:
    """All texts that a type names."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [text for argument in get_args(kind) if not isinstance(argument, Range) for text in _literals(argument)]


def kinds(schema: type) -> dict[str, Any]:
    """Key -> annotated type of a dataclass."""
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _nested(kind: Any) -> type | None:
    """The dataclass that a type is, or is if not null."""
    candidates = [kind, *get_args(kind)]
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def known_keys(method: str | None = None) -> Iterator[str]:
    """Every dotted key of a config, with the keys of one method or of all."""

    def walk(schema: type, prefix: str) -> Iterator[str]:
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


def _check(node: Any, schema: type, prefix: str, method: str | None) -> None:
    """Compares a node with a dataclass, key by key."""
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
        if nested is not None and not (value is None and fits(None, kind)):
            _check(value, nested, f"{prefix}{key}.", method)
        elif nested is None and not fits(value, kind):
            raise UserError(f"{prefix}{key}={shown(value)}: expected {describe(kind)}{nearest(value, _literals(kind))}")


def _check_part(part: Mapping[str, Any] | None, schema: type, prefix: str) -> None:
    """Compares a node that may hold only some of a dataclass's keys."""
    wanted = kinds(schema)
    for key, value in (part or {}).items():
        if key not in wanted:
            raise unknown(prefix + str(key))
        if not fits(value, wanted[key]):
            hint = nearest(value, _literals(wanted[key]))
            raise UserError(f"{prefix}{key}={shown(value)}: expected {describe(wanted[key])}{hint}")


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
