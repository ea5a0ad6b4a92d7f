"""Weights & Biases mirrors cells and tables and never fails them. Runs are read back by W&B's own reader."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.util import get_core_path

from configs import composed
from kt.errors import UserError
from kt.store import Records, folder_of, records_file
from kt.wandb import MARK, WandbRun, about_cell, tag_cell
from results import make_row, write_cell
from tables.dashboards import run
from tables.mirror import figures_of, mirror_table, results_of
from tables.render import write_table
from tables.sweeps import write_sweep

ROWS = [
    {"kind": "train", "phase": "boundaries", "step": 1, "epoch": 0.5, "lr": 0.1, "loss": 2.0},
    {"kind": "train", "phase": "boundaries", "step": 2, "epoch": 1.0, "lr": 0.1, "loss": 1.5},
    {"kind": "train", "phase": "train", "step": 1, "epoch": 0.5, "lr": 0.1, "loss": 1.0, "accuracy": 40.0},
    {"kind": "eval", "phase": "train", "step": 1, "epoch": 1, "top1": 30.0, "top5": 50.0},
]
OFFLINE = {"mode": "offline", "project": "kt", "entity": None}
TABLE = "imagenet_compression"
LABELS = ["table.name=imagenet_compression", "table.row='ab[method.balance=1]'", "table.role=method", "seed=3"]
CONFIG = composed("teacher=resnet50", "student=mobilenet_v1", "method=ab", *LABELS)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def make(root: Path, mode: str = "offline") -> WandbRun:
    folder = folder_of(root, "ab-s3")
    folder.mkdir(parents=True, exist_ok=True)
    return WandbRun(root, {**OFFLINE, "mode": mode}, about_cell("ab-s3", CONFIG), folder / MARK)


def records(root: Path, run_id: str) -> dict[str, list[dict[str, Any]]]:
    """What the one run of an id holds: kind of record -> records."""
    (written,) = root.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(written)]
    found: dict[str, list[dict[str, Any]]] = {}
    # The service writes in a process of its own, on a busy machine a moment after `finish`.
    deadline = time.monotonic() + 60
    while "exit" not in found:
        assert time.monotonic() < deadline, found
        found = {}
        read = subprocess.run([*command, str(written.parents[1])], capture_output=True, text=True, check=True)
        for record in map(json.loads, read.stdout.splitlines()):
            found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def logged(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What a run has logged."""
    return [record["item"] for record in found["history"]]


class Recorder(SimpleNamespace):
    """Stands for wandb's run."""

    def __init__(self, broken: bool = False):
        super().__init__(logged=[], summary={}, finished=None, broken=broken, defined=[])

    def define_metric(self, *arguments: Any, **keywords: Any) -> None:
        self.defined.append((arguments, keywords))

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionResetError("wandb-core is gone")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code


def test_one_step_axis_over_all_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(wandb, "init", lambda **keywords: recorder)
    with make(tmp_path) as run:
        for row in ROWS:
            run.log(row)
        run.summarise({"top1": 30.0})
    assert [values["step"] for values in recorder.logged] == [1, 2, 3, 3]
    assert [values["phase"] for values in recorder.logged] == [1, 1, 2, 2]
    assert recorder.logged[0]["boundaries/loss"] == 2.0 and recorder.logged[2]["train/accuracy"] == 40.0
    assert recorder.logged[3]["test/top1"] == 30.0 and recorder.logged[3]["epoch"] == 1
    assert recorder.summary == {"top1": 30.0} and recorder.finished == 0
    assert (("*",), {"step_metric": "step"}) in recorder.defined


@pytest.mark.parametrize("known", [True, False])
def test_without_a_home(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose absence makes W&B's core print a page of errors."""
    monkeypatch.setattr(wandb, "init", lambda **keywords: Recorder())
    monkeypatch.setenv("HOME", "")  # so that it comes back
    monkeypatch.delenv("HOME")
    home = os.path.expanduser("~")
    if not known:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where no user has the process's id
    make(tmp_path)
    assert os.environ["HOME"] == (home if known else str(tmp_path))


def test_every_failure_of_the_service_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**keywords: Any) -> None:
        raise wandb.errors.UsageError("no key")

    caplog.set_level(logging.WARNING)
    for init in (refuse, lambda **keywords: Recorder(broken=True)):
        monkeypatch.setattr(wandb, "init", init)
        with make(tmp_path) as run:
            for row in ROWS:
                run.log(row)
            run.show(lambda: {"picture": 1 / 0})
            run.summarise({"top1": 1.0})
        assert run.run is None and not run.mark.exists()
    messages = [record.message for record in caplog.records if "Weights & Biases is off" in record.message]
    assert len(messages) == 2 and "no key" in messages[0] and "wandb-core is gone" in messages[1]


@pytest.mark.parametrize(
    ("overrides", "name", "group", "job_type"),
    [
        ([], "none resnet20 scenes seed 0", "single", "student"),
        (
            ["method=ab", "teacher=resnet50", *LABELS],
            "ab resnet50→resnet20 scenes method.balance=1 seed 3",
            TABLE,
            "method",
        ),
        (
            ["table.name=x", "table.row=low", "table.role=baseline"],
            "none (low) resnet20 scenes seed 0",
            "x",
            "baseline",
        ),
        ([f"table.row={'long' * 60}"], "none (longlong", "single", "student"),
    ],
)
def test_names(overrides: list[str], name: str, group: str, job_type: str) -> None:
    about = about_cell("id", composed(*overrides))
    assert about["name"].startswith(name) and len(about["name"]) <= 128
    assert about["name"].endswith(f" seed {about['config']['seed']}")
    assert about["name"].startswith(about["config"]["what"][:100]) and "seed" not in about["config"]["what"]
    assert (about["group"], about["job_type"]) == (group, job_type)


def test_a_resumed_cell_has_one_run_with_every_record_once(tmp_path: Path) -> None:
    assert make(tmp_path, mode="disabled").id is None
    path = records_file(folder_of(tmp_path, "ab-s3"))
    with pytest.raises(KeyboardInterrupt), make(tmp_path) as run, contextlib.closing(Records(path, run.log)) as file:
        file.write(ROWS[:2])
        mark = file.mark
        file.write([{**ROWS[2], "loss": 9.0}])  # after the checkpoint, and lost
        raise KeyboardInterrupt
    assert records(tmp_path, "ab-s3")["exit"][0]["exit_code"] == 1 and not run.mark.exists()
    with make(tmp_path) as run, contextlib.closing(Records(path, run.log)) as file:
        file.cut(mark)
        file.write(ROWS[2:])
        run.summarise({"top1": 30.0})
    found = records(tmp_path, "ab-s3")
    assert [item["step"] for item in logged(found)] == [1, 2, 3, 3]
    assert logged(found)[1]["boundaries/loss"] == 1.5 and logged(found)[2]["train/loss"] == 1.0
    assert found["run"][0]["run_id"] == "ab-s3" and found["run"][0]["job_type"] == "method"
    assert found["run"][0]["run_group"] == TABLE and found["run"][0]["tags"] == [TABLE, "mini", "ab"]
    assert run.mark.exists()


def written_table(root: Path, **top1: float) -> Path:
    """A table of finished cells, one of each row, named after it."""
    for row, value in top1.items():
        folder = write_cell(
            root, f"{row}-s0", {"top1": value, "top5": 90.0}, ROWS, config=CONFIG, images_per_second=7.0
        )
        (folder / "student.pth").write_bytes(row.encode())
    return write_table(TABLE, [make_row(TABLE, row) for row in top1], root, "mini", "scenes")


def test_a_table_has_a_run_and_its_cells_its_tag(tmp_path: Path) -> None:
    ids = {"kd-s0", "baseline-s0", f"{TABLE}-mini"}

    def mirrored(kd: float) -> dict[str, str]:
        folder = written_table(tmp_path, baseline=70.0, kd=kd)
        mirror_table(folder, tmp_path, OFFLINE, ["kd-s0", "baseline-s0", "not-done"])
        assert {path.stem.removeprefix("run-") for path in tmp_path.glob("wandb/*/*.wandb")} == ids
        return {each: records(tmp_path, each)["run"][0]["start_time"] for each in ids}

    runs = mirrored(kd=72.5)
    cell, table = records(tmp_path, "kd-s0"), records(tmp_path, f"{TABLE}-mini")
    assert len(logged(cell)) == len(ROWS) and "images_per_second" in str(cell["summary"][-2:])
    (item,) = logged(table)
    assert item["page._type"] == "html-file" and item["results.nrows"] == 2 and item["verdicts.nrows"] > 5
    (results,) = tmp_path.glob(f"wandb/*-{TABLE}-mini/files/media/table/results_*.json")
    content = json.loads(results.read_text())
    line = dict(zip(content["columns"], content["data"][1], strict=True))
    assert (line["row"], line["top-1 accuracy"], line["cells"]) == ("KD", 72.5, "kd-s0") and line[
        "top-1 accuracy paper"
    ] > 60
    (kept,) = [each for each in table["artifact"] if each["type"] == "table"]
    names = {file["path"] for file in kept["manifest"]["contents"]}
    assert names == {f"table.{kind}" for kind in ("csv", "json", "md", "tex")} | {
        f"students/{row}-seed0.pth" for row in ("baseline", "kd")
    }

    assert mirrored(kd=72.5) == runs
    replaced = mirrored(kd=60.0)
    assert {each for each in ids if replaced[each] != runs[each]} == {f"{TABLE}-mini"}
    assert tag_cell(folder_of(tmp_path, "kd-s0"), OFFLINE, "another")
    assert tag_cell(folder_of(tmp_path, "kd-s0"), OFFLINE, TABLE)
    assert sorted(records(tmp_path, "kd-s0")["run"][0]["tags"]) == sorted([TABLE, "another", "mini", "ab"])


def test_a_sweep_has_a_run(tmp_path: Path) -> None:
    write_cell(tmp_path, "kd-s0", None)
    point = make_row(TABLE, "kd", axes={"method": "kd"})
    folder = write_sweep("sweep-1", ["method"], [point], tmp_path)
    mirror_table(folder, tmp_path, OFFLINE, ["kd-s0"])
    found = records(tmp_path, "sweep-1")
    assert found["run"][0]["run_group"] == "sweep-1" and logged(found)[0]["results.nrows"] == 1
    assert "verdicts.nrows" not in logged(found)[0] and len([*tmp_path.glob("wandb/*run*")]) == 1


def test_a_table_gives_up_at_the_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**keywords: Any) -> None:
        raise wandb.errors.CommError("no network")

    folder = written_table(tmp_path, baseline=70.0, kd=72.5)
    monkeypatch.setattr(wandb, "init", refuse)
    mirror_table(folder, tmp_path, {**OFFLINE, "mode": "disabled"}, ["kd-s0"])
    assert not caplog.messages
    mirror_table(folder, tmp_path, OFFLINE, ["baseline-s0", "kd-s0"])
    assert sum("Weights & Biases is off" in message for message in caplog.messages) == 1
    monkeypatch.setattr("tables.mirror.read_sealed", lambda path: (path / "below").read_text())
    mirror_table(folder, tmp_path, OFFLINE, ["kd-s0"])
    assert caplog.messages[-1].startswith(f"Weights & Biases is off for {folder}: ")


def test_a_dashboard_shows_what_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces", reason="needs the extra `dashboards`")
    weighed = [{**ROWS[2], "balance": 0.5, "weight_a_b": 0.1, "lr_logits": 1.0}]
    folder = written_table(tmp_path, baseline=70.0, kd=72.5)
    write_cell(tmp_path, "kd-s0", {"top1": 72.5}, [*ROWS, *weighed], config=CONFIG, images_per_second=7.0)
    assert run(["--output-root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{folder / 'workspace.json'}\n"
    spec = json.loads((folder / "workspace.json").read_text())["spec"]["section"]
    panels = {
        each["name"]: [panel["config"] for panel in each["panels"]] for each in spec["panelBankConfig"]["sections"]
    }
    charts = {panel["chartTitle"]: panel["metrics"] for name in panels for panel in panels[name] if "metrics" in panel}
    table = json.loads((folder / "table.json").read_text())
    columns, _ = results_of(table)
    bars = [panel["fieldSettings"] for panel in panels["Results"] if "fieldSettings" in panel]
    assert [bar["value"] for bar in bars] == ["top-1 accuracy", "top-5 accuracy"]
    assert all({*bar.values()} <= set(columns) for bar in bars)
    assert charts["loss"] == ["boundaries/loss", "train/loss"] and charts["phase"] == ["phase"]
    assert charts["test top-1 accuracy"] == ["test/top1"] and charts["lr_logits"] == ["lr_logits"]
    assert [panel["metrics"] for panel in panels["Balance"]] == [["train/balance"]]
    assert [panel["metrics"] for panel in panels["Pathways"]] == [["train/weight_a_b"]]
    assert [panel["metrics"] for panel in panels["Cost"]] == [
        ["summary_metrics.training_seconds"],
        ["summary_metrics.images_per_second"],
    ]
    assert [panel["mediaKeys"] for panel in panels.get("Pictures", [])] == [
        [name] for name in figures_of(folder, table, tmp_path)
    ]
    assert panels["Curves"][0]["groupBy"] == "what.value" and TABLE in json.dumps(spec["runSets"][0]["filters"])

    saved = []

    def upsert(view: Any) -> dict[str, Any]:
        saved.append(view)
        return {"upsertView": {"view": {"name": "nw-x-v", "id": "1"}}}

    monkeypatch.setattr(workspaces.internal, "upsert_view2", upsert)
    monkeypatch.setattr(workspaces.interface, "get_app_url", lambda api: "https://wandb.ai")
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="me"))
    for _ in range(2):
        assert run([TABLE, "--output-root", str(tmp_path), "--publish"]) == 0
        assert capsys.readouterr().out == "https://wandb.ai/me/kt?nw=x\n"
    assert [(view.entity, view.project, view.id) for view in saved] == [("me", "kt", ""), ("me", "kt", "1")]

    def refuse(view: Any) -> None:
        raise wandb.errors.CommError("no\nnetwork")

    monkeypatch.setattr(workspaces.internal, "upsert_view2", refuse)
    with pytest.raises(UserError, match="^Weights & Biases: CommError: no network$"):
        run([TABLE, "--output-root", str(tmp_path), "--publish"])
    with pytest.raises(UserError, match=f"kd: no such table has been rendered in .*; it has {TABLE}"):
        run(["kd", "--output-root", str(tmp_path)])
