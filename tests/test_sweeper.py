"""Tables: selection, routing, axes, plans, waves, exit statuses and launchers. The training is a stand-in."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fake_training
from configs import table
from experiments import progress
from experiments.cell import run_cell
from experiments.groups import choices
from experiments.run import main, named_tables
from experiments.table import Table
from kt.errors import UserError
from kt.files import read_sealed, write_sealed
from kt.store import folder_of, read_status
from results import write_cell
from tables.records import TableRecord

ROOT = Path(__file__).resolve().parent.parent
NAME = "imagenet_compression"
TABLE = f"+table={NAME}"
IDS = ["teacher", "baseline", "kd", "at", "ft", "ab", "hybrid_forward"]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(progress, "_current", None)
    fake_training.write_site(tmp_path / "site")


def run(tmp_path: Path, *arguments: str) -> int:
    """A command in this process."""
    return main([*arguments, f"output_root={tmp_path / 'out'}"])


def given(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Row id -> what the renderer got."""
    (path,) = (tmp_path / "out" / "tables" / "imagenet_compression").glob("mini*/rows.json")
    return {row["id"]: row for row in json.loads(path.read_text())["rows"]}


def statuses(tmp_path: Path) -> dict[str, str]:
    """Row id -> status of its first cell."""
    rows = given(tmp_path).items()
    return {name: read_status(folder_of(tmp_path / "out", row["cells"][0]["id"]))["status"] for name, row in rows}


def names(found: Table) -> list[str]:
    """The rows of the cells to train, in order."""
    return [job.text.split()[0] for job in found.jobs.values()]


def test_plan_lists_cells_and_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, TABLE, "plan=true") == 0
    planned = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert not (tmp_path / "out").exists()
    assert [words[1] for words in planned] == IDS
    assert [words[0] for words in planned] == list(table(NAME).jobs)
    assert all(words[-2] == "missing" for words in planned)
    teacher = planned[0][0]
    assert {words[1]: words[-1] for words in planned} == {
        name: "-" if name in ("teacher", "baseline") else teacher for name in IDS
    }


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        (["rows=kd,at"], ["teacher", "kd", "at"]),
        (["rows=[kd,at]"], ["teacher", "kd", "at"]),
        (["rows=baseline"], ["baseline"]),
        (["method=kd,hybrid_forward"], ["teacher", "kd", "hybrid_forward"]),
        (["method=none"], ["teacher", "baseline"]),
        (["role=baseline,teacher"], ["teacher", "baseline"]),
        (["role=method", "rows=kd,teacher"], ["teacher", "kd"]),
    ],
)
def test_selection(selection: list[str], left: list[str]) -> None:
    """What a selected row needs comes along."""
    assert names(table(NAME, *selection)) == left


def test_overrides_reach_the_rows_that_have_them() -> None:
    def ids(*arguments: str) -> dict[str, list[str]]:
        return {shown.row.id: list(shown.cells) for shown in table(NAME, *arguments).shown}

    base = ids()
    assert list(base) == IDS

    def moved(*arguments: str) -> set[str]:
        found = ids(*arguments)
        return {name for name in IDS if found[name] != base[name]}

    students = set(IDS) - {"teacher"}
    assert moved("method.temperature=2") == {"kd"}  # by default none follows AB
    assert moved("+method.balance=dynamic") == {"hybrid_forward"}
    assert moved("teacher=resnet56") == set(IDS) - {"baseline"}
    assert moved("student=resnet20") == students
    assert moved("dataset.subset=100") == set(IDS)
    assert moved("seed=1") == students
    assert moved("teacher.seed=1") == set(IDS) - {"baseline"}
    assert moved("device=cpu", "wandb.mode=disabled") == set()


def _loss_weights(*arguments: str) -> dict[str, Any]:
    """Row -> the weight of its method's loss, or of that around which the method is."""
    shown = table("kcd_strategies", "rows=[baseline,bipartite]", *arguments).shown
    methods = {each.id: each.config["method"] for each in shown}
    return {row: method.get("base", method)["weight"] for row, method in methods.items()}


def test_only_stand_ins_have_the_weights_that_were_tuned_on_them() -> None:
    assert _loss_weights() == {"baseline": 1.0, "bipartite": 1.0}
    assert _loss_weights("scale=paper") == _loss_weights("dataset=cifar100") == {"baseline": None, "bipartite": None}
    ours = table("kcd_strategies", "rows=[bipartite]")
    assert ours.differs(ours.shown[0])["method.base.weight"] == [1.0, None] and ours.settings == {}


def test_the_command_line_goes_before_tuned_weights() -> None:
    assert _loss_weights("method.weight=7") == {"baseline": 7, "bipartite": 1.0}
    assert _loss_weights("method.base={weight: 5.0}") == {"baseline": 1.0, "bipartite": 5.0}
    assert table("kcd_strategies", "method.base.weight=7").settings == {"method.base.weight": ["7"]}
    assert table("kcd_strategies", "method.base.weight=1").settings == {}


def test_several_tables_share_cells_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "+table=kcd_dynamic,kcd_strategies", "rows=[baseline]", "workers=1") == 0
    out = capsys.readouterr().out
    assert out.count("| the table |") == 2 and "2 tables in 0 minutes" in out
    assert [*(tmp_path / "out" / "tables").iterdir()] and out.count("started") == 2  # teacher and row, once
    for path in (tmp_path / "out").glob("cells/*/config.yaml"):  # W&B is told of both at once
        assert "beside:\n  - kcd_dynamic\n  - kcd_strategies\n" in path.read_text()
    # What keeps one table from running is told, and the other one runs.
    assert run(tmp_path, "+table=kcd_strategies,kcd_dynamic", "rows=[static]", "workers=1") == 2
    out, err = capsys.readouterr()
    assert out.count("| the table |") == 1
    (told,) = [line for line in out.splitlines() if line.startswith("kcd_strategies")]
    assert "rows=static" in told
    assert err.startswith("kt: not run: kcd_strategies: rows=static: the table has no such row")  # at once
    assert named_tables(["+table=all,kcd_dynamic"]) == choices("table")
    with pytest.raises(UserError, match="kcd_dynamic.: write .table=kcd_strategies,kcd_dynamic$"):
        named_tables(["+table=[kcd_strategies,kcd_dynamic]"])
    assert run(tmp_path, "+table=kcd_dynamic,kcd_dynamic", "plan=true") == 0
    assert capsys.readouterr().out.count("cells,") == 1
    assert run(tmp_path, "+table=kcd_dynamic,kcd_strategies", "rows=[baseline]", "plan=true") == 0
    *_, one, together = capsys.readouterr().out.splitlines()
    assert together == f"2 tables together: {one}" and one.startswith("2 cells, 2 done")


def test_a_table_that_cannot_be_judged_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table = fake_training.write_table

    def judged(name: str, *arguments: Any, **others: Any) -> Path:
        if name == "kcd_dynamic":
            raise KeyError("a row")
        return write_table(name, *arguments, **others)

    monkeypatch.setattr(sys.modules["tables.render"], "write_table", judged)
    assert run(tmp_path, "+table=kcd_dynamic,kcd_strategies", "rows=[baseline]", "workers=1") == 3
    out, err = capsys.readouterr()
    assert out.count("| the table |") == 1 and "KeyError: 'a row'" in out and "Traceback" in err
    with pytest.raises(KeyError):
        run(tmp_path, "+table=kcd_dynamic", "rows=[baseline]", "workers=1")


def test_what_is_done_is_shown_where_nothing_can_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "+table=stage_count", "method=none", "workers=1") == 0

    def refuse(place: str) -> None:
        raise UserError(f"output_root={place}: cannot be written")

    monkeypatch.setattr("experiments.runs.check_writable", refuse)
    capsys.readouterr()
    assert run(tmp_path, "+table=stage_count,imagenet_compression", "method=none", "workers=1") == 2
    out, err = capsys.readouterr()
    assert out.count("| the table |") == 1 and err.startswith("kt: error: output_root=") and err.count("\n") == 1


def test_tables_of_other_tasks_share_their_cells() -> None:
    """Teachers are trained once for all rows and tables; an evaluation elsewhere is no other cell."""
    domains = table("cityscapes_teachers")
    other = table("gta5_teachers")
    assert names(domains) == ["baseline", "teacher", "fitnet_det", "at_det", "hybrid_det"] + [
        "teacher",
        "fitnet_gta5",
        "at_gta5",
        "hybrid_gta5",
    ]
    assert len(other.jobs) == 5 and set(other.jobs) < set(domains.jobs)
    scored = {job.text.split()[0]: job.config["evaluation"] for job in other.jobs.values()}
    assert scored["baseline"] == scored["hybrid_det"] == scored["hybrid_gta5"] == "gta5"
    # Its own row is the GTA5 teacher; the detector is only needed.
    assert [job.config["evaluation"] for job in other.jobs.values() if job.text.startswith("teacher")] == ["gta5", None]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (("seed=0,1", "teacher.seed=1", "threads=1", "schedule.evaluate_every=3", "method=none"), set()),
        (("schedule.epochs=8", "dataset=scenes", "method.balance=1"), set()),  # the table's own
        (("schedule.epochs=2", "schedule.evaluate_every=3", "schedule.policy=step"), {"schedule.epochs"}),
        (("method.balance=dynamic,1",), {"method.balance"}),
        (("dataset=scenes_small", "schedule.lr=0.5"), {"dataset", "schedule.lr"}),
        (("evaluation=scenes_small",), {"evaluation"}),
        (("teacher.schedule.epochs=1", "rows=baseline"), set()),
        (("student=resnet18", "student.network.name=resnet18"), {"student", "student.network.name"}),
    ],
)
def test_what_makes_a_table_another_one(arguments: tuple[str, ...], settings: set[str]) -> None:
    rows = () if any(line.startswith("rows=") for line in arguments) else ("rows=baseline,hybrid_forward",)
    assert set(table(NAME, *rows, *arguments).settings) == settings


def test_rows_take_teachers_files_of_their_own(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("a.pth", "b.pth")}
    for path in files.values():
        path.write_text(path.name)
    by_network = f"teachers.fasterrcnn_resnet50.checkpoint={files['a.pth']}"
    by_data, by_row = (f"teachers.{name}.checkpoint={files['b.pth']}" for name in ("gta5", "at_det"))
    found = table("cityscapes_teachers", by_row, by_network, by_data)
    assert table("cityscapes_teachers", by_data, "rows=baseline", "schedule.lr=0.5").settings == {
        "schedule.lr": ["0.5"]
    }
    given = {shown.id: Path(shown.config["teacher"]["checkpoint"] or "none").name for shown in found.shown}
    assert given.pop("baseline") == "none" and set(found.settings) == set()
    assert given == {row: "b.pth" if row == "at_det" or row.endswith("gta5") else "a.pth" for row in given}
    for wrong, words in {
        "teachers.gta.checkpoint=x": "no row has such a teacher .did you mean 'gta5'",
        "teachers.baseline.checkpoint=x": "no row has such a teacher",
        "teachers.gta5.file=x": "teacher.file: unknown key",
        "teachers.gta5=x": "expected teachers.<name>.<key>",
    }.items():
        with pytest.raises(UserError, match=words):
            table("cityscapes_teachers", wrong)


@pytest.mark.parametrize(("row", "key"), [("teacher", "teacher"), ("baseline", "student"), ("kd", "teacher")])
def test_a_file_that_is_missing_is_named_by_its_key(row: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}\.checkpoint=/none\.pth: expected a readable file"):
        table(NAME, f"rows={row}", f"{key}.checkpoint=/none.pth")
    with pytest.raises(UserError, match=rf"^{key}\.checkpoint=/dev/zero: expected a file"):
        table(NAME, f"rows={row}", f"{key}.checkpoint=/dev/zero")


def test_commands_for_separate_rows_end_in_one_table(tmp_path: Path) -> None:
    weights = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path in weights:
        path.write_text(path.name)

    def done(*arguments: str) -> tuple[str, dict[str, list[str]]]:
        """A command whose cells are done: the folder's name, and the ids of the cells of the rows that it shows."""
        found = table(NAME, f"output_root={tmp_path}", *arguments)
        for shown in found.shown:
            for cell_id in shown.cells:
                write_cell(tmp_path, cell_id, {"top1": 50.0})
        folder = found.renderer(str(tmp_path), "mini")()
        rows = json.loads((folder / "rows.json").read_text())["rows"]
        return folder.name, {row["id"]: [cell["id"] for cell in row["cells"]] for row in rows}

    _, first = done("rows=kd", f"teachers.kd.checkpoint={weights[0]}", "seed=0,1")
    name, both = done("rows=at", f"teachers.resnet50.checkpoint={weights[1]}")
    assert name == "mini" and list(both) == ["kd", "at"] and both["kd"] == first["kd"] and len(first["kd"]) == 2
    # Other settings lie beside it and take nothing of it.
    name, other = done("rows=baseline", "schedule.lr=0.5")
    assert re.fullmatch("mini-[0-9a-f]{8}", name) and list(other) == ["baseline"]
    assert done("rows=at", "schedule.lr=0.5", "threads=1")[0] == name
    both_ways = ["schedule.lr=0.5", "schedule.weight_decay=0.1"]
    assert len({done("rows=at", *lines)[0] for lines in (both_ways, both_ways[::-1])}) == 1
    # What is done stays when its file has gone.
    weights[0].unlink()
    name, whole = done("rows=baseline")
    assert name == "mini" and whole == {**both, "baseline": whole["baseline"]}
    assert whole["baseline"] != other["baseline"]
    # What an earlier version has mixed in is not known to be the table's.
    path = tmp_path / "tables" / NAME / "mini" / "rows.json"
    path.write_text(path.read_text().replace('"given"', '"unknown"'))
    assert list(done("rows=baseline")[1]) == ["baseline"]


def test_a_teacher_without_a_file_keeps_no_other_row(tmp_path: Path) -> None:
    found = table("citypersons_pose", "scale=paper", f"output_root={tmp_path}", "rows=baseline,fitnet")
    lacking = {job.text: [line for line in job.absent if "give the file" in line] for job in found.jobs.values()}
    assert [text for text, lines in lacking.items() if lines] == ["fitnet seed 0"] and "baseline seed 0" in lacking
    with pytest.raises(UserError, match="give the file of its weights"):
        run_cell(found.shown[-1].config)


def test_settings_are_printed_and_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, TABLE, "settings=true", "rows=baseline,kd") == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    source = "hybrid_forward, Table 1: protocols.imagenet_mobilenetv1.batch_size"
    assert ["schedule.batch_size", "256", "printed", source, "all"] in lines
    assert any(line[:3] == ["method.temperature", "4.0", "cited"] and line[-1] == "all that have it" for line in lines)
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, "settings=true") == 2 and "add +table=<name>" in capsys.readouterr().err


def test_optional_rows_come_when_asked_for() -> None:
    def shown(*arguments: str) -> list[str]:
        return [row.row.id for row in table("citypersons_pose", *arguments).shown]

    assert shown() == ["baseline", "fitnet", "at", "hybrid_forward"]
    assert shown("rows=hybrid_forward,hybrid_resnet50")[-1] == "hybrid_resnet50"
    sweep = shown("rows=hybrid_forward,baseline", "method.balance=dynamic,0.1,0.25,0.5,1,2")
    assert sweep.count("hybrid_forward") == 6 and sweep.count("baseline") == 1


def test_axes_are_rows_and_seeds_are_averaged(tmp_path: Path) -> None:
    arguments = (TABLE, "rows=teacher,baseline,hybrid_forward", "seed=0,1", "method.balance=dynamic,0.1,1.0")
    assert run(tmp_path, *arguments) == 0
    rows = given(tmp_path)
    axes = [f"hybrid_forward[method.balance={value}]" for value in ("dynamic", "0.1", "1.0")]
    assert list(rows) == ["teacher", "baseline", *axes]
    assert [cell["seed"] for cell in rows["teacher"]["cells"]] == [0]
    for name in ("baseline", *axes):
        assert [cell["seed"] for cell in rows[name]["cells"]] == [0, 1]
    assert rows[axes[1]]["axes"] == {"method.balance": "0.1"} and rows[axes[1]]["ours"]
    assert "method.balance=0.1" in rows[axes[1]]["label"]
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1 + 2 + 6


def test_at_its_paper_s_scale_a_table_has_its_paper_s_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(*arguments: str) -> list[int]:
        return list(table(NAME, "rows=baseline", *arguments).shown[0].cells.values())

    monkeypatch.setattr(TableRecord, "seeds", 3)
    assert seeds() == [0]
    assert seeds("scale=paper") == [0, 1, 2]
    assert seeds("scale=paper", "seed=7") == [7]


def test_a_teacher_axis_multiplies_only_the_taught() -> None:
    assert names(table(NAME, "rows=teacher,baseline,kd", "teacher=resnet56,resnet20")) == [
        "teacher[teacher=resnet56]",
        "teacher[teacher=resnet20]",
        "baseline",
        "kd[teacher=resnet56]",
        "kd[teacher=resnet20]",
    ]


def test_explicit_data_keep_full_networks(tmp_path: Path) -> None:
    arguments = (TABLE, "dataset=cifar100", "dataset.subset=10000", "teacher=resnet56", "student=resnet20")
    assert run(tmp_path, *arguments, "schedule.epochs=2", "rows=kd,teacher") == 0
    rows = given(tmp_path)
    assert (rows["kd"]["teacher"], rows["kd"]["student"]) == ("resnet56", "resnet20")
    assert (rows["teacher"]["teacher"], rows["teacher"]["student"]) == ("resnet56", None)
    result = json.loads((folder_of(tmp_path / "out", rows["kd"]["cells"][0]["id"]) / "result.json").read_text())
    config = result["config"]
    assert config["dataset"]["name"] == "cifar100" and config["dataset"]["subset"] == 10000
    assert config["student"]["network"]["width"] == config["teacher"]["network"]["width"] == 1.0
    assert config["schedule"]["epochs"] == 2 and config["schedule"]["lr"] == 0.05
    assert result["needs"]["teacher"] == rows["teacher"]["cells"][0]["id"]


def test_a_whole_table_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, TABLE) == 0
    rows = given(tmp_path)
    assert list(rows) == IDS
    assert [row["printed"] for row in rows.values()] == IDS
    assert rows["baseline"]["teacher"] is None and rows["kd"]["teacher"] == "resnet50"
    assert {row["role"] for row in rows.values()} == {"teacher", "baseline", "method"}
    out = capsys.readouterr().out
    assert "[7/7]" in out and "| the table |" in out and "index.html" in out
    began = time.perf_counter()
    assert run(tmp_path, TABLE) == 0
    assert time.perf_counter() - began < 10
    assert "nothing to train: all 7 cells are done" in capsys.readouterr().out
    assert all((path / "calls").read_text() == "x" for path in (tmp_path / "out" / "cells").iterdir())
    assert run(tmp_path, TABLE, "plan=true") == 0
    assert "7 done, 0 to train: nothing to train" in capsys.readouterr().out
    folder = folder_of(tmp_path / "out", rows["kd"]["cells"][0]["id"])
    (folder / "result.json").unlink()
    assert run(tmp_path, TABLE) == 0
    assert f"cell {folder.name}: result.json is missing" in capsys.readouterr().out
    assert (folder / "calls").read_text() == "xx" and (folder / "result.json").exists()


def test_estimates_come_from_finished_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, TABLE, "rows=kd") == 0
    for path in (tmp_path / "out" / "cells").glob("*/result.json"):
        result = read_sealed(path)
        assert result
        result["seconds"] = 10.0 * result["config"]["schedule"]["epochs"]
        write_sealed(path, result)
    capsys.readouterr()
    assert run(tmp_path, TABLE, "rows=at", "plan=true", "schedule.epochs=8") == 0
    assert "about 80 s" in capsys.readouterr().out


def test_a_failure_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"at": "error", "ft": "exit", "ab": "mistake"}))
    assert run(tmp_path, TABLE, "rows=at,ft,ab,kd") == 3
    bad = {"at": "failed", "ft": "failed", "ab": "failed"}
    assert statuses(tmp_path) == {"teacher": "done", "kd": "done", **bad}
    monkeypatch.delenv("FAKE_TRAINING")
    assert run(tmp_path, TABLE, "rows=at,ft,ab,kd") == 0
    assert set(statuses(tmp_path).values()) == {"done"}


def test_without_its_teacher_nothing_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"teacher": "error"}))
    assert run(tmp_path, TABLE, "rows=teacher,baseline,kd,at") == 3
    assert statuses(tmp_path) == {"teacher": "failed", "baseline": "done", "kd": "missing", "at": "missing"}
    out = capsys.readouterr().out
    assert "kd seed 0: not trained, because teacher seed 0 failed" in out


def test_a_score_on_other_data_stops_nobody_who_needs_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"evaluation": "error"}))
    assert run(tmp_path, TABLE, "rows=teacher,kd", "evaluation=scenes_small") == 3
    assert statuses(tmp_path) == {"teacher": "done", "kd": "done"}
    out = capsys.readouterr().out
    assert "not trained" not in out and out.count("RuntimeError: no such layer") == 4  # as it ends, and in the end


def test_a_mistake_that_stops_everything_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"teacher": "mistake", "none": "mistake"}))
    assert run(tmp_path, TABLE) == 2
    err = capsys.readouterr().err
    assert err.startswith("kt: error: data_root=nowhere") and err.count("\n") == 1


def test_an_interrupt_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"at": "interrupt"}))
    asked: list[object] = []
    monkeypatch.setattr("experiments.launch.agree", lambda value: asked.append(value) or value)
    assert run(tmp_path, TABLE, "rows=kd,at,ab", "workers=1") == 130
    assert len(asked) == 1  # by then other processes may not answer any more
    assert statuses(tmp_path) == {"teacher": "done", "kd": "done", "at": "interrupted", "ab": "missing"}
    monkeypatch.delenv("FAKE_TRAINING")
    assert run(tmp_path, TABLE, "rows=kd,at,ab") == 0


def test_rows_with_results_stay_in_the_table(tmp_path: Path) -> None:
    assert run(tmp_path, TABLE, "rows=baseline") == 0
    assert list(given(tmp_path)) == ["baseline"]
    assert run(tmp_path, TABLE, "rows=kd") == 0
    assert list(given(tmp_path)) == ["teacher", "baseline", "kd"]


def test_a_single_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ("method=kd", "teacher=resnet56", "student=resnet20")
    assert run(tmp_path, *pair, "plan=true") == 0
    assert "2 cells, 0 done" in capsys.readouterr().out
    assert run(tmp_path, *pair) == 0
    out = capsys.readouterr().out
    assert "top-1 accuracy 50.00, top-2 of 4 classes 90.00" in out and "trained in 0 s" in out
    assert run(tmp_path, *pair, "evaluation=scenes_small") == 0
    out = capsys.readouterr().out
    assert "trained nothing: done on" in out and "evaluation=scenes_small: mIoU 12.00" in out
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"at": "error"}))
    assert run(tmp_path, "method=at", *pair[1:]) == 3
    err = capsys.readouterr().err
    assert err.startswith("kt: error: cell ") and "error.txt" in err and err.count("\n") == 1


def test_a_table_is_mirrored_with_the_cells_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("runs", "mirror"):
        monkeypatch.setattr(f"experiments.{module}.fault", lambda: "no network")
    for given, meant in (("disabled", "disabled"), ("online", "offline")):  # trained, and done already
        assert run(tmp_path, TABLE, "rows=kd", f"wandb.mode={given}") == 0
        (mirrored,) = (json.loads(path.read_text()) for path in tmp_path.rglob("mirrored.json"))
        cells = {path.name for path in (tmp_path / "out" / "cells").iterdir()}
        assert mirrored["mode"] == meant and set(mirrored["cells"]) == cells and len(cells) == 2


def test_wandb_is_asked_once_for_all_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for module in ("runs", "mirror"):
        monkeypatch.setattr(f"experiments.{module}.fault", lambda: asked.append("asked") or "no network")
    assert run(tmp_path, "+table=kcd_dynamic,kcd_strategies", "rows=[baseline]", "wandb.mode=online") == 0
    modes = [json.loads(path.read_text())["mode"] for path in tmp_path.rglob("mirrored.json")]
    assert modes == ["offline", "offline"] and len(asked) == 1
    assert run(tmp_path, "+table=kcd_dynamic,kcd_strategies", "rows=[baseline]", "wandb.mode=online") == 0
    assert len(asked) == 2  # nothing to train, but to mirror


def test_second_run_needs_no_torch(tmp_path: Path) -> None:
    assert run(tmp_path, TABLE, "rows=teacher,kd") == 0
    program = (
        "import sys; from experiments.run import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'wandb', 'mmengine'} & set(sys.modules); sys.exit(str(heavy) if heavy else status)"
    )
    arguments = [TABLE, "rows=teacher,kd", f"output_root={tmp_path / 'out'}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_joblib_survives_a_killed_cell(tmp_path: Path) -> None:
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = fake_training.start(tmp_path, TABLE, "rows=baseline,kd,at,ft", *launcher, at="kill", kd=0.5, ft=0.5)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, out + err
    expected = {"teacher": "done", "baseline": "done", "kd": "done", "at": "failed", "ft": "done"}
    assert statuses(tmp_path) == expected
    assert "the process was killed" in out
    assert "Traceback" not in err


def test_joblib_starts_again_what_a_killed_worker_left(tmp_path: Path) -> None:
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = fake_training.start(tmp_path, TABLE, "rows=baseline,kd,at,ft,ab", *launcher, kd=3, at=3)
    cells = tmp_path / "out" / "cells"
    worker = None
    while worker is None and process.poll() is None:
        time.sleep(0.05)
        for path in cells.glob("*/calls"):
            status = json.loads((path.parent / "status.json").read_text())
            if status["status"] == "running" and "\n  name: kd\n" in (path.parent / "config.yaml").read_text():
                # The child that runs the cell dies with the worker that waits for it.
                worker = int(Path(f"/proc/{status['pid']}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert set(statuses(tmp_path).values()) == {"done"}


def test_submitit_local(tmp_path: Path) -> None:
    folder = f"hydra.launcher.submitit_folder={tmp_path / 'submitit'}"
    process = fake_training.start(
        tmp_path, TABLE, "rows=baseline,kd", "hydra/launcher=submitit_local", folder, kd="error"
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, out + err
    assert statuses(tmp_path) == {"teacher": "done", "baseline": "done", "kd": "failed"}


def test_ctrl_c(tmp_path: Path) -> None:
    process = fake_training.start(tmp_path, TABLE, "rows=baseline,kd", kd=60)
    while len(list((tmp_path / "out").glob("cells/*/calls"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert statuses(tmp_path) == {"teacher": "done", "baseline": "done", "kd": "interrupted"}
    assert "Traceback" not in err


def test_ctrl_c_during_the_imports(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "experiments.run", TABLE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1) and "interrupted" in done.stderr, done.stderr


def test_every_seed_of_a_row_has_its_own_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row's `${seed}` is that of the cell, not of the command."""
    assert run(tmp_path, "+table=fixed_features", "seed=0,1", "rows=student_fixed", "plan=true") == 0
    needs = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "student_fixed seed" in line]
    assert len(needs) == len(set(needs)) == 2
