"""What a config means: the settled config of its cell, what that needs, and its identity."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.checking import validate
from experiments.groups import dataset_choice, stood_in
from experiments.idle import without_idle
from experiments.schema import ANALYSES
from kt.data.fingerprint import State, changes, combined, state_of
from kt.data.names import CLASSIFICATION, DATASETS, content, own_keys, settings_of
from kt.errors import UserError, nearest
from kt.files import at_home, checksum
from kt.models.configs import read_config_file
from kt.models.names import CONFIG_NETWORK, DENSE_NETWORKS, NETWORKS
from kt.needs import NO_TEACHER, Config, Need, teacher_dataset, teacher_of
from kt.ranks import launched
from kt.settings import (
    METHODS,
    SOURCE,
    Schedule,
    Settings,
    accumulates,
    check_accumulation,
    count_passes,
    device_batch,
    shown,
)
from kt.store import (
    DESCRIPTION,
    IDENTITY_VERSION,
    cache_of,
    check,
    folder_of,
    listed_evaluation,
    newest_state,
    read_data,
    read_result,
)

DEEPEST = 8  # cells that need one another in a row
# Keys of a command that say nothing of a cell, with what they are where they ask for nothing.
ASKED: Config = {"rows": None, "role": None, "plan": False, "rehearse": False, "settings": False}


@dataclass(frozen=True)
class Unnamed:
    """A need for which the command has to name a file and has not.

    Attributes:
        reason: What to tell the user.
    """

    reason: str


Needed = Need | Path | Unnamed


_lenient = False


@contextlib.contextmanager
def lenient(is_so: object) -> Iterator[None]:
    """Within, if it is so, a file of the user's that is not there stops nobody: a rehearsal lists it."""
    global _lenient
    before, _lenient = _lenient, bool(is_so)
    try:
        yield
    finally:
        _lenient = before


def _settled_network(network: Config, dataset: Config, config: Config) -> Config:
    """A network whose width is a number: the scale's on embedded data, the full one on real data."""
    if network["width"] is not None:
        return network
    slim = DATASETS[dataset["name"]].embedded and network["name"] != CONFIG_NETWORK
    return {**network, "width": config["scale"]["width"] if slim else 1.0}


def _settled_pretrained(pretrained: str | None, network: Config, config: Config) -> str | None:
    """The ImageNet weights of a detector's or segmentor's backbone, where the scale takes any and the width is full."""
    if network["name"] not in DENSE_NETWORKS:
        return pretrained
    return pretrained if config["scale"]["pretrained"] and network["width"] == 1 else None


def _settled_source(config: Config) -> Config:
    """The dataset of a method's source images: by default the teacher's.

    Raises:
        UserError: Nobody knows that of a teacher from a file, or the images are not of classification.
    """
    found = config["method"][SOURCE]
    if found is None:
        if config["teacher"]["checkpoint"] and not config["teacher"]["dataset"]:
            raise UserError(
                "method.source=null: expected the dataset of the unlabelled source images, since the teacher's file "
                "does not say what it was trained on; add dataset@method.source=<choice>"
            )
        found = own_keys(teacher_dataset(config))
    if found["task"] != "classification":
        raise UserError(f"method.source.task={found['task']}: expected classification")
    return found


def _check_task(network: Config, dataset: Config, key: str) -> None:
    """Refuses a network that cannot do what a dataset is for.

    Raises:
        UserError: Names both and the networks that can.
    """
    task, name = dataset["task"], network["name"]
    described = name == CONFIG_NETWORK
    if described != (network["config"] is not None):
        raise UserError(
            f"{key}.network.config={shown(network['config'])}: goes with {key}={CONFIG_NETWORK}, which needs it"
        )
    if network.get("options") is not None and not described:
        raise UserError(
            f"{key}.network.options={network['options']}: goes with {key}={CONFIG_NETWORK}, whose file has them"
        )
    if described and network["width"] not in (None, 1):
        raise UserError(f"{key}.network.width={network['width']}: expected null for {name}, whose file says how wide")
    stems = [other for other, spec in NETWORKS.items() if spec.family == "torchvision_resnet"]
    if network["small_stem"] and name not in stems:
        raise UserError(
            f"{key}.network.small_stem=true: expected false for {name}; only {', '.join(stems)} have the choice"
        )
    if task == "classification":
        fitting = list(NETWORKS)
    else:
        wanted = "detection" if task == "pedestrians" else task
        fitting = [other for other, spec in DENSE_NETWORKS.items() if spec.task == wanted]
        fitting += [CONFIG_NETWORK] if wanted in ("detection", "segmentation") else []
    if name not in fitting:
        raise UserError(f"{key}={name}: not a network for {task}{nearest(name, fitting)}; choose {', '.join(fitting)}")


PATCH = 16  # pixels a side of a ViT's patches


def _check_size(config: Config, key: str, trained_on: Config) -> None:
    """Refuses images of a size that a network with a place for each patch cannot see.

    Args:
        config: The cell's config.
        key: Whose network it is.
        trained_on: The dataset by whose images the network is built.

    Raises:
        UserError: Names both sizes.
    """
    name, size = config[key]["network"]["name"], config["dataset"]["image_size"]
    if name not in NETWORKS or NETWORKS[name].family != "timm_vit":
        return
    if not isinstance(size, int) or size % PATCH:
        raise UserError(f"dataset.image_size={size}: expected a multiple of {PATCH}, the patch size of {name}")
    if size != trained_on["image_size"]:
        raise UserError(
            f"{key}={name}: sees images of {trained_on['image_size']} pixels, those of dataset.image_size={size} have "
            "others; expected one size"
        )


def _check_evaluation(config: Config) -> None:
    """Refuses another dataset that a student cannot be scored on, and an analysis of what it is not made for.

    Raises:
        UserError: Names what differs.
    """
    name, own, other = config["evaluation"], config["dataset"], evaluation_dataset(config)
    if name in ANALYSES and own["task"] != CLASSIFICATION:
        raise UserError(f"evaluation={name}: for {CLASSIFICATION} only")
    if other is None:
        return
    if other["task"] != own["task"]:
        raise UserError(f"evaluation={name}: a dataset for {other['task']}, the student is trained for {own['task']}")
    if None not in (classes := (other["num_classes"], own["num_classes"])) and classes[0] != classes[1]:
        raise UserError(f"evaluation={name}: it has {classes[0]} classes, the student is trained with {classes[1]}")
    if bool(other.get("depth_samples")) != bool(own.get("depth_samples")):
        raise UserError(
            f"evaluation={name}: its depth_samples={other['depth_samples']}, the student is trained with "
            f"dataset.depth_samples={own['depth_samples']}; expected both with measured depth, or none"
        )
    _check_size({**config, "dataset": other}, "student", own)


def _check_batch(config: Config) -> None:
    """Refuses an update that the processes cannot share, or that this training cannot accumulate.

    Raises:
        UserError: Names the key.
    """
    schedule, network = config["schedule"], config["student"]["network"]
    if schedule["epochs"] == 0:
        return
    passes = count_passes(schedule["batch_size"], schedule["device_batch"], launched())
    # Nobody knows what the losses of a network from a config of its own are divided by.
    exact = accumulates(config["method"]) and network["name"] != CONFIG_NETWORK
    check_accumulation(passes, exact, config["dataset"]["task"])


def settle(config: Mapping[str, Any]) -> Config:
    """The config of the cell that a command means: unused parts emptied, widths filled in, a teacher turned student.

    Args:
        config: A checked config (`experiments.checking.plain`). Settling a settled config changes nothing.

    Raises:
        UserError: The method needs a teacher and there is none.
    """
    settled = {key: copy.deepcopy(value) for key, value in config.items() if key not in ASKED}
    if settled["cell"] == "teacher":
        if settled["teacher"]["network"] is None:
            raise UserError("cell=teacher: there is no teacher; add teacher=<network>, for example teacher=resnet56")
        need = _needed(settled, "teacher", Need(teacher_of(settled)))
        return {**need.config, "evaluation": settled["evaluation"]}
    if settled["cell"] != "student":
        name, cells = settled["cell"], needed_cells({**settled, "cell": "student"})
        if name not in cells:
            listed = ", ".join(("student", *cells))
            hint = nearest(name, ("student", "teacher", *cells))
            raise UserError(f"cell={name}: this cell needs no such cell; expected one of {listed}{hint}")
        return cells[name]
    method, dataset = settled["method"]["name"], settled["dataset"]
    settled["method"] = without_idle(settled["method"], dataset["task"])
    _check_task(settled["student"]["network"], dataset, "student")
    _check_size(settled, "student", dataset)
    _check_evaluation(settled)
    _check_batch(settled)
    if not METHODS[method].teaches(dataset["task"]):
        able = ", ".join(name for name, kind in METHODS.items() if kind.teaches(dataset["task"]))
        raise UserError(f"method={method}: teaches classifiers only; for {dataset['task']} choose {able}")
    if METHODS[method].only_for not in (None, dataset["task"]):
        raise UserError(f"method={method}: for {METHODS[method].only_for} only; this dataset is for {dataset['task']}")
    if not METHODS[method].needs_teacher:
        settled["teacher"] = copy.deepcopy(NO_TEACHER)
    elif settled["teacher"]["network"] is None:
        raise UserError(f"method={method}: needs a teacher; add teacher=<network>, for example teacher=resnet56")
    else:
        teacher = settled["teacher"]
        if not teacher["checkpoint"]:  # a file says nothing of its data
            _check_task(teacher["network"], teacher_dataset(settled), "teacher")
        if dataset["task"] == "classification":  # a detector's backbone teaches detectors and segmentors
            _check_task(teacher["network"], dataset, "teacher")
            _check_size(settled, "teacher", dataset if teacher["checkpoint"] else teacher_dataset(settled))
        teacher["network"] = _settled_network(teacher["network"], teacher_dataset(settled), settled)
        teacher["pretrained"] = teacher_of(settled)["student"]["pretrained"]
    if SOURCE in settled["method"]:
        settled["method"][SOURCE] = _settled_source(settled)
    student = settled["student"]
    student["network"] = _settled_network(student["network"], dataset, settled)
    student["pretrained"] = _settled_pretrained(student["pretrained"], student["network"], settled)
    return settled


def _needed(config: Mapping[str, Any], name: str, need: Need) -> Need:
    """A need whose config is settled, under its name in logs."""
    labels = {**config["table"], "row": name, "role": name, "label": None}
    made = {**need.config, "dataset": own_keys(need.config["dataset"]), "table": labels}
    return replace(need, config=settle({**made, "cell": "student", "evaluation": None}))


def _own_needs(config: Mapping[str, Any]) -> dict[str, Needed]:
    """What a settled cell's method needs.

    Raises:
        UserError: One of the needs is neither a cell nor a file.
    """
    found: dict[str, Needed] = {}
    method = config["method"]["name"]
    for name, need in METHODS[method].needs(config).items():
        try:
            if isinstance(need, Path):
                found[name] = need
                continue
            if not isinstance(need, Need):
                raise UserError(f"expected a kt.needs.Need, it is a {type(need).__name__}")
            validate({**need.config, **ASKED})
            found[name] = _needed(config, name, need)
        except UserError as error:
            raise UserError(f"method={method}: what it needs as '{name}' is no cell: {error}") from None
    return found


def needs_of(config: Mapping[str, Any]) -> dict[str, Needed]:
    """What a settled cell needs, by name: another cell, whose config is settled too, or a file."""
    found: dict[str, Needed] = {}
    if config["teacher"]["checkpoint"]:
        found["teacher"] = Path(config["teacher"]["checkpoint"])
    elif config["teacher"]["network"] is not None:
        need = _needed(config, "teacher", Need(teacher_of(config)))
        found["teacher"] = need
        if DATASETS[need.config["dataset"]["name"]].embedded and not DATASETS[config["dataset"]["name"]].embedded:
            found["teacher"] = Unnamed(
                "teacher.checkpoint=null: the teacher would be trained on embedded data; give the file of its weights"
            )
    return {**found, **_own_needs(config)}


def evaluation_needs(config: Mapping[str, Any]) -> dict[str, Need]:
    """The cells that an analysis of a settled cell needs, by name; none for a score on a dataset."""
    wanted = ANALYSES[config["evaluation"]](config) if config["evaluation"] in ANALYSES else {}
    return {name: _needed(config, name, need) for name, need in wanted.items()}


def evaluation_dataset(config: Mapping[str, Any]) -> Config | None:
    """The other dataset that a settled cell's student is scored on; None where `evaluation` names none."""
    name = config["evaluation"]
    if name is None or name in ANALYSES:
        return None
    return dataset_choice(stood_in(name) if DATASETS[config["dataset"]["name"]].embedded else name)


def all_needs(config: Mapping[str, Any]) -> dict[str, Needed]:
    """What a settled cell and its evaluation need; only the former is part of what the cell is."""
    return {**evaluation_needs(config), **needs_of(config)}


def needed_cells(config: Mapping[str, Any]) -> dict[str, Config]:
    """The settled configs of all cells that a settled cell and its evaluation need, by name."""
    return {name: dict(need.config) for name, need in all_needs(config).items() if isinstance(need, Need)}


def file_key(name: str) -> str:
    """The key that names the file of a need, where that is no cell."""
    return "teacher.checkpoint" if name == "teacher" else "method.file"


def content_hash(path: Path, key: str) -> str:
    """The hash of a file of the user's, and of the description beside a checkpoint that says how to read it.

    Raises:
        UserError: There is no such file, or it is not what the cell that it is from has left.
    """
    check(path.parent, path.name, DESCRIPTION)
    if path.exists() and not path.is_file():  # a device may have no end
        raise UserError(f"{key}={path}: expected a file")
    try:
        found = checksum(path)
        described = path.with_name(DESCRIPTION)
        if described.exists():
            found = hashlib.sha256(found.encode() + described.read_bytes()).hexdigest()
    except OSError as error:
        if _lenient:
            return f"missing:{path.name}"
        raise UserError(f"{key}={path}: expected a readable file ({error.strerror})") from None
    return f"sha256:{found[:32]}"


def _canonical(value: Any, key: str) -> Any:
    """A value as it goes into the hash: 2.0 is 2, and nothing depends on where files lie."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item, key) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        raise UserError(f"{key.lstrip('.')}={value}: an absolute path cannot be part of what a cell is")
    return value


def _network_content(network: Config) -> Config:
    """A network with the content of its config file in the place of the file's name."""
    if network["config"] is None:
        return {key: value for key, value in network.items() if key not in ("config", "options")}
    path = at_home(network["config"])
    return {**network, "config": _model_hash(network["config"], checksum(path) if os.path.isfile(path) else "")}


@functools.cache
def _model_hash(name: str, _content: str) -> str:
    """The hash of a config file's model. It is a program, and run no more often than its content changes."""
    model = read_config_file(name, "network.config").model
    try:
        text = json.dumps(model, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"network.config={name}: its model is no tree of plain values ({error})") from None
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _telling(settings: Mapping[str, Any], schema: type[Settings]) -> Config:
    """Settings without the keys that were added later and leave everything as it was before them."""
    return {key: value for key, value in settings.items() if key not in schema.added or value != schema.added[key]}


def _telling_method(settings: Mapping[str, Any]) -> Config:
    """The same of a method and of the methods and datasets among its settings."""
    told = _telling(settings, METHODS[settings["name"]])
    for key, value in told.items():
        if isinstance(value, Mapping):
            told[key] = _telling(value, settings_of(value)) if key == SOURCE else _telling_method(value)
    return told


def _method_content(settings: Config) -> Config:
    """A method's settings with the decisive keys alone of the dataset among them, without what its needs tell."""
    own = {key: value for key, value in settings.items() if key not in METHODS[settings["name"]].told_by_needs}
    if own.get("base"):
        own["base"] = _method_content(own["base"])
    return {**own, SOURCE: content(own[SOURCE])} if own.get(SOURCE) else own


def teaches_in_bf16(config: Mapping[str, Any]) -> bool:
    """Whether a settled cell's teacher, and it alone, computes in reduced precision."""
    teacher = config["teacher"] or NO_TEACHER
    asked = teacher["network"] is not None and METHODS[config["method"]["name"]].runs_teacher
    return asked and config["precision"] == "fp32" and teacher.get("precision") == "bf16"  # the key may be younger


def _decisive(config: Mapping[str, Any]) -> Config:
    """Everything that a settled cell's numbers depend on by itself, without what it needs."""
    student, dataset, schedule, teacher = (config[key] for key in ("student", "dataset", "schedule", "teacher"))
    given = student["checkpoint"] or student["pretrained"]
    whose = "teacher" if config["table"]["role"] == "teacher" else "student"  # the teacher's own cell has its file
    # An interval stays, for ids of cells from before have it.
    left_out = {"evaluate_every", "device_batch"} | Schedule.idle(schedule).keys() - {"interval"}
    length = {key: value for key, value in schedule.items() if key not in left_out}
    # How many processes share an update is of no account; how many images one normalisation sees is.
    if schedule["epochs"] != 0 and (images := device_batch(schedule, launched())) < schedule["batch_size"]:
        length["device_batch"] = images
    if schedule["epochs"] == 0:
        length = {"epochs": 0}
    return {
        "student": {
            "network": _network_content(student["network"]),
            "checkpoint": content_hash(Path(own), f"{whose}.checkpoint") if (own := student["checkpoint"]) else None,
            "pretrained": student["pretrained"],
        },
        "teacher": {"network": _network_content(teacher["network"]), "norm": teacher["norm"]}
        | ({"precision": "bf16"} if teaches_in_bf16(config) else {})
        if teacher["network"]
        else None,
        "dataset": content(dataset),
        "method": _method_content(config["method"]),
        "schedule": length,
        "precision": config["precision"],
        "seed": None if given and schedule["epochs"] == 0 else config["seed"],
    } | ({"compile": chosen} if (chosen := config.get("compile")) and schedule["epochs"] != 0 else {})  # a younger key


def semantics(config: Mapping[str, Any], depth: int = 0) -> Config:
    """Everything that a settled cell's numbers depend on, and nothing else; see `identity`."""
    found = needs_of(config)
    if found and depth == DEEPEST:
        raise UserError(f"method={config['method']['name']}: its cell needs another, that one the next, without an end")
    needs: dict[str, str | None] = {}
    for name, need in found.items():
        if isinstance(need, Need):
            needs[name] = identity(need.config, depth + 1)
        else:
            needs[name] = content_hash(need, file_key(name)) if isinstance(need, Path) else None
    told = _decisive(config)
    data = _telling(told["dataset"], settings_of(told["dataset"]))
    told |= {"dataset": data, "schedule": _telling(told["schedule"], Schedule)}
    return {"version": IDENTITY_VERSION, **told, "method": _telling_method(told["method"]), "needs": needs}


def identity(config: Mapping[str, Any], depth: int = 0) -> str:
    """The hash of the settings of the cell that a config means, on whatever data: 16 hex digits.

    Args:
        config: A checked config.
        depth: How many cells there are between this one and the one that was asked for.

    Raises:
        UserError: What it needs has no end.
    """
    told = _canonical(semantics(settle(config), depth), "")
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def is_of_library(config: Mapping[str, Any]) -> bool:
    """Whether a settled cell's weights are a library's as they are: its data can only score them."""
    network, trained = config["student"]["network"]["name"], config["schedule"]["epochs"] != 0
    return bool(config["student"]["pretrained"]) and network in NETWORKS and not trained


def states_of(config: Mapping[str, Any]) -> list[State]:
    """How the data stand now that a settled cell and all cells that it needs read, its own first.

    A library's weights teach without the data that would score them.
    """
    own = [config["dataset"], *filter(None, [config["method"].get(SOURCE)])]
    found = [state_of(dataset, config["data_root"], cache_of(config["output_root"])) for dataset in own]
    if is_of_library(config):
        return [state for state in found if state.summary is not None]
    for need in needs_of(config).values():
        found += states_of(need.config) if isinstance(need, Need) and not is_of_library(need.config) else []
    return list({state.key: state for state in reversed(found)}.values())[::-1]


def unnamed(config: Mapping[str, Any]) -> list[str]:
    """What to tell of the files that a settled cell and all cells that it needs lack, each once."""
    found = []
    for need in needs_of(config).values():
        if not isinstance(need, Path):
            found += [need.reason] if isinstance(need, Unnamed) else unnamed(need.config)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Identified:
    """A settled cell on the data as they are now.

    Attributes:
        id: Of the cell, the name of its folder.
        states: Of the data that it and all cells that it needs read, its own first.
        scored: Of the other dataset that its student is scored on, if that is asked for.
        told: What there is to say of all these, in lines: what looking costs, what has changed, what is absent.
        absent: What has to be there before there can be a result, in lines.
        unverified: Whether it has a result, or such a score, of data that are not there.
    """

    id: str
    states: tuple[State, ...]
    scored: State | None
    told: tuple[str, ...]
    absent: tuple[str, ...]
    unverified: bool

    @property
    def scored_on(self) -> str | None:
        """The fingerprint of the other dataset; None without one, or if it is not there."""
        return None if self.scored is None else combined([self.scored])


def identify(config: Mapping[str, Any]) -> Identified:
    """Finds out which cell a settled config means on the data as they are now.

    Its id is the settings' hash on the first data that the output folder has seen, `<hash>-<8 hex digits>` of the
    data's fingerprint on others, and on data that are not there that of the newest result.
    """
    root, settings, states = config["output_root"], identity(config), states_of(config)
    cache, fingerprint = cache_of(root), combined(states)
    told = [state.cost for state in states]
    if is_of_library(config) and not states:
        weights = f"{config['student']['pretrained']} of {config['student']['network']['name']}"
        told.append(f"there are no data of {config['dataset']['name']}: the weights {weights} teach without a score")
    cell_id, unverified = settings, False
    absent = [f"{state}: is not there" for state in states if state.summary is None]
    absent += unnamed(config)
    if fingerprint is None:
        cell_id = newest_state(root, settings)
        if unverified := read_result(folder_of(root, cell_id)) is not None:
            told += [f"{line}; the newest result is shown, unverified" for line in absent]
            absent = []
    elif (first := read_data(folder_of(root, settings))) and first["fingerprint"] not in (None, fingerprint):
        cell_id = f"{settings}-{fingerprint[:8]}"
        if read_result(folder_of(root, cell_id)) is None:
            changed = (changes(state, first["datasets"].get(state.key), cache) for state in states)
            told += [f"{line}; what needs it is trained anew" for line in changed if line]
    scored = None
    if dataset := evaluation_dataset(config):
        scored = state_of(dataset, config["data_root"], cache)
        told.append(scored.cost)
        if (kept := listed_evaluation(folder_of(root, cell_id), config["evaluation"])) and kept["data"]:
            if scored.summary is None:
                unverified = True
                told.append(f"{scored}: is not there; the newest score is shown, unverified")
            elif line := changes(scored, kept["data"]["datasets"].get(scored.key), cache):
                told.append(f"{line}; students are scored on it anew")
        elif scored.summary is None:
            absent.append(f"{scored}: is not there")
    lines = tuple(line for line in told if line)
    return Identified(cell_id, tuple(states), scored, lines, tuple(absent), unverified)


def cell_id(config: Mapping[str, Any]) -> str:
    """The id of the cell that a config means on the data as they are now, the name of its folder."""
    return identify(settle(config)).id


def _dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _decisive_keys(config: Mapping[str, Any]) -> Config:
    """Dotted key -> value of all that a settled cell's numbers depend on but its seed.

    What it needs comes under the need's name: `teacher.schedule.lr` is the learning rate of the teacher's training.
    """
    found = dict(_dotted(_decisive(config)))
    del found["seed"]
    for name, need in needs_of(config).items():
        if isinstance(need, Path):
            found[file_key(name)] = content_hash(need, file_key(name))
        elif isinstance(need, Need):
            own = _decisive_keys(need.config)
            found |= {f"{name}.{key.removeprefix('student.')}": value for key, value in own.items()}
    return found


def differences(config: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The keys in which two settled cells or their scores differ, seeds aside, with the values of both.

    Keys of a dataset, method or network of another name follow from the name, and what a need shares with the cell is
    said once.

    Args:
        config: A settled config.
        reference: Another one.

    Returns:
        Dotted key -> [value, value in the reference]; None where one lacks the key.
    """
    ours, theirs = ({**_decisive_keys(each), "evaluation": each["evaluation"]} for each in (config, reference))
    found = {key: [ours.get(key), theirs.get(key)] for key in ours | theirs if ours.get(key) != theirs.get(key)}

    def is_told(key: str) -> bool:
        group, _, leaf = key.rpartition(".")
        inner = key.partition(".")[2]
        return (leaf != "name" and f"{group}.name" in found) or (inner in found and found[inner] == found[key])

    return {key: values for key, values in found.items() if not is_told(key)}
