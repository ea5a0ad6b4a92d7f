"""What a run shows: one bar for the table and one for each running cell on a terminal, plain lines elsewhere.

Whatever third parties print or warn goes to the log file of the cell that runs, so that it does not bury the bars.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 15.0  # seconds between two lines about a running cell


@dataclass
class _Cell:
    """What is shown of a running cell."""

    text: str
    total: int
    done: int = 0
    said: float = field(default_factory=time.monotonic)
    bar: TaskID | None = None


class Display:
    """Shows a table's progress and, by `start`, `advance` and `stop`, that of the cells that run.

    Args:
        stream: Where to write; bars if it is a terminal.
        quiet: Show nothing; for worker processes and all ranks but the first.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        # The stream is held from here on: sys.stdout may be a cell's log when something is shown.
        self.console = Console(file=stream or sys.stdout, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self.bars: Progress | None = None
        self.table: TaskID | None = None
        self.cells: dict[str, _Cell] = {}
        self.warned: set[str] = set()
        if self.console.is_terminal and not quiet:
            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def line(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text)

    def warn(self, text: str) -> None:
        """A warning, which many cells may have and one line says."""
        if text not in self.warned:
            self.warned.add(text)
            self.line(f"warning: {text}")

    def start_table(self, name: str, total: int) -> None:
        """Opens the table's bar over `total` cells."""
        if self.bars is not None:
            self.bars.start()
            self.table = self.bars.add_task(name, total=total)

    def advance_table(self, cells: int = 1) -> None:
        """That many more cells are finished, well or badly."""
        if self.bars is not None and self.table is not None:
            self.bars.advance(self.table, cells)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, others may write to the screen, where the bars are not."""
        if (bars := self.bars) is None or self.table is None:
            yield
            return
        shown = bars.task_ids
        for task in shown:  # or they would take their lines away from what has been written, once they are drawn again
            bars.update(task, visible=False)
        bars.stop()
        try:
            yield
        finally:
            bars.start()
            for task in shown:
                bars.update(task, visible=True)

    def stop_table(self) -> None:
        """Closes all bars."""
        for key in list(self.cells):
            self.stop(key)
        if self.bars is not None and self.table is not None:
            self.bars.stop()
            self.bars.remove_task(self.table)
            self.table = None

    def start(self, total: int, text: str, key: str = "") -> None:
        """A cell, by default this process's own, has `total` steps."""
        self.stop(key)
        cell = self.cells[key] = _Cell(text, total)
        if self.bars is not None:
            self.bars.start()
            cell.bar = self.bars.add_task(text, total=total)

    def advance(self, steps: int, text: str, key: str = "") -> None:
        """The cell has done `steps` more; `text` says where it is."""
        cell = self.cells.get(key)
        if cell is None:
            return
        cell.done += steps
        if self.bars is not None and cell.bar is not None:
            self.bars.update(cell.bar, advance=steps, description=f"{cell.text} {text}")
        elif time.monotonic() - cell.said >= PLAIN_INTERVAL:
            cell.said = time.monotonic()
            self.line(f"  {cell.text} {text}: step {cell.done} of {cell.total}")

    def stop(self, key: str = "") -> None:
        """The cell is over."""
        cell = self.cells.pop(key, None)
        if self.bars is not None and cell is not None and cell.bar is not None:
            self.bars.remove_task(cell.bar)
            if self.table is None and not self.cells:
                self.bars.stop()


_current: Display | None = None


def current() -> Display:
    """This process's display, made on first use."""
    global _current
    if _current is None:
        _current = Display()
    return _current


def use(display: Display | None) -> None:
    """Makes a display this process's own; None forgets it."""
    global _current
    _current = display


class _Diverted:
    """A text stream that writes to the running cell's log, or to the real stream when none runs.

    Logging handlers keep the stream they first saw; one that was made during a cell must outlive the cell's log.
    """

    def __init__(self, real: TextIO):
        self.real = real
        self.log: TextIO | None = None

    def write(self, text: str) -> int:
        if self.log is None:
            return self.real.write(text)
        with contextlib.suppress(OSError):  # on a full disk what has to be kept fails by itself
            self.log.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError) if self.log else contextlib.nullcontext():
            (self.log or self.real).flush()

    def isatty(self) -> bool:
        return self.log is None and self.real.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.log or self.real, name)


_diverted: dict[int, _Diverted] = {}


def _divert(real: TextIO) -> _Diverted:
    return _diverted.setdefault(id(real), _Diverted(real))


class _Warnings(logging.Handler):
    """Hands on what kt itself warns of, and nothing of third parties."""

    def __init__(self, warn: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self.warn = warn

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in ("kt", "experiments"):
            self.warn(record.getMessage())


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[TextIO]:
    file = open(folder / "log.txt", "a", buffering=1, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def cell_log(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Sends prints, warnings and log records to `<folder>/log.txt` while the block runs; may be nested.

    Args:
        folder: The cell's.
        warn: Called with each warning of kt's own as well.
    """
    current()  # binds the display to the screen before anything is diverted
    with _log_file(folder) as file:
        heard = _Warnings(warn)
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        streams = []
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            diverted = stream if isinstance(stream, _Diverted) else _divert(stream)
            streams.append((name, stream, diverted, diverted.log))
        level = root.level
        try:
            for name, _, diverted, _ in streams:
                diverted.log = file
                setattr(sys, name, diverted)
            root.addHandler(handler)
            root.addHandler(heard)
            root.setLevel(min(level, logging.INFO))
            logging.captureWarnings(True)
            yield
        finally:
            logging.captureWarnings(False)
            root.setLevel(level)
            root.removeHandler(handler)
            root.removeHandler(heard)
            for name, stream, diverted, before in streams:
                diverted.log = before
                setattr(sys, name, stream)
