"""Refuses a config that has what none may have, with errors that name the key and the cure.

Hydra's own struct check stops at `+key=value`, and its messages span many lines. So nothing is left to it: the command
line's keys are all let in, and the composed config is compared with the classes of settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.devices import check_device
from experiments.groups import choices
from experiments.schema import ANALYSES, Config, Student, Teacher
from kt.data.names import DATASETS, check_dataset, own_keys, settings_of
from kt.errors import UserError, nearest
from kt.settings import (
    METHODS,
    SOURCE,
    Dataset,
    Method,
    Schedule,
    Settings,
    check_compile,
    check_schedule,
    check_settings,
    check_value,
    epochs_of,
    kinds,
    missing,
    shown,
)

PATHS = ("data_root", "output_root", "checkpoint", "file", "config")  # keys, wherever they are, whose values are paths


def nested_settings(kind: Any) -> type[Settings] | None:
    """The class of settings that a type is, or is if not null."""
    candidates = [kind, *get_args(kind)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), None)


def known_keys(method: str | None = None) -> Iterator[str]:
    """Every dotted key of a config, with the keys of one method or of all."""

    def walk(schema: type[Settings], prefix: str) -> Iterator[str]:
        for key, kind in kinds(schema).items():
            yield prefix + key
            nested = nested_settings(kind)
            if nested is Method:
                inner = prefix != ""
                kinds_known = [METHODS[method]] if method in METHODS and not inner else METHODS.values()
                for known in kinds_known:
                    if not inner or "base" not in kinds(known):
                        yield from walk(known, f"{prefix}{key}.")
            elif nested is Dataset:
                yield from datasets(f"{prefix}{key}.")
            elif nested is not None:
                yield from walk(nested, f"{prefix}{key}.")
        if schema is Teacher:
            yield from datasets(f"{prefix}dataset.")
            yield from walk(Schedule, f"{prefix}schedule.")

    def datasets(prefix: str) -> Iterator[str]:
        for part in {spec.settings: None for spec in DATASETS.values()}:
            yield from walk(part, prefix)

    return walk(Config, "")


def unknown(key: str, method: str | None = None) -> UserError:
    """The error for a key that no config has; knows where a bare name belongs and what a misspelt one resembles."""
    known = [other for other in dict.fromkeys(known_keys(method)) if other != key]  # another dataset may have it
    parent, _, leaf = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    siblings = [name for name in siblings if (parent, name) != ("method", "name")]
    homes = [other for other in known_keys() if other.endswith(f".{leaf}") and parent != "method"]
    homes = [other for other in homes if not parent or not f".{other}".endswith(f".{key}")]
    # Groups within a method have the keys of other groups: they are nobody's home.
    homes = [other for other in homes if not other.startswith("method.") or other.count(".") == 1]
    hint = f" (did you mean '{homes[0]}'?)" if homes else nearest(leaf, siblings)
    whose = f" for method {method}" if method and parent == "method" else ""
    listed = ", ".join(siblings)
    return UserError(f"{key}: unknown key{whose}{hint}" + (f"; {parent} has {listed}" if parent and listed else ""))


def _check(node: Any, schema: type[Settings], prefix: str, method: str | None) -> None:
    """Compares a node with a class of settings, key by key."""
    if not isinstance(node, Mapping):
        raise UserError(f"{prefix[:-1]}={shown(node)}: expected a group of keys")
    wanted = kinds(schema)
    for key in node:
        if key not in wanted:
            raise unknown(prefix + str(key), method)
    for key, kind in wanted.items():
        nested = nested_settings(kind)
        if key not in node:
            raise missing(prefix + key, kind)
        value = node[key]
        if nested is Method and not (value is None and prefix):
            inner = value.get("name") if isinstance(value, Mapping) else None
            able = [name for name, known in METHODS.items() if not prefix or "base" not in kinds(known)]
            if inner not in able:
                raise UserError(
                    f"{prefix}{key}.name={shown(inner)}: expected one of {', '.join(able)}{nearest(inner, able)}"
                )
            nested = METHODS[str(inner)]
        if nested is Dataset and isinstance(value, Mapping):
            nested = settings_of(value, prefix + key)
        if nested is not None and not (value is None and type(None) in get_args(kind)):
            _check(value, nested, f"{prefix}{key}.", method)
        elif nested is None:
            check_value(value, schema, key, prefix + key)


def validate(config: Mapping[str, Any]) -> None:
    """Refuses a config that has a wrong key, type, range or choice.

    Raises:
        UserError: Names the key, its value, what was expected and the nearest valid choice.
    """
    node = config.get("method")
    method = node.get("name") if isinstance(node, Mapping) else None
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"method.name={shown(method)}: expected one of {', '.join(METHODS)}{nearest(method, METHODS)}")
    _check(config, Config, "", method)
    check_dataset(config["dataset"])
    if own := config["teacher"]["dataset"]:
        whole = {**config["dataset"], **own}
        check_settings({**own_keys(whole), **own}, settings_of(whole, "teacher.dataset"), "teacher.dataset.")
        check_dataset(whole, "teacher.dataset")
    check_schedule(config["schedule"])
    taught = config["teacher"]["schedule"] or {}
    check_settings(taught, Schedule, "teacher.schedule.", whole=False)
    if taught.get("epochs") is not None and taught.get("iterations") is not None:
        given = f"teacher.schedule.epochs={taught['epochs']}, teacher.schedule.iterations={taught['iterations']}"
        raise UserError(f"{given}: expected one of the two, and null for the other")
    length = {key: config["schedule"][key] for key in ("epochs", "iterations", "interval")}
    check_schedule({**config["schedule"], **taught, **length}, "teacher.schedule.")
    if source := config["method"].get(SOURCE):
        check_dataset(source, f"method.{SOURCE}")
        if source["validation"]:
            given = f"method.{SOURCE}.validation={source['validation']}"
            raise UserError(f"{given}: expected 0, for nothing is scored on these images; see method.source_share")
    for who in ("teacher", "student"):
        network = config[who]["network"]
        if network is not None and network["name"] not in choices("network"):
            hint = nearest(network["name"], choices("network"))
            raise UserError(f"{who}.network.name={network['name']}: there is no such network{hint}")
    for prefix, settings in (("method", config["method"]), ("method.base", config["method"].get("base") or {})):
        for who, whose in (("teacher", Teacher), ("student", Student)):
            searched = (settings.get("search") or {}).get(who)
            if searched is not None:
                _check(searched, whose, f"{prefix}.search.{who}.", method)
    check_device(config["device"])
    check_compile(config["compile"], config["activation_checkpointing"])
    check_asked(config)
    known = [*choices("dataset"), *ANALYSES]
    if config["evaluation"] is not None and config["evaluation"] not in known:
        hint = nearest(config["evaluation"], known)
        raise UserError(f"evaluation={config['evaluation']}: expected a dataset or one of {', '.join(ANALYSES)}{hint}")
    _check_base(method, config["method"])
    METHODS[method].check(config["method"], epochs_of(config["schedule"]))


def check_asked(config: Mapping[str, Any]) -> None:
    """Refuses a command that asks for several things in the place of the training.

    Raises:
        UserError: Names them.
    """
    asked = [f"{key}={shown(config[key])}" for key in ("plan", "rehearse", "settings") if config[key]]
    if len(asked) > 1:
        raise UserError(f"{', '.join(asked)}: expected one of these at a time")


def _check_base(method: str, settings: Mapping[str, Any]) -> None:
    """Refuses a method around another one than its name says."""
    if "base" not in settings:
        return
    wanted, given = method.partition("+")[2] or METHODS[method].base_alone, (settings["base"] or {}).get("name")
    if given != wanted:
        raise UserError(f"method.base.name={shown(given)}: expected {shown(wanted)} with method={method}")


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
    plain_values = _at_home({str(key): value for key, value in values.items()})
    validate(plain_values)
    return plain_values


def _at_home(node: dict[str, Any]) -> dict[str, Any]:
    """A config with its paths in full."""
    return {
        key: _at_home(value)
        if isinstance(value, dict)
        else os.path.expanduser(value)
        if key in PATHS and isinstance(value, str)
        else value
        for key, value in node.items()
    }
