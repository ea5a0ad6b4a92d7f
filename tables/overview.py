"""`<output_root>/index.html`: how all tables and sweeps stand, quickly written, so that a long run can be watched.

It looks at which results there are, not into them: what a page says of verdicts is of when that page was written.
"""

from __future__ import annotations

import functools
import html
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kt.errors import UserError
from kt.files import read_sealed, write_text
from kt.store import folder_of, glance
from tables import papers
from tables.folders import CONTENT, ROWS
from tables.judging import tally
from tables.pages import PAGE, SWEEPS, in_brackets, relative, template
from tables.records import find_table, load_paper

Json = dict[str, Any]

EVERY = 20  # seconds after which the page of a run that goes on loads itself again
# What is counted, in the order of a bar, and where else a cell's state belongs.
STATES = ("done", "running", "failed", "missing")
OTHERS = {"interrupted": "failed", "damaged": "failed", "unscored": "missing", "queued": "missing"}
BARS = 48  # a thumbnail's at most


def write_overview(output_root: str | os.PathLike[str], running: Collection[str] | None = None) -> Path:
    """Writes the page of all results; returns its path.

    Args:
        output_root: Where results are.
        running: Ids of cells that a run has started and that have not ended, even if their folders do not say so yet;
            a browser is to look again for what that run will write. None without a run.

    Raises:
        OSError: It cannot be written.
    """
    root = Path(output_root)
    page = root / PAGE
    entries = [
        entry
        for folder in _folders(root, "tables", "*/*")
        if (entry := _table(root, folder, running or ())) is not None
    ]
    sweeps = [_sweep(root, folder, running or ()) for folder in _folders(root, SWEEPS, "*")]
    known = {entry["name"] for entry in entries}
    sections = []
    for key in sorted(papers.known(), key=lambda key: load_paper(key)["paper"]["order"]):
        document = load_paper(key)
        names = [table["name"] for table in document["tables"]]
        own = [entry for name in names for entry in entries if entry["name"] == name]
        runnable = [name for name in names if name not in known and name in papers.table_files()]
        if own or runnable:
            sections.append({"title": document["paper"]["title"], "entries": own, "missing": runnable})
    cells: dict[Any, str] = {}  # each once, however many tables have it
    for entry in (*entries, *sweeps):
        cells |= entry["cells"]
    states = Counter(cells.values())
    claims = [claim for entry in entries for claim in entry["claims"]]
    facts = {"tables": f"{len(known)} of {len(known) + sum(len(each['missing']) for each in sections)}"}
    facts |= {"sweeps": str(len(sweeps))} if sweeps else {}
    text = template("overview.html.j2").render(
        sections=sections,
        sweeps=sweeps,
        states=_told(states),
        tally=tally({"claims": claims}),
        facts=facts,
        every=EVERY if running is not None or states["running"] else None,
    )
    write_text(page, text)
    return page


def _folders(root: Path, kind: str, pattern: str) -> list[Path]:
    return sorted(path.parent for path in (root / kind).glob(f"{pattern}/{ROWS}"))


def _table(root: Path, folder: Path, running: Collection[str]) -> Json | None:
    """What the page shows of a rendering; None if no paper has the table any more, or its rows cannot be read."""
    stored, table = _kept(folder / ROWS), _kept(folder / CONTENT)
    try:
        record = find_table(folder.parent.name)
    except UserError:
        return None
    if not {"rows", "scale"} <= stored.keys():
        return None
    told = {
        "name": record.name,
        "place": record.title,
        "scale": stored["scale"],
        "settings": in_brackets({"settings": stored.get("settings") or {}}),
        "caption": record.table["caption"],
        "claims": table.get("claims", []),
        "tally": tally({"claims": table.get("claims", [])}),
        "alive": (table.get("alive") or {}).get("verdict"),
        "comparable": bool(table.get("comparable")),
    }
    return {**told, **_seen(root, folder, stored["rows"], table, running)}


def _sweep(root: Path, folder: Path, running: Collection[str]) -> Json:
    """What the page shows of a sweep."""
    stored = _kept(folder / ROWS)
    keys = ", ".join(stored.get("keys") or ["seed"])
    return {
        "name": folder.name,
        "keys": keys,
        **_seen(root, folder, stored.get("points", []), _kept(folder / CONTENT), running),
    }


def _seen(
    root: Path, folder: Path, rows: Sequence[Mapping[str, Any]], table: Mapping[str, Any], running: Collection[str]
) -> Json:
    """Where a page is, how its cells stand, and its main score in small."""
    found: dict[tuple[str, str | None], str] = {}
    for row in rows:
        asked = row.get("evaluation")
        own = {(cell["id"], asked): glance(folder_of(root, cell["id"]), asked) for cell in row["cells"]}
        own |= {key: "running" for key in own if key[0] in running}
        if not row.get("optional") or {"done", "running", "failed", "interrupted"} & {*own.values()}:
            found |= own
    cells = {key: OTHERS.get(state, state) for key, state in found.items()}
    page = folder / PAGE
    return {
        "href": relative(page, root) if page.exists() else None,
        "cells": cells,
        "told": _told(Counter(cells.values())),
        "thumbnail": _thumbnail(table),
    }


def _told(states: Mapping[str, int]) -> list[Json]:
    """How many cells are in each state, and which part of all that is, in percent."""
    total = sum(states.values())
    return [
        {"state": state, "count": states[state], "total": total, "share": 100 * states[state] / total}
        for state in STATES
        if states.get(state)
    ]


def _kept(path: Path) -> Json:
    """A file that was read before is not read again as long as it is the same."""
    try:
        stat = path.stat()
    except OSError:
        return {}
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=512)
def _parsed(path: Path, modified: int, size: int) -> Json:
    try:
        return read_sealed(path) or {}
    except UserError:  # another user's
        return {}


def _thumbnail(table: Mapping[str, Any]) -> Markup | None:
    """The rows' first score as bars, those of the paper's own method marked; None without scores."""
    metric = next(iter(table.get("metrics", ())), None)
    if metric is None:
        return None
    rows = [row for row in table["rows"] if row["cells"]][:BARS]
    values = [(row["mean"] or {}).get(metric["name"]) for row in rows]
    top = max((value for value in values if value is not None), default=0.0)
    if top <= 0:
        return None
    width = 240 / len(rows)
    bars = []
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        kind = "own" if row.get("ours") else row["role"] if row["role"] in ("teacher", "baseline") else "other"
        height = 40 * max(value or 0.0, 0.0) / top
        box = f'x="{number * width:.1f}" y="{42 - height:.1f}" width="{max(1.0, width - 2):.1f}" height="{height:.1f}"'
        shown = "X" if value is None else f"{value:.{metric['decimals']}f}"
        bars.append(f'<rect class="{kind}" {box}><title>{html.escape(row["label"])}: {shown}</title></rect>')
    said = html.escape(f"{metric['label']} of {len(rows)} rows, at most {top:.{metric['decimals']}f}")
    box = 'viewBox="0 0 240 42" preserveAspectRatio="none"'
    return Markup(f'<svg class="thumb" role="img" aria-label="{said}" {box}>{"".join(bars)}</svg>')
