"""Configs and tables under a command line's overrides, composed as the commands do it, without running anything."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments.checking import plain
from experiments.groups import CONF
from experiments.run import normalise
from experiments.table import Table, composer


@composer
def load(overrides: list[str]) -> DictConfig:
    """An unchecked config; files are read once for all tests of a process."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides)


def composed(*overrides: str) -> dict[str, Any]:
    """A checked config."""
    return plain(load(normalise(overrides)))


def rows_of(name: str) -> dict[str, Any]:
    """The rows of a table's file, as it has them."""
    rows = OmegaConf.to_container(OmegaConf.load(CONF / "table" / f"{name}.yaml").hydra.sweeper.rows)
    assert isinstance(rows, dict)
    return rows


def table(name: str, *arguments: str) -> Table:
    """A table; its data give way to their stand-in where the scale says so."""
    scale = [line for line in arguments if line.startswith("scale=")]
    master = load(normalise([f"+table={name}", *scale]))
    stand_in = master.dataset.stand_in if master.scale.stand_in else None
    return Table(name, rows_of(name), normalise([f"+table={name}", *arguments]), load, stand_in)
