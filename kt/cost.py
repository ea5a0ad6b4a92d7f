"""What training costs, counted: floating-point operations of a phase's forward and backward pass."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from kt.engine import Engine, measured_loop
from kt.phase import Batch, Phase
from kt.settings import Schedule, defaults
from kt.transfer import TransferModel

IMAGES = 2  # the least that batch normalisation can work with


def few_images(batch: Mapping[str, Any]) -> Batch:
    """The first images of a loader's batch, which are all that counting needs."""
    return {key: value[:IMAGES] for key, value in batch.items()}


def count_flops(model: TransferModel, phase: Phase, batch: Batch) -> float:
    """Floating-point operations per image of one step of a phase: student and teacher, forward and backward.

    Convolutions and matrix products are counted, a multiplication and an addition as two, as torch's counter does;
    the update is not. The model ends with moved running statistics and the phase's parameters open: count on
    a copy.

    Args:
        model: The model.
        phase: One of its phases.
        batch: As a loader yields it; it may be short, see `few_images`.
    """
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        # Weights stay as they are, so that the phases counted next do what these networks do.
        loop = measured_loop(model, phase, batch, Engine({**defaults(Schedule), "lr": 0.0}, device, Path(folder)))
        with FlopCounterMode(display=False) as counter:
            loop.step(batch)
    return counter.get_total_flops() / len(batch["inputs"])
