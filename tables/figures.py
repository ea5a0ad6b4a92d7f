"""Figures of a page in its folder: each panel as PNG and as CSV, and what the page shows of it."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from kt.files import write_bytes, write_text
from tables.panels import HeatMaps, Panel, as_png, as_svg
from tables.plotting import Drawing, as_csv

Json = dict[str, Any]


def write_drawings(found: Sequence[Drawing], folder: Path) -> list[Json]:
    """Draws figures into `<folder>/curves/`, drops older ones, and returns what the page shows of them."""
    shown, kept = [], set()
    for drawing in found:
        panels = []
        for panel in drawing.panels:
            stem = folder / "curves" / f"{drawing.figure['id']}_{panel.id}"
            files = [Path(f"{stem}.png"), Path(f"{stem}.csv")]
            kept.update(files)
            _write(panel, *files)
            links = {path.suffix[1:]: path.relative_to(folder).as_posix() for path in files}
            panels.append({**shown_panel(panel), "files": links})
        title = drawing.title or f"Figure {drawing.figure['id'].removeprefix('figure')} of the paper"
        shown.append({"title": title, "plots": drawing.figure["plots"], "caption": drawing.caption, "panels": panels})
    for old in (folder / "curves").glob("*.*"):
        if old not in kept:
            old.unlink(missing_ok=True)
    return shown


def shown_panel(panel: Panel | HeatMaps) -> Json:
    """A panel as a page sets it: its `svg`, `title`, and in `legend` the name, colour and kind of each line."""
    legend = []
    if isinstance(panel, Panel):
        kinds = [(line.label, "line") for line in panel.lines] + [(level.label, "level") for level in panel.levels]
        legend = [{"label": label, "number": number, "kind": kind} for number, (label, kind) in enumerate(kinds, 1)]
    return {"title": panel.title, "svg": Markup(as_svg(panel)), "legend": legend, "files": {}}


def _write(panel: Panel | HeatMaps, png: Path, csv: Path) -> None:
    """A panel's files, only if they would be others."""
    digest = hashlib.sha256(pickle.dumps(panel)).hexdigest()
    if not (_shows(png, digest) and csv.exists()):
        write_text(csv, as_csv(panel))
        write_bytes(png, as_png(panel, digest))


def _shows(png: Path, digest: str) -> bool:
    """Whether a picture is of the panel of a digest."""
    try:
        with Image.open(png) as image:
            return bool(image.info.get("Comment") == digest)
    except (OSError, UnidentifiedImageError):
        return False
