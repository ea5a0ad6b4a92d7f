"""What the machine does to a run: full disks, folders of others, broken pipes. One line says so, nothing is lost."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb

import fake_training
from checks import bits, without_speed
from configs import composed
from experiments import cell, mirror, progress
from experiments.launch import Report, SideBySide
from experiments.meaning import identity
from experiments.plan import Job, jobs_of, plan_lines
from experiments.progress import Display, cell_log
from experiments.run import main
from kt.errors import DiskFull, UserError
from kt.files import STALE_SECONDS, read_sealed, write_json, write_sealed
from kt.store import close, folder_of, glance, note_queue, read_result, read_status, write_status
from kt.wandb import MARK, WandbRun
from results import make_row, write_cell
from tables.__main__ import run as run_tables
from tables.collect import collect
from tables.folders import NotWritten
from tables.pages import facts_of
from tables.render import write_table
from tables.sweeps import write_sweep

ROOT = Path(__file__).resolve().parent.parent
TABLE = "imagenet_compression"
NOBODY = 65534
TINY = ("student=resnet8", "dataset.image_size=24", "dataset.train_size=48", "dataset.test_size=32")
TINY += ("schedule.epochs=1", "schedule.batch_size=48", "wandb.mode=disabled", "device=cpu")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for training and rendering."""
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(progress, "_current", None)


# --------------------------------------------------------------------------------------------------------- full disks


class _Full(io.FileIO):
    """A file of a disk that is full: it can be made, and holds nothing."""

    def write(self, data: Any, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    """Stands between the code and `open`: notes what is written, by its final name, and is full for some of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.written: list[str] = []
        self.full: Callable[[str], bool] = lambda name: False
        self.real = builtins.open
        monkeypatch.setattr(builtins, "open", self.open)

    def open(self, file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return self.real(file, mode, *arguments, **keywords)
        name = re.sub(r"^\.(.*)\.\d+\.tmp$", r"\1", Path(file).name)
        self.written.append(name)
        if not self.full(name):
            return self.real(file, mode, *arguments, **keywords)
        raw = _Full(file, mode.replace("b", ""))
        if keywords.get("buffering") == 0:
            return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, line_buffering=True)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


AROUND = ("data.json", "config.yaml", "status.json", "log.txt", "result.json")  # `kt.store` and `experiments.cell`
TRAINING = ("metrics.jsonl", "epoch_1.pth", "checkpoint.pth", "test.json", "test.npz", "student.pth", "student.json")
LIBRARIES = ("log.log",)  # mmengine's own
SPARED = ("log.txt",)  # what is not worth a failure


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell that was trained without any trouble, with the images that all others draw."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        written = Disk(patch).written
        folder = train(root)
    drawn = [path.name for path in root.glob("cache/*.npz")]
    assert {*written} == {*AROUND, *TRAINING, *LIBRARIES, *drawn}  # the list below is the whole one
    return folder


def train(root: Path) -> Path:
    """A small cell; returns its folder."""
    result = cell.run_cell(composed(*TINY, f"output_root={root}"), Display(quiet=True))
    return folder_of(root, result["id"])


def numbers(folder: Path) -> tuple[Any, ...]:
    return bits(torch.load(folder / "student.pth")), without_speed(folder), (read_result(folder) or {})["metrics"]


def check_told(folder: Path, where: Path) -> None:
    """That a full disk has left a status which says so, and nothing half written."""
    status = read_status(folder)
    assert (status["status"], status["user"]) == ("failed", False) and f"no space left on {where}" in status["error"]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name", TRAINING)
def test_a_full_disk_during_training_costs_nothing(name: str, whole: Path, tmp_path: Path, disk: Disk) -> None:
    shutil.copytree(whole.parent.parent / "cache", tmp_path / "cache")
    disk.full = lambda each: each == name
    with pytest.raises(DiskFull, match="no space left on .*: make some, and the same command goes on from here"):
        train(tmp_path)
    check_told(tmp_path / "cells" / whole.name, tmp_path / "cells" / whole.name)
    done = [path.name for path in tmp_path.glob("cells/*/phases/*/checkpoint.pth")]
    assert bool(done) is (TRAINING.index(name) > TRAINING.index("checkpoint.pth"))
    disk.full = lambda each: False
    assert numbers(train(tmp_path)) == numbers(whole)


@pytest.mark.parametrize("name", [*AROUND, "all"])
def test_a_full_disk_around_a_training(name: str, stand_in: None, tmp_path: Path, disk: Disk) -> None:
    config = composed(f"output_root={tmp_path}")
    folder = folder_of(tmp_path, identity(config))
    disk.full = lambda each: name in (each, "all")
    if name in SPARED:
        assert cell.run_cell(config)["status"] == "done"
        return
    with pytest.raises(DiskFull, match=f"no space left on {folder}"):
        cell.run_cell(config)
    if name in ("data.json", "config.yaml", "result.json"):
        check_told(folder, folder)
    disk.full = lambda each: False
    assert cell.run_cell(config)["status"] == "done" and read_status(folder)["status"] == "done"


def test_a_status_that_there_is_no_room_for_takes_the_place_of_the_last(
    stand_in: None, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up in the course of a training takes no new file; one that is there can be written over."""

    def fill(*_: Any) -> None:
        monkeypatch.setattr(disk, "open", None)
        monkeypatch.setattr(builtins, "open", only_old)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def only_old(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return disk.real(file, mode, *arguments, **keywords)

    monkeypatch.setattr(sys.modules["experiments.build"], "train_cell", fill)
    config = composed(f"output_root={tmp_path}")
    with pytest.raises(DiskFull):
        cell.run_cell(config)
    folder = folder_of(tmp_path, identity(config))
    check_told(folder, folder)
    assert read_status(folder)["finished"]


SCORED = ("student=deeplabv2_vgg16", "dataset=scenes_seg", "evaluation=gta5")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
    ids=str,
)
def test_memory_that_there_is_not_is_the_machines(
    error: Exception,
    stand_in: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["experiments.build"], "train_cell", train)
    assert main([f"output_root={tmp_path}"]) == 3
    said = capsys.readouterr().err
    assert "not enough memory, of which a smaller schedule.device_batch" in said and said.count("\n") == 1
    (path,) = tmp_path.glob("cells/*/error.txt")
    assert "Traceback" in path.read_text()


@pytest.mark.parametrize("name", ["gta5.json", "result.json", "gta5.failed", "error.txt", "all"])
def test_a_full_disk_while_a_student_is_scored(
    name: str, stand_in: None, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*SCORED, f"output_root={tmp_path}")
    trained = cell.run_cell({**config, "evaluation": None})
    folder, failing = folder_of(tmp_path, trained["id"]), name in ("gta5.failed", "error.txt")
    if failing:  # the handlers of another failure
        monkeypatch.setenv("FAKE_TRAINING", json.dumps({"evaluation": "error"}))
    disk.full = lambda each: name in (each, "all")
    with pytest.raises(cell.CellFailed if failing else DiskFull, match="no such layer" if failing else "no space left"):
        cell.run_cell(config)
    assert read_status(folder)["status"] == "done" and not list(folder.rglob("*.tmp"))
    monkeypatch.delenv("FAKE_TRAINING", raising=False)
    disk.full = lambda each: False
    cell.run_cell(config)
    assert read_status(folder, "gta5")["status"] == "done"


def test_the_traceback_of_another_failure_needs_no_room(
    stand_in: None, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": "error"}))
    disk.full = lambda each: each == "error.txt"
    config = composed(f"output_root={tmp_path}")
    with pytest.raises(cell.CellFailed, match="the loss is not finite"):
        cell.run_cell(config)
    assert "the loss is not finite" in read_status(folder_of(tmp_path, identity(config)))["error"]


PAGES = ("table.md", "table.csv", "table.tex", "rows.json", "table.json", "index.html")
PLOTTED = ("loss", "accuracy", "l1", "l2", "l3", "accuracy1", "accuracy2")
RECORDS = [
    {"kind": "train", "phase": "train", "step": n, "epoch": n / 2, "lr": 0.1, **dict.fromkeys(PLOTTED, 1.0)}
    for n in (1, 2, 3, 4)
]


def render(root: Path) -> Path:
    """A table of one row, with its curves."""
    write_cell(root, "hybrid_forward-s0", {"top1": 60.0, "top5": 80.0}, RECORDS)
    return write_table(TABLE, [make_row(TABLE, "hybrid_forward")], root, "mini", "scenes")


def render_sweep(root: Path) -> Path:
    write_cell(root, "kd-s0", {"top1": 60.0}, RECORDS)
    return write_sweep("sweep-1", [], [make_row(TABLE, "kd")], root)


@pytest.mark.parametrize("writer", [render, render_sweep])
def test_a_full_disk_at_each_file_of_a_rendering(
    writer: Callable[[Path], Path], tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tables.figures._shows", lambda png, digest: False)  # every plot is written again
    monkeypatch.setattr("tables.figures.as_png", lambda panel, digest: b"drawn")
    monkeypatch.setattr("tables.figures.as_svg", lambda panel: "<svg></svg>")
    folder = writer(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    expected = {path.name for path in before}
    assert expected == {name for name in {*disk.written} if (folder / name).exists() or name.endswith((".png", ".csv"))}
    assert any(name.endswith(".png") for name in expected) and {"table.md", "rows.json", "index.html"} <= expected
    assert writer is render_sweep or {*PAGES} <= expected
    for name in expected:
        disk.full = lambda each, name=name: each == name
        with pytest.raises(NotWritten, match=f"no space left on {folder}") as raised:
            writer(tmp_path)
        assert raised.value.status == 3 and "60.0" in raised.value.text
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, name


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_status(folder, {"status": "failed"}),
        lambda folder: note_queue(folder, "1", {}),
        lambda folder: write_json(folder / "checksums.json", {}),
    ],
)
def test_a_full_disk_leaves_what_was_there(write: Callable[[Path], None], tmp_path: Path, disk: Disk) -> None:
    write_status(tmp_path, {"status": "running"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    disk.full = lambda each: True
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------- other users, read-only


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users can get into, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="kt-shared-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(act: Callable[[], Any]) -> Any:
    """What a function gives in a process of the user `nobody`; without the right to become that one, in any process.

    What it imports has to be there already: the interpreter may lie where `nobody` cannot read.
    """
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            theirs.send(act())
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def printed(act: Callable[[], int]) -> tuple[int, str]:
    """A command's exit status and what it has printed, on either stream."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", said)
        patch.setattr(sys, "stderr", said)
        return act(), said.getvalue()


def make_private(folder: Path, *names: str) -> None:
    """As a umask of 077 would; without an owner to tell apart, for nobody."""
    for name in names:
        (folder / name).chmod(0o600 if os.geteuid() == 0 else 0)


@pytest.mark.parametrize("name", ["result.json", "status.json", "student.pth", "."])
def test_a_cell_that_only_another_user_can_read(name: str, stand_in: None, shared: Path) -> None:
    config = composed(f"output_root={shared}")
    folder = folder_of(shared, cell.run_cell(config)["id"])
    row = make_row(TABLE, "kd", cells=[{"id": folder.name, "seed": 0}])
    make_private(folder, name)

    def look() -> list[Any]:
        plan = "\n".join(plan_lines(jobs_of(config), str(shared), 1))
        (found,) = collect(TABLE, [row], shared, "mini")["rows"]
        assert facts_of([found], shared)["cells"].endswith("of 1 done")  # the page's
        assert glance(folder) in ("done", "failed")  # the overview's
        try:
            cell.run_cell(config)
        except UserError as error:
            return [plan, found["cells"][0], str(error)]
        return [plan, found["cells"][0], "nothing"]

    plan_lines(jobs_of(config), str(shared), 1)  # imports what it needs
    collect(TABLE, [row], shared, "mini")
    try:
        plan, shown, error = as_nobody(look)
    finally:
        folder.chmod(0o755)
    if name == "status.json":  # which a finished cell can do without
        assert shown["status"] == "done" and "1 done" in plan and error == "nothing"
    else:
        told = f"{folder}.*cannot be read .Permission denied"
        assert shown["status"] == "failed" and re.search(told, shown["error"]) and re.search(told, error)
        assert "0 done" in plan


def test_a_lock_that_only_another_user_can_take(stand_in: None, shared: Path) -> None:
    config = composed(f"output_root={shared}")
    folder = folder_of(shared, identity(config))
    folder.mkdir(parents=True)
    running = {"status": "running", "error": None, "host": socket.gethostname(), "started": time.time()}
    write_status(folder, running)
    (folder / "lock").touch()
    make_private(folder, "lock")

    def look() -> list[Any]:
        before = read_status(folder)["status"]
        try:
            cell.run_cell(config)
        except UserError as error:
            return [before, str(error)]
        return [before, "nothing"]

    before, told = as_nobody(look)
    assert before == "running" and "Permission denied" in told
    old = time.time() - STALE_SECONDS - 1
    os.utime(folder / "status.json", (old, old))
    assert as_nobody(lambda: read_status(folder)["status"]) == "failed"


def test_what_is_done_can_be_read_in_a_read_only_folder(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan=true`, a finished table and cell printed again by `experiments.run`, and by `tables`."""
    write_cell(shared, "kd-s0", {"top1": 60.0, "top5": 80.0})
    folder = write_table(TABLE, [make_row(TABLE, "kd")], shared, "mini", "scenes")
    commands: dict[str, Callable[[], int]] = {
        "list": lambda: run_tables(["--output-root", str(shared)]),
        "table": lambda: run_tables([TABLE, "--output-root", str(shared)]),
    }
    for command in commands.values():  # imports what they need
        printed(command)
    for path in [shared, *shared.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        found = {name: as_nobody(lambda command=command: printed(command)) for name, command in commands.items()}
        make_private(folder, ".")
        private = as_nobody(lambda: printed(commands["list"]))
    finally:
        for path in [shared, *shared.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    assert found["list"][0] == 0 and "1/1 done" in found["list"][1]
    status, said = found["table"]
    assert status == 0 and "60.0" in said
    assert private[0] == 0 and "unreadable" in private[1]
    assert f"kt: not written: {folder}: expected a folder to write to (Permission denied" in said


def test_a_finished_run_needs_no_place_to_write_to(stand_in: None, shared: Path) -> None:
    table = ["+table=kcd_dynamic", "rows=baseline", "workers=1", f"output_root={shared}"]
    assert main(table) == 0
    single, *_ = (path.parent for path in shared.glob("cells/*/result.json"))
    config = read_result(single)["config"]  # type: ignore[index]
    for path in [shared, *shared.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)

    def nowhere(*_: Any, **__: Any) -> Path:
        raise NotWritten(UserError(f"{shared}: expected a folder to write to (Permission denied)"), "| the table |")

    def again() -> list[Any]:
        sys.modules["tables.render"].write_table = nowhere  # type: ignore[attr-defined]
        return [printed(lambda: main(table)), printed(lambda: main([*table, "plan=true"])), cell.run_cell(config)["id"]]

    try:
        (status, said), (planned, plan), found = as_nobody(again)
    finally:
        for path in [shared, *shared.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    assert status == 0 and "| the table |" in said and "not written" in said
    assert planned == 0 and "done" in plan and found == single.name


# -------------------------------------------------------------------------------------------------- what is printed


def python(code: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import sys; from kt import command; sys.exit(command.run({code}))"]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False, **streams)


CHATTY = "lambda: [print('x' * 70) for _ in range(9999)] and int(print('last', flush=True) is None) - 1"


def test_output_that_nobody_reads_does_not_end_the_work() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = python(CHATTY, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_what_python_does_not_buffer_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    code = "lambda: print('one', file=sys.stderr) or print('two') or __import__('os').write(1, b'three') - 5"
    ended = python(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (ended.returncode, ended.stdout) == (0, b"one\ntwo\nthree")


def test_output_that_cannot_be_written_is_a_failure() -> None:
    with open("/dev/full", "wb") as full:
        ended = python(CHATTY, stdout=full, stderr=subprocess.PIPE)
        assert (ended.returncode, ended.stderr) == (
            3,
            b"kt: error: the output cannot be written (No space left on device)\n",
        )
        assert python(CHATTY, stdout=full, stderr=full).returncode == 3


def test_closed_streams_are_no_files_of_the_run(tmp_path: Path) -> None:
    """The next file that is opened would get the number of the stream that was closed, and what is printed."""
    code = f"lambda: open({str(tmp_path / 'file')!r}, 'w') and (print('x', flush=True) or 0)"
    ended = python(code, preexec_fn=lambda: os.closerange(0, 3))
    assert ended.returncode == 0 and (tmp_path / "file").read_bytes() == b""


def test_a_deleted_working_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["plan=true"]) == 2
    assert capsys.readouterr().err == "kt: error: the working directory is gone: cd to one that is there\n"


# ------------------------------------------------------------------------------------------------- what is left over


def sealed(path: Path, **content: Any) -> None:
    write_sealed(path, content)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"status": "running"}'),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: sealed(path, version=1),
        lambda path: sealed(path, status="running"),
        lambda path: sealed(path, status="running", host="elsewhere"),
        Path.mkdir,
    ],
)
def test_a_status_that_is_not_ours(foreign: Callable[[Path], Any], stand_in: None, tmp_path: Path) -> None:
    config = composed(f"output_root={tmp_path}")
    folder = folder_of(tmp_path, identity(config))
    folder.mkdir(parents=True)
    foreign(folder / "status.json")
    assert read_status(folder)["status"] in ("missing", "failed", "running")
    if foreign is Path.mkdir:
        with pytest.raises(UserError, match="status.json: cannot be read .Is a directory"):
            cell.run_cell(config)
    else:
        assert cell.run_cell(config)["status"] == "done" and read_status(folder)["status"] == "done"


def test_what_killed_runs_have_begun_to_write_is_swept(stand_in: None, tmp_path: Path) -> None:
    config = composed(f"output_root={tmp_path}")
    folder = folder_of(tmp_path, identity(config))
    own = [folder / ".status.json.1.tmp", folder / "phases" / "0-train" / ".checkpoint.pth.1.tmp"]
    places = [tmp_path / "tables" / TABLE / "mini", tmp_path / "cache", tmp_path / "rehearsals", tmp_path / "sweeps"]
    old, young = ([place / f".{name}.1.tmp" for place in places] for name in ("old", "young"))
    for path in (*own, *old, *young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in old:
        os.utime(path, (0, time.time() - STALE_SECONDS - 1))
    cell.run_cell(config)
    cell.sweep_up(tmp_path)
    assert sorted(tmp_path.rglob("*.tmp")) == sorted(young)  # another process may be at them


def test_ctrl_c_is_heard_at_every_moment_of_an_attempt(
    stand_in: None, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the status is written, before the training and after it."""
    config = composed(f"output_root={tmp_path}")
    folder, names = folder_of(tmp_path, identity(config)), [*AROUND]
    moments = 0

    def interrupt(name: str) -> bool:
        nonlocal moments
        if name in AROUND and (moments := moments - 1) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    disk.full = interrupt
    with cell.lifeline.interruptible():
        monkeypatch.setattr(signal, "default_int_handler", signal.default_int_handler)
        for moment in range(1, len(names) + 2):
            moments = moment
            with pytest.raises(KeyboardInterrupt):
                cell.run_cell(config)
            assert (read_sealed(folder / "status.json") or {})["status"] == "interrupted", moment
            assert read_status(folder)["status"] in ("interrupted", "done")
            (folder / "result.json").unlink(missing_ok=True)


def test_a_killed_cell_is_closed_when_its_run_is_interrupted(tmp_path: Path) -> None:
    write_status(tmp_path, {"status": "running", "error": None, "host": socket.gethostname(), "started": time.time()})
    assert read_status(tmp_path)["killed"]
    assert close(tmp_path)["status"] == "interrupted" == read_sealed(tmp_path / "status.json")["status"]  # type: ignore[index]
    write_status(tmp_path, {"status": "failed", "error": "its own"})
    assert close(tmp_path)["error"] == "its own"


# ----------------------------------------------------------------------------------------------------------- warnings

CHANCE = "THE TEACHER IS NEAR CHANCE: top1 1.00 on 100 classes"


@pytest.fixture
def warning(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell that is trained warns of its teacher; a third party warns as well."""

    def train(*arguments: Any) -> dict[str, Any]:
        logging.getLogger("kt.anything").warning(CHANCE)
        logging.getLogger("kt.anything").info("of no account")
        logging.getLogger("elsewhere").warning("of a third party")
        return fake_training.train_cell(*arguments)

    monkeypatch.setattr(sys.modules["experiments.build"], "train_cell", train)


def test_a_warning_is_told_once_and_kept(
    warning: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for again in (False, True):  # the second finds everything done
        monkeypatch.setattr(progress, "_current", None)
        for seed in (0, 1):
            result = cell.run_cell(composed(f"output_root={tmp_path}", f"seed={seed}"))
        said = capsys.readouterr()
        assert said.out.count(CHANCE) == 1 and "third party" not in said.out + said.err, again
        folder = folder_of(tmp_path, result["id"])
        assert read_status(folder)["warnings"] == [CHANCE] and "of a third party" in (folder / "log.txt").read_text()


def test_a_log_holds_names_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest-xdist cannot send what pytest's would keep
    name, heard = os.fsdecode(b"caf\xe9.jpg"), list[str]()
    with cell_log(tmp_path, heard.append):
        logging.getLogger("kt.data").warning("%s: is no image that is read", name)
        print(name)
    assert heard == [f"{name}: is no image that is read"]
    assert (tmp_path / "log.txt").read_bytes().count(b"caf\xe9.jpg") == 2


def test_a_table_says_what_its_workers_met(
    warning: None, tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.full = lambda each: each == "result.json"
    assert main([f"+table={TABLE}", "rows=kd", "workers=1", f"output_root={tmp_path}"]) == 3
    said = capsys.readouterr()
    assert f"X teacher seed 0: no space left on {tmp_path}" in said.out and "Traceback" not in said.out + said.err
    assert said.out.count(f"warning: {CHANCE}") == 1


def test_a_warning_of_a_worker_is_shown_once_in_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = {name: Job(name, [], {}, name, [], {"status": "missing"}) for name in "ab"}
    report = Report("table", jobs, str(tmp_path), Display())
    run = SideBySide(report, 2)
    run.running = dict(jobs)
    for name in jobs:
        run._hear({"of": name, "warning": CHANCE})
        report.ended(jobs[name], {"status": "failed", "error": "x", "warnings": [CHANCE, f"of {name}"]})
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "warning" in line] == [f"warning: {text}" for text in (CHANCE, "of a", "of b")]


@pytest.mark.parametrize("sweep", [False, True])
def test_a_warning_is_on_the_page(sweep: bool, tmp_path: Path) -> None:
    rows = [make_row(TABLE, name) for name in ("kd", "at", "ft")]
    for row in rows:
        folder = write_cell(tmp_path, row["cells"][0]["id"], {"top1": 60.0, "top5": 80.0})
        warned = [] if row["id"] == "ft" else [CHANCE, "<b>bold</b>"]
        write_status(folder, {"status": "done", "error": None, "warnings": warned})
    if sweep:
        folder = write_sweep("sweep-1", [], rows, tmp_path)
    else:
        folder = write_table(TABLE, rows, tmp_path, "mini", "scenes")
    page = (folder / "index.html").read_text()
    assert f"{CHANCE} (KD, AT)" in page and "&lt;b&gt;bold" in page
    assert json.loads((folder / "table.json").read_text())["warnings"][0] == {"warning": CHANCE, "rows": ["KD", "AT"]}


# -------------------------------------------------------------------------------------------------------------- W&B


def test_wandb_is_asked_once_for_all_cells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def ask(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=1, stderr="many lines\nCommError: no such host\n")

    def jobs(mode: str) -> list[Job]:
        return [Job(name, ["++seed=1"], {"wandb": {"mode": mode}}, name, []) for name in "ab"]

    monkeypatch.setattr(subprocess, "run", ask)
    mirror.go_offline(offline := jobs("offline"), Display())
    assert not asked and all(job.overrides == ["++seed=1"] for job in offline)
    mirror.go_offline(online := jobs("online"), Display())
    assert len(asked) == 1 and all(job.config["wandb"]["mode"] == "offline" for job in online)
    assert all(job.overrides[-1] == "++wandb.mode=offline" for job in online)
    assert capsys.readouterr().out.count("wandb.mode=online: CommError: no such host; runs are kept offline") == 1
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stderr=""))
    mirror.go_offline(online := jobs("online"), Display())
    assert all(job.config["wandb"]["mode"] == "online" for job in online)


def test_what_cannot_be_online_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what goes wrong later on ends W&B's own process, whose end would otherwise be a traceback of this one."""
    tried, torn = [], []

    def init(mode: str, **_: Any) -> SimpleNamespace:
        tried.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no such host\nsecond line")
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=broken)

    def broken(*_: Any) -> None:
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: torn.append(len(tried)) or broken())
    about = {"id": "kd", "name": "kd", "group": "table", "job_type": "method", "tags": [], "config": {}}
    run = WandbRun(tmp_path, {"mode": "online"}, about, tmp_path / MARK)
    assert run.run is not None and tried == ["online", "offline"] and torn == [1]
    run.log({"kind": "train", "phase": "train", "step": 1, "epoch": 1.0, "loss": 1.0})
    assert run.run is None and torn == [1, 2]
    assert [record.message for record in caplog.records] == [
        "Weights & Biases is offline for this run: CommError: no such host",
        "Weights & Biases is off for this run: ConnectionResetError: the service is gone",
    ]
