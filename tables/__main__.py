"""`python -m tables` lists all tables with their state; `python -m tables <name>` renders one again from its results.

Exit status: 0 all done, 2 a mistake in the command, 3 something is not done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from kt.errors import UserError, nearest
from tables import CONF
from tables.collect import collect, shown_states
from tables.papers import table_files
from tables.records import TableRecord, all_tables, find_table
from tables.render import as_markdown, read_rows, write_table
from tables.summary import open_grid
from tables.sweeps import render_again

ARROWS = {"higher": "↑", "lower": "↓"}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are users' mistakes like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def scales() -> list[str]:
    """The scales, shortest first."""
    known = ("mini", "fast", "paper")
    found = {path.stem for path in (CONF / "scale").glob("*.yaml")}
    return [name for name in known if name in found] + sorted(found.difference(known))


def _folder(output_root: Path, name: str, scale: str) -> Path:
    return output_root / "tables" / name / scale


def state(record: TableRecord, output_root: Path, scale: str) -> tuple[str, str]:
    """How a table stands at a scale, and the style to show that in."""
    stored = read_rows(_folder(output_root, record.name, scale))
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
    for title in ("table", "paper", "in it", "dataset", "task", "metric", *scales()):
        shown.add_column(title, no_wrap=title == "table")
    for record in all_tables():
        kept = record.metrics if len(record.metrics) < 3 else record.metrics[:1]
        metrics = ", ".join(f"{metric['name']} {ARROWS[metric['better']]}" for metric in kept)
        if len(record.metrics) > len(kept):
            metrics += f" (+{len(record.metrics) - len(kept)})"
        states = [state(record, output_root, scale) for scale in scales()]
        cells = [f"[{style}]{text}[/]" if style else text for text, style in states]
        task = str(record.table["task"]).split(" (")[0]
        shown.add_row(record.name, record.paper, record.title, ", ".join(record.datasets), task, metrics, *cells)
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


def show(record: TableRecord, output_root: Path, scale: str) -> bool:
    """Renders a table at a scale, prints it, and returns whether all of it is done."""
    folder = _folder(output_root, record.name, scale)
    stored = read_rows(folder)
    if stored is None:
        print(as_markdown(record, collect(record.name, printed_rows(record), output_root, scale)))
        if record.name in table_files():
            print(f"not run at scale={scale}: python -m experiments.run +table={record.name} scale={scale}")
        else:
            print(f"not runnable yet: there is no file table/{record.name}.yaml")
        return False
    write_table(record.name, stored["rows"], output_root, scale, stored["dataset"], stored.get("command"))
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(folder / "index.html")
    return all(state == "done" for state in shown_states(stored["rows"], output_root))


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit status.

    Raises:
        UserError: A mistake in the arguments.
    """
    parser = _Parser("python -m tables", description="Lists all tables, or renders one again from its results.")
    parser.add_argument(
        "name", nargs="?", help="a table, or a sweep such as sweep-0123abcd; without it all tables are listed"
    )
    parser.add_argument("--scale", help=f"one of {', '.join(scales())}; by default all that have been run")
    parser.add_argument("--output-root", help="where results are (default: outputs)")
    options = parser.parse_args(arguments)
    output_root = Path(options.output_root or "outputs")
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
        folder = render_again(options.name, output_root)
        print((folder / "table.md").read_text(encoding="utf-8"))
        print(folder / "index.html")
        rows = json.loads((folder / "table.json").read_text(encoding="utf-8"))["rows"]
        return 0 if all(cell["status"] == "done" for row in rows for cell in row["cells"]) else 3
    record = find_table(options.name)
    if options.scale is not None:
        wanted = [options.scale]
    else:
        wanted = [scale for scale in scales() if (_folder(output_root, record.name, scale) / "rows.json").exists()]
    done = [show(record, output_root, scale) for scale in wanted or scales()[:1]]
    return 0 if all(done) else 3


def main() -> None:
    """Runs the command and exits."""
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"kt: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
