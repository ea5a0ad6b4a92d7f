"""The papers' records: printed numbers, settings, figures and claims; `tables/papers/README.md` has the schema."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kt.errors import UserError, nearest
from tables import papers

# libyaml's loader is ten times faster; wheels of PyYAML without it exist.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

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
    def datasets(self) -> list[str]:
        """The datasets that the table names."""
        named = self.table["dataset"]
        return [str(name) for name in (named if isinstance(named, list) else [named])]

    @property
    def protocols(self) -> list[Mapping[str, Any]]:
        """The settings behind the table."""
        named = self.table["protocol"]
        return [self.document["protocols"][name] for name in (named if isinstance(named, list) else [named])]

    @property
    def seeds(self) -> int:
        """How many runs are behind each printed number; one where the paper does not say."""
        return max((protocol.get("seeds") or {}).get("runs", 1) for protocol in self.protocols)

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


@functools.cache
def _read_paper(key: str) -> str:
    return (papers.FOLDER / key / "record.yaml").read_text(encoding="utf-8")


@functools.cache
def load_paper(key: str) -> Mapping[str, Any]:
    """A paper's record."""
    return yaml.load(_read_paper(key), Loader=_Loader)


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
    known = [record.name for record in all_tables()]
    raise UserError(
        f"table={name}: there is no such table{nearest(name, known)}; `python -m tables` lists all {len(known)}"
    )
