"""What every command does around its work: output that nobody may read any more, and errors in one line."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kt.errors import DiskFull, Failure, UserError
from kt.files import is_full


class _Outlet(io.FileIO):
    """Writes to a descriptor, and nowhere once that fails: who reads along (`| head`) does not end the work."""

    fault: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.fault is None:
            try:
                return super().write(data)
            except OSError as error:
                self.fault = error
        return memoryview(data).nbytes


@contextlib.contextmanager
def _outlets() -> Iterator[list[_Outlet]]:
    """Within, printing cannot fail; yields what it goes through, of the streams that are this process's own."""
    before, outlets = (sys.stdout, sys.stderr), []
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the command: no other file must get its number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w", closefd=False, encoding="utf-8"))  # noqa: SIM115 - for as long as the process lives
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            outlets.append(_Outlet(number, "w", closefd=False))
            text = io.TextIOWrapper(
                io.BufferedWriter(outlets[-1]),
                encoding=stream.encoding,
                errors="replace" if number == 1 else stream.errors,  # of what the terminal cannot show
                line_buffering=stream.line_buffering or stream.write_through,  # `python -u`, PYTHONUNBUFFERED
            )
            setattr(sys, name, text)
    try:
        yield outlets
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def run(command: Callable[[], int], tells: Callable[[], bool] = lambda: True) -> int:
    """Runs a command; what ends it, other than a mistake in the code, is one line.

    Args:
        command: Gives the exit status.
        tells: Whether this process says what went wrong.

    Returns:
        The exit status: the command's own, 2 after a mistake of the user, 3 after another failure.
    """
    with _outlets() as outlets:
        try:
            os.getcwd()
            status, message = command(), ""
        except UserError as error:
            status, message = 2, " ".join(str(error).split())
        except Failure as error:
            status, message = 3, str(error)
        except OSError as error:
            if is_full(error):
                status, message = 3, str(DiskFull(error.filename or "the disk"))
            elif isinstance(error, FileNotFoundError) and _is_gone():
                status, message = 2, "the working directory is gone: cd to one that is there"
            else:
                raise
        sys.stdout.flush()
        lost = [each.fault for each in outlets if each.fault and each.fault.errno != errno.EPIPE]
        if lost and not message:
            status, message = status or 3, f"the output cannot be written ({lost[0].strerror})"
        if message and tells():
            print(f"kt: error: {message}", file=sys.stderr)
    return status


def _is_gone() -> bool:
    """Whether the working directory has been deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
