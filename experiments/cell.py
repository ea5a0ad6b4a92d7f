"""A cell: one student trained one way with one seed. What its config means, its identity, needs and attempts.

What it leaves in `<output_root>/cells/<id>/`, and how it stands, is in `kt.store`.
"""

from __future__ import annotations

import contextlib
import copy
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
from filelock import Timeout

from experiments.progress import Display, cell_log, current
from experiments.schema import ANALYSES
from kt import ranks
from kt.errors import UserError, nearest
from kt.files import checksum, write_json, write_sealed, write_text
from kt.models.names import CONFIG_NETWORK, DENSE_NETWORKS, NETWORKS
from kt.ranks import launched as world_size
from kt.ranks import launched_first as is_first
from kt.settings import METHODS, Dataset, Need
from kt.store import (
    IDENTITY_VERSION,
    STUDENT,
    begin,
    cells_of,
    check,
    evaluation_fault,
    evaluation_file,
    failure_file,
    folder_of,
    inspect,
    list_evaluation,
    lock_of,
    read_evaluation,
    seconds_spent,
    write_result,
    write_status,
)

Config = dict[str, Any]

NO_TEACHER: Config = {
    "network": None,
    "dataset": None,
    "schedule": None,
    "seed": 0,
    "checkpoint": None,
    "pretrained": None,
    "norm": "eval",
}
PACKAGES = ("torch", "torchvision", "timm", "mmengine", "numpy", "scipy", "hydra-core", "wandb")


class CellFailed(RuntimeError):
    """A cell ended in an error that is not the user's; the traceback is in its folder."""


def _settled_network(network: Config, dataset: Config, config: Config) -> Config:
    """A network whose width is a number: the scale's on embedded data, the full one on real data."""
    if network["width"] is not None:
        return network
    slim = dataset["name"] == "scenes" and network["name"] != CONFIG_NETWORK
    return {**network, "width": config["scale"]["width"] if slim else 1.0}


def _settled_pretrained(pretrained: str | None, network: Config, config: Config) -> str | None:
    """The ImageNet weights of a detector's or segmentor's backbone, where the scale takes any and the width is full."""
    if network["name"] not in DENSE_NETWORKS:
        return pretrained
    return pretrained if config["scale"]["pretrained"] and network["width"] == 1 else None


def _teacher_dataset(config: Mapping[str, Any]) -> Config:
    """A teacher's dataset: the student's with the keys of `teacher.dataset`."""
    return {**config["dataset"], **(config["teacher"]["dataset"] or {})}


def _check_task(network: Config, dataset: Config, key: str) -> None:
    """Refuses a network that cannot do what a dataset is for.

    Raises:
        UserError: Names both and the networks that can.
    """
    task, name = dataset["task"], network["name"]
    if (name == CONFIG_NETWORK) != (network["config"] is not None):
        raise UserError(f"{key}.network.config={network['config']}: goes with {key}={CONFIG_NETWORK}, which needs it")
    if task == "classification":
        fitting = list(NETWORKS)
    else:
        wanted = "detection" if task == "pedestrians" else task
        fitting = [other for other, spec in DENSE_NETWORKS.items() if spec.task == wanted]
        fitting += [CONFIG_NETWORK] if wanted != "keypoints" else []
    if name not in fitting:
        raise UserError(f"{key}={name}: not a network for {task}{nearest(name, fitting)}; choose {', '.join(fitting)}")


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
    elif settled["cell"] != "student":
        name, needs = settled["cell"], all_needs({**settled, "cell": "student"})
        need = needs.get(name)
        if not isinstance(need, dict):
            cells = [other for other, found in needs.items() if isinstance(found, dict)]
            raise UserError(f"cell={name}: this cell needs no such cell; expected student or one of {', '.join(cells)}")
        return need
    method, dataset = settled["method"]["name"], settled["dataset"]
    _check_task(settled["student"]["network"], dataset, "student")
    if dataset["task"] != "classification" and not METHODS[method].dense:
        able = ", ".join(name for name, kind in METHODS.items() if kind.dense)
        raise UserError(f"method={method}: teaches classifiers only; for {dataset['task']} choose {able}")
    if not METHODS[method].needs_teacher:
        settled["teacher"] = copy.deepcopy(NO_TEACHER)
    elif settled["teacher"]["network"] is None:
        raise UserError(f"method={method}: needs a teacher; add teacher=<network>, for example teacher=resnet56")
    else:
        teacher = settled["teacher"]
        teacher["network"] = _settled_network(teacher["network"], _teacher_dataset(settled), settled)
        teacher["pretrained"] = _settled_pretrained(teacher["pretrained"], teacher["network"], settled)
    student = settled["student"]
    student["network"] = _settled_network(student["network"], dataset, settled)
    student["pretrained"] = _settled_pretrained(student["pretrained"], student["network"], settled)
    return settled


def teacher_config(config: Mapping[str, Any]) -> Config:
    """The teacher of a cell as a cell of its own: a plain student of that network.

    Keys of `teacher.dataset` and `teacher.schedule` replace those of the student's. Weights from a file or (where the
    scale allows and the data are ImageNet) from torchvision are scored, not trained: zero epochs.
    """
    teacher = config["teacher"]
    dataset = _teacher_dataset(config)
    own = teacher["schedule"] or {}
    schedule = {**config["schedule"], **own}
    # A length in epochs replaces one in iterations, and the other way round.
    schedule |= {"iterations": None} if own.get("epochs") else {"epochs": None} if own.get("iterations") else {}
    network = teacher["network"]
    dense = network["name"] in DENSE_NETWORKS
    full = network["width"] in (None, 1, 1.0) and not network["small_stem"]
    usable = config["scale"]["pretrained"] and full and (dense or dataset["name"] == "imagenet")
    pretrained = teacher["pretrained"] if usable and not teacher["checkpoint"] else None
    if teacher["checkpoint"] or (pretrained and not dense):
        schedule |= {"epochs": 0, "iterations": None}
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
    found: dict[str, Config | Path] = {}
    if config["teacher"]["checkpoint"]:
        found["teacher"] = Path(config["teacher"]["checkpoint"])
    else:
        need = settle({**teacher_config(config), "evaluation": None})
        if need["dataset"]["name"] == "scenes" and config["dataset"]["name"] != "scenes":
            raise UserError(
                "teacher.checkpoint=null: the teacher would be trained on embedded data; give the file of its weights"
            )
        found["teacher"] = need
    own = METHODS[config["method"]["name"]].needs(config["method"])
    return {**found, **{name: _needed_config(config, name, need) for name, need in own.items()}}


def _needed_config(config: Mapping[str, Any], name: str, need: Need) -> Config:
    """The cell that a method or an analysis needs beside the teacher."""
    if need.of == "student":
        labels = {**config["table"], "row": name, "role": "baseline", "label": "Student alone"}
        alone = {"teacher": NO_TEACHER, "method": {"name": "none"}, "table": labels}
        made = {**config, **alone, "seed": config["seed"] + need.seed_offset}
    else:
        teacher = {**config["teacher"], "seed": config["teacher"]["seed"] + need.seed_offset}
        if need.seed_offset or not need.trained:
            teacher |= {"checkpoint": None, "pretrained": None}
        made = teacher_config({**config, "teacher": teacher})
    if not need.trained:
        made["schedule"] = {**made["schedule"], "epochs": 0, "iterations": None}
    return settle({**made, "cell": "student", "evaluation": None})


def evaluation_needs(config: Mapping[str, Any]) -> dict[str, Config]:
    """The cells that an analysis of a settled cell needs, by name; none for a score on a dataset."""
    analysis = ANALYSES.get(config["evaluation"])
    if analysis is None:
        return {}
    needs = analysis.needs if config["teacher"]["network"] is not None else analysis.needs_untaught
    if needs is None:
        raise UserError(f"evaluation={config['evaluation']}: compares with the teacher; the cell has none")
    return {name: _needed_config(config, name, need) for name, need in needs.items()}


def all_needs(config: Mapping[str, Any]) -> dict[str, Config | Path]:
    """What a settled cell and its evaluation need; only the former is part of what the cell is."""
    return {**evaluation_needs(config), **needs_of(config)}


def content_hash(path: Path, key: str) -> str:
    """The hash of a checkpoint, and of the description beside it that says how to read it.

    Raises:
        UserError: There is no such file, or it is not what the cell that it is from has left.
    """
    check(path.parent, path.name, "student.json")
    try:
        found = checksum(path)
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


def _network_content(network: Config) -> Config:
    """A network with the content of its config file in the place of the file's name."""
    if network["config"] is None:
        return {key: value for key, value in network.items() if key not in ("config", "options")}
    from mmengine.config import Config as FileConfig

    try:
        content = FileConfig.fromfile(network["config"]).get("model")
        text = json.dumps(content, sort_keys=True, default=str)
    except Exception as error:  # a config is a program: anything may go wrong in it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"network.config={network['config']}: cannot be read as a config of mmdet or mmseg ({reason})"
        ) from None
    return {**network, "config": hashlib.sha256(text.encode()).hexdigest()[:32]}


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
            "network": _network_content(student["network"]),
            "checkpoint": content_hash(Path(student["checkpoint"]), "checkpoint") if student["checkpoint"] else None,
            "pretrained": student["pretrained"],
        },
        "teacher": {"network": _network_content(teacher["network"]), "norm": teacher["norm"]}
        if teacher["network"]
        else None,
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


def agree(value: Any) -> Any:
    """The first rank's value, on every rank."""
    if world_size() == 1:
        return value
    ranks.join()
    return ranks.from_first(value)


@contextlib.contextmanager
def _exclusive(folder: Path, display: Display) -> Iterator[None]:
    """Holds the cell's lock on the first rank; says so when another process has it."""
    if not is_first():
        yield
        return
    lock = lock_of(folder)
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
    cells = cells_of(output_root)
    try:
        cells.mkdir(parents=True, exist_ok=True)
        probe = cells / f".probe.{os.getpid()}"
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
        result, fault = agree(inspect(folder))
        if fault:
            display.line(f"  cell {cell_id}: {fault}: it is made again from what is left")
        if result is None:
            result = _attempt(settled, cell_id, folder, display)
        if settled["evaluation"] is not None:
            _evaluate(settled, folder, display)
        return result


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _evaluate(config: Config, folder: Path, display: Display) -> None:
    """Scores a finished student on another dataset, or analyses it, unless that is done.

    Raises:
        UserError: The dataset is missing or for another task.
        CellFailed: Any other error; the traceback is in the cell's `error.txt`.
    """
    name = config["evaluation"]
    path = evaluation_file(folder, name)
    scored, fault = agree((read_evaluation(folder, name) is not None, evaluation_fault(folder, name)))
    if fault:
        display.line(f"  cell {folder.name}: {fault}: it is made again")
    if scored:
        return
    failure = failure_file(folder, name)
    started = time.time()

    def failed(error: str, user: bool) -> None:
        if is_first():
            write_sealed(failure, {"status": "failed", "error": error, "user": user, "started": started})

    if is_first():
        path.parent.mkdir(exist_ok=True)
    try:
        if config["evaluation"] in ANALYSES:
            paths, _ = _provide(config, all_needs(config), display)
            with cell_log(folder):
                from experiments.analyses import analyse_cell

                metrics = analyse_cell(config, folder, paths)
        else:
            with cell_log(folder):
                from experiments.build import evaluate_cell

                metrics = evaluate_cell(config, folder)
    except UserError as error:
        failed(str(error), user=True)
        raise
    except CellFailed as error:
        failed(str(error), user=False)
        raise
    except (Exception, SystemExit) as error:  # as in `_attempt`
        if is_first():
            (folder / "error.txt").write_text(traceback.format_exc())
        failed(_one_line(error), user=False)
        raise CellFailed(f"evaluation={name}: {_one_line(error)} (traceback: {folder / 'error.txt'})") from error
    if is_first():
        failure.unlink(missing_ok=True)
        write_json(path, metrics)
        list_evaluation(folder, name, *(ANALYSES[name].files if name in ANALYSES else ()))


def _attempt(config: Config, cell_id: str, folder: Path, display: Display) -> Config:
    """One attempt at a cell, with its status before and after."""
    status: Config = {"status": "running", "error": None, "user": False, "pid": os.getpid()}
    status |= {"host": socket.gethostname(), "started": time.time(), "finished": None}
    status["seconds"] = seconds_spent(folder)

    def write(**changes: Any) -> None:
        status.update(changes)
        if is_first():
            write_status(folder, status)

    def ended(kind: str, error: str | None = None, user: bool = False) -> None:
        now = time.time()
        write(status=kind, error=error, user=user, finished=now, seconds=status["seconds"] + now - status["started"])

    if is_first():
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        (folder / "error.txt").unlink(missing_ok=True)
        begin(folder)
    write()
    try:
        paths, ids = _provide(config, needs_of(config), display)
        write(started=time.time())  # what it needs has been counted there
        with cell_log(folder):
            from experiments.build import train_cell

            found = train_cell(config, folder, paths, display if is_first() else None)
        seconds = status["seconds"] + time.time() - status["started"]
        result = {"id": cell_id, "status": "done", **found, "config": config, "needs": ids, "seconds": seconds}
        result |= {"versions": _versions(), "commit": _commit(), "hardware": _hardware(), "threads": _threads()}
        if is_first():
            result = write_result(folder, result)
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
        message = _one_line(error)
        ended("failed", message)
        raise CellFailed(f"cell {cell_id}: {message} (traceback: {folder / 'error.txt'})") from error


def _provide(
    config: Config, needs: Mapping[str, Config | Path], display: Display
) -> tuple[dict[str, Path], dict[str, str]]:
    """Makes what a cell needs: name -> file, and name -> id.

    Raises:
        UserError: The user's mistake, under the key that it has in this cell's config.
    """
    paths, ids = {}, {}
    for name, need in needs.items():
        if isinstance(need, Path):
            paths[name], ids[name] = need, content_hash(need, f"{name}.checkpoint")
            continue
        try:
            result = run_cell(need, display)
        except UserError as error:
            part = str(error).partition(".")[0]
            if name == "teacher" and part in ("dataset", "schedule") and config["teacher"][part] is not None:
                raise UserError(f"teacher.{error}") from None
            raise
        ids[name] = result["id"]
        paths[name] = folder_of(need["output_root"], result["id"]) / STUDENT
    return paths, ids
