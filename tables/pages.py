"""What pages have in common: templates, links to one another, facts about cells, and scores of each class."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from kt.store import folder_of, read_queue, read_results

Json = dict[str, Any]

CLASS_METRICS = {"top1": "Top-1 accuracy (%)", "iou": "IoU (%)", "ap": "AP (%)"}
CLASSES = 100  # that a page shows at most
TEMPLATES = Path(__file__).parent / "templates"
PAGE = "index.html"
SWEEPS = "sweeps"


@functools.cache
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


def linked_cells(row: Mapping[str, Any], output_root: str | os.PathLike[str], folder: Path) -> list[Json]:
    """A row's cells with where their pages are, seen from the page."""
    return [{**cell, "href": link_to_cell(output_root, cell["id"], folder)} for cell in row["cells"]]


def by_class(rows: Sequence[Mapping[str, Any]]) -> list[Json]:
    """What there is of each class, a table for each metric: its `title`, `heads`, `lines`, and what it has in words.

    Of very many classes those are in it whose scores differ most from row to row, or of one row the lowest.
    """
    found = []
    for metric in dict.fromkeys(metric for row in rows for metric in row["classes"]):
        measured = [row for row in rows if metric in row["classes"]]
        names = dict.fromkeys(name for row in measured for name in row["classes"][metric])
        lines = [{"name": name, "values": [row["classes"][metric].get(name) for row in measured]} for name in names]
        told = f"{len(lines)} classes"
        if len(lines) > CLASSES:
            kind = "differ most" if len(measured) > 1 else "are lowest"
            told = f"The {CLASSES} of {len(lines):,} classes whose scores {kind}"
            lines = sorted(lines, key=_interest)[:CLASSES]
        heads = [{"label": row["label"], "network": row["student"] or row["teacher"]} for row in measured]
        found.append({"title": CLASS_METRICS[metric], "heads": heads, "lines": lines, "told": told})
    return found


def _interest(line: Mapping[str, Any]) -> float:
    """Lower for a class that tells more."""
    known = [value for value in line["values"] if value is not None]
    if len(line["values"]) == 1:
        return known[0] if known else 101.0
    return min(known) - max(known) if known else 1.0


def _place(name: str) -> str:
    """Where a claim is made: `Table 1`, `Figure 5`, `section 3.2`."""
    kind = re.fullmatch(r"(table|figure)(\d+)", name)
    if kind:
        return f"{kind[1].capitalize()} {kind[2]}"
    return name.removeprefix("text ").replace("text_sec", "section ").replace("_", ".")


def link_to_cell(output_root: str | os.PathLike[str], cell_id: str, folder: Path) -> str:
    """A cell's page, or its folder where it has none, seen from a page in `folder`."""
    cell = folder_of(output_root, cell_id)
    return relative(cell / PAGE, folder) if (cell / PAGE).exists() else f"{relative(cell, folder)}/"


def link_to_overview(output_root: str | os.PathLike[str], folder: Path) -> str:
    """The page of all results (`tables.overview`), seen from a page in `folder`."""
    return relative(Path(output_root) / PAGE, folder)


def relative(path: Path, folder: Path) -> str:
    """A path as a page in `folder` links to it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def duration(seconds: float) -> str:
    """`2.5 min` or `3.1 h`."""
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
        facts["training time"] = duration(seconds)
    waited: dict[str, float] = {}
    for cell_id in every:
        for reason, seconds in read_queue(folder_of(output_root, cell_id)).get("waited", {}).items():
            waited[reason] = waited.get(reason, 0.0) + seconds
    if waited:
        facts["cells waited for"] = ", ".join(f"{reason} {duration(waited[reason])}" for reason in sorted(waited))
    sizes = {(result.get("train_size"), result.get("test_size")) for result in results}
    if len(sizes) == 1 and all(next(iter(sizes))):
        train, test = next(iter(sizes))
        facts["images"] = f"{train:,} train, {test:,} test"
    commits = {str(result["commit"])[:10] for result in results if result.get("commit")}
    if commits:
        facts["commit"] = ", ".join(sorted(commits))
    return facts


def in_brackets(table: Mapping[str, Any]) -> str:
    """The settings that are not the table's own at its scale, as a heading ends with them."""
    told = ", ".join(f"{key}={','.join(values)}" for key, values in table["settings"].items())
    return f" ({told})" if told else ""


def pair(row: Mapping[str, Any]) -> str:
    """The networks of a row: `resnet50 → mobilenet_v1`."""
    return " → ".join(network for network in (row["teacher"], row["student"]) if network)
