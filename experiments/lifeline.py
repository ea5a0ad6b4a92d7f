"""Who ends with whom: signals that interrupt a run, and processes that do not outlive the one they work for."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LEADER = "KT_LEADER"  # environment variable: `<process id>:<when it started>` of the run that local workers belong to
GRACE_SECONDS = 10.0  # for an interrupted cell to write how far it got
POLL_SECONDS = 0.5

_watching: set[tuple[int, int]] = set()  # (this process, the one it follows): threads do not survive a fork


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, the end of a terminal session and a polite kill interrupt like Ctrl-C. `nohup` still ignores hang-ups."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within, Ctrl-C is not heard: for the moment in which an interrupted process says how far it got."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def started(pid: int) -> str | None:
    """When a living process started, in the kernel's own count; None if there is none or it is dead already."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]


def lead() -> None:
    """Makes this process the one that local workers, whoever starts them, end with."""
    os.environ[LEADER] = f"{os.getpid()}:{started(os.getpid())}"


def follow_leader() -> None:
    """Ends this process with the run that it works for, if that is a local one."""
    pid, _, since = os.environ.get(LEADER, "").partition(":")
    if pid:
        follow(int(pid), since)


def follow(pid: int, since: str | None) -> None:
    """Interrupts this process when another one is gone, and kills it if that does not help.

    Args:
        pid: The other process.
        since: When it started (`started`): ids are used again.
    """

    def watch() -> None:
        while started(pid) == since:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    if (os.getpid(), pid) not in _watching:
        _watching.add((os.getpid(), pid))
        threading.Thread(target=watch, daemon=True, name="lifeline").start()
