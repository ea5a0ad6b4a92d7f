"""A frozen teacher in reduced precision: what it says is a target, and on processors with bfloat16 it costs a fraction.

Its stages and its head compute under autocast and answer in single precision, so whatever reads them (losses, adapters,
hypergradients) computes as beside a teacher in single precision. Where autocast is on for everything, it already
decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16")

Result = TypeVar("Result")


class Computes(Protocol):
    """Part of a network that can compute in its own precision."""

    precision: str


View = TypeVar("View", bound=Computes)


def in_own_precision(method: Callable[..., Result]) -> Callable[..., Result]:
    """Lets a method of a part of a network compute in bfloat16 where the part's `precision` says so.

    Its first argument is a tensor or a sequence of them, what it gives tensors or tuples of them.
    """

    @functools.wraps(method)
    def run(self: Any, first: Any, *rest: Any) -> Result:
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if self.precision == "fp32" or torch.is_autocast_enabled(device):
            return method(self, first, *rest)
        with torch.autocast(device, torch.bfloat16):
            return _single(method(self, first, *rest))

    return run


def compute_in(network: Any, precision: str) -> None:
    """Says how a frozen network's stages, head and further answers compute.

    Args:
        network: A classifier, detector, segmentor or backbone, see `kt.classifier.Classifier` and `kt.dense.Backbone`.
        precision: One of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"teacher precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    network.precision = precision
    for views in ("_stages", "_head"):  # made anew when next asked for
        network.__dict__.pop(views, None)


def views_in(precision: str, *views: View) -> list[View]:
    """Fresh views of a network's parts that compute so."""
    for view in views:
        view.precision = precision
    return [*views]


def _single(value: Any) -> Any:
    """Tensors in single precision where they are in half."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    parts = [_single(each) for each in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
