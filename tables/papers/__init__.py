"""The papers: a folder each, found by its `record.yaml`, with `claims.py` and `figures.py` where these are ready.

A paper of another installed package is found by its entry point of the group `kt.papers`, which names the package that
is its folder; its table files lie there too, in `table/`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from kt.errors import UserError
from tables import CONF

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Paper:
    """Where a paper's folder is, as a package and as files."""

    package: str
    folder: Path


@functools.cache
def known() -> Mapping[str, Paper]:
    """Key -> paper: these here, which keep their keys, then those of other packages.

    Raises:
        UserError: An entry point names no folder of a paper.
    """
    folders = [path.parent for path in sorted(FOLDER.glob("*/record.yaml"))]
    found = {folder.name: Paper(f"{__name__}.{folder.name}", folder) for folder in folders}
    for point in entry_points(group="kt.papers"):
        if point.name not in found:
            found[point.name] = Paper(point.value, _folder(point))
    return found


def _folder(point: EntryPoint) -> Path:
    try:
        spec = importlib.util.find_spec(point.value)
    except ModuleNotFoundError:  # of a package around it
        spec = None
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "record.yaml").exists():
            return Path(folder)
    raise UserError(f"kt.papers: {point.name} = {point.value}: expected an installed package that holds a record.yaml")


def part(key: str, name: str) -> ModuleType | None:
    """A paper's own module, `claims` or `figures`; None if it has none."""
    paper = known()[key]
    if not (paper.folder / f"{name}.py").exists():
        return None
    return importlib.import_module(f"{paper.package}.{name}")


def config_folders() -> list[Path]:
    """Where `table/<name>.yaml` is looked for: `conf`, then the papers' folders that have such files."""
    return [CONF, *(paper.folder for paper in known().values() if (paper.folder / "table").is_dir())]


def table_files() -> dict[str, Path]:
    """Table that can be run -> its file."""
    folders = reversed(config_folders())  # the first one that has a file wins
    return {path.stem: path for folder in folders for path in (folder / "table").glob("[!_]*.yaml")}
