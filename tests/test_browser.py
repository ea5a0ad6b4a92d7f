"""Pages as a browser sets them, wide and on a phone: nothing is cut off, too small, or out of reach."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kt.evaluation.outcomes import keep_outcomes
from kt.store import folder_of, outcomes_file, write_status
from results import make_row, write_cell
from tables.cell_page import write_cell_pages
from tables.pages import PAGE
from tables.records import find_table
from tables.render import write_table
from tables.sweeps import write_sweep

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (1300, 390)

# What is wrong with a page in a frame, in words. Whatever is folded is opened first.
MEASURE = """
function wrongs(frame) {
  const found = [], page = frame.contentDocument, view = frame.contentWindow;
  const all = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".unseen"));
  const named = e => `${e.tagName} ${(e.textContent || "").trim().slice(0, 40)}`;
  all.filter(e => e.tagName === "DETAILS").forEach(e => e.open = true);
  const across = page.documentElement.scrollWidth;
  if (across > view.innerWidth) found.push(`the page is ${across} wide`);
  for (const e of all) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (own && !["style", "title"].includes(e.tagName.toLowerCase())) {
      const matrix = e.ownerSVGElement ? e.getScreenCTM() : {a: 1, b: 0};
      const size = parseFloat(view.getComputedStyle(e).fontSize) * Math.hypot(matrix.a, matrix.b);
      if (size < 10.99) found.push(`${named(e)}: ${size} pixels high`);
    }
    const isHidden = ["hidden", "clip"].includes(view.getComputedStyle(e).overflowX);
    if (isHidden && !e.ownerSVGElement && e.scrollWidth > e.clientWidth + 1)
      found.push(`${named(e)}: cut off`);
  }
  for (const svg of page.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(e => [named(e), e.getBoundingClientRect()]);
    texts.forEach(([name, r], i) => {
      if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1)
        found.push(`${name}: outside its figure`);
      for (const [other, o] of texts.slice(i + 1)) {
        const wide = Math.min(r.right, o.right) - Math.max(r.left, o.left);
        const high = Math.min(r.bottom, o.bottom) - Math.max(r.top, o.top);
        if (wide > 1 && high > 3) found.push(`${name}: over ${other}`);
      }
    });
  }
  for (const box of page.querySelectorAll(".scroll")) {
    box.scrollLeft = box.scrollWidth;
    const place = box.getBoundingClientRect();
    for (const row of box.querySelectorAll("tr")) {
      const first = row.querySelector("th:first-child[rowspan], tbody th");
      if (!first || !box.scrollLeft) continue;
      const r = first.getBoundingClientRect();
      if (Math.abs(r.left - place.left - box.clientLeft) > 1.5) found.push(`${named(first)}: scrolled away`);
      if (r.width > place.width / 2) found.push(`${named(first)}: leaves no room`);
    }
  }
  return found;
}
"""


def measured(pages: Sequence[Path], folder: Path) -> dict[str, list[str]]:
    """Page and width -> what is wrong with it, in one call of the browser; skips where there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    frames = "".join(
        f'<iframe id="{page.as_posix()} {width}" src="{page.as_uri()}" style="width:{width}px;height:900px"></iframe>'
        for page in pages
        for width in WIDTHS
    )
    report = "const all = [...document.querySelectorAll('iframe')].map(f => [f.id, wrongs(f)]);"
    report += "const out = document.createElement('pre'); out.textContent = JSON.stringify(all);"
    report += "document.body.replaceChildren(out);"
    script = f"<script>{MEASURE} window.onload = () => {{ {report} }};</script>"
    (folder / "frames.html").write_text(
        f"<!doctype html><meta charset='utf-8'><style>iframe {{border: 0}}</style>{frames}{script}"
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
    command = [browser, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "frames.html").as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    written = re.search("<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert written, f"{done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}"
    found = dict(json.loads(html.unescape(written[1])))
    assert len(found) == len(pages) * len(WIDTHS)
    return found


def records(weights: int = 0, steps: int = 40) -> list[dict[str, Any]]:
    """A training of four epochs whose loss falls far, maybe with weights of long names."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        common = {"kind": "train", "phase": "train", "step": step, "epoch": step / 10, "lr": 0.1 if step < 30 else 0.01}
        named = {f"weight_a_rather_long_layer_name{n}": n / step for n in range(weights)}
        rows.append({**common, "loss": 12345.6 / step**2, "accuracy": 2.0 * step, "balance": 1 / step, **named})
        if step % 10 == 0:
            rows.append(
                {"kind": "eval", "phase": "train", "step": step, "epoch": step // 10, "top1": step, "ap": step / 2}
            )
    return rows


def make_pages(root: Path) -> list[Path]:
    """A wide table, a sweep over long keys, cells that are done and that failed, and the page of all results."""
    name = "coco_retinanet"
    metrics = [metric["name"] for metric in find_table(name).metrics]
    rows = [
        make_row(name, line["id"], (0, 1), label=f"{line['row']} {'and more ' * 4}") for line in find_table(name).rows
    ]
    classes = {f"a class of many words {n}": 10.0 * n for n in range(5)}
    for row in rows[:-1]:
        for cell in row["cells"]:
            scores = {**dict.fromkeys(metrics, 12.34 + cell["seed"]), "ap": 12.0}
            evaluations = {"test": {**scores, "classes": {"ap": classes}}}
            result = {
                "config": {"student": {"network": {"name": "retinanet_resnet50"}}},
                "needs": {},
                "train_size": 1000,
            }
            write_cell(root, cell["id"], scores, records(8 if row is rows[0] else 0), evaluations, **result)
    failed = folder_of(root, rows[-1]["cells"][0]["id"])
    failed.mkdir(parents=True)
    error = "RuntimeError: CUDA out of memory while something_with_a_long_name_without_any_space_was_being_computed"
    write_status(failed, {"status": "failed", "error": error, "host": "here"})
    table = write_table(name, rows, root, "mini", "scenes", "python -m experiments.run +table=coco_retinanet seed=0,1")

    points = []
    for number, value in enumerate((0.001, 0.01, 0.1, 0.12, 0.5, 1.0, 100.0)):
        axes = {"method.temperature": str(value), "schedule.weight_decay": "0.0005"}
        cell = {"id": f"point{number}", "seed": 0}
        config = {"student": {"network": {"name": "resnet20"}}, "table": {"label": "KD with a long label"}}
        top1 = {"top1": {f"class {n}": 10.0 * n for n in range(10)}}
        scores = {"top1": 10.0 + number, "top5": 50.0}
        write_cell(root, cell["id"], scores, records(), {"test": {**scores, "classes": top1}}, config=config, needs={})
        images = {"label": np.arange(50) % 10, "found": np.arange(50) % 7}
        keep_outcomes(outcomes_file(folder_of(root, cell["id"])), images)
        known = {"role": "method", "method": "kd", "teacher": "resnet56", "student": "resnet20", "ours": False}
        points.append(
            {
                "id": f"kd[{value}]",
                "label": "kd",
                **known,
                "printed": None,
                "differs": {},
                "axes": axes,
                "cells": [cell],
            }
        )
    sweep = write_sweep("sweep-1", ["method.temperature", "schedule.weight_decay"], points, root)
    cells = [folder_of(root, cell_id) for cell_id in ("point0", rows[0]["cells"][0]["id"], failed.name)]
    write_cell_pages(root, [folder.name for folder in cells])
    return [folder / PAGE for folder in (table, sweep, *cells, root)]


def test_pages_fit_a_screen_and_a_phone(tmp_path: Path) -> None:
    found = measured(make_pages(tmp_path / "out"), tmp_path)
    assert not {page: wrongs for page, wrongs in found.items() if wrongs}
