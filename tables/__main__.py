"""`python -m tables` lists all tables with their state; `python -m tables <name>` renders one again from its results.

Exit status: 0 all done, 2 a mistake in the command, 3 something is not done.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from kt import command
from kt.errors import Parser, UserError, nearest
from kt.files import at_home
from tables import CONF
from tables.collect import collect, shown_states
from tables.folders import rendered_folders, stored_rows, table_folder
from tables.papers import table_files
from tables.records import TableRecord, all_tables, find_table, metric_label
from tables.render import as_markdown, write_table
from tables.summary import open_grid, show, show_collected
from tables.sweeps import render_again, stored_points

ARROWS = {"higher": "↑", "lower": "↓"}
WIDE = 120  # columns of a terminal from which on a list says more of each table


def scales() -> list[str]:
    """The scales, shortest first."""
    known = ("mini", "fast", "paper")
    found = {path.stem for path in (CONF / "scale").glob("*.yaml")}
    return [name for name in known if name in found] + sorted(found.difference(known))


def state(record: TableRecord, output_root: Path, scale: str) -> tuple[str, str]:
    """How a table stands at a scale, and the style to show that in."""
    try:
        stored = stored_rows(table_folder(output_root, record.name, scale))
    except UserError:
        return "unreadable", "red"
    if stored is None:
        return ("not run", "") if record.name in table_files() else ("not runnable yet", "dim")
    states = shown_states(stored["rows"], output_root)
    done, failed = states.count("done"), states.count("failed")
    if done == len(states):
        return f"{done}/{done} done", "green"
    text = f"{done}/{len(states)} done" + (f", {failed} failed" if failed else "")
    return text, "red" if failed else "yellow"


def list_tables(output_root: Path) -> None:
    """Prints all tables with their state at each scale."""
    console, shown = open_grid()
    wide = console.width >= WIDE
    for title in ("table", "from", "dataset", *(("task", "metric") if wide else ()), *scales()):
        shown.add_column(title, no_wrap=title in ("table", "from"), overflow="fold")
    paper = None
    for record in all_tables():
        if record.paper != paper:
            paper = record.paper
            shown.add_row(Text(paper.replace("_", " "), "bold"))
        kept = record.metrics if len(record.metrics) < 3 else record.metrics[:1]
        metrics = ", ".join(f"{metric_label(metric['name'])} {ARROWS[metric['better']]}" for metric in kept)
        if len(record.metrics) > len(kept):
            metrics += f" (+{len(record.metrics) - len(kept)})"
        states = [state(record, output_root, scale) for scale in scales()]
        cells = [f"[{style}]{text}[/]" if style else text for text, style in states]
        task = str(record.table["task"]).split(" (")[0]
        told = (record.name, record.title, ", ".join(record.datasets))
        shown.add_row(*told, *((task, metrics) if wide else ()), *cells)
    console.print(shown)
    console.print(f"{len(all_tables())} tables. Run one: python -m experiments.run +table=<table>", highlight=False)


def printed_rows(record: TableRecord) -> list[dict[str, Any]]:
    """A table that was never run, as rows whose cells are all missing."""
    kept = ("role", "method", "teacher", "student")
    return [
        {"id": row["id"], "label": row["row"], **{key: row[key] for key in kept}, "ours": row.get("ours", False)}
        | {"printed": row["id"], "differs": {}, "axes": {}, "cells": [{"id": "none", "seed": 0}]}
        for row in record.rows
    ]


def show_all(record: TableRecord, output_root: Path, scale: str) -> int:
    """Renders and prints a table at a scale, under each settings it was run with; returns the exit status."""
    states, status = list[str](), 0
    for folder in rendered_folders(output_root, record.name, scale):
        stored = stored_rows(folder)
        assert stored is not None
        render = functools.partial(write_table, command=stored.get("command"), settings=stored.get("settings"))
        _, lost = show(functools.partial(render, record.name, stored["rows"], output_root, scale, stored["dataset"]))
        status = max(status, lost)
        states += shown_states(stored["rows"], output_root)
    if states:
        return status if all(state == "done" for state in states) else 3
    table = collect(record.name, printed_rows(record), output_root, scale)
    show_collected(table, as_markdown(record, table))
    if record.name in table_files():
        print(f"not run at scale={scale}: python -m experiments.run +table={record.name} scale={scale}")
    else:
        print(f"not runnable yet: there is no file table/{record.name}.yaml")
    return 3


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit status.

    Raises:
        UserError: A mistake in the arguments.
    """
    parser = Parser("python -m tables", description="Lists all tables, or renders one again from its results.")
    parser.add_argument(
        "name", nargs="?", help="a table, or a sweep such as sweep-0123abcd; without it all tables are listed"
    )
    parser.add_argument("--scale", help=f"one of {', '.join(scales())}; by default all that have been run")
    parser.add_argument("--output-root", help="where results are (default: outputs)")
    options = parser.parse_args(arguments)
    output_root = at_home(options.output_root or "outputs")
    if options.output_root and not output_root.is_dir():
        raise UserError(f"--output-root={output_root}: expected a folder with results, there is none")
    if options.scale is not None and options.scale not in scales():
        raise UserError(
            f"--scale={options.scale}: expected one of {', '.join(scales())}{nearest(options.scale, scales())}"
        )
    if options.name is None:
        list_tables(output_root)
        return 0
    if options.name.startswith("sweep-"):
        points = stored_points(options.name, output_root)["points"]
        _, status = show(functools.partial(render_again, options.name, output_root))
        return status if all(state == "done" for state in shown_states(points, output_root)) else 3
    record = find_table(options.name)
    if options.scale is not None:
        wanted = [options.scale]
    else:
        wanted = [scale for scale in scales() if rendered_folders(output_root, record.name, scale)]
    return max(show_all(record, output_root, scale) for scale in wanted or scales()[:1])


def main() -> None:
    """Runs the command and exits."""
    sys.exit(command.run(lambda: run(sys.argv[1:])))


if __name__ == "__main__":
    main()
