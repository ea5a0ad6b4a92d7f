"""The config tree: every file composes and validates, choices follow scale and dataset, nothing imports torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Interval, Len, MultipleOf
from omegaconf import OmegaConf
from pydantic import AfterValidator, Field, StringConstraints, create_model

from configs import composed
from experiments.checking import plain
from experiments.groups import choices
from kt.errors import UserError
from kt.models.names import CONFIG_NETWORK, DENSE_NETWORKS, NETWORKS
from kt.settings import METHODS, Settings, describe, kinds

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("group", ["dataset", "method", "schedule", "scale"])
def test_every_choice_is_valid(group: str) -> None:
    for choice in choices(group):
        composed(f"{group}={choice}")


def test_every_network_is_a_teacher_and_a_student() -> None:
    names = choices("network")
    assert set(choices("student")) == set(names)
    assert set(choices("teacher")) == {*names, "none"}
    config = composed("teacher=vgg16", "student=wrn_16_2")
    assert (config["teacher"]["network"]["name"], config["student"]["network"]["name"]) == ("vgg16", "wrn_16_2")


def test_networks_are_those_of_the_package() -> None:
    assert set(choices("network")) == {*NETWORKS, *DENSE_NETWORKS, CONFIG_NETWORK}


def test_methods_are_those_with_a_schema() -> None:
    assert set(choices("method")) == set(METHODS)


def test_schedule_follows_the_dataset() -> None:
    config = composed("dataset=cifar100", "schedule.epochs=2")
    schedule = config["schedule"]
    assert (schedule["epochs"], schedule["batch_size"], schedule["lr"]) == (2, 64, 0.05)
    assert schedule["milestones"] == [0.625, 0.75, 0.875]
    assert composed("dataset=cifar100")["schedule"]["epochs"] == 240
    assert composed("dataset=cifar100", "schedule=imagenet")["schedule"]["batch_size"] == 256


def test_scale_chooses_data_and_length() -> None:
    assert composed()["dataset"]["name"] == "scenes"
    paper, fast = composed("scale=paper"), composed("scale=fast")
    assert paper["dataset"]["name"] == fast["dataset"]["name"] == "imagenet"
    assert (paper["schedule"]["epochs"], fast["schedule"]["epochs"]) == (100, 10)
    assert composed("scale=paper", "dataset=cifar100")["dataset"]["name"] == "cifar100"
    assert composed("scale=fast", "schedule.epochs=3")["schedule"]["epochs"] == 3


def test_the_imagenet_recipe_is_the_released_one_of_heo_et_al() -> None:
    schedule = composed("scale=paper")["schedule"]
    wanted = {"epochs": 100, "batch_size": 256, "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    assert {key: schedule[key] for key in wanted} == wanted
    assert [share * 100 for share in schedule["milestones"]] == [30, 60, 90] and schedule["gamma"] == 0.1


def test_sign_does_not_matter() -> None:
    for line in ("seed=3", "+seed=3", "++seed=3"):
        assert composed(line)["seed"] == 3
    for line in ("method=kd", "+method=kd"):
        assert composed(line)["method"]["name"] == "kd"


def test_teacher_may_have_parts_of_its_own() -> None:
    config = composed("teacher=resnet56", "teacher.schedule.epochs=5", "+dataset@teacher.dataset=cifar100")
    assert config["teacher"]["schedule"] == {"epochs": 5}
    assert config["teacher"]["dataset"]["name"] == "cifar100"
    assert composed("network@student.network=resnet8")["student"]["network"]["name"] == "resnet8"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=kd", "method.temprature=3"], ["method.temprature", "'temperature'"]),
        (["method=kd", "+method.temprature=3"], ["method.temprature", "'temperature'"]),
        (["method=kd", "method.temperature=abc"], ["method.temperature=abc", "a number > 0"]),
        (["method=kd", "method.temperature=0"], ["method.temperature=0", "a number > 0"]),
        (["method=kd", "method.temperature=null"], ["method.temperature=null", "a number > 0"]),
        (["method=fitnet", "method.regressor=cnv"], ["method.regressor=cnv", "'conv'"]),
        (["method=hybrid_forward", "method.balance=dynamik"], ["method.balance=dynamik", "'dynamic'"]),
        (["method=hybrid_forward", "method.balance=-0.1"], ["method.balance=-0.1", ">= 0"]),
        (["method=hybrid_forward", "method.switch_at=[1,2]"], ["method.switch_at", "list"]),
        (["method.name=kdd"], ["method.name=kdd", "'kd'"]),
        (["schedule.epochs=2.5"], ["schedule.epochs=2.5", "an integer"]),
        (["schedule.epochs=true"], ["schedule.epochs=true", "an integer"]),
        (["schedule.nesterov=1"], ["schedule.nesterov=1", "true or false"]),
        (["schedule.lr=0"], ["schedule.lr=0", "> 0"]),
        (["schedule.momentum=1"], ["schedule.momentum=1", "< 1"]),
        (["dataset.validation=1.0"], ["dataset.validation=1.0", "< 1"]),
        (["precision=fp16"], ["precision=fp16", "fp32, bf16"]),
        (["wandb.mode=off"], ["wandb.mode"]),
        (["+wandb.projct=x"], ["wandb.projct", "'project'"]),
        (["balance=1"], ["balance", "'method.balance'"]),
        (["metod=kd"], ["metod", "'method'"]),
        (["teacher.schedule.epoch=1"], ["teacher.schedule.epoch", "'epochs'"]),
        (["teacher.schedule.epochs=x"], ["teacher.schedule.epochs=x", "an integer"]),
        (["dataset.folder=/somewhere"], ["dataset.folder=/somewhere", "data_root"]),
        (["student.network.name=resnt20"], ["student.network.name=resnt20", "'resnet20'"]),
        (["~seed"], ["~seed", "deleted"]),
    ],
)
def test_mistakes_are_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        composed(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Literal[2, 4], "one of 2, 4"),
        (Literal["a", True, None, 0.5], "one of a, true, null, 0.5"),
        (Literal[3], "3"),
        (Annotated[int, Ge(1), MultipleOf(8)], "an integer >= 1 and a multiple of 8"),
        (Annotated[float, Interval(ge=0, lt=0.5)], "a number >= 0 and < 0.5"),
        (Annotated[int, Field(gt=3, le=9)] | None, "an integer > 3 and <= 9 or null"),
        (Annotated[str, StringConstraints(pattern="^b", min_length=2)], "a text of length >= 2 and that matches ^b"),
        (Annotated[list[Annotated[int, Ge(1)]], Len(2, 3)], "a list of integer >= 1 of length >= 2 and of length <= 3"),
        (Annotated[list, AfterValidator(sorted)], "a list"),
        (dict[str, int], "a group of keys"),
    ],
)
def test_every_kind_of_key_has_words(kind: Any, words: str) -> None:
    """Also as the annotation of a class's key, which pydantic takes apart."""
    made = create_model("Made", __base__=Settings, key=(kind, ...))
    assert describe(kind) == describe(kinds(made)["key"]) == words


def test_a_missing_key_is_noticed() -> None:
    broken = OmegaConf.create(composed())
    del broken.schedule.gamma
    with pytest.raises(UserError, match=r"schedule\.gamma: missing"):
        plain(broken)


def test_showing_the_config_is_quick_and_needs_no_torch() -> None:
    program = (
        "import sys; from experiments.run import main;"
        "status = main(['--cfg', 'job', 'method=kd', 'teacher=resnet56']);"
        "heavy = {'torch', 'numpy', 'wandb', 'mmengine'} & set(sys.modules); sys.exit(str(heavy) if heavy else status)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "temperature: 4.0" in done.stdout
    assert time.perf_counter() - began < 4.0
