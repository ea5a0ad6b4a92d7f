"""The printed numbers, settings and claims of the papers (`tables/paper/*.yaml`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kt.errors import UserError, nearest

FOLDER = Path(__file__).parent / "paper"
PAPERS = ("hybrid_forward", "stage_by_stage", "kcd", "mas", "distpro")


@dataclass(frozen=True)
class Printed:
    """One printed table and the record of its paper."""

    paper: str
    table: dict[str, Any]
    record: dict[str, Any]

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The paper's claims that rest on this table, or on figures of its experiment."""
        where = {self.table["id"]} | {
            figure["id"] for figure in self.record["figures"] if figure["id"] in self._figures()
        }
        return [claim for claim in self.record["claims"] if where & set(claim["where"])]

    def _figures(self) -> set[str]:
        protocols = self.table.get("protocol")
        names = protocols if isinstance(protocols, list) else [protocols]
        applied = [self.record["protocols"].get(name, {}).get("applies_to", []) for name in names]
        return {entry for entries in applied for entry in entries if str(entry).startswith("figure")}


@cache
def load(paper: str) -> dict[str, Any]:
    """The record of one paper."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((FOLDER / f"{paper}.yaml").read_text(), Loader=loader)


def all_tables() -> list[Printed]:
    """All printed tables, paper by paper."""
    return [Printed(paper, table, load(paper)) for paper in PAPERS for table in load(paper)["tables"]]


def find(name: str) -> Printed:
    """The printed table of that name.

    Raises:
        UserError: No paper has it.
    """
    known = {printed.table["name"]: printed for printed in all_tables()}
    if name not in known:
        raise UserError(f"table={name}: there is no such table{nearest(name, known)}; `python -m tables` lists all")
    return known[name]
