"""`python -m tables` lists all tables and their state; `python -m tables <name>` renders one again from its results."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kt.errors import UserError
from tables.collect import names_of, read_json
from tables.records import Printed, all_tables, find
from tables.render import folder_of, markdown, write_table

SCALES = ("mini", "fast", "paper")
CONF = Path(__file__).parents[1] / "conf" / "table"


def state(printed: Printed, output_root: Path, scale: str) -> str:
    """`3/7` cells done, or what else there is to say."""
    name = printed.table["name"]
    if not (CONF / f"{name}.yaml").exists():
        return "planned"
    table = read_json(folder_of(output_root, name, scale) / "table.json")
    if table is None:
        return "not run"
    cells = {cell["id"]: cell["status"] for row in table["rows"] for cell in row["cells"]}
    return f"{sum(status == 'done' for status in cells.values())}/{len(cells)}"


def list_tables(output_root: Path) -> None:
    """Prints all tables."""
    listing = Table(title="Tables of the papers: cells done / cells of the last run")
    for column in ("table", "paper", "where", "dataset", "metrics", *SCALES):
        listing.add_column(column, overflow="fold")
    for printed in all_tables():
        table = printed.table
        metrics = ", ".join(metric["name"] for metric in table["metrics"])
        states = [state(printed, output_root, scale) for scale in SCALES]
        listing.add_row(table["name"], printed.paper, table["id"], names_of(table["dataset"]), metrics, *states)
    console = Console()
    # A pipe has no width of its own; 80 columns would fold every name.
    Console(width=None if console.is_terminal else 180).print(listing)


def render_again(name: str, scale: str, output_root: Path) -> int:
    """Renders one table from its result files; 3 where cells are missing."""
    find(name)
    folder = folder_of(output_root, name, scale)
    stored = read_json(folder / "rows.json")
    if stored is None:
        raise UserError(f"{folder}: not run yet; run python -m experiments.run +table={name} scale={scale}")
    write_table(name, stored["rows"], output_root, scale, stored["dataset"])
    table = json.loads((folder / "table.json").read_text())
    print(markdown(table))
    print(folder / "index.html")
    return 0 if all(cell["status"] == "done" for row in table["rows"] for cell in row["cells"]) else 3


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tables", description=__doc__)
    parser.add_argument("name", nargs="?", help="render this table again")
    parser.add_argument("--scale", choices=SCALES, default="mini")
    parser.add_argument("--output-root", type=Path, default=Path("outputs"))
    arguments = parser.parse_args(argv)
    try:
        if arguments.name is None:
            list_tables(arguments.output_root)
            return 0
        return render_again(arguments.name, arguments.scale, arguments.output_root)
    except UserError as error:
        print(f"kt: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
