"""One Weights & Biases run per attempt at a cell: a mirror of the records, and never a reason to fail."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class WandbRun:
    """A run that swallows every failure of the service (no key, no network, a killed core process) with one warning.

    Args:
        folder: The cell's folder; the run's files go to its `wandb/`.
        settings: `mode` (offline, online, disabled) and `project`.
        name: Display name.
        group: Usually `table/row`, so that attempts and seeds of a row stay together.
        tags: For filtering: table, role, scale, method.
        config: The cell's resolved config.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        name: str,
        group: str,
        tags: list[str],
        config: Mapping[str, Any],
    ):
        self.run: Any = None
        self.id: str | None = None
        self.steps: dict[str, int] = {}
        self.offset = 0
        if settings.get("mode", "offline") == "disabled":
            return
        self._guard(self._init, folder, settings, name, group, tags, config)

    def _init(
        self, folder: Path, settings: Mapping[str, Any], name: str, group: str, tags: list[str], config: Any
    ) -> None:
        # Staged artifacts would otherwise land in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.id = f"{folder.name}-{int(time.time() * 1000):x}"
        self.run = wandb.init(
            dir=str(folder),
            mode=settings.get("mode", "offline"),
            project=settings.get("project", "kt"),
            entity=settings.get("entity"),
            id=self.id,
            name=name,
            group=group,
            tags=tags,
            config=dict(config),
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, init_timeout=30),
        )
        # The service's own step restarts in every attempt; ours is the cell's.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _guard(self, function: Any, *arguments: Any) -> None:
        """Runs a call into wandb; any failure ends the mirroring and nothing else."""
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever the service raises, the training goes on
            logger.warning("Weights & Biases is off for this cell: %s: %s", type(error).__name__, error)
            self.run = None

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirrors one record; steps of later phases follow on those of earlier ones."""
        if self.run is None:
            return
        phase = row["phase"]
        if phase not in self.steps:
            self.offset = sum(self.steps.values())
        self.steps[phase] = row["step"]
        prefix = "test/" if row["kind"] == "eval" else f"{phase}/"
        values = {
            (key if key in ("lr", "images_per_second") or key.startswith("lr_") else prefix + key): value
            for key, value in row.items()
            if isinstance(value, int | float) and key not in ("step", "epoch")
        }
        self._guard(self.run.log, {"step": self.offset + row["step"], "epoch": row["epoch"], **values})

    def finish(self, metrics: Mapping[str, float] | None = None, failed: bool = False) -> None:
        """Closes the run on every way out, with the final metrics in its summary."""
        if self.run is None:
            return
        if metrics:
            self._guard(self.run.summary.update, dict(metrics))
        if self.run is not None:
            run, self.run = self.run, None
            self._guard(lambda: run.finish(exit_code=int(failed)))
