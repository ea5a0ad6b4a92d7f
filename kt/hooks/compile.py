"""What `compile=auto` has found, kept in the records: a run that resumes goes on as it had been decided."""

from __future__ import annotations

import logging
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.runner import Runner

from kt import ranks
from kt.compiling import AUTO
from kt.store import Records, read_records, records_file

logger = logging.getLogger(__name__)

PLACE = ("kind", "phase", "step", "epoch")  # of a row, beside what has been found


class CompileHook(Hook):
    """Writes a phase's finding once, and reads it where the phase is resumed.

    Args:
        cell: The cell's folder.
        records: Its records; None on ranks that do not write.
    """

    # Behind the records of an epoch's steps, before the checkpoint that relies on all records.
    priority = "ABOVE_NORMAL"

    def __init__(self, cell: Path, records: Records | None):
        self.cell, self.records = cell, records
        self.written = False

    def before_train_epoch(self, runner: Runner) -> None:
        """Takes over what the phase has found before it was interrupted."""
        loop = runner.train_loop
        if loop.compiler.choice != AUTO or loop.epoch == 0:
            return
        rows = read_records(records_file(self.cell), "compile") if ranks.is_first() else ()
        earlier = ranks.from_first(next((row for row in rows if row["phase"] == loop.phase.name), None))
        if earlier is not None:
            loop.compiler.settle({key: value for key, value in earlier.items() if key not in PLACE})
            self.written = True

    def after_train_epoch(self, runner: Runner) -> None:
        """Writes what has been found."""
        loop = runner.train_loop
        found = loop.compiler.found
        if found is None or self.written:
            return
        self.written = True
        logger.info("compile=auto in phase '%s': %s", loop.phase.name, found)
        if self.records is not None:
            place = {"step": loop.iter, "epoch": loop.epoch}
            self.records.write([{"kind": "compile", "phase": loop.phase.name, **place, **found}])
