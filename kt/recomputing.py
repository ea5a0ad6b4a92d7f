"""Activation checkpointing: of a stage only the output is kept, and the backward pass runs it again for the rest.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, by torch's non-reentrant checkpoints. These repeat
the random numbers and the autocast of the first run. Here a second run also has the first one's modes and parameters,
which may have been others for its time only, and no buffer (running statistics) that it changes stays changed. So
losses, gradients and statistics are those without it, and every pass back costs another one forward. Forward hooks
inside a stage fire in both runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Within = Callable[[Callable[[], Any]], Any]

_on: ContextVar[bool] = ContextVar("recomputing", default=False)
_within: ContextVar[Within] = ContextVar("within", default=lambda function: function())


class Part(Protocol):
    """A part of a network, as `kt.stages.Stage` is one."""

    def modules(self) -> Iterator[nn.Module]:
        """Its torch modules, nested ones included."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""


P = TypeVar("P", bound=Part)
Result = TypeVar("Result")


@contextlib.contextmanager
def recomputing(on: bool = True) -> Iterator[None]:
    """Within, every stage through which gradients pass is checkpointed, or none is."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


@contextlib.contextmanager
def repeated_within(call: Within) -> Iterator[None]:
    """Within, what runs will run again inside of `call`, which takes a function and gives its result."""
    token = _within.set(call)
    try:
        yield
    finally:
        _within.reset(token)


def recomputed(method: Callable[[P, Tensor], Result]) -> Callable[[P, Tensor], Result]:
    """Lets a method of a part of a network be checkpointed where `recomputing` says so.

    Without gradients, and inside of another such method, it simply runs.
    """

    @functools.wraps(method)
    def run(self: P, x: Tensor) -> Result:
        graph = torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in self.parameters()))
        if not (_on.get() and graph):
            return method(self, x)
        modes, within, ran = _modes(self), _within.get(), False

        def once_or_again(x: Tensor) -> Result:
            nonlocal ran
            with recomputing(False):
                if not ran:
                    ran = True
                    return method(self, x)
                with _unchanged(modes):
                    return within(lambda: method(self, x))

        return checkpoint(once_or_again, x, use_reentrant=False)

    return run


def _modes(part: Part) -> dict[nn.Module, dict[str, Any]]:
    """How the modules of a part stand, in what decides how they run."""
    keys = ("training", "track_running_stats")
    return {module: {key: vars(module)[key] for key in keys if key in vars(module)} for module in part.modules()}


@contextlib.contextmanager
def _unchanged(modes: Mapping[nn.Module, Mapping[str, Any]]) -> Iterator[None]:
    """Within, modules stand as they stood, and have copies of their buffers.

    A normalisation that merely did not track its statistics would save other tensors than before; statistics put back
    in place would invalidate what other passes have saved.
    """
    before = [(module, {key: vars(module)[key] for key in mode}, {**module._buffers}) for module, mode in modes.items()]
    for module, _, buffers in before:
        vars(module).update(modes[module])
        module._buffers.update({key: buffer if buffer is None else buffer.clone() for key, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, mode, buffers in before:
            vars(module).update(mode)
            module._buffers.update(buffers)
