"""The papers: a folder each, found by its `record.yaml`, with `claims.py` and `figures.py` where these are ready."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent


@functools.cache
def known() -> tuple[str, ...]:
    """The papers' keys, as their folders are called."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/record.yaml")))


def part(key: str, name: str) -> ModuleType | None:
    """A paper's own module, `claims` or `figures`; None if it has none."""
    if not (FOLDER / key / f"{name}.py").exists():
        return None
    return importlib.import_module(f"{__name__}.{key}.{name}")
