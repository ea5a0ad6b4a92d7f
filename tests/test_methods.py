"""Every registered method trains, resumes to the same bits, leaves its teacher alone, exports and runs under DDP."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kt.methods
from checks import Interrupt, bits, rows, step_each_phase, without_speed
from dense_settings import SETTINGS as DENSE
from kt.data import build_data
from kt.engine import Engine, measured_loop
from kt.errors import UserError
from kt.hooks.records import NonFiniteLossError
from kt.methods import build_method, find_method
from kt.models import build_network
from kt.phase import MAIN, phase_folder
from kt.settings import METHODS as METHOD_SETTINGS
from kt.settings import Dataset, Schedule, accumulates, defaults, fits, kinds
from kt.train import fit
from method_settings import DATASET, SCHEDULE, SETTINGS, make_cell, make_classifier, make_data, make_model

NAMES = sorted(SETTINGS)
TAUGHT = [name for name in NAMES if SETTINGS[name].teacher]


@pytest.fixture(scope="module")
def data() -> Any:
    return make_data()


@pytest.fixture(scope="module")
def trained(data: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains a method once without interruption: `(folder, model, teacher's bits before, initial student bits)`."""
    done: dict[str, Any] = {}

    def train(name: str) -> Any:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            model = make_model(name, data.spec.num_classes)
            before = {key: bits(teacher.state_dict()) for key, teacher in model.teachers.items()}
            start = bits(model.student.network.state_dict())
            metrics = fit(model, data, folder, SCHEDULE)
            done[name] = (folder, model, before, start, metrics)
        return done[name]

    return train


def test_every_registered_method_has_a_setting() -> None:
    dense = {setting.method for setting in DENSE.values()}
    assert set(METHOD_SETTINGS) == {*NAMES} | {name for name in dense if name.startswith("ifvd")}


def test_each_method_is_the_file_of_its_name() -> None:
    """Or one of those that share a file, which the class of settings names."""
    files = {path.stem for path in Path(kt.methods.__file__).parent.glob("*.py")} - {"__init__", "base", "blocks"}
    homes = {name: kind.module or f"kt.methods.{name}" for name, kind in METHOD_SETTINGS.items() if "+" not in name}
    assert {f"kt.methods.{file}" for file in files} == {*homes.values()}
    for name, home in homes.items():
        assert find_method(name).__module__ == home


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str, trained: Any, data: Any) -> None:
    folder, model, _, start, metrics = trained(name)
    after = bits(model.student.network.state_dict())
    changed = {key for key in after if after[key] != start[key]}
    expected = {key for key in after if not re.match(SETTINGS[name].untouched, key)}
    assert changed == expected, f"untouched by training: {sorted(expected - changed)}; touched: {changed - expected}"
    assert tuple(phase.name for phase in model.method.phases()) == SETTINGS[name].phases
    written = rows(folder)
    for phase in model.method.phases():
        steps = [row["step"] for row in written if row["kind"] == "train" and row["phase"] == phase.name]
        train = phase.loaders["train"](data) if "train" in phase.loaders else data.train
        assert steps == list(range(1, phase.steps(SCHEDULE["epochs"] * len(train)) + 1))
    evaluations = [row for row in written if row["kind"] == "eval" and row["phase"] == "train"]
    assert [row["epoch"] for row in evaluations] == [1, 2]
    assert (
        evaluations[-1]["top1"] == metrics["top1"] == json.loads((folder / "evaluations/test.json").read_text())["top1"]
    )
    with np.load(folder / "evaluations/test.npz") as outcomes:
        assert np.array_equal(outcomes["indices"], np.arange(len(outcomes["indices"])))
        for name in ("top1", "top5"):
            assert outcomes[name].dtype == bool and 100 * outcomes[name].mean() == pytest.approx(metrics[name])


@pytest.mark.parametrize("name", NAMES)
def test_resumes_to_the_same_bits(name: str, trained: Any, data: Any, tmp_path: Path) -> None:
    folder, model, *_ = trained(name)
    # One stop after the other, each an epoch and two steps after what was saved.
    for attempt in itertools.count():
        stop = Interrupt(2 + (len(data.train) if attempt else 0))
        with contextlib.suppress(KeyboardInterrupt):
            fit(make_model(name, data.spec.num_classes), data, tmp_path, SCHEDULE, extra_hooks=[stop])
            break
    assert attempt >= SCHEDULE["epochs"]
    assert bits(torch.load(tmp_path / "student.pth")) == bits(torch.load(folder / "student.pth"))
    assert without_speed(tmp_path) == without_speed(folder)


def test_a_finished_run_trains_nothing_again(trained: Any, data: Any) -> None:
    folder, *_ = trained("kd")
    before = without_speed(folder)
    fit(make_model("kd", data.spec.num_classes), data, folder, SCHEDULE, extra_hooks=[Interrupt(1)])
    assert without_speed(folder) == before


@pytest.mark.parametrize("name", TAUGHT)
def test_teacher_is_unchanged_to_the_bit(name: str, trained: Any) -> None:
    _, model, before, *_ = trained(name)
    assert {key: bits(teacher.state_dict()) for key, teacher in model.teachers.items()} == before
    model.train()
    for teacher in model.teachers.values():
        assert not any(module.training for module in teacher.modules())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_exports_a_plain_student(name: str, trained: Any, data: Any) -> None:
    folder, model, *_ = trained(name)
    plain = build_network(SETTINGS[name].student, num_classes=data.spec.num_classes, width=0.25, image_size=32)
    plain.load_state_dict(torch.load(folder / "student.pth", weights_only=True), strict=True)
    batch = next(iter(data.test.epoch(0)))
    model.eval()
    with torch.no_grad():
        expected = model(batch["inputs"])
        found = plain.eval()(model.student.normalise(batch["inputs"]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TAUGHT)
def test_teachers_stay_out_of_the_model_but_follow_it(name: str, data: Any, tmp_path: Path) -> None:
    model = make_model(name, data.spec.num_classes)
    owned = {id(parameter) for parameter in model.parameters()}
    assert not owned & {id(p) for teacher in model.teachers.values() for p in teacher.parameters()}
    assert {key.split(".")[0] for key in model.state_dict()} <= {"student", "method"}
    twin = copy.deepcopy(model).to(torch.float64)
    assert all(p.dtype == torch.float64 for teacher in twin.teachers.values() for p in teacher.parameters())
    assert all(p.dtype == torch.float32 for teacher in model.teachers.values() for p in teacher.parameters())
    batch = next(iter(data.train.epoch(0)))
    engine, before = Engine({**defaults(Schedule), **SCHEDULE}, torch.device("cpu"), tmp_path), bits(model.state_dict())
    loop = measured_loop(twin, twin.method.phases()[-1], batch, engine)
    start = bits(twin.student.state_dict())
    loop.step({**batch, "inputs": batch["inputs"].double()})
    assert bits(twin.student.state_dict()) != start and bits(model.state_dict()) == before


@pytest.fixture(scope="module")
def real(data_root: Path) -> Any:
    config = {**DATASET, "name": "cifar100", "subset": 320}
    data = build_data(config, data_root, batch_size=32, seed=0, device=torch.device("cpu"))
    data.further["source"] = data.train
    data.test.labels = data.test.labels[:100]  # seconds, not minutes
    return data


@pytest.mark.parametrize("name", NAMES)
def test_trains_on_real_images(name: str, real: Any, tmp_path: Path) -> None:
    metrics = fit(make_model(name, 100, real.spec), real, tmp_path, {**SCHEDULE, "batch_size": 32, "epochs": 3})
    losses = [row[SETTINGS[name].falls] for row in rows(tmp_path) if row["kind"] == "train" and row["phase"] == "train"]
    # Ten steps an epoch: the last epoch's mean lies below the first one's.
    assert sum(losses[-10:]) < sum(losses[:10])
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 100


def test_fitnets_own_paper_trains_up_to_the_hint_and_then_by_kd(data: Any) -> None:
    model = make_model("fitnet", data.spec.num_classes, init_fraction=0.25)
    hint, train = model.method.phases()
    assert (hint.fraction, train.fraction) == (0.25, 1.0)
    body = [*model.student.stages[0].parameters(), *model.student.stages[1].parameters()]
    for phase, expected in (
        (hint, [*body, *model.method.regressors.parameters()]),
        (train, model.student.parameters()),
    ):
        found = [parameter for group in phase.trains[MAIN].groups(model) for parameter in group["params"]]
        assert {id(parameter) for parameter in found} == {id(parameter) for parameter in expected}
    batch = next(data.train.epoch(0))
    kd = build_method("kd", model.student, model.teacher, temperature=4.0, alpha=1.0, task_weight=1.0)
    whole = make_model("fitnet", data.spec.num_classes)
    _, terms = whole.method.loss(whole.eval(), batch)
    torch.testing.assert_close(hint.loss(model.eval(), batch)[0], 100 * terms["loss_hint"])
    torch.testing.assert_close(train.loss(model, batch)[0], kd.loss(model, batch)[0])


def test_diverging_training_names_the_step(data: Any, tmp_path: Path) -> None:
    model = make_model("none", data.spec.num_classes)
    with torch.no_grad():
        next(model.student.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="at step 1 of phase 'train'"):
        fit(model, data, tmp_path, SCHEDULE)
    assert not (phase_folder(tmp_path, 0, model.method.phases()[0]) / "checkpoint.pth").exists()


def test_zero_epochs_only_score(data: Any, tmp_path: Path) -> None:
    model = make_model("none", data.spec.num_classes)
    start = bits(model.student.network.state_dict())
    metrics = fit(model, data, tmp_path, {**SCHEDULE, "epochs": 0})
    assert bits(torch.load(tmp_path / "student.pth")) == start
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 100


def test_unknown_methods_and_missing_teachers_are_one_line() -> None:
    student = make_model("none", 4).student
    with pytest.raises(UserError, match=r"method='hybrid'.*did you mean 'hybrid_forward'"):
        build_method("hybrid", student, None)
    with pytest.raises(UserError, match="teacher=none"):
        build_method("kd", student, None)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("kt.methods.kdd", "method=late: there is no module kt.methods.kdd, which `module` of .*Late names"),
        ("kt.methods.kd", "method=late: kt.methods.kd registers no such; expected @METHODS.reg.*.name='late'"),
    ],
)
def test_a_method_that_nothing_registers_is_one_line(module: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHOD_SETTINGS, "late", type("Late", (METHOD_SETTINGS["kd"],), {"module": module}))
    with pytest.raises(UserError, match=words):
        find_method("late")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_with_equal_parameters(name: str, processes: Any) -> None:
    _, (first, second) = processes("method_settings", name)
    assert first[4] == second[4] == ""
    assert first[2] == second[2] != first[1]
    assert first[3] == second[3]


def test_two_processes_remember_what_both_have_seen(processes: Any) -> None:
    folder, answers = processes("method_settings", "crd")
    assert [answer[4] for answer in answers] == ["", ""]
    memories = torch.load(folder / "phases" / "0-train" / "checkpoint.pth")["model"]["method.memories"]
    # A row that one process alone had moved would be a mean of two.
    torch.testing.assert_close(memories.norm(dim=2), torch.ones(memories.shape[:2]))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "fitnet",
            {"regressor": "cnv"},
            "method.regressor=cnv: expected one of conv_bn_relu, conv, none, first .did you mean 'conv'",
        ),
        ("kd", {"temprature": 2.0}, "method.temprature: unknown key for method kd .did you mean 'temperature'"),
        ("kd", {"alpha": -1}, "method.alpha=-1: expected a number >= 0"),
        ("kd", {"alpha": True}, "method.alpha=true: expected a number >= 0"),
        ("kcd", {"solo_offset": 1}, "method.solo_offset: unknown key"),
        ("kcd", {"base": {"name": "at", "weight": -1.0}, "beside": {}}, "method.weight=-1.0: expected a number >= 0"),
    ],
)
def test_python_users_get_the_checks_of_the_command_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_model(name, 10, **options)


def accepted(kind: type) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor, with those of its base's where it hands everything on."""
    own = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    named = {key: each for key, each in own.items() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return named if len(named) == len(own) else {**accepted(kind.__mro__[1]), **named}


def test_every_constructor_takes_exactly_its_settings() -> None:
    for name, schema in METHOD_SETTINGS.items():
        wanted = {key for key in kinds(schema) if key != "name" and key not in schema.cell_keys}
        handed = ("self", "student", "teacher", "data", "files")
        parameters = {key: each for key, each in accepted(find_method(name)).items() if key not in handed}
        assert {*parameters} == wanted, name
        # Every default has one place.
        assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values()), name


def test_what_is_no_pair_of_networks_is_one_line() -> None:
    student = make_classifier("resnet20", 10, seed=1)
    with pytest.raises(UserError, match="^teacher=none: kd needs a teacher"):
        build_method("kd", student)
    with pytest.raises(UserError, match=f"^student={type(student.network).__name__}: expected a network with its norm"):
        build_method("none", student.network)
    with pytest.raises(UserError, match="^teacher=str: expected a network with its normalisation"):
        build_method("kd", student, "resnet56")


def test_every_key_says_what_it_means_and_has_a_valid_default() -> None:
    for schema in {*METHOD_SETTINGS.values(), Dataset, Schedule}:
        assert schema.__doc__
        for key, default in defaults(schema).items():
            assert default is None or fits(default, schema, key), (schema, key)
    for schema in METHOD_SETTINGS.values():
        assert all(field.description for key, field in schema.model_fields.items() if key != "name"), schema


@pytest.mark.parametrize("name", ["none, dropout", "fitnet", "ab", "kd_fixed_feature", "ofd"])
def test_two_processes_update_as_one_that_accumulates(name: str, processes: Any, tmp_path: Path) -> None:
    name += ", one update"
    folder, answers = processes("method_settings", name)
    assert [answer[4] for answer in answers] == ["", ""]
    model, data, schedule = make_cell(name, 0, 1)
    assert (data.train.passes, len(data.train)) == (4, 16)
    fit(model, data, tmp_path, schedule)
    for path in sorted((tmp_path / "phases").glob("*/checkpoint.pth")):
        one, two = (torch.load(each / path.relative_to(tmp_path))["model"] for each in (tmp_path, folder))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-6, msg=f"{path} {key}")


def test_accumulating_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data = make_data(device_batch=4)
    for folder, stops in (("whole", ()), ("stopped", (Interrupt(2), Interrupt(5)))):
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                fit(make_model("kd", 10), data, tmp_path / folder, SCHEDULE, extra_hooks=[stop])
        fit(make_model("kd", 10), data, tmp_path / folder, SCHEDULE)
    whole, stopped = (torch.load(tmp_path / folder / "student.pth") for folder in ("whole", "stopped"))
    assert bits(whole) == bits(stopped) and without_speed(tmp_path / "whole") == without_speed(tmp_path / "stopped")


@pytest.mark.parametrize(
    ("means", "method"),
    [
        (True, {"name": "none"}),
        (True, {"name": "kd_fixed_feature"}),
        (True, {"name": "hybrid_forward", "balance": 0.5}),
        (False, {"name": "hybrid_forward", "balance": "dynamic"}),
        (False, {"name": "rkd"}),
        (True, {"name": "kcd"}),
        (True, {"name": "kcd+ab", "base": {"margin": 2.0}}),
        (False, {"name": "kcd+rkd"}),
        (False, {"name": "kcd", "base": {"name": "rkd"}}),
        (False, {"name": "kcd", "strategy": "subnet_fc"}),
        (False, {"name": "of_a_notebook"}),
    ],
)
def test_whose_losses_are_means_over_images(means: bool, method: dict[str, Any]) -> None:
    assert accumulates(method) is means


@pytest.mark.parametrize("name", [name for name in NAMES if not accumulates({"name": name, **SETTINGS[name].options})])
def test_who_needs_the_whole_batch_refuses_to_accumulate(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^schedule\.device_batch: an update would take 4 passes, .*; expected null"):
        fit(make_model(name, 10), make_data(device_batch=4), tmp_path, SCHEDULE)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("kd", {}, "method=kd"),
        ("fitnet", {"init_fraction": 0.5}, "method=kd"),
        ("ab", {"after": "kd"}, "method.after=kd"),
    ],
)
def test_soft_targets_are_of_the_students_classes(name: str, options: dict[str, Any], key: str) -> None:
    student, teacher = make_classifier("resnet8", 10, 0), make_classifier("resnet8", 12, 0)
    with pytest.raises(UserError, match=f"^{key}: the teacher knows 12 classes, the student 10; soft targets need"):
        build_method(name, student, teacher, **options)


def test_relations_are_between_two_images(data: Any, tmp_path: Path) -> None:
    batch = {key: value[:1] for key, value in next(iter(data.train.epoch(0))).items()}
    with pytest.raises(UserError, match="^schedule.batch_size: method=rkd compares the images of a pass; expected two"):
        step_each_phase(make_model("rkd", data.spec.num_classes), batch, tmp_path)
