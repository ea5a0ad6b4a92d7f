"""Refuses a config that has what none may have, with errors that name the key and the cure.

Hydra's own struct check stops at `+key=value`, and its messages span many lines. So nothing is left to it: the command
line's keys are all let in, and the composed config is compared with the classes of settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.groups import choices
from experiments.schema import ANALYSES, Config, Student, Teacher
from kt.data.names import check_dataset
from kt.errors import UserError, nearest
from kt.settings import KCD, METHODS, Dataset, Method, Schedule, Settings, check_value, describe, kinds, shown


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
    check_dataset(config["dataset"])
    own = config["teacher"]["dataset"]
    _check_part(own, Dataset, "teacher.dataset.")
    if own:
        check_dataset({**config["dataset"], **own}, "teacher.dataset")
    _check_part(config["teacher"]["schedule"], Schedule, "teacher.schedule.")
    for who in ("teacher", "student"):
        network = config[who]["network"]
        if network is not None and network["name"] not in choices("network"):
            hint = nearest(network["name"], choices("network"))
            raise UserError(f"{who}.network.name={network['name']}: there is no such network{hint}")
    for who, whose in (("teacher", Teacher), ("student", Student)):
        searched = (config["method"].get("search") or {}).get(who)
        if searched is not None:
            _check(searched, whose, f"method.search.{who}.", method)
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
