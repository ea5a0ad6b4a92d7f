"""DistPro's table: rows that share searches and teachers, claims that are judged from records, and Figure 6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import table
from experiments.meaning import identity, needs_of, settle
from results import make_row, write_cell
from tables.collect import collect
from tables.judging import Context
from tables.papers.distpro.figures import searched_process
from tables.records import find_table

NAME, PAIR = "distpro_cifar100", "wrn_40_2_wrn_16_2"
STEPS = 400


def search(root: Path, peaks: tuple[float, ...], scatter: float = 0.0) -> str:
    """A search whose three summed weights peak after these shares of its steps."""
    noise = np.random.default_rng(0).normal(size=(3, STEPS))
    at = np.arange(1, STEPS + 1) / STEPS
    weights = [0.3 - 0.2 * np.abs(at - peak) + scatter * each for peak, each in zip(peaks, noise, strict=True)]
    rows = [
        {"kind": "train", "phase": "train", "step": i + 1, "epoch": (i + 1) / 100, "lr": 0.1, "loss": 1.0}
        | {f"weight_t{level + 1}": float(each[i]) for level, each in enumerate(weights)}
        for i in range(STEPS)
    ]
    write_cell(root, "search", {"top1": 50.0}, rows, phases=[{"name": "train", "seconds": 40.0, "steps": STEPS}])
    return "search"


def replayed(root: Path, live: float = 27.0, **result: Any) -> list[dict[str, Any]]:
    """Rows of a pair that replays the search, and of the same with equal weights."""
    found = []
    for kind, count, speed in (("distpro", live, 30.0), ("equal", 27.0, 20.0)):
        row = make_row(NAME, f"{kind}_{PAIR}")
        rows = [
            {"kind": "train", "phase": "train", "step": i + 1, "epoch": i + 1, "lr": 0.1, "loss": 1.0, "live": count}
            for i in range(4)
        ]
        needs = {"search": "search"} if kind == "distpro" else {}
        kept = {"needs": needs, "pathways": 27, "images_per_second": speed}
        kept["phases"] = [{"name": "train", "seconds": 100.0, "steps": 4}]
        write_cell(root, row["cells"][0]["id"], {"top1": 60.0}, rows, **{**kept, **result})
        found.append(row)
    return found


def claim(root: Path, rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(each for each in collect(NAME, rows, root, "mini", "scenes")["claims"] if each["id"] == name)


@pytest.mark.parametrize(
    ("peaks", "scatter", "verdict"),
    [
        ((0.2, 0.5, 0.8), 0.0, "holds"),
        ((0.2, 0.5, 0.8), 0.005, "holds"),
        ((0.8, 0.5, 0.2), 0.0, "fails"),
        ((0.2, 0.8, 0.5), 0.0, "fails"),
        ((0.2, 0.5, 0.8), 0.5, "unknown"),
    ],
)
def test_low_levels_come_first(peaks: tuple[float, ...], scatter: float, verdict: str, tmp_path: Path) -> None:
    search(tmp_path, peaks, scatter)
    found = claim(tmp_path, replayed(tmp_path), "c12")
    assert found["verdict"] == verdict, found
    if verdict == "holds" and not scatter:
        assert "20 %, 50 %, 80 %" in found["evidence"]


def test_without_a_search_there_is_no_verdict(tmp_path: Path) -> None:
    rows = replayed(tmp_path)
    assert "Needs" in claim(tmp_path, rows, "c12")["evidence"] and "Needs" in claim(tmp_path, rows, "c16")["evidence"]
    assert searched_process(Context(find_table(NAME), rows, {}, tmp_path)) is None


def test_a_search_is_cheap_if_it_takes_less_than_the_training(tmp_path: Path) -> None:
    search(tmp_path, (0.2, 0.5, 0.8))
    assert "takes 0.40 of the time" in claim(tmp_path, replayed(tmp_path), "c16")["evidence"]
    short = [{"name": "train", "seconds": 30.0, "steps": 4}]
    assert claim(tmp_path, replayed(tmp_path, phases=short), "c16")["verdict"] == "fails"


@pytest.mark.parametrize(("live", "verdict", "share"), [(9.0, "holds", "67 %"), (27.0, "fails", "0 %")])
def test_clipping_saves(live: float, verdict: str, share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tables.papers.distpro.claims.PAIRS", (PAIR,))
    found = claim(tmp_path, replayed(tmp_path, live), "c15")
    assert found["verdict"] == verdict and found["evidence"].startswith(f"{share} of the pathways' losses")
    assert "0.67 of the time that equal weights take" in found["evidence"]


def test_all_seeds_and_uses_of_a_pair_share_one_search_and_one_teacher() -> None:
    cells = [settle(job.config) for job in table(NAME, "seed=0,1").jobs.values()]
    searching = [cell for cell in cells if cell["method"].get("process") in ("search", "final")]
    needs = [needs_of(cell) for cell in searching]
    assert len(searching) == 24
    assert len({identity(need["search"].config) for need in needs}) == 6  # type: ignore[union-attr]
    assert len({identity(need["teacher"].config) for need in needs}) == 4  # type: ignore[union-attr]


def test_figure_6_shows_each_map(tmp_path: Path) -> None:
    search(tmp_path, (0.2, 0.5, 0.8))
    rows = collect(NAME, replayed(tmp_path), tmp_path, "mini", "scenes")["rows"]
    results = {rows[0]["cells"][0]["id"]: {"needs": {"search": "search"}}}
    drawn = searched_process(Context(find_table(NAME), rows, results, tmp_path))
    assert drawn is not None
    _, (panel,) = drawn
    assert [line.label for line in panel.lines] == ["teacher's map 1", "teacher's map 2", "teacher's map 3"]
    peaks = [line.x[line.y.argmax()] / STEPS for line in panel.lines]
    np.testing.assert_allclose(peaks, (0.2, 0.5, 0.8), atol=0.01)
