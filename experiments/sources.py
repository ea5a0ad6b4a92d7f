"""`settings=true`: what each row of a table is trained with at scale=paper, and where each setting comes from.

A setting is printed (the paper's record has its value), cited (of another's paper or code), or ours. What is not
printed says its source beside the value: in a file of `conf` by comments (`# Source: ...` for what the file sets,
`# Source of <key>, <key>: ...` for some of it), in Python by `sources` of a class of settings or of a dataset. A
source that begins with "ours" is nobody else's.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.groups import CONF
from experiments.meaning import Unnamed, needs_of
from experiments.schema import Config as Schema
from experiments.schema import Student, Teacher, is_group
from kt.data.names import DATASETS, content, settings_of
from kt.needs import Need
from kt.settings import METHODS, SOURCE, Schedule, kinds, shown
from tables.papers import table_files
from tables.records import TableRecord
from tables.stated import agrees, stated
from tables.summary import open_grid

Json = dict[str, Any]

PRINTED, CITED, OURS = "printed", "cited", "ours"
# Keys that no number at scale=paper depends on, or that are said elsewhere.
_SILENT = ("evaluate_every", "interval", "device_batch", "stand_in", "resident", "style", "task", "options", "seed")
_RECIPES = ("schedule", "teacher.schedule", "method.search.schedule", "method.base.search.schedule")
_DATA = ("dataset", "teacher.dataset", "method.search.dataset", "method.base.search.dataset", f"method.{SOURCE}")
TO_BE_NAMED = "<file>"


@dataclass(frozen=True)
class Setting:
    """A setting of a row.

    Attributes:
        key, value: As the command line has them.
        kind: Where it comes from: printed, cited or ours; None where nothing says.
        source: The same in words.
    """

    key: str
    value: Any
    kind: str | None
    source: str


def dotted(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of nested settings, with their values."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@functools.cache
def _file(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """What a file of `conf` sets, and its sources by key, the empty key for those of all others."""
    text = path.read_text(encoding="utf-8")
    sources: dict[str, str] = {}
    for block in re.findall(r"(?:^[ ]*#.*\n)+", text, re.MULTILINE):
        lines = [line.strip().lstrip("# ") for line in block.splitlines()]
        for part in re.split(r" (?=Source(?: of [^:]+)?: )", " " + " ".join(lines)):
            if found := re.match(r"Source(?: of ([^:]+))?: (.+)", part.strip()):
                for key in (found[1] or "").split(", "):
                    sources[key] = found[2]
    return dict(yaml.safe_load(text)), sources


def source_of(schema: type, key: str) -> str | None:
    """The source that the nearest class with the key says."""
    for kind in schema.__mro__:
        own = vars(kind).get("sources", {})
        if key in own or ("" in own and key in inspect.get_annotations(kind)):
            return str(own.get(key) or own[""])
    return None


def _of_choice(group: str, choice: str, key: str) -> str | None:
    """The source of a choice's key (of `schedule` or `dataset`); empty if it sets the key without one, None if not."""
    path = CONF / group / f"{choice}.yaml"
    if path.exists():
        given, sources = _file(path)
    elif choice in DATASETS:
        spec = DATASETS[choice]
        given = spec.schedule if group == "schedule" else spec.defaults
        split = {name: name.partition(".") for name in spec.sources}
        sources = {key: spec.sources[name] for name, (whose, _, key) in split.items() if whose == group}
    else:
        return None
    if key in sources or "" in sources:  # also of what it takes from another
        return sources.get(key) or sources[""]
    if key in given:
        return ""
    bases = [base for base in given.get("defaults", []) if base != "_self_" and not base.startswith("_")]
    found = (_of_choice(group, base, key) for base in reversed(bases))
    return next((source for source in found if source is not None), None)


def _above(key: str) -> list[str]:
    """A key and the groups in which it is, the innermost first."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


class RowSettings:
    """The settings of a table's row and their sources.

    Args:
        record: The table's record.
        row_id: The row.
        overrides: Keys that the table's file sets for it.
        config: What it means at scale=paper, checked and not settled.
        settled: The same, settled.
        choices: Config group -> choice.
    """

    def __init__(
        self,
        record: TableRecord,
        row_id: str,
        overrides: Sequence[str],
        config: Json,
        settled: Json,
        choices: Mapping[str, str],
    ):
        self.record, self.choices, self.config = record, choices, config
        self.values = dict(self._listed(config, settled))
        self.stated = stated(record, row_id, self.values)
        self.is_printed = any(row["id"] == row_id for row in record.rows)
        body, self.sources = _file(Path(table_files()[record.name]))
        own = dotted({key: body[key] for key in body if key not in ("defaults", "hydra")})
        # What the table's file sets: keys, and groups all of whose keys are its own choice.
        self.set_here = {"teacher.network", "student.network", "dataset.name", *(key for key, _ in own)}
        self.set_here |= {
            key.split("@")[-1] for key in overrides if not is_group(key) or key.startswith(("teacher@", "student@"))
        }

    def _listed(self, config: Json, settled: Json) -> Iterator[tuple[str, Any]]:
        """Key -> value of all that decides the row's numbers."""
        is_teacher = config["cell"] == "teacher"
        teacher = settled if is_teacher else needs_of(settled).get("teacher")
        parts: Json = {"precision": config["precision"], "dataset": content(config["dataset"])}
        if config["evaluation"]:
            parts["evaluation"] = config["evaluation"]
        if settled["schedule"]["epochs"] != 0:
            parts["schedule"] = config["schedule"]
        if is_teacher:  # whose own keys go before the student's
            for part in ("dataset", "schedule"):
                own = config["teacher"][part] or {}
                parts[part] = {key: value for key, value in parts.get(part, {}).items() if key not in own}
        if teacher is not None:
            parts["teacher"] = {**config["teacher"]}
            trained = teacher.config if isinstance(teacher, Need) else teacher
            if isinstance(trained, Unnamed):
                parts["teacher"] |= {"checkpoint": TO_BE_NAMED, "dataset": None, "schedule": None}
            elif isinstance(trained, Mapping) and trained["schedule"]["epochs"] == 0:
                parts["teacher"]["schedule"] = None
        if not is_teacher:
            parts |= {"student": config["student"], "method": self._method(config["method"])}
        flat = dict(dotted(parts))
        yield from ((key, value) for key, value in flat.items() if self._tells(key, value, flat))

    def _tells(self, key: str, value: Any, flat: Json) -> bool:
        """Whether a key's value says something that no other one does."""
        group, _, leaf = key.rpartition(".")
        kind = "schedule" if group in _RECIPES else "dataset" if group in _DATA else group
        if leaf in _SILENT or value == {} or (leaf == "small_stem" and not value):
            return False
        if value is None and group not in ("method", "method.base"):
            return False
        if group != kind and f"{kind}.{leaf}" in flat and flat[f"{kind}.{leaf}"] == value:
            return False  # as the student's
        recipe = {name: flat.get(f"{group}.{name}", self.config["schedule"][name]) for name in ("optimizer", "policy")}
        if kind == "schedule" and leaf in ("momentum", "nesterov"):
            return recipe["optimizer"] == "sgd"
        return not (kind == "schedule" and leaf in ("milestones", "gamma")) or recipe["policy"] == "step"

    def _method(self, settings: Json) -> Json:
        """A method's settings without those of a search that it does not need."""
        own = {**settings}
        if own.get("process", "search") == "equal" or "search" in own and own["file"]:
            own.pop("search")
        own.pop("file", None)
        for name in ("base", "beside"):
            if own.get(name):
                own[name] = self._method(own[name])
        return own

    def settings(self) -> list[Setting]:
        """All settings of the row with their sources."""
        found = []
        for key, value in self.values.items():
            if key in ("method.base.name", "method.beside.name"):
                continue  # the method's own name says it
            printed = self.stated.get(key)
            if printed is not None and agrees(value, printed[0]):
                found.append(Setting(key, value, PRINTED, f"{self.record.paper}, {self.record.title}: {printed[1]}"))
                continue
            source = self._source(key)
            kind = None if source is None else OURS if source.startswith(OURS) else CITED
            words = re.sub(rf"^{OURS},? (for )?", "", source or "")
            if printed is not None:
                words += f" (printed: {shown(printed[0])})"
                kind = kind if self._of_table(key) else None  # the table's file has to explain it
            found.append(Setting(key, value, kind, words.strip()))
        return found

    def _of_table(self, key: str) -> str | None:
        """The source that the table's file says for a key or a group above it."""
        return next((self.sources[name] for name in _above(key) if name in self.sources), None)

    def _source(self, key: str) -> str | None:
        is_here = key in self.stated or self.values[key] == TO_BE_NAMED or not self.set_here.isdisjoint(_above(key))
        if is_here and (found := self._of_table(key)):
            return found
        if key.endswith(".name") and not self.is_printed:
            return "ours, a row beside the paper's"
        if key in self.set_here:
            return None
        group, _, leaf = key.rpartition(".")
        if group in _RECIPES:
            at = f"schedule@{group}" if f"schedule@{group}" in self.choices else "schedule"
            source = _of_choice("schedule", self.choices[at], leaf)
            return source_of(Schedule, leaf) if source is None else source or None
        if group in _DATA:
            at = f"dataset@{group}" if f"dataset@{group}" in self.choices else "dataset"
            source = _of_choice("dataset", self.choices[at], leaf)
            return source_of(settings_of(self.config["dataset"]), leaf) if source is None else source or None
        if group.split(".")[0] == "method":
            return self._of_method(group, leaf)
        schema = {"teacher": Teacher, "student": Student, "": Schema}.get(group.split(".")[0])
        return source_of(schema, leaf if group.count(".") == 0 else group.rpartition(".")[2]) if schema else None

    def _of_method(self, group: str, leaf: str) -> str | None:
        """The source of a method's key: its file's in `conf/method`, else its class's."""
        path = CONF / "method" / f"{self.config['method']['name']}.yaml"
        inner = ".".join([*group.split(".")[1:], leaf])
        if path.exists():
            given, sources = _file(path)
            if inner in sources:
                return sources[inner]
            if inner in dict(dotted(given)):
                return sources.get("")
        settings: Any = self.config["method"]
        for name in group.split(".")[1:]:
            if name == "search":
                return source_of(kinds(METHODS[settings["name"]])["search"], leaf)
            settings = settings[name]
        return source_of(METHODS[settings["name"]], leaf)


def print_settings(rows: Mapping[str, Sequence[Setting]], title: str) -> None:
    """Prints the settings of a table's rows, those that several rows share once.

    Args:
        rows: Row id -> its settings.
        title: Above them.
    """
    from rich.text import Text

    console, grid = open_grid()
    grid.title, grid.title_justify = title, "left"
    for name in ("setting", "value", "from", "source", "rows"):
        grid.add_column(name, overflow="fold", no_wrap=name == "setting")
    found: dict[tuple[str, str, str | None, str], list[str]] = {}
    for row_id, settings in rows.items():
        for each in settings:
            found.setdefault((each.key, shown(each.value), each.kind, each.source), []).append(row_id)
    order = list(dict.fromkeys(key for key, *_ in found))
    for (key, value, kind, source), ids in sorted(found.items(), key=lambda each: order.index(each[0][0])):
        having = sum(any(each.key == key for each in settings) for settings in rows.values())
        told = "all" if len(ids) == len(rows) else "all that have it" if len(ids) == having else ", ".join(ids)
        grid.add_row(key, Text(value), kind or "?", Text(source), told)
    console.print(grid)
