"""Training without transfer."""

from __future__ import annotations

from torch import Tensor

from kt.methods.base import METHODS, Method, task_alone
from kt.phase import Batch
from kt.transfer import TransferModel


@METHODS.register_module(name="none")
class Scratch(Method):
    """The task loss alone: baselines and teachers."""

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return task_alone(model, batch)

    def teacher_depth(self, model: TransferModel) -> int:
        """A teacher gives at most its weights, never a pass."""
        return 0
