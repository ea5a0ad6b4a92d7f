"""Keys of a config that decide nothing under the others: they make no other cell, and a command that names one ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kt.data.names import DATASETS
from kt.data.names import idle as idle_of_dataset
from kt.needs import Config, teacher_dataset, teacher_of
from kt.settings import METHODS, SOURCE, Schedule, defaults, epochs_of

FRACTION = "scale.fraction"


def _methods(config: Mapping[str, Any]) -> Iterator[tuple[str, Config, dict[str, str]]]:
    """The method and those that it is around: key, settings, and which of these are idle."""
    key, settings = "method", config["method"]
    while settings:
        yield key, settings, METHODS[settings["name"]].idle(settings, config["dataset"]["task"])
        key, settings = f"{key}.base", settings.get("base")


def idle(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> what it would go with, of a checked config; a key stands for all below it."""
    found = {f"schedule.{key}": why for key, why in _idle_in(config["schedule"]).items()}
    if config["teacher"]["network"] is not None:  # which learns by what its own schedule does not say otherwise
        read = config["schedule"].keys() - (config["teacher"]["schedule"] or {}).keys()
        read -= _idle_in(teacher_of(config)["schedule"]).keys()
        found = {key: why for key, why in found.items() if key.removeprefix("schedule.") not in read}
    for prefix, _, keys in _methods(config):
        found |= {f"{prefix}.{key}": why for key, why in keys.items()}
    own = config["teacher"]["dataset"] or {}
    named = {"dataset": config["dataset"], "teacher.dataset": own and teacher_dataset(config)}
    named[f"method.{SOURCE}"] = config["method"].get(SOURCE)
    for prefix, dataset in named.items():
        found |= {f"{prefix}.{key}": why for key, why in idle_of_dataset(dataset).items()} if dataset else {}
    taught = config["teacher"]["network"] is not None and METHODS[config["method"]["name"]].needs_teacher
    if config["teacher"]["network"] is None:
        found |= dict.fromkeys((f"teacher.{key}" for key in config["teacher"]), "teacher=<network>")
    elif not (taught and METHODS[config["method"]["name"]].runs_teacher):
        found |= dict.fromkeys(("teacher.norm", "teacher.precision"), "a method whose teacher answers in training")
    if taught and config["teacher"]["checkpoint"] and "source" not in METHODS[config["method"]["name"]].needs(config):
        found |= dict.fromkeys(("teacher.schedule", "teacher.seed"), "teacher.checkpoint=null")
    if not _scales_a_width(config):
        found["scale.width"] = "networks without a width of their own on embedded data"
    if config["wandb"]["mode"] == "disabled":
        found |= dict.fromkeys(("wandb.project", "wandb.entity"), "wandb.mode=offline or online")
    return found


def _idle_in(schedule: Mapping[str, Any]) -> dict[str, str]:
    """The same of a schedule's keys."""
    found = Schedule.idle(schedule)
    milestones, length = schedule["milestones"], epochs_of(schedule)
    if length and milestones and min(milestones) >= length:  # an empty list means that the learning rate stays
        late = f"a milestone before the end, at {length} epochs"
        found = {"milestones": late, "gamma": late, **found}
    return found


def unread(config: DictConfig) -> dict[str, str]:
    """The same of keys that only other keys read, of the config as it is composed, references and all."""
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    told = "a length that is a recipe's, not the command's"
    return {} if FRACTION in str({**values, "hydra": None}) else {FRACTION: told}


def _scales_a_width(config: Mapping[str, Any]) -> bool:
    """Whether a network takes the scale's width."""
    parts = [(config["student"], config["dataset"]), (config["teacher"], teacher_dataset(config))]
    parts = [(who["network"], DATASETS[data["name"]].embedded) for who, data in parts if who["network"]]
    searches = any(settings.get("search") for _, settings, _ in _methods(config))
    return searches or any(embedded and network["width"] is None for network, embedded in parts)


def idle_alone(config: Mapping[str, Any]) -> dict[str, str]:
    """The same of a command of one cell, whose keys are for no other one."""
    found = {**idle(config), **dict.fromkeys(("scale.stand_in", "scale.tuned"), "+table=<name>")}
    found["workers"] = "+table=<name> or -m"
    if config["cell"] == "student" and config["teacher"]["network"] is not None:
        method = config["method"]["name"]
        if not METHODS[method].needs_teacher:
            found["teacher"] = f"a method that has a teacher, method={method} has none"
    return found


def without_idle(method: Config, task: str) -> Config:
    """A method's settings in which idle keys have their defaults, but for those that its needs tell."""
    schema = METHODS[method["name"]]
    usual = defaults(schema)
    reset = schema.idle(method, task).keys() & usual.keys() - {*schema.told_by_needs}
    found = {key: usual[key] if key in reset else value for key, value in method.items()}
    return {**found, "base": without_idle(found["base"], task)} if found.get("base") else found


def reason(key: str, found: Mapping[str, str]) -> str | None:
    """Why a key of a command decides nothing, of what `idle` has found; None if it does."""
    parts = key.split("@")[-1].split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next((found[part] for part in above if part in found), None)


def told(key: str, value: str, why: str) -> str:
    """What to tell of such a key."""
    return f"{key}={value}: has no effect here, it goes with {why}"
