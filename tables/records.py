"""The papers' records: printed numbers, settings, figures and claims; `tables/papers/README.md` has the schema."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kt.errors import UserError, nearest
from tables import papers

# What is read of every record, which README.md describes: the kind of each value, or those that it may have.
_METRIC = {"name": str, "unit": object, "better": ("higher", "lower"), "decimals": int}
_ROW = {"id": str, "row": str, "role": ("teacher", "baseline", "method", "unknown"), "method": str}
_ROW |= {"teacher": object, "student": object, "values": dict}
_TABLE = {"id": str, "name": str, "caption": str, "dataset": object, "task": str, "protocol": object}
_RECORD = {
    "paper": {"key": str, "order": int, "title": str, "authors": list, "venue": object},
    "protocols": {"*": {"applies_to": list, "dataset": object, "lr": object, "batch_size": object, "schedule": dict}},
    "tables": [{**_TABLE, "metrics": [_METRIC], "rows": [_ROW], "notes": list}],
    "figures": [{"id": str}],
    "claims": [{"id": str, "claim": str, "where": list, "check": object, "holds_in_paper": object}],
}

# libyaml's loader is ten times faster; wheels of PyYAML without it exist.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

REPORTED = ("last", "best", "median")

_READABLE = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "miou": "mIoU",
    "map": "mAP",
    "ap": "AP",
    "rmse": "RMSE",
    "mr_reasonable": "miss rate, reasonable",
    "mr_reasonable_small": "miss rate, reasonable small",
    "mr_reasonable_occ_heavy": "miss rate, heavily occluded",
    "mr_all": "miss rate, all",
    "kl_divergence": "KL divergence",
    "l2_distance": "L2 distance",
}


def result_label(name: str, results: Iterable[Mapping[str, Any]], otherwise: str | None = None) -> str:
    """A metric's name for readers, as results have it where it means something else to them: top-2 of 10 classes."""
    own = {label for result in results if (label := (result.get("labels") or {}).get(name))}
    return " / ".join(sorted(own)) or otherwise or metric_label(name)


def numbers_in_words(metrics: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """`top-1 accuracy 63.20, top-2 of 10 classes 80.10`: the numbers among metrics, as their result calls them."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return ", ".join(f"{result_label(name, [result, metrics])} {value:.2f}" for name, value in numbers.items())


def metric_label(name: str) -> str:
    """A metric's name for readers."""
    if name.startswith("overlap_top"):
        return f"overlap of top {name.removeprefix('overlap_top')}"
    if name.startswith("ap"):
        return _READABLE.get(name, name.upper().replace("_", " "))
    return _READABLE.get(name, name)


@dataclass(frozen=True)
class TableRecord:
    """One printed table with the paper it is from.

    Attributes:
        document: The whole record of the paper.
        table: The table's entry in it.
    """

    document: Mapping[str, Any]
    table: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The table's name, unique over all papers."""
        return str(self.table["name"])

    @property
    def paper(self) -> str:
        """The paper's key."""
        return str(self.document["paper"]["key"])

    @property
    def title(self) -> str:
        """What the paper calls the table: `Table 1`, or where its numbers stand in the text."""
        found = str(self.table["id"])
        if found.startswith("table"):
            return f"Table {found.removeprefix('table')}"
        return "Section " + found.removeprefix("text_sec").replace("_", ".")

    @property
    def metrics(self) -> list[Mapping[str, Any]]:
        """The printed metrics: name, unit, better, decimals."""
        return list(self.table["metrics"])

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The printed rows in order."""
        return list(self.table["rows"])

    def row(self, row_id: str) -> Mapping[str, Any]:
        """A printed row.

        Raises:
            UserError: The table has no such row.
        """
        found = {row["id"]: row for row in self.rows}
        if row_id not in found:
            raise UserError(f"row {row_id}: table {self.name} prints no such row{nearest(row_id, found)}")
        return found[row_id]

    @property
    def analyses(self) -> bool:
        """Whether the table measures something of networks that is no score of theirs."""
        return str(self.table["task"]).startswith("analysis")

    @property
    def datasets(self) -> list[str]:
        """The datasets that the table names."""
        named = self.table["dataset"]
        return [str(name) for name in (named if isinstance(named, list) else [named])]

    @property
    def protocol_names(self) -> list[str]:
        """What the record calls the settings behind the table."""
        named = self.table["protocol"]
        return [str(name) for name in (named if isinstance(named, list) else [named])]

    @property
    def protocols(self) -> list[Mapping[str, Any]]:
        """The settings behind the table."""
        return [self.document["protocols"][name] for name in self.protocol_names]

    @property
    def reported(self) -> str | None:
        """Which epoch's number the paper prints, one of `REPORTED`; None where that is unknown.

        Raises:
            UserError: The record says something else.
        """
        found = {protocol.get("reported") for protocol in self.protocols}
        for value in found - {None, *REPORTED}:
            hint = nearest(value, REPORTED)
            raise UserError(f"{self.paper}: reported: {value}: expected null or one of {', '.join(REPORTED)}{hint}")
        return found.pop() if len(found) == 1 else None

    @property
    def seeds(self) -> int:
        """How many runs are behind each printed number; one where the paper does not say."""
        return max((protocol.get("seeds") or {}).get("runs", 1) for protocol in self.protocols)

    @property
    def unstated(self) -> set[str]:
        """The settings that one of the protocols leaves open, as they spell them."""
        return {str(name) for protocol in self.protocols for name in protocol.get("unstated", ())}

    @property
    def figures(self) -> list[Mapping[str, Any]]:
        """The figures that show the same experiments, or that a claim names beside this table."""
        applied = [set(protocol["applies_to"]) for protocol in self.document["protocols"].values()]
        applied += [set(claim["where"]) for claim in self.document["claims"]]
        shown = set().union(*(places for places in applied if self.table["id"] in places))
        return [figure for figure in self.document["figures"] if figure["id"] in shown]

    @property
    def claims(self) -> list[Mapping[str, Any]]:
        """The claims that rest on this table or its figures, and those that the paper's text makes on its own."""
        places = {self.table["id"], *(figure["id"] for figure in self.figures)}

        def belongs(claim: Mapping[str, Any]) -> bool:
            return any(place in places or place.startswith("text section") for place in claim["where"])

        return [claim for claim in self.document["claims"] if belongs(claim)]


def _check(value: Any, expected: Any, where: str) -> None:
    """Refuses what is not as `expected` says: keys of a mapping (`*` for any), the items of a list, kind or choices."""
    kind = type(expected) if isinstance(expected, dict | list) else expected
    if isinstance(kind, tuple):
        if value not in kind:
            raise UserError(f"{where}={value}: expected one of {', '.join(kind)}{nearest(value, kind)}")
    elif not isinstance(value, kind):
        names = {dict: "keys with values", list: "a list", int: "a whole number", str: "a text"}
        raise UserError(f"{where}: expected {names[kind]}, it is {value!r:.40}")
    elif isinstance(expected, list):
        for number, item in enumerate(value):
            _check(item, expected[0], f"{where}[{number}]")
    elif isinstance(expected, dict):
        for key, inner in expected.items():
            if key != "*" and key not in value:
                raise UserError(f"{where}: expected a key {key!r}, it has {', '.join(map(str, value))}")
            for found in value if key == "*" else [key]:
                _check(value[found], inner, f"{where}.{found}")


def _file(key: str) -> Path:
    return papers.known()[key].folder / "record.yaml"


@functools.cache
def _read_paper(key: str) -> str:
    return _file(key).read_text(encoding="utf-8")


@functools.cache
def load_paper(key: str) -> Mapping[str, Any]:
    """A paper's record.

    Raises:
        UserError: It is no YAML, or something is missing or of another kind.
    """
    where = str(_file(key))
    try:
        record = yaml.load(_read_paper(key), Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    _check(record, _RECORD, where)
    _check(record["paper"]["key"], (key,), f"{where}.paper.key")
    for entry in (TableRecord(record, table) for table in record["tables"]):
        for name in entry.protocol_names:
            _check(name, tuple(record["protocols"]), f"{where}: table {entry.name}: protocol")
    return record


@functools.cache
def all_tables() -> tuple[TableRecord, ...]:
    """Every printed table, paper after paper."""
    ordered = sorted(map(load_paper, papers.known()), key=lambda paper: paper["paper"]["order"])
    return tuple(TableRecord(paper, table) for paper in ordered for table in paper["tables"])


def find_table(name: str) -> TableRecord:
    """The table of that name.

    Raises:
        UserError: No paper has it.
    """
    for key in papers.known():
        if name not in _read_paper(key):
            continue  # reading all records takes longer than planning a table
        for table in load_paper(key)["tables"]:
            if table["name"] == name:
                return TableRecord(load_paper(key), table)
    if name in papers.table_files():
        raise UserError(
            f"table={name}: {papers.table_files()[name]} runs it, but no paper's record.yaml has a table of this name"
        )
    known = [record.name for record in all_tables()]
    raise UserError(
        f"table={name}: there is no such table{nearest(name, known)}; `python -m tables` lists all {len(known)}"
    )
