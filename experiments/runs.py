"""The tables and sweeps of a command: composed in turn, trained by one pool, each rendered when it is done."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments import progress
from experiments.cell import check_writable, is_first, sweep_up, tell, world_size
from experiments.checking import check_asked
from experiments.launch import ByLauncher, Report, SideBySide, refresh
from experiments.meaning import lenient
from experiments.mirror import fault, go_offline
from experiments.pages import Page, Pages
from experiments.plan import Job, plan_lines, pooled, pooled_of
from experiments.rehearse import rehearse
from experiments.schema import Config as Schema
from experiments.slurm import InQueue
from experiments.sources import print_settings
from experiments.table import Sweep, Table, composer, parse, settings_of, with_choices
from experiments.workers import default_workers
from kt.errors import Failure, UserError
from kt.files import at_home
from kt.settings import check_value
from kt.store import close, folder_of
from tables.summary import Ran, show


@dataclass
class Run:
    """A table or a sweep that is to be run.

    Attributes:
        table: The table.
        master: The config that the command line composes for it.
        launcher: Hydra's launcher.
        batch: How many cells to hand to the launcher at once, see `TableSweeperConfig`.
        output_root: Where results are.
        scale: The choice of `scale`.
        left: Keys of the command's jobs on which it waits.
        trained: Its own jobs that were not done when the command began.
    """

    table: Table
    master: DictConfig
    launcher: Any
    batch: int | None
    output_root: str
    scale: str
    left: set[str] = field(default_factory=set)
    trained: list[Job] = field(default_factory=list)

    def render(self) -> Path:
        """Renders the results that there are."""
        return self.table.renderer(self.output_root, self.scale)()

    def render_again(self) -> Path:
        """The same while there are more and more of them: which rows there are is found out once."""
        return self._renderer()

    @functools.cached_property
    def _renderer(self) -> Callable[[], Path]:
        return self.table.renderer(self.output_root, self.scale)


def compose(sweeper: Any, arguments: Sequence[str]) -> Run | int:
    """A table, or the points of a sweep, under the command line's overrides; its settings or a rehearsal at once.

    Args:
        sweeper: The `TableSweeper`, set up.
        arguments: Task overrides.

    Returns:
        What is to be planned or run, or an exit status where nothing is.

    Raises:
        UserError: A mistake in the overrides.
    """
    master, launcher = sweeper.config, sweeper.launcher
    for key in ("plan", "rehearse", "settings", "workers"):  # read here, before any cell's config is checked
        check_value(master[key], Schema, key, key)
    check_asked(master)
    loader = sweeper.hydra_context.config_loader
    output_root, choices_made = str(at_home(str(master.output_root))), master.hydra.runtime.choices
    scale = str(choices_made["scale"])

    def load(overrides: list[str]) -> DictConfig:
        return with_choices(loader.load_sweep_config(master, overrides))

    table: Table
    with lenient(master.rehearse):
        if sweeper.name is None:
            if master.settings:
                raise UserError("settings=true: tells of the rows of a table; add +table=<name>")
            table = Sweep(arguments, composer(load))
        else:
            from hydra_plugins.kt_table_sweeper.table_sweeper import rows_of

            if {"dataset", "teacher"} & set(parse(arguments)):  # what the table's file chooses is not the master's
                file = loader.load_sweep_config(master, [f"+table={sweeper.name}", f"scale={scale}"])
                choices_made = file.hydra.runtime.choices
            own = {group: str(choices_made[group]) for group in ("dataset", "teacher")}
            printed = rows_of(loader.load_sweep_config(master, [f"+table={sweeper.name}", "scale=paper"]))
            if master.settings:
                told = settings_of(sweeper.name, printed, arguments, composer(load), own["dataset"])
                if is_first():
                    print_settings(told, f"{sweeper.name} at scale=paper")
                return 0
            table = Table(sweeper.name, sweeper.rows, arguments, composer(load), own, master.scale, printed)
    refresh(table.jobs, output_root)
    run = Run(table, master, launcher, sweeper.batch, output_root, scale)
    _workers(run, table.jobs)  # refuses what does not go together
    if master.rehearse and not master.plan:
        check_writable(output_root)
        sweep_up(output_root)
        return rehearse(table.name, list(table.jobs.values()), master.rehearse, output_root, scale)
    return run


def show_plans(runs: Sequence[Run]) -> None:
    """Prints what each run would do, and of several what there is to do for all of them, whose cells are shared."""
    for run in runs:
        print("\n".join(plan_lines(run.table.jobs, run.output_root, _workers(run, run.table.jobs) or 1)))
    if len(runs) > 1:
        jobs, first = pooled({run.table.name: run.table.jobs for run in runs}), runs[0]
        told = plan_lines(jobs, first.output_root, _workers(first, jobs) or 1)[-1]
        print(f"{len(runs)} tables together: {told}")


def _workers(run: Run, jobs: Mapping[str, Job]) -> int | None:
    """How many workers of kt's own train jobs; None where a launcher that the command line has chosen does.

    Raises:
        UserError: Workers are asked for beside a launcher.
    """
    master, launcher = run.master, run.launcher
    chosen = [str(line) for line in master.hydra.overrides.hydra if str(line).startswith("hydra/launcher=")]
    if chosen or type(launcher).__name__ != "BasicLauncher" or world_size() > 1:
        if master.workers is not None and world_size() == 1:
            named = chosen[0] if chosen else type(launcher).__name__
            raise UserError(f"workers={master.workers}: expected null beside {named}, which has a number of its own")
        return None
    if master.workers is not None:
        return int(master.workers)
    return default_workers([job.config for job in jobs.values() if not job.is_done])


class Training:
    """Trains what the runs of a command lack, all in one pool, and ends each as soon as its last cell is done.

    Args:
        runs: At least one, of one command line: they share all keys that say where and how.
        began: When the command began, by `time.monotonic`.
    """

    def __init__(self, runs: Sequence[Run], began: float):
        self.runs, self.began = runs, began
        self.output_root = runs[0].output_root
        self.jobs = pooled({run.table.name: run.table.jobs for run in runs})
        self.todo = [job for job in self.jobs.values() if not job.is_done]  # when the command began
        self.ended: dict[str, Ran] = {}  # by name
        self.display = progress.Display(quiet=not is_first())
        self.pages: Pages | None = None
        for job in self.jobs.values():
            # Or each of them would make the cell's run anew, for the tag.
            if len(names := [run.table.name for run in runs if job.id in run.table.jobs]) > 1:
                job.config = {**job.config, "table": {**job.config["table"], "beside": names}}
        for run in runs:
            run.trained = [job for job in run.table.jobs.values() if not job.is_done]
            run.left = {pooled_of(job, self.jobs).key for job in run.trained}

    def run(self) -> list[Ran]:
        """Trains and renders everything.

        Returns:
            What each has come to, in order. Where it was interrupted, statuses are 130.
        """
        progress.use(self.display)
        for job in self.jobs.values():
            tell(job.told, self.display)
            if job.is_done:
                for text in job.status.get("warnings", ()):
                    self.display.warn(text)
        go_offline(self.todo, self.display)
        if not self.todo:
            self.display.line(f"nothing to train: all {len({job.id for job in self.jobs.values()})} cells are done")
        interrupted = False
        try:
            for run in self.runs:
                if not run.left:
                    self._end(run)
            if self.todo:
                self._train()
        except KeyboardInterrupt:
            interrupted = True
            for job in self.jobs.values():
                if is_first() and job.status.get("killed"):
                    job.status = close(folder_of(self.output_root, job.id))
            self.display.line("interrupted; the same command goes on from here")
        finally:
            progress.use(None)
        for run in self.runs:
            if run.table.name not in self.ended:
                self._end(run, interrupted)
        return [self.ended[run.table.name] for run in self.runs]

    def _train(self) -> None:
        check_writable(self.output_root)  # what is done needs no place to write to
        sweep_up(self.output_root)
        first, waiting = self.runs[0], [run for run in self.runs if run.left]
        if is_first():
            shown = {run.table.name: Page(run.render_again, {self.jobs[key].id for key in run.left}) for run in waiting}
            self.pages = Pages(shown, self.output_root)
        name = waiting[0].table.name if len(waiting) == 1 else f"{len(waiting)} tables"
        report = Report(name, self.jobs, self.output_root, self.display, self.pages, self._over)
        workers = _workers(first, self.jobs)
        if workers is not None:
            SideBySide(report, workers).run()
            return
        runner = InQueue if type(first.launcher).__name__ == "SlurmLauncher" else ByLauncher
        runner(report, first.launcher, first.batch or _default_batch(first.launcher)).run()

    def _over(self, jobs: Iterable[Job]) -> None:
        """Some jobs have come to their end: so have the tables that waited for no others."""
        keys = {job.key for job in jobs}
        for run in self.runs:
            if run.left & keys:
                run.left -= keys
                if not run.left:
                    self._end(run)

    def _end(self, run: Run, interrupted: bool = False) -> None:
        """Renders a table and says what it has come to; of several that were interrupted, their summary does."""
        name, folder = run.table.name, None
        jobs = list(run.table.jobs.values())
        if interrupted:  # other processes may be elsewhere, or gone
            for job in jobs:
                job.status = job.read_status(self.output_root)
        else:
            refresh(run.table.jobs, self.output_root)
        for job in jobs:
            if not job.is_done and not (pool := pooled_of(job, self.jobs)).is_done:
                job.status = pool.status
        try:
            status, error = 130 if interrupted else _status_of(jobs), ""
            if is_first() and (not interrupted or self._has_begun(run)):
                with self.display.paused():
                    folder, lost = self._show(run, quiet=interrupted and len(self.runs) > 1)
                status = status or lost
                if folder is not None and not interrupted:
                    _mirror(run.table, folder, self.output_root, self._wandb)
        except UserError as found:
            status, error = 2, str(found)
        except Failure as found:
            status, error = 3, str(found)
        except Exception as found:  # a mistake of ours, which must not end the trainings of the other tables
            if len(self.runs) == 1:
                raise
            traceback.print_exc()
            status, error = 3, f"{type(found).__name__}: {found}"
        self.ended[name] = Ran(name, status, time.monotonic() - self.began, error, folder)
        if self.pages is not None:
            self.pages.tables.pop(name, None)

    @functools.cached_property
    def _wandb(self) -> dict[str, Any]:
        """W&B's settings for tables; whether it can be reached the cells to train have told, else it is asked."""
        if self.todo:
            return dict(self.todo[0].config["wandb"])
        settings = dict(self.runs[0].master.wandb)
        if settings["mode"] == "online" and fault() is not None:
            settings["mode"] = "offline"
        return settings

    def _has_begun(self, run: Run) -> bool:
        """Whether there is anything to show of an interrupted run that there was not before."""
        return len(self.runs) == 1 or any(job.is_done or job.status["status"] != "missing" for job in run.trained)

    def _show(self, run: Run, quiet: bool) -> tuple[Path | None, int]:
        if quiet:
            return run.render(), 0
        for job in run.table.jobs.values():
            if not job.is_done and job.status.get("error"):
                print(f"X {job.text}: {job.status['error']} ({folder_of(self.output_root, job.id)})")
        return show(run.render)


def _status_of(jobs: Sequence[Job]) -> int:
    """The exit status, unless interrupted.

    Raises:
        UserError: Nothing could be trained, because of one and the same mistake of the user.
    """
    bad = [job for job in jobs if not job.is_done]
    messages = {job.status.get("error") for job in bad}
    if bad and len(bad) == len(jobs) and len(messages) == 1 and all(job.status.get("user") for job in bad):
        raise UserError(str(messages.pop()))
    return 3 if bad else 0


def _mirror(table: Table, folder: Path, output_root: str, settings: Mapping[str, Any]) -> None:
    """Mirrors a rendered table, its cells and those that they need, where the cells have been mirrored that it trained.

    Args:
        table: The table.
        folder: Where it has been rendered.
        output_root: Where its cells live.
        settings: As `WandbRun` takes them.
    """
    from tables.mirror import mirror_table

    cited = [cell_id for shown in table.shown for cell_id in shown.cells]
    mirror_table(folder, output_root, settings, [*cited, *table.jobs])


def _default_batch(launcher: Any) -> int | None:
    """The local submitit launcher starts everything at once; it gets as many cells as there are cores."""
    return max(1, os.cpu_count() or 1) if type(launcher).__name__ == "LocalLauncher" else None
