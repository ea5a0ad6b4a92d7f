"""Files that readers see whole: what is written takes the old file's place at once, or not at all.

A file can also say whether it still is what was written: JSON with its checksum inside, any file with one at its end.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import mmap
import os
import pwd
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path, PurePath
from stat import S_ISFIFO
from typing import Any, BinaryIO

from kt.errors import DiskFull, UserError

STALE_SECONDS = 3600.0  # nothing takes so long to be written


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


def sweep(folder: Path, seconds: float = 0.0) -> None:
    """Removes what killed processes have begun to write below a folder, if that is older than so many seconds."""
    for path in folder.rglob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may do the same, or own it
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what has led to it, is that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def writing(place: object) -> Iterator[None]:
    """Within, a place that takes nothing is one line.

    Args:
        place: Of all that is written there, as the user knows it.

    Raises:
        DiskFull: It has no space left.
        UserError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise DiskFull(place) from None
        raise UserError(f"{place}: expected a folder to write to ({_reason(error, place)})") from None


def _reason(error: OSError, place: object) -> str:
    """Why something could not be read or written, and whose it is where that is the reason."""
    if isinstance(error, PermissionError) and error.filename is not None:
        with contextlib.suppress(OSError, KeyError):
            owner = os.stat(error.filename).st_uid
            if owner != os.geteuid():
                named = "it" if str(error.filename) == str(place) else error.filename
                return f"{error.strerror}: {named} is {pwd.getpwuid(owner).pw_name}'s"
    return str(error.strerror)


def write_bytes(path: Path, content: bytes) -> None:
    """A file with that content."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """A file with that text, in UTF-8; bytes of file names that are none are written as they are."""
    write_bytes(path, text.encode(errors="surrogateescape"))


def write_json(path: Path, content: Any) -> None:
    """A file with that content as JSON, for people to read as well."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None if there is no such file, an empty one if the file holds no object.

    Raises:
        UserError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error, path)})") from None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# Names


def at_home(path: str | os.PathLike[str]) -> Path:
    """A path of the user's, whose `~` is the home of whoever it names, where there is one."""
    return Path(os.path.expanduser(path))


def find(root: Path, pattern: str) -> Iterator[Path]:
    """What matches a pattern of `Path.glob` below a folder, but for what is hidden unless the pattern names it.

    `**` follows links too, but none into a folder that it is in.

    Raises:
        OSError: A folder may not be read.
    """
    top, deep, rest = pattern.partition("**/")
    if not deep:
        yield from _visible(root, pattern)
        return
    for start in _visible(root, top) if top else (root,):
        for folder in _folders(start):
            yield from _visible(folder, rest)


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    """What matches a pattern without `**`; `Path.glob` passes over folders that it may not read without a word."""
    first, *rest = PurePath(pattern).parts
    if glob.has_magic(first):
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if fnmatch.fnmatchcase(entry.name, first)]
        except (FileNotFoundError, NotADirectoryError):
            return
        found = [folder / name for name in names if first.startswith(".") or not name.startswith(".")]
    else:
        found = [folder / first] if (folder / first).exists() else []
    for path in found:
        yield from _visible(path, str(PurePath(*rest))) if rest else [path]


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
        OSError: It cannot be read, or is a pipe, which would be waited for.
    """
    stat = path.stat()
    if S_ISFIFO(stat.st_mode):
        raise OSError(errno.EPERM, "is a pipe, no file", str(path))
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
    write_json(path, sealed(content))


def rewrite_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_sealed`, into the old file, which a full disk has room for; half of it reads as an empty object."""
    with open(path, "r+b", buffering=0) as file:
        file.write(json.dumps(sealed(content)).encode())
        file.truncate()


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` has written; None if there is no such file, an empty object if it is another one by now."""
    content = read_json(path)
    return content if not content or content.pop(_SUM, None) == _sum_of(content) else {}


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object with its checksum, for what writes JSON in a way of its own."""
    return {**content, _SUM: _sum_of(content)}


def _sum_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
