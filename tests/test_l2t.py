"""L2T: meta-gradients against steps that are really taken, and what looking back at steps must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import bits
from kt.engine import Engine, PhaseLoop, measured_loop
from kt.hypergradient import unroll
from kt.methods import build_method
from kt.settings import Schedule, defaults
from kt.stages import as_map
from kt.train import fit
from kt.transfer import TransferModel, frozen_statistics
from method_settings import make_classifier, make_data, make_model

SGD = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}


def test_unrolled_steps_give_the_authors_numbers() -> None:
    """Those that the example in train/meta_optimizers.py of alinlab/L2T-ww prints."""
    first = nn.Parameter(torch.tensor([1.0, 3.0]))
    second = nn.Parameter(torch.tensor([[-1.0, -2.0], [1.0, 0.0]]))
    weights = torch.zeros(2, 2, requires_grad=True)

    def inner(values: Sequence[Tensor]) -> Tensor:
        return values[0].pow(2).mean() + (weights * values[1] ** 2).sum()

    optimizer = torch.optim.SGD([first, second], 0.1, 0.9, weight_decay=0.01)
    one, other = unroll([inner] * 10, optimizer, 0.9)
    (gradient,) = torch.autograd.grad((one * other).mean(), weights)
    expected = torch.tensor([[-1.1952, -7.1712], [1.1952, 0.0]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4)


@pytest.fixture
def batch() -> dict[str, Any]:
    found = next(iter(make_data().train.epoch(0)))
    return {**found, "inputs": found["inputs"].double()}


def make_loop(folder: Path, batch: dict[str, Any], method: Any = None, **schedule: Any) -> PhaseLoop:
    """In double precision, where differences tell the gradient."""
    model = make_model("l2t", 10, **(method or {})).double()
    settings = {**defaults(Schedule), **SGD, "policy": "constant", **schedule}
    return measured_loop(model, model.method.phases()[0], batch, Engine(settings, torch.device("cpu"), folder))


def maps(model: TransferModel, network: Any, batch: dict[str, Any]) -> list[Tensor]:
    return [as_map(level) for level in network.extract(batch["inputs"])]


def outcome(model: TransferModel, batch: dict[str, Any], optimizer: torch.optim.Optimizer, steps: int) -> float:
    """The task's loss behind steps that are taken."""

    def task() -> Tensor:
        return F.cross_entropy(model.student(batch["inputs"]), batch["labels"])

    def match() -> Tensor:
        targets = maps(model, model.teacher, batch)
        ours = model.method.features(model, batch)[0]
        return model.method.weights["match"] * model.method.match(ours, targets, model.method.weigh(targets))

    for loss in (*[match] * steps, task):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        optimizer.step()
    return task().item()


@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 2), ("adamw", 1)])
def test_the_meta_gradient_is_that_of_steps_taken(
    optimizer: str, steps: int, batch: dict[str, Any], tmp_path: Path
) -> None:
    loop = make_loop(tmp_path, batch, {"inner_steps": steps, "weight": 0.7}, optimizer=optimizer)
    for _ in range(2):  # so that there is momentum
        loop.advance(batch)
    model = loop.model
    targets = maps(model, model.teacher, batch)
    found = model.method.meta_gradient(loop, batch, targets, model.method.weigh(targets))
    own = loop.optimizers["main"].optimizer
    meta = loop.parameters("meta")
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(value.shape, generator=generator).double() for value in meta]

    def moved(distance: float) -> float:
        model_, names = copy.deepcopy(model), dict(model.named_parameters())
        twin = dict(model_.named_parameters())
        pairs = {id(value): twin[name] for name, value in names.items()}
        with torch.no_grad():
            for value, direction in zip(meta, directions, strict=True):
                pairs[id(value)].add_(direction, alpha=distance)
        parameters = [pairs[id(value)] for value in loop.parameters("main")]
        taken = torch.optim.SGD(parameters, **SGD)
        for value, parameter in zip(loop.parameters("main"), parameters, strict=True):
            if optimizer == "sgd":
                taken.state[parameter]["momentum_buffer"] = own.state[value]["momentum_buffer"].clone()
        with frozen_statistics(model_.student):
            return outcome(model_, batch, taken, steps)

    # Small, so that no ReLU on the way switches.
    expected = (moved(1e-7) - moved(-1e-7)) / 2e-7
    total = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
    assert abs(expected) > 1e-3 and total == pytest.approx(expected, rel=1e-5)


def test_looking_back_leaves_no_trace(batch: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    def after(look_back: bool) -> list[Any]:
        loop = make_loop(tmp_path, batch)

        def draw(*_: Any) -> None:
            torch.rand(3)  # as a dropout would

        loop.model.student.stages[0].steps[0].register_forward_hook(draw)
        if not look_back:
            zeros = [torch.zeros_like(value) for value in loop.parameters("meta")]
            monkeypatch.setattr(loop.model.method, "meta_gradient", lambda *_: zeros)
        torch.manual_seed(0)
        loop.advance(batch)
        speeds = loop.optimizers["main"].optimizer.state_dict()["state"]
        return [
            bits(loop.model.student.state_dict()),
            bits(loop.model.method.regressors.state_dict()),
            [bits(each) for each in speeds.values()],
            torch.get_rng_state().tolist(),
        ]

    assert after(look_back=True) == after(look_back=False)


def test_the_matching_loss_itself_does_not_train_the_meta_networks(batch: dict[str, Any], tmp_path: Path) -> None:
    loop = make_loop(tmp_path, batch, {"meta_weight_decay": 0.0})
    start = bits(loop.model.method.state_dict())
    for group in loop.optimizers["main"].optimizer.param_groups:
        group["base_lr"] = 0.0  # so that what matching leads to is nothing
    loop.step(batch)
    still = bits(loop.model.method.state_dict())
    assert still == start
    for group in loop.optimizers["main"].optimizer.param_groups:
        group["base_lr"] = 0.1
    loop.step(batch)
    moved = bits(loop.model.method.state_dict())
    assert all(moved[key] != start[key] for key in moved)


def test_weight_decay_draws_the_meta_networks_to_zero(batch: dict[str, Any], tmp_path: Path) -> None:
    loop = make_loop(tmp_path, batch, {"meta_lr": 0.01, "meta_weight_decay": 0.02})
    own = loop.parameters("meta")
    twins = [nn.Parameter(value.detach().clone()) for value in own]
    for group in loop.optimizers["main"].optimizer.param_groups:
        group["base_lr"] = 0.0  # so that there is no gradient but that of the decay
    loop.step(batch)
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    torch.optim.Adam(twins, 0.01, weight_decay=0.02).step()
    for value, twin in zip(own, twins, strict=True):
        torch.testing.assert_close(value, twin)


def test_all_channels_and_pairs_start_alike(batch: dict[str, Any]) -> None:
    model = make_model("l2t", 10).double()
    weights = model.method.weigh(maps(model, model.teacher, batch))
    assert len(weights) == 3
    for (channels, pairs), stage in zip(weights, model.teacher.stages, strict=True):
        assert channels.shape == (16, 3, stage.channels) and pairs.shape == (16, 3)
        torch.testing.assert_close(channels, torch.full_like(channels, 1 / stage.channels))
        assert 0 < (pairs - 1).abs().mean() < 1 and pairs.min() >= 0 and pairs.max() <= 6
    for layer in model.method.where:
        torch.nn.init.constant_(layer.bias, 100)
    for _, pairs in model.method.weigh(maps(model, model.teacher, batch)):
        assert (pairs == 6).all()


def test_the_stem_of_a_network_for_large_images_is_not_matched() -> None:
    student, teacher = (make_classifier(name, 4, seed=0) for name in ("resnet18", "resnet34"))
    method = build_method("l2t", student, teacher)
    assert (
        [student.stages[i].stride for i in method.ours]
        == [4, 8, 16, 32]
        == [teacher.stages[i].stride for i in method.theirs]
    )


def test_a_transformer_is_looked_back_at(tmp_path: Path) -> None:
    data = make_data()
    student, teacher = (make_classifier(name, 10, seed=0) for name in ("deit_tiny", "resnet8"))
    model = TransferModel(student, build_method("l2t", student, teacher, meta_lr=0.01), {"teacher": teacher})
    start = bits(model.method.state_dict())
    fit(model, data, tmp_path, {"iterations": 1, "epochs": None, "lr": 0.1})
    after = bits(model.method.state_dict())
    assert all(after[key] != start[key] for key in start)


def test_matching_is_a_sum_over_pairs_samples_and_channels(batch: dict[str, Any]) -> None:
    model = make_model("l2t", 10).double()
    method, images = model.method, {**batch, "inputs": batch["inputs"][:3]}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [*method.what.parameters(), *method.where.parameters()]:
            value += torch.randn(value.shape, generator=generator)
    ours, theirs = (maps(model, network, images) for network in (model.student, model.teacher))
    expected = 0.0
    for i, guessed in enumerate(ours):
        regressor = method.regressors[i]
        first = 0
        for j, target in enumerate(theirs):
            width = target.shape[1]
            rows = slice(first, first + width)
            first += width
            guess = F.conv2d(guessed, regressor.weight[rows], regressor.bias[rows]).detach().numpy()
            resized = F.interpolate(target, size=guess.shape[2:], mode="bilinear").detach().numpy()
            pooled = target.mean((2, 3)).detach().numpy()
            what = [
                method.what[j].weight[i * width : (i + 1) * width],
                method.what[j].bias[i * width : (i + 1) * width],
            ]
            where = [method.where[j].weight[i], method.where[j].bias[i]]
            for n in range(3):
                logits = what[0].detach().numpy() @ pooled[n] + what[1].detach().numpy()
                channels = np.exp(logits) / np.exp(logits).sum()
                pair = min(6.0, max(0.0, float(where[0].detach().numpy() @ pooled[n] + where[1].item())))
                for c in range(width):
                    expected += pair * channels[c] * float(np.mean((guess[n, c] - resized[n, c]) ** 2)) / 3
    found = method.match(method.features(model, images)[0], theirs, method.weigh(theirs))
    assert found.item() == pytest.approx(expected, rel=1e-9)
