"""What all pictures of a page share: their style, and how a figure becomes a PNG and an SVG that follows the page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping
from typing import Any

INK, GRID = "#374151", "#d1d5db"


def style_of(picture: str) -> dict[Any, Any]:
    """Settings of matplotlib for one picture; its name makes the SVG's own names unique and repeatable."""
    return {
        "font.size": 9.5,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": picture,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def export(figure: Any, description: str, variables: Mapping[str, str]) -> tuple[bytes, str]:
    """A figure as PNG and as SVG to set into a page: no prolog, no metadata, no fixed size, colours of the page.

    Args:
        figure: Of matplotlib.
        description: What a screen reader says.
        variables: Colour -> CSS variable that takes its place, besides those of text and grid.
    """
    png, text = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=144, facecolor="white")
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
    for colour, variable in {**variables, INK: "currentColor", GRID: "var(--rule)"}.items():
        svg = svg.replace(colour, variable)
    return png.getvalue(), re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg).strip()
