"""The processes that train one model together: who this one is, and what they tell one another.

Everything here also works for a process on its own, which is rank 0 of 1, and for one that has not imported torch.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def _group() -> Any:
    """`torch.distributed` where this process is in a group, else None."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def rank() -> int:
    """This process's number in its group, from 0."""
    group = _group()
    return 0 if group is None else group.get_rank()


def world_size() -> int:
    """The number of processes in the group."""
    group = _group()
    return 1 if group is None else group.get_world_size()


def is_first() -> bool:
    """Whether this process is the one of its group that writes."""
    return rank() == 0


# Before they meet


def launched() -> int:
    """How many processes torchrun has started for this command, whether they form a group yet or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_first() -> bool:
    """Whether this process is the first of those that torchrun has started."""
    return launched() == 1 or int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int | None:
    """This process's number on its machine, as torchrun says; None where torchrun did not start it."""
    number = os.environ.get("LOCAL_RANK")
    return None if number is None else int(number)


def join() -> None:
    """Makes a group of the processes that torchrun has started, unless they form one already."""
    import torch

    if _group() is None:
        # A rank may wait as long as the first one waits for a lock.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))


# What they tell one another: every process of the group makes the same call


def from_first(value: Any) -> Any:
    """The first process's value (anything that can be pickled), in every process."""
    group = _group()
    if group is None:
        return value
    import torch

    box = [value]
    group.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def sum_over_ranks(value: Tensor) -> Tensor:
    """A tensor's sum over all processes, detached; the tensor itself where there is one process."""
    return _reduced(value, "SUM")


def max_over_ranks(value: Tensor) -> Tensor:
    """A tensor's largest values over all processes, detached; the tensor itself where there is one process."""
    return _reduced(value, "MAX")


def mean_over_ranks(value: Tensor) -> Tensor:
    """A tensor's mean over all processes, detached; the tensor itself where there is one process."""
    return value if _group() is None else sum_over_ranks(value).div_(world_size())


def _reduced(value: Tensor, operation: str) -> Tensor:
    group = _group()
    if group is None:
        return value
    value = value.detach().clone()
    group.all_reduce(value, getattr(group.ReduceOp, operation))
    return value


def gathered(value: Any) -> list[Any]:
    """Every process's value (anything that can be pickled), in the order of their ranks."""
    group = _group()
    if group is None:
        return [value]
    found: list[Any] = [None] * world_size()
    group.all_gather_object(found, value)
    return found


def rows_of_all(value: Tensor) -> Tensor:
    """A tensor (n, ...), of the same shape in every process, row by row in the order of the ranks; detached."""
    group = _group()
    if group is None:
        return value.detach()
    import torch

    parts = [torch.empty_like(value) for _ in range(world_size())]
    group.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)


def mean_gradients(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients averaged over all processes, by one message.

    Args:
        gradients: One for each parameter, of its shape; None where the loss does not depend on it.
        parameters: The parameters, on one device.

    Returns:
        The means; None only for a parameter that no process has a gradient for, so that all of them leave it alone.
    """
    if world_size() == 1:
        return list(gradients)
    import torch

    parts = [
        (torch.zeros_like(parameter) if gradient is None else gradient).detach().reshape(-1)
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    present = parts[0].new_tensor([gradient is not None for gradient in gradients])
    *means, shares = mean_over_ranks(torch.cat([*parts, present])).split([*map(len, parts), len(parts)])
    # Only who lacks a gradient has to look, and to wait for the device, whether another process has it.
    everywhere = all(gradient is not None for gradient in gradients)
    found = [True] * len(parts) if everywhere else (shares > 0).tolist()
    return [
        mean.view(parameter.shape) if here else None
        for mean, parameter, here in zip(means, parameters, found, strict=True)
    ]
