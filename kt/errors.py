"""Errors that a user can cause and mend."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a command, a config or a data folder; its message is one line and names the cure."""


def nearest(value: object, choices: Iterable[object]) -> str:
    """The hint `` (did you mean 'x'?)`` for the choice most like `value`, or an empty string if none is."""
    names = [str(choice) for choice in choices]
    found = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def needs_mm(what: str) -> None:
    """Refuses what an installation without mmdet and mmseg cannot do.

    Raises:
        UserError: Says how to install them.
    """
    missing = [name for name in ("mmcv", "mmdet", "mmseg") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what}: needs {', '.join(missing)}; install everything with: bash install.sh full")
