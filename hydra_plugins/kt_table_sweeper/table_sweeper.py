"""A sweeper for tables whose rows are no grid; Hydra finds it as `hydra/sweeper: table`."""

# No postponed annotations: Hydra runs this file before it is a module, where dataclasses could not look them up.
from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class TableSweeperConfig:
    """Config node of the sweeper.

    Attributes:
        name: The table's name; None for the points of a sweep without a table.
        rows: Row id -> `label`, `role`, `ours`, `optional` and `overrides` (key -> value, comma lists expand).
        batch: How many cells to hand to the launcher at once; None for all that can run, except that the local
            submitit launcher, which starts everything it gets, then gets as many as there are CPU cores.
    """

    _target_: str = "hydra_plugins.kt_table_sweeper.table_sweeper.TableSweeper"
    name: Optional[str] = None  # noqa: UP045 - OmegaConf knows no `str | None` on Python 3.10
    rows: dict[str, Any] = field(default_factory=dict)
    batch: Optional[int] = None  # noqa: UP045 - as above


ConfigStore.instance().store(group="hydra/sweeper", name="table", node=TableSweeperConfig, provider="kt")


def rows_of(config: DictConfig) -> Any:
    """The rows of the table that a config names, with all values but the seed, which each cell has of its own."""

    def settled(row: Any, resolved: Any) -> Any:
        if isinstance(row, dict):
            return {key: settled(value, resolved[key]) for key, value in row.items()}
        return row if row == "${seed}" else resolved

    rows = config.hydra.sweeper.rows
    return settled(OmegaConf.to_container(rows), OmegaConf.to_container(rows, resolve=True))


class TableSweeper(Sweeper):
    """Expands a table or a sweep into cells; the command trains those of all that it names, and renders them.

    Args:
        name: See `TableSweeperConfig`.
        rows: See `TableSweeperConfig`.
        batch: See `TableSweeperConfig`.
    """

    def __init__(self, name: str | None, rows: Any, batch: int | None = None):
        self.name = name
        self.rows = rows
        self.batch = batch

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what composing and launching need."""
        self.hydra_context = hydra_context
        self.config = config
        self.rows = rows_of(config)  # what Hydra has made of them for the constructor is for the first seed
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Composes the table or sweep under the task overrides of the command line, for `experiments.runs.Training`."""
        # Imported late: Hydra imports every plugin at every start, also that of other programs.
        from experiments.runs import compose

        return compose(self, arguments)
