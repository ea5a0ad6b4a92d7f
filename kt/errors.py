"""Errors that are told in one line."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a command, a config or a data folder; its message is one line and names the cure."""


class Parser(argparse.ArgumentParser):
    """A parser of a command's arguments, whose errors are users' mistakes like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class Failure(RuntimeError):
    """What went wrong without a mistake of the user's, in one line; what is done by then is kept."""


class DiskFull(Failure):
    """There is no space left where something had to be written."""

    def __init__(self, place: object):
        super().__init__(f"no space left on {place}: make some, and the same command goes on from here")


_NO_MEMORY = re.compile(
    "allocate memory|out of memory|bad_alloc|could not create a (memory|primitive)|array is too big|maximum allowed",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whichever library, is that there is no memory left."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


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
