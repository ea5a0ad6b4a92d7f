"""The pages of a run while it goes on: those of its cells, its tables', and that of all results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

PAUSE = 20.0  # times what rendering took pass before a table is rendered again: it costs a run a twentieth at most


class Page(NamedTuple):
    """What writes a table's page, and the ids of the cells after whose ends it is written."""

    render: Callable[[], Path]
    cells: Collection[str]


class Pages:
    """Writes what there is to see of a run as cells start and end.

    Args:
        tables: Name -> page of each table that waits for cells; who renders one for the last time takes it out.
        output_root: Where results are.
    """

    def __init__(self, tables: Mapping[str, Page], output_root: str):
        self.tables, self.output_root = dict(tables), output_root
        self.stale = list(tables)  # what has been so for longest comes first
        self.due = 0.0
        self.running: set[str] = set()
        self.update()

    def update(self, started: Collection[str] = (), ended: Collection[str] = ()) -> None:
        """Brings the pages up to date after cells have started or ended, and writes the pages of those that have ended.

        Of the tables that they belong to one is rendered at a time.
        """
        from tables.cell_page import write_cell_pages
        from tables.overview import write_overview

        self.running = (self.running | {*started}) - {*ended}
        # Whatever fails, a paper's judge of rows without results included, must not stop a training: whoever renders
        # after the last cell says what is wrong.
        with contextlib.suppress(Exception):
            if ended:
                write_cell_pages(self.output_root, ended)
            belong = [name for name, page in self.tables.items() if {*ended} & {*page.cells}]
            self.stale += [name for name in belong if name not in self.stale]
            self.stale = [name for name in self.stale if name in self.tables]
            began = time.monotonic()
            if self.stale and began >= self.due and (ended or not self.due):
                try:
                    self.tables[self.stale.pop(0)].render()
                finally:
                    now = time.monotonic()
                    self.due = now + PAUSE * (now - began)
        with contextlib.suppress(Exception):
            write_overview(self.output_root, self.running)
