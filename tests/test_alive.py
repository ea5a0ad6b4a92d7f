"""Whether a table is alive: what chance is, whose teacher is above whom, and what a scale can decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kt.evaluation.depth import depth_spread
from kt.evaluation.outcomes import keep_outcomes
from kt.files import write_sealed
from kt.store import folder_of, outcomes_file
from results import make_row, write_cell
from tables.alive import commonest, flat, reach
from tables.collect import collect
from tables.folders import table_folder
from tables.render import life_notes
from tables.summary import Ran, summarise

Json = dict[str, Any]
DATA = {"name": "scenes", "task": "classification"}


def life(
    root: Path, table: str, scores: dict[str, Json], teacher: Json | None = None, by: str = "the-teacher", **result: Any
) -> Json:
    """A table of rows with scores (and in `kept` outcomes), taught by a cell of scores (and in `data` its dataset)."""
    rows = [make_row(table, row_id) for row_id in scores]
    for row, score in zip(rows, scores.values(), strict=True):
        kept = score.pop("kept", None)
        needs = {"teacher": by} if row["role"] == "method" else {}
        cell_id = row["cells"][0]["id"]
        folder = write_cell(root, cell_id, score, needs=needs, config={"dataset": DATA}, train_size=3000, **result)
        if kept:
            (folder / "evaluations").mkdir()
            keep_outcomes(outcomes_file(folder), {"indices": np.arange(len(next(iter(kept.values())))), **kept})
    if teacher:
        config = {"dataset": teacher.pop("data", DATA), "seed": 0}
        write_cell(root, "the-teacher", teacher, config=config, **result)
    return collect(table, rows, root, "mini", "scenes")


@pytest.mark.parametrize(
    ("alone", "teacher", "verdict", "told"),
    [
        (30.0, 40.0, "alive", ["BASELINE: 30, 3.00 times chance (10)", "BASELINE +10.00 ± 4.24"]),
        (29.9, 40.0, "not alive", ["BASELINE: 29.9, 2.99 times chance (10)"]),
        (30.0, 34.0, "not alive", ["teacher resnet50 - BASELINE +4.00 ± 4.17, not clearly above"]),
        (20.0, 10.0, "not alive", ["BASELINE: 20, 2.00 times chance (10)", "-10.00"]),
        (None, 40.0, "unknown", ["BASELINE (seed 0 without a finite top1)"]),
    ],
)
def test_students_are_above_chance_and_teachers_above_them(
    alone: float | None, teacher: float, verdict: str, told: list[str], tmp_path: Path
) -> None:
    """Two standard errors of the difference of 30 and 34 % of 1000 images are 4.17 points."""
    scores = {"baseline": {} if alone is None else {"top1": alone}, "kd": {"top1": 1.0}}
    table = life(tmp_path, "imagenet_compression", scores, {"top1": teacher}, num_classes=10, test_size=1000)
    assert table["alive"]["verdict"] == verdict
    assert all(each in table["alive"]["evidence"] for each in told), table["alive"]
    reasons = table["alive"]["reasons"]
    assert reasons == [] if verdict == "alive" else told[0] in reasons[0]
    assert life_notes(table)[0].startswith(f"{verdict.capitalize()}: ")


def test_the_summary_of_tables_says_who_is_alive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    for name, row_id, top1 in (("cifar100_stagewise", "student", 50.0), ("stage_count", "student", 20.0)):
        table = life(tmp_path / name, name, {row_id: {"top1": top1}}, num_classes=10, test_size=1000)
        folder = table_folder(tmp_path, name, "mini")
        folder.mkdir(parents=True)
        write_sealed(folder / "table.json", table)
        ran.append(Ran(name, 0, 1.0, "", folder))
    summarise(ran)
    lines = capsys.readouterr().out.splitlines()
    assert " alive  " in lines[1] and "not alive: STUDENT: 20, 2.00 times chance (10)" in lines[2]
    assert "not" not in lines[1]


def test_only_a_teacher_of_the_same_data_is_compared(tmp_path: Path) -> None:
    other = {"top1": 0.0, "data": {**DATA, "name": "cifar100"}}
    scores = {"baseline": {"top1": 50.0}, "kd": {"top1": 1.0}}
    alive = life(tmp_path, "imagenet_compression", scores, other, num_classes=10, test_size=1000)["alive"]
    assert alive["verdict"] == "alive" and "no teacher has a score on its student's data" in alive["evidence"]


def test_a_student_is_not_its_own_teacher(tmp_path: Path) -> None:
    scores = {"baseline": {"top1": 50.0}, "kd": {"top1": 1.0}}
    alive = life(tmp_path, "imagenet_compression", scores, by="baseline-s0", num_classes=10, test_size=1000)["alive"]
    assert alive["verdict"] == "alive" and "no teacher has a score" in alive["evidence"]


def test_a_baseline_with_a_method_is_not_untaught(tmp_path: Path) -> None:
    scores = {"finetune_cub200": {"top1": 20.0}, "scratch_cub200": {"top1": 50.0}}
    alive = life(tmp_path, "mas_limited", scores, num_classes=10, test_size=1000)["alive"]
    assert alive["verdict"] == "alive" and "FINETUNE" not in alive["evidence"]


def test_seeds_count_together(tmp_path: Path) -> None:
    row = make_row("imagenet_compression", "baseline", seeds=(0, 1))
    for cell, top1 in zip(row["cells"], (20.0, 41.0), strict=True):
        write_cell(tmp_path, cell["id"], {"top1": top1}, num_classes=10, test_size=1000)
    alive = collect("imagenet_compression", [row], tmp_path, "mini", "scenes")["alive"]
    assert alive["verdict"] == "alive" and "30.5, 3.05 times chance" in alive["evidence"]


def test_taught_students_stand_in_for_untaught_ones(tmp_path: Path) -> None:
    scores = {"bipartite": {"top1": 50.0}, "greedy": {"top1": 20.0}}
    alive = life(tmp_path, "kcd_strategies", scores, {"top1": 0.0}, num_classes=10, test_size=1000)["alive"]
    assert alive["reasons"] == ["GREEDY: 20, 2.00 times chance (10)"] and "no student is untaught" in alive["evidence"]


def test_an_analysis_is_of_networks_that_have_learned(tmp_path: Path) -> None:
    row = make_row("kcd_consistency", "fitnet", evaluation="consistency")
    for top1, verdict in ((50.0, "alive"), (20.0, "not alive")):
        write_cell(tmp_path, row["cells"][0]["id"], {"top1": top1}, evaluations={"consistency": {}}, num_classes=10)
        assert collect("kcd_consistency", [row], tmp_path, "mini", "scenes")["alive"]["verdict"] == verdict


@pytest.mark.parametrize(
    ("table", "row_id", "score", "alive"),
    [
        ("coco_retinanet", "student", {"map": 3.0}, True),
        ("coco_retinanet", "student", {"map": 2.9}, False),
        ("citypersons_pose", "baseline", {"mr_reasonable": 97.0}, True),
        ("citypersons_pose", "baseline", {"mr_reasonable": 97.1}, False),
        ("gta5_teachers", "baseline", {"miou": 75.1}, True),
        ("gta5_teachers", "baseline", {"miou": 74.9}, False),
        ("nyuv2_distpro", "baseline", {"rmse": 0.66}, True),
        ("nyuv2_distpro", "baseline", {"rmse": 0.67}, False),
    ],
)
def test_chance_of_other_scores(table: str, row_id: str, score: Json, alive: bool, tmp_path: Path) -> None:
    """Half of the pixels are of one of two classes: 50 / 2. Depths of 2 and 6 m: 4, wrong by 2."""
    areas = np.array([[50, 0, 30], [50, 0, 70]])
    kept = {"miou": {"truth": areas}, "rmse": {"depth_mean": np.array([2.0, 6.0]), "depth_std": np.zeros(2)}}
    found = life(tmp_path, table, {row_id: {**score, "kept": kept.get(next(iter(score)))}})
    assert found["alive"]["verdict"] == ("alive" if alive else "not alive"), found["alive"]


def test_chance_is_that_of_the_images_that_were_scored(tmp_path: Path) -> None:
    """Of 100 pixels 50 are of the commonest of two classes here, and 90 there: 25 and 45 % are chance."""
    row = make_row("gta5_teachers", "baseline", evaluation="gta5")
    cell_id, scores = row["cells"][0]["id"], {"gta5": {"miou": 80.0}}
    folder = write_cell(tmp_path, cell_id, {"miou": 10.0}, evaluations=scores, needs={})
    for name, areas in (("test", [90, 10]), ("gta5", [50, 50])):
        keep_outcomes(outcomes_file(folder, name), {"indices": np.arange(1), "truth": np.array([areas])})
    alive = collect("gta5_teachers", [row], tmp_path, "mini", "scenes")["alive"]
    assert alive["verdict"] == "alive" and "80, 3.20 times chance (25)" in alive["evidence"], alive


def test_without_rows_nothing_is_known(tmp_path: Path) -> None:
    assert collect("gta5_teachers", [], tmp_path, "mini", "scenes")["alive"]["verdict"] == "unknown"


def test_without_what_tells_chance_nothing_is_known(tmp_path: Path) -> None:
    alive = life(tmp_path, "gta5_teachers", {"baseline": {"miou": 50.0}})["alive"]
    assert alive["verdict"] == "unknown" and alive["reasons"] == ["BASELINE: nothing is kept that tells chance"]


def test_answers_that_look_at_no_image() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(4, (5, 200), p=(0.2, 0.5, 0.3, 0))
    areas = np.stack([np.bincount(each, minlength=4) for each in labels])
    ious = [((labels == c) & (labels == labels)).sum() / labels.size if c == 1 else 0.0 for c in range(3)]
    assert commonest(areas) == pytest.approx(100 * np.mean(ious))
    depths = [rng.uniform(1, 9, (6, 7)) * (rng.uniform(size=(6, 7)) > 0.3) * each for each in (1, 0.2, 0, 2)]
    known = [depth[depth > 0] for depth in depths if depth.any()]
    guess = np.mean([each.mean() for each in known])
    errors = [np.sqrt(np.mean((each - guess) ** 2)) for each in known]
    assert flat(*np.array([depth_spread(depth) for depth in depths]).T) == pytest.approx(np.mean(errors))


def test_what_a_scale_can_decide(tmp_path: Path) -> None:
    scores = {"baseline": {"top1": 50.0}}
    mini = life(tmp_path, "imagenet_compression", scores, num_classes=10, test_size=1000)
    assert mini["reach"].startswith("With at most 3,000 training images and one seed a row, scale=mini shows")
    rows = [make_row("imagenet_compression", "baseline")]
    assert collect("imagenet_compression", rows, tmp_path, "paper", "imagenet")["reach"] == ""
    assert reach("mini", [{"train_size": 400}, {"train_size": 3000}, {}], 1).startswith("With at most 3,000 ")
    assert folder_of(tmp_path, rows[0]["cells"][0]["id"]).exists()
