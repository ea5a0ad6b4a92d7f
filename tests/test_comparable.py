"""A run is comparable exactly when its cells are what the table's own file means at scale=paper, seeds aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs import table
from tables.papers import table_files


def differs(name: str, *arguments: str) -> dict[str, dict[str, list[Any]]]:
    """Row id -> differing keys of those rows that differ."""
    made = table(name, *arguments)
    found = {shown.id: made._differs(shown) for shown in made.shown}
    return {row: keys for row, keys in found.items() if keys}


@pytest.mark.parametrize("name", sorted(table_files()))
def test_the_papers_own_setting_is_comparable(name: str) -> None:
    # A pose teacher has no training of its own: its weights, which only the command line can name, are no table's own.
    rows = ("role=baseline",) if name == "citypersons_pose" else ()
    assert differs(name, "scale=paper", *rows, "seed=3") == {}


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


def test_another_teacher_is_told_once_and_seeds_are_none(tmp_path: Path) -> None:
    (keys,) = {
        tuple(sorted(keys))
        for keys in differs("gta5_teachers", "scale=paper", "rows=hybrid_det", "schedule.lr=0.5").values()
    }
    assert "schedule.lr" in keys and not any(key.endswith("seed") for key in keys)
