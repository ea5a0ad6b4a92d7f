"""Tables and sweeps on a terminal: columns fold at its width, verdicts and what stands out have colours."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tables.alive import ALIVE, DEAD
from tables.judging import FAILS, HOLDS, UNKNOWN, tally
from tables.records import find_table
from tables.render import (
    X,
    best_note,
    best_rows,
    heading,
    in_brackets,
    life_notes,
    open_note,
    ours,
    pair,
    printed,
    spread_notes,
    title_of,
)
from tables.sweeps import best_points, place

Json = Mapping[str, Any]

STYLES = {HOLDS: "green", FAILS: "red", UNKNOWN: "yellow", ALIVE: "green", DEAD: "red"}
HEAD = 10  # columns of the terminal that a head may take beyond those of its cells
GAP = 2  # columns of the terminal between two columns of a table


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, whose words are wrapped, and row by row its cells."""

    head: str
    cells: Sequence[Text]

    @property
    def longest_word(self) -> int:
        """The columns of the terminal that it takes where its cells are wrapped too."""
        return max(len(word) for text in (self.head, *(cell.plain for cell in self.cells)) for word in _words(text))

    @property
    def width(self) -> int:
        """Those that it takes where its cells are not wrapped."""
        return max(*map(len, _words(self.head)), min(len(self.head), HEAD), *(cell.cell_len for cell in self.cells))

    @property
    def wrapped_head(self) -> str:
        """The head for that width."""
        return "\n".join(line for part in self.head.split("\n") for line in textwrap.wrap(part, self.width))


def _words(text: str) -> list[str]:
    return re.split("[ \n]", text)  # at a space that breaks


def folded(left: Sequence[Column], numbers: Sequence[Sequence[Column]], width: int) -> Iterator[Table]:
    """A table as one or, where its numbers do not fit side by side, several below one another.

    Args:
        left: Columns that all of them have; their words are wrapped.
        numbers: Columns whose cells are never wrapped, in groups that stay together.
        width: Columns of the terminal.
    """
    needed = max((sum(column.width + GAP for column in group) for group in numbers), default=0)
    share = max(1, min(width // 3, (width - needed) // len(left) - GAP))
    least = [min(column.longest_word, share) for column in left]
    room = width - sum(each + GAP for each in least)
    parts: list[tuple[list[Column], int]] = []  # with what is left of the room
    for group in numbers:
        taken = sum(column.width + GAP for column in group)
        if not parts or taken > parts[-1][1]:
            parts.append(([], room))
        columns, free = parts.pop()
        parts.append(([*columns, *group], free - taken))
    for columns, free in parts:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        widths = {}
        for column, given in sorted(zip(left, least, strict=True), key=lambda each: each[0].width - each[1]):
            widths[column.head] = min(column.width, given + free)
            free -= max(0, widths[column.head] - given)
        for column in left:
            table.add_column(column.head, overflow="fold", width=widths[column.head])
        for column in columns:
            table.add_column(column.wrapped_head, justify="right", no_wrap=True, width=column.width)
        for cells in zip(*(column.cells for column in (*left, *columns)), strict=True):
            table.add_row(*cells)
        yield table


def draw(console: Console, table: Json, page: Path | None = None) -> None:
    """Draws a table of a paper, as `tables.collect.collect` gives it: ours beside the paper's, and the verdicts.

    Args:
        console: Where to.
        table: The collected table.
        page: Its page, if it has one.
    """
    record = find_table(table["table"])
    console.print(Text(f"{record.name} at scale={table['scale']}{in_brackets(table)}", "bold"))
    console.print(Text(f"{title_of(record, table)} ({record.document['paper']['title']}, {record.title})"))
    console.print(Text(table["banner"], "green" if table["comparable"] else "yellow"))
    rows = table["rows"]
    left = [Column("row", [_label(row) for row in rows]), Column("networks", [Text(pair(row)) for row in rows])]
    best = {source: best_rows(table, source) for source in ("mean", "paper")}
    numbers = [
        (
            Column(f"{_head(metric)}\nours", [_ours(row, metric, best["mean"]) for row in rows]),
            Column("paper", [_number(printed(row, metric), row, metric, best["paper"]) for row in rows]),
        )
        for metric in table["metrics"]
    ]
    console.print()
    for part in folded(left, numbers, console.width):
        console.print(part, "")
    _show_warnings(console, table)
    notes = [*filter(None, [record.table.get("expect")]), *spread_notes(table)]
    for note in notes:
        console.print(Text(note, "dim"))
    console.print(Text(" ".join(life_notes(table)), STYLES.get(table["alive"]["verdict"], "yellow")))
    claims = Table(box=None, show_header=False, pad_edge=False, padding=(0, GAP, 0, 0))
    for width in (len(UNKNOWN), None, None):
        claims.add_column(min_width=width, overflow="fold")
    for claim in table["claims"]:
        told = Text(claim["claim"])
        if claim["verdict"] == UNKNOWN:  # says what would decide it
            told.append(f". {claim['evidence']}", "dim")
        claims.add_row(Text(claim["verdict"], f"bold {STYLES[claim['verdict']]}"), claim["id"], told)
    if table["claims"]:
        console.print()
        console.print(claims)
        counted = [Text(words, STYLES[verdict]) for verdict, words in tally(table)]
        console.print(Text.assemble("Claims: ", Text(", ").join(counted), ". The page has the evidence."))
    if note := open_note(table):
        console.print(Text(f"{note}.", "dim"))
    _show_page(console, page)


def draw_sweep(console: Console, sweep: Json, page: Path | None = None) -> None:
    """Draws a sweep, as `tables.sweeps.collect_sweep` gives it.

    Args:
        console: Where to.
        sweep: The collected sweep.
        page: Its page, if it has one.
    """
    console.print(Text(sweep["sweep"], "bold"))
    console.print(Text(sweep["banner"], "dim"))
    rows, best = sweep["rows"], best_points(sweep)
    places = [place(row, sweep["keys"]) for row in rows]
    left = [Column(key, [Text(each[index]) for each in places]) for index, key in enumerate(sweep["keys"] or ["point"])]
    left.append(Column("networks", [Text(pair(row)) for row in rows]))
    numbers = [[Column(_head(metric), [_ours(row, metric, best) for row in rows])] for metric in sweep["metrics"]]
    seeds = [Text(", ".join(str(cell["seed"]) for cell in row["cells"])) for row in rows]
    for part in folded(left, [*numbers, [Column("seeds", seeds)]], console.width):
        console.print(part, "")
    _show_warnings(console, sweep)
    for note in spread_notes(sweep):
        console.print(Text(note, "dim"))
    _show_page(console, page)


def _head(metric: Json) -> str:
    """The metric's name, whose arrow stays beside its last word."""
    return "\N{NO-BREAK SPACE}".join(heading(metric).rsplit(" ", 1))


def _label(row: Json) -> Text:
    return Text(f"{row['label']} (proposed)" if row["ours"] else row["label"], "bold" if row["ours"] else "")


def _number(text: str, row: Json, metric: Json, best: set[tuple[str, str]]) -> Text:
    return Text(text, "red" if text == X else "bold" if (row["id"], metric["name"]) in best else "")


def _ours(row: Json, metric: Json, best: set[tuple[str, str]]) -> Text:
    """What was measured, with the best epoch's number where that is another one."""
    return _number(ours(row, metric), row, metric, best).append(best_note(row, metric), "dim")


def _show_warnings(console: Console, table: Json) -> None:
    for each in table["warnings"]:
        console.print(Text(f"warning: {each['warning']} ({', '.join(each['rows'])})", "yellow"))


def _show_page(console: Console, page: Path | None) -> None:
    if page is not None:  # whole, so that it can be clicked or copied
        console.print(Text(f"Page: {page}"), soft_wrap=True)
