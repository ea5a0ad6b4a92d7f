"""Compiled passes: the same numbers up to rounding with every method, and what `auto` decides."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

import kt.compiling
import kt.engine
import method_settings
from checks import Interrupt, bits, rows, step_each_phase, two_processes, without_speed
from kt.compiling import TIMED, WARM, Compiler, compiling, repays, run_steps
from kt.errors import UserError
from kt.train import fit, phase_records

pytestmark = pytest.mark.skipif(torch.__version__ < kt.compiling.OLDEST, reason="nothing is compiled by this torch")
torch.set_num_threads(1)

CPU = torch.device("cpu")


class Traced(Compiler):
    """What Inductor would compile is traced with its gradients, which takes no compiler, and runs as it is."""

    calls = 0

    def __init__(self, choice: bool | str, device: torch.device = CPU, graphs: bool = False):
        super().__init__(choice, device, graphs, backend="aot_eager")

    def _compiled(self, name: str) -> Any:
        function = super()._compiled(name)

        def counted(*arguments: Any) -> Any:
            Traced.calls += 1
            return function(*arguments)

        return counted


def make_cell(name: str, rank: int, world: int) -> Any:
    """For `checks.two_processes`: a setting that is compiled whatever is asked for."""
    setting, _, how = name.partition(", ")
    kt.engine.Compiler = (lambda *others: Traced(True)) if how else Compiler  # type: ignore[misc, assignment]
    return method_settings.make_cell(setting, rank, world)


@pytest.fixture(scope="module")
def batch() -> Any:
    return next(method_settings.make_data().train.epoch(0))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kt.engine, "Compiler", Traced)
    monkeypatch.setattr(Traced, "calls", 0)


@pytest.mark.parametrize("name", method_settings.SETTINGS)
@pytest.mark.usefixtures("traced")
def test_a_step_of_every_method_is_the_same(name: str, batch: Any, tmp_path: Path) -> None:
    model = method_settings.make_model(name, 10)
    plain = step_each_phase(copy.deepcopy(model), batch, tmp_path)
    assert Traced.calls == 0
    compiled = step_each_phase(model, batch, tmp_path, compile=True)
    assert Traced.calls > 0
    assert {*plain} == {*compiled}
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


@pytest.mark.usefixtures("traced")
def test_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data, schedule = method_settings.make_data(), method_settings.SCHEDULE

    def train(folder: Path, *hooks: Any) -> None:
        fit(method_settings.make_model("kd", 10), data, folder, schedule, compile=True, extra_hooks=hooks)

    train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halves", Interrupt(len(data.train) + 1))
    train(tmp_path / "halves")
    whole, halves = (tmp_path / name for name in ("whole", "halves"))
    assert bits(torch.load(halves / "student.pth")) == bits(torch.load(whole / "student.pth"))
    assert without_speed(halves) == without_speed(whole)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from two_processes(tmp_path_factory.mktemp("processes"))


def test_two_processes_train_the_same(processes: Any) -> None:
    left = []
    for name in ("fitnet, compiled", "fitnet"):
        folder, (first, second) = processes("test_compiling", name)
        assert first[4] == second[4] == ""
        assert first[2] == second[2] != first[1]
        left.append(torch.load(folder / "student.pth"))
    for key, value in left[1].items():
        torch.testing.assert_close(left[0][key], value, rtol=1e-3, atol=1e-4)


class Doubled(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize(
    ("shapes", "hook", "calls"),
    [
        ([(4, 2), (4, 2)], False, 4),  # a block, and a row of layers
        ([(4, 2), (3, 2), (4, 2)], False, 4),
        ([(4, 2)], True, 1),
    ],
)
@pytest.mark.usefixtures("traced")
def test_only_what_can_be_is_compiled(shapes: list[tuple[int, ...]], hook: bool, calls: int) -> None:
    block, seen = Doubled(), list[Any]()
    steps = [nn.Sequential(block), lambda x: x + 1, nn.Linear(2, 2), nn.ReLU(), lambda x: x - 1, nn.Tanh()]
    if hook:
        block.layer.register_forward_hook(lambda *_: seen.append(1))
    compiler = Traced(True)
    for shape in shapes:
        x = torch.rand(shape)
        with compiler.step(1):
            found = run_steps(steps, x)
            with compiling(None):
                torch.testing.assert_close(found, run_steps(steps, x))
    assert Traced.calls == calls
    assert len(seen) == 2 * hook


@pytest.mark.usefixtures("traced")
def test_a_row_that_comes_again_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kt.compiling, "_functions", {})
    with Traced(True).step(1):
        for last in (nn.ReLU(), nn.Tanh(), nn.ReLU()):
            run_steps([nn.Sequential(nn.Linear(2, 2), last)], torch.rand(4, 2))
    assert len(kt.compiling._functions) == 2


@pytest.mark.usefixtures("traced")
def test_a_mistake_in_a_step_is_told_as_it_is() -> None:
    steps = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]
    with Traced(True).step(1), pytest.raises(ValueError, match="^Expected more than 1 value per channel"):
        run_steps(steps, torch.rand(1, 3, 3, 3))


def test_it_repays() -> None:
    assert repays(1.0, 0.75, 24.0, 100)
    assert not repays(1.0, 0.75, 25.0, 100)
    assert not repays(0.75, 1.0, 0.0, 100)
    assert not repays(1.0, 0.75, 0.0, 0)


@pytest.mark.parametrize(
    ("compiled", "left", "steps", "chosen"),
    [(0.5, 100, 16, True), (0.9, 100, 16, True), (1.1, 100, 16, False), (0.5, 40, 8, False)],
)
def test_auto_keeps_what_is_faster_where_the_run_is_long(
    compiled: float, left: int, steps: int, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second, or `compiled`; compiling three more seconds in each of the first three."""
    compiler, now, done = Traced("auto"), 0.0, list[bool]()
    monkeypatch.setattr(kt.compiling, "seconds", lambda device: now)
    for number in range(2 * steps):
        with compiler.step(steps + left - number):
            done.append(kt.compiling._current.get() is not None)
            now += (compiled + 3 * (sum(done) <= WARM)) if done[-1] else 1.0
    tried = WARM + TIMED
    assert done == [False] * tried + [True] * (steps - tried) + [chosen] * steps
    found = compiler.found
    assert found is not None and (found["compiled"], found["steps"]) == (chosen, steps)
    assert found["eager_ms"] == 1000
    if steps > tried:
        assert found["compiled_ms"] == pytest.approx(1000 * compiled)
        assert found["seconds"] == pytest.approx(9)
        assert found["repaid"] == ((1 - compiled) * left > 9)


class Seen(Hook):
    """Sees the compiler of a run."""

    def after_train(self, runner: Any) -> None:
        self.compiler = runner.train_loop.compiler


@pytest.mark.usefixtures("traced")
def test_what_auto_has_found_is_told_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes does not try again, whatever it would find."""
    data, schedule = method_settings.make_data(), {**method_settings.SCHEDULE, "epochs": 3}
    monkeypatch.setattr(kt.compiling, "WARM", 1)
    monkeypatch.setattr(kt.compiling, "TIMED", 1)
    monkeypatch.setattr(kt.compiling, "LEAST", 0.0)

    def train(*hooks: Any) -> None:
        fit(method_settings.make_model("kd", 10), data, tmp_path, schedule, compile="auto", extra_hooks=hooks)

    assert len(data.train) == 4
    with pytest.raises(KeyboardInterrupt):
        train(Interrupt(5))
    (told,) = (row for row in rows(tmp_path) if row["kind"] == "compile")
    assert told["steps"] == 4 and told["epoch"] == 1
    resumed = Seen()
    train(resumed)
    assert resumed.compiler._seconds == [] and resumed.compiler.choice == told["compiled"]
    assert [row for row in rows(tmp_path) if row["kind"] == "compile"] == [told]
    (phase,) = phase_records(tmp_path, 16)
    assert phase["compile"] == {key: told[key] for key in told if key not in ("kind", "phase", "step", "epoch")}


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kt.compiling, "_faults", {})
    compiler = Compiler("auto", CPU)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(UserError, match=r"compile=true: nothing can be compiled on .* \(.*no-such-compiler"):
            Compiler(True, CPU)
        for _ in range(WARM + TIMED):
            with compiler.step(10**9):
                time.sleep(0.001)
    assert compiler.choice is False and compiler.found is not None and "no-such-compiler" in compiler.found["why"]


def test_what_cannot_be_compiled_runs_as_it_is_under_auto() -> None:
    tried = []

    def refuse(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no such instruction")

    torch.manual_seed(0)
    x, plain = torch.rand(4, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    twin, compiler = copy.deepcopy(plain), Compiler("auto", CPU, backend=refuse)
    for _ in range(2 * (WARM + TIMED)):
        with compiler.step(10**9):
            torch.testing.assert_close(run_steps(twin, x), plain(x), rtol=0, atol=0)
            time.sleep(0.001)
    assert bits(twin.state_dict()) == bits(plain.state_dict()) and len(tried) == 1
    assert compiler.choice is False and compiler.found is not None and compiler.found["why"] == "no such instruction"
    with (
        pytest.raises(RuntimeError, match="no such instruction"),
        (asked := Compiler(True, CPU, backend=refuse)).step(1),
    ):
        run_steps(twin, x)
    assert asked.choice is True


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kt.compiling, "OLDEST", "99.0")
    with pytest.raises(UserError, match=r"^compile=true: .* \(torch .*\); expected torch 99.0 or newer"):
        Traced(True)
    compiler = Traced("auto")
    for _ in range(WARM + TIMED):
        with compiler.step(10**9):
            time.sleep(0.001)
    assert compiler.choice is False and compiler.found is not None and "torch" in compiler.found["why"]


def test_checkpointing_is_refused(tmp_path: Path) -> None:
    model = method_settings.make_model("none", 10)
    with pytest.raises(UserError, match="compile=auto: expected false with activation_checkpointing=true"):
        fit(model, method_settings.make_data(), tmp_path, {"epochs": 1}, compile="auto", activation_checkpointing=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (apt-get install g++)")
def test_inductor_computes_the_same() -> None:
    """Losses and statistics of five steps with dropout, whose random numbers are the same ones, and kept graphs."""
    torch.manual_seed(0)
    x = torch.rand(8, 3, 8, 8)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
    twin = copy.deepcopy(plain)

    def train(network: nn.Sequential, compiler: Compiler) -> list[float]:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        losses = []
        for _ in range(5):
            with compiler.step(1):
                loss = run_steps(network, x).square().mean()
                optimizer.zero_grad()
                torch.autograd.grad(loss, [*network.parameters()], retain_graph=True)
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
        return losses

    expected, found = train(plain, Compiler(False, CPU)), train(twin, Compiler(True, CPU))
    assert found == pytest.approx(expected, rel=1e-3)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-3, atol=1e-5)
