"""Drawn images kept on disk, so that cells side by side and one after the other draw them once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from kt.files import replacing

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray]


def drawn(cache: Path | None, name: str, code: Iterable[str], draw: Callable[[], Arrays]) -> Arrays:
    """Drawn images, see `kept`, under a name that changes with the code that draws them.

    Args:
        cache: The folder; None: nothing is kept.
        name: Of the file, after all else that decides its content.
        code: The source files of that code.
        draw: Makes the arrays.
    """
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in code)).hexdigest()[:8]
    return kept(cache and cache / f"{name}-{digest}.npz", draw)


def kept(path: Path | None, draw: Callable[[], Arrays]) -> Arrays:
    """Arrays by name from a file, drawn and put there first if it does not hold them; one process draws, others wait.

    Args:
        path: The file, an uncompressed `.npz` named after all that decides its content; None: nothing is kept.
        draw: Makes the arrays.
    """
    if path is None:
        return draw()
    found = _read(path)
    if found is not None:
        return found
    with contextlib.suppress(OSError):  # a disk that is full, or a cache that is another user's
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _read(path)
            if found is None:
                if path.exists():
                    logger.warning("%s is damaged: its images are drawn again", path)
                found = draw()
                with replacing(path) as file:
                    np.savez(file, **found)  # type: ignore[arg-type]
    return draw() if found is None else found


def _read(path: Path) -> Arrays | None:
    """The arrays of a file; None if it is not there or damaged, which the archive's own checksums tell."""
    try:
        with open(path, "rb") as file, np.load(file) as stored:  # numpy leaves a damaged file open
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
