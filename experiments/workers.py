"""Cells side by side on this machine: a server that has imported everything forks one process for each.

The server is forked from the run itself and in a session of its own, so that Ctrl-C reaches the run alone, which then
asks for the end. It ends its cells when the run is gone, however that went; the cells end when the server is gone.
Everything travels through two pipes as lines of JSON, short enough to be written whole.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from experiments import cell, lifeline, progress
from experiments.devices import CELLS_PER_GPU
from kt import store
from kt.data.names import DATASETS
from kt.errors import Failure, UserError

Message = dict[str, Any]

# What steps and scores import, some of it only when a cell gets there, which in each cell takes a second as well;
# whatever fails to, fails again in the cell that needs it, which then says so.
STEP_IMPORTS = ("experiments.build", "kt.functional", "timm", "matplotlib.figure", "matplotlib.backends.backend_agg")
IMPORTS = (*STEP_IMPORTS, "wandb", "wandb.sdk.launch.inputs.internal")  # the last one is what `wandb.init` imports
DENSE_IMPORTS = ("kt.models.dense", "kt.models.pose", "kt.models.depth", "kt.data.dense")
LONGEST_TEXT = 500  # characters: a line of JSON stays below what a pipe takes at once
REPORT_SECONDS = 0.2  # between two messages about a cell's steps
INTERRUPTED = 130  # exit status of a cell's process


def _send(pipe: int, message: Message) -> None:
    """Writes one line; nobody reading means that this process is about to be ended."""
    short = {key: value[:LONGEST_TEXT] if isinstance(value, str) else value for key, value in message.items()}
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, json.dumps(short).encode() + b"\n")


class _Remote(progress.Display):
    """The display of a cell's process: tells the run what to show.

    Args:
        pipe: Where to write.
        key: What the run calls the cell.
    """

    def __init__(self, pipe: int, key: str):
        super().__init__(quiet=True)
        self.pipe, self.key = pipe, key
        self.steps, self.told = 0, 0.0

    def line(self, text: str) -> None:
        _send(self.pipe, {"of": self.key, "line": text})

    def warn(self, text: str) -> None:
        _send(self.pipe, {"of": self.key, "warning": text})

    def start(self, total: int, text: str, key: str = "") -> None:
        self.steps = 0
        _send(self.pipe, {"of": self.key, "total": total})

    def advance(self, steps: int, text: str, key: str = "") -> None:
        self.steps += steps
        if time.monotonic() - self.told >= REPORT_SECONDS:
            self.told = time.monotonic()
            _send(self.pipe, {"of": self.key, "steps": self.steps, "text": text})
            self.steps = 0

    def stop(self, key: str = "") -> None:
        _send(self.pipe, {"of": self.key, "total": None})


def _work(message: Message, events: int, server: tuple[int, str | None]) -> NoReturn:
    """A cell's process: trains and ends; what happened is in the cell's folder, or told if it has none yet."""
    key, config = message["start"], message["config"]
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        lifeline.follow(*server)
        display = _Remote(events, key)
        progress.use(display)
        cell.run_cell(config, display)
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (UserError, Failure) as error:
        folder = store.folder_of(config["output_root"], message["cell"])
        said = store.read_status(folder, config["evaluation"]).get("error")
        if not said or said not in str(error):
            _send(events, {"of": key, "error": str(error), "user": isinstance(error, UserError)})
    except BaseException as error:
        traceback.print_exc()
        _send(events, {"of": key, "error": f"{type(error).__name__}: {error}", "user": False})
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def preload(imports: Sequence[str]) -> None:
    """Imports what training needs, so that a fork has it at once, and GPUs can still be used after the fork."""
    # mmengine asks at import whether there is a GPU. By default that starts CUDA, which no fork can then use.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in imports:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


class _Server:
    """The process that forks the others.

    Args:
        commands: Pipe to read from; its end is the run's.
        events: Pipe to write to.
    """

    def __init__(self, commands: int, events: int):
        self.commands, self.events = commands, events
        self.run = os.getppid()
        self.children: dict[int, str] = {}
        self.own = os.getpid(), lifeline.started(os.getpid())
        self.unread = b""

    def serve(self, imports: Sequence[str]) -> None:
        """Imports, then starts what it is told to until the run is gone, and ends what still runs."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        preload(imports)
        gc.collect()
        gc.freeze()  # so that collecting garbage in one process does not copy the memory of all
        while True:
            readable, _, _ = select.select([self.commands, woken], [], [])
            if woken in readable:
                os.read(woken, 4096)
                self._reap()
            if self.commands in readable and not self._obey():
                break
        self._end()

    def _obey(self) -> bool:
        """Starts the cells that the run has named; False if the run is gone."""
        data = os.read(self.commands, 1 << 20)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            if os.getppid() != self.run:
                return False  # what the run has asked for in its last moments
            message = json.loads(line)
            # Until the cell's process can be interrupted, an interrupt waits.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            with warnings.catch_warnings():
                # Python warns of threads at a fork. The server has none of its own, libraries' survive it.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                os.close(self.commands)
                _work(message, self.events, self.own)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            self.children[child] = message["start"]
        return bool(data)

    def _reap(self) -> None:
        while self.children:
            child, ended = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            if child in self.children:
                message = {"ended": self.children.pop(child), "status": os.waitstatus_to_exitcode(ended)}
                _send(self.events, message)

    def _end(self) -> None:
        for child in self.children:
            os.kill(child, signal.SIGINT)
        patience = time.monotonic() + lifeline.GRACE_SECONDS
        while self.children and time.monotonic() < patience:
            self._reap()
            time.sleep(0.02)
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        while self.children:
            self._reap()
            time.sleep(0.02)


def _open_log(path: Path) -> TextIO:
    """A file to add lines to for as long as the process lives; nowhere, if the disk is full."""
    try:
        return open(path, "a", buffering=1, encoding="utf-8")
    except OSError:
        return open(os.devnull, "w", encoding="utf-8")


class Pool:
    """The run's side. A context: on leaving, every cell that still runs is interrupted and has ended.

    Args:
        output_root: Where cells live; what libraries print outside of cells goes to `workers-<process id>.log` there.
        dense: Whether detectors or segmentors are among the cells.
    """

    def __init__(self, output_root: str | os.PathLike[str], dense: bool):
        self.log = Path(output_root) / f"workers-{os.getpid()}.log"
        self.imports = (*IMPORTS, *(DENSE_IMPORTS if dense else ()))
        self.server: int | None = None
        self.unread = b""

    def __enter__(self) -> Pool:
        self._open()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _open(self) -> None:
        commands, self.commands = os.pipe()
        self.events, events = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        server = os.fork()
        if server == 0:
            try:
                os.setsid()
                os.close(self.commands)
                os.close(self.events)
                # Opened in place of the screen: what libraries write there would run through the bars.
                log = _open_log(self.log)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout = sys.stderr = log
                _Server(commands, events).serve(self.imports)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(commands)
        os.close(events)
        self.server = server

    def start(self, key: str, cell_id: str, config: Mapping[str, Any]) -> None:
        """Starts a cell's process, which is called by a key in all messages."""
        if self.server is None:
            self._open()
        with contextlib.suppress(BrokenPipeError):  # the next message says that the server is lost
            data = json.dumps({"start": key, "cell": cell_id, "config": config}).encode() + b"\n"
            while data:
                data = data[os.write(self.commands, data) :]

    def messages(self, seconds: float) -> list[Message]:
        """What has been told since, waiting at most so long for a first message.

        Keys: `of`, a cell's key, with `line` (to show), `warning` (to show once), `total` (steps; None: no more),
        `steps` and `text`, or `error` and `user` (why it ends, where that is in no file); `ended`, a cell's key, with
        the process's `status`; `lost`: the server is gone, and with it all cells.
        """
        if not select.select([self.events], [], [], seconds)[0]:
            return []
        data = os.read(self.events, 1 << 16)
        if not data:
            self.close()
            return [{"lost": True}]
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Interrupts the cells and waits for their end; a second Ctrl-C kills them."""
        if self.server is None:
            return
        server, self.server = self.server, None
        os.close(self.commands)
        try:
            patience = time.monotonic() + lifeline.GRACE_SECONDS + 5
            while not self._has_ended(server) and time.monotonic() < patience:
                if select.select([self.events], [], [], 0.05)[0] and not os.read(self.events, 1 << 16):
                    time.sleep(0.02)  # nobody can tell anything any more
            if time.monotonic() >= patience:
                self._kill(server)
        except KeyboardInterrupt:
            self._kill(server)
            raise
        finally:
            os.close(self.events)
            self.unread = b""
            with contextlib.suppress(OSError):
                if self.log.stat().st_size == 0:
                    self.log.unlink()

    def _has_ended(self, server: int) -> bool:
        return os.waitpid(server, os.WNOHANG)[0] != 0

    def _kill(self, server: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server, signal.SIGKILL)  # its session's cells and what they have started
        with contextlib.suppress(ChildProcessError):
            os.waitpid(server, 0)


def default_workers(configs: Sequence[Mapping[str, Any]]) -> int:
    """How many of these cells to train side by side: one per core on embedded data, else one.

    Args:
        configs: Of the cells that are to be trained.
    """
    if not all(DATASETS[config["dataset"]["name"]].embedded for config in configs):
        return 1
    from joblib import cpu_count  # late: it takes a while; knows the limits of containers

    most = int(cpu_count()) // max((config["threads"] or 1 for config in configs), default=1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = sum(1 for _ in Path("/proc/driver/nvidia/gpus").glob("*"))
    gpus = gpus if visible is None else min(gpus, len([name for name in visible.split(",") if name.strip()]))
    if gpus and any(config["device"] != "cpu" for config in configs):
        most = min(most, CELLS_PER_GPU * gpus)
    return max(1, min(most, len(configs)))
