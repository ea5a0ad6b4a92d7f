"""Files that readers see whole: what is written takes the old file's place at once, or not at all.

A file can also say whether it still is what was written: JSON with its checksum inside, any file with one at its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path, before: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to, in the same folder, that takes the place of `path` at the end, once it is on the disk.

    Whatever goes wrong in between, `path` stays as it was. For all that writes by itself (`torch.save`, `numpy.savez`).

    Args:
        path: The file.
        before: Where the old file goes instead of away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, before)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a new name is not on the disk before its folder is
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """A file with that content."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """A file with that text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """A file with that content as JSON, for people to read as well."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None if there is no such file, an empty one if the file holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


# Names


def find(root: Path, pattern: str) -> Iterator[Path]:
    """What matches a pattern of `Path.glob` below a folder, but for what is hidden unless the pattern names it.

    `**` follows links too, but none into a folder that it is in.
    """
    top, deep, rest = pattern.partition("**/")
    if not deep:
        yield from _visible(root, pattern)
        return
    for start in _visible(root, top) if top else (root,):
        for folder in _folders(start):
            yield from _visible(folder, rest)


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    forms = PurePath(pattern).parts
    for path in folder.glob(pattern):
        parts = path.parts[-len(forms) :]
        if all(form.startswith(".") or not part.startswith(".") for form, part in zip(forms, parts, strict=True)):
            yield path


def _folders(top: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder and all below it."""
    real = os.path.realpath(top)
    if real in above or not os.path.isdir(real):
        return
    yield top
    with os.scandir(top) as entries:
        inner = [Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    for path in inner:
        yield from _folders(path, (*above, real))


# Checksums

_SUM = "sha256"
_LENGTH = hashlib.sha256().digest_size


_RACY_NS = 2_000_000_000  # a file this young may change again without a new time
_known: dict[str, Any] = {}


def _rest(file: BinaryIO) -> hashlib._Hash:
    """The sum of what is left of a file."""
    found = hashlib.sha256()
    while piece := file.read(2**20):
        found.update(piece)
    return found


def checksum(path: Path, known: MutableMapping[str, Any] = _known) -> str:
    """SHA-256 of a file, in hex, which is read once as long as it keeps its size and times.

    Args:
        path: The file.
        known: What is known of files, by path, fit for JSON; learns what is found. By default this process's own.

    Raises:
        OSError: It cannot be read.
    """
    stat = path.stat()
    mark = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    match known.get(str(path)):
        case [*seen, str(found)] if seen == mark:
            return found
    with open(path, "rb") as file:
        found = _rest(file).hexdigest()
    if time.time_ns() - max(mark[2:]) > _RACY_NS:
        known[str(path)] = [*mark, found]
    return found


def seal(file: BinaryIO) -> None:
    """Ends a file that is being written with its checksum, which readers of archives (`torch.load`) pass over."""
    file.flush()
    with open(file.name, "rb") as written:
        file.write(_rest(written).digest())


def is_sealed(path: Path) -> bool:
    """Whether a file ends with the checksum of what is before it."""
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            return hashlib.sha256(view[:-_LENGTH]).digest() == view[-_LENGTH:]
    except (OSError, ValueError):  # none, or an empty one
        return False


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """An object as JSON, with its checksum under a key of its own."""
    write_json(path, {**content, _SUM: _sum_of(content)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` has written; None if there is no such file, an empty object if it is another one by now."""
    content = read_json(path)
    return content if not content or content.pop(_SUM, None) == _sum_of(content) else {}


def _sum_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
