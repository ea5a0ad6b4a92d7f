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


class TableSweeper(Sweeper):
    """Expands a table or a sweep into cells, trains the missing ones after what they need, and renders them.

    Args:
        name: See `TableSweeperConfig`.
        rows: See `TableSweeperConfig`.
        batch: See `TableSweeperConfig`.
    """

    def __init__(self, name: str | None, rows: Any, batch: int | None = None):
        self.name = name
        self.rows: Any = OmegaConf.to_container(rows) if OmegaConf.is_config(rows) else rows
        self.batch = batch

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what composing and launching need."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> int:
        """Runs the table or sweep under the task overrides of the command line; returns the exit status."""
        # Imported late: Hydra imports every plugin at every start, also that of other programs.
        from experiments.table import run_table

        return run_table(self, arguments)
