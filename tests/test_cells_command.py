"""`python -m experiments.cells`: list, show, compare and prune, on folders as cells leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kt.store
from configs import composed
from experiments.cells import BARS, bars, run
from experiments.meaning import identity, needed_cells, settle
from kt.errors import UserError
from kt.files import write_sealed
from kt.store import folder_of, lock_of, write_status
from results import write_cell

PAIR = ("teacher=resnet56", "student=resnet20")


def make(root: Path, *arguments: str, records: Any = (), needs: Any = None, **metrics: float) -> str:
    """A finished cell as `experiments.cell` leaves it; returns its id."""
    config = settle(composed(*arguments))
    cell_id = identity(config)
    folder = write_cell(root, cell_id, metrics, records, config=config, needs=needs or {}, labels={"top5": "top-2"})
    (folder / "student.pth").write_bytes(b"x" * 3000)
    return cell_id


def steps(*losses: float) -> list[dict[str, Any]]:
    return [
        {"kind": "train", "phase": "train", "step": i, "epoch": i, "lr": 1, "loss": x} for i, x in enumerate(losses)
    ]


@pytest.fixture
def cells(tmp_path: Path) -> dict[str, str]:
    """A teacher, two students of it, and one that nobody shows; a table shows the first student."""
    teacher = make(tmp_path, "student=resnet56", top1=80.0)
    kd = make(tmp_path, "method=kd", *PAIR, records=steps(2.0, 1.0), needs={"teacher": teacher}, top1=61.0, top5=90.0)
    hot = make(tmp_path, "method=kd", "method.temperature=8", *PAIR, records=steps(4.0, 3.0), top1=63.5, top5=90.0)
    alone = make(tmp_path, "student=resnet8", top1=40.0)
    rows = {"rows": [{"id": "kd", "evaluation": None, "cells": [{"id": kd, "seed": 0}]}]}
    (tmp_path / "tables" / "a" / "mini").mkdir(parents=True)
    write_sealed(tmp_path / "tables" / "a" / "mini" / "rows.json", rows)
    return {"teacher": teacher, "kd": kd, "hot": hot, "alone": alone}


def told(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> str:
    assert run([*arguments, "--output-root", str(root)]) == 0
    return capsys.readouterr().out


def test_list(tmp_path: Path, cells: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path, "f" * 16).mkdir()
    write_status(folder_of(tmp_path, "f" * 16), {"status": "failed", "error": "x"})
    lines = told(capsys, tmp_path).splitlines()
    found = {line.split()[0]: line for line in lines[1:-1]}
    assert found.keys() == {*cells.values(), "f" * 16}
    assert "kd: resnet56 → resnet20, scenes, seed 0" in found[cells["kd"]]
    assert found[cells["kd"]].split()[-5:] == ["done", "61.00", "0.0", "MB", "1"]
    assert "failed" in found["f" * 16] and lines[-1].startswith("5 cells, 0.0 MB in ")
    assert told(capsys, tmp_path, "list", "resnet56", "61.00").splitlines()[-1].startswith("1 cell,")


def test_show(tmp_path: Path, cells: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, tmp_path, "show", cells["kd"][:7])
    words = ("method.temperature=4.0", "top-1 accuracy 61.00, top-2 90.00", "a/mini", f"{BARS[-1]}{BARS[0]}", "2 to 1")
    words += (f'kt.load_student("{folder_of(tmp_path, cells["kd"])}")', cells["teacher"], "80.00")
    for word in words:
        assert word in out, word
    assert out == told(capsys, tmp_path, "show", str(folder_of(tmp_path, cells["kd"])))


def test_compare(tmp_path: Path, cells: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in told(capsys, tmp_path, "compare", cells["kd"], cells["hot"]).splitlines()]
    assert ["method.temperature", "4.0", "8"] in lines  # and no other setting
    assert [line for line in lines if "." in (line or [""])[0]] == [["method.temperature", "4.0", "8"]]
    assert ["top-1", "accuracy", "61.00", "63.50", "+2.50"] in lines
    # On one scale: the first one is the lower half of the second's.
    assert ["loss", "a", f"{BARS[2]}{BARS[0]}", "2", "to", "1"] in lines
    assert ["loss", "b", f"{BARS[7]}{BARS[5]}", "4", "to", "3"] in lines
    # Keys of another method follow from its name.
    keys = told(capsys, tmp_path, "compare", cells["kd"], cells["alone"])
    assert "method.name" in keys and "method.temperature" not in keys and "student.network.name" in keys


def test_prune(tmp_path: Path, cells: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, tmp_path, "prune")
    assert cells["hot"] in out and cells["alone"] in out and "nothing is removed" in out
    assert cells["kd"] not in out and cells["teacher"] not in out
    for used in ("kd", "teacher"):
        with pytest.raises(UserError, match="a table uses it"):
            run(["prune", cells[used], "--yes", "--output-root", str(tmp_path)])
    with lock_of(folder_of(tmp_path, cells["alone"])).acquire():
        assert f"others work on {cells['alone']}" in told(capsys, tmp_path, "prune", cells["alone"], "--yes")
    left = {path.name for path in (tmp_path / "cells").iterdir()}
    assert left == {*cells.values()}
    assert told(capsys, tmp_path, "prune", "--yes").startswith("removed 2 cells")
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {cells["teacher"], cells["kd"]}
    assert "is used by a table" in told(capsys, tmp_path, "prune")


def test_what_an_analysis_needs_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of these needs a cell's result says nothing, and a cell of other data has a longer id."""
    kd = make(tmp_path, "method=kd", *PAIR, top1=61.0)
    config = settle({**composed("method=kd", *PAIR), "evaluation": "consistency_solo"})
    solo = identity(needed_cells(config)["solo"])
    write_cell(tmp_path, f"{solo}-01234567", {"top1": 50.0}, config=settle(composed("student=resnet20")))
    (tmp_path / "sweeps" / "sweep-1").mkdir(parents=True)
    points = {"points": [{"id": "kd", "evaluation": "consistency_solo", "cells": [{"id": kd, "seed": 0}]}]}
    write_sealed(tmp_path / "sweeps" / "sweep-1" / "rows.json", points)
    assert "is used by a table" in told(capsys, tmp_path, "prune")
    points["points"][0]["evaluation"] = None
    write_sealed(tmp_path / "sweeps" / "sweep-1" / "rows.json", points)
    assert f"{solo}-01234567" in told(capsys, tmp_path, "prune")


def test_nothing_is_pruned_while_a_table_does_not_say_what_it_shows(
    tmp_path: Path, cells: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tables" / "a" / "mini" / "rows.json"
    path.write_text(path.read_text().replace(cells["kd"], cells["hot"]))
    with pytest.raises(UserError, match="rows.json: expected it as it was written"):
        run(["prune", "--output-root", str(tmp_path)])
    assert cells["alone"] in told(capsys, tmp_path)


def test_nothing_is_pruned_while_a_cell_is_trained(
    tmp_path: Path, cells: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, "e" * 16)
    folder.mkdir()
    write_status(folder, {"status": "running", "error": None, "host": "here", "started": 0.0})
    monkeypatch.setattr(kt.store, "_is_held", lambda folder: True)
    with pytest.raises(UserError, match="is being trained"):
        run(["prune", "--yes", "--output-root", str(tmp_path)])
    assert len(list((tmp_path / "cells").iterdir())) == 5


def test_bars_leave_gaps() -> None:
    assert bars([0.0, float("nan"), 1.0, 5.0], 0.0, 1.0) == f"{BARS[0]} {BARS[-1]} "
    assert bars([3.0, 3.0], 3.0, 3.0) == BARS[4] * 2
    assert len(bars([0.0] * 1000, 0.0, 1.0)) == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "zz"], "zz: there is no such cell"),
        (["show", ""], "4 begin so"),
        (["compare", "a"], "cell"),
        (["burn"], "invalid choice"),
        (["list", "--output-root", "nowhere"], "expected a folder with results"),
    ],
)
def test_mistakes(tmp_path: Path, cells: dict[str, str], arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(["--output-root", str(tmp_path), *arguments])
