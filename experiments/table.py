"""A table: rows that are no grid, expanded into cells; what a command does with its tables is in `runs`.

Keys of the command line other than `rows=`, `method=` and `role=` (which select rows) override every row whose schema
has them, `teachers.<name>.<key>` those whose teacher has the name. A comma list is an axis: its values become rows of
their own, or are averaged over if the key is `seed`.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from omegaconf import DictConfig, OmegaConf

from experiments.checking import known_keys, plain, unknown
from experiments.groups import choices
from experiments.idle import idle, reason, told, unread
from experiments.meaning import Identified, differences, identify, needed_cells, settle
from experiments.plan import Config, Job
from experiments.schema import is_group, other_length, sign, with_recipe
from experiments.sources import RowSettings, Setting
from kt.errors import UserError, nearest
from kt.settings import METHODS, kinds
from kt.store import finished_cells, folder_of, read_result
from tables.folders import stored_rows, table_folder
from tables.records import find_table

Settings = dict[str, list[str]]  # override key -> its values; more than one make an axis

ROW_KEYS = ("label", "role", "ours", "optional", "overrides")
SELECTORS = {"rows": "id", "role": "role", "method": "method"}  # key -> what it compares of a row
# One value for the whole run.
FIXED = ("scale", "data_root", "output_root", "device", "plan", "rehearse", "settings", "workers", "evaluation")
AVERAGED = "seed"
MOST = 10_000  # values of a key, and cells of a row
TEACHERS = "teachers"  # teachers.<name>.<key> is teacher.<key> of the rows whose teacher has the name
# Keys that say where and how, not what: a sweep with others of them is the same one.
ACCIDENTAL = (
    *("output_root", "data_root", "device", "activation_checkpointing", "threads", "workers", "wandb"),
    *("plan", "rehearse", "settings"),
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
            "row": self.row.id,
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
        line, key = str(override.input_line).lstrip("+"), override.get_key_element().lstrip("+")
        value = override.value()
        if isinstance(value, Glob) and is_group(key):
            names = choices(key.split("@")[0])
            settings[key] = [name for name in names if _matches(value, name)]
            if not settings[key]:
                raise UserError(f"{line}: fits none of {', '.join(names)}")
        elif override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise UserError(f"{line}: expected a list of values such as {key}=1,2,3")
            settings[key] = [str(each) for each in itertools.islice(override.sweep_string_iterator(), MOST + 1)]
            if len(settings[key]) > MOST:
                raise UserError(f"{line}: expected at most {MOST} values")
            if not settings[key]:
                raise UserError(f"{line}: expected at least one value, it stands for none")
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
        files = [line for line in overrides if not line.startswith("++")]
        # What is added counts in its order, what replaces a choice does not.
        key = tuple(sorted(files, key=lambda line: "" if line.startswith("+") else line))
        if key not in loaded:
            loaded[key] = load(files)
        config = copy.deepcopy(loaded[key])
        for override in OverridesParser.create().parse_overrides([x for x in overrides if x.startswith("++")]):
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
        return config

    return compose


def with_choices(composed: DictConfig) -> DictConfig:
    """A composed config with which choices were made, of all that Hydra's own node says."""
    kept = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    choices_made = OmegaConf.to_container(composed.hydra.runtime.choices)
    OmegaConf.update(kept, "hydra", {"runtime": {"choices": choices_made}}, force_add=True)
    return kept


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
        wanted = [name for name in wanted if name != "null"]
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
        said = key in SELECTORS or key in ("plan", "rehearse", "settings", "table")
        if said or (key.startswith(f"{TEACHERS}.") and not sweep):
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
        other = other_length(key)
        for row in having:
            routed[row.id][key] = list(values)
            if other and other not in user and values != ["null"]:
                routed[row.id][other] = ["null"]
    return routed


def _names_of_teacher(row: Row, settings: Settings, teacher: str) -> list[str]:
    """What the command line may call a row's teacher: its network, its data, a domain of these; none has none.

    Args:
        row: The row.
        settings: Its own and those of the command line.
        teacher: The choice of `teacher` of rows that choose none.
    """
    if row.method in METHODS and not METHODS[row.method].needs_teacher and "cell" not in row.overrides:
        return []
    keys = ("dataset@teacher.dataset", "teacher.dataset.domain")
    return [*settings.get("teacher", [teacher]), *(value for key in keys for value in settings.get(key, []))]


def give_teachers(rows: Sequence[Row], routed: Mapping[str, Settings], user: Settings, teacher: str) -> None:
    """Adds what `teachers.<name>.<key>` sets to the settings of the rows whose teacher has the name, or that have it.

    Args:
        rows: All rows of the table.
        routed: Row id -> its own settings with all other ones of the command line.
        user: The command line's settings.
        teacher: The choice of `teacher` of rows that choose none.

    Raises:
        UserError: No row has such a teacher, or there is no such key.
    """
    named = {row.id: _names_of_teacher(row, routed[row.id], teacher) for row in rows}
    taught = [row_id for row_id, names in named.items() if names]
    known = list(dict.fromkeys([*(name for names in named.values() for name in names), *taught]))
    given = [(key, values) for key, values in user.items() if key.startswith(f"{TEACHERS}.")]
    for key, values in sorted(given, key=lambda each: each[0].split(".")[1] in taught):  # a row's own goes last
        _, name, *rest = key.split(".")
        leaf = ".".join(["teacher", *rest])
        if name not in known or not rest:
            hint = nearest(name, known)
            raise UserError(
                f"{key}={values[0]}: no row has such a teacher{hint}; expected {TEACHERS}.<name>.<key>, with a "
                f"name of {', '.join(known)}"
            )
        if leaf not in known_keys():
            raise unknown(leaf)
        for row_id in taught:
            if name == row_id or name in named[row_id]:
                routed[row_id][leaf] = list(values)


def _names_file(key: str) -> bool:
    """Whether a key names the file of a teacher, which every row may have of its own."""
    return key.split(".")[0] in ("teacher", TEACHERS) and key.endswith(".checkpoint")


def _own_keys(method: str) -> set[str]:
    """The keys of a method; for a choice of the user's own those of all."""
    schemas = [METHODS[method]] if method in METHODS else METHODS.values()
    return {key for schema in schemas for key in kinds(schema)} - {"name"}


def _is_inner(key: str, known: set[str]) -> bool:
    """Whether a key lies above known ones (`student.network`, set as a whole)."""
    return any(other.startswith(key + ".") for other in known)


def _point(shown: Shown, settings: Settings) -> dict[str, str]:
    """One value of each setting: the row's own where it is an axis, else the first."""
    return {key: shown.axes[key] if shown.axes.get(key) in values else values[0] for key, values in settings.items()}


class Table:
    """A table with the command line's wishes applied.

    Args:
        name: Its name.
        rows: As in its file.
        arguments: The command line's task overrides.
        compose: Overrides -> composed config.
        own: Config group -> the choice that the table's file makes for rows that choose none.
        scale: Whether datasets give way to their embedded stand-ins unless the command line names one (`stand_in`), and
            what rows then have that the table's file says for real data (`tuned`).
        printed: The rows as the file means them at scale=paper.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Any],
        arguments: Sequence[str],
        compose: Callable[[list[str]], DictConfig],
        own: Mapping[str, str],
        scale: Mapping[str, Any],
        printed: Mapping[str, Any],
    ):
        self.name, self.own, self.scale = name, own, scale
        self.printed = {row.id: row for row in read_rows(name, printed)}
        self.user = user = parse(arguments)
        if user.get("scale") == ["paper"] and (seeds := find_table(name).seeds) > 1:
            user.setdefault(AVERAGED, [str(seed) for seed in range(seeds)])
        self.rows, self.compose = read_rows(name, rows), compose
        self.selected = {row.id for row in select(self.rows, user)}
        self.routed = self._route(user)
        self.shown: list[Shown] = []
        self.jobs: dict[str, Job] = {}
        self.idle: list[dict[str, str]] = []
        for row in self.rows:
            if row.id in self.selected:
                self.shown += self._expand(row, self.routed[row.id])
        self._check_effects(user)

    def _route(self, user: Settings) -> dict[str, Settings]:
        """Row id -> its own settings with those of the command line that it has; of a method's, if it is selected."""
        chosen = [row for row in self.rows if row.id in self.selected]
        common = {key: values for key, values in user.items() if not key.startswith("method.")}
        routed = route(chosen, user) | route([row for row in self.rows if row.id not in self.selected], common)
        give_teachers(self.rows, routed, user, self.own["teacher"])
        return routed

    def _check_effects(self, user: Settings) -> None:
        """Refuses keys of the command line that decide nothing in any selected row.

        Raises:
            UserError: Names one, and what it goes with.
        """
        for key, values in user.items():
            found = [reason(key, each) for each in self.idle]
            if found and all(found):
                raise UserError(told(key, ",".join(values), str(found[0])))

    def _with_recipe(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """One setting of all axes with what it brings along."""
        return self._brought(chosen, self.user)

    def _brought(self, chosen: Mapping[str, str], user: Settings) -> dict[str, str]:
        """The same where the command line has set some of it: that stays."""
        stand_in = self.scale["stand_in"] and "dataset" not in user
        found = with_recipe({"table": self.name, **chosen}, self.own["dataset"], stand_in)
        if stand_in:
            tuned = self.scale["tuned"].get(found["dataset"], {}).get(found.get("method", "none"), {})
            # `method.base={weight: 5}` says it too.
            said = tuple(f"{key}." for key in user)
            found |= {key: str(value) for key, value in tuned.items() if not f"{key}.".startswith(said)}
        return found

    def _settled(self, chosen: Mapping[str, str]) -> Config:
        return settle(plain(self.compose(unparse(chosen))))

    def differs(self, shown: Shown) -> dict[str, list[Any]]:
        """In which settings a row differs from what the table's own file means by it at scale=paper."""
        single = _point(shown, {**self.printed[shown.row.id].overrides, "scale": ["paper"]})
        printed = with_recipe({"table": self.name, **single}, self.own["dataset"])
        return differences(shown.config, self._settled(printed))

    @functools.cached_property
    def settings(self) -> Settings:
        """The command line's settings that make the selected rows others than the table's own at the scale.

        Neither seeds nor teachers' files are among them, nor what no number depends on.
        """

        def is_neutral(key: str) -> bool:
            kept = (*SELECTORS, "table", "scale", AVERAGED)
            return key in kept or key.partition(".")[0] in ACCIDENTAL or _names_file(key)

        open_keys = [key for key in self.user if not is_neutral(key)]

        def matters(*dropped: str) -> bool:
            """Whether the selected rows would be others without some keys."""
            left = {key: values for key, values in self.user.items() if key not in dropped}
            try:
                routed = self._route(left)
                points = {shown.id: _point(shown, routed[shown.row.id]) for shown in self.shown}
                return any(
                    differences(shown.config, self._settled(self._brought(points[shown.id], left)))
                    for shown in self.shown
                )
            except UserError:  # the other keys do not go without it
                return True

        if not open_keys or not matters(*open_keys):
            return {}
        told = [key for key in open_keys if len(open_keys) == 1 or matters(key)]
        return {key: self.user[key] for key in told or open_keys}  # several keys may say the same

    def renderer(self, output_root: str, scale: str) -> Callable[[], Path]:
        """What renders the results that there are of its rows at a scale, as often as called; returns the folder."""
        from tables.render import write_table

        rows = self.rendered(output_root, table_folder(output_root, self.name, scale, self.settings))
        dataset = self.shown[-1].config["dataset"]["name"]
        return functools.partial(write_table, self.name, rows, output_root, scale, dataset, settings=self.settings)

    def _expand(self, row: Row, settings: Settings) -> list[Shown]:
        """A row's cells, one per combination of its axes that makes a difference; adds jobs if the row is selected."""
        axes = {key: values for key, values in settings.items() if len(values) > 1}
        if (count := math.prod(map(len, axes.values()))) > MOST:
            raise UserError(f"{', '.join(axes)}: their values make {count} cells of a row; expected at most {MOST}")
        points = []
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            single = {key: chosen.get(key, values[0]) for key, values in settings.items()}
            named = Shown(row, {key: value for key, value in chosen.items() if key != AVERAGED})
            labels = {"name": self.name, "row": named.id, "role": row.role, "label": named.label}
            single |= {f"table.{key}": quoted(text) for key, text in labels.items()}
            overrides = unparse(self._with_recipe(single))
            loaded = self.compose(overrides)
            composed = plain(loaded)
            if row.id in self.selected:
                self.idle.append(idle(composed) | unread(loaded))
            config = settle(composed)
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

    def rendered(self, output_root: str, folder: Path) -> list[Config]:
        """The rows to render, in the table's order: those selected, and others that have results anyway.

        Args:
            output_root: Where cells live.
            folder: The table's; of the others its earlier rendering knows under which settings they were run.
        """

        def entries(row: Row, settings: Settings, found: Sequence[Shown]) -> list[Config]:
            given = {
                key: values
                for key, values in settings.items()
                if row.overrides.get(key) != values and key.partition(".")[0] not in ACCIDENTAL
            }
            return [{**shown.entry(), "differs": self.differs(shown), "given": given} for shown in found]

        def has_results(entry: Config) -> bool:
            return any(read_result(folder_of(output_root, cell["id"])) for cell in entry["cells"])

        before: dict[str, list[Config]] = {}
        with contextlib.suppress(UserError):  # a damaged rendering is about to be replaced
            for entry in (stored_rows(folder) or {"rows": []})["rows"]:
                if "given" in entry:
                    before.setdefault(entry["row"], []).append(entry)
        found, any_done = [], bool(finished_cells(output_root))
        for row in self.rows:
            settings = self.routed[row.id]
            if row.id in self.selected:
                found += entries(row, settings, [shown for shown in self.shown if shown.row is row])
                continue
            if not any_done:
                continue
            here = {key: values for key, values in settings.items() if key.partition(".")[0] in ACCIDENTAL}
            asked = [{**row.overrides, **entry["given"], **here} for entry in before.get(row.id, [])[:1]]
            for meant in (*asked, settings):
                try:
                    made = entries(row, meant, self._expand(row, meant))
                except UserError:  # such as a teacher's file that is not there any more
                    made = before.get(row.id, [])
                if any(map(has_results, made)):
                    found += filter(has_results, made)
                    break
        return found


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
        self.shown, self.jobs, self.idle = [], {}, []
        for row in self.rows:
            self.shown += self._expand(row, self.routed[row.id])
        self._check_effects(user)
        # A key whose values make no difference is none of the sweep's.
        told_apart = {key for shown in self.shown for key in shown.axes}
        self.keys = ["method"] * (len(self.rows) > 1) + [key for key in user if key in told_apart]

    def _with_recipe(self, chosen: Mapping[str, str]) -> dict[str, str]:
        return with_recipe(chosen)

    def renderer(self, output_root: str, scale: str) -> Callable[[], Path]:
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
        return functools.partial(write_sweep, self.name, self.keys, points, output_root)


def settings_of(
    name: str,
    rows: Mapping[str, Any],
    arguments: Sequence[str],
    compose: Callable[[list[str]], DictConfig],
    dataset: str,
) -> dict[str, list[Setting]]:
    """Row id -> the settings of a table's rows at scale=paper, with where they come from.

    Args:
        name: The table's name.
        rows: As in its file.
        arguments: The command line's task overrides: `rows=`, `role=` and `method=` select.
        compose: Overrides -> composed config.
        dataset: The choice of `dataset` of rows that choose none.

    Raises:
        UserError: There are other overrides.
    """
    user = parse(arguments)
    for key, values in user.items():
        if key not in (*SELECTORS, "table", "scale") and key.partition(".")[0] not in ACCIDENTAL:
            raise UserError(
                f"{key}={','.join(values)}: settings=true shows the table's own at scale=paper; only "
                f"{', '.join(SELECTORS)} go with it"
            )
    record, found = find_table(name), {}
    for row in select(read_rows(name, rows), user):
        for point in itertools.product(*row.overrides.values()):
            single = dict(zip(row.overrides, point, strict=True))
            axes = {key: value for key, value in single.items() if len(row.overrides[key]) > 1}
            chosen = with_recipe({"table": name, "scale": "paper", **single}, dataset)
            composed = compose(unparse(chosen))
            config = plain(composed)
            made = composed.hydra.runtime.choices
            found[Shown(row, axes).id] = RowSettings(
                record, row.id, list(single), config, settle(config), made
            ).settings()
    return found
