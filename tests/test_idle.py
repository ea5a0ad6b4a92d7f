"""A key of a method either makes another cell, or decides nothing and is known to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from checks import step_each_phase
from configs import composed
from experiments.checking import validate
from experiments.idle import idle
from experiments.meaning import identity
from kt.errors import UserError
from kt.settings import METHODS, SOURCE, Settings, fits, kinds
from method_settings import make_data, make_model

# Values of whatever kind; of each key those that it may have are tried.
VALUES: list[Any] = [3, 2, 0.25, 0.75, True, False, [1], [[1], [2]], [[1, 1]], None]
APART = ("name", "base", "beside", "search", "file", SOURCE)  # groups of keys, and files that would have to be there
PAIR = ("teacher=resnet20", "student=resnet8", "schedule.epochs=8")
# What decides nothing under some settings.
IDLE: dict[str, set[str]] = {
    "method=kd": set(),
    "method=kd dataset=scenes_depth teacher=depth_resnet50 student=depth_resnet18": {"temperature"},
    "method=fitnet": {"temperature", "alpha"},
    "method=fitnet method.init_fraction=0.5": set(),
    "method=ab": {"temperature"},
    "method=ab method.after=kd": set(),
    "method=kcd": {"learn_fraction"},
    "method=kcd method.strategy=subnet_fc": set(),
    "method=kcd method.student_state=initial": {"learn_fraction", "solo_offset"},
    "method=kcd method.strategy=identity": {
        *("learn_fraction", "metric", "student_state", "teacher_state", "solo_offset", "teacher_offset")
    },
    "method=distpro": set(),
    "method=distpro method.process=equal": {"clip"},
    "method=mas": set(),
    "method=mas method.pair_weights=uniform": {"meta_lr", "meta_weight_decay", "meta_interval"},
}


def literals(kind: Any) -> Iterator[str]:
    for part in get_args(kind):
        yield from [part] if isinstance(part, str) else literals(part)


def others(schema: type[Settings], key: str, now: Any) -> list[Any]:
    """Values that a key may have instead of its own."""
    tried = [*VALUES, *literals(kinds(schema)[key])]
    return [value for value in tried if value != now and fits(value, schema, key)]


@pytest.mark.parametrize("line", IDLE)
def test_what_is_idle_makes_no_other_cell_and_all_else_does(line: str) -> None:
    config = composed(*line.split(), *(() if "dataset=" in line else PAIR))
    schema, cell = METHODS[config["method"]["name"]], identity(config)
    same: dict[bool, set[str]] = {True: set(), False: set()}
    for key in kinds(schema).keys() - {*APART}:
        for value in others(schema, key, config["method"][key]):
            changed = {**config, "method": {**config["method"], key: value}}
            try:
                validate(changed)
                same[identity(changed) == cell].add(key)
            except UserError:  # does not go with the others
                pass
    assert same[True] == IDLE[line] == {key[7:] for key in idle(config) if key.startswith("method.")} - {*APART}
    assert not same[True] & same[False] and same[False]


@pytest.mark.parametrize(
    ("name", "under", "changes"),
    [
        ("fitnet", {}, {"temperature": 9.0, "alpha": 0.3}),
        ("ab", {}, {"temperature": 9.0}),
        ("kcd+rco", {"strategy": "random"}, {"metric": "l1", "student_state": "initial", "learn_fraction": 0.5}),
        ("distpro", {"process": "equal"}, {"clip": 9.0}),
        ("mas", {"pair_weights": "uniform"}, {"meta_lr": 0.5, "meta_weight_decay": 0.5, "meta_interval": 3}),
    ],
)
def test_what_is_idle_trains_the_same_student(
    name: str, under: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    data, left = make_data(), []
    for more in ({}, changes):
        model = make_model(name, data.spec.num_classes, **under, **more)
        left.append(step_each_phase(model, next(iter(data.train.epoch(0))), tmp_path))
    assert left[0].keys() == left[1].keys() and all(torch.equal(left[0][key], left[1][key]) for key in left[0])


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("schedule.epochs=9 schedule.milestones=[20] teacher.schedule.epochs=30", {"milestones", "gamma"}),
        ("schedule.optimizer=adam teacher.schedule.optimizer=sgd", {"momentum", "nesterov"}),
        ("teacher.schedule.iterations=40", {"interval"}),
    ],
)
def test_what_a_teacher_takes_from_the_students_schedule_is_not_idle(line: str, keys: set[str]) -> None:
    def said(*more: str) -> set[str]:
        config = composed("method=kd", "teacher=resnet20", "schedule.policy=step", *line.split(), *more)
        return {key for key in keys if f"schedule.{key}" in idle(config)}

    assert said() == set()
    assert said("method=none", "teacher=none") == said("teacher.checkpoint=x.pth") == keys
    assert said(*(f"teacher.schedule.{key}=${{schedule.{key}}}" for key in keys)) == keys
