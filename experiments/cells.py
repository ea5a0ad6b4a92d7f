"""`python -m experiments.cells`: what has been trained. List it, show a cell, compare two, prune what no table uses.

Exit status: 0 done, 2 a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from experiments.meaning import identity, needed_cells, settle
from experiments.plan import in_words
from experiments.sources import dotted
from experiments.table import ACCIDENTAL
from kt import command
from kt.errors import Parser, UserError, nearest
from kt.settings import shown
from kt.store import (
    cells_of,
    evaluation_names,
    first_fault,
    read_evaluation,
    read_records,
    read_result,
    read_status,
    records_file,
    remove,
)
from tables.folders import ROWS, stored_rows
from tables.records import numbers_in_words, result_label
from tables.summary import open_grid

Json = Mapping[str, Any]

STYLES = {"done": "green", "failed": "red", "damaged": "red", "running": "yellow", "interrupted": "yellow"}
BARS = "▁▂▃▄▅▆▇█"
CURVE = 32  # columns of a terminal
SILENT = ("step", "epoch", "lr", "images_per_second", "kind", "phase")  # of records: no curve is drawn of them


@dataclass(frozen=True)
class Cell:
    """A cell as its folder tells it, finished or not."""

    folder: Path

    @property
    def id(self) -> str:
        """Its id."""
        return self.folder.name

    @cached_property
    def result(self) -> Json | None:
        """Its result, if it is done."""
        return read_result(self.folder)

    @cached_property
    def status(self) -> Json:
        """How it stands; of one that is done without a look at its files, which may be large."""
        return {"status": "done"} if self.result else read_status(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its settled config; empty where nothing says."""
        if self.result:
            return dict(self.result["config"])
        try:
            return dict(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")) or {})
        except (OSError, ValueError, yaml.YAMLError):
            return {}

    @cached_property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def what(self) -> str:
        """Method, networks, data and seed, in words."""
        config = self.config
        if not config:
            return "unknown"
        networks = [(config[who]["network"] or {}).get("name") for who in ("teacher", "student")]
        pair = " → ".join(name for name in networks if name)
        return f"{config['method']['name']}: {pair}, {config['dataset']['name']}, seed {config['seed']}"

    @property
    def score(self) -> str:
        """The number that comes first in its result."""
        metrics = self.result["metrics"] if self.result else {}
        return next((f"{value:.2f}" for value in metrics.values()), "")

    @property
    def touched(self) -> float:
        """When its folder has last changed."""
        return self.folder.stat().st_mtime

    @cached_property
    def needs(self) -> dict[str, str]:
        """Name -> id of the cell, or hash of the file, that it was made of."""
        return dict((self.result or {}).get("needs") or {})


def all_cells(output_root: Path) -> dict[str, Cell]:
    """All cells by id, the one that changed last behind all others."""
    found = [Cell(path) for path in cells_of(output_root).glob("*") if path.is_dir()]
    return {cell.id: cell for cell in sorted(found, key=lambda cell: cell.touched)}


def find(cells: Mapping[str, Cell], name: str) -> Cell:
    """The cell of an id, of the beginning of one, or in a folder.

    Raises:
        UserError: There is none, or there are several.
    """
    if name in cells:
        return cells[name]
    path = Path(name)
    if path.is_dir() and path.parent.name == cells_of("").name:
        return Cell(path)
    found = [cell for cell in cells.values() if cell.id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name}: expected one cell, {len(found)} begin so: {', '.join(cell.id for cell in found[:5])}")
    raise UserError(f"{name}: there is no such cell{nearest(name, cells)}; list shows all {len(cells)}")


# Who uses what


def users(output_root: Path, sure: bool = False) -> dict[tuple[str, str | None], list[str]]:
    """(Id of a cell, evaluation that is asked of it) -> the tables and sweeps that show it.

    Args:
        output_root: Where results are.
        sure: Whether each of these has to say what it shows.

    Raises:
        UserError: One does not.
    """
    found: dict[tuple[str, str | None], list[str]] = {}
    for path in sorted([*output_root.glob(f"tables/*/*/{ROWS}"), *output_root.glob(f"sweeps/*/{ROWS}")]):
        try:
            written = stored_rows(path.parent) or {}
        except UserError:
            if sure:
                raise
            continue
        name = path.parent.relative_to(output_root).as_posix().partition("/")[2]
        for row in written.get("rows") or written.get("points") or ():
            for cell in row["cells"]:
                found.setdefault((cell["id"], row.get("evaluation")), []).append(name)
    return {key: list(dict.fromkeys(names)) for key, names in found.items()}


def _needed(cell: Cell, evaluation: str | None) -> set[str]:
    """The ids of all that a cell and an evaluation of it need, without what changes with the data."""
    try:
        needed = needed_cells(settle({**cell.config, "evaluation": evaluation}))
        own = {identity(config) for config in needed.values()}
    except (UserError, LookupError, TypeError):  # of another version, or of a file that is not there any more
        own = set()
    return {*own, *(need.partition("-")[0] for need in cell.needs.values())}


def unused(cells: Mapping[str, Cell], output_root: Path) -> list[Cell]:
    """The cells that no table and no sweep shows, and that none of those needs which one shows."""
    by_settings: dict[str, list[Cell]] = {}
    for cell in cells.values():
        by_settings.setdefault(cell.id.partition("-")[0], []).append(cell)
    todo = [(cells[cell_id], evaluation) for cell_id, evaluation in users(output_root, sure=True) if cell_id in cells]
    used: set[str] = set()
    seen: set[tuple[str, str | None]] = set()
    while todo:
        cell, evaluation = todo.pop()
        if (cell.id, evaluation) in seen:
            continue
        seen.add((cell.id, evaluation))
        used.add(cell.id)
        todo += [(each, None) for need in _needed(cell, evaluation) for each in by_settings.get(need, ())]
    return [cell for cell in cells.values() if cell.id not in used]


# In words


def megabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _total(cells: Iterable[Cell]) -> str:
    listed = list(cells)
    return f"{len(listed)} {'cell' if len(listed) == 1 else 'cells'}, {megabytes(sum(cell.size for cell in listed))}"


def curves(cell: Cell) -> dict[str, list[float]]:
    """What the main phase of a cell's training has recorded, step by step, and what its scores were on the way."""
    found: dict[str, list[float]] = {}
    for kind in ("train", "eval"):
        if not records_file(cell.folder).exists():
            break
        for record in read_records(records_file(cell.folder), kind):
            if record.get("phase") != "train":
                continue
            for name, value in record.items():
                if name not in SILENT and isinstance(value, int | float):
                    found.setdefault(name, []).append(float(value))
    return found


def bars(values: Sequence[float], low: float, high: float) -> str:
    """A curve as a line of bars, the mean of an equal part of the values each.

    Args:
        values: Finite ones; others leave a gap.
        low, high: What the lowest and the highest bar stand for.
    """
    count = min(CURVE, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    drawn = ""
    for part in parts:
        mean = sum(part) / len(part)
        share = (mean - low) / (high - low) if high > low else 0.5
        drawn += BARS[min(int(share * len(BARS)), len(BARS) - 1)] if 0 <= share <= 1 else " "
    return drawn


def _curve_lines(named: Sequence[tuple[str, Cell]]) -> Iterator[tuple[str, str, str]]:
    """Record, cell and curve, all cells on the same scale."""
    found = [(name, cell, curves(cell)) for name, cell in named]
    for record in dict.fromkeys(record for _, _, values in found for record in values):
        finite = [value for _, _, all_of in found for value in all_of.get(record, ()) if abs(value) < float("inf")]
        label = result_label(record, [found[0][1].result or {}]) if record[:3] == "top" else record
        for name, _, all_of in found:
            if (values := all_of.get(record)) and finite:
                drawn = bars(values, min(finite), max(finite))
                yield label, name, f"{drawn:{CURVE}}  {values[0]:.4g} to {values[-1]:.4g}"


def _settings(cell: Cell) -> dict[str, str]:
    """Dotted key -> value of all settings that say what a cell is."""
    kept = {key: value for key, value in cell.config.items() if key not in (*ACCIDENTAL, "table", "evaluation", "cell")}
    return {key: shown(value) for key, value in dotted(kept) if not key.startswith("scale.tuned.")}


def differing(one: Cell, other: Cell) -> list[tuple[str, str, str]]:
    """The settings in which two cells differ, but for those that follow from another method, network or dataset."""
    ours, theirs = _settings(one), _settings(other)
    keys = [key for key in ours | theirs if ours.get(key, "null") != theirs.get(key, "null")]

    def follows(key: str) -> bool:
        groups = key.split(".")[:-1]
        names = (".".join([*groups[: length + 1], "name"]) for length in range(len(groups)))
        return any(name in keys and name != key for name in names)

    return [(key, ours.get(key, "–"), theirs.get(key, "–")) for key in keys if not follows(key)]


def _print(title: str, lines: Iterable[Sequence[str | Text]], *heads: str) -> None:
    """A titled list, nothing where it is empty."""
    rows = list(lines)
    if not rows:
        return
    console, grid = open_grid()
    grid.show_header = bool(heads)
    for number in range(len(rows[0])):
        grid.add_column(heads[number] if heads else "", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(each) if isinstance(each, str) else each for each in row))
    console.print(Text(f"\n{title}", "bold"))
    console.print(grid)


# The commands


def list_cells(cells: Mapping[str, Cell], output_root: Path, words: Sequence[str]) -> None:
    """`list`: a line for each cell, the newest last."""
    names = users(output_root)
    shown_by: dict[str, list[str]] = {}
    for (cell_id, _), tables in names.items():
        shown_by.setdefault(cell_id, []).extend(tables)
    console, grid = open_grid()
    grid.add_column("cell", no_wrap=True)
    grid.add_column("method: networks, data", overflow="fold")
    grid.add_column("state", no_wrap=True)
    for head in ("score", "size", "tables"):
        grid.add_column(head, justify="right", no_wrap=True)
    listed = []
    for cell in cells.values():
        tables, state = list(dict.fromkeys(shown_by.get(cell.id, []))), str(cell.status["status"])
        line = (cell.id, cell.what, state, cell.score, megabytes(cell.size), ", ".join(tables))
        if all(any(word in text for text in line) for word in words):
            listed.append(cell)
            grid.add_row(*map(Text, line[:2]), Text(state, STYLES.get(state, "")), *line[3:5], str(len(tables)))
    if listed:
        console.print(grid)
    console.print(f"{_total(listed)} in {cells_of(output_root)}", highlight=False, soft_wrap=True)


def show_cell(cells: Mapping[str, Cell], output_root: Path, name: str) -> None:
    """`show`: settings, needs, scores and curves of a cell, its files, and how to load it."""
    cell = find(cells, name)
    result, state = cell.result, str(cell.status["status"])
    console, _ = open_grid()
    console.print(Text.assemble((cell.id, "bold"), "  ", (state, STYLES.get(state, "")), f"  {cell.what}"))
    if error := cell.status.get("error"):
        console.print(Text(str(error), "red"))
    if result:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(read_status(cell.folder).get("finished") or cell.touched))
        facts = [f"trained in {in_words(result['seconds'])} until {when}"]
        if speed := result.get("images_per_second"):
            facts.append(f"{speed:g} images a second")
        if memory := result.get("peak_memory"):
            facts.append(f"peak memory {megabytes(memory)}")
        console.print(Text(", ".join(facts)))
        scores = [("test", numbers_in_words(result["metrics"], result))]
        scores += [("best epoch", numbers_in_words(result["best"], result))] if result.get("best") else []
        for each in evaluation_names(cell.folder):
            scores.append((f"evaluation={each}", numbers_in_words(read_evaluation(cell.folder, each) or {}, result)))
        _print("Scores", scores)
    _print("Curves", ((record, drawn) for record, _, drawn in _curve_lines([("", cell)])))
    _print("Settings", ((f"{key}={value}",) for key, value in _settings(cell).items() if value != "null"))
    needs = []
    for need, found in cell.needs.items():
        known = cells.get(found)
        needs.append((need, found, known.what if known else "a file", known.score if known else ""))
    _print("Needs", needs)
    tables = dict.fromkeys(name for (each, _), names in users(output_root).items() if each == cell.id for name in names)
    _print("Shown by", ((name,) for name in tables))
    count = sum(path.is_file() for path in cell.folder.rglob("*"))
    fault = first_fault(cell.folder, result["files"]) if result else None
    _print("Files", [(str(cell.folder), f"{count} files, {megabytes(cell.size)}" + (f"; {fault}" if fault else ""))])
    if result:
        console.print(Text("\nTo load the student", "bold"))
        print(f'import kt\nstudent = kt.load_student("{cell.folder}")')


def compare_cells(cells: Mapping[str, Cell], one: str, other: str) -> None:
    """`compare`: the settings in which two cells differ, their scores and their curves."""
    pair = {"a": find(cells, one), "b": find(cells, other)}
    console, _ = open_grid()
    for name, cell in pair.items():
        console.print(Text.assemble((f"{name}  {cell.id}", "bold"), f"  {cell.status['status']}  {cell.what}"))
    _print("Settings that differ", differing(*pair.values()) or [("none", "", "")], "", *pair)
    results = [cell.result or {} for cell in pair.values()]
    scores = []
    for metric in dict.fromkeys(name for result in results for name in result.get("metrics", ())):
        values = [result.get("metrics", {}).get(metric) for result in results]
        texts = ["–" if value is None else f"{value:.2f}" for value in values]
        difference = "" if None in values else f"{values[1] - values[0]:+.2f}"
        scores.append((result_label(metric, results), *texts, difference))
    _print("Scores", scores, "", *pair, "b - a")
    _print("Curves", _curve_lines([*pair.items()]))


def prune(cells: Mapping[str, Cell], output_root: Path, names: Sequence[str], sure: bool) -> None:
    """`prune`: removes the cells that no table uses, or says which they are.

    Raises:
        UserError: A cell is being trained, or one that is named is used.
    """
    for cell in cells.values():
        if cell.status["status"] == "running":
            raise UserError(f"cell {cell.id} is being trained, and may need any other: prune when nothing runs")
    found = unused(cells, output_root)
    if names:
        wanted = [find(cells, name) for name in names]
        for cell in wanted:
            if cell not in found:
                raise UserError(f"{cell.id}: a table uses it, or needs it for a cell that it shows")
        found = wanted
    if not found:
        print(f"every cell in {cells_of(output_root)} is used by a table" if cells else "there are no cells")
        return
    if not sure:
        _print("Used by no table", ((cell.id, cell.what, megabytes(cell.size)) for cell in found))
        print(f"{_total(found)}; nothing is removed: add --yes for that")
        return
    told = _total(found)
    kept = [cell.id for cell in found if not remove(cell.folder)]
    print(f"removed {told}" + (f"; others work on {', '.join(kept)}" if kept else ""))


def run(arguments: Sequence[str]) -> int:
    """The command; returns its exit status.

    Raises:
        UserError: A mistake in the arguments.
    """
    parser = Parser("python -m experiments.cells", description="What has been trained.")
    common, where = Parser(add_help=False), "where results are (default: outputs)"
    parser.add_argument("--output-root", default="outputs", help=where)
    common.add_argument("--output-root", default=argparse.SUPPRESS, help=where)
    commands = parser.add_subparsers(dest="command", parser_class=Parser)

    def add(name: str, words: str) -> Parser:
        made: Parser = commands.add_parser(name, help=words, description=words, parents=[common])
        return made

    made = add("list", "all cells, the newest last")
    made.add_argument("words", nargs="*", help="only those in whose line all of these are: kd resnet20 failed")
    made = add("show", "settings, needs, scores, curves and files of a cell, and how to load it")
    made.add_argument("cell", help="its id, or how that begins")
    made = add("compare", "the settings in which two cells differ, their scores and curves")
    made.add_argument("cell", nargs=2, help="their ids, or how these begin")
    made = add("prune", "remove what no table and no sweep uses")
    made.add_argument("cell", nargs="*", help="only these")
    made.add_argument("--yes", action="store_true", help="without it they are only listed")
    options = parser.parse_args(arguments)
    output_root = Path(options.output_root).expanduser()
    if not cells_of(output_root).is_dir():
        raise UserError(f"--output-root={output_root}: expected a folder with results, there are no cells")
    cells = all_cells(output_root)
    if options.command == "show":
        show_cell(cells, output_root, options.cell)
    elif options.command == "compare":
        compare_cells(cells, *options.cell)
    elif options.command == "prune":
        prune(cells, output_root, options.cell, options.yes)
    else:
        list_cells(cells, output_root, getattr(options, "words", ()))
    return 0


def main() -> None:
    """Runs the command and exits."""
    sys.exit(command.run(lambda: run(sys.argv[1:])))


if __name__ == "__main__":
    main()
