"""The page of a cell, in its folder: scores, curves of everything it recorded, classes, pictures, settings, files."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kt.files import read_json, write_text
from kt.settings import shown
from kt.store import evaluation_file, folder_of, outcomes_file, read_evaluation, read_result, read_status, records_file
from tables.curves import Array, read_curve
from tables.figures import shown_panel
from tables.learning import LINES, are_wide, score_line
from tables.pages import (
    CLASS_METRICS,
    PAGE,
    TEMPLATES,
    by_class,
    facts_of,
    link_to_cell,
    link_to_overview,
    pair,
    template,
)
from tables.panels import Line, Panel
from tables.pictures import shown_pictures
from tables.plotting import decay_epoch, mean_line
from tables.records import metric_label

Json = dict[str, Any]

CONFUSED = 20  # classes of a matrix at most; of more the pairs that are taken for one another most often are listed
PAIRS = 15
# Records of one kind, which are drawn together, by what their names begin with; others are alone.
KINDS = ("loss", "weight", "logit", "lr", "accuracy")
UNDRAWN = ("images_per_second",)
ENDED = ("failed", "interrupted", "damaged")
FILES = ("result.json", "config.yaml", "log.txt", "student_config.py")
ACCIDENTAL = ("output_root", "data_root", "wandb", "workers", "table", "evaluation")


def write_cell_pages(output_root: str | os.PathLike[str], cell_ids: Iterable[str]) -> None:
    """Writes the pages of cells that have ended, and of the cells that these needed, where they are out of date."""
    for cell_id in cell_ids:
        folder = folder_of(output_root, cell_id)
        if not _is_stale(folder):
            continue
        result = read_result(folder)
        if result is None and read_status(folder)["status"] not in ENDED:
            continue
        write_cell_pages(output_root, (result or {}).get("needs", {}).values())
        # Results may lie where only others can write.
        with contextlib.suppress(OSError):
            write_text(folder / PAGE, as_page(output_root, cell_id, result))


def _is_stale(folder: Path) -> bool:
    """Whether a cell's page is older than what it tells of, or than what draws it."""
    try:
        written = (folder / PAGE).stat().st_mtime_ns
    except OSError:
        return folder.is_dir()
    told = [path.stat().st_mtime_ns for name in ("result.json", "status.json") if (path := folder / name).exists()]
    return written < max([_drawn_by(), *told])


@functools.cache
def _drawn_by() -> int:
    own = [*Path(__file__).parent.glob("*.py"), *TEMPLATES.glob("*.j2")]
    return max(path.stat().st_mtime_ns for path in own)


def as_page(output_root: str | os.PathLike[str], cell_id: str, result: Mapping[str, Any] | None) -> str:
    """The page of a cell with that result, or of one that has failed."""
    folder = folder_of(output_root, cell_id)
    config = (result or {}).get("config") or _read_config(folder)
    status = {"status": "done"} if result else read_status(folder)
    row = _row(cell_id, config, result or {})
    named = (config.get("table") or {}).get("name")
    facts = {"seed": config.get("seed"), "scale": (config.get("scale") or {}).get("name")}
    facts |= {"dataset": (config.get("dataset") or {}).get("name")}
    if result is None:
        facts["state"] = status["status"]
    else:
        facts |= {key: value for key, value in facts_of([row], output_root).items() if key != "cells"}
        facts["fingerprint of the data"] = (result.get("data") or {}).get("fingerprint")
    rows = [{**row, "label": name, "classes": kept} for name, kept in _classes(folder, result or {}).items()]
    return template("cell.html.j2").render(
        cell_id=cell_id,
        row=row,
        networks=pair(row),
        status=status,
        facts={key: value for key, value in facts.items() if value is not None},
        scores=_scores(folder, result) if result else [],
        panels=[shown_panel(panel) for panel in _panels(folder, result)] if result else [],
        by_class=by_class(rows),
        confused=confusions(*found) if (found := _labels(folder, rows)) else None,
        pictures=shown_pictures([row], output_root) if result else None,
        needs={name: {"id": need, "href": _need(output_root, need, folder)} for name, need in row["needs"].items()},
        settings=dict(_flat({key: value for key, value in config.items() if key not in ACCIDENTAL})),
        files=[name for name in (*FILES, *(result or {}).get("files", ())) if (folder / name).exists()],
        place=folder.as_posix(),
        table=named,
        up=link_to_overview(output_root, folder),
    )


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _row(cell_id: str, config: Mapping[str, Any], result: Mapping[str, Any]) -> Json:
    """A cell as a row of a table."""

    def network(key: str) -> str | None:
        return ((config.get(key) or {}).get("network") or {}).get("name")

    needs = result.get("needs") or {}
    told = config.get("table") or {}
    return {
        "label": told.get("label") or (config.get("method") or {}).get("name") or cell_id,
        "role": told.get("role") or "method",
        "teacher": network("teacher") if "teacher" in needs else None,
        "student": network("student"),
        "ours": True,
        "evaluation": None,
        "needs": needs,
        "cells": [{"id": cell_id, "status": "done" if result else "failed"}],
    }


def _need(output_root: str | os.PathLike[str], need: str, folder: Path) -> str | None:
    """Where a needed cell is; None for a file from outside."""
    return link_to_cell(output_root, need, folder) if folder_of(output_root, need).is_dir() else None


def _scores(folder: Path, result: Mapping[str, Any]) -> list[Json]:
    """Each score: where it is from, what it is, the last epoch's and the best one's."""
    labels, best = result.get("labels") or {}, result.get("best") or {}
    found = [("test", name, value, best.get(name), labels) for name, value in result["metrics"].items()]
    for each in result.get("evaluations") or {}:
        kept = read_evaluation(folder, each) or {}
        found += [(each, name, value, None, kept.get("labels") or {}) for name, value in kept.items()]
    return [
        {"of": of, "name": own.get(name) or metric_label(name), "last": f"{last:.4g}", "best": _four(top)}
        for of, name, last, top, own in found
        if isinstance(last, int | float)
    ]


def _four(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _classes(folder: Path, result: Mapping[str, Any]) -> dict[str, Json]:
    """Evaluation -> scores of each class, where it has them."""
    names = ["test", *(result.get("evaluations") or {})] if result else []
    kept = {name: (read_json(evaluation_file(folder, name)) or {}).get("classes") for name in names}
    return {name: {key: each[key] for key in each if key in CLASS_METRICS} for name, each in kept.items() if each}


# What it recorded


def _panels(folder: Path, result: Mapping[str, Any]) -> list[Panel]:
    """Scores on the test set, then what each phase recorded, records of a kind together."""
    path, found = records_file(folder), []
    for name in list(result["metrics"])[:2]:
        line = score_line("on the test set", [path], name) if path.exists() else None
        if line is not None and len(line.x) > 1:
            label = (result.get("labels") or {}).get(name) or metric_label(name)
            found.append(Panel(f"score_{name}", f"{label[0].upper()}{label[1:]}", [line]))
    phases = list(dict.fromkeys(phase["name"] for phase in result.get("phases") or [])) or ["train"]
    for phase in phases:
        curve = read_curve(path, phase)
        if curve is None:
            continue
        kinds: dict[str, list[Line]] = {}
        for name in curve.values:
            if name not in UNDRAWN and np.isfinite(curve.values[name]).any():
                line = mean_line(name, [curve], lambda curve, name=name: curve.values[name])  # type: ignore[misc]
                kinds.setdefault(_kind(name), []).append(line)
        before = f"{phase}: " if len(phases) > 1 else ""
        for kind, lines in kinds.items():
            for start in range(0, len(lines), LINES):
                some = lines[start : start + LINES]
                part = f" ({start // LINES + 1})" if len(lines) > LINES else ""
                title, wide = f"{before}{kind}{part}", are_wide(some)
                found.append(Panel(f"{phase}_{kind}_{start}", title, some, decay_epoch(curve), log_y=wide))
    return found


def _kind(name: str) -> str:
    """What a record is drawn with: `decode.loss_ce` and `l1` with the losses."""
    own = name.rpartition(".")[2]
    return "loss" if re.fullmatch(r"l\d", own) else next((kind for kind in KINDS if own.startswith(kind)), name)


# What it takes for what


def _labels(folder: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Array, Array, list[str]] | None:
    """(n,) true and (n,) found classes of the test images, and the classes' names; None where they are not kept."""
    names = next((list(row["classes"]["top1"]) for row in rows if "top1" in row["classes"]), None)
    try:
        with np.load(outcomes_file(folder)) as kept:
            return (kept["label"], kept["found"], names) if names and "found" in kept else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def confusions(label: Array, found: Array, names: Sequence[str]) -> Json:
    """What images of each class are taken for.

    Args:
        label, found: (n,) the true class of each test image and the one that was found, as indices of names.
        names: Of the classes.

    Returns:
        Of few classes `names` and `matrix`, whose rows are true classes with the percentage that is taken for each
        class, None without images; of many the most frequent `pairs` of a true class, another one, and the images.
    """
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (label, found), 1)
    if len(names) <= CONFUSED:
        totals = counts.sum(axis=1)
        shares = [[100 * n / total for n in row] if total else None for row, total in zip(counts, totals, strict=True)]
        return {"names": list(names), "matrix": shares, "pairs": []}
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:PAIRS]
    places = zip(*np.unravel_index(order, counts.shape), strict=True)
    pairs = [(names[a], names[b], int(counts[a, b])) for a, b in places if counts[a, b]]
    return {"names": [], "matrix": [], "pairs": pairs}


def _flat(config: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """Every setting that has a value, by its whole key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", shown(value)
