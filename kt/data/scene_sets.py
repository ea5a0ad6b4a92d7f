"""Embedded stand-ins for small and for many-domain datasets, drawn with the parts of `kt.data.scenes`.

- kinds: fine differences of proportions, windows and paintwork between vehicles.
- actions: what a person does, by pose and by what is at hand.
- places: whole scenes; what stands in them is the class.
- domains: the crops of `scenes`, of which each style is another set.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kt.data import scenes
from kt.data.images import Drawing, Images, draw_splits
from kt.data.scenes import OBJECTS, PARTS, Part, Subjects
from kt.errors import UserError
from kt.settings import shown

# Drawn together, in balance: sets of a few hundred, and multiples of all numbers of classes.
CHUNK = 120

_WHEELS = PARTS["car"][-2:]


def _windows(y: float, half_height: float, count: int, half_width: float = 0.88) -> tuple[Part, ...]:
    """A row of windows of the same size."""
    pitch = 2 * half_width / count
    return tuple(("box", (i + 0.5) * pitch - half_width, y, 0.36 * pitch, half_height, "glass") for i in range(count))


# Class -> parts and width over height.
_KINDS: dict[str, tuple[tuple[Part, ...], float]] = {
    "city bus": (
        (("box", 0.0, 0.0, 0.97, 0.75, "body"), *_windows(-0.28, 0.22, 4), *_WHEELS),
        2.2,
    ),
    "striped coach": (
        (
            ("box", 0.0, 0.0, 0.97, 0.75, "body"),
            ("box", 0.0, -0.36, 0.93, 0.18, "glass"),
            ("box", 0.0, 0.26, 0.97, 0.16, "white"),
            *_WHEELS,
        ),
        2.2,
    ),
    "double-decker": (
        (
            ("box", 0.0, -0.05, 0.97, 0.85, "body"),
            *_windows(-0.58, 0.17, 4),
            *_windows(0.08, 0.17, 4),
            *_WHEELS,
        ),
        1.5,
    ),
    "single tram": (PARTS["tram"], 2.4),
    "articulated tram": (
        (
            ("box", 0.0, 0.12, 0.97, 0.66, "body"),
            *_windows(-0.08, 0.20, 6, 0.94),
            ("box", -0.33, 0.12, 0.05, 0.66, "dark"),
            ("box", 0.33, 0.12, 0.05, 0.66, "dark"),
            ("box", 0.0, -0.72, 0.03, 0.24, "dark"),
            ("box", 0.0, -0.93, 0.34, 0.04, "dark"),
        ),
        2.4,
    ),
    "heritage tram": (
        (
            ("box", 0.0, 0.30, 0.90, 0.42, "body"),
            ("box", 0.0, -0.20, 0.90, 0.30, "white"),
            *_windows(-0.20, 0.22, 3),
            ("trapezoid", 0.0, -0.60, 0.97, 0.12, "lower"),
            ("box", 0.0, -0.84, 0.03, 0.16, "dark"),
            ("ellipse", 0.0, 0.84, 0.30, 0.15, "dark"),
        ),
        1.6,
    ),
    "box truck": (PARTS["truck"], 1.8),
    "tank truck": (
        (
            ("ellipse", -0.30, 0.10, 0.68, 0.46, "metal"),
            ("box", -0.30, 0.62, 0.66, 0.06, "dark"),
            *PARTS["truck"][1:],
        ),
        1.8,
    ),
    "tipper": (
        (
            ("box", -0.30, 0.58, 0.66, 0.12, "body"),
            ("trapezoid", -0.30, 0.10, 0.66, 0.36, "wood"),
            *PARTS["truck"][1:],
        ),
        1.8,
    ),
    "saloon": (PARTS["car"], 1.9),
    "estate": (
        (
            ("box", 0.0, 0.45, 0.98, 0.28, "body"),
            ("box", -0.30, -0.08, 0.68, 0.34, "body"),
            ("box", -0.62, -0.06, 0.26, 0.20, "glass"),
            ("box", 0.02, -0.06, 0.26, 0.20, "glass"),
            *_WHEELS,
        ),
        1.9,
    ),
    "pickup": (
        (
            ("box", 0.0, 0.45, 0.98, 0.28, "body"),
            ("box", 0.22, -0.08, 0.36, 0.34, "body"),
            ("box", 0.26, -0.06, 0.24, 0.20, "glass"),
            *_WHEELS,
        ),
        1.9,
    ),
}


def _limb(x1: float, y1: float, x2: float, y2: float, role: str) -> Part:
    """An arm or leg between two points."""
    return ("limb", (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2, role)


def _trunk(x: float = 0.0, y: float = 0.0) -> tuple[Part, ...]:
    """Head and body; shoulders at -0.38, hips at 0.2 of the frame that is moved by x and y."""
    return (("box", x, y - 0.10, 0.16, 0.32, "body"), ("ellipse", x, y - 0.66, 0.16, 0.19, "skin"))


_LEGS = (_limb(-0.09, 0.2, -0.10, 0.92, "lower"), _limb(0.09, 0.2, 0.10, 0.92, "lower"))
_ARM_LEFT, _ARM_RIGHT = _limb(-0.20, -0.34, -0.26, 0.24, "skin"), _limb(0.20, -0.34, 0.26, 0.24, "skin")
# Facing right; crops are mirrored at random.
_ACTIONS: dict[str, tuple[Part, ...]] = {
    "standing": (*_LEGS, *_trunk(), _ARM_LEFT, _ARM_RIGHT),
    "cheering": (
        *_LEGS,
        *_trunk(),
        _limb(-0.20, -0.34, -0.48, -0.90, "skin"),
        _limb(0.20, -0.34, 0.48, -0.90, "skin"),
    ),
    "running": (
        _limb(0.0, 0.2, 0.42, 0.42, "lower"),
        _limb(0.42, 0.42, 0.36, 0.86, "lower"),
        _limb(0.0, 0.2, -0.28, 0.62, "lower"),
        _limb(-0.28, 0.62, -0.72, 0.66, "lower"),
        *_trunk(),
        _limb(0.14, -0.34, 0.46, -0.10, "skin"),
        _limb(-0.14, -0.34, -0.46, -0.06, "skin"),
    ),
    "sitting": (
        ("box", -0.20, 0.52, 0.42, 0.06, "wood"),
        ("box", -0.56, 0.15, 0.06, 0.42, "wood"),
        ("box", -0.52, 0.75, 0.06, 0.20, "wood"),
        ("box", 0.12, 0.75, 0.06, 0.20, "wood"),
        _limb(-0.18, 0.42, 0.34, 0.42, "lower"),
        _limb(0.34, 0.42, 0.36, 0.92, "lower"),
        *_trunk(-0.20, 0.16),
        _limb(-0.10, -0.16, 0.26, 0.22, "skin"),
    ),
    "cycling": (
        ("ring", -0.50, 0.62, 0.36, 0.36, "dark"),
        ("ring", 0.50, 0.62, 0.36, 0.36, "dark"),
        _limb(-0.50, 0.62, 0.36, 0.30, "metal"),
        _limb(0.50, 0.62, 0.36, 0.10, "metal"),
        _limb(-0.12, 0.10, 0.16, 0.36, "lower"),
        _limb(0.16, 0.36, 0.02, 0.72, "lower"),
        *_trunk(-0.12, -0.10),
        _limb(-0.02, -0.42, 0.38, 0.02, "skin"),
    ),
    "holding an umbrella": (
        *_LEGS,
        *_trunk(),
        _ARM_LEFT,
        _limb(0.20, -0.34, 0.40, -0.10, "skin"),
        _limb(0.40, -0.10, 0.40, -0.80, "dark"),
        ("trapezoid", 0.30, -0.86, 0.68, 0.14, "red"),
    ),
    "walking a dog": (
        _limb(-0.40, 0.2, -0.58, 0.92, "lower"),
        _limb(-0.30, 0.2, -0.12, 0.92, "lower"),
        *_trunk(-0.35),
        _limb(-0.20, -0.30, 0.06, 0.06, "skin"),
        _limb(0.06, 0.06, 0.56, 0.48, "dark"),
        ("box", 0.52, 0.64, 0.26, 0.11, "wood"),
        ("ellipse", 0.80, 0.48, 0.13, 0.13, "wood"),
        _limb(0.34, 0.70, 0.34, 0.92, "wood"),
        _limb(0.70, 0.70, 0.70, 0.92, "wood"),
    ),
    "playing football": (
        _limb(-0.15, 0.2, -0.20, 0.92, "lower"),
        _limb(-0.10, 0.2, 0.46, 0.58, "lower"),
        *_trunk(-0.14),
        _limb(-0.30, -0.34, -0.66, -0.30, "skin"),
        _limb(0.04, -0.34, 0.36, -0.40, "skin"),
        ("ellipse", 0.74, 0.72, 0.18, 0.18, "white"),
    ),
}

# Class -> what may stand there, with its share.
_PLACES: dict[str, dict[str, float]] = {
    "avenue": {"tree": 7, "car": 3, "person": 1},
    "tram line": {"tram": 5, "person": 4, "tree": 1},
    "crossing": {"traffic light": 5, "car": 3, "person": 3},
    "cycle path": {"cyclist": 6, "tree": 3, "traffic sign": 2},
    "shopping street": {"person": 6, "building": 4},
    "car park": {"car": 7, "traffic sign": 2, "person": 2},
    "bus station": {"bus": 5, "person": 4, "traffic sign": 1},
    "lorry depot": {"truck": 5, "traffic sign": 2, "person": 3},
}

KINDS = Subjects(
    tuple(_KINDS), tuple(parts for parts, _ in _KINDS.values()), tuple(aspect for _, aspect in _KINDS.values())
)
ACTIONS = Subjects(tuple(_ACTIONS), tuple(_ACTIONS.values()), (0.8,) * len(_ACTIONS))
# The domains of DomainNet, as the styles of scenes.
STYLE_OF = {"clipart": "synthetic", "painting": "painting", "real": "photo"}


def _read(
    dataset: Mapping[str, Any], draw: Drawing, names: tuple[str, ...], style: str, seed: int, cache: Path | None
) -> Images:
    return draw_splits(dataset, draw, names, style, seed, cache, (scenes.__file__, __file__))


def _crops_of(subjects: Subjects) -> Drawing:
    return functools.partial(scenes.classification_arrays, chunk=CHUNK, subjects=subjects)


def read_kinds(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Twelve kinds of buses, trams, trucks and cars."""
    return _read(dataset, _crops_of(KINDS), KINDS.names, scenes.check_style(dataset["style"]), 1, cache)


def read_actions(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Persons doing one of eight things."""
    return _read(dataset, _crops_of(ACTIONS), ACTIONS.names, scenes.check_style(dataset["style"]), 2, cache)


def read_places(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Scenes of eight kinds."""
    draw = functools.partial(scenes.place_arrays, mixes=tuple(_PLACES.values()), chunk=CHUNK)
    return _read(dataset, draw, tuple(_PLACES), scenes.check_style(dataset["style"]), 3, cache)


def read_domains(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Crops in the style of one domain; those of another domain are of other scenes."""
    domain = dataset["domain"]
    if domain not in STYLE_OF:
        raise UserError(f"dataset.domain={shown(domain)}: expected one of {', '.join(STYLE_OF)}")
    style = STYLE_OF[domain]
    seed = 100 * (1 + scenes.STYLES.index(style))
    return _read(dataset, scenes.classification_arrays, OBJECTS.names, style, seed, cache)
