"""What several tables that were run by one command have come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kt.files import read_json
from tables.judging import tally

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Ran:
    """One of them: its name, exit status, seconds, what was wrong with the command, and where it has been rendered."""

    name: str
    status: int
    seconds: float
    error: str
    folder: Path | None


def open_grid() -> tuple[Console, Table]:
    """A console, wide where it is a file or a pipe, and a plain table to print to it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    return console, Table(box=None, pad_edge=False, header_style="bold")


def summarise(ran: Sequence[Ran]) -> None:
    """Prints a line for each table: rows done, how long it took, its verdicts, whether it is alive, what went wrong."""
    from rich.text import Text

    console, shown = open_grid()
    for title in ("table", "rows", "minutes", "claims", "alive", ""):
        shown.add_column(title, justify="right" if title == "minutes" else "left")
    for each in ran:
        written = read_json(each.folder / "table.json") if each.folder else None
        rows = claims = alive = ""
        if written:
            trained = [row["cells"] for row in written["rows"] if row["cells"]]  # others are only cited
            done = sum(all(cell["status"] == "done" for cell in cells) for cells in trained)
            rows, claims = f"{done}/{len(trained)} done", ", ".join(text for _, text in tally(written))
            alive = ": ".join(filter(None, [written["alive"]["verdict"], "; ".join(written["alive"]["reasons"])]))
        problem = each.error or {0: "", 2: "something is missing"}.get(each.status, "a cell failed")
        shown.add_row(each.name, rows, f"{each.seconds / 60:.1f}", claims, Text(alive), Text(problem, "red"))
    console.print(shown)
    total = sum(each.seconds for each in ran) / 60
    console.print(f"{len(ran)} tables in {total:.0f} minutes", highlight=False)
