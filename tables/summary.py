"""What several tables that were run by one command have come to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt.files import read_sealed
from kt.store import read_evaluation, read_result
from tables.folders import CONTENT, NotWritten
from tables.records import numbers_in_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PROBLEMS = {0: "", 2: "something is missing", 130: "interrupted"}  # exit status of a table -> what to say of it


@dataclass(frozen=True)
class Ran:
    """One of them.

    Attributes:
        name: The table's.
        status: Its exit status.
        seconds: Until it was done, from the beginning of the command, which trains all at once.
        error: What was wrong with the command.
        folder: Where it has been rendered.
    """

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


def scores_in_words(folder: Path, evaluation: str | None) -> list[str]:
    """What a finished cell has scored, in words: on its own data, and on those that an evaluation names."""
    result = read_result(folder)
    if result is None:
        return []
    told = [numbers_in_words(result["metrics"], result)]
    if evaluation is not None and (scores := read_evaluation(folder, evaluation)) is not None:
        told.append(f"evaluation={evaluation}: {numbers_in_words(scores, result)}")
    return told


def show(render: Callable[[], Path]) -> tuple[Path | None, int]:
    """Prints a table that has yet to be rendered; one that cannot be written as well.

    Returns:
        Its folder, if it is there, and an exit status: 3 where the disk is full.
    """
    try:
        folder = render()
    except NotWritten as error:
        print(f"\n{error.text.strip()}\n")
        print(f"kt: not written: {error}", file=sys.stderr)
        return None, error.status
    show_rendering(folder)
    return folder, 0


def show_rendering(folder: Path) -> None:
    """Prints the table or sweep that a folder has been rendered into, and where its page is."""
    markdown = (folder / "table.md").read_text(encoding="utf-8")
    show_collected(read_sealed(folder / CONTENT) or {}, markdown, folder / "index.html")


def show_collected(table: Mapping[str, Any], markdown: str, page: Path | None = None) -> None:
    """Prints a collected table or sweep: drawn on a terminal, elsewhere as its Markdown."""
    if sys.stdout.isatty():
        from rich.console import Console

        from tables.terminal import draw, draw_sweep

        (draw_sweep if "sweep" in table else draw)(Console(highlight=False), table, page)
        return
    print("\n" + markdown.strip() + "\n")
    if page is not None:
        print(page)


def summarise(ran: Sequence[Ran]) -> None:
    """Prints a line for each table: rows done, how long it took, its verdicts, whether it is alive, what went wrong."""
    from rich.text import Text

    from tables.judging import tally  # with numpy, which planning does without

    console, shown = open_grid()
    for title in ("table", "rows", "done after (min)", "claims", "alive", ""):
        shown.add_column(title, justify="right" if title.startswith("done") else "left")
    for each in ran:
        written = read_sealed(each.folder / CONTENT) if each.folder else None
        rows = claims = alive = ""
        if written:
            trained = [row["cells"] for row in written["rows"] if row["cells"]]  # others are only cited
            done = sum(all(cell["status"] == "done" for cell in cells) for cells in trained)
            rows, claims = f"{done}/{len(trained)} done", ", ".join(text for _, text in tally(written))
            alive = ": ".join(filter(None, [written["alive"]["verdict"], "; ".join(written["alive"]["reasons"])]))
        problem = each.error or PROBLEMS.get(each.status, "a cell failed")
        shown.add_row(each.name, rows, f"{each.seconds / 60:.1f}", claims, Text(alive), Text(problem, "red"))
    console.print(shown)
    total = max(each.seconds for each in ran) / 60
    console.print(f"{len(ran)} tables in {total:.0f} minutes", highlight=False)
