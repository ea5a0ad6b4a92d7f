"""A plot of lines and levels, how it is laid out, and two ways to see it: as SVG in a page, in its colours, and as PNG.

Text is at least 11 pixels high, nothing is cut off, and no label stands over another.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from tables.curves import Array, downsample

INK, GRID = "#374151", "#d1d5db"
# One colour per line; the page has variables for the same ones, which follow its light or dark mode.
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#be123c", "#0e7490")

# The page shows a panel at this width in pixels or wider, so that a unit is a pixel or more.
WIDTH, HEIGHT = 330, 215
TEXT = 11
CHARACTER = 6.6  # width of most characters, in the widest of the page's fonts
LINE = 14  # height of a line of text
FINE = 160  # points of a fine line
MARKED = 30  # points of a bold line at most that are marked
MARGIN, SWATCH = 8, 9  # of the PNG, which also has a title and a legend
SCALE, SMOOTH = 2, 2  # pixels of the PNG a unit, and how many times finer it is drawn


@dataclass(frozen=True)
class Line:
    """A named curve: fine points (x, y) and means of them (means_x, means_y), which may have spreads (n,)."""

    label: str
    x: Array
    y: Array
    means_x: Array
    means_y: Array
    spread: Array | None = None


@dataclass(frozen=True)
class Level:
    """A named value that does not depend on x, with its spread."""

    label: str
    y: float
    spread: float | None


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        id: Names its file.
        title: What is plotted.
        lines: The curves.
        decay: Where on the x axis the learning rate first decays.
        x_label: What the x axis shows.
        levels: Horizontal lines.
        span: A shaded part of the x axis.
        ticks: Values marked on the x axis; logarithmic if all are above 0 and far apart.
        borders: Where phases of the training begin on the x axis, with their names; the last one is the end.
        log_y: Whether the y axis is logarithmic.
    """

    id: str
    title: str
    lines: Sequence[Line]
    decay: float | None = None
    x_label: str = "epoch"
    levels: Sequence[Level] = ()
    span: tuple[float, float] | None = None
    ticks: Sequence[float] = ()
    borders: Sequence[tuple[float, str]] = ()
    log_y: bool = False


@dataclass(frozen=True)
class _Pen:
    width: float = 0.0  # 0: what is drawn is filled
    opacity: float = 1.0
    dashes: tuple[float, float] | None = None


PENS = {
    "span": _Pen(opacity=0.07),
    "grid": _Pen(0.6),
    "mark": _Pen(0.8, 0.6, (4, 3)),
    "band": _Pen(opacity=0.12),
    "level": _Pen(1.6, dashes=(6, 2)),
    "fine": _Pen(0.8, 0.3),
    "bold": _Pen(1.9),
    "dots": _Pen(4.4),
    "bar": _Pen(1.2),
}


@dataclass(frozen=True)
class Stroke:
    """Something drawn with one pen: lines of (n, 2) places each; `number` is of the colour, `name` of what it shows."""

    pen: str
    lines: Sequence[Array]
    number: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Label:
    """A text at a place on its base line, which is its `start`, `middle` or `end`."""

    x: float
    y: float
    text: str
    anchor: str


@dataclass(frozen=True)
class _Axis:
    """Values from low to high at places from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, values: Array | float) -> Array:
        low, high, shown = self.low, self.high, np.asarray(values, dtype=float)
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                low, high, shown = np.log(low), np.log(high), np.log(np.where(shown > 0, shown, np.nan))
        return np.asarray(self.start + (shown - low) / (high - low) * (self.end - self.start))

    def ticks(self, count: int) -> list[float]:
        """Round values on the axis, about so many."""
        if self.log and self.high >= 8 * self.low:
            powers = 10.0 ** np.arange(np.floor(np.log10(self.low)), np.ceil(np.log10(self.high)) + 1)
            factors: tuple[int, ...] = (1,) if self.high > 2000 * self.low else (1, 2, 5)
            found = [float(power * factor) for power in powers for factor in factors]
        else:
            raw = (self.high - self.low) / count
            power = 10.0 ** np.floor(np.log10(raw))
            step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
            first, last = np.ceil(self.low / step - 1e-9), np.floor(self.high / step + 1e-9)
            found = [float(round(number * step, 12)) + 0.0 for number in np.arange(first, last + 1)]
        return [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9) or value == 0]


def _range(parts: Sequence[Array | float], log: bool) -> tuple[float, float]:
    """Lowest and highest of all values that can be shown, apart from one another."""
    values = np.concatenate([np.ravel(part) for part in parts]) if parts else np.zeros(0)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 2.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = (low / 1.5, high * 1.5) if log else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    return low, high


def _pieces(x: Array, y: Array) -> list[Array]:
    """A line's places, apart where there is no value."""
    shown = np.isfinite(x) & np.isfinite(y)
    parts = np.split(np.column_stack([x, y]), np.flatnonzero(~shown))
    # A part begins with what is not shown, but for the first one.
    pieces = (part[np.isfinite(part).all(axis=1)] for part in parts)
    return [piece for piece in pieces if len(piece)]


def _width(text: str) -> float:
    return CHARACTER * len(text)


def _apart(places: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Centred labels without those that would run into the one before."""
    kept: list[tuple[float, str]] = []
    for at, text in sorted(places):
        if not kept or at - _width(text) / 2 > kept[-1][0] + _width(kept[-1][1]) / 2 + 4:
            kept.append((at, text))
    return kept


def _lanes(marks: Sequence[tuple[float, str]], end: float) -> list[tuple[float, str, int]]:
    """Where names that begin at places stand, none over another or past the end: left end, name, line from below."""
    found: list[tuple[float, str, int]] = []
    ends: list[float] = []
    for at, name in marks:
        left = max(0.0, min(at, end - _width(name)))
        lane = next((lane for lane, taken in enumerate(ends) if taken + 6 <= left), len(ends))
        ends[lane:] = [left + _width(name), *ends[lane + 1 :]]
        found.append((left, name, lane))
    return found


def lay_out(panel: Panel) -> tuple[list[Stroke], list[Label]]:
    """Where everything of a panel is, in its drawing order; title and legend are not of it."""
    lines, levels = panel.lines, panel.levels
    spreads = [line.means_y + sign * line.spread for line in lines if line.spread is not None for sign in (-1, 1)]
    bands = [level.y + sign * (level.spread or 0.0) for level in levels for sign in (-1, 1)]
    low, high = _range([part for line in lines for part in (line.y, line.means_y)] + spreads + bands, panel.log_y)
    if panel.log_y:
        low, high = low / 1.1, high * 1.1
    else:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    marks = [(at, name) for at, name in panel.borders[:-1]]
    if panel.decay is not None:
        marks.append((panel.decay, "first decay"))
    bottom = HEIGHT - 2 * LINE - 6.0
    upright = _Axis(low, high, bottom, 0.0, panel.log_y)  # its top follows from the marks, its labels from its ends
    left = 10 + max((_width(f"{tick:g}") for tick in upright.ticks(6)), default=0.0)
    right = WIDTH - 10.0
    if panel.borders:
        across = _Axis(panel.borders[0][0], panel.borders[-1][0], left, right, False)
    else:
        spread_out = bool(panel.ticks) and min(panel.ticks) > 0 and max(panel.ticks) >= 10 * min(panel.ticks)
        start, end = _range([part for line in lines for part in (line.x, line.means_x)] + [*panel.ticks], spread_out)
        room = 0.04 if panel.ticks else 0.0
        ratio = (end / start) ** room if spread_out else 1.0
        start, end = (
            (start / ratio, end * ratio) if spread_out else (start - room * (end - start), end + room * (end - start))
        )
        across = _Axis(start, end, left, right, spread_out)
    named = _lanes([(float(across.at(at)), name) for at, name in marks], WIDTH - 2.0)
    top = 8.0 + LINE * max((lane + 1 for *_, lane in named), default=0)
    upright = _Axis(low, high, bottom, top, panel.log_y)

    strokes, labels = [], []
    if panel.span is not None:
        start, end = across.at(np.array(panel.span))
        strokes.append(Stroke("span", [_box(start, end, top, bottom)]))
    for tick in upright.ticks(6):
        y = float(upright.at(tick))
        strokes.append(Stroke("grid", [np.array([(left, y), (right, y)])]))
        labels.append(Label(left - 5, y + 0.36 * TEXT, f"{tick:g}", "end"))
    for x, text in _apart([(float(across.at(tick)), f"{tick:g}") for tick in panel.ticks or across.ticks(6)]):
        strokes.append(Stroke("grid", [np.array([(x, top), (x, bottom + 3)])]))
        labels.append(Label(min(x, WIDTH - _width(text) / 2), bottom + LINE + 2, text, "middle"))
    labels.append(Label((left + right) / 2, HEIGHT - 4, panel.x_label, "middle"))
    for (at, _), (x, name, lane) in zip(marks, named, strict=True):
        strokes.append(Stroke("mark", [np.array([(across.at(at), top - 4), (across.at(at), bottom)])]))
        labels.append(Label(x, top - 6 - LINE * lane, name, "start"))
    for number, level in enumerate(levels, len(lines) + 1):
        strokes += _level(level, number, across, upright)
    for number, line in enumerate(lines, 1):
        strokes += _line(line, number, across, upright)
    return strokes, labels


def _box(left: float, right: float, top: float, bottom: float) -> Array:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _line(line: Line, number: int, across: _Axis, upright: _Axis) -> list[Stroke]:
    """A line with what its means are of, its points if they are few, and its spreads."""
    strokes = []
    if len(line.x) > len(line.means_x):
        strokes.append(Stroke("fine", _pieces(*downsample(across.at(line.x), upright.at(line.y), FINE)), number))
    x, y = across.at(line.means_x), upright.at(line.means_y)
    pieces = _pieces(x, y)
    strokes.append(Stroke("bold", pieces, number, line.label))
    if len(x) <= MARKED:
        strokes.append(Stroke("dots", [place[None] for piece in pieces for place in piece], number))
    if line.spread is not None:
        ends = np.stack([upright.at(line.means_y + sign * line.spread) for sign in (-1, 1)], axis=1)
        bars = [np.column_stack([[place, place], pair]) for place, pair in zip(x, ends, strict=True)]
        strokes.append(Stroke("bar", [bar for bar in bars if np.isfinite(bar).all()], number))
    return strokes


def _level(level: Level, number: int, across: _Axis, upright: _Axis) -> list[Stroke]:
    """A horizontal line with a band of its spread."""
    strokes, left, right = [], across.start, across.end
    if level.spread:
        below, above = upright.at(np.array([level.y - level.spread, level.y + level.spread]))
        strokes.append(Stroke("band", [_box(left, right, above, below)], number))
    y = float(upright.at(level.y))
    return [*strokes, Stroke("level", [np.array([(left, y), (right, y)])], number, level.label)]


# As SVG


def as_svg(panel: Panel) -> str:
    """The SVG of a panel; its title and the names of its lines are the page's to set."""
    strokes, labels = lay_out(panel)
    parts = [_path(stroke) for stroke in strokes if stroke.lines]
    for label in labels:
        place = f'x="{label.x:.1f}" y="{label.y:.1f}" text-anchor="{label.anchor}"'
        parts.append(f"<text {place}>{html.escape(label.text)}</text>")
    said = html.escape(f"{panel.title}: {', '.join(each.label for each in _named(panel))}")
    return f'<svg role="img" aria-label="{said}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def _named(panel: Panel) -> list[Line | Level]:
    """What a panel's legend names."""
    return [*panel.lines, *panel.levels]


def _path(stroke: Stroke) -> str:
    pen = PENS[stroke.pen]
    words = []
    for line in stroke.lines:
        words.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line))
        words += ["h0"] * (len(line) == 1) + ["Z"] * (not pen.width)
    colour = "var(--rule)" if stroke.pen == "grid" else "currentColor"
    colour = colour if stroke.number is None else f"var(--line-{stroke.number})"
    style = f"stroke-width:{pen.width:g};stroke:{colour}" if pen.width else f"fill:{colour};stroke:none"
    style += f";opacity:{pen.opacity:g}" if pen.opacity < 1 else ""
    style += f";stroke-dasharray:{pen.dashes[0]:g} {pen.dashes[1]:g}" if pen.dashes else ""
    inner = f"<title>{html.escape(stroke.name)}</title>" if stroke.name else ""
    return f'<path style="{style}" d="{"".join(words)}">{inner}</path>'


# As PNG


def as_png(panel: Panel, comment: str = "") -> bytes:
    """The PNG of a panel with its title and legend, on white; `comment` is kept in the file."""
    scale = SCALE * SMOOTH
    plain, bold = _font("DejaVuSans", TEXT * scale), _font("DejaVuSans-Bold", TEXT * scale)
    titles = _flow([(word, bold.getlength(f"{word} ") / scale) for word in panel.title.split()])
    named = _named(panel)
    sizes = [(number, SWATCH + 14 + plain.getlength(each.label) / scale) for number, each in enumerate(named)]
    legend = _flow(sizes)
    down = MARGIN + LINE * len(titles)
    size = (WIDTH + 2 * MARGIN, down + HEIGHT + LINE * len(legend) + MARGIN)
    image = Image.new("RGB", (size[0] * scale, size[1] * scale), "white")
    canvas = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, anchor: str, font: Any) -> None:
        canvas.text(
            (x * scale, y * scale), text, INK, font, anchor={"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        )

    for row, words in enumerate(titles, 1):
        write(MARGIN, LINE * row, " ".join(str(word) for word, _ in words), "start", bold)
    strokes, labels = lay_out(panel)
    for stroke in strokes:
        pen, own = PENS[stroke.pen], GRID if stroke.pen == "grid" else INK
        colour = _on_white(own if stroke.number is None else COLOURS[stroke.number - 1], pen.opacity)
        for line in stroke.lines:
            _draw(canvas, (line + (MARGIN, down)) * scale, pen, colour, scale)
    for label in labels:
        write(label.x + MARGIN, label.y + down, label.text, label.anchor, plain)
    for row, entries in enumerate(legend, 1):
        base = down + HEIGHT + LINE * row - 2
        for number, x in entries:
            box = [(MARGIN + x) * scale, (base - SWATCH) * scale, (MARGIN + x + SWATCH) * scale, base * scale]
            canvas.rectangle(box, COLOURS[number])
            write(MARGIN + x + SWATCH + 4, base, named[number].label, "start", plain)
    file, info = io.BytesIO(), PngInfo()
    info.add_text("Comment", comment)
    image.reduce(SMOOTH).save(file, "png", pnginfo=info)
    return file.getvalue()


def _flow(sizes: Sequence[tuple[Any, float]]) -> list[list[tuple[Any, float]]]:
    """Things of some width in rows that hold them: each with where it begins."""
    rows: list[list[tuple[Any, float]]] = []
    end = 0.0
    for thing, width in sizes:
        if not rows or (end + width > WIDTH and end > 0):
            rows, end = [*rows, []], 0.0
        rows[-1].append((thing, end))
        end += width
    return rows


@functools.cache
def _font(name: str, size: int) -> Any:
    """The font that matplotlib brings, which has all signs, or else Pillow's."""
    spec = importlib.util.find_spec("matplotlib")
    path = Path((spec and spec.origin) or "").parent / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"
    if not path.exists():
        return ImageFont.load_default(size)
    # The other engine is not everywhere, and fails on some signs.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _on_white(colour: str, opacity: float) -> tuple[int, ...]:
    channels = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return tuple(round(255 + opacity * (channel - 255)) for channel in channels)


def _draw(canvas: ImageDraw.ImageDraw, line: Array, pen: _Pen, colour: tuple[int, ...], scale: int) -> None:
    """A line, a dot or a filled area, at places in pixels."""
    width = max(1, round(pen.width * scale))
    places = [(float(x), float(y)) for x, y in line]
    if not pen.width:
        canvas.polygon(places, colour)
    elif len(places) == 1:
        (x, y), radius = places[0], width / 2
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    elif pen.dashes:  # of straight lines only
        start, end = line
        dash, gap = (length * scale for length in pen.dashes)
        length = float(np.hypot(*(end - start))) or 1.0
        for at in np.arange(0.0, length, dash + gap):
            ends = [start + (end - start) * min(1.0, place / length) for place in (at, at + dash)]
            canvas.line([(float(x), float(y)) for x, y in ends], colour, width)
    else:
        canvas.line(places, colour, width, joint="curve")
