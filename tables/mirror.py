"""A rendered table or sweep as a Weights & Biases run of its own, and its name as a tag of its cells' runs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kt.files import checksum, read_json, read_sealed
from kt.needs import WEIGHTS
from kt.store import folder_of, pictures_file
from kt.wandb import MARK, WandbRun, runs_folder, tag_cell, tags_of
from tables.folders import CONTENT
from tables.judging import FAILS, HOLDS, UNKNOWN
from tables.render import pair

logger = logging.getLogger(__name__)

Json = dict[str, Any]

FILES = (CONTENT, "table.md", "table.csv", "table.tex")


def mirror_table(
    folder: Path, output_root: str | os.PathLike[str], settings: Mapping[str, Any], cell_ids: Iterable[str]
) -> None:
    """Mirrors what has been rendered: the cells first, then the table, unless its numbers are those of its run.

    Args:
        folder: Where it has been rendered.
        output_root: Where `cells/` is.
        settings: `mode`, `project` and `entity`, as `kt.wandb.WandbRun` takes them.
        cell_ids: Of the cells that it cites and of those that these need.
    """
    if settings["mode"] == "disabled":
        return
    try:
        _mirror(folder, output_root, settings, cell_ids)
    except OSError as error:  # such as of a file that only another user can read
        logger.warning("Weights & Biases is off for %s: %s", folder, error)


def _mirror(
    folder: Path, output_root: str | os.PathLike[str], settings: Mapping[str, Any], cell_ids: Iterable[str]
) -> None:
    table = read_sealed(folder / CONTENT)
    if not table:
        return
    about = about_table(folder, table)
    group = about["group"]
    if not all(tag_cell(folder_of(output_root, cell_id), settings, group) for cell_id in dict.fromkeys(cell_ids)):
        return  # W&B has failed once, and would for each cell
    mark, numbers = folder / MARK, checksum(folder / CONTENT)
    if (read_json(mark) or {}).get("of") == numbers:
        return
    with _staging(output_root), WandbRun(output_root, settings, about, mark, numbers) as run:
        run.show(lambda: shown(folder, table, output_root))
        run.summarise(summary_of(table))
        run.keep(about["id"], "table", files_of(folder, table, output_root))


@contextlib.contextmanager
def _staging(output_root: str | os.PathLike[str]) -> Iterator[None]:
    """What W&B copies until it is uploaded would otherwise lie in the user's home."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(runs_folder(output_root))
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


def about_table(folder: Path, table: Mapping[str, Any]) -> Json:
    """What W&B is told of a table's run, as `WandbRun` takes it; its group is the tag of its cells' runs."""
    name = table.get("table") or table["sweep"]
    place = [name] if "sweep" in table else [name, folder.name]
    kept = ("paper", "scale", "dataset", "settings", "comparable", "banner", "keys")
    return {
        "id": "-".join(place),
        "name": " ".join(place),
        "group": name,
        "job_type": "table",
        "tags": tags_of([name, table.get("scale")]),
        "config": {key: table[key] for key in kept if key in table},
    }


def results_of(table: Mapping[str, Any]) -> tuple[list[Any], list[list[Any]]]:
    """Columns and lines of the results: a row, its networks, of each metric ours, its spread and the paper's, cells.

    A metric's column is called by its label: what the paper's top-5 is here may be top-2.
    """
    names = [metric["name"] for metric in table["metrics"]]
    columns = ["row", "role", "networks"]
    for label in (metric["label"] for metric in table["metrics"]):
        columns += [label, f"{label} spread", f"{label} paper"]
    lines = []
    for row in table["rows"]:
        line = [row["label"], row["role"], pair(row)]
        for name in names:
            paper = row.get("paper", {}).get(name)
            found = ((row[key] or {}).get(name) for key in ("mean", "std"))
            line += [*found, paper[0] if isinstance(paper, list) else paper]
        lines.append([*line, " ".join(cell["id"] for cell in row["cells"])])
    return [*columns, "cells"], lines


def summary_of(table: Mapping[str, Any]) -> Json:
    """How many claims hold, fail and are unknown, and of how many rows there are numbers."""
    verdicts = [claim["verdict"] for claim in table.get("claims", ())]
    tally = {name: verdicts.count(name) for name in (HOLDS, FAILS, UNKNOWN)}
    return {**tally, "measured": sum(bool(row["mean"]) for row in table["rows"])}


def plain(row_id: str) -> str:
    """A row's id as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", row_id).strip("_")


def figures_of(folder: Path, table: Mapping[str, Any], output_root: str | os.PathLike[str]) -> dict[str, Path]:
    """Name -> image: figures of the page, and of each row what its first student finds in test images."""
    found = {f"figures/{path.stem}": path for path in sorted((folder / "curves").glob("*.png"))}
    for row in table["rows"]:
        done = [cell["id"] for cell in row["cells"] if cell["status"] == "done"][:1]
        for path in (pictures_file(folder_of(output_root, cell_id), row["evaluation"] or "test") for cell_id in done):
            if path.exists():
                found[f"pictures/{plain(row['id'])}"] = path
    return found


def files_of(folder: Path, table: Mapping[str, Any], output_root: str | os.PathLike[str]) -> dict[str, Path]:
    """Name -> file of a table's artifact: its formats and its students."""
    cells = {
        f"students/{plain(row['id'])}-seed{cell['seed']}.pth": cell for row in table["rows"] for cell in row["cells"]
    }
    students = {name: folder_of(output_root, cell["id"]) / WEIGHTS for name, cell in cells.items()}
    files = {name: folder / name for name in FILES}
    return {name: path for name, path in {**files, **students}.items() if path.exists()}


def shown(folder: Path, table: Mapping[str, Any], output_root: str | os.PathLike[str]) -> Json:
    """What a table's run shows, as W&B's own types."""
    import wandb

    columns, lines = results_of(table)
    found: Json = {
        "results": wandb.Table(columns, lines),
        "page": wandb.Html((folder / "index.html").read_text(encoding="utf-8")),
        **{name: wandb.Image(str(path)) for name, path in figures_of(folder, table, output_root).items()},
    }
    if "claims" in table:
        heads: list[Any] = ["id", "claim", "verdict", "evidence"]
        found["verdicts"] = wandb.Table(heads, [[claim[head] for head in heads] for claim in table["claims"]])
    return found
