"""Derivatives of a loss after an update, against double backward passes and torch's own optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import bits
from kt.hypergradient import directional, lookahead, with_values
from kt.transfer import frozen_statistics

RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-2


class Setup:
    """A small network with batch normalisation and an optimizer in mid-training, and two losses to weigh."""

    def __init__(self, dtype: torch.dtype = torch.float64, activation: type[nn.Module] = nn.Tanh):
        torch.manual_seed(0)
        layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), activation(), nn.Linear(8, 3))
        self.network = nn.Sequential(*layers).to(dtype)
        self.x, self.other = torch.randn(2, 16, 6, dtype=dtype)
        self.labels, self.targets = torch.randint(3, (16,)), torch.randn(2, 16, 3, dtype=dtype)
        self.parameters = [*self.network.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, RATE, MOMENTUM, weight_decay=DECAY)
        self.logits = torch.zeros(2, dtype=dtype, requires_grad=True)
        for _ in range(2):
            self.optimizer.zero_grad()
            self.train_loss().backward()
            self.optimizer.step()

    def losses(self) -> Tensor:
        output = self.network(self.x)
        return torch.stack([F.mse_loss(output, target) for target in self.targets])

    def train_loss(self) -> Tensor:
        return F.cross_entropy(self.network(self.x), self.labels) + (self.logits.exp() * self.losses()).sum()

    def outer_loss(self) -> Tensor:
        return F.cross_entropy(self.network(self.other), self.labels)

    def at(self, values: Sequence[Tensor], function: Callable[[], Any]) -> Any:
        return with_values(self.network, self.parameters, values, function)

    def exact(self) -> Tensor:
        """The derivative in the logits by a backward pass through the step."""
        with frozen_statistics(self.network):
            gradients = torch.autograd.grad(self.train_loss(), self.parameters, create_graph=True)
            stepped = [
                p - RATE * (g + DECAY * p + MOMENTUM * self.optimizer.state[p]["momentum_buffer"])
                for p, g in zip(self.parameters, gradients, strict=True)
            ]
            return torch.autograd.grad(self.at(stepped, self.outer_loss), self.logits)[0]

    def found(self, how: str = "difference", step: float = 0.01) -> Tensor:
        """The same by the module's verbs."""
        with frozen_statistics(self.network):
            gradients = torch.autograd.grad(self.train_loss(), self.parameters)
            ahead = [value.requires_grad_() for value in lookahead(self.optimizer, gradients)]
            slope = torch.autograd.grad(self.at(ahead, self.outer_loss), ahead)

            found = directional(lambda values: self.at(values, self.losses), self.parameters, slope, how, step)
            return -RATE * self.logits.detach().exp() * found


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_forward_mode_is_exact() -> None:
    setup = Setup()
    assert error(setup.found("jvp"), setup.exact()) < 1e-12


def test_differences_approach_it_with_the_square_of_their_step() -> None:
    setup = Setup()
    exact = setup.exact()
    large, usual, small = (error(setup.found(step=step), exact) for step in (0.1, 0.01, 0.001))
    assert usual < 5e-4
    assert 50 < large / usual < 200 and 50 < usual / small < 200


def test_single_precision_and_kinks_leave_the_direction() -> None:
    setup = Setup(torch.float32, nn.ReLU)
    assert F.cosine_similarity(setup.found(), setup.exact(), dim=0) > 0.999


@pytest.mark.parametrize("how", ["difference", "jvp"])
def test_nothing_is_left_behind(how: str) -> None:
    setup = Setup()

    def state() -> Any:
        momenta = {str(i): setup.optimizer.state[p]["momentum_buffer"] for i, p in enumerate(setup.parameters)}
        return bits(setup.network.state_dict()), bits(momenta), [p.grad for p in setup.parameters]

    setup.optimizer.zero_grad()
    before = state()
    setup.found(how)
    assert state() == before


def test_both_sides_of_a_difference_draw_the_same() -> None:
    random = torch.get_rng_state()
    found = directional(lambda values: values[0] + torch.rand(3), [torch.zeros(3)], [torch.ones(3)])
    torch.testing.assert_close(found, torch.ones(3), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), random)


def make_optimizer(kind: Any, **settings: float) -> torch.optim.Optimizer:
    """One with three parameters in two groups."""
    torch.manual_seed(0)
    first, *others = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [first], "lr": 0.3, "weight_decay": 0.2}, {"params": others}]
    return kind(groups, 0.1, weight_decay=0.01, **settings)


# Another optimizer is taken for SGD without momentum.
@pytest.mark.parametrize(("kind", "momentum"), [(torch.optim.SGD, 0.0), (torch.optim.SGD, 0.9), (torch.optim.AdamW, 0)])
def test_lookahead_is_the_step_of_sgd(kind: Any, momentum: float) -> None:
    is_sgd = kind is torch.optim.SGD
    stepped = make_optimizer(torch.optim.SGD, momentum=momentum)
    asked = stepped if is_sgd else make_optimizer(kind)
    for _ in range(2 if is_sgd else 1):
        gradients = [torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64), None]
        parameters = [parameter for group in stepped.param_groups for parameter in group["params"]]
        found = lookahead(asked, gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        stepped.step()
        torch.testing.assert_close(found, [parameter.detach() for parameter in parameters])
        assert not any(value.requires_grad for value in found)


def test_a_direction_without_length_gives_zeros() -> None:
    found = directional(lambda values: values[0] ** 2, [torch.ones(2)], [torch.zeros(2)])
    assert torch.equal(found, torch.zeros(2))


@pytest.mark.parametrize("how", ["difference", "jvp"])
def test_reduced_precision_is_refused(how: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="directional: expected full precision"):
        directional(lambda values: values[0], [torch.ones(1)], [torch.ones(1)], how)


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(ValueError, match="how='differences': expected one of difference, jvp .did you mean"):
        directional(lambda v: v[0], [torch.ones(1)], [torch.ones(1)], how="differences")
