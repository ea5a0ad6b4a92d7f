"""Weights & Biases: a run for each cell, a mirror of its records and never a reason to fail. Imports no torch.

All runs of an output folder are in its `wandb/`: W&B's terminal viewer compares them there, one `sync` uploads them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kt.files import read_json, write_json
from kt.store import read_records, read_result, records_file

logger = logging.getLogger(__name__)

Json = dict[str, Any]

MARK = "wandb.json"  # what the finished run of a cell or table says, beside what it mirrors
LONGEST_NAME = 128  # characters, W&B's limit
LONGEST_TAG = 64
FINISH_SECONDS = 60.0  # what may be uploaded at the end; `wandb sync` uploads what is left
COSTS = ("images_per_second", "peak_memory", "flops")  # of a result, beside its metrics


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _dismiss() -> None:
    """Ends W&B's own process, which would otherwise be waited for, or complained about, when this one ends."""
    if (wandb := sys.modules.get("wandb")) is not None:
        with contextlib.suppress(Exception):
            wandb.teardown()


class WandbRun:
    """A run that swallows every failure of the service (no key, no network, a killed core process) with one warning.

    A context: it ends with it, as failed where an exception leaves it. A run of the same id replaces an earlier one.

    Args:
        output_root: The run's files go to its `wandb/`.
        settings: `mode` (offline, online, disabled), `project` and `entity`. What cannot be online is kept offline.
        about: What W&B is told of the run: `id`, `name`, `group`, `job_type`, `tags` and `config`.
        mark: File to leave once the run has ended well: its `tags`, and what it is a run `of`.
        of: What tells whether the run is still true, such as a checksum.
    """

    def __init__(
        self,
        output_root: str | os.PathLike[str],
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        mark: Path,
        of: str | None = None,
    ):
        self.run: Any = None
        self.id: str | None = None
        self.mark, self.content = mark, {"tags": about["tags"], "of": of}
        self.steps: dict[str, int] = {}
        self.offset = 0
        if settings.get("mode", "offline") != "disabled":
            self._guard(self._init, Path(output_root), settings, about)

    def _init(self, output_root: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        # Without a home its core prints a page of errors.
        home = os.path.expanduser("~")
        os.environ.setdefault("HOME", home if os.path.isabs(home) else str(output_root))
        import wandb

        self.mark.unlink(missing_ok=True)
        self._replace(output_root, about["id"])
        given: Json = dict(
            dir=str(output_root),
            project=settings.get("project", "kt"),
            entity=settings.get("entity"),
            **{key: about[key] for key in ("id", "name", "group", "job_type", "tags", "config")},
            reinit="finish_previous",
            # Many processes share the folder, and have no use for links to the latest run's logs.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                init_timeout=30,
                finish_timeout=FINISH_SECONDS,
                symlink=False,
                x_save_requirements=False,
            ),
        )
        mode = settings.get("mode", "offline")
        try:
            self.run = wandb.init(mode=mode, **given)
        except Exception as error:  # noqa: BLE001 - as in `_guard`
            if mode != "online":
                raise
            logger.warning("Weights & Biases is offline for this run: %s", _told(error))
            _dismiss()
            self._replace(output_root, about["id"])
            self.run = wandb.init(mode="offline", **given)
        self.id = about["id"]
        # The service's own step counts records, of every kind; ours counts updates.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _replace(self, output_root: Path, run_id: str) -> None:
        """Removes an earlier run of the same id, which would stand beside it."""
        for earlier in runs_folder(output_root).glob(f"*run-????????_??????-{run_id}"):
            shutil.rmtree(earlier)

    def _guard(self, function: Any, *arguments: Any) -> None:
        """Runs a call into wandb; any failure ends the mirroring and nothing else."""
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever the service raises, the training goes on
            logger.warning("Weights & Biases is off for this run: %s", _told(error))
            self.run = None
            _dismiss()

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.run is not None:
            self._guard(self._finish, int(kind is not None))

    def _finish(self, exit_code: int) -> None:
        run, self.run = self.run, None
        run.finish(exit_code=exit_code)
        if exit_code == 0:
            write_json(self.mark, self.content)

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirrors one record; steps of later phases follow on those of earlier ones, which `phase` counts."""
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
        step = {"step": self.offset + row["step"], "epoch": row["epoch"], "phase": len(self.steps)}
        self._guard(self.run.log, {**step, **values})

    def show(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Logs what a function makes, which may use W&B's own types."""
        if self.run is not None:
            self._guard(lambda: self.run.log(make()))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """What the run's line in a table of runs says."""
        if self.run is not None:
            self._guard(self.run.summary.update, dict(values))

    def keep(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        """Adds files, by their names in it, as an artifact, which refers to them until it is uploaded."""
        if self.run is not None:
            self._guard(self._keep, name, kind, files)

    def _keep(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        import wandb

        artifact = wandb.Artifact(name, kind)
        for own, file in files.items():
            artifact.add_file(str(file), own, policy="immutable")
        self.run.log_artifact(artifact)


def runs_folder(output_root: str | os.PathLike[str]) -> Path:
    """Where all runs are."""
    return Path(output_root) / "wandb"


def tags_of(names: Iterable[str | None]) -> list[str]:
    """Names as tags, each once and as long as W&B takes it."""
    return list(dict.fromkeys(name[:LONGEST_TAG] for name in names if name))


def about_cell(cell_id: str, config: Mapping[str, Any], tables: Iterable[str] = ()) -> Json:
    """What W&B is told of a cell's run, as `WandbRun` takes it.

    Its name says method, networks, data, what tells the row from others of the method, and the seed; `what` in its
    config is the same without the seed, to group by.

    Args:
        cell_id: The cell's id, and the run's.
        config: The cell's; of its table it may name those `beside` for which the same command has trained it.
        tables: Further tables that cite it, each a tag.
    """
    table, method = config["table"], config["method"]["name"]
    row, _, swept = (table["row"] or method).partition("[")
    networks = [part["network"]["name"] for part in (config["teacher"], config["student"]) if part["network"]]
    parts = [method, "" if row == method else f"({row})", "→".join(networks), config["dataset"]["name"], swept[:-1]]
    what, seed = " ".join(part for part in parts if part), f" seed {config['seed']}"
    tags = [table["name"], *table.get("beside", ()), *tables, config["scale"]["name"], method]
    return {
        "id": cell_id,
        "name": what[: LONGEST_NAME - len(seed)] + seed,
        "group": table["name"] or "single",
        "job_type": table["role"] or config["cell"],
        "tags": tags_of(tags),
        "config": {**config, "what": what},
    }


def summary_of(result: Mapping[str, Any]) -> Json:
    """A cell's line in a table of runs: its metrics and what it cost, of its result or what that is made from."""
    costs = {key: result[key] for key in COSTS if result.get(key) is not None}
    seconds = sum(phase["seconds"] for phase in result.get("phases", ()))
    return {**result["metrics"], **costs, "training_seconds": seconds}


def tag_cell(folder: Path, settings: Mapping[str, Any], table: str) -> bool:
    """Makes a finished cell's run anew where it lacks the tag of a table that cites the cell, or is not there at all.

    Args:
        folder: The cell's.
        settings: As `WandbRun` takes them.
        table: The table's name.

    Returns:
        Whether W&B has done what there was to do.
    """
    result, mark = read_result(folder), folder / MARK
    if result is None:
        return True
    before = (read_json(mark) or {}).get("tags", [])
    if tags_of([table])[0] in before:
        return True
    with WandbRun(
        folder.parents[1], settings, about_cell(folder.name, result["config"], [*before, table]), mark
    ) as run:
        for row in read_records(records_file(folder)):
            run.log(row)
        run.summarise(summary_of(result))
    return mark.exists()
