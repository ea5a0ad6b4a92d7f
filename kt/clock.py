"""What time it is for what a device computes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a clock, once a GPU has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
