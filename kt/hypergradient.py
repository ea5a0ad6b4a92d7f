"""Gradients through training: how a model would do after steps that have not been taken.

`unroll` takes steps with a graph. Where a step's loss is a weighted sum, sum_k w_k l_k(theta), and leads at the rate xi
to theta', the derivative of an outer loss L(theta') in w_k needs none: it is -xi <grad l_k(theta), v> with
v = grad L(theta'), so derivatives of all l_k along one direction, which two perturbed forward passes give
(`lookahead`, `directional`; Liu, Simonyan, Yang, "DARTS", ICLR 2019, section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kt import ranks
from kt.compiling import compiling
from kt.errors import nearest
from kt.recomputing import recomputing, repeated_within
from kt.transfer import frozen_statistics

Result = TypeVar("Result")

HOW = ("difference", "jvp")


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

    def call(function: Callable[[], Any]) -> Any:
        return torch.func.functional_call(_Calling(model, function), given, ())

    with repeated_within(call), compiling(None):
        return call(function)


Group = Mapping[str, Any]


def _standing(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor], list[Group]]:
    """An optimizer's parameters, their momentum (zeros where it has none) and groups."""
    pairs = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    speeds = [optimizer.state[parameter].get("momentum_buffer") for parameter, _ in pairs]
    speeds = [torch.zeros_like(p) if speed is None else speed for (p, _), speed in zip(pairs, speeds, strict=True)]
    return [parameter for parameter, _ in pairs], speeds, [group for _, group in pairs]


def _step(value: Tensor, gradient: Tensor, speed: Tensor, group: Group, momentum: float) -> tuple[Tensor, Tensor]:
    """A parameter and its momentum after a step of `torch.optim.SGD`, without Nesterov's look-ahead."""
    speed = momentum * speed + gradient + group["weight_decay"] * value
    return value - group["lr"] * speed, speed


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
    values, speeds, groups = _standing(optimizer)
    for loss in losses:
        # The other kernels of attention cannot be differentiated twice; a graph of gradients keeps everything anyway.
        with sdpa_kernel(SDPBackend.MATH), recomputing(False):
            value = loss(values)
        gradients = torch.autograd.grad(value, values, create_graph=True, allow_unused=True, materialize_grads=True)
        for number, (gradient, group) in enumerate(zip(gradients, groups, strict=True)):
            values[number], speeds[number] = _step(values[number], gradient, speeds[number], group, momentum)
    return values


@torch.no_grad()
def lookahead(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """An optimizer's parameters after one step of SGD along given gradients, which is not taken.

    Args:
        optimizer: Where training stands. One that has no momentum of SGD's is taken for SGD without momentum, as the
            derivative above is that of a step along the gradient.
        gradients: Of its parameters, in the order of its groups; None for one that the step leaves alone.

    Returns:
        The values in the same order, without a graph.
    """
    return [
        value.detach().clone()
        if gradient is None
        else _step(value, gradient, speed, group, group.get("momentum", 0.0))[0]
        for value, speed, group, gradient in zip(*_standing(optimizer), gradients, strict=True)
    ]


def derivatives_ahead(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: Sequence[Tensor | None],
    outer: Callable[[], Tensor],
    losses: Callable[[], Tensor],
    beside: Sequence[nn.Module] = (),
    how: str = "difference",
) -> tuple[Tensor, Tensor]:
    """Derivatives of losses along the gradient of an outer loss behind a step of SGD, and that outer loss.

    The step moves the first of the optimizer's groups and is not taken: no parameter, running statistic, momentum or
    random state changes. Gradients are averaged over all processes. All is in full precision, without which
    differences of losses are rounding errors.

    Args:
        model: The model that has these parameters.
        optimizer: Where training stands, whatever it is; see `lookahead`.
        gradients: Of the step, for each of these parameters.
        outer: A function of the model: a scalar.
        losses: Another one: a tensor of losses.
        beside: Further modules whose running statistics stay.
        how: See `directional`.

    Returns:
        In the shape of the losses, and the scalar, both without a graph.
    """
    own, *others = (group["params"] for group in optimizer.param_groups)
    still = [None] * sum(map(len, others))
    devices = sorted({parameter.device for parameter in own if parameter.is_cuda}, key=str)
    exactly = torch.autocast(own[0].device.type, enabled=False)
    with exactly, frozen_statistics(model, *beside), torch.random.fork_rng(devices):
        moved = lookahead(optimizer, [*ranks.mean_gradients(gradients, own), *still])[: len(own)]
        moved = [value.requires_grad_() for value in moved]
        behind = with_values(model, own, moved, outer)
        slope = torch.autograd.grad(behind, moved, materialize_grads=True)
        direction: Any = ranks.mean_gradients(slope, own)
        along = directional(lambda values: with_values(model, own, values, losses), own, direction, how)
    return along, behind.detach()


def directional(
    losses: Callable[[Sequence[Tensor]], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    how: str = "difference",
    step: float = 0.01,
) -> Tensor:
    """The derivatives of losses along a direction v in the parameters, `d losses(theta + t v) / dt` at t = 0.

    Args:
        losses: From values of the parameters to a tensor of losses; it must not keep running statistics.
        parameters: Where; they, and the state of random numbers, stay as they are.
        direction: v, a tensor for each parameter.
        how: `difference` of the losses at `theta + step v / |v|` and `theta - step v / |v|`, or `jvp`: forward mode,
            exact, at two to four times the cost.
        step: See `how`.

    Returns:
        In the shape of the losses, without a graph.

    Raises:
        ValueError: It is called under autocast, or there is no such way.
    """
    if any(torch.is_autocast_enabled(kind) for kind in {parameter.device.type for parameter in parameters}):
        raise ValueError(
            "directional: expected full precision, without autocast; differences of rounded losses say nothing"
        )
    at = [parameter.detach() for parameter in parameters]
    devices = sorted({value.device for value in at if value.device.type == "cuda"}, key=str)

    def call(values: Sequence[Tensor]) -> Tensor:
        with torch.random.fork_rng(devices):  # every call draws the same dropout
            return losses(values)

    if how == "jvp":
        return torch.func.jvp(lambda *values: call(values), tuple(at), tuple(direction))[1].detach()
    if how != "difference":
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}{nearest(how, HOW)}")
    with torch.no_grad():
        norm = torch.stack([value.norm() for value in direction]).norm()
        epsilon = step / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        ahead, behind = (
            call([value + sign * epsilon * way for value, way in zip(at, direction, strict=True)]) for sign in (1, -1)
        )
        return (ahead - behind) / (2 * epsilon)
