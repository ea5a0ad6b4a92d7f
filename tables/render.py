"""Renders a table as Markdown, CSV, LaTeX, JSON and a page, with the printed numbers beside ours."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kt.errors import UserError
from kt.files import read_json, write_bytes, write_text
from kt.store import folder_of, read_queue, read_results
from tables.collect import collect
from tables.judging import Context, tally
from tables.plotting import Drawing, drawings, plot
from tables.records import TableRecord, find_table

Json = dict[str, Any]

X = "X"
ARROWS = {"higher": "↑", "lower": "↓"}
TEMPLATES = Path(__file__).parent / "templates"


def write_table(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    output_root: str | os.PathLike[str],
    scale: str,
    dataset: str,
    command: str | None = None,
) -> Path:
    """Collects and renders a table into `<output_root>/tables/<name>/<scale>/`.

    Args:
        name: The table's name.
        rows: As `tables.collect.collect` takes them.
        output_root: Where `cells/` is.
        scale: The scale of the run.
        dataset: The run's dataset.
        command: What made the results; by default this process's command line if it is a run.

    Returns:
        The folder.

    Raises:
        UserError: There is no such table, or the folder cannot be written.
    """
    record = find_table(name)
    command = command or own_command()
    table = collect(name, rows, output_root, scale, dataset)
    folder = Path(output_root) / "tables" / name / scale
    stored = {"rows": list(rows), "scale": scale, "dataset": dataset, "command": command}
    try:
        (folder / "curves").mkdir(parents=True, exist_ok=True)
        plots = _write_curves(record, table, output_root, folder)
        page = as_html(record, table, output_root, folder, plots, command)
        texts = {
            "table.md": as_markdown(record, table),
            "table.csv": as_csv(table),
            "table.tex": as_latex(record, table),
        }
        texts |= {"rows.json": as_json(stored), "table.json": as_json(table), "index.html": page}
        for file, text in texts.items():
            write_text(folder / file, text)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to ({error.strerror})") from None
    return folder


def read_rows(folder: Path) -> Json | None:
    """What `write_table` was last given for a folder; None if never.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / "rows.json"
    stored = read_json(path)
    if stored is not None and not {"rows", "scale", "dataset"} <= stored.keys():
        raise UserError(f"{path}: expected the rows of a table; run the table again")
    return stored


def own_command() -> str | None:
    """This process's command line, if it runs a table."""
    path = Path(sys.argv[0])
    if path.parts[-2:] != ("experiments", "run.py"):
        return None
    return shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])


def as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# Numbers


def number(value: float | None, decimals: int) -> str:
    """A measured number, X if there is none."""
    return X if value is None else f"{value:.{decimals}f}"


def ours(row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """What this run measured: mean, standard deviation over seeds, and how many seeds if some are not done."""
    if not row["cells"]:
        return "–"  # the row only cites a number
    name, decimals = metric["name"], metric["decimals"]
    text = number((row["mean"] or {}).get(name), decimals)
    spread = (row["std"] or {}).get(name)
    if spread is not None:
        text += f" ± {spread:.{decimals}f}"
    done = sum(cell["status"] == "done" for cell in row["cells"])
    return text if text == X or done == len(row["cells"]) else f"{text} ({done} of {len(row['cells'])} seeds)"


def best_note(row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """The best epoch's number where it is not the last one's, which is the result."""
    last, best = ((row.get(key) or {}).get(metric["name"]) for key in ("mean", "best"))
    shown = number(best, metric["decimals"])
    return "" if best is None or shown == number(last, metric["decimals"]) else f" ({shown})"


def printed(row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """What the paper prints; empty if nothing."""
    value, decimals = row["paper"][metric["name"]], metric["decimals"]
    if value is None:
        return ""
    if not isinstance(value, list):
        return f"{value:.{decimals}f}"
    mean, spread = value
    fits = abs(round(spread, decimals) - spread) < 1e-12
    return f"{mean:.{decimals}f} ± " + (f"{spread:.{decimals}f}" if fits else f"{spread:g}")


def best_rows(table: Mapping[str, Any], source: str) -> set[tuple[str, str]]:
    """(row id, metric) of the best student rows, among those that compare: same student, data and teacher axes.

    Args:
        table: The collected table.
        source: `mean` (ours) or `paper`.
    """
    found: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    for row in table["rows"]:
        if row["role"] == "teacher":
            continue
        axes = tuple(item for item in row["axes"].items() if not item[0].startswith("method"))
        for metric in table["metrics"]:
            value = (row[source] or {}).get(metric["name"])
            if value is not None:
                score = value[0] if isinstance(value, list) else value
                sign = 1 if metric["better"] == "higher" else -1
                found.setdefault((row["student"], axes, metric["name"]), []).append((sign * score, row["id"]))
    best = set()
    for (_, _, name), scores in found.items():
        if len(scores) > 1:
            top = max(scores)[0]
            best |= {(row_id, name) for score, row_id in scores if score == top}
    return best


def heading(metric: Mapping[str, Any]) -> str:
    """`top-1 accuracy (%) ↑`."""
    unit = {"percent": " (%)", None: ""}.get(metric["unit"], f" ({metric['unit']})")
    if metric["label"] == metric["unit"]:
        unit = ""
    return f"{metric['label']}{unit} {ARROWS[metric['better']]}"


def pair(row: Mapping[str, Any]) -> str:
    """The networks of a row: `resnet50 → mobilenet_v1`."""
    return " → ".join(network for network in (row["teacher"], row["student"]) if network)


def spread_notes(table: Mapping[str, Any]) -> list[str]:
    """What stands behind ± and other signs of a table."""
    notes = []
    if any(best_note(row, metric) for row in table["rows"] for metric in table["metrics"]):
        notes.append("Ours is the last epoch's number, in brackets the best epoch's.")
    if table.get("reported"):
        notes.append(f"The paper reports the {table['reported']} of its epochs.")
    if table.get("device_batch"):
        sizes = ", ".join(table["device_batch"])
        notes.append(f"Batch statistics are of {sizes} images (device_batch); the paper does not say of how many.")
    if any(row["std"] for row in table["rows"]):
        notes.append("Ours: mean ± sample standard deviation over seeds.")
    kinds = {metric["spread"] for metric in table["metrics"] if metric["spread"]}
    if kinds:
        notes.append(f"The paper's ±: {'; '.join(sorted(kinds))}.")
    if any(cell["status"] != "done" for row in table["rows"] for cell in row["cells"]):
        notes.append(f"{X}: the cell failed or has not been trained.")
    if any(
        cell["status"] == "done" and None in cell["metrics"].values() for row in table["rows"] for cell in row["cells"]
    ):
        notes.append(f"{X} in a finished row: there was nothing to measure, such as objects of a size.")
    unverified = {cell["id"] for row in table["rows"] for cell in row["cells"] if cell.get("unverified")}
    if unverified:
        notes.append(f"Unverified: the data of {len(unverified)} cells are not there; their newest results are shown.")
    if table.get("mixed"):
        mixed = ", ".join(table["mixed"])
        notes.append(f"Not to be compared with one another: the rows are of several states of {mixed}.")
    if any(not row["cells"] for row in table["rows"]):
        notes.append("–: only the paper's number is cited.")
    return notes


def differing(table: Mapping[str, Any]) -> list[str]:
    """The settings that are not the table's own at scale=paper, and in which rows where not in all."""
    count = sum(bool(row["cells"]) for row in table["rows"])
    return [
        f"{each['key']} {each['ours']} ({each['paper']})"
        + ("" if len(each["rows"]) == count else f" in {', '.join(each['rows'])}")
        for each in table["differs"]
    ]


# Formats


def _clean(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")


def markdown_grid(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a Markdown table.

    Args:
        lines: The heading's cells, then those of each row.
        left: How many columns are aligned to the left; the others hold numbers.
    """
    cleaned = [[_clean(cell) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in cleaned) for column in range(len(cleaned[0]))]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return [joined(cleaned[0]), joined(rule), *map(joined, cleaned[1:])]


def as_markdown(record: TableRecord, table: Mapping[str, Any]) -> str:
    """The table with its verdicts."""
    ours_best, paper_best = best_rows(table, "mean"), best_rows(table, "paper")
    head = ["row", "networks"]
    for metric in table["metrics"]:
        head += [f"{heading(metric)}: ours", "paper"]
    lines = [head]
    for row in table["rows"]:
        cells = [f"{row['label']} (proposed)" if row["ours"] else row["label"], pair(row)]
        for metric in table["metrics"]:
            key = (row["id"], metric["name"])
            for shown, best in ((ours(row, metric), ours_best), (printed(row, metric), paper_best)):
                cells.append(f"**{shown}**" if key in best else shown)
            cells[-2] += best_note(row, metric)
        lines.append(cells)
    text = [
        f"# {record.name}",
        "",
        f"{record.document['paper']['title']}, {record.title}: {record.table['caption']}.",
        "",
    ]
    text += [f"**{table['banner']}**", "", *markdown_grid(lines, left=2), ""]
    notes = [*filter(None, [record.table.get("expect")]), *spread_notes(table)]
    text += [*notes, ""] if notes else []
    text += [" ".join(life_notes(table)), ""]
    if found := differing(table):
        text += [f"Other than the table's own at scale=paper: {'; '.join(found)}.", ""]
    text += [
        f"- **{each['verdict']}** {each['id']}: {_clean(each['claim'])}. {_clean(each['evidence'])}"
        for each in table["claims"]
    ]
    if note := open_note(table):
        text += ["", f"{note}."]
    return "\n".join(text).rstrip() + "\n"


def as_csv(table: Mapping[str, Any]) -> str:
    """One line per row; X where nothing was measured. With a paper, its numbers and `comparable` are in every line."""
    axes = list(dict.fromkeys(key for row in table["rows"] for key in row["axes"]))
    names = [metric["name"] for metric in table["metrics"]]
    printed = "paper" in table
    own = ("id", "label", "role", "method", "teacher", "student")
    whole = {key: table[key] for key in ("comparable", "scale", "dataset") if key in table}
    columns = [*own, *(["proposed", "differs"] if printed else []), *axes, "seeds", "done"]
    for name in names:
        columns += [f"{name}_mean", f"{name}_std"]
        columns += [f"{name}_paper", f"{name}_paper_spread"] if printed else []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*columns, *whole])
    for row in table["rows"]:
        line = [row[key] for key in own] + ([row["ours"], " ".join(row["differs"])] if printed else [])
        line += [row["axes"].get(key) for key in axes]
        line += [len(row["cells"]), sum(cell["status"] == "done" for cell in row["cells"])]
        for name in names:
            mean = (row["mean"] or {}).get(name)
            line += [(X if row["cells"] else None) if mean is None else mean, (row["std"] or {}).get(name)]
            if printed:
                paper = row["paper"][name]
                line += paper if isinstance(paper, list) else [paper, None]
        writer.writerow([*line, *whole.values()])
    return buffer.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "–": "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def as_latex(record: TableRecord, table: Mapping[str, Any]) -> str:
    """A `table` environment; needs the package booktabs."""
    ours_best, paper_best = best_rows(table, "mean"), best_rows(table, "paper")
    count = len(table["metrics"])
    heads = [rf"\multicolumn{{2}}{{c}}{{{escape_latex(heading(metric))}}}" for metric in table["metrics"]]
    lines = [
        "% Needs \\usepackage{booktabs}.",
        *(f"% other than the table's own at scale=paper: {' '.join(line.split())}" for line in differing(table)),
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape_latex(record.table['caption'])}. {escape_latex(table['banner'])}}}",
        rf"  \begin{{tabular}}{{ll{'rr' * count}}}",
        r"    \toprule",
        f"    & & {' & '.join(heads)} \\\\",
        f"    Row & Networks{' & ours & paper' * count} \\\\",
        r"    \midrule",
    ]
    for row in table["rows"]:
        cells = [escape_latex(row["label"]), escape_latex(pair(row))]
        for metric in table["metrics"]:
            key = (row["id"], metric["name"])
            for text, best in ((ours(row, metric), ours_best), (printed(row, metric), paper_best)):
                shown = escape_latex(text)
                cells.append(rf"\textbf{{{shown}}}" if key in best else shown)
        lines.append(f"    {' & '.join(cells)} \\\\")
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


@functools.lru_cache(maxsize=2)
def template(name: str) -> jinja2.Template:
    """A page's template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["place"] = _place
    return environment.get_template(name)


def shown_number(row: Mapping[str, Any], metric: Mapping[str, Any], best: set[tuple[str, str]]) -> Json:
    """A measured number as a page sets it: value, spread, and whether it is among the best."""
    value, _, spread = ours(row, metric).partition(" ± ")
    marked = (row["id"], metric["name"]) in best
    return {"value": value, "spread": spread, "best": marked, "note": best_note(row, metric)}


def linked_cells(row: Mapping[str, Any], output_root: str | os.PathLike[str], folder: Path) -> list[Json]:
    """A row's cells with where their folders are, seen from the page."""
    return [{**cell, "href": _link(output_root, cell["id"], folder)} for cell in row["cells"]]


def as_html(
    record: TableRecord,
    table: Mapping[str, Any],
    output_root: str | os.PathLike[str],
    folder: Path,
    plots: Sequence[Mapping[str, Any]],
    command: str | None,
) -> str:
    """The page: table, verdicts, curves; one file without outside resources."""
    ours_best, paper_best = best_rows(table, "mean"), best_rows(table, "paper")
    rows = []
    for row in table["rows"]:
        numbers = [
            {
                **shown_number(row, metric, ours_best),
                "paper": printed(row, metric),
                "paper_best": (row["id"], metric["name"]) in paper_best,
            }
            for metric in table["metrics"]
        ]
        rows.append({**row, "numbers": numbers, "cells": linked_cells(row, output_root, folder)})
    return template("table.html.j2").render(
        record=record,
        paper=record.document["paper"],
        table=table,
        rows=rows,
        headings=[heading(metric) for metric in table["metrics"]],
        notes=spread_notes(table),
        differing=differing(table),
        plots=plots,
        tally=tally(table),
        open_note=open_note(table),
        life=life_notes(table),
        facts={
            "scale": table["scale"],
            "dataset": table["dataset"] or "unknown",
            **facts_of(table["rows"], output_root),
        },
        command=command,
    )


def life_notes(table: Mapping[str, Any]) -> list[str]:
    """Whether the table is alive and why, and what its scale can decide."""
    alive = table["alive"]
    return [f"{alive['verdict'].capitalize()}: {alive['evidence']}", *filter(None, [table["reach"]])]


def open_note(table: Mapping[str, Any]) -> str:
    """Which claims more seeds would decide; empty if none."""
    needed = [f"{claim['id']} (about {claim['seeds']})" for claim in table["claims"] if claim["seeds"]]
    return f"More seeds would decide: {', '.join(needed)}; run with seed=0,1,…" if needed else ""


def _place(name: str) -> str:
    """Where a claim is made: `Table 1`, `Figure 5`, `section 3.2`."""
    kind = re.fullmatch(r"(table|figure)(\d+)", name)
    if kind:
        return f"{kind[1].capitalize()} {kind[2]}"
    return name.removeprefix("text ").replace("text_sec", "section ").replace("_", ".")


def _link(output_root: str | os.PathLike[str], cell_id: str, folder: Path) -> str:
    """A cell's folder, seen from the page."""
    return Path(os.path.relpath(folder_of(output_root, cell_id), folder)).as_posix() + "/"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.1f} min"


def facts_of(rows: Sequence[Mapping[str, Any]], output_root: str | os.PathLike[str]) -> dict[str, str]:
    """How many cells of the rows are done and how these were made, where all or any of them say so."""
    every = {cell["id"] for row in rows for cell in row["cells"]}
    ids = sorted({cell["id"] for row in rows for cell in row["cells"] if cell["status"] == "done"})
    results = read_results(output_root, ids).values()
    facts = {"cells": f"{len(ids)} of {len(every)} done"}
    hardware = [result["hardware"] for result in results if isinstance(result.get("hardware"), dict)]
    devices = {name for each in hardware for name in (each.get("gpus") or [each.get("cpu")]) if name}
    if devices:
        facts["device"] = ", ".join(sorted(map(str, devices)))
    seconds = sum(result.get("seconds") or 0 for result in results)
    if seconds:
        facts["training time"] = _duration(seconds)
    waited: dict[str, float] = {}
    for cell_id in every:
        for reason, seconds in read_queue(folder_of(output_root, cell_id)).get("waited", {}).items():
            waited[reason] = waited.get(reason, 0.0) + seconds
    if waited:
        facts["cells waited for"] = ", ".join(f"{reason} {_duration(waited[reason])}" for reason in sorted(waited))
    sizes = {(result.get("train_size"), result.get("test_size")) for result in results}
    if len(sizes) == 1 and all(next(iter(sizes))):
        train, test = next(iter(sizes))
        facts["images"] = f"{train:,} train, {test:,} test"
    commits = {str(result["commit"])[:10] for result in results if result.get("commit")}
    if commits:
        facts["commit"] = ", ".join(sorted(commits))
    return facts


def _write_curves(
    record: TableRecord, table: Mapping[str, Any], output_root: str | os.PathLike[str], folder: Path
) -> list[Json]:
    """Draws the figures into `curves/`, drops older ones, and returns what the page shows of them."""
    ids = {cell["id"] for row in table["rows"] for cell in row["cells"] if cell["status"] == "done"}
    context = Context(record, table["rows"], read_results(output_root, ids), Path(output_root))
    return write_drawings(drawings(context), folder)


def write_drawings(found: Sequence[Drawing], folder: Path) -> list[Json]:
    """Draws figures into `<folder>/curves/`, drops older ones, and returns what the page shows of them."""
    shown, kept = [], set()
    for drawing in found:
        images = []
        for panel in drawing.panels:
            png, svg = plot(panel)
            file = f"{drawing.figure['id']}_{panel.id}.png"
            kept.add(file)
            write_bytes(folder / "curves" / file, png)
            images.append(Markup(svg))
        title = drawing.title or f"Figure {drawing.figure['id'].removeprefix('figure')} of the paper"
        text = {"title": title, "plots": drawing.figure["plots"], "caption": drawing.caption}
        shown.append({**text, "images": images})
    for old in (folder / "curves").glob("*.png"):
        if old.name not in kept:
            old.unlink(missing_ok=True)
    return shown
