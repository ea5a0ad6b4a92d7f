"""The engine: several optimizers, further loaders and steps of their own, killed, resumed and on several processes."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from torch import Tensor, nn

from checks import bits, rows, without_speed
from kt.classifier import Classifier
from kt.data import Data, DataSpec, build_data
from kt.data.loaders import Loader
from kt.engine import Engine, PhaseLoop, measured_loop, seed_everything
from kt.errors import UserError
from kt.functional import hint
from kt.methods.base import METHODS, Method, build_method
from kt.models import build_network
from kt.pages import keep_pages
from kt.phase import Batch, Loop, Phase, Trained, only, student_alone
from kt.settings import Schedule, defaults
from kt.stages import Head, Piece, Stage, head_of, stages_of
from kt.train import best_metrics, fit
from kt.transfer import TransferModel
from method_settings import DATASET, make_model

BATCH = 8
SCHEDULE = {"epochs": 3, "batch_size": BATCH, "lr": 0.05, "policy": "cosine", "clip_grad": 1.0, "milestones": []}
HELD_OUT = 48  # from this image on


class Plain(nn.Module):
    """Two convolutions and a classifier, without normalisation."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))


@stages_of.register
def _(network: Plain) -> list[Stage]:
    widths = (network.first.out_channels, network.second.out_channels)
    parts = ((network.first, nn.ReLU()), (network.second, nn.ReLU()))
    return [Stage(f"stage{i + 1}", 2 << i, widths[i], parts[i]) for i in range(2)]


@head_of.register
def _(network: Plain) -> Head:
    return Head((Piece(lambda x: x.mean((2, 3))),), (), network.fc)


class Part:
    """A stretch of a training set as a set of its own, which draws from the global random state when it is opened."""

    def __init__(self, loader: Any, first: int, last: int | None, batch_size: int):
        self.loader = copy.copy(loader)
        for name in ("images", "labels", "indices"):
            setattr(self.loader, name, getattr(loader, name)[first:last])
        self.loader.batch_size = self.batch_size = batch_size
        self.passes = loader.passes

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, first: int = 0) -> Any:
        torch.rand(())  # as torch's DataLoader does
        yield from self.loader.epoch(epoch, first)

    def plain(self, by_class: bool = False) -> Loader:
        return self.loader.plain(by_class)


def training_part(data: Data) -> Loader:
    return Part(data.train, 0, HELD_OUT, data.train.batch_size)


def held_out(data: Data) -> Loader:
    """Other images in other batches, so that its turns end in the midst of epochs."""
    return Part(data.train, HELD_OUT, None, data.train.batch_size * 3 // 4)


class Auxiliary(Method):
    """A regressor of the teacher's map learns on held-out images, then the student by its task and the regressor.

    Args:
        student: The student.
        teacher: The teacher.
        noise: Of the regressor's targets, from the global random state.
    """

    def __init__(self, student: Any, teacher: Any, noise: float = 0.0):
        super().__init__(student, teacher)
        self.noise = noise
        self.regressor = nn.Conv2d(student.stages[-1].channels, teacher.stages[-1].channels, 1)
        # A batch with the very last image asks for `rare`; nothing ever asks for `spare`.
        self.rare, self.spare = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def phases(self) -> list[Phase]:
        trains = {
            "main": Trained(student_alone),
            "aux": Trained(self._own, {"optimizer": "adamw", "lr": 0.002, "policy": "constant"}),
        }
        loaders = {"train": training_part, "held_out": held_out}
        return [Phase("train", step=self.step, trains=trains, loaders=loaders)]

    def _own(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*self.regressor.parameters()]}, {"params": [self.rare, self.spare], "lr_factor": 2.0}]

    def mismatch(self, model: TransferModel, batch: Batch, levels: list[Tensor]) -> Tensor:
        target = model.teacher.extract(batch["inputs"])[-1]
        if self.noise:
            target = target + self.noise * torch.randn_like(target)
        return hint(self.regressor(levels[-1]), target)

    def step(self, loop: Loop, batch: Batch) -> dict[str, Tensor | float]:
        for _ in range(1 + batch["step"] % 2):
            other = loop.next("held_out")
            assert (other["step"], other["total"]) == (loop.iter, loop.max_iters)
            with torch.no_grad():
                levels = loop.model.student.extract(other["inputs"])
            loss = self.mismatch(loop.model, other, levels)
            last = other["indices"] == DATASET["train_size"] - 1
            if last.any():
                loss = loss + self.rare**2 * last.float().mean()
            loop.update("aux", loss)
        levels = loop.model.student.extract(batch["inputs"])
        output = loop.model.student.task(levels, batch)
        match = self.mismatch(loop.model, batch, levels)
        loop.update("main", output.loss + match)
        logged: dict[str, Tensor | float] = {
            "loss": output.loss,
            "loss_match": match,
            "progress": batch["step"] / batch["total"],
        }
        return {**logged, "loss_aux": loss} if batch["step"] % 2 else logged


def make_pair(noise: float = 0.0, seed: int = 0) -> TransferModel:
    seed_everything(seed)
    norm = ((0.5,) * 3, (0.25,) * 3)
    student, teacher = (Classifier(Plain(width, 10), norm) for width in (4, 6))
    return TransferModel(student, Auxiliary(student, teacher, noise), {"teacher": teacher})


def make_cell(name: str, rank: int = 0, world: int = 1) -> tuple[TransferModel, Data, dict[str, Any]]:
    """The pair on one of several processes that together take `BATCH` images a step; only the first has its weights."""
    dataset = {**DATASET, "augmentation": "none"}
    device = torch.device("cpu")
    data = build_data(dataset, ".", batch_size=BATCH, seed=0, device=device, rank=rank, world=world)
    model, teacher = make_pair(noise=1.0 if name == "noisy" else 0.0, seed=rank), make_pair().teacher
    model.teacher.load_state_dict(teacher.state_dict())  # nobody sends a teacher around
    return model, data, SCHEDULE


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "phases" / "0-train" / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, TransferModel]]:
    """A cell trained without interruption: its folder and the model."""
    done: dict[str, tuple[Path, TransferModel]] = {}

    def train(name: str) -> tuple[Path, TransferModel]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            model, data, schedule = make_cell(name)
            fit(model, data, folder, schedule)
            done[name] = folder, model
        return done[name]

    return train


def test_all_optimizers_are_scheduled_logged_and_saved_alike(whole: Any) -> None:
    folder, model = whole("still")
    written = [row for row in rows(folder) if row["kind"] == "train"]
    steps = 3 * HELD_OUT // BATCH
    assert [row["step"] for row in written] == list(range(1, steps + 1))
    assert [row["progress"] for row in written] == pytest.approx([step / steps for step in range(steps)])
    assert written[0]["lr"] == 0.05 and written[-1]["lr"] < 0.001
    assert {row["lr_aux"] for row in written} == {0.004}
    assert [("loss_aux" in row) for row in written] == [bool(step % 2) for step in range(steps)]
    for name in ("loss", "loss_match"):
        assert sum(row[name] for row in written[-6:]) < sum(row[name] for row in written[:6])
    state = checkpoint(folder)
    assert list(state["optimizers"]) == ["main", "aux"] and state["drawn"] == {"held_out": steps + steps // 2}
    assert all(len(one["state"]) == count for one, count in zip(state["optimizers"].values(), (6, 3), strict=True))
    start = make_pair()
    assert model.method.spare == start.method.spare and model.method.rare != start.method.rare


class Remembering(Method):
    """Keeps each image's last loss in a buffer as long as its data are."""

    def __init__(self, student: Any, teacher: Any, data: DataSpec):
        super().__init__(student, teacher)
        assert data.largest_index is not None
        self.register_buffer("memory", torch.zeros(data.largest_index + 1))

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = model.student.task(model.student.extract(batch["inputs"]), batch)
        self.memory[batch["indices"]] += output.loss.detach()  # type: ignore[index, operator]
        return output.loss + 0.1 * self.memory[batch["indices"]].mean(), {}  # type: ignore[index, union-attr]


class Stop(Hook):
    """Ends a training after its first epoch."""

    priority = "LOWEST"

    def after_train_epoch(self, runner: Any) -> None:
        raise KeyboardInterrupt


def test_a_buffer_of_the_size_of_the_data_is_saved_and_resumed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(METHODS.module_dict, "remembering", Remembering)
    dataset = {**DATASET, "subset": 24}
    data = build_data(dataset, ".", batch_size=BATCH, seed=0, device=torch.device("cpu"))
    indices = torch.cat([batch["indices"] for batch in data.train.plain().epoch(0)])
    assert data.spec.largest_index == indices.max() > data.spec.train_size

    def train(name: str, *hooks: Hook) -> Tensor:
        pair = make_pair()
        method = build_method("remembering", pair.student, pair.teacher, data=data.spec)
        model = TransferModel(pair.student, method, pair.teachers)
        fit(model, data, tmp_path / name, SCHEDULE, extra_hooks=hooks)
        return method.memory  # type: ignore[return-value]

    with pytest.raises(KeyboardInterrupt):
        train("stopped", Stop())
    memory = train("whole")
    assert torch.equal(train("stopped"), memory)
    assert set(memory.nonzero().flatten().tolist()) == set(indices.tolist())


class Kill(Hook):
    """Ends its process for good at a step of an epoch."""

    priority = "VERY_LOW"

    def __init__(self, epoch: int, index: int):
        self.at = (epoch, index)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loop = runner.train_loop
        if (loop.epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_until_killed(folder: Path, epoch: int, index: int) -> None:
    torch.set_num_threads(1)
    model, data, schedule = make_cell("noisy")
    fit(model, data, folder, schedule, extra_hooks=[Kill(epoch, index)])


def test_resumes_to_the_same_bits_after_sigkill(whole: Any, tmp_path: Path) -> None:
    folder, _ = whole("noisy")
    for epoch, index in ((1, 2), (2, 4)):
        process = multiprocessing.get_context("spawn").Process(
            target=_train_until_killed, args=(tmp_path, epoch, index)
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "student.pth").exists()
    model, data, schedule = make_cell("noisy")
    fit(model, data, tmp_path, schedule)
    assert bits(torch.load(tmp_path / "student.pth")) == bits(torch.load(folder / "student.pth"))
    assert without_speed(tmp_path) == without_speed(folder)
    found, expected = checkpoint(tmp_path), checkpoint(folder)
    assert bits(found["model"]) == bits(expected["model"]) and found["drawn"] == expected["drawn"]
    for name, optimizer in expected["optimizers"].items():
        assert found["optimizers"][name]["param_groups"] == optimizer["param_groups"]
        for number, kept in optimizer["state"].items():
            assert bits(found["optimizers"][name]["state"][number]) == bits(kept)


def test_two_processes_do_what_one_does_with_the_same_images(whole: Any, processes: Any) -> None:
    folder, ((_, start, first, scores, error), (_, other, second, other_scores, other_error)) = processes(
        __name__, "still"
    )
    assert error == other_error == ""
    assert start != other and first == second and scores == other_scores
    found, expected = checkpoint(folder), checkpoint(whole("still")[0])
    assert found["drawn"] == expected["drawn"]
    before = make_pair().state_dict()
    moved = {key for key, value in expected["model"].items() if not torch.equal(value, before[key])}
    assert moved == set(before) - {"method.spare"}
    for key, value in expected["model"].items():
        torch.testing.assert_close(found["model"][key], value, rtol=0, atol=1e-6)
    assert found["model"]["method.spare"] == before["method.spare"]


@pytest.fixture
def loop(tmp_path: Path) -> PhaseLoop:
    """The loop of the phase with a step, before it."""
    model, data, schedule = make_cell("still")
    engine = Engine({**defaults(Schedule), **schedule}, torch.device("cpu"), tmp_path)
    return measured_loop(model, model.method.phases()[-1], next(data.train.epoch(0)), engine)


def both(loop: PhaseLoop) -> Tensor:
    """A loss of the student's and the regressor's parameters."""
    batch = loop.next("held_out")
    return loop.model.method.mismatch(loop.model, batch, loop.model.student.extract(batch["inputs"]))


def changes(loop: PhaseLoop, action: Callable[[], Any]) -> set[str]:
    """The parts of the model in which something changes."""
    before = bits(loop.model.state_dict())
    action()
    after = bits(loop.model.state_dict())
    assert all(parameter.grad is None for parameter in loop.model.parameters())
    return {".".join(key.split(".")[:2]) for key in before if before[key] != after[key]}


def test_an_update_changes_its_own_parameters_alone(loop: PhaseLoop) -> None:
    assert isinstance(loop.model, TransferModel)
    assert changes(loop, lambda: loop.update("aux", both(loop))) == {"method.regressor"}
    assert changes(loop, lambda: loop.update("main", both(loop))) == {"student.network"}
    assert changes(loop, lambda: loop.step(loop.loaders["train"].batch)) == {"method.regressor", "student.network"}


def test_a_kept_graph_serves_another_update(loop: PhaseLoop) -> None:
    loss = both(loop)
    assert changes(loop, lambda: loop.update("main", loss, keep=True)) == {"student.network"}
    assert changes(loop, lambda: loop.update("aux", loss)) == {"method.regressor"}
    with pytest.raises(RuntimeError, match="second time"):
        loop.update("aux", loss)


def test_given_gradients_are_those_of_a_loss(loop: PhaseLoop) -> None:
    twin = copy.deepcopy(loop.model.state_dict())
    loss = 1000 * both(loop)  # more than is clipped
    grads = torch.autograd.grad(loss, loop.parameters("main"), retain_graph=True, allow_unused=True)
    kept = [None if grad is None else grad.clone() for grad in grads]
    # The classifier takes no part in this loss, and clipping leaves what it was given alone.
    assert [grad is None for grad in grads] == [False] * 4 + [True] * 2
    loop.update("main", grads=grads)
    assert all(a is b or torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    given = bits(loop.model.state_dict())
    loop.model.load_state_dict(twin)
    loop.optimizers["main"].optimizer.state.clear()
    loop.update("main", 1000 * both(loop))
    assert bits(loop.model.state_dict()) == given


def test_an_update_is_torchs_own_step(loop: PhaseLoop) -> None:
    """Also where a parameter has its first gradient later than others, and gradients lie otherwise than parameters."""
    model = copy.deepcopy(loop.model)
    parameters = [*model.student.parameters()]
    reference = torch.optim.SGD(parameters, 0.05, 0.9, weight_decay=5e-4, fused=False)
    for number in range(3):
        batch = loop.next("held_out")
        for taught in (loop.model, model):
            levels = taught.student.extract(batch["inputs"])
            loss = taught.method.mismatch(taught, batch, levels)
            if number:
                loss = loss + taught.student.task(levels, batch).loss
            if taught is loop.model:
                loop.update("main", loss)
        reference.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        reference.step()
    for (key, value), expected in zip(loop.model.student.named_parameters(), parameters, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=key)


def test_mixed_precision_sees_every_update(tmp_path: Path) -> None:
    model, data, schedule = make_cell("still")
    losses = []

    def step(loop: Loop, batch: Batch) -> dict[str, float]:
        with torch.no_grad():
            assert loop.model.student.extract(batch["inputs"])[-1].dtype == torch.bfloat16
        for _ in range(2):
            loss = loop.model.student.task(loop.model.student.extract(batch["inputs"]), batch).loss
            losses.append(loss.item())
            loop.update("main", loss)
        return {}

    start = bits(model.student.state_dict())
    model.method.phases = lambda: [Phase("train", step=step, trains=only(student_alone))]
    schedule = {**schedule, "lr": 1.0, "clip_grad": None, "iterations": 1, "interval": 1}
    fit(model, data, tmp_path, schedule, precision="bf16")
    after = bits(model.student.state_dict())
    assert losses[0] != losses[1] and all(after[key] != start[key] for key in start)


def test_wrong_names_and_arguments_are_one_clear_line(loop: PhaseLoop) -> None:
    with pytest.raises(ValueError, match=r"^phase 'train' has no further loader 'train'; it has: held_out$"):
        loop.next("train")
    wrong = r"^phase 'train' has no optimizer 'auxx'; it has: main, aux \(did you mean 'aux'\?\)$"
    with pytest.raises(ValueError, match=wrong):
        loop.update("auxx", both(loop))
    with pytest.raises(ValueError, match=r"^update\('aux'\): expected either a loss or gradients$"):
        loop.update("aux")
    with pytest.raises(ValueError, match=r"^update\('aux'\): 1 gradients for 4 parameters$"):
        loop.update("aux", grads=[None])


def test_a_phase_says_what_it_is(tmp_path: Path) -> None:
    def loss(model: Any, batch: Batch) -> Any:
        raise AssertionError

    two = {"main": Trained(student_alone), "other": Trained(student_alone)}
    with pytest.raises(ValueError, match="either a loss or a step"):
        Phase("train")
    with pytest.raises(ValueError, match="either a loss or a step"):
        Phase("train", loss, step=loss)
    with pytest.raises(ValueError, match="with several optimizers give a step"):
        Phase("train", loss, trains=two)
    with pytest.raises(ValueError, match="an optimizer has no 'epochs' of its own; expected one of optimizer, lr"):
        only(student_alone, epochs=3)
    with pytest.raises(ValueError, match=r"schedule\.policy=cosin: expected one of step, .*did you mean 'cosine'"):
        Trained(schedule={"policy": "cosin"})
    model, data, schedule = make_cell("still")
    model.method.phases = lambda: [Phase("train", step=loss, trains=two)]
    with pytest.raises(ValueError, match=r"student\.network\.first\.weight is trained by both 'main' and 'other'"):
        fit(model, data, tmp_path, schedule)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lrr": 3}, r"^schedule\.lrr: unknown key .*'lr'"),
        ({"epochs": -1}, r"^schedule\.epochs=-1: expected an integer >= 0"),
        ({"evaluate_every": 0}, r"^schedule\.evaluate_every=0: expected an integer >= 1"),
    ],
)
def test_a_schedule_is_checked(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, data, schedule = make_cell("still")
    with pytest.raises(UserError, match=words):
        fit(model, data, tmp_path, {**schedule, **changes})


def test_who_needs_a_loss_says_so(tmp_path: Path) -> None:
    model, data, schedule = make_cell("still")
    data.train.passes = 2
    with pytest.raises(UserError, match=r"^schedule\.device_batch: .* 2 passes, and the method's update is not their"):
        fit(model, data, tmp_path, schedule)
    data.train.passes = 1
    around = make_model("kcd", 10).method
    around.base.phases = model.method.phases
    with pytest.raises(UserError, match=r"^method\.base: its phase 'train' has no loss"):
        around.phases()
    model.phase = model.method.phases()[-1]
    with pytest.raises(RuntimeError, match="no phase with a loss entered"):
        model(**next(data.train.epoch(0)), mode="loss")


class Strange(nn.Module):
    """A network's normalisation that is run three times a pass, and has statistics that stay fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.cumulative = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)
        self.fixed = nn.BatchNorm2d(4)
        nn.init.uniform_(self.fixed.running_mean, generator=torch.Generator().manual_seed(0))

    def loss(self, batch: Batch) -> Tensor:
        x = self.conv(batch["inputs"].double())
        for _ in range(3):
            x = self.norm(x).relu()
        x = self.fixed.eval()(self.cumulative(x))
        return F.cross_entropy(x.mean((2, 3)), batch["labels"] % 4)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_an_update_is_the_mean_over_its_passes(clip: float | None, tmp_path: Path) -> None:
    """Gradients, clipped once, and running statistics, against copies of the network that see one pass each."""
    model, _, schedule = make_cell("still")
    dataset, strange = {**DATASET, "augmentation": "none"}, Strange().double()
    shared: dict[str, Any] = {"seed": 0, "device": torch.device("cpu")}
    data = build_data(dataset, ".", batch_size=12, device_batch=4, **shared)
    model.method.strange, model.method.accumulates = strange, True
    model.trainable = {name for name, _ in model.named_parameters()}
    phase = Phase("train", lambda model, batch: (strange.loss(batch), {}), trains=only(lambda _: [{"params": own}]))
    own, start = [*strange.parameters()], copy.deepcopy(strange)
    model.method.phases = lambda: [phase]
    fit(model, data, tmp_path, {**schedule, "epochs": None, "iterations": 1, "clip_grad": clip, "policy": "constant"})
    (whole,) = itertools.islice(build_data(dataset, ".", batch_size=12, **shared).train.epoch(0), 1)
    copies = [copy.deepcopy(start) for _ in range(3)]
    for number, each in enumerate(copies):
        each.loss({key: value[4 * number : 4 * number + 4] for key, value in whole.items()}).backward()
    optimizer = torch.optim.SGD(start.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for parameter, *found in zip(start.parameters(), *(each.parameters() for each in copies), strict=True):
        gradients = [each.grad for each in found if each.grad is not None]
        parameter.grad = torch.stack(gradients).mean(0) if gradients else None
    assert nn.utils.clip_grad_norm_(start.parameters(), clip or torch.inf) > 0.1
    optimizer.step()
    for (key, value), expected in zip(strange.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=key)
    for (key, value), *found in zip(strange.named_buffers(), *(each.buffers() for each in copies), strict=True):
        torch.testing.assert_close(value, torch.stack(found).double().mean(0).to(value), rtol=0, atol=1e-12, msg=key)
    assert (
        torch.equal(strange.fixed.running_mean, start.fixed.running_mean) and int(strange.norm.num_batches_tracked) == 3
    )


def test_a_phases_share_counts_steps(tmp_path: Path) -> None:
    model, data, schedule = make_cell("still")
    loss = model.method.mismatch
    model.method.phases = lambda: [
        Phase(name, lambda m, batch: (loss(m, batch, m.student.extract(batch["inputs"])), {}), fraction=share)
        for name, share in (("first", 0.125), ("train", 0.5))
    ]
    fit(model, data, tmp_path, schedule)
    written = rows(tmp_path)
    found = {
        name: [row for row in written if row["kind"] == "train" and row["phase"] == name] for name in ("first", "train")
    }
    assert [len(each) for each in found.values()] == [3, 12]  # of three epochs of eight
    assert [row["epoch"] for row in found["first"]] == [0.125, 0.25, 0.375]
    # The learning rate falls over the phase's own length.
    assert found["first"][-1]["lr"] == pytest.approx(0.05 * 0.25, rel=1e-6)
    assert [row["epoch"] for row in written if row["kind"] == "eval"] == [1, 1, 2]


def test_a_loss_sees_where_its_batch_stands(tmp_path: Path) -> None:
    model, data, schedule = make_cell("still")
    seen = []

    def loss(model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((batch["step"], batch["total"]))
        return model.student.task(model.student.extract(batch["inputs"]), batch).loss, {}

    model.method.phases = lambda: [Phase("train", loss, trains=only(student_alone), loaders={"train": training_part})]
    fit(model, data, tmp_path, {**schedule, "epochs": None, "iterations": 4, "interval": 2})
    assert seen == [(step, 4) for step in range(4)]


def test_methods_are_described_without_torch() -> None:
    code = "import sys, kt.phase, kt.ranks; sys.exit('torch' in sys.modules or kt.ranks.world_size() - 1)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_the_best_score_is_the_main_phase_s_and_the_lowest_of_miss_rates(tmp_path: Path) -> None:
    lines = [
        ("eval", "first", 90.0, 1.0),
        ("eval", "train", 50.0, 30.0),
        ("train", "train", 95.0, 2.0),
        ("eval", "train", 60.0, 20.0),
        ("eval", "train", 55.0, 25.0),
    ]
    records = [{"kind": k, "phase": p, "step": 1, "epoch": 1, "top1": a, "mr_all": m} for k, p, a, m in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert best_metrics(tmp_path) == {"top1": 60.0, "mr_all": 20.0}


@pytest.mark.parametrize(
    ("student", "changes", "words"),
    [
        (
            "resnet18",
            {"batch_size": 1},
            "schedule.batch_size=1: student.network.layer3.0.bn1 sees one value of each channel in passes of 1",
        ),
        (
            "resnet18",
            {"device_batch": 1},
            "schedule.batch_size=2: student.network.layer3.0.bn1 sees one value of each channel in passes of 1",
        ),
        ("vgg16", {}, "dataset.image_size=16: no size for the student, a VGG "),
    ],
)
def test_images_too_small_or_too_few_are_refused_before_the_first_update(
    student: str, changes: dict[str, int], words: str, tmp_path: Path
) -> None:
    batches = {"batch_size": 2, **changes}
    data = build_data({**DATASET, "image_size": 16, "train_size": 4, "test_size": 2}, tmp_path, seed=0, **batches)
    network = Classifier(build_network(student, num_classes=data.spec.num_classes, width=0.125, image_size=16))
    model = TransferModel(network, build_method("none", network, None))
    before = bits(network.state_dict())
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        fit(model, data, tmp_path, {**SCHEDULE, **batches})
    after = bits(network.state_dict())
    assert all(after[name] == before[name] for name, _ in network.named_parameters())


def test_memory_that_a_step_frees_is_the_next_ones(tmp_path: Path) -> None:
    model, images = make_model("none", 10), {"inputs": torch.rand(4, 3, 32, 32), "labels": torch.arange(4)}
    keep_pages.cache_clear()
    loop = measured_loop(
        model, model.method.phases()[-1], images, Engine(defaults(Schedule), torch.device("cpu"), tmp_path)
    )
    loop.step(images)
    assert keep_pages.cache_info().currsize == 1
    if not keep_pages():
        pytest.skip("this C library cannot be told to keep memory")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2 << 20) for _ in range(12)]  # 96 MiB, 24,576 pages
        assert len(blocks) == 12
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # The heap may lie otherwise once more after other tests of this process.
    assert min(faults() for _ in range(4)) < 1000
