"""A table: rows that are no grid, expanded into cells, launched in waves of what they need, and rendered.

Keys of the command line other than `rows=`, `method=` and `role=` (which select rows) override every row whose schema
has them. A comma list is an axis: its values become rows of their own, or are averaged over if the key is `seed`.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from omegaconf import DictConfig, OmegaConf

from experiments import progress
from experiments.cell import check_writable, is_first, tell, world_size
from experiments.checking import known_keys, plain, unknown
from experiments.groups import choices
from experiments.launch import ByLauncher, Report, SideBySide, refresh
from experiments.meaning import Identified, differences, identify, needed_cells, settle
from experiments.plan import Config, Job, plan_lines
from experiments.schema import Config as Schema
from experiments.schema import is_group, sign, with_recipe
from experiments.slurm import InQueue
from experiments.workers import default_workers
from kt.errors import UserError, nearest
from kt.settings import METHODS, check_value, kinds
from kt.store import finished_cells, folder_of, read_result
from tables.records import find_table

Settings = dict[str, list[str]]  # override key -> its values; more than one make an axis

ROW_KEYS = ("label", "role", "ours", "optional", "overrides")
SELECTORS = {"rows": "id", "role": "role", "method": "method"}  # key -> what it compares of a row
# One value for the whole run.
FIXED = ("scale", "data_root", "output_root", "device", "plan", "workers", "evaluation")
AVERAGED = "seed"
# Keys that say where and how, not what: a sweep with others of them is the same one.
ACCIDENTAL = (
    *("output_root", "data_root", "device", "activation_checkpointing", "threads", "workers", "plan", "wandb"),
)


@dataclass
class Row:
    """A row as the table's file and the paper's record have it."""

    id: str
    label: str
    role: str
    overrides: Settings
    ours: bool = False
    printed: bool = False  # whether the paper prints it
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
    unverified: set[str] = field(default_factory=set)  # ids of cells

    @property
    def suffix(self) -> str:
        """The axes' values."""
        return ", ".join(f"{key}={value}" for key, value in self.axes.items())

    @property
    def id(self) -> str:
        """The row's id with the axes' values."""
        return self.row.id + (f"[{self.suffix}]" if self.axes else "")

    @property
    def label(self) -> str:
        """The row's label with the axes' values."""
        return self.row.label + (f" ({self.suffix})" if self.axes else "")

    def entry(self) -> Config:
        """What the renderer gets."""
        is_teacher = self.row.role == "teacher"
        network = self.config["student"]["network"]["name"]
        own = METHODS[self.config["method"]["name"]].own_network
        taught_by = None if own else self.config["teacher"]["network"]
        marks = {cell_id: {"unverified": True} if cell_id in self.unverified else {} for cell_id in self.cells}
        return {
            "id": self.id,
            "label": self.label,
            "role": self.row.role,
            "method": self.config["method"]["name"],
            "teacher": network if is_teacher else (taught_by or {}).get("name"),
            "student": None if is_teacher else network,
            "ours": self.row.ours,
            "printed": self.row.id if self.row.printed else None,
            "cells": [{"id": cell_id, "seed": seed, **marks[cell_id]} for cell_id, seed in self.cells.items()],
            "axes": self.axes,
            "evaluation": self.config["evaluation"],
            "optional": self.row.optional,
        }


def parse(lines: Sequence[str]) -> Settings:
    """Overrides as key -> values.

    Raises:
        UserError: A key is swept over an interval, which a table cannot.
    """
    settings: Settings = {}
    for override in OverridesParser.create().parse_overrides(list(lines)):
        key = override.get_key_element().lstrip("+")
        value = override.value()
        if isinstance(value, Glob) and is_group(key):
            names = choices(key.split("@")[0])
            settings[key] = [name for name in names if _matches(value, name)]
            if not settings[key]:
                raise UserError(f"{override.input_line}: fits none of {', '.join(names)}")
        elif override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise UserError(f"{override.input_line}: expected a list of values such as {key}=1,2,3")
            settings[key] = [str(each) for each in override.sweep_string_iterator()]
            if not settings[key]:
                raise UserError(f"{override.input_line}: expected at least one value, it stands for none")
        else:
            settings[key] = [str(override.get_value_element_as_str())]
    return settings


def _matches(wanted: Glob, name: str) -> bool:
    """Whether a choice is one of those that `glob(...)` means."""
    included = any(fnmatch.fnmatch(name, pattern) for pattern in wanted.include)
    return included and not any(fnmatch.fnmatch(name, pattern) for pattern in wanted.exclude)


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
        files = tuple(sorted(line for line in overrides if not line.startswith("++")))
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


def read_rows(name: str, rows: Mapping[str, Any]) -> list[Row]:
    """The rows of a table's file; one that the paper prints takes label, role and `ours` from there if it has none.

    Args:
        name: The table's name.
        rows: Row id -> what the file says of it; a printed row's id is that of the paper's record.

    Raises:
        UserError: There is no such table; a row has an unknown key, or none of those it needs.
    """
    printed = {line["id"]: line for line in find_table(name).rows}
    found = []
    for row_id, own in rows.items():
        line = printed.get(row_id)
        content = {**own}
        if line is not None:
            content = {"label": line["row"], "role": line["role"], "ours": line.get("ours", False), **own}
        for key in content:
            if key not in ROW_KEYS:
                raise UserError(f"row {row_id}: unknown key {key!r}{nearest(key, ROW_KEYS)}")
        if "label" not in content or "role" not in content:
            raise UserError(f"row {row_id}: expected a label and a role")
        given = content.get("overrides") or {}
        words = {key: _as_override(value) for key, value in given.items()}
        overrides = parse(unparse(words))
        rest = {key: content[key] for key in ROW_KEYS[:-1] if key in content}
        found.append(Row(id=row_id, overrides=overrides, printed=line is not None, **rest))
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


def route(rows: Sequence[Row], user: Mapping[str, list[str]], sweep: bool = False) -> dict[str, Settings]:
    """Row id -> its own settings with those of the command line that its schema has.

    Args:
        rows: The rows.
        user: The command line's settings.
        sweep: Whether the rows are those of a sweep, which leaves more to the command line than a table.

    Raises:
        UserError: A key that no row has, or that a table does not let override.
    """
    known = set(known_keys())
    routed = {row.id: dict(row.overrides) for row in rows}
    for key, values in user.items():
        if key in SELECTORS or key in ("plan", "table"):
            continue
        if key.startswith("table.") or (key == "cell" and not sweep):
            raise UserError(f"{key}={values[0]}: the table sets this itself; rows= and role= select rows")
        if key in FIXED and len(values) > 1:
            raise UserError(f"{key}={','.join(values)}: expected one value for the whole run")
        having = list(rows)
        parent, _, leaf = key.removeprefix("dataset@").partition(".")
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
    """The keys of a method; for a choice of the user's own those of all."""
    schemas = [METHODS[method]] if method in METHODS else METHODS.values()
    return {key for schema in schemas for key in kinds(schema)} - {"name"}


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
        dataset: The choice of `dataset` of rows that choose none.
        stand_in: Whether datasets give way to their embedded stand-ins unless the command line names one.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Any],
        arguments: Sequence[str],
        compose: Callable[[list[str]], DictConfig],
        dataset: str,
        stand_in: bool,
    ):
        self.name = name
        user = parse(arguments)
        self.dataset, self.stand_in = dataset, stand_in and "dataset" not in user
        if user.get("scale") == ["paper"] and (seeds := find_table(name).seeds) > 1:
            user.setdefault(AVERAGED, [str(seed) for seed in range(seeds)])
        everything = read_rows(name, rows)
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

    def _with_recipe(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """One setting of all axes with what it brings along."""
        return with_recipe({"table": self.name, **chosen}, self.dataset, self.stand_in)

    def _differs(self, shown: Shown) -> dict[str, list[Any]]:
        """In which settings a row differs from what the table's own file means by it at scale=paper."""
        own = shown.row.overrides.items()
        single = {key: shown.axes[key] if shown.axes.get(key) in values else values[0] for key, values in own}
        overrides = with_recipe({"table": self.name, "scale": "paper", **single}, self.dataset)
        return differences(shown.config, settle(plain(self.compose(unparse(overrides)))))

    def write(self, output_root: str, scale: str) -> Path:
        """Renders what there are results of; returns the folder."""
        from tables.render import write_table

        rows = [{**shown.entry(), "differs": self._differs(shown)} for shown in self.rendered(output_root)]
        return write_table(self.name, rows, output_root, scale, self.shown[-1].config["dataset"]["name"])

    def _expand(self, row: Row) -> list[Shown]:
        """A row's cells, one per combination of its axes that makes a difference; adds jobs if the row is selected."""
        settings = self.routed[row.id]
        axes = {key: values for key, values in settings.items() if len(values) > 1}
        points = []
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            single = {key: chosen.get(key, values[0]) for key, values in settings.items()}
            named = Shown(row, {key: value for key, value in chosen.items() if key != AVERAGED})
            labels = {"name": self.name, "row": named.id, "role": row.role, "label": named.label}
            single |= {f"table.{key}": quoted(text) for key, text in labels.items()}
            overrides = unparse(self._with_recipe(single))
            config = settle(plain(self.compose(overrides)))
            points.append((chosen, overrides, config, identify(config)))
        ids = {tuple(chosen.items()): cell.id for chosen, _, _, cell in points}
        for key, values in axes.items():
            # An axis that changes nothing in this row (the teacher under seeds of students) is none of its axes.
            same = all(cell_id == ids[tuple({**dict(point), key: values[0]}.items())] for point, cell_id in ids.items())
            if same:
                points = [point for point in points if point[0][key] == values[0]]
                for chosen, _, _, _ in points:
                    del chosen[key]
                ids = {tuple(chosen.items()): cell.id for chosen, _, _, cell in points}
        rows: dict[tuple[tuple[str, str], ...], Shown] = {}
        for chosen, overrides, config, cell in points:
            apart = {key: value for key, value in chosen.items() if key != AVERAGED}
            shown = rows.setdefault(tuple(apart.items()), Shown(row, apart, config=config))
            shown.cells.setdefault(cell.id, config["seed"])
            shown.unverified |= {cell.id} if cell.unverified else set()
            if row.id in self.selected:
                self._add_job(cell, overrides, config, f"{shown.id} seed {config['seed']}")
        return list(rows.values())

    def _add_job(self, cell: Identified, overrides: list[str], config: Config, text: str) -> None:
        """Adds a cell and the cells that it needs, each once."""
        job = Job(cell.id, overrides, config, text, [], told=cell.told, absent=cell.absent, scored_on=cell.scored_on)
        known = self.jobs.get(job.id)
        if known is not None:
            if known.config["evaluation"] is None:
                self.jobs[job.id] = replace(job, text=known.text, needs=known.needs)
            return
        for name, need in needed_cells(config).items():
            needed = identify(need)
            if needed.id in job.needs:
                continue  # another file of the same cell
            job.needs.append(needed.id)
            # The composed config still says what is needed; `cell` alone turns it into the needed cell.
            kept = [line for line in overrides if not line.startswith("++cell=")]
            own = [*kept, f"++cell={name}"]
            if name == "teacher":
                # The teacher's cell may itself be evaluated on other data; here it is not asked for.
                own = [line for line in own if not line.startswith("++evaluation=")] + ["++evaluation=null"]
            self._add_job(needed, own, need, f"{name} seed {need['seed']}")
        self.jobs[job.id] = job

    def rendered(self, output_root: str) -> list[Shown]:
        """The rows to render, in the table's order: those selected, and others that have results anyway."""

        def has_results(shown: Shown) -> bool:
            return any(read_result(folder_of(output_root, cell_id)) for cell_id in shown.cells)

        found = list(self.shown)
        if finished_cells(output_root):
            for row in self.rows:
                if row.id not in self.selected:
                    found += [shown for shown in self._expand(row) if has_results(shown)]
        order = [row.id for row in self.rows]
        return sorted(found, key=lambda shown: order.index(shown.row.id))


class Sweep(Table):
    """The points of a sweep without a table: every combination of the values that the command line lists.

    Each method is a row of its own, so that keys of a method multiply only those that have them.

    Args:
        arguments: The command line's task overrides.
        compose: Overrides -> composed config.

    Raises:
        UserError: Keys of tables are given.
    """

    def __init__(self, arguments: Sequence[str], compose: Callable[[list[str]], DictConfig]):
        user = parse(arguments)
        for key in ("rows", "role"):
            if key in user:
                tables = ", ".join(choices("table"))
                raise UserError(f"{key}={user[key][0]}: selects rows of a table; add +table=<name> (one of {tables})")
        meant = sorted((key, values) for key, values in user.items() if key.partition(".")[0] not in ACCIDENTAL)
        self.name = f"sweep-{hashlib.sha256(repr(meant).encode()).hexdigest()[:8]}"
        methods = user.pop("method", ["none"])
        self.rows = [Row(name, name, "method", {"method": [name]}) for name in dict.fromkeys(methods)]
        self.selected = {row.id for row in self.rows}
        self.routed, self.compose = route(self.rows, user, sweep=True), compose
        self.shown, self.jobs = [], {}
        for row in self.rows:
            self.shown += self._expand(row)
        # A key whose values make no difference is none of the sweep's.
        told_apart = {key for shown in self.shown for key in shown.axes}
        self.keys = ["method"] * (len(self.rows) > 1) + [key for key in user if key in told_apart]

    def _with_recipe(self, chosen: Mapping[str, str]) -> dict[str, str]:
        return with_recipe(chosen)

    def write(self, output_root: str, scale: str) -> Path:
        from tables.sweeps import write_sweep

        points = []
        for shown in self.shown:
            entry = shown.entry()
            points.append({**entry, "axes": {"method": entry["method"], **shown.axes}})
        of_points = {cell_id for shown in self.shown for cell_id in shown.cells}
        for job in self.jobs.values():
            if job.id not in of_points:
                # What the points needed is shown below them, to compare with.
                needed = Row(job.id, job.text.partition(" seed ")[0], "needed", {})
                points.append(Shown(needed, {}, {job.id: job.config["seed"]}, job.config).entry())
        return write_sweep(self.name, self.keys, points, output_root)


def _status_of(jobs: Iterable[Job]) -> int:
    """The exit status, unless interrupted.

    Raises:
        UserError: Nothing could be trained, because of one and the same mistake of the user.
    """
    jobs = list(jobs)
    bad = [job for job in jobs if not job.is_done]
    messages = {job.status.get("error") for job in bad}
    if bad and len(bad) == len(jobs) and len(messages) == 1 and all(job.status.get("user") for job in bad):
        raise UserError(str(messages.pop()))
    return 3 if bad else 0


def _workers(master: DictConfig, launcher: Any, jobs: Sequence[Job]) -> int | None:
    """How many workers of kt's own train the cells; None where a launcher that was chosen does.

    Raises:
        UserError: Workers are asked for beside a launcher.
    """
    chosen = [str(line) for line in master.hydra.overrides.hydra if str(line).startswith("hydra/launcher=")]
    if chosen or type(launcher).__name__ != "BasicLauncher" or world_size() > 1:
        if master.workers is not None and world_size() == 1:
            named = chosen[0] if chosen else type(launcher).__name__
            raise UserError(f"workers={master.workers}: expected null beside {named}, which has a number of its own")
        return None
    if master.workers is not None:
        return int(master.workers)
    return default_workers([job.config for job in jobs if not job.is_done])


def run_table(sweeper: Any, arguments: Sequence[str]) -> int:
    """Runs a table, or the points of a sweep, under the command line's overrides.

    Args:
        sweeper: The `TableSweeper`, set up.
        arguments: Task overrides.

    Returns:
        The exit status: 0 all done, 3 a cell failed, 130 interrupted.

    Raises:
        UserError: A mistake in the overrides, or one that kept every cell from being trained.
    """
    master, launcher = sweeper.config, sweeper.launcher
    for key in ("plan", "workers"):  # read here, before any cell's config is checked
        check_value(master[key], Schema, key, key)
    loader = sweeper.hydra_context.config_loader
    output_root, scale = str(master.output_root), OmegaConf.to_container(master.scale)
    assert isinstance(scale, dict)

    def load(overrides: list[str]) -> DictConfig:
        composed = loader.load_sweep_config(master, overrides)
        return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])

    table: Table
    if sweeper.name is None:
        table = Sweep(arguments, composer(load))
    else:
        dataset = str(master.hydra.runtime.choices["dataset"])
        table = Table(sweeper.name, sweeper.rows, arguments, composer(load), dataset, scale["stand_in"])
    refresh(table.jobs, output_root)
    jobs = list(table.jobs.values())
    workers = _workers(master, launcher, jobs)
    if master.plan:
        if is_first():
            print("\n".join(plan_lines(table.jobs, output_root, workers or 1)))
        return 0
    check_writable(output_root)
    display = progress.Display(quiet=not is_first())
    progress.use(display)
    for job in jobs:
        tell(job.told, display)
    report = Report(table.name, table.jobs, output_root, display)
    interrupted = False
    try:
        if workers is None:
            runner = InQueue if type(launcher).__name__ == "SlurmLauncher" else ByLauncher
            runner(report, launcher, sweeper.batch or _default_batch(launcher)).run()
        else:
            SideBySide(report, workers).run()
    except KeyboardInterrupt:
        interrupted = True
        display.line("interrupted; the same command goes on from here")
    finally:
        progress.use(None)
    status = 130 if interrupted else _status_of(jobs)
    if is_first():
        for job in jobs:
            if not job.is_done and job.status.get("error"):
                print(f"X {job.text}: {job.status['error']} ({folder_of(output_root, job.id)})")
        folder = table.write(output_root, str(scale["name"]))
        print("\n" + (folder / "table.md").read_text().strip() + "\n")
        print(folder / "index.html")
    return status


def _default_batch(launcher: Any) -> int | None:
    """The local submitit launcher starts everything at once; it gets as many cells as there are cores."""
    return max(1, os.cpu_count() or 1) if type(launcher).__name__ == "LocalLauncher" else None
