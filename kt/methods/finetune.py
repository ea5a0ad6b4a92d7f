"""Training on from the teacher's weights."""

from __future__ import annotations

from typing import Any

from kt.classifier import Classifier
from kt.methods.base import METHODS
from kt.methods.none import Scratch
from kt.phase import Phase, only
from kt.transfer import TransferModel


@METHODS.register_module(name="finetune")
class Finetune(Scratch):
    """Starts from the teacher's features with a fresh classifier and trains everything by the task loss.

    Args:
        student: The student, of the teacher's architecture.
        teacher: The teacher.
        head_lr_factor: Factor on the classifier's learning rate.
    """

    starts_from_teacher = True

    def __init__(self, student: Classifier, teacher: Classifier | None, head_lr_factor: float):
        super().__init__(student, teacher)
        self.head_lr_factor = head_lr_factor

    def phases(self) -> list[Phase]:
        """One phase with two parameter groups."""
        return [Phase("train", self.loss, trains=only(self._groups))]

    def _groups(self, model: TransferModel) -> list[dict[str, Any]]:
        head = list(model.student.head.classifier.parameters())
        ids = {id(parameter) for parameter in head}
        body = [parameter for parameter in model.student.parameters() if id(parameter) not in ids]
        return [{"params": body}, {"params": head, "lr_factor": self.head_lr_factor}]
