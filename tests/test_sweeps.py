"""Sweeps without a table: their points, plans and mistakes with a stand-in for the training, and their pages."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fake_training
from experiments import progress
from experiments.run import main
from experiments.table import parse
from kt.errors import UserError
from kt.store import write_status
from results import write_cell
from tables.__main__ import run as tables_command
from tables.sweeps import _drawings, collect_sweep, number_of, write_sweep

pytestmark = pytest.mark.usefixtures("no_cell_pages")

PAIR = ("teacher=resnet56", "student=resnet20")
BALANCES = ("method=hybrid_forward", "method.balance=dynamic,0.1,1.0", *PAIR)

Json = dict[str, Any]


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(progress, "_current", None)


def run(tmp_path: Path, *arguments: str) -> int:
    """A multirun in this process."""
    return main(["-m", *arguments, f"output_root={tmp_path / 'out'}"])


def given(tmp_path: Path) -> Json:
    """What the renderer got."""
    (path,) = (tmp_path / "out" / "sweeps").glob("*/given.json")
    return json.loads(path.read_text())


def points(tmp_path: Path) -> dict[str, Json]:
    return {point["id"]: point for point in given(tmp_path)["points"] if point["role"] != "needed"}


# ------------------------------------------------------------------------------------------------------------- running


@pytest.mark.usefixtures("_stand_in")
def test_points_and_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *BALANCES) == 0
    out = capsys.readouterr().out
    assert "[4/4]" in out and "| the sweep |" in out and "index.html" in out
    assert given(tmp_path)["keys"] == ["method.balance"]
    assert [point["axes"]["method.balance"] for point in points(tmp_path).values()] == ["dynamic", "0.1", "1.0"]
    (needed,) = [point for point in given(tmp_path)["points"] if point["role"] == "needed"]
    assert (needed["label"], needed["teacher"] or needed["student"]) == ("teacher", "resnet56")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4
    # Again, nothing is trained, and the page is the same one.
    assert run(tmp_path, *BALANCES, "threads=2") == 0
    assert all((path / "calls").read_text() == "x" for path in (tmp_path / "out" / "cells").iterdir())
    assert len(points(tmp_path)) == 3


@pytest.mark.usefixtures("_stand_in")
def test_a_plan_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *BALANCES, "plan=true") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()
    assert lines[-1].startswith("4 cells, 0 done, 4 to train")
    assert [line.split()[1] for line in lines[1:-1]][0] == "teacher"


@pytest.mark.usefixtures("_stand_in")
def test_cells_are_those_of_single_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *BALANCES) == 0
    alone = ["method=hybrid_forward", "method.balance=0.1", *PAIR, f"output_root={tmp_path / 'out'}", "plan=true"]
    capsys.readouterr()
    assert main(alone) == 0
    assert "2 cells, 2 done, 0 to train" in capsys.readouterr().out


@pytest.mark.usefixtures("_stand_in")
def test_methods_are_points_that_have_their_own_keys(tmp_path: Path) -> None:
    assert run(tmp_path, "method=none,kd,at", "method.temperature=2,4", *PAIR) == 0
    assert given(tmp_path)["keys"] == ["method", "method.temperature"]
    axes = [(point["axes"]["method"], point["axes"].get("method.temperature")) for point in points(tmp_path).values()]
    assert axes == [("none", None), ("kd", "2"), ("kd", "4"), ("at", None)]


@pytest.mark.usefixtures("_stand_in")
def test_seeds_are_averaged_and_networks_swept(tmp_path: Path) -> None:
    assert run(tmp_path, "method=kd", "seed=range(0,2)", "teacher=resnet56,resnet20", "student=resnet8") == 0
    found = points(tmp_path)
    assert given(tmp_path)["keys"] == ["teacher"]
    assert [[cell["seed"] for cell in point["cells"]] for point in found.values()] == [[0, 1], [0, 1]]
    needed = [point["label"] for point in given(tmp_path)["points"] if point["role"] == "needed"]
    assert needed == ["teacher", "teacher"]


@pytest.mark.usefixtures("_stand_in")
def test_teachers_can_be_swept_by_themselves(tmp_path: Path) -> None:
    assert run(tmp_path, "cell=teacher", "teacher=resnet20,resnet8", "method=kd") == 0
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


def test_globs_choose_among_the_files() -> None:
    assert parse(["method=glob(kcd+*,exclude=*a*)"]) == {"method": ["kcd+fitnet", "kcd+rco", "kcd+rkd"]}
    with pytest.raises(UserError, match="fits none of"):
        parse(["method=glob(x*)"])


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("method=kd", "method.balance=1,2", *PAIR), "method.balance: unknown key, no selected row has it"),
        (("rows=kd,at",), "rows=kd: selects rows of a table; add +table="),
        (("method=kd", "schedule.lr=interval(0,1)", *PAIR), "expected a list of values such as schedule.lr=1,2,3"),
        (("method=kdd,at", *PAIR), "method=kdd: there is no such choice"),
        (("method=kd,at",), "needs a teacher"),
        (("method=kd", "method.temperature=1,-1", *PAIR), "method.temperature=-1: expected"),
        (("output_root=a,b", "method=none"), "output_root=a,b: expected one value"),
        (("workers=0", "method=none,kd", *PAIR), "workers=0: expected"),
        (("workers=1,2", "method=none,kd", *PAIR), "workers=1,2: expected one value"),
        (("plan=maybe", "method=none,kd", *PAIR), "plan=maybe: expected true or false"),
        (("method=kd", "method.temperature=range(3,1)", *PAIR), "expected at least one value"),
        (("method=null", *PAIR), "method=null: expected one of ab, as, at"),
        (("method=kd", "evaluation=channel_overlap,consistency", *PAIR), "expected one value for the whole run"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert main(["-m", f"output_root={tmp_path}", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kt: error: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.usefixtures("_stand_in")
def test_values_that_make_no_difference_are_no_axis(tmp_path: Path) -> None:
    assert run(tmp_path, "method=kd", "method.temperature=4,4.0", "wandb.mode=offline,disabled", *PAIR) == 0
    assert given(tmp_path)["keys"] == [] and len(points(tmp_path)) == 1


@pytest.mark.usefixtures("_stand_in")
def test_the_projects_own_sweeper_by_name(tmp_path: Path) -> None:
    assert run(tmp_path, "method=kd", "seed=0,1", "hydra/sweeper=table", *PAIR) == 0
    assert len(points(tmp_path)) == 1


@pytest.mark.usefixtures("_stand_in")
def test_another_sweeper_keeps_its_place(tmp_path: Path) -> None:
    assert run(tmp_path, "method=kd,at", "hydra/sweeper=basic", *PAIR) == 0
    assert not (tmp_path / "out" / "sweeps").exists() and len(list((tmp_path / "out" / "cells").iterdir())) == 3


@pytest.mark.usefixtures("_stand_in")
def test_several_values_without_m_say_what_to_add(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(BALANCES)) == 2
    assert "several values make a sweep; add -m" in capsys.readouterr().err


@pytest.mark.usefixtures("_stand_in")
def test_a_failure_leaves_the_other_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"at": "error"}))
    assert run(tmp_path, "method=kd,at", *PAIR) == 3
    out = capsys.readouterr().out
    assert "X at seed 0: RuntimeError: the loss is not finite" in out and "kd seed 0: top-1 accuracy 50.00" in out


# ----------------------------------------------------------------------------------------------------------- rendering


def cell(root: Path, cell_id: str, top1: float | None, slope: float = 1.0, **metrics: float) -> Json:
    """A finished cell with a training record, or a failed one."""
    if top1 is None:
        status = {"status": "failed", "error": "went wrong", "started": 0}
        write_status(write_cell(root, cell_id, None), status)
    else:
        steps = [
            {"kind": "train", "phase": "train", "step": n, "epoch": n / 5, "lr": 0.1, "loss": slope / n, "accuracy": n}
            for n in range(1, 11)
        ]
        write_cell(root, cell_id, {"top1": top1, **metrics}, steps, labels={"top5": "top-2 of 10 classes"})
    return {"id": cell_id, "seed": int(cell_id[-1])}


def point(name: str, axes: dict[str, str], cells: list[Json], role: str = "method") -> Json:
    shared = {"method": "kd", "teacher": "resnet56", "student": "resnet20", "ours": False, "evaluation": None}
    return {"id": name, "label": name, "role": role, **shared, "axes": {"method": "kd", **axes}, "cells": cells}


def make(root: Path, keys: list[str] | None = None) -> list[Json]:
    """A fixed balance at three values and a dynamic one, two seeds each, and a failed point."""
    tops = {"dynamic": (70.0, 72.0), "0.1": (60.0, 60.5), "0.5": (65.0, 66.0), "1": (62.0, 64.0)}
    found = [
        point(
            f"kd[{value}]",
            {"method.balance": value},
            [cell(root, f"{value}-{s}", top, top5=90.0) for s, top in enumerate(pair)],
        )
        for value, pair in tops.items()
    ]
    found.append(point("kd[2]", {"method.balance": "2"}, [cell(root, "2-0", None)]))
    return [*found, point("teacher", {}, [cell(root, "teacher-0", 80.0, top5=95.0)], role="needed")]


def test_a_sweep_as_files(tmp_path: Path) -> None:
    folder = write_sweep("sweep-1", ["method.balance"], make(tmp_path), tmp_path, "the command")
    assert folder == tmp_path / "sweeps" / "sweep-1"
    table = json.loads((folder / "table.json").read_text())
    assert [metric["label"] for metric in table["metrics"]] == ["top-1 accuracy", "top-2 of 10 classes"]
    assert [row["axes"]["method.balance"] for row in table["rows"]] == ["dynamic", "0.1", "0.5", "1", "2", None]
    assert table["rows"][0]["mean"]["top1"] == 71.0 and table["rows"][0]["std"]["top1"] == pytest.approx(2**0.5)
    text = (folder / "table.md").read_text()
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["method.balance", "networks", "top-1 accuracy (%) ↑", "top-2 of 10 classes (%) ↑", "seeds"]
    assert lines[2][0] == "dynamic" and lines[2][2] == "**71.00 ± 1.41**" and lines[2][4] == "0, 1"
    assert lines[6] == ["2", "resnet56 → resnet20", "X", "X", "0"]
    # The teacher is there to compare with: it is no point, and never the best one.
    assert lines[7][0] == "teacher" and lines[7][2] == "80.00"
    read = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    assert [row["method.balance"] for row in read] == ["dynamic", "0.1", "0.5", "1", "2", ""]
    assert [row["top1_mean"] for row in read] == ["71.0", "60.25", "65.5", "63.0", "X", "80.0"]
    assert not any("paper" in column for column in read[0])


def test_the_page_of_a_sweep(tmp_path: Path) -> None:
    folder = write_sweep("sweep-1", ["method.balance"], make(tmp_path), tmp_path, "the <command>")
    page = (folder / "index.html").read_text()
    assert "Sweep over method.balance" in page and "the &lt;command&gt;" in page
    assert not re.search(r'(src|href)="https?:', page)
    names = sorted(path.name for path in (folder / "curves").glob("*.png"))
    assert names == ["score_method_balance_top1.png", "score_method_balance_top5.png"] + [
        "training_accuracy_1.png",
        "training_loss_1.png",
    ]
    # As in the papers: the fixed values as a line, the word and the teacher as levels.
    described = re.findall(r'aria-label="([^"]*)"', page)
    assert "top-1 accuracy (%) ↑: balance, balance=dynamic, teacher" in described
    assert "Training loss: balance=dynamic, balance=0.1, balance=0.5, balance=1" in described
    links = re.findall(r'href="([^"]*/cells/[^"]*)"', page)
    assert links and all((folder / link).resolve().exists() for link in links)


def test_two_swept_numbers_give_a_line_for_each_other_value(tmp_path: Path) -> None:
    found = [
        point(f"{lr}-{t}", {"schedule.lr": lr, "method.temperature": t}, [cell(tmp_path, f"{lr}-{t}-0", 10.0 * i + j)])
        for i, lr in enumerate(("0.1", "0.2", "0.4"))
        for j, t in enumerate(("1", "4"))
    ]
    folder = write_sweep("sweep-2", ["schedule.lr", "method.temperature"], found, tmp_path)
    described = re.findall(r'aria-label="([^"]*)"', (folder / "index.html").read_text())
    assert "top-1 accuracy (%) ↑: temperature=1, temperature=4" in described
    assert "top-1 accuracy (%) ↑: lr=0.1, lr=0.2, lr=0.4" in described


def test_what_is_drawn(tmp_path: Path) -> None:
    made = make(tmp_path)
    made.insert(1, point("kd[10]", {"method.balance": "10"}, [cell(tmp_path, "10-0", 50.0, top5=80.0)]))
    scores, training = _drawings(collect_sweep("sweep-1", ["method.balance"], made, tmp_path), tmp_path)
    panel = scores.panels[0]
    (line,) = panel.lines
    # In rising order, whatever the table's; the failed point is not there.
    assert line.means_x.tolist() == [0.1, 0.5, 1.0, 10.0] and line.means_y.tolist() == [60.25, 65.5, 63.0, 50.0]
    assert line.spread is not None and line.spread.tolist() == pytest.approx([0.5 / 2**0.5, 1 / 2**0.5, 2**0.5, 0.0])
    levels = [(level.label, level.y, level.spread) for level in panel.levels]
    assert levels == [("balance=dynamic", 71.0, pytest.approx(2**0.5)), ("teacher", 80.0, None)]
    assert panel.ticks == [0.1, 0.5, 1.0, 2.0, 10.0]
    assert [len(each.lines) for each in training.panels] == [5, 5]


def test_training_curves_are_means_over_seeds(tmp_path: Path) -> None:
    cells = [cell(tmp_path, "a-0", 1.0, slope=1.0), cell(tmp_path, "a-1", 1.0, slope=3.0)]
    sweep = collect_sweep("s", ["a"], [point("p", {"a": "x"}, cells)], tmp_path)
    (training,) = _drawings(sweep, tmp_path)
    (loss,) = training.panels[0].lines
    assert loss.y.tolist() == pytest.approx([2.0 / n for n in range(1, 11)])
    assert "averaged over seeds" in training.caption


def test_scores_on_other_data_are_those_shown(tmp_path: Path) -> None:
    made = cell(tmp_path, "a-0", 1.0)
    write_cell(tmp_path, "a-0", {"top1": 1.0}, evaluations={"gta5": {"miou": 33.0}})
    asked = {**point("p", {"a": "1"}, [made]), "evaluation": "gta5"}
    assert collect_sweep("s", ["a"], [asked], tmp_path)["rows"][0]["mean"] == {"miou": 33.0}


def test_one_point_alone_is_not_the_best(tmp_path: Path) -> None:
    folder = write_sweep("s", [], [point("p", {}, [cell(tmp_path, "a-0", 1.0)])], tmp_path)
    assert "**1.00**" not in (folder / "table.md").read_text()
    assert "| kd " in (folder / "table.md").read_text()


def test_many_points_are_spread_over_panels(tmp_path: Path) -> None:
    found = [point(f"p{n}", {"method": f"m{n}"}, [cell(tmp_path, f"m{n}-0", float(n))]) for n in range(8)]
    folder = write_sweep("sweep-3", ["method"], found, tmp_path)
    panels = [
        text for text in re.findall(r'aria-label="([^"]*)"', (folder / "index.html").read_text()) if "loss" in text
    ]
    assert [text.count("method=") for text in panels] == [6, 2]


def test_a_sweep_without_results(tmp_path: Path) -> None:
    nothing = [point("kd[1]", {"a": "1"}, [{"id": "none-0", "seed": 0}]), point("kd[2]", {"a": "2"}, [])]
    folder = write_sweep("sweep-4", ["a"], nothing, tmp_path)
    assert "| 1 " in (folder / "table.md").read_text()
    assert collect_sweep("sweep-4", ["a"], nothing, tmp_path)["metrics"] == []


def test_metrics_that_fall_are_better(tmp_path: Path) -> None:
    found = [point(f"p{n}", {"a": str(n)}, [cell(tmp_path, f"c{n}-0", 1.0, mr_all=50.0 + n)]) for n in range(2)]
    text = (write_sweep("sweep-5", ["a"], found, tmp_path) / "table.md").read_text()
    assert "**50.00**" in text and "51.00" in text and "**51.00**" not in text


def test_rendered_again_from_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep("sweep-1", ["method.balance"], make(tmp_path), tmp_path, "the command")
    for path in folder.glob("table.*"):
        path.unlink()
    assert tables_command(["sweep-1", "--output-root", str(tmp_path)]) == 3  # one cell has failed
    assert "**71.00 ± 1.41**" in capsys.readouterr().out and "the command" in (folder / "index.html").read_text()
    with pytest.raises(UserError, match="sweep-9: there is no such sweep .* it has sweep-1"):
        tables_command(["sweep-9", "--output-root", str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("1e-3", 1e-3), ("dynamic", None), (None, None), ("nan", None)]
)
def test_numbers_among_swept_values(text: str | None, value: float | None) -> None:
    assert number_of(text) == value
