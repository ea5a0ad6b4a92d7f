"""Gradients through training: how a model would do after steps that have not been taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Result = TypeVar("Result")


class _Calling(nn.Module):
    """A module to whose parameters `torch.func.functional_call` gives other values while a function of it runs."""

    def __init__(self, model: nn.Module, function: Callable[[], object]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> object:
        return self.function()


def with_values(
    model: nn.Module, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], function: Callable[[], Result]
) -> Result:
    """What a function of a model gives where some of its parameters have other values, differentiable in these.

    Args:
        model: The model; it ends as it was, but for buffers that the function changes.
        parameters: Some of its parameters.
        values: A tensor of the same shape for each.
        function: Calls the model or parts of it.
    """
    names = {id(parameter): f"model.{name}" for name, parameter in model.named_parameters()}
    given = {names[id(parameter)]: value for parameter, value in zip(parameters, values, strict=True)}
    return torch.func.functional_call(_Calling(model, function), given, ())


def unroll(
    losses: Iterable[Callable[[Sequence[Tensor]], Tensor]], optimizer: torch.optim.Optimizer, momentum: float
) -> list[Tensor]:
    """An optimizer's parameters after steps of SGD with momentum, as functions of all that the losses depend on.

    Whatever the optimizer is, the steps are those of `torch.optim.SGD` (without Nesterov's look-ahead) at its learning
    rates and weight decays, from its momentum where it has one; a parameter that a loss does not depend on keeps moving
    by its momentum. Nothing but the result remembers the steps, and no parameter or state changes.

    Args:
        losses: Of each step: from the values of the parameters, in the order of the optimizer's groups, to a scalar.
        optimizer: Where training stands.
        momentum: Of the steps.

    Returns:
        The values in the same order, with a graph through all steps.
    """
    parameters = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    values: list[Tensor] = [parameter for parameter, _ in parameters]
    speeds = [optimizer.state[value].get("momentum_buffer") for value in values]
    speeds = [torch.zeros_like(value) if speed is None else speed for value, speed in zip(values, speeds, strict=True)]
    for loss in losses:
        # The other kernels of attention cannot be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            value = loss(values)
        gradients = torch.autograd.grad(value, values, create_graph=True, allow_unused=True, materialize_grads=True)
        for number, (gradient, (_, group)) in enumerate(zip(gradients, parameters, strict=True)):
            speeds[number] = momentum * speeds[number] + gradient + group["weight_decay"] * values[number]
            values[number] = values[number] - group["lr"] * speeds[number]
    return values
