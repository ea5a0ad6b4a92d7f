"""Renders a table as Markdown, CSV, TeX, JSON and HTML."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tables.collect import Row, best_rows, collect
from tables.curves import draw
from tables.records import find

TEMPLATES = Path(__file__).parent / "templates"


def banner(table: Mapping[str, Any]) -> str:
    """In words, whether the numbers may be compared with the printed ones."""
    if table["comparable"]:
        return "Same dataset and settings as printed: the numbers can be compared."
    reason = {
        "mini": "scale=mini shortens training to minutes, and on the embedded data also slims the networks",
        "fast": "scale=fast shortens the schedule",
    }.get(table["scale"], "the dataset is not the paper's")
    return f"These numbers are NOT comparable with the printed ones: {reason} (dataset: {table['dataset']})."


def ours(row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """Our number of a row: mean, with the standard deviation over seeds, or X."""
    name, decimals = metric["name"], metric["decimals"] or 2
    if not row["cells"]:
        return "-"
    if not row["mean"] or name not in row["mean"]:
        return "X"
    text = f"{row['mean'][name]:.{decimals}f}"
    if row["std"] and name in row["std"]:
        text += f" ± {row['std'][name]:.{decimals}f}"
    missing = sum(cell["status"] != "done" for cell in row["cells"])
    return f"{text} ({missing} X)" if missing else text


def printed(row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """The paper's number of a row."""
    value, decimals = row["paper"][metric["name"]], metric["decimals"] or 2
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{value[0]:.{decimals}f} ± {value[1]:.{decimals}f}"
    return f"{value:.{decimals}f}"


def grid(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: ours and printed, side by side for every metric."""
    header = ["row", "teacher", "student"]
    for metric in table["metrics"]:
        arrow = "↑" if metric["better"] == "higher" else "↓"
        header += [f"{metric['label']} {arrow} ours", f"{metric['name']} printed"]
    best = {metric["name"]: best_rows(table, metric) for metric in table["metrics"]}
    lines = []
    for row in table["rows"]:
        line = [row["label"], row["teacher"] or "-", row["student"] or "-"]
        for metric in table["metrics"]:
            own = ours(row, metric)
            line += [f"**{own}**" if row["id"] in best[metric["name"]] else own, printed(row, metric)]
        lines.append(line)
    return header, lines


def markdown(table: Mapping[str, Any]) -> str:
    """The table, its banner and the verdicts as Markdown."""
    header, lines = grid(table)
    title = find(table["table"]).table["caption"]
    text = [f"# {table['table']}", "", f"{title}.", "", f"> {banner(table)}", ""]
    text += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]
    text += ["", "| claim | verdict | evidence |", "| --- | --- | --- |"]
    text += [f"| {c['id']}: {c['claim']} | {c['verdict']} | {c['evidence']} |" for c in table["claims"]]
    return "\n".join(text) + "\n"


def comma_separated(table: Mapping[str, Any]) -> str:
    """One line per row and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(
        ["row", "label", "role", "teacher", "student", "metric", "mean", "std", "seeds", "printed", "comparable"]
    )
    for row in table["rows"]:
        for metric in table["metrics"]:
            name = metric["name"]
            value = row["paper"][name]
            mean, std = ((row[key] or {}).get(name, "") for key in ("mean", "std"))
            seeds = sum(cell["status"] == "done" for cell in row["cells"])
            fixed = [row[key] or "" for key in ("id", "label", "role", "teacher", "student")]
            value = "" if value is None else value[0] if isinstance(value, list) else value
            mean = mean if mean != "" or not row["cells"] else "X"
            writer.writerow([*fixed, name, mean, std, seeds, value, table["comparable"]])
    return buffer.getvalue()


def tex(table: Mapping[str, Any]) -> str:
    """A booktabs tabular with the banner as a comment."""

    def escape(text: str) -> str:
        for old, new in (
            ("&", r"\&"),
            ("%", r"\%"),
            ("_", r"\_"),
            ("±", r"$\pm$"),
            ("↑", r"$\uparrow$"),
            ("↓", r"$\downarrow$"),
        ):
            text = text.replace(old, new)
        return text[2:-2].join((r"\textbf{", "}")) if text.startswith("**") else text

    header, lines = grid(table)
    text = [f"% {banner(table)}", r"\begin{tabular}{lll" + "r" * (len(header) - 3) + "}", r"\toprule"]
    text += [" & ".join(map(escape, header)) + r" \\", r"\midrule"]
    text += [" & ".join(map(escape, line)) + r" \\" for line in lines]
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"


def html(table: Mapping[str, Any], output_root: Path) -> str:
    """A page without any outside resource."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    found = find(table["table"])
    return environment.get_template("index.html.j2").render(
        table=table,
        paper=found.record["paper"],
        caption=found.table["caption"],
        banner=banner(table),
        ours=ours,
        printed=printed,
        best={metric["name"]: best_rows(table, metric) for metric in table["metrics"]},
        curves=draw(table, output_root),
    )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def folder_of(output_root: Path, name: str, scale: str) -> Path:
    """Where a table's renderings lie."""
    return output_root / "tables" / name / scale


def write_table(name: str, rows: Sequence[Row], output_root: str | Path, scale: str, dataset: str) -> Path:
    """Collects the results and writes every rendering, and the rows themselves so that it can be done again.

    Returns:
        The folder with `table.md .csv .tex .json`, `index.html` and `rows.json`.
    """
    root = Path(output_root)
    folder = folder_of(root, name, scale)
    folder.mkdir(parents=True, exist_ok=True)
    table = collect(name, rows, root, scale, dataset)
    _write(folder / "rows.json", json.dumps({"rows": list(rows), "scale": scale, "dataset": dataset}, indent=2) + "\n")
    _write(folder / "table.json", json.dumps(table, indent=2) + "\n")
    _write(folder / "table.md", markdown(table))
    _write(folder / "table.csv", comma_separated(table))
    _write(folder / "table.tex", tex(table))
    _write(folder / "index.html", html(table, root))
    return folder
