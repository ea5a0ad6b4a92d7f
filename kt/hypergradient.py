"""How a loss after an update depends on the weights that the update gave to its losses.

Training minimises sum_k w_k l_k(theta); one step at the rate xi leads to theta'. The derivative of an outer loss
L(theta') in w_k is then -xi <grad l_k(theta), v> with v = grad L(theta'): no second derivatives, but those of all l_k
along one direction v, which two perturbed forward passes give (`directional`).

Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from kt.errors import nearest

T = TypeVar("T")

HOW = ("difference", "jvp")


class _Within(nn.Module):
    """A function's call as the forward of a module around another one, so that `functional_call` swaps parameters."""

    def __init__(self, inner: nn.Module, function: Callable[[], object]):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self) -> object:
        return self.function()


def evaluated(
    module: nn.Module, parameters: Sequence[Tensor], values: Sequence[Tensor], function: Callable[[], T]
) -> T:
    """What a function gives where some of a module's parameters have other values; it is differentiable in these.

    Args:
        module: The module; it is left as it is, but for buffers that the function changes.
        parameters: Some of its parameters.
        values: A value for each.
        function: Reads the module.
    """
    names = {id(parameter): f"inner.{name}" for name, parameter in module.named_parameters()}
    named = {names[id(parameter)]: value for parameter, value in zip(parameters, values, strict=True)}
    return functional_call(_Within(module, function), named, ())


def lookahead(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Where a step of SGD with momentum would lead, `theta - xi (mu m + g + decay theta)`; nothing is stepped.

    Args:
        optimizer: Has the parameters, their rates and decays, and momentum where it is SGD; any other is taken for SGD
            without momentum, since the derivative above is that of a step along the gradient.
        gradients: Of each parameter in the optimizer's order; None where there is none, as the step leaves it alone.

    Returns:
        The values, detached, in the same order.
    """
    found, left = [], iter(gradients)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = next(left)
                if gradient is None:
                    found.append(parameter.detach().clone())
                    continue
                move = gradient + group["weight_decay"] * parameter
                momentum = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
                if momentum is not None:
                    move = move + group["momentum"] * momentum
                found.append(parameter - group["lr"] * move)
    return found


def directional(
    losses: Callable[[Sequence[Tensor]], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    how: str = "difference",
    step: float = 0.01,
) -> Tensor:
    """The derivatives of losses along a direction in the parameters, `d losses(theta + t v) / dt` at 0.

    Args:
        losses: From values of the parameters to a tensor of losses; it must not keep running statistics.
        parameters: Where; they, and the state of random numbers, stay as they are.
        direction: v, a tensor for each parameter.
        how: `difference` evaluates at theta +- step v / |v|, `jvp` is exact (forward mode), at two to
            four times the cost.
        step: The length of the steps to both sides.

    Returns:
        Detached, in the shape of the losses.
    """
    at = [parameter.detach() for parameter in parameters]
    devices = sorted({value.device for value in at if value.device.type == "cuda"}, key=str)

    def call(values: Sequence[Tensor]) -> Tensor:
        with torch.random.fork_rng(devices):  # every call draws the same dropout
            return losses(values)

    if how == "jvp":
        return jvp(lambda *values: call(values), tuple(at), tuple(direction))[1].detach()
    if how != "difference":
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}{nearest(how, HOW)}")
    with torch.no_grad():
        norm = torch.stack([value.norm() for value in direction]).norm()
        epsilon = step / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        ahead, behind = (
            call([value + sign * epsilon * way for value, way in zip(at, direction, strict=True)]) for sign in (1, -1)
        )
        return (ahead - behind) / (2 * epsilon)
