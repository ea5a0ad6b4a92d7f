"""The state of a dataset on the disk: what tells whether a number still is one of these data. Imports no torch.

A dataset's entry in `kt.data.names` says which files it reads. Of images count names, sizes and the content of a fixed
sample, of labels the whole content. Equal files are an equal state wherever they lie.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import heapq
import importlib.util
import json
import os
import time
import zlib
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt.data.names import DATASETS, IMAGE_ENDS, PACKED_ENDS, folder_of
from kt.errors import UserError
from kt.files import at_home, checksum, find, read_json, write_bytes
from kt.settings import Dataset, kinds

Listing = dict[str, dict[str, Any]]

SAMPLE = 256  # images whose content is read
LISTED = 200_000  # a larger dataset keeps no list of its files, and so cannot say how many differ
REUSED = 20  # times that looking took, for which what was seen is not looked at again
SLOW_SECONDS = 2.0  # what takes longer is told


@dataclass(frozen=True)
class State:
    """How the files of a dataset stand.

    Attributes:
        name: The dataset's, with its folder.
        key: The same with its task and what else decides which files it reads.
        root: The folder that holds them.
        summary: Numbers of files and digests, by what they are of; None if there are no files.
        seconds: It took to find out.
        read: Files whose content had to be read for it.
    """

    name: str
    key: str
    root: Path
    summary: Mapping[str, Any] | None
    seconds: float = 0.0
    read: int = 0

    @property
    def cost(self) -> str | None:
        """What finding out has cost, if that was much."""
        if self.summary is None or self.seconds < SLOW_SECONDS:
            return None
        files = self.summary["images"] + self.summary["labels"]
        return f"{self}: looking at {files} files took {self.seconds:.0f} s, {self.read} of them were read"

    def __str__(self) -> str:
        return f"dataset {self.name} in {self.root}"


_recent: dict[Any, tuple[float, State]] = {}


def forget() -> None:
    """Lets `state_of` look again at what it has just seen."""
    _recent.clear()


def state_of(dataset: Mapping[str, Any], data_root: str | os.PathLike[str], cache: Path) -> State:
    """How the files that a dataset's config reads stand now.

    A dataset whose entry says nothing of its files has one state only. It is looked at again when `REUSED` times
    what that took has passed: a command that asks for every cell does not wait for it every time.

    Args:
        dataset: A dataset's config.
        data_root: The folder that holds it.
        cache: A folder that keeps checksums; used only where the folder above it exists.
    """
    root = at_home(data_root).absolute()
    spec = DATASETS[dataset["name"]]
    folder = folder_of(dataset)
    given = {**dataset, "folder": folder or dataset["name"]}
    fields = {key: glob.escape(str(value)) for key, value in given.items()}
    images, labels = (
        tuple(pattern.format_map(fields) for pattern in patterns)
        for patterns in (spec.images, spec.labels.get(dataset["task"], ()))
    )
    named = "folder" in spec.keys and folder not in (None, dataset["name"])  # others are of no account
    name = f"{dataset['name']}:{folder}" if named else dataset["name"]
    patterns = "".join((*spec.images, *spec.labels.get(dataset["task"], ())))
    own = [key for key in kinds(spec.settings) if key not in kinds(Dataset) and f"{{{key}}}" in patterns]
    told = [key for key in ("train_split", "test_split", "domain") if key in spec.keys]
    key = " ".join(str(part) for part in (name, dataset["task"], *(dataset[key] for key in (*told, *own))) if part)
    mark = key, str(root), str(cache)
    if mark in _recent and time.monotonic() < _recent[mark][0]:
        return _recent[mark][1]
    started = time.monotonic()
    if not images and not labels:
        found = State(name, key, root, {"images": 0, "labels": 0, "code": _code(spec.code)})
    else:
        listing, read = _look(root, images, labels, cache)
        summary = None
        if any(listing.values()):
            counts = {"images": sum(size is not None for size in listing["images"].values())}
            counts["labels"] = len(listing["labels"])
            summary = {**counts, "digests": {part: _digest(content) for part, content in listing.items()}}
            if len(listing["images"]) + len(listing["labels"]) <= LISTED:
                _keep(_listing_file(cache, summary), listing)
        found = State(name, key, root, summary, time.monotonic() - started, read)
    now = time.monotonic()
    _recent[mark] = now + REUSED * (now - started), found
    return found


def combined(states: Iterable[State]) -> str | None:
    """The fingerprint of several datasets, 16 hex digits; None if one of them is not there."""
    summaries = {state.key: state.summary for state in states}
    return None if None in summaries.values() else _digest(summaries)


def summarised(states: Iterable[State]) -> dict[str, Any]:
    """What a cell or a score records of its data: their `fingerprint` and the summaries of the `datasets`."""
    states = list(states)
    return {"fingerprint": combined(states), "datasets": {state.key: state.summary for state in states}}


def changes(state: State, before: Mapping[str, Any] | None, cache: Path) -> str | None:
    """In a line, how a dataset's files differ from an earlier state of them; None if they do not.

    Args:
        state: As it is now.
        before: The earlier summary.
        cache: As for `state_of`.
    """
    now = state.summary
    if now is None or before is None or now == before:
        return None
    if "digests" not in now or "digests" not in before:
        return f"{state}: the code that draws it differs"
    new, old = (_kept(_listing_file(cache, summary)) for summary in (now, before))
    if not new or not old:
        parts = [part for part, digest in now["digests"].items() if before["digests"].get(part) != digest]
        counts = ", ".join(f"{now[part]} {part}, {before[part]} before" for part in ("images", "labels"))
        return f"{state}: its {' and '.join(parts)} differ ({counts})"
    told = []
    earlier = _by_kind(old)
    for word, names in _by_kind(new).items():
        more, fewer, both = len(names - earlier[word]), len(earlier[word] - names), names & earlier[word]
        other = {name for name in both if any(_differ(new[part], old[part], name) for part in new)}
        told += [f"{len(other)} of {len(both)} {word} differ"] if other else []
        told += [f"{more} {word} more"] if more else []
        told += [f"{fewer} {word} gone"] if fewer else []
    return f"{state}: {', '.join(told)}"


def _by_kind(listing: Listing) -> dict[str, set[str]]:
    """The names in a listing."""
    files = {name for name, size in listing["images"].items() if size is not None}
    return {"images": files, "folders": listing["images"].keys() - files, "label files": set(listing["labels"])}


def _differ(new: Mapping[str, Any], old: Mapping[str, Any], name: str) -> bool:
    """Whether what is known of a file now and was known before is not the same."""
    return name in new and name in old and new[name] != old[name]


def _look(root: Path, images: Iterable[str], labels: Iterable[str], cache: Path) -> tuple[Listing, int]:
    """What there is: of images the sizes (None for a folder), of labels and sampled images the checksums, by name."""
    known = cache / "checksums.json"
    sums: ChainMap[str, Any] = ChainMap({}, _kept(known) or {})  # what is read anew comes into the first

    def mark(path: Path) -> str:
        return checksum(path, sums)[:32]

    try:
        seen = {path.relative_to(root).as_posix(): path for pattern in labels for path in find(root, pattern)}
        sizes: dict[str, int | None] = {}
        for pattern in images:
            for path in find(root, pattern):
                name = path.relative_to(root).as_posix()
                if path.is_dir():
                    sizes[name] = None
                elif path.suffix.lower() in (*IMAGE_ENDS, *PACKED_ENDS) and name not in seen:
                    sizes[name] = path.stat().st_size
        files = [name for name, size in sizes.items() if size is not None]
        sample = heapq.nsmallest(SAMPLE, files, key=_order)
        listing: Listing = {
            "images": dict(sorted(sizes.items())),
            "labels": {name: mark(seen[name]) for name in sorted(seen)},
            "pixels": {name: mark(root / name) for name in sorted(sample)},
        }
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if news := sums.maps[0]:
        _keep(known, {**(_kept(known) or {}), **news}, again=True)
    return listing, len(news)


def _order(name: str) -> tuple[int, str]:
    """By what the files of a sample come first: at random, and the same everywhere."""
    return zlib.crc32(name.encode(errors="surrogateescape")), name


def _keep(path: Path, content: Any, again: bool = False) -> None:
    """Keeps what can be had again, where a run writes anyway and the disk allows it."""
    with contextlib.suppress(OSError):
        if path.parent.parent.is_dir() and (again or not path.exists()):
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, json.dumps(content).encode())


def _kept(path: Path) -> dict[str, Any] | None:
    """What `_keep` has kept, unless only another user can read it."""
    try:
        return read_json(path)
    except UserError:
        return None


def _listing_file(cache: Path, summary: Mapping[str, Any]) -> Path:
    return cache / f"data-{_digest(summary)}.json"


def _code(modules: Iterable[str]) -> str:
    """A digest of the modules that draw a dataset."""
    mark = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        mark.update(Path(spec.origin).read_bytes())
    return mark.hexdigest()[:16]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
