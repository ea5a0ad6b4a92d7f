"""A cell: one student trained one way with one seed. Its identity, folder, needs, lock, status and result.

A cell lives in `<output_root>/cells/<id>/`. `status.json` says what the latest attempt is doing or how it ended,
`result.json` is written last and atomically, so a cell is done exactly when that file exists.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from experiments.progress import Display, cell_log, current
from experiments.schema import METHODS, Dataset
from kt.errors import UserError

Config = dict[str, Any]

# Raise it when the same config comes to mean another computation: results of older code are then not taken for new.
IDENTITY_VERSION = 1

NO_TEACHER: Config = {
    "network": None,
    "dataset": None,
    "schedule": None,
    "seed": 0,
    "checkpoint": None,
    "pretrained": None,
    "norm": "eval",
}
STALE_SECONDS = 3600.0
PACKAGES = ("torch", "torchvision", "timm", "mmengine", "numpy", "scipy", "hydra-core", "wandb")


class CellFailed(RuntimeError):
    """A cell ended in an error that is not the user's; the traceback is in its folder."""


def _settled_network(network: Config, config: Config) -> Config:
    """A network whose width is a number: the scale's on embedded data, the full one on real data."""
    if network["width"] is not None:
        return network
    return {**network, "width": config["scale"]["width"] if config["dataset"]["name"] == "scenes" else 1.0}


def settle(config: Mapping[str, Any]) -> Config:
    """The config of the cell that a command means: unused parts emptied, widths filled in, a teacher turned student.

    Args:
        config: A checked config (`experiments.schema.plain`). Settling a settled config changes nothing.

    Raises:
        UserError: The method needs a teacher and there is none.
    """
    settled = {key: copy.deepcopy(value) for key, value in config.items() if key not in ("rows", "role", "plan")}
    if settled["cell"] == "teacher":
        if settled["teacher"]["network"] is None:
            raise UserError("cell=teacher: there is no teacher; add teacher=<network>, for example teacher=resnet56")
        settled = teacher_config(settled)
    method = settled["method"]["name"]
    if not METHODS[method].needs_teacher:
        settled["teacher"] = copy.deepcopy(NO_TEACHER)
    elif settled["teacher"]["network"] is None:
        raise UserError(f"method={method}: needs a teacher; add teacher=<network>, for example teacher=resnet56")
    else:
        teacher = settled["teacher"]
        there = {**settled, "dataset": {**settled["dataset"], **(teacher["dataset"] or {})}}
        teacher["network"] = _settled_network(teacher["network"], there)
    settled["student"]["network"] = _settled_network(settled["student"]["network"], settled)
    return settled


def teacher_config(config: Mapping[str, Any]) -> Config:
    """The teacher of a cell as a cell of its own: a plain student of that network.

    Keys of `teacher.dataset` and `teacher.schedule` replace those of the student's. Weights from a file or (where the
    scale allows and the data are ImageNet) from torchvision are scored, not trained: zero epochs.
    """
    teacher = config["teacher"]
    dataset = {**config["dataset"], **(teacher["dataset"] or {})}
    schedule = {**config["schedule"], **(teacher["schedule"] or {})}
    network = teacher["network"]
    full = network["width"] in (None, 1, 1.0) and not network["small_stem"]
    usable = config["scale"]["pretrained"] and dataset["name"] == "imagenet" and full and not teacher["checkpoint"]
    pretrained = teacher["pretrained"] if usable else None
    if teacher["checkpoint"] or pretrained:
        schedule["epochs"] = 0
    student = {"network": network, "checkpoint": teacher["checkpoint"], "pretrained": pretrained}
    labels = {**config["table"], "row": "teacher", "role": "teacher", "label": "Teacher"}
    return copy.deepcopy(
        {
            **config,
            "cell": "student",
            "teacher": NO_TEACHER,
            "student": student,
            "dataset": dataset,
            "schedule": schedule,
            "method": {"name": "none"},
            "seed": teacher["seed"],
            "table": labels,
        }
    )


def needs_of(config: Mapping[str, Any]) -> dict[str, Config | Path]:
    """What a settled cell needs, by name: the config of another cell, or a checkpoint."""
    if config["teacher"]["network"] is None:
        return {}
    if config["teacher"]["checkpoint"]:
        return {"teacher": Path(config["teacher"]["checkpoint"])}
    return {"teacher": settle(teacher_config(config))}


@functools.lru_cache(maxsize=64)
def _hash_file(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def content_hash(path: Path, key: str) -> str:
    """The hash of a checkpoint, and of the description beside it that says how to read it.

    Raises:
        UserError: There is no such file.
    """
    try:
        stat = path.stat()
        found = _hash_file(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        described = path.with_name("student.json")
        if described.exists():
            found = hashlib.sha256((found + described.read_text()).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"{key}={path}: expected a readable checkpoint file ({error.strerror})") from None
    return f"sha256:{found[:32]}"


def _canonical(value: Any, key: str) -> Any:
    """A value as it goes into the hash: 2.0 is 2, and nothing depends on where files lie."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item, key) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        raise UserError(f"{key.lstrip('.')}={value}: an absolute path cannot be part of what a cell is")
    return value


def semantics(config: Mapping[str, Any]) -> Config:
    """Everything that a settled cell's numbers depend on, and nothing else."""
    student, dataset, schedule, teacher = (config[key] for key in ("student", "dataset", "schedule", "teacher"))
    given = student["checkpoint"] or student["pretrained"]
    kept = {key: dataset[key] for key in (*Dataset.COMMON, *Dataset.OWN.get(dataset["name"], ()))}
    length = {key: value for key, value in schedule.items() if key != "evaluate_every"}
    if schedule["policy"] != "step":
        length = {key: value for key, value in length.items() if key not in ("milestones", "gamma")}
    if schedule["optimizer"] != "sgd":
        length = {key: value for key, value in length.items() if key not in ("momentum", "nesterov")}
    if schedule["epochs"] == 0:
        length = {"epochs": 0}
    needs: dict[str, str] = {}
    for name, need in needs_of(config).items():
        needs[name] = content_hash(need, f"{name}.checkpoint") if isinstance(need, Path) else identity(need)
    return {
        "version": IDENTITY_VERSION,
        "student": {
            "network": student["network"],
            "checkpoint": content_hash(Path(student["checkpoint"]), "checkpoint") if student["checkpoint"] else None,
            "pretrained": student["pretrained"],
        },
        "teacher": {"network": teacher["network"], "norm": teacher["norm"]} if teacher["network"] else None,
        "dataset": kept,
        "method": config["method"],
        "schedule": length,
        "precision": config["precision"],
        "seed": None if given and schedule["epochs"] == 0 else config["seed"],
        "needs": needs,
    }


def identity(config: Mapping[str, Any]) -> str:
    """The id of the cell that a config means: 16 hex digits."""
    content = _canonical(semantics(settle(config)), "")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_of(output_root: str | os.PathLike[str], cell_id: str) -> Path:
    """Where a cell lives."""
    return Path(output_root) / "cells" / cell_id


def _read_json(path: Path) -> Config | None:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_result(folder: Path) -> Config | None:
    """A finished cell's result, or None."""
    return _read_json(folder / "result.json") or None


def _is_held(folder: Path) -> bool:
    """Whether a living process works on the cell: the kernel drops a dead one's lock."""
    try:
        with FileLock(folder / "lock", timeout=0):
            return False
    except Timeout:
        return True


def read_status(folder: Path) -> Config:
    """How a cell stands: `status` is done, running, failed, interrupted or missing, with `error` where there is one.

    A cell that says it is running was killed, and so has failed, if nobody holds its lock; on another machine, whose
    locks may not be seen here, if its files have not changed for long.
    """
    if read_result(folder) is not None:
        return {**(_read_json(folder / "status.json") or {}), "status": "done", "error": None}
    status = _read_json(folder / "status.json")
    if not status:
        return {"status": "missing", "error": None}
    if status["status"] != "running" or _is_held(folder):
        return status
    if status["host"] != socket.gethostname():
        watched = [folder / name for name in ("status.json", "metrics.jsonl", "log.txt")]
        if time.time() - max(path.stat().st_mtime for path in watched if path.exists()) < STALE_SECONDS:
            return status
    return {**status, "status": "failed", "error": "the process was killed", "killed": True}


def world_size() -> int:
    """How many processes torchrun has started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that decides, locks and writes."""
    return world_size() == 1 or int(os.environ.get("RANK", "0")) == 0


def agree(value: Any) -> Any:
    """The first rank's value, on every rank."""
    if world_size() == 1:
        return value
    import datetime

    import torch

    if not torch.distributed.is_initialized():
        # A rank may wait as long as the first one waits for a lock.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def _exclusive(folder: Path, display: Display) -> Iterator[None]:
    """Holds the cell's lock on the first rank; says so when another process has it."""
    if not is_first():
        yield
        return
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0.5)  # others hold it for a moment to see whether somebody does
    except Timeout:
        display.line(f"  cell {folder.name}: waiting for another process that works on it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _earlier_seconds(folder: Path) -> float:
    """Time that earlier attempts spent; a killed one counts up to its last sign of life."""
    status = _read_json(folder / "status.json")
    if not status:
        return 0.0
    seconds = float(status.get("seconds") or 0.0)
    if status["status"] == "running":
        written = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
        seconds += max(0.0, max(written, default=0.0) - status["started"])
    return seconds


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
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    hardware: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "gpus": [], "processes": world_size()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def _open_folder(config: Config, cell_id: str) -> Path:
    """Makes the cell's folder.

    Raises:
        UserError: It cannot be written.
    """
    folder = folder_of(config["output_root"], cell_id)
    check_writable(config["output_root"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_writable(output_root: str | os.PathLike[str]) -> None:
    """Makes the output folder, or says why that is impossible.

    Raises:
        UserError: It cannot be made or written.
    """
    root = Path(output_root)
    try:
        (root / "cells").mkdir(parents=True, exist_ok=True)
        probe = root / "cells" / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_root={output_root}: expected a folder to write to ({error.strerror})") from None


def run_cell(config: Mapping[str, Any], display: Display | None = None) -> Config:
    """Trains a cell and first whatever it needs, unless it is done; goes on where an earlier attempt stopped.

    Args:
        config: A checked config.
        display: Where to show progress; this process's own by default.

    Returns:
        The content of `result.json`.

    Raises:
        UserError: The user's mistake, as the training found it.
        CellFailed: Any other error; the traceback is in the cell's `error.txt`.
        KeyboardInterrupt: After the status has been written.
    """
    settled = settle(config)
    display = display or current()
    cell_id = identity(settled)
    folder = _open_folder(settled, cell_id)
    with _exclusive(folder, display):
        done: Config | None = agree(read_result(folder))
        return done if done is not None else _attempt(settled, cell_id, folder, display)


def _attempt(config: Config, cell_id: str, folder: Path, display: Display) -> Config:
    """One attempt at a cell, with its status before and after."""
    status: Config = {"status": "running", "error": None, "user": False, "pid": os.getpid()}
    status |= {"host": socket.gethostname(), "started": time.time(), "finished": None}
    status["seconds"] = _earlier_seconds(folder)

    def write(**changes: Any) -> None:
        status.update(changes)
        if is_first():
            _write_json(folder / "status.json", status)

    def ended(kind: str, error: str | None = None, user: bool = False) -> None:
        now = time.time()
        write(status=kind, error=error, user=user, finished=now, seconds=status["seconds"] + now - status["started"])

    if is_first():
        _write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        (folder / "error.txt").unlink(missing_ok=True)
    write()
    try:
        paths, ids = _provide(config, display)
        write(started=time.time())  # what it needs has been counted there
        with cell_log(folder):
            from experiments.build import train_cell

            found = train_cell(config, folder, paths, display if is_first() else None)
        seconds = status["seconds"] + time.time() - status["started"]
        result = {"id": cell_id, "status": "done", **found, "config": config, "needs": ids, "seconds": seconds}
        result |= {"versions": _versions(), "commit": _commit(), "hardware": _hardware(), "threads": _threads()}
        if is_first():
            _write_json(folder / "result.json", result)
        ended("done")
        return result
    except KeyboardInterrupt:
        ended("interrupted")
        raise
    except UserError as error:
        ended("failed", str(error), user=True)
        raise
    except CellFailed as error:
        ended("failed", str(error))
        raise
    except (Exception, SystemExit) as error:  # a library that exits must not take the other cells along
        if is_first():
            (folder / "error.txt").write_text(traceback.format_exc())
        lines = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        ended("failed", message)
        raise CellFailed(f"cell {cell_id}: {message} (traceback: {folder / 'error.txt'})") from error


def _provide(config: Config, display: Display) -> tuple[dict[str, Path], dict[str, str]]:
    """Makes what a cell needs: name -> file, and name -> id."""
    paths, ids = {}, {}
    for name, need in needs_of(config).items():
        if isinstance(need, Path):
            paths[name], ids[name] = need, content_hash(need, f"{name}.checkpoint")
            continue
        result = run_cell(need, display)
        ids[name] = result["id"]
        paths[name] = folder_of(config["output_root"], result["id"]) / "student.pth"
    return paths, ids
