"""Where renderings of tables lie: `<output_root>/tables/<name>/<scale>/`, other settings than the table's own apart."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kt.errors import DiskFull, UserError
from kt.files import read_sealed, write_text, writing

ROWS, CONTENT = "rows.json", "table.json"  # what a rendering is made from, and what it shows; with checksums


def table_folder(
    output_root: str | os.PathLike[str], name: str, scale: str, settings: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """The folder of a table's rendering.

    Args:
        output_root: Where results are.
        name: The table's name.
        scale: The scale of the run.
        settings: Key -> values of the settings that are not the table's own at that scale.
    """
    folder = Path(output_root) / "tables" / name / scale
    if not settings:
        return folder
    told = repr(sorted((key, list(values)) for key, values in settings.items()))
    return folder.with_name(f"{scale}-{hashlib.sha256(told.encode()).hexdigest()[:8]}")


def rendered_folders(output_root: str | os.PathLike[str], name: str, scale: str) -> list[Path]:
    """The folders in which a table has been rendered at a scale, that of its own settings first."""
    folder = table_folder(output_root, name, scale)
    found = [folder, *sorted(folder.parent.glob(f"{scale}-????????"))]
    return [each for each in found if os.path.exists(each / ROWS)]


def stored_rows(folder: Path) -> dict[str, Any] | None:
    """What `tables.render.write_table`, or `tables.sweeps.write_sweep`, was last given for a folder; None if never.

    Raises:
        UserError: The file is not as it was written, or only another user can read it.
    """
    stored = read_sealed(folder / ROWS)
    if stored == {}:
        raise UserError(f"{folder / ROWS}: expected it as it was written; run the same command again")
    return stored


class NotWritten(UserError):
    """A rendering that has no place: its `text`, as in `table.md`, and the exit `status` of a command that prints it.

    A finished table can be read where one may not write. A full disk is another matter: others want to read it there.
    """

    def __init__(self, why: UserError | DiskFull, text: str):
        super().__init__(str(why))
        self.text, self.status = text, 3 if isinstance(why, DiskFull) else 0


@contextlib.contextmanager
def rendering(folder: Path, text: str) -> Iterator[None]:
    """Within, a rendering is written into its folder, which is made and gets its text.

    Raises:
        NotWritten: That is impossible.
    """
    try:
        with writing(folder):
            (folder / "curves").mkdir(parents=True, exist_ok=True)
            yield
            write_text(folder / "table.md", text)
    except (UserError, DiskFull) as error:
        raise NotWritten(error, text) from None
