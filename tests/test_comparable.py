"""A run is comparable exactly when its cells are what the table's own file means at scale=paper, seeds aside.

What that is, and where each setting comes from, `settings=true` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import settings, table
from experiments.sources import RowSettings, source_of
from kt.errors import UserError
from kt.settings import METHODS, kinds
from tables.papers import table_files
from tables.stated import agrees, stated


def differs(name: str, *arguments: str) -> dict[str, dict[str, list[Any]]]:
    """Row id -> differing keys of those rows that differ."""
    made = table(name, *arguments)
    found = {shown.id: made.differs(shown) for shown in made.shown}
    return {row: keys for row, keys in found.items() if keys}


@pytest.mark.parametrize("name", sorted(table_files()))
def test_the_papers_own_setting_is_comparable_and_says_where_it_comes_from(name: str) -> None:
    # A pose teacher has no training of its own: its weights, which only the command line can name, are no table's own.
    rows = ("role=baseline",) if name == "citypersons_pose" else ()
    assert differs(name, "scale=paper", *rows, "seed=3") == {}
    nowhere = [(row, each) for row, told in settings(name).items() for each in told if not (each.kind and each.source)]
    assert nowhere == []


@pytest.mark.parametrize(
    ("arguments", "rows", "key", "values"),
    [
        (("schedule.optimizer=adamw",), None, "schedule.optimizer", ["adamw", "sgd"]),
        (("dataset.image_size=64",), None, "dataset.image_size", [64, 224]),
        (("schedule.epochs=1",), None, "schedule.epochs", [1, 100]),
        (("schedule.batch_size=8",), None, "schedule.batch_size", [8, 256]),
        (("method.balance=0.01",), {"hybrid_forward"}, "method.balance", [0.01, 1.0]),
        (("method.alpha=0",), {"kd"}, "method.alpha", [0, 0.9]),
        (("dataset=cifar100",), None, "dataset.name", ["cifar100", "imagenet"]),
        (("teacher=resnet34",), None, "teacher.network.name", ["resnet34", "resnet50"]),
        (("precision=bf16",), None, "precision", ["bf16", "fp32"]),
        (("scale=fast",), None, "schedule.epochs", [10, 100]),
        (("scale=mini",), None, "dataset.name", ["scenes", "imagenet"]),
    ],
)
def test_any_other_setting_is_not(arguments: tuple[str, ...], rows: set[str] | None, key: str, values: list) -> None:
    found = differs("imagenet_compression", *(("scale=paper",) if "scale" not in arguments[0] else ()), *arguments)
    told = {row: keys[key] for row, keys in found.items() if key in keys}
    students = {row for row in found if row != "teacher"}
    assert told and all(each == values for each in told.values()), found
    assert (
        set(found) == rows if rows else set(told) >= students - ({"baseline"} if key.startswith("teacher") else set())
    )


def test_what_a_row_itself_says_at_another_scale_is_told() -> None:
    found = differs("nyuv2_distpro")["distpro"]
    assert found["method.factor"] == [0.5, "pathways"]
    assert found["search.method.alpha_lr"] == [0.2, 0.05]
    assert found["search.schedule.iterations"] == [60, None]
    assert differs("nyuv2_distpro", "scale=paper") == {}


def test_mini_has_its_lengths_on_real_data_too() -> None:
    shown = table("nyuv2_distpro", "dataset=nyuv2", "rows=[kd]").shown[0]
    assert [shown.config["teacher"]["schedule"][key] for key in ("epochs", "iterations")] == [None, 600]


def test_another_teacher_is_told_once_and_seeds_are_none(tmp_path: Path) -> None:
    (keys,) = {
        tuple(sorted(keys))
        for keys in differs("gta5_teachers", "scale=paper", "rows=hybrid_det", "schedule.lr=0.5").values()
    }
    assert "schedule.lr" in keys and not any(key.endswith("seed") for key in keys)


def _printed(paper: str) -> Any:
    path = Path(__file__).resolve().parent.parent / "tables" / "papers" / paper / "record.yaml"
    return yaml.safe_load(path.read_text())


def test_printed_settings_are_the_records() -> None:
    first = {each.key: each for each in settings("imagenet_compression", "rows=hybrid_forward")["hybrid_forward"]}
    protocol = _printed("hybrid_forward")["protocols"]["imagenet_mobilenetv1"]
    assert (protocol["lr"], protocol["batch_size"], protocol["schedule"]["milestones"]) == (0.1, 256, "every 30")
    printed = {key: each.value for key, each in first.items() if each.kind == "printed"}
    assert printed == {
        **{"dataset.name": "imagenet", "student.network.name": "mobilenet_v1", "teacher.network.name": "resnet50"},
        **{"method.name": "hybrid_forward", "method.balance": 1.0, "schedule.lr": 0.1, "schedule.batch_size": 256},
        **{"schedule.policy": "step", "schedule.gamma": 0.1, "schedule.milestones": [0.3, 0.6, 0.9]},
    }
    assert first["schedule.lr"].source == "hybrid_forward, Table 1: protocols.imagenet_mobilenetv1.lr"
    assert first["schedule.momentum"].kind == "cited" and "Heo et al. 2019a" in first["schedule.momentum"].source
    assert first["method.interpolation"].kind == "ours"


def test_what_departs_from_the_record_has_to_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[RowSettings] = []
    monkeypatch.setattr(RowSettings, "settings", lambda row: given.append(row) or [])
    settings("cityscapes_teachers", "rows=at_det")
    monkeypatch.undo()
    (row,) = given

    def kinds(key: str, value: Any) -> dict[str, str | None]:
        row.stated = {**stated(row.record, "at_det", row.values), key: (value, "somewhere")}
        return {each.key: each.kind for each in row.settings()}

    assert kinds("schedule.lr", 0.001)["schedule.lr"] == "printed"
    assert kinds("schedule.lr", 0.002)["schedule.lr"] is None  # a recipe's file cannot know of it
    assert kinds("method.weight", 3.0)["method.weight"] == "ours"  # the table's file explains it
    row.set_here = {"method.stages"}
    assert kinds("schedule.lr", 0.001)["method.stages"] is None  # set there without a word


@pytest.mark.parametrize(
    ("ours", "printed", "same"),
    [
        ([0.3076923, 0.6153846], [20000 / 65000, 40000 / 65000], True),
        ([0.31, 0.62], [20000 / 65000, 40000 / 65000], False),
        ([0.3], [0.3, 0.6], False),
        (1, 1.0, True),
        ("sgd", "adam", False),
        (None, 0.1, False),
    ],
)
def test_printed_values_agree(ours: Any, printed: Any, same: bool) -> None:
    assert agrees(ours, printed) == same


def test_every_default_of_a_method_says_where_it_comes_from() -> None:
    named = [(name, key) for name, schema in METHODS.items() for key in kinds(schema) if key != "name"]
    assert [(name, key) for name, key in named if not source_of(METHODS[name], key)] == []


def test_settings_are_the_tables_own() -> None:
    with pytest.raises(UserError, match="schedule.lr=1: settings=true shows the table's own"):
        settings("imagenet_compression", "schedule.lr=1")
