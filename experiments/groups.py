"""The choices of Hydra's config groups that are made from the package's lists, and what a group has to choose from.

A file of the same name in `conf/<group>` wins over a choice made here, and any further file there is a choice too. So
is a table's file in the folder of another package's paper.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from kt.data.names import DATASETS
from kt.models.names import CONFIG_NETWORK, DENSE_NETWORKS, NETWORKS, pretrained_weights
from kt.needs import NO_TEACHER
from kt.outside import load_outside
from kt.settings import KCD, METHODS, Dataset, Schedule, defaults
from tables import CONF
from tables.papers import config_folders, table_files

GROUPS = ("teacher", "student", "dataset", "method", "schedule", "scale", "network", "table")

_made: dict[str, set[str]] = {}


def choices(group: str) -> list[str]:
    """The choices of a config group."""
    files = table_files() if group == "table" else {path.stem for path in (CONF / group).glob("[!_]*.yaml")}
    return sorted({*files, *_made.get(group, ())})


def _make(group: str, name: str, node: dict[str, Any]) -> None:
    if (CONF / group / f"{name}.yaml").exists():
        return  # Hydra would merge the two
    ConfigStore.instance().store(group=group, name=name, node=node, provider="kt")
    _made.setdefault(group, set()).add(name)


def dataset_choice(choice: str) -> dict[str, Any]:
    """The settings of one of the choices of `dataset`, as Hydra would compose them."""
    return copy.deepcopy(_read_dataset(choice))


@functools.cache
def _read_dataset(choice: str) -> dict[str, Any]:
    path = CONF / "dataset" / f"{choice}.yaml"
    if not path.exists():
        node = OmegaConf.to_container(ConfigStore.instance().load(f"dataset/{choice}.yaml").node)
        assert isinstance(node, dict)
        return {str(key): value for key, value in node.items()}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if base != "_self_":
            merged |= _read_dataset(base)
    return merged | content


def stood_in(choice: str) -> str:
    """The embedded dataset that replaces a choice of `dataset` where it has one; any other value stays as it is."""
    return (choice in choices("dataset") and dataset_choice(choice)["stand_in"]) or choice


def _network(name: str) -> dict[str, Any]:
    """A network by name; a null width is the scale's on the embedded scenes, the full width on other data."""
    return {"name": name, "width": None, "small_stem": False, "config": None, "options": None}


def _recipe(own: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's schedule, which is as much shorter as the scale says."""
    node = dict(own) if "defaults" in own else {**defaults(Schedule), **own}
    lengths = {key: node[key] for key in ("epochs", "iterations", "interval") if isinstance(node.get(key), int)}
    return {**node, **{key: f"${{scaled:{length},${{scale.fraction}}}}" for key, length in lengths.items()}}


def _register() -> None:
    """Makes every network a choice of `network`, `teacher` and `student`, every method's defaults one of `method`.

    A dataset that says what its config is becomes one of `dataset`, and its recipe one of `schedule`.

    Names with an underscore are for the defaults lists of files: `_kcd`, what all methods around another one share, and
    `_base` of the datasets.
    """
    load_outside()
    for name, schema in METHODS.items():
        node = defaults(schema)
        if schema is KCD:
            del node["base"]
            ConfigStore.instance().store(group="method", name="_kcd", node=node, provider="kt")
        elif inner := name.partition("+")[2]:
            del node["base"]
            _make("method", name, {"defaults": [f"{inner}@base", "_self_"], "name": name, **node})
        else:
            chosen = {"defaults": ["_self_", *({key: choice} for key, choice in schema.choices.items())]}
            _make("method", name, {**(chosen if schema.choices else {}), "name": name, **node})
    ConfigStore.instance().store(group="dataset", name="_base", node=defaults(Dataset), provider="kt")
    for name, spec in DATASETS.items():
        if spec.defaults:
            _make("dataset", name, {**defaults(spec.settings), "name": name, **spec.defaults})
            _make("schedule", name, _recipe(spec.schedule))
    _make("teacher", "none", {**NO_TEACHER})
    own = {key: value for key, value in NO_TEACHER.items() if key != "network"}
    for name in (*NETWORKS, *DENSE_NETWORKS, CONFIG_NETWORK):
        of_teacher, of_student = pretrained_weights(name)
        _make("network", name, _network(name))
        parts = {"defaults": [{"/network@network": name}, "_self_"]}
        _make("teacher", name, {**parts, **own, "pretrained": of_teacher})
        _make("student", name, {**parts, "checkpoint": None, "pretrained": of_student})


class TablesOfPapers(SearchPathPlugin):
    """Makes Hydra look for tables where the papers of other packages have theirs."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds the papers' folders behind `conf`."""
        for folder in config_folders()[1:]:
            search_path.append("kt.papers", str(folder))


# Hydra copies this store before every composition, which is half of the time that one takes, and changes neither.
ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]

_register()
Plugins.instance().register(TablesOfPapers)
