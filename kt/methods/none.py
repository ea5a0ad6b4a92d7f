"""Training without transfer."""

from __future__ import annotations

from torch import Tensor

from kt.methods.base import METHODS, Method, task_alone
from kt.phase import Batch
from kt.transfer import TransferModel


@METHODS.register_module(name="none")
class Scratch(Method):
    """The task loss alone: baselines and teachers."""

    needs_teacher = False
    dense = True

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return task_alone(model, batch)
