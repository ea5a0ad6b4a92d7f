"""What several tables that were run by one command have come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kt.files import read_json
from tables.judging import tally


@dataclass(frozen=True)
class Ran:
    """One of them: its name, exit status, seconds, and what was wrong with the command where something was."""

    name: str
    status: int
    seconds: float
    error: str


def summarise(ran: Sequence[Ran], folder: Path | None, scale: str) -> None:
    """Prints a line for each table: rows that are done, how long it took, its verdicts, and what went wrong.

    Args:
        ran: The tables.
        folder: Holds what they have written; None if they have only been planned or rehearsed.
        scale: Whose rows are meant.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("table", "rows", "minutes", "claims", ""):
        shown.add_column(title, justify="right" if title == "minutes" else "left")
    for each in ran:
        written = read_json(folder / each.name / scale / "table.json") if folder and not each.error else None
        rows = claims = ""
        if written:
            trained = [row["cells"] for row in written["rows"] if row["cells"]]  # others are only cited
            done = sum(all(cell["status"] == "done" for cell in cells) for cells in trained)
            rows, claims = f"{done}/{len(trained)} done", ", ".join(text for _, text in tally(written))
        problem = each.error or {0: "", 2: "something is missing"}.get(each.status, "a cell failed")
        shown.add_row(each.name, rows, f"{each.seconds / 60:.1f}", claims, Text(problem, "red"))
    console.print(shown)
    total = sum(each.seconds for each in ran) / 60
    console.print(f"{len(ran)} tables in {total:.0f} minutes", highlight=False)
