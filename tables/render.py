"""Renders a table as Markdown, CSV, LaTeX, JSON and a page, with the printed numbers beside ours."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kt.files import sealed, write_text
from kt.store import folder_of, read_results, records_file
from tables.cell_page import write_cell_pages
from tables.collect import SYNONYMS, collect
from tables.figures import write_drawings
from tables.folders import CONTENT, ROWS, rendering, table_folder
from tables.judging import Context, tally
from tables.learning import LINES, Learner, learning_curves
from tables.overview import write_overview
from tables.pages import by_class, facts_of, in_brackets, link_to_overview, linked_cells, pair, template
from tables.pictures import shown_pictures
from tables.plotting import drawings
from tables.records import TableRecord, find_table, metric_label

Json = dict[str, Any]

X = "X"
ARROWS = {"higher": "↑", "lower": "↓"}


def write_table(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    output_root: str | os.PathLike[str],
    scale: str,
    dataset: str,
    command: str | None = None,
    settings: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Collects and renders a table into its folder (`tables.folders`).

    Args:
        name: The table's name.
        rows: As `tables.collect.collect` takes them.
        output_root: Where `cells/` is.
        scale: The scale of the run.
        dataset: The run's dataset.
        command: What made the results; by default this process's command line if it is a run.
        settings: Key -> values of the run's settings that are not the table's own at the scale.

    Returns:
        The folder.

    Raises:
        UserError: There is no such table.
        NotWritten: The folder cannot be written.
    """
    record = find_table(name)
    command = command or own_command()
    table = collect(name, rows, output_root, scale, dataset, settings)
    folder = table_folder(output_root, name, scale, settings)
    stored = {"rows": list(rows), "scale": scale, "dataset": dataset, "command": command, "settings": settings or {}}
    with rendering(folder, as_markdown(record, table)):
        write_cell_pages(output_root, (cell["id"] for row in table["rows"] for cell in row["cells"]))
        plots = _write_curves(record, table, output_root, folder)
        page = as_html(record, table, output_root, folder, plots, command)
        texts = {"table.csv": as_csv(table), "table.tex": as_latex(record, table)}
        texts |= {ROWS: as_json(sealed(stored)), CONTENT: as_json(sealed(table)), "index.html": page}
        for file, text in texts.items():
            write_text(folder / file, text)
    with contextlib.suppress(OSError):  # of all results, among which it stands without being listed
        write_overview(output_root)
    return folder


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
    best = set()
    for metric in table["metrics"]:
        found: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in table["rows"]:
            value = (row[source] or {}).get(metric["name"])
            if row["role"] == "teacher" or value is None:
                continue
            axes = tuple(item for item in row["axes"].items() if not item[0].startswith("method"))
            score = value[0] if isinstance(value, list) else value
            found.setdefault((row["student"], axes), {})[row["id"]] = score
        for scores in found.values():
            best |= {(row_id, metric["name"]) for row_id in best_of(scores, metric)}
    return best


def best_of(scores: Mapping[str, float], metric: Mapping[str, Any]) -> set[str]:
    """Who has the best score as it is shown; nobody where all have the same, such as nothing at all."""
    shown = {name: round(score, metric["decimals"]) for name, score in scores.items()}
    if len(set(shown.values())) < 2:
        return set()
    top = (max if metric["better"] == "higher" else min)(shown.values())
    return {name for name, score in shown.items() if score == top}


def heading(metric: Mapping[str, Any]) -> str:
    """`top-1 accuracy (%) ↑`."""
    unit = {"percent": " (%)", None: ""}.get(metric["unit"], f" ({metric['unit']})")
    if metric["label"] == metric["unit"]:
        unit = ""
    return f"{metric['label']}{unit} {ARROWS[metric['better']]}"


def title_of(record: TableRecord, table: Mapping[str, Any]) -> str:
    """The paper's caption where networks and data are the paper's, else what they are."""
    if not any(re.search(r"\b(dataset|network)\.name$", each["key"]) for each in table["differs"]):
        return str(record.table["caption"])
    pairs = list(dict.fromkeys(pair(row) for row in table["rows"] if row["teacher"] and row["student"]))
    networks = f"{len(pairs)} pairs of networks" if len(pairs) > 2 else " and ".join(pairs) or "networks alone"
    return f"{record.title} with {networks} on {table['dataset']}"


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


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in one line, also in a cell of a table."""
    return re.sub(r"[\\`*<\[\]|]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))


def markdown_grid(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a Markdown table.

    Args:
        lines: The heading's cells, then those of each row, in Markdown.
        left: How many columns are aligned to the left; the others hold numbers.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return [joined(lines[0]), joined(rule), *map(joined, lines[1:])]


def as_markdown(record: TableRecord, table: Mapping[str, Any]) -> str:
    """The table with its verdicts."""
    ours_best, paper_best = best_rows(table, "mean"), best_rows(table, "paper")
    head = ["row", "networks"]
    for metric in table["metrics"]:
        head += [escape_markdown(f"{heading(metric)}: ours"), "paper"]
    lines = [head]
    for row in table["rows"]:
        named = f"{row['label']} (proposed)" if row["ours"] else row["label"]
        cells = [*map(escape_markdown, (named, pair(row)))]
        for metric in table["metrics"]:
            key = (row["id"], metric["name"])
            for shown, best in ((ours(row, metric), ours_best), (printed(row, metric), paper_best)):
                cells.append(f"**{shown}**" if key in best else shown)
            cells[-2] += best_note(row, metric)
        lines.append(cells)
    place = escape_markdown(f"{record.document['paper']['title']}, {record.title}")
    title, caption = map(escape_markdown, (title_of(record, table), record.table["caption"]))
    text = [
        f"# {escape_markdown(record.name + in_brackets(table))}",
        "",
        f"{place}: {caption}." if title == caption else f'{title}. After {place}: "{caption}".',
        "",
    ]
    text += [f"**{escape_markdown(table['banner'])}**", "", *markdown_grid(lines, left=2), ""]
    notes = [*filter(None, [record.table.get("expect")]), *spread_notes(table)]
    text += [*map(escape_markdown, notes), ""] if notes else []
    text += [escape_markdown(" ".join(life_notes(table))), ""]
    if found := differing(table):
        text += [escape_markdown(f"Other than the table's own at scale=paper: {'; '.join(found)}."), ""]
    for claim in table["claims"]:
        told = escape_markdown("{id}: {claim}. {evidence}".format_map(claim))
        text.append(f"- **{claim['verdict']}** {told}")
    if note := open_note(table):
        text += ["", f"{escape_markdown(note)}."]
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
    writer.writerow(map(_no_formula, (*columns, *whole)))
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
        writer.writerow(map(_no_formula, (*line, *whole.values())))
    return buffer.getvalue()


def _no_formula(value: Any) -> Any:
    """A value of a CSV file that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: f"{{{sign}}}" for sign in "[]*"},  # or a line's end before them takes them for its own
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is, in one line."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


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
        rf"  \caption{{{escape_latex(title_of(record, table) + in_brackets(table))}. {escape_latex(table['banner'])}}}",
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


def shown_number(row: Mapping[str, Any], metric: Mapping[str, Any], best: set[tuple[str, str]]) -> Json:
    """A measured number as a page sets it: value, spread, and whether it is among the best."""
    value, _, spread = ours(row, metric).partition(" ± ")
    marked = (row["id"], metric["name"]) in best
    return {"value": value, "spread": spread, "best": marked, "note": best_note(row, metric)}


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
        title=title_of(record, table),
        settings=in_brackets(table),
        headings=[heading(metric) for metric in table["metrics"]],
        notes=spread_notes(table),
        differing=differing(table),
        plots=plots,
        pictures=shown_pictures(table["rows"], output_root),
        by_class=by_class(table["rows"]),
        tally=tally(table),
        open_note=open_note(table),
        life=life_notes(table),
        facts={
            "scale": table["scale"],
            "dataset": table["dataset"] or "unknown",
            **facts_of(table["rows"], output_root),
        },
        command=command,
        up=link_to_overview(output_root, folder),
    )


def life_notes(table: Mapping[str, Any]) -> list[str]:
    """Whether the table is alive and why, and what its scale can decide."""
    alive = table["alive"]
    return [f"{alive['verdict'].capitalize()}: {alive['evidence']}", *filter(None, [table["reach"]])]


def open_note(table: Mapping[str, Any]) -> str:
    """Which claims more seeds would decide; empty if none."""
    needed = [f"{claim['id']} (about {claim['seeds']})" for claim in table["claims"] if claim["seeds"]]
    return f"More seeds would decide: {', '.join(needed)}; run with seed=0,1,…" if needed else ""


def _write_curves(
    record: TableRecord, table: Mapping[str, Any], output_root: str | os.PathLike[str], folder: Path
) -> list[Json]:
    """Draws the paper's figures and learning curves into `curves/`, and returns what the page shows of them."""
    ids = {cell["id"] for row in table["rows"] for cell in row["cells"] if cell["status"] == "done"}
    context = Context(record, table["rows"], read_results(output_root, ids), Path(output_root))
    scores = {SYNONYMS.get(each["name"], each["name"]): heading(each)[:-2] for each in table["metrics"]}
    rows = [row for row in table["rows"] if row["cells"]]
    groups = ["teachers" if row["role"] == "teacher" else row["student"] for row in rows]
    if len(rows) <= LINES:
        groups = [""] * len(rows)
    learners = [Learner(row["label"], done_records(row, output_root), of) for row, of in zip(rows, groups, strict=True)]
    learning = learning_curves(learners, {**scores, "top1": f"{metric_label('top1')} (%)"}, "Learning curves")
    return write_drawings([*drawings(context), *([learning] if learning else [])], folder)


def done_records(row: Mapping[str, Any], output_root: str | os.PathLike[str]) -> list[Path]:
    """The records of a row's finished cells."""
    return [records_file(folder_of(output_root, cell["id"])) for cell in row["cells"] if cell["status"] == "done"]
