"""The pages of a run while it goes on: those of its cells, its table's, and that of all results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

PAUSE = 20.0  # times what rendering took pass before a table is rendered again: it costs a run a twentieth at most


class Pages:
    """Writes what there is to see of a run as cells start and end.

    Args:
        render: Writes the page of the run's table.
        output_root: Where results are.
    """

    def __init__(self, render: Callable[[], Path], output_root: str):
        self.render, self.output_root = render, output_root
        self.due = 0.0
        self.running: set[str] = set()
        self.update()

    def update(self, started: str | None = None, ended: str | None = None) -> None:
        """Brings the pages up to date after a cell has started or ended, and writes the page of one that has ended."""
        from tables.cell_page import write_cell_pages
        from tables.overview import write_overview

        self.running = (self.running | {started or ""}) - {ended or "", ""}
        # Whatever fails, a paper's judge of rows without results included, must not stop a training: whoever renders
        # after the last cell says what is wrong.
        with contextlib.suppress(Exception):
            if ended is not None:
                write_cell_pages(self.output_root, [ended])
            began = time.monotonic()
            if began >= self.due and (ended is not None or not self.due):
                self.render()
                now = time.monotonic()
                self.due = now + PAUSE * (now - began)
        with contextlib.suppress(Exception):
            write_overview(self.output_root, self.running)
