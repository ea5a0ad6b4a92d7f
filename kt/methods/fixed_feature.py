"""Learning a fresh classifier on features that were learnt before and stay fixed.

Source: "Feature Matters: A Stage-by-Stage Approach for Task Independent Knowledge Transfer", section 4.2: a network is
trained end to end, its classifier is drawn anew, its features are frozen, and the rest is trained once more.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kt.classifier import Classifier
from kt.methods.base import METHODS, task_alone
from kt.methods.blocks import pair_blocks, parameters_outside
from kt.methods.none import Scratch
from kt.phase import Batch, Phase, only
from kt.transfer import TransferModel


def count_frozen(student: Classifier, part: str) -> int:
    """How many stages, from the first, a part of a network has: `features` all, `first_block` those of the first."""
    return len(student.stages) if part == "features" else pair_blocks(student.stages, student.stages)[0][0] + 1


@METHODS.register_module(name="fixed_feature")
class FixedFeature(Scratch):
    """Takes the features of a trained network of the same architecture and trains the rest by the task loss.

    Args:
        student: The student, of the teacher's architecture; its classifier is fresh.
        teacher: The trained network.
        frozen: What stays fixed: all `features`, or the `first_block` alone.
    """

    starts_from_teacher = True

    def __init__(self, student: Classifier, teacher: Classifier | None, frozen: str):
        super().__init__(student, teacher)
        self.count = count_frozen(student, frozen)

    def phases(self) -> list[Phase]:
        """The only one: what is not frozen."""
        return [Phase("train", self.loss, trains=only(self._rest))]

    def _rest(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": parameters_outside(model.student, model.student.stages[: self.count])}]

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return task_alone(model, batch, self.count)
