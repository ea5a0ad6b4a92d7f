"""A cell: one student trained one way with one seed, after whatever it needs. What its config means is in `meaning`.

What it leaves in `<output_root>/cells/<id>/`, and how it stands, is in `kt.store`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from experiments import lifeline
from experiments.devices import processor
from experiments.meaning import (
    Identified,
    Needed,
    Unnamed,
    all_needs,
    content_hash,
    file_key,
    identify,
    needs_of,
    settle,
    states_of,
)
from experiments.progress import Display, cell_log, current
from experiments.schema import ANALYSES, LEFT
from kt import ranks
from kt.data.fingerprint import State, changes, combined, forget, summarised
from kt.errors import DiskFull, Failure, UserError, is_out_of_memory, nearest
from kt.files import STALE_SECONDS, is_full, sweep, write_json, write_sealed, write_text, writing
from kt.needs import Config
from kt.ranks import launched as world_size
from kt.ranks import launched_first as is_first
from kt.store import (
    begin,
    cache_of,
    cells_of,
    drop_evaluation,
    evaluation_fault,
    evaluation_file,
    failure_file,
    folder_of,
    inspect,
    list_evaluation,
    lock_of,
    outcomes_file,
    pictures_file,
    read_evaluation,
    read_status,
    seconds_spent,
    void,
    write_data,
    write_result,
    write_status,
)

PACKAGES = ("torch", "torchvision", "timm", "mmengine", "numpy", "scipy", "hydra-core", "wandb")


class CellFailed(Failure):
    """A cell ended in an error that is not the user's; the traceback is in its folder."""


def agree(value: Any) -> Any:
    """The first rank's value, on every rank."""
    if world_size() == 1:
        return value
    ranks.join()
    return ranks.from_first(value)


@contextlib.contextmanager
def _exclusive(folder: Path, display: Display) -> Iterator[None]:
    """Holds the cell's lock on the first rank; says so when another process has it.

    Raises:
        DiskFull: There is no space left for it.
        UserError: It is somebody else's, who alone can write it.
    """
    if not is_first():
        yield
        return
    lock = lock_of(folder)
    with writing(folder):
        try:
            lock.acquire(timeout=0.5)  # others hold it for a moment to see whether somebody does
        except Timeout:
            display.line(f"  cell {folder.name}: waiting for another process that works on it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _commit() -> str | None:
    """The commit of this checkout, marked where files differ from it."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _hardware() -> dict[str, Any]:
    """What computed: the processor, and the GPUs where the training has found some."""
    hardware: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "gpus": [], "processes": world_size()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def _open_folder(config: Config, cell_id: str) -> None:
    """Makes the cell's folder.

    Raises:
        DiskFull: There is no space left for it.
        UserError: It cannot be written.
    """
    folder = folder_of(config["output_root"], cell_id)
    check_writable(config["output_root"])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(output_root: str | os.PathLike[str]) -> None:
    """Makes the output folder, or says why that is impossible.

    Raises:
        DiskFull: There is no space left for it.
        UserError: It cannot be made or written.
    """
    cells = cells_of(output_root)
    with writing(f"output_root={output_root}"):
        cells.mkdir(parents=True, exist_ok=True)
        probe = cells / f".probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)


def sweep_up(output_root: str | os.PathLike[str]) -> None:
    """Removes what runs that were killed long ago have begun to write beside the cells, which see to it themselves."""
    for place in ("tables", "sweeps", "rehearsals", cache_of("").name):
        sweep(Path(output_root) / place, STALE_SECONDS)


def run_cell(config: Mapping[str, Any], display: Display | None = None) -> Config:
    """Trains a cell and first whatever it needs, unless it is done; goes on where an earlier attempt stopped.

    Args:
        config: A checked config.
        display: Where to show progress; this process's own by default.

    Returns:
        The content of `result.json`.

    Raises:
        UserError: The user's mistake, as the training found it.
        DiskFull: There is no space left.
        CellFailed: Any other error; the traceback is in the cell's `error.txt`.
        KeyboardInterrupt: After the status has been written.
    """
    settled = settle(config)
    display = display or current()
    found = identify(settled)
    cell_id = agree(found.id)
    folder = folder_of(settled["output_root"], cell_id)
    if (result := _finished(settled, found, folder, display)) is not None:
        return result
    _open_folder(settled, cell_id)
    with _exclusive(folder, display):
        found = agree(identify(settled))
        if found.id == cell_id:
            return _hold(settled, found, folder, display)
    return run_cell(config, display)  # another process was the first there, on other data


def _is_scored(config: Config, found: Identified, folder: Path) -> bool:
    """Whether a finished cell has the score on other data that is asked for, if one is."""
    name = config["evaluation"]
    return name is None or read_evaluation(folder, name, found.scored_on) is not None


def _finished(config: Config, found: Identified, folder: Path, display: Display) -> Config | None:
    """The result of a cell that has nothing left to do, which may lie where one cannot write."""
    result, _ = agree(inspect(folder))
    if result is None or not agree(_is_scored(config, found, folder)):
        return None
    tell(found.told, display)
    for text in read_status(folder, config["evaluation"]).get("warnings", ()):
        display.warn(text)
    return result


def _hold(settled: Config, found: Identified, folder: Path, display: Display) -> Config:
    """A cell whose lock is held, as `run_cell` returns it."""
    result, fault = agree(inspect(folder))
    if fault:
        display.line(f"  cell {found.id}: {fault}: it is made again from what is left")
    tell(found.told, display)
    if result is None:
        result = _attempt(settled, found, folder, display)
    if settled["evaluation"] is not None:
        _evaluate(settled, found, folder, display)
    return result


_told: set[str] = set()


def tell(lines: Iterable[str], display: Display) -> None:
    """Says what there is to say of data, each line once in a process."""
    for line in lines:
        if line not in _told:
            _told.add(line)
            display.line(line)


def _find_changed(before: Iterable[State], now: Iterable[State], cache: Path) -> str | None:
    """What to say of data that are not what they were when a cell began to read them."""
    for old, new in zip(before, now, strict=True):
        if old.summary == new.summary or "digests" not in (old.summary or {}):
            continue  # code is read once
        return changes(new, old.summary, cache) or f"{new}: is not there any more"
    return None


def _one_line(error: BaseException, folder: Path) -> str:
    if is_full(error):
        return str(DiskFull(folder))
    lines = str(error).strip().splitlines()
    told = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    if is_out_of_memory(error):
        return f"not enough memory, of which a smaller schedule.device_batch or dataset.image_size takes less ({told})"
    return told


def _failure(error: BaseException, folder: Path, what: str) -> Failure:
    """What an error that is not the user's comes to, whose traceback is kept if there is room for it."""
    if is_full(error):
        return DiskFull(folder)
    if is_first():
        with contextlib.suppress(OSError):
            write_text(folder / "error.txt", traceback.format_exc())
    return CellFailed(f"{what}: {_one_line(error, folder)} (traceback: {folder / 'error.txt'})")


def _evaluate(config: Config, found: Identified, folder: Path, display: Display) -> None:
    """Scores a finished student on another dataset, or analyses it, unless that is done.

    Raises:
        UserError: The dataset is missing or for another task.
        DiskFull: There is no space left.
        CellFailed: Any other error; the traceback is in the cell's `error.txt`.
    """
    name = config["evaluation"]
    path = evaluation_file(folder, name)
    scored, fault = agree((_is_scored(config, found, folder), evaluation_fault(folder, name)))
    if fault:
        display.line(f"  cell {folder.name}: {fault}: it is made again")
    if scored:
        return
    failure = failure_file(folder, name)
    started = time.time()

    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        display.warn(text)

    def failed(error: str, user: bool) -> None:
        if is_first():
            with contextlib.suppress(OSError):  # the error itself is told all the same
                write_sealed(failure, {"status": "failed", "error": error, "user": user, "started": started})

    try:
        if is_first():
            with writing(folder):
                path.parent.mkdir(exist_ok=True)
                sweep(folder)
                drop_evaluation(folder, name)  # or a failure would leave what is of other data
        if config["evaluation"] in ANALYSES:
            paths, _ = _provide(config, all_needs(config), display)
            with cell_log(folder, warn):
                from experiments.analyses import analyse_cell

                metrics = analyse_cell(config, folder, paths)
        else:
            with cell_log(folder, warn):
                from experiments.build import evaluate_cell

                metrics = evaluate_cell(config, folder)
        if found.scored is not None:
            forget()
            now = agree(identify(config).scored)
            if line := _find_changed([found.scored], [now], cache_of(config["output_root"])):
                raise UserError(f"{line}, since the student began to be scored; the score is not kept")
        if is_first():
            write_json(path, metrics)
            some = outcomes_file(folder, name), pictures_file(folder, name)
            left = [*LEFT.get(name, ()), *(each.name for each in some if each.exists())]
            data = summarised([found.scored]) if found.scored else None
            list_evaluation(folder, name, *left, data=data, warnings=warnings)
            failure.unlink(missing_ok=True)
    except UserError as error:
        failed(str(error), user=True)
        raise
    except Failure as error:
        failed(str(error), user=False)
        raise
    except (Exception, SystemExit) as error:  # as in `_attempt`
        failed(_one_line(error, folder), user=False)
        raise _failure(error, folder, f"evaluation={name}") from error


class _Status:
    """How an attempt stands, for its folder to tell.

    Args:
        folder: The cell's.
        display: Where to show what there is to warn of.
    """

    def __init__(self, folder: Path, display: Display):
        self.folder, self.display = folder, display
        self.content: Config = {"status": "running", "error": None, "user": False, "pid": os.getpid()}
        self.content |= {"host": socket.gethostname(), "started": time.time(), "finished": None}
        self.content |= {"seconds": seconds_spent(folder), "warnings": []}

    @property
    def seconds(self) -> float:
        """What this attempt and those before it have taken."""
        return float(self.content["seconds"]) + time.time() - self.content["started"]

    def write(self, **changes: Any) -> None:
        """Something has changed."""
        self.content.update(changes)
        if is_first():
            write_status(self.folder, self.content)

    def warn(self, text: str) -> None:
        """There is something to warn of, which each attempt finds again."""
        self.display.warn(text)
        if text not in self.content["warnings"]:
            self.write(warnings=[*self.content["warnings"], text])

    def end(self, kind: str, error: str | None = None, user: bool = False) -> None:
        """The attempt is over, which a disk that takes nothing must not hide."""
        with contextlib.suppress(OSError):
            self.write(status=kind, error=error, user=user, finished=time.time(), seconds=self.seconds)


def _attempt(config: Config, cell: Identified, folder: Path, display: Display) -> Config:
    """One attempt at a cell, with its status before and after."""
    status = _Status(folder, display)
    try:
        return _train(config, cell, folder, display, status)
    except KeyboardInterrupt:  # wherever it comes
        with lifeline.undisturbed():
            status.end("interrupted")
        raise


def _train(config: Config, cell: Identified, folder: Path, display: Display, status: _Status) -> Config:
    data = summarised(cell.states)
    try:
        with writing(folder):
            if is_first():
                write_data(folder, data)
                write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
                (folder / "error.txt").unlink(missing_ok=True)
                begin(folder)
            status.write()
        if absent := next((state for state in cell.states[1:] if state.summary is None), None):
            raise UserError(f"data_root={absent.root}: there are no data of {absent.name}, which a needed cell reads")
        paths, ids = _provide(config, needs_of(config), display)
        status.write(started=time.time())  # what it needs has been counted there
        with cell_log(folder, status.warn):
            from experiments.build import train_cell

            found = train_cell(config, folder, paths, display if is_first() else None)
        forget()
        now = agree(states_of(config))
        if line := _find_changed(cell.states, now, cache_of(config["output_root"])):
            if is_first() and combined(now) is not None:
                void(folder)  # it has learned of both
            raise UserError(f"{line}, since the cell began to train; the result is not kept")
        result = {
            "id": cell.id,
            "status": "done",
            **found,
            "config": config,
            "needs": ids,
            "seconds": status.seconds,
            "data": data,
        }
        result |= {"versions": _versions(), "commit": _commit(), "hardware": _hardware(), "threads": _threads()}
        if is_first():
            result = write_result(folder, result)
        status.end("done")
        return result
    except UserError as error:
        status.end("failed", str(error), user=True)
        raise
    except Failure as error:
        status.end("failed", str(error))
        raise
    except (Exception, SystemExit) as error:  # a library that exits must not take the other cells along
        status.end("failed", _one_line(error, folder))
        raise _failure(error, folder, f"cell {cell.id}") from error


def _provide(config: Config, needs: Mapping[str, Needed], display: Display) -> tuple[dict[str, Path], dict[str, str]]:
    """Makes what a cell needs: name -> file, and name -> id.

    Raises:
        UserError: The user's mistake, under the key that it has in this cell's config.
    """
    paths, ids = {}, {}
    for name, need in needs.items():
        if isinstance(need, Unnamed):
            raise UserError(need.reason)
        if isinstance(need, Path):
            paths[name], ids[name] = need, content_hash(need, file_key(name))
            continue
        try:
            result = run_cell(need.config, display)
        except UserError as error:
            part = str(error).partition(".")[0]
            if name == "teacher" and part in ("dataset", "schedule") and config["teacher"][part] is not None:
                raise UserError(f"teacher.{error}") from None
            raise
        ids[name] = result["id"]
        folder = folder_of(config["output_root"], result["id"])
        paths[name] = folder / need.file
        if not paths[name].exists():
            method, files = config["method"]["name"], sorted(path.name for path in folder.iterdir())
            hint = nearest(need.file, files)
            raise UserError(f"method={method}: what it needs as '{name}' has left no {need.file}{hint} in {folder}")
    return paths, ids
