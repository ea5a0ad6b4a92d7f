"""Configs and tables under a command line's overrides, composed as the commands do it, without running anything."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments.checking import plain
from experiments.groups import CONF
from experiments.run import normalise
from experiments.sources import Setting
from experiments.table import Table, composer, settings_of, with_choices
from hydra_plugins.kt_table_sweeper import table_sweeper


@composer
def load(overrides: list[str]) -> DictConfig:
    """An unchecked config; files are read once for all tests of a process."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return with_choices(compose("config", overrides, return_hydra_config=True))


def composed(*overrides: str) -> dict[str, Any]:
    """A checked config."""
    return plain(load(normalise(overrides)))


def rows_of(name: str) -> dict[str, Any]:
    """The rows of a table's file, as it has them."""
    rows = OmegaConf.to_container(OmegaConf.load(CONF / "table" / f"{name}.yaml").hydra.sweeper.rows)
    assert isinstance(rows, dict)
    return rows


def _master(name: str, *scale: str) -> DictConfig:
    """A table's config at a scale, with Hydra's node."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", normalise([f"+table={name}", *scale]), return_hydra_config=True)


def settings(name: str, *arguments: str) -> dict[str, list[Setting]]:
    """What `settings=true` prints of a table."""
    master = _master(name, "scale=paper")
    given, dataset = table_sweeper.rows_of(master), master.hydra.runtime.choices["dataset"]
    return settings_of(name, given, normalise([f"+table={name}", *arguments]), load, dataset)


def table(name: str, *arguments: str, rows: dict[str, Any] | None = None) -> Table:
    """A table, with other rows than its own if given; its data give way to their stand-in where the scale says so."""
    master = _master(name, *(line for line in arguments if line.startswith("scale=")))
    own = master.hydra.runtime.choices
    given = rows or table_sweeper.rows_of(master)
    printed = rows or table_sweeper.rows_of(_master(name, "scale=paper"))
    return Table(name, given, normalise([f"+table={name}", *arguments]), load, own, master.scale, printed)
