"""Cells side by side: order, ends of every kind, and that no worker outlives its run. The training is a stand-in."""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fake_training
from configs import composed
from experiments import devices, plan
from experiments.launch import ByLauncher, Report
from experiments.lifeline import GRACE_SECONDS, started
from experiments.meaning import settle
from experiments.plan import (
    REHEARSAL_VERSION,
    Agenda,
    Job,
    Times,
    case_key,
    jobs_of,
    length_key,
    makespan,
    plan_lines,
    pooled,
    pooled_of,
    rehearsals_of,
    waves,
)
from experiments.progress import Display
from experiments.workers import Pool, default_workers
from kt.files import write_json, write_sealed
from kt.store import folder_of, read_status

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
TABLE = "+table=imagenet_compression"
PATIENCE = 20.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command whose workers see the stand-in; its method's cells do what `does` says."""
    fake_training.write_site(tmp_path / "site")
    begun = []

    def begin(*arguments: str, **does: Any) -> subprocess.Popen[str]:
        begun.append(fake_training.start(tmp_path, *arguments, **does))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    """Method (or `teacher`) -> status of every cell there is."""
    found = {}
    for path in (folder / "out").glob("cells/*/config.yaml"):
        text = path.read_text()
        name = "teacher" if "role: teacher" in text else text.partition("method:\n  name: ")[2].partition("\n")[0]
        found[name] = read_status(path.parent)
    return found


def wait_for(true: Callable[[], Any]) -> Any:
    """What a condition gives once it holds."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def running(folder: Path, *methods: str) -> Callable[[], list[int]]:
    """The processes of cells, once all of them train."""

    def look() -> list[int]:
        found = cells(folder)
        begun = [found[name] for name in methods if found.get(name, {}).get("status") == "running"]
        called = [path for path in (folder / "out").glob("cells/*/calls")]
        return [status["pid"] for status in begun] if len(begun) == len(methods) <= len(called) else []

    return look


def parent(pid: int) -> int:
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def job(name: str, *needs: str, method: str = "kd") -> Job:
    return Job(name, [], {"method": {"name": method}}, name, list(needs), {"status": "missing"})


# ------------------------------------------------------------------------------------------------------------- order


def test_teachers_come_first_and_then_the_longest() -> None:
    jobs = {each.id: each for each in (job("alone"), job("short", "teacher"), job("long", "teacher"), job("teacher"))}
    agenda = Agenda(jobs, Times({"alone": 50.0, "short": 10.0, "long": 40.0, "teacher": 20.0}))
    order = [agenda.take() for _ in range(2)]
    assert [each.id for each in order if each] == ["teacher", "alone"]
    assert agenda.take(["teacher", "alone"]) is None  # what is left needs the teacher
    assert [each.id for each in iter(lambda: agenda.take(["alone"]), None)] == ["long", "short"]


def test_what_becomes_known_changes_the_order() -> None:
    jobs = {name: job(name, *needs) for name, *needs in (("a",), ("b",), ("c", "b"), ("d",))}
    agenda = Agenda(jobs, Times(dict.fromkeys(jobs, 1.0)))
    (first,) = [agenda.take()]
    assert first is jobs["b"]
    agenda.order(Times({"a": 2.0, "c": 5.0, "d": 9.0}))
    assert agenda.take(["b"]) is jobs["d"]
    agenda.waiting["b"] = first  # its server was lost
    assert [each.id for each in iter(agenda.take, None)] == ["a", "b", "c"]


def test_the_first_of_equals_is_the_tables_first() -> None:
    jobs = {name: job(name) for name in "cab"}
    agenda = Agenda(jobs, Times(dict.fromkeys(jobs, None)))
    assert [each.id for each in iter(agenda.take, None)] == ["c", "a", "b"]


def test_methods_that_compute_more_come_first_where_nothing_else_tells() -> None:
    jobs = {name: job(name, method=name) for name in ("none", "kd", "hybrid_forward")}
    agenda = Agenda(jobs, Times(dict.fromkeys(jobs, None)))
    assert [each.id for each in iter(agenda.take, None)] == ["hybrid_forward", "kd", "none"]


def scored(name: str, evaluation: str | None, *needs: str) -> Job:
    """A job whose cell is also scored on other data."""
    return Job(name, [], {"evaluation": evaluation}, name, list(needs), {"status": "missing"})


def by_id(*jobs: Job) -> dict[str, Job]:
    return {each.id: each for each in jobs}


def test_a_cell_of_several_tables_is_one_job() -> None:
    plain = by_id(scored("teacher", None), scored("kd", None, "teacher"))
    elsewhere = by_id(scored("teacher", None), scored("kd", "gta5", "teacher"))
    for tables in ({"a": plain, "b": elsewhere}, {"b": elsewhere, "a": plain}):
        found = pooled(tables)
        assert list(found) == ["teacher", "kd"] and found["kd"].config["evaluation"] == "gta5"
        assert found["kd"].text == f"{next(iter(tables))} kd" and found["kd"].needs == ["teacher"]
        assert all(pooled_of(each, found) is found["kd"] for each in (plain["kd"], elsewhere["kd"]))
    assert pooled({"a": plain})["kd"].text == "kd" and plain["kd"].text == "kd"


def test_a_further_score_is_a_job_of_its_own() -> None:
    one, two = by_id(scored("kd", "overlap")), by_id(scored("kd", "distance"))
    # Scored against a student that learns from this one: neither would ever be the first.
    against = by_id(scored("kd", None), scored("after", None, "kd"))
    later = by_id(scored("kd", None), scored("after", None, "kd"), scored("kd", "overlap", "after"))
    found = pooled({"one": one, "two": two, "again": two})
    assert list(found) == ["kd", "kd distance"] and found["kd distance"].needs == ["kd"]
    assert [pooled_of(each["kd"], found).key for each in (one, two)] == ["kd", "kd distance"]
    assert [[each.key for each in wave] for wave in waves(found)] == [["kd"], ["kd distance"]]
    agenda = Agenda(found, Times({"kd": 5.0}))
    assert agenda.take() is found["kd"] and agenda.take(["kd"]) is None and agenda.take() is found["kd distance"]
    found = pooled({"against": against, "later": {"kd": later["kd"]}})
    assert list(found) == ["kd", "after", "kd overlap"] and found["kd overlap"].needs == ["kd", "after"]
    assert [[each.key for each in wave] for wave in waves(found)] == [["kd"], ["after"], ["kd overlap"]]
    assert makespan(found, Times({"kd": 5.0, "after": 3.0}), 1) == 8.0


def test_a_cell_with_two_scores_is_one_of_a_plan(tmp_path: Path) -> None:
    finish(tmp_path, 1, 40.0, *KD)
    tables = {
        name: by_id(Job("kd", [], {**cell(*KD), "evaluation": name}, "kd", [], {"status": "missing"}))
        for name in ("overlap", "distance")
    }
    told = plan_lines(pooled(tables), str(tmp_path), 2)[-1]
    assert told.startswith("1 cells, 0 done, 1 to train: about 40 s one after the other, 40 s by 2 workers (from 1")
    assert "unknown" not in told


def best_packing(seconds: dict[str, float], needs: dict[str, tuple[str, ...]], workers: int) -> float:
    """The shortest time of all orders in which workers may take jobs, by trying them all."""
    best = float("inf")
    for order in itertools.permutations(seconds):
        if any(order.index(need) > order.index(name) for name in order for need in needs[name]):
            continue
        free, ends = [0.0] * workers, {}
        for name in order:
            begin = max([min(free), *(ends[need] for need in needs[name])])
            free[free.index(min(free))] = ends[name] = begin + seconds[name]
        best = min(best, max(free))
    return best


def test_the_packing_is_close_to_the_best_there_is() -> None:
    """List scheduling by urgency: at most 4/3 of the best (Graham 1969) on independent jobs; here with a teacher."""
    draw = random.Random(0)
    for _ in range(20):
        names = [f"cell{number}" for number in range(6)]
        seconds = {name: draw.uniform(10, 60) for name in names}
        needs = {name: () if name in names[:2] else (names[0],) for name in names}
        jobs = {name: job(name, *needs[name]) for name in names}
        found = makespan(jobs, Times(seconds), 2)
        best = best_packing(seconds, needs, 2)
        assert best - 1e-9 <= found <= 4 / 3 * best
        assert makespan(jobs, Times(seconds), 1) == pytest.approx(sum(seconds.values()))


def cell(*overrides: str) -> dict[str, Any]:
    """A settled config of an embedded dataset."""
    return settle(composed("dataset=scenes_kinds", "student=resnet18", "schedule.epochs=4", *overrides))


KD = ("teacher=resnet34", "method=kd")


def finish(folder: Path, number: int, seconds: float, *overrides: str, gpu: str = "", threads: int = 1) -> None:
    """Makes a finished cell; where there is a GPU, `device=` decides whether it was used."""
    place = folder / "cells" / str(number)
    place.mkdir(parents=True)
    record = {"id": str(number), "config": cell(*overrides), "seconds": seconds, "threads": threads}
    hardware = {"cpu": "abacus", "gpus": [gpu] if gpu else []}
    write_sealed(place / "result.json", {**record, "files": {}, "hardware": hardware})


def planned(folder: Path, *configs: dict[str, Any], workers: int = 1) -> str:
    """The end of a plan."""
    jobs = [Job(str(n), [], config, f"{n}", [], {"status": "missing"}) for n, config in enumerate(configs)]
    return plan_lines({job.id: job for job in jobs}, str(folder), workers)[-1].partition("to train: ")[2]


def test_a_plan_goes_by_cells_of_the_same_networks_images_and_updates(tmp_path: Path) -> None:
    finish(tmp_path, 1, 40.0, *KD)
    source = "(from 1 finished cell on abacus (1 thread))"
    assert planned(tmp_path, cell(*KD)) == f"about 40 s one after the other {source}"
    assert planned(tmp_path, cell(*KD, "schedule.epochs=6", "method.alpha=0.3")).startswith("about 60 s ")
    # Of another method so much more as it computes more.
    assert planned(tmp_path, cell("teacher=resnet34", "method=hybrid_forward")).startswith("about 80 s ")
    assert planned(tmp_path, *[cell(*KD, f"seed={seed}") for seed in (1, 2)], workers=2) == (
        f"about 80 s one after the other, 40 s by 2 workers {source}"
    )
    other = [
        cell(),
        cell(*KD, "student=resnet50"),
        cell(*KD, "teacher=resnet50"),
        cell(*KD, "dataset=scenes_actions"),
        cell(*KD, "dataset.image_size=32"),
        cell(*KD, "dataset.train_size=30"),
        cell(*KD, "schedule.batch_size=16"),
        cell(*KD, "schedule.optimizer=adam"),
        cell(*KD, "schedule.epochs=null", "schedule.iterations=4"),
        cell(*KD, "precision=bf16"),
    ]
    for each in other:
        assert planned(tmp_path, each) == "unknown, rehearse (rehearse=true, or rehearse=synthetic without the data)"
    assert planned(tmp_path, cell(*KD), cell(), workers=2).endswith(
        f"{source} for 1 of them; 1 unknown, rehearse (rehearse=true)"
    )


def test_a_plan_never_mixes_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither GPU and CPU nor two of a kind; `device=auto` takes a GPU where there is one."""
    finish(tmp_path, 1, 400.0, *KD, "device=cpu", gpu="H100")
    finish(tmp_path, 2, 300.0, *KD, "seed=1", threads=2)
    finish(tmp_path, 3, 200.0, *KD, "seed=2", threads=2)
    finish(tmp_path, 4, 8.0, *KD, "seed=3", gpu="H100")
    finish(tmp_path, 5, 4.0, *KD, "seed=4", gpu="H100")
    on_cpu = "about 4 min one after the other (from 2 finished cells on abacus (2 threads))"
    on_gpu = "about 6 s one after the other (from 2 finished cells on H100)"
    place = tmp_path / "driver"
    monkeypatch.setattr(devices, "GPU_PLACES", (str(place),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert planned(tmp_path, cell(*KD, "device=cpu")) == planned(tmp_path, cell(*KD)) == on_cpu
    assert planned(tmp_path, cell(*KD, "device=cuda")) == on_gpu
    place.touch()
    assert planned(tmp_path, cell(*KD)) == on_gpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert planned(tmp_path, cell(*KD)) == on_cpu
    monkeypatch.setattr(plan, "processor", lambda: "abacus (1")  # what is at hand comes before what is common
    assert planned(tmp_path, cell(*KD)).endswith("(from 1 finished cell on abacus (1 thread))")


def test_a_plan_goes_by_rehearsals(tmp_path: Path) -> None:
    finish(tmp_path, 1, 40.0, "teacher=resnet34", "method=at")

    def rehearsed(config: Json, seconds: float | None, time: float = 0.0, gpu: bool = False) -> Json:
        lengths = [{"key": length_key(config), "seconds": seconds}]
        device = "H100" if gpu else "abacus"
        where = {"device": device, "gpu": gpu, "waited": 0.5 if gpu else 0.05}
        return {"key": case_key(config), **where, "time": time, "lengths": lengths}

    def write(name: str, version: int, *cases: dict[str, Any]) -> None:
        write_json(rehearsals_of(tmp_path) / name, {"version": version, "cases": cases})

    rehearsals_of(tmp_path).mkdir()
    known = rehearsed(cell(*KD), 17.0, time=5.0)
    write("a-mini.json", REHEARSAL_VERSION, known, rehearsed(cell(), None), rehearsed(cell(*KD), 3.0, gpu=True))
    write("b-mini.json", REHEARSAL_VERSION, rehearsed(cell(*KD), 99.0, time=4.0))  # earlier
    write("c-mini.json", REHEARSAL_VERSION - 1, {"key": case_key(cell(*KD))})
    (rehearsals_of(tmp_path) / "d-mini.json").write_text("{}")
    assert planned(tmp_path, cell(*KD)) == "about 17 s one after the other (from 1 rehearsed case on abacus)"
    assert planned(tmp_path, cell(*KD, "device=cuda")).endswith(
        "other (from 1 rehearsed case on H100, slowed down by other processes)"
    )
    assert all(planned(tmp_path, other).startswith("unknown") for other in (cell(), cell("dataset.subset=9")))
    finish(tmp_path, 2, 30.0, *KD)
    assert planned(tmp_path, cell(*KD)).startswith("about 30 s ")
    assert planned(tmp_path, cell(*KD, "device=cuda")).startswith("about 3 s ")  # cells on CPUs tell nothing of it


def test_a_plan_says_which_weights_have_to_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    for name, path in (
        ("resnet50", place / "resnet50-0676ba61.pth"),
        ("vit_base", tmp_path / "hub" / "models--timm--vit_base_patch16_224.augreg2_in21k_ft_in1k"),
    ):
        config = settle(composed(f"teacher={name}", "method=kd", "student=resnet18", "dataset=imagenet", "scale=paper"))
        plan = "\n".join(plan_lines(jobs_of(config), str(tmp_path), 1))
        assert f" of {name}: not in {path.parent} yet" in plan and "resnet18: not in" not in plan
        path.mkdir(parents=True)
        assert " of " + name + ": not in" not in "\n".join(plan_lines(jobs_of(config), str(tmp_path), 1))


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "4")
    cores = min(4, len(os.sched_getaffinity(0)))
    embedded = {"dataset": {"name": "scenes"}, "threads": None, "device": "cpu"}
    assert default_workers([embedded] * 9) == cores
    assert default_workers([embedded]) == 1
    assert default_workers([{**embedded, "threads": cores}] * 9) == 1
    assert default_workers([embedded, {**embedded, "dataset": {"name": "cifar100"}}]) == 1
    # Without a GPU to be seen, the cores alone count.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert default_workers([{**embedded, "device": "auto"}] * 9) == cores


def test_workers_beside_a_launcher_are_refused(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(TABLE, "workers=2", "hydra/launcher=joblib")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith(
        "kt: error: workers=2: expected null beside hydra/launcher=joblib"
    )


# -------------------------------------------------------------------------------------------------------------- ends


def test_two_cells_train_at_once(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(TABLE, "rows=kd,at,ft,baseline", "workers=2", kd=3, at=3, teacher=1)
    pids = wait_for(running(tmp_path, "kd", "at"))
    assert len(set(pids)) == 2 and parent(pids[0]) == parent(pids[1])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert {status["status"] for status in cells(tmp_path).values()} == {"done"}
    assert "[5/5]" in out and not list((tmp_path / "out").glob("*.log"))
    assert all((path / "calls").read_text() == "x" for path in (tmp_path / "out" / "cells").iterdir())


BOTH = "+table=kcd_dynamic,kcd_strategies"


def test_a_table_ends_with_its_last_cell(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Its worker has begun with a cell of the other table before it is rendered."""
    process = start("+table=stage_count,imagenet_compression", "method=none", "workers=1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    told = re.findall(r"([|] the table [|]|: started|\[4/4\]|2 tables in 0 minutes)", out)
    assert told == [*[": started"] * 3, "| the table |", ": started", "[4/4]", "| the table |", "2 tables in 0 minutes"]


def test_what_fails_in_one_cell_is_told_in_its_tables(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(BOTH, "method=l2", "workers=2", l2="kill")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and out.count("X baseline seed 0: the process was killed (SIGKILL)") == 2, out + err


def test_an_interrupt_ends_all_tables(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(BOTH, "method=l2", "workers=2", l2=60)
    pids = wait_for(running(tmp_path, "l2"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not any(started(pid) for pid in pids), out + err
    assert len(re.findall("^kcd_.* interrupted$", out, re.MULTILINE)) == 2 and "| the table |" not in out, out + err
    assert len(list((tmp_path / "out" / "tables").glob("*/mini*/table.md"))) == 2


def test_a_chosen_launcher_keeps_its_place(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(TABLE, "rows=baseline", "hydra/launcher=basic", none=30)
    (pid,) = wait_for(running(tmp_path, "none"))
    assert pid == process.pid  # Hydra's own trains in the run's process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_reaches_every_worker(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # below nohup, or behind a shell's &, it is ignored and so inherited
    try:
        process = start(TABLE, "rows=kd,at,ab", "workers=2", kd=60, at=60)
    finally:
        signal.signal(number, before)
    pids = wait_for(running(tmp_path, "kd", "at"))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    found = {name: status["status"] for name, status in cells(tmp_path).items()}
    assert found == {"teacher": "done", "kd": "interrupted", "at": "interrupted"}
    assert not any(started(pid) for pid in pids)
    assert "the same command goes on from here" in out and "| the table |" in out and "Traceback" not in out + err


def test_nohup_keeps_its_meaning(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(TABLE, "rows=baseline", none=2)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(running(tmp_path, "none"))
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err


def test_a_killed_run_takes_its_workers_along(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(TABLE, "rows=kd,at", "workers=2", kd=60, at=60)
    pids = wait_for(running(tmp_path, "kd", "at"))
    server = parent(pids[0])
    process.kill()
    wait_for(lambda: not any(started(pid) for pid in (*pids, server)))
    assert {name: status["status"] for name, status in cells(tmp_path).items()} == {
        "teacher": "done",
        "kd": "interrupted",
        "at": "interrupted",
    }


def test_a_run_killed_while_its_server_imports_starts_nothing(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    # The stand-in's import takes a while, as torch's does.
    (tmp_path / "site" / "kt_slow.py").write_text("import time\ntime.sleep(4)\n")
    text = "import experiments.workers as w\nw.IMPORTS = ('kt_slow',)\n"
    (tmp_path / "site" / "begin.py").write_text(
        text + "from experiments.run import main\nimport sys\nsys.exit(main())\n"
    )
    found = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    command = [
        sys.executable,
        str(tmp_path / "site" / "begin.py"),
        TABLE,
        "rows=baseline",
        f"output_root={tmp_path / 'out'}",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": found}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "started" in process.stdout.readline()  # the cell has been asked for
    (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    wait_for(lambda: not started(int(server)))
    assert cells(tmp_path) == {}


def test_a_closed_screen_is_no_mistake(tmp_path: Path) -> None:
    command = f"{sys.executable} -m experiments.run {TABLE} plan=true output_root={tmp_path} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=60).returncode == 0


def test_a_killed_cell_leaves_the_others(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(TABLE, "rows=kd,at,ft", "workers=2", at="kill", ft="exit")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    found = {name: status["status"] for name, status in cells(tmp_path).items()}
    assert found == {"teacher": "done", "kd": "done", "at": "failed", "ft": "failed"}
    assert "at seed 0: failed: the process was killed (SIGKILL)" in out and "SystemExit: 7" in out


def test_a_lost_server_is_replaced_once(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(TABLE, "rows=kd,at", "workers=2", kd=4, at=4)
    pids = wait_for(running(tmp_path, "kd", "at"))
    server = parent(pids[0])
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not any(started(pid) for pid in pids))
    again = wait_for(running(tmp_path, "kd", "at"))
    assert parent(again[0]) != server
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "2 cells are started again" in out and "[3/3]" in out


def test_a_server_lost_twice_fails_what_ran(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(TABLE, "rows=kd,at", "workers=2", kd=60, at=60)
    for _ in range(2):
        pids = wait_for(running(tmp_path, "kd", "at"))
        os.kill(parent(pids[0]), signal.SIGKILL)
        wait_for(lambda pids=pids: not any(started(pid) for pid in pids))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    assert out.count("killed twice") >= 2


def test_what_a_cell_cannot_write_is_told(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    (tmp_path / "out" / "cells").mkdir(parents=True)
    process = start(TABLE, "rows=baseline", "plan=true")
    cell_id = process.communicate(timeout=60)[0].splitlines()[1].split()[0]
    folder_of(tmp_path / "out", cell_id).write_text("a file where the folder belongs")
    process = start(TABLE, "rows=baseline")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, out + err
    assert "expected a folder to write to (File exists)" in out and "Traceback" not in out + err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_workers_of_launchers_end_with_the_run(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], launcher: str, number: signal.Signals
) -> None:
    own = (
        "hydra.launcher.n_jobs=2" if launcher == "joblib" else f"hydra.launcher.submitit_folder={tmp_path / 'submitit'}"
    )
    process = start(TABLE, "rows=kd,at,ft,ab", f"hydra/launcher={launcher}", own, kd=60, at=60, ft=60, ab=60)
    pids = wait_for(running(tmp_path, "kd", "at"))
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_for(lambda: not any(started(pid) for pid in pids))
    time.sleep(1)  # a worker that is still there would take the next cell
    assert not any(started(status["pid"]) for status in cells(tmp_path).values() if status["status"] == "running")


# ----------------------------------------------------------------------------------------------------------- display


def test_bars_of_several_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal every cell speaks for itself, at its own pace."""
    monkeypatch.setattr("experiments.progress.PLAIN_INTERVAL", 0.0)
    display = Display()
    display.start(10, "kd seed 0", "one")
    display.start(20, "at seed 0", "two")
    display.advance(3, "train epoch 1/2", "one")
    display.advance(4, "train epoch 1/4", "two")
    display.advance(3, "train epoch 1/2", "one")
    display.stop("one")
    display.advance(1, "late", "one")  # what a pipe still held
    assert capsys.readouterr().out.splitlines() == [
        "  kd seed 0 train epoch 1/2: step 3 of 10",
        "  at seed 0 train epoch 1/4: step 4 of 20",
        "  kd seed 0 train epoch 1/2: step 6 of 10",
    ]


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What stands on it, as far as lines go that are left, gone back to and cleared."""
        found, at = [""], 0
        for command, sign, text in re.findall(r"\x1b\[([\d;?]*[A-Za-z])|([\n\r])|([^\x1b\n\r]+)", self.getvalue()):
            at += (sign == "\n") - (command == "1A")
            found += [""] * (at + 1 - len(found))
            found[at] = "" if command == "2K" else found[at] + text
        return found


def test_bars_take_nothing_of_a_table_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    display = Display(terminal)
    assert display.bars is not None
    display.start_table("two", 2)
    display.start(10, "kd seed 0", "one")
    display.start(10, "at seed 0", "two")
    for number in range(2):
        with display.paused():
            terminal.write(f"claims {number}\npage {number}\n")
        display.bars.refresh()
    *above, table, one, two = terminal.lines()
    assert above == ["claims 0", "page 0", "claims 1", "page 1"]
    assert [line[:3] for line in (table, one, two)] == ["two", "kd ", "at "]
    display.stop_table()


def test_bars_make_room_for_a_table() -> None:
    display = Display(Terminal())
    assert display.bars is not None
    with display.paused():
        assert not display.bars.live.is_started  # nor has anything been before
    display.start_table("two", 2)
    for _ in range(2):
        with display.paused():
            assert not display.bars.live.is_started
        assert display.bars.live.is_started
    display.advance_table(2)
    assert display.bars.finished
    display.stop_table()


def test_counts_go_back_when_cells_start_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs = {name: job(name) for name in ("a", "b")}
    report = Report("name", jobs, str(tmp_path), Display())
    report.ended(jobs["a"], {"status": "failed", "error": "killed"})
    report.again(1, 1, "why")
    report.ended(jobs["a"], {"status": "failed", "error": "killed"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["[1/2] a: failed: killed", "  1 cell is started again (why)", "[1/2] a: failed: killed"]


def test_why_a_cell_was_not_launched_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file says that a cell was not tried, nor why; others are launched after it."""
    statuses: dict[str, Json] = {}
    monkeypatch.setattr(Job, "read_status", lambda self, root: statuses.get(self.id, {"status": "missing"}))

    class Launcher:
        def launch(self, overrides: list[list[str]], initial_job_idx: int) -> None:
            for (name,) in overrides:
                failed = {"status": "failed", "error": "no such file", "started": time.time()}
                statuses[name] = failed if name == "bad" else {"status": "done", "error": None}

    names = (("bad",), ("good",), ("lacking", "bad"), ("next", "good"), ("later", "next"))
    jobs = {name: job(name, *needs) for name, *needs in names}
    for each in jobs.values():
        each.overrides = [each.id]
    ByLauncher(Report("name", jobs, str(tmp_path), Display(quiet=True)), Launcher(), None).run()
    assert [each.status["status"] for each in jobs.values()] == ["failed", "done", "failed", "done", "done"]
    assert jobs["lacking"].status["error"] == "no such file"


def test_a_pool_without_cells_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.workers.IMPORTS", ())
    began = time.monotonic()
    with Pool(tmp_path, dense=False):
        pass
    assert time.monotonic() - began < GRACE_SECONDS
