"""A table: rows that are no grid, expanded into cells, launched in waves of what they need, and rendered.

Keys of the command line other than `rows=`, `method=` and `role=` (which select rows) override every row whose schema
has them. A comma list is an axis: its values become rows of their own, or are averaged over if the key is `seed`.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments import progress
from experiments.cell import (
    agree,
    all_needs,
    check_writable,
    folder_of,
    identity,
    is_first,
    read_result,
    read_status,
    settle,
)
from experiments.schema import METHODS, is_group, kinds, known_keys, plain, sign, unknown, with_recipe
from kt.errors import UserError, nearest

Config = dict[str, Any]
Settings = dict[str, list[str]]  # override key -> its values; more than one make an axis

ROW_KEYS = ("label", "role", "ours", "paper_row", "optional", "overrides")
SELECTORS = {"rows": "id", "role": "role", "method": "method"}  # key -> what it compares of a row
FIXED = ("scale", "data_root", "output_root", "device", "plan")  # one value for the whole run
AVERAGED = "seed"
POLL_SECONDS = 0.5


@dataclass
class Row:
    """A row as the table's file has it."""

    id: str
    label: str
    role: str
    overrides: Settings
    ours: bool = False
    paper_row: int | None = None
    optional: bool = False  # left out unless rows= names it

    @property
    def method(self) -> str:
        """The row's method, `none` for the teacher and the untaught student."""
        return self.overrides.get("method", ["none"])[0]


@dataclass
class Shown:
    """A row as it is rendered: one setting of all axes but the seeds, which it averages."""

    row: Row
    axes: dict[str, str]
    cells: dict[str, int] = field(default_factory=dict)  # id -> seed
    config: Config = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.axes.items())

    def entry(self) -> Config:
        """What the renderer gets."""
        is_teacher = self.row.role == "teacher"
        network = self.config["student"]["network"]["name"]
        own = METHODS[self.config["method"]["name"]].own_network
        taught_by = None if own else self.config["teacher"]["network"]
        return {
            "id": self.row.id + (f"[{self.suffix}]" if self.axes else ""),
            "label": self.row.label + (f" ({self.suffix})" if self.axes else ""),
            "role": self.row.role,
            "method": self.config["method"]["name"],
            "teacher": network if is_teacher else (taught_by or {}).get("name"),
            "student": None if is_teacher else network,
            "ours": self.row.ours,
            "paper_row": self.row.paper_row,
            "cells": [{"id": cell_id, "seed": seed} for cell_id, seed in self.cells.items()],
            "axes": self.axes,
            "evaluation": self.config["evaluation"],
            "optional": self.row.optional,
        }


@dataclass
class Job:
    """A cell to launch, with the overrides that mean it."""

    id: str
    overrides: list[str]
    config: Config
    text: str
    needs: list[str]
    status: Config = field(default_factory=dict)

    def read_status(self, output_root: str) -> Config:
        """How the cell stands, with the score that this table asks for on another dataset."""
        return read_status(folder_of(output_root, self.id), self.config["evaluation"])


def parse(lines: Sequence[str]) -> Settings:
    """Overrides as key -> values.

    Raises:
        UserError: A key is swept over an interval, which a table cannot.
    """
    settings: Settings = {}
    for override in OverridesParser.create().parse_overrides(list(lines)):
        key = override.get_key_element().lstrip("+")
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise UserError(f"{override.input_line}: expected a list of values such as {key}=1,2,3")
            settings[key] = [str(value) for value in override.sweep_string_iterator()]
        else:
            settings[key] = [str(override.get_value_element_as_str())]
    return settings


def unparse(settings: Mapping[str, str]) -> list[str]:
    """One setting of all axes as overrides for Hydra."""
    return [f"{sign(key)}{key}={value}" for key, value in settings.items()]


def composer(load: Callable[[list[str]], DictConfig]) -> Callable[[list[str]], DictConfig]:
    """Composes configs as Hydra does, but loads files only once for all settings that choose the same files.

    Args:
        load: Overrides -> composed config, the slow way.
    """
    loaded: dict[tuple[str, ...], DictConfig] = {}

    def compose(overrides: list[str]) -> DictConfig:
        files = tuple(line for line in overrides if not line.startswith("++"))
        if files not in loaded:
            loaded[files] = load(list(files))
        config = copy.deepcopy(loaded[files])
        for override in OverridesParser.create().parse_overrides([x for x in overrides if x.startswith("++")]):
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
        return config

    return compose


def quoted(text: str) -> str:
    """A text as an override's value."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def read_rows(rows: Mapping[str, Any]) -> list[Row]:
    """The rows of a table's file.

    Raises:
        UserError: A row has an unknown key, or none of those it needs.
    """
    found = []
    for row_id, content in rows.items():
        for key in content:
            if key not in ROW_KEYS:
                raise UserError(f"row {row_id}: unknown key {key!r}{nearest(key, ROW_KEYS)}")
        if "label" not in content or "role" not in content:
            raise UserError(f"row {row_id}: expected a label and a role")
        given = content.get("overrides") or {}
        words = {key: _as_override(value) for key, value in given.items()}
        overrides = parse(unparse(words))
        rest = {key: content[key] for key in ROW_KEYS[:-1] if key in content}
        found.append(Row(id=row_id, overrides=overrides, **rest))
    return found


def _as_override(value: Any) -> str:
    """A YAML value in Hydra's override grammar; a text stays as it is, so that its commas expand."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_as_override(item) for item in value) + "]"
    return str(value)


def select(rows: Sequence[Row], user: Mapping[str, list[str]]) -> list[Row]:
    """The rows that `rows=`, `role=` and `method=` leave.

    Raises:
        UserError: One of them names something that the table does not have, or nothing is left.
    """
    chosen = list(rows)
    for key, attribute in SELECTORS.items():
        wanted = [name.strip(" '\"") for value in user.get(key, []) for name in value.strip("[]").split(",")]
        wanted = [name for name in wanted if name and name != "null"]
        if not wanted:
            continue
        known = list(dict.fromkeys(getattr(row, attribute) for row in rows))
        for name in wanted:
            if name not in known:
                listed = ", ".join(known)
                raise UserError(f"{key}={name}: the table has no such row{nearest(name, known)}; it has {listed}")
        chosen = [row for row in chosen if getattr(row, attribute) in wanted]
    if "rows" not in user:
        chosen = [row for row in chosen if not row.optional]
    if not chosen:
        raise UserError("rows=, role= and method= together leave no row")
    return chosen


def route(rows: Sequence[Row], user: Mapping[str, list[str]]) -> dict[str, Settings]:
    """Row id -> its own settings with those of the command line that its schema has.

    Raises:
        UserError: A key that no row has, or that a table does not let override.
    """
    known = set(known_keys())
    routed = {row.id: dict(row.overrides) for row in rows}
    for key, values in user.items():
        if key in SELECTORS or key in ("plan", "table"):
            continue
        if key == "cell" or key.startswith("table."):
            raise UserError(f"{key}={values[0]}: the table sets this itself; rows= and role= select rows")
        if key in FIXED and len(values) > 1:
            raise UserError(f"{key}={','.join(values)}: expected one value for the whole table")
        having = list(rows)
        parent, _, leaf = key.partition(".")
        if parent == "method" and leaf:
            having = [row for row in rows if leaf.partition(".")[0] in _own_keys(row.method)]
            if not having:
                methods = list(dict.fromkeys(row.method for row in rows))
                keys = sorted({name for method in methods for name in _own_keys(method)})
                homes = ", ".join(name for name in METHODS if leaf in _own_keys(name))
                hint = f" (it belongs to {homes})" if homes else nearest(leaf, keys)
                listed = ", ".join(keys) or "none"
                raise UserError(f"{key}: unknown key, no selected row has it{hint}; their methods have {listed}")
        elif not is_group(key) and key not in known and not _is_inner(key, known):
            raise unknown(key)
        for row in having:
            routed[row.id][key] = list(values)
    return routed


def _own_keys(method: str) -> set[str]:
    """The keys of a method."""
    return set(kinds(METHODS[method])) - {"name"}


def _is_inner(key: str, known: set[str]) -> bool:
    """Whether a key lies above known ones (`student.network`, set as a whole)."""
    return any(other.startswith(key + ".") for other in known)


class Table:
    """A table with the command line's wishes applied.

    Args:
        name: Its name.
        rows: As in its file.
        arguments: The command line's task overrides.
        compose: Overrides -> composed config.
        stand_in: Embedded dataset that replaces the table's own unless the command line names one.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Any],
        arguments: Sequence[str],
        compose: Callable[[list[str]], DictConfig],
        stand_in: str | None = None,
    ):
        self.name = name
        user = parse(arguments)
        if stand_in is not None:
            user.setdefault("dataset", [stand_in])
        everything = read_rows(rows)
        self.selected = {row.id for row in select(everything, user)}
        chosen = [row for row in everything if row.id in self.selected]
        routed = route(chosen, user)
        common = {key: values for key, values in user.items() if not key.startswith("method.")}
        routed |= route([row for row in everything if row.id not in self.selected], common)
        self.rows, self.routed, self.compose = everything, routed, compose
        self.shown: list[Shown] = []
        self.jobs: dict[str, Job] = {}
        for row in chosen:
            self.shown += self._expand(row)

    def _expand(self, row: Row) -> list[Shown]:
        """A row's cells, one per combination of its axes that makes a difference; adds jobs if the row is selected."""
        settings = self.routed[row.id]
        axes = {key: values for key, values in settings.items() if len(values) > 1}
        points = []
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            single = {key: chosen.get(key, values[0]) for key, values in settings.items()}
            labels = {"name": self.name, "row": row.id, "role": row.role, "label": row.label}
            single |= {f"table.{key}": quoted(text) for key, text in labels.items()}
            overrides = unparse(with_recipe({"table": self.name, **single}))
            config = settle(plain(self.compose(overrides)))
            points.append((chosen, overrides, config, identity(config)))
        ids = {tuple(chosen.items()): cell_id for chosen, _, _, cell_id in points}
        for key, values in axes.items():
            # An axis that changes nothing in this row (the teacher under seeds of students) is none of its axes.
            same = all(cell_id == ids[tuple({**dict(point), key: values[0]}.items())] for point, cell_id in ids.items())
            if same:
                points = [point for point in points if point[0][key] == values[0]]
                for chosen, _, _, _ in points:
                    del chosen[key]
                ids = {tuple(chosen.items()): cell_id for chosen, _, _, cell_id in points}
        rows: dict[tuple[tuple[str, str], ...], Shown] = {}
        for chosen, overrides, config, cell_id in points:
            apart = {key: value for key, value in chosen.items() if key != AVERAGED}
            shown = rows.setdefault(tuple(apart.items()), Shown(row, apart, config=config))
            shown.cells.setdefault(cell_id, config["seed"])
            if row.id in self.selected:
                text = f"{shown.entry()['id']} seed {config['seed']}"
                self._add_job(Job(cell_id, overrides, config, text, []))
        return list(rows.values())

    def _add_job(self, job: Job) -> None:
        """Adds a cell and the cells that it needs, each once."""
        known = self.jobs.get(job.id)
        if known is not None:
            if known.config["evaluation"] is None:
                known.overrides, known.config = job.overrides, job.config
            return
        for name, need in all_needs(job.config).items():
            if isinstance(need, Path):
                continue
            need_id = identity(need)
            job.needs.append(need_id)
            # The composed config still says what is needed; `cell` alone turns it into the needed cell.
            kept = [line for line in job.overrides if not line.startswith("++cell=")]
            overrides = [*kept, f"++cell={name}"]
            if name == "teacher":
                # The teacher's cell may itself be evaluated on other data; here it is not asked for.
                overrides = [line for line in overrides if not line.startswith("++evaluation=")] + ["++evaluation=null"]
            self._add_job(Job(need_id, overrides, need, f"{name} seed {need['seed']}", []))
        self.jobs[job.id] = job

    def refresh(self, output_root: str) -> None:
        """Reads every job's status from its folder; all ranks see what the first one reads."""
        found = agree({job.id: job.read_status(output_root) for job in self.jobs.values()})
        for job_id, status in found.items():
            self.jobs[job_id].status = status

    def rendered(self, output_root: str) -> list[Shown]:
        """The rows to render, in the table's order: those selected, and others that have results anyway."""

        def has_results(shown: Shown) -> bool:
            return any(read_result(folder_of(output_root, cell_id)) for cell_id in shown.cells)

        found = list(self.shown)
        if any((Path(output_root) / "cells").glob("*/result.json")):
            for row in self.rows:
                if row.id not in self.selected:
                    found += [shown for shown in self._expand(row) if has_results(shown)]
        order = [row.id for row in self.rows]
        return sorted(found, key=lambda shown: order.index(shown.row.id))


def waves(jobs: Mapping[str, Job]) -> list[list[Job]]:
    """Jobs that are not done, grouped so that each group needs only earlier ones."""
    todo = {job.id: job for job in jobs.values() if job.status["status"] != "done"}
    levels: dict[str, int] = {}

    def level(job: Job) -> int:
        if job.id not in levels:
            levels[job.id] = 1 + max((level(todo[need]) for need in job.needs if need in todo), default=-1)
        return levels[job.id]

    grouped: dict[int, list[Job]] = {}
    for job in todo.values():
        grouped.setdefault(level(job), []).append(job)
    return [grouped[depth] for depth in sorted(grouped)]


def estimate(jobs: Iterable[Job], output_root: str) -> tuple[float | None, int]:
    """Seconds that the jobs will take one after the other, and from how many finished cells this is known.

    A job is likened to finished cells on the same data: with its student and method, else with its student, else any.
    """
    records = [
        result
        for path in sorted((Path(output_root) / "cells").glob("*/result.json"))
        if (result := read_result(path.parent)) is not None and _length(result["config"]) > 0
    ]
    total, used = 0.0, set()
    for job in jobs:
        keys = _likeness(job.config)
        alike: list[Config] = []
        for length in range(len(keys), 0, -1):
            alike = [record for record in records if _likeness(record["config"])[:length] == keys[:length]]
            if alike:
                break
        if alike:
            per_epoch = [record["seconds"] / _length(record["config"]) for record in alike]
            total += sum(per_epoch) / len(per_epoch) * max(1, _length(job.config))
            used |= {record["id"] for record in alike}
        elif job.config["scale"]["cell_minutes"] is not None:
            total += 60 * job.config["scale"]["cell_minutes"]
        else:
            return None, 0
    return total, len(used)


def _length(config: Config) -> int:
    """The length of a training, in epochs or in iterations."""
    return int(config["schedule"]["iterations"] or config["schedule"]["epochs"] or 0)


def _likeness(config: Config) -> tuple[Any, ...]:
    """What a cell's time per epoch depends on, the weightiest first."""
    dataset = {key: config["dataset"][key] for key in ("name", "task", "image_size", "subset", "train_size")}
    teacher = (config["teacher"]["network"] or {}).get("name")
    return dataset, config["student"]["network"], config["method"]["name"], teacher


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan_lines(jobs: Sequence[Job], output_root: str) -> list[str]:
    """What a run would do: every cell with its state and needs, and how long the rest may take."""
    width = max(len(job.text) for job in jobs)
    lines = [f"{'cell':16}  {'row':{width}}  {'state':11}  needs"]
    for job in jobs:
        lines.append(f"{job.id}  {job.text:{width}}  {job.status['status']:11}  {', '.join(job.needs) or '-'}")
    todo = [job for job in jobs if job.status["status"] != "done"]
    seconds, known = estimate(todo, output_root)
    if not todo:
        left = "nothing to train"
    elif seconds is None:
        left = "no estimate before a first cell is done"
    else:
        left = f"about {_minutes(seconds)} one after the other, by {known or 'no'} finished cells like them"
    lines.append(f"{len(jobs)} cells, {len(jobs) - len(todo)} done, {len(todo)} to train: {left}")
    return lines


def print_plan(configs: Sequence[Config], config: Config) -> None:
    """The plan of cells outside a table, with what they need."""
    jobs: dict[str, Job] = {}

    def add(settled: Config, text: str) -> str:
        cell_id = identity(settled)
        cells = {name: need for name, need in all_needs(settled).items() if not isinstance(need, Path)}
        needs = [add(need, name) for name, need in cells.items()]
        jobs[cell_id] = Job(cell_id, [], settled, text, needs)
        jobs[cell_id].status = read_status(folder_of(config["output_root"], cell_id))
        return cell_id

    for each in configs:
        settled = settle(each)
        add(settled, settled["method"]["name"])
    for line in plan_lines(list(jobs.values()), config["output_root"]):
        print(line)


class _Watch(threading.Thread):
    """Shows which cells start and end while a launcher blocks; their files tell, whichever process writes them."""

    def __init__(self, jobs: Sequence[Job], output_root: str, display: progress.Display, count: list[int], total: int):
        super().__init__(daemon=True)
        self.waiting = {job.id: job for job in jobs}
        self.running: set[str] = set()
        self.output_root, self.display, self.count, self.total = output_root, display, count, total
        self.began = time.time()
        self.halt = threading.Event()

    def run(self) -> None:
        while not self.halt.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Reports every change since the last look."""
        for job in list(self.waiting.values()):
            status = job.read_status(self.output_root)
            if status["status"] != "missing" and status.get("started", 0) < self.began and status["status"] != "done":
                continue  # left by an earlier run
            if status["status"] in ("done", "failed"):
                del self.waiting[job.id]
                self.count[0] += 1
                self.display.advance_table()
                outcome = _outcome(job, status, self.output_root)
                self.display.line(f"[{self.count[0]}/{self.total}] {job.text}: {outcome}")
            elif status["status"] == "running" and job.id not in self.running:
                self.running.add(job.id)
                self.display.line(f"  {job.text}: started ({folder_of(self.output_root, job.id)})")

    def end(self) -> None:
        """Stops watching after a last look."""
        self.halt.set()
        self.join()
        self.look()


def _outcome(job: Job, status: Config, output_root: str) -> str:
    result = read_result(folder_of(output_root, job.id))
    if result is None:
        return f"{status['status']}" + (f": {status['error']}" if status["error"] else "")
    metrics = ", ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
    return f"{metrics} ({_minutes(result['seconds'])})"


class _Run:
    """Launches a table's missing cells.

    Args:
        table: The table.
        launcher: Hydra's launcher.
        output_root: Where cells live.
        display: Where to show progress.
        batch: How many cells the launcher gets at once; None for all.
    """

    def __init__(self, table: Table, launcher: Any, output_root: str, display: progress.Display, batch: int | None):
        self.table, self.launcher, self.output_root = table, launcher, output_root
        self.display, self.batch = display, batch
        self.launched = 0
        self.count = [0]

    def run(self) -> None:
        """Runs all waves. KeyboardInterrupt passes through."""
        groups = waves(self.table.jobs)
        total = sum(len(group) for group in groups)
        self.display.start_table(self.table.name, total)
        try:
            for group in groups:
                ready = [job for job in group if not self._lacks_need(job)]
                size = self.batch or max(1, len(ready))
                for start in range(0, len(ready), size):
                    self._launch(ready[start : start + size], total)
        finally:
            self.display.stop_table()

    def _lacks_need(self, job: Job) -> bool:
        """Whether a cell that this one needs has failed; this one then fails with the same words."""
        for need in job.needs:
            status = self.table.jobs[need].status
            if status["status"] != "done":
                job.status = {**status, "status": "failed"}
                self.count[0] += 1
                self.display.advance_table()
                self.display.line(f"  {job.text}: not trained, because {self.table.jobs[need].text} failed")
                return True
        return False

    def _launch(self, jobs: Sequence[Job], total: int) -> None:
        """Launches cells, and once more those that a broken launcher took along or never started."""
        left = list(jobs)
        for attempt in range(2):
            began = time.time()
            watch = _Watch(left, self.output_root, self.display, self.count, total)
            if is_first():
                watch.start()
            try:
                broken = self._call(left)
                self._wait(left)
            finally:
                if is_first():
                    watch.end()
                self.table.refresh(self.output_root)
            left = [job for job in left if self._is_owed(job, began, broken)]
            if not left:
                return
            if attempt == 0:
                reported = sum(job.id not in watch.waiting for job in left)
                self.count[0] -= reported
                self.display.advance_table(-reported)
                self.display.line(f"  {len(left)} cells are started again ({broken or 'the launcher left them out'})")
        for job in left:
            job.status = {"status": "failed", "error": broken or "it was not started", "user": False}

    def _is_owed(self, job: Job, began: float, broken: str | None) -> bool:
        """Whether the launcher owes an attempt at a job: it was not begun, or was killed when the launcher broke."""
        status = job.status
        if status["status"] == "done":
            return False
        untouched = status["status"] in ("missing", "interrupted") or status.get("started", 0) < began
        return untouched or (broken is not None and bool(status.get("killed")))

    def _call(self, jobs: Sequence[Job]) -> str | None:
        """One call of the launcher; returns what it raised, which must not cost the table its other cells."""
        try:
            self.launcher.launch([job.overrides for job in jobs], initial_job_idx=self.launched)
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        finally:
            self.launched += len(jobs)
        return None

    def _wait(self, jobs: Sequence[Job]) -> None:
        """Waits for cells that still run although the launcher has returned, as submitit's do after a failure."""
        while any(job.read_status(self.output_root)["status"] == "running" for job in jobs):
            time.sleep(POLL_SECONDS)


def _status_of(jobs: Iterable[Job]) -> int:
    """The exit status, unless interrupted.

    Raises:
        UserError: Nothing could be trained, because of one and the same mistake of the user.
    """
    jobs = list(jobs)
    bad = [job for job in jobs if job.status["status"] != "done"]
    messages = {job.status.get("error") for job in bad}
    if bad and len(bad) == len(jobs) and len(messages) == 1 and all(job.status.get("user") for job in bad):
        raise UserError(str(messages.pop()))
    return 3 if bad else 0


def _render(table: Table, output_root: str, scale: str, dataset: str) -> None:
    """Writes the table and shows it."""
    from tables.render import write_table

    rows = [shown.entry() for shown in table.rendered(output_root)]
    folder = write_table(table.name, rows, output_root, scale, dataset)
    print("\n" + (folder / "table.md").read_text().strip() + "\n")
    print(folder / "index.html")


def run_table(sweeper: Any, arguments: Sequence[str]) -> int:
    """Runs a table under the command line's overrides.

    Args:
        sweeper: The `TableSweeper`, set up.
        arguments: Task overrides.

    Returns:
        The exit status: 0 all done, 3 a cell failed, 130 interrupted.

    Raises:
        UserError: A mistake in the overrides, or one that kept every cell from being trained.
    """
    master = sweeper.config
    loader = sweeper.hydra_context.config_loader
    output_root, scale = str(master.output_root), OmegaConf.to_container(master.scale)
    assert isinstance(scale, dict)

    def load(overrides: list[str]) -> DictConfig:
        composed = loader.load_sweep_config(master, overrides)
        return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])

    stand_in = master.dataset.stand_in if scale["stand_in"] else None
    table = Table(sweeper.name, sweeper.rows, arguments, composer(load), stand_in)
    table.refresh(output_root)
    jobs = list(table.jobs.values())
    if master.plan:
        if is_first():
            print("\n".join(plan_lines(jobs, output_root)))
        return 0
    check_writable(output_root)
    display = progress.Display(quiet=not is_first())
    progress.use(display)
    run = _Run(table, sweeper.launcher, output_root, display, sweeper.batch or _default_batch(sweeper.launcher))
    interrupted = False
    try:
        run.run()
    except KeyboardInterrupt:
        interrupted = True
        display.line("interrupted; the same command goes on from here")
    finally:
        progress.use(None)
    status = 130 if interrupted else _status_of(jobs)
    if is_first():
        for job in jobs:
            if job.status["status"] != "done" and job.status.get("error"):
                print(f"X {job.text}: {job.status['error']} ({folder_of(output_root, job.id)})")
        dataset = table.shown[-1].config["dataset"]["name"]
        _render(table, output_root, str(scale["name"]), dataset)
    return status


def _default_batch(launcher: Any) -> int | None:
    """The local submitit launcher starts everything at once; it gets as many cells as there are cores."""
    return max(1, os.cpu_count() or 1) if type(launcher).__name__ == "LocalLauncher" else None
