"""KD: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015."""

from __future__ import annotations

from torch import Tensor

from kt.classifier import Classifier
from kt.errors import UserError
from kt.features import Features
from kt.functional import soft_target
from kt.methods.base import METHODS, Method
from kt.phase import Batch


@METHODS.register_module(name="kd")
class KnowledgeDistillation(Method):
    """Cross-entropy and the soft targets of the teacher.

    Args:
        student: The student.
        teacher: A teacher with the same classes.
        temperature: Softens both distributions; the loss contains its square.
        alpha: Weight of the soft targets.
        task_weight: Weight of the cross-entropy.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        temperature: float,
        alpha: float,
        task_weight: float,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        ours, theirs = student.head.classifier.out_features, teacher.head.classifier.out_features
        if ours != theirs:
            raise UserError(
                f"method=kd: the teacher knows {theirs} classes, the student {ours}; soft targets need the same ones"
            )
        self.temperature = temperature
        self.weights = {"task": task_weight, "soft": alpha}

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The soft targets."""
        return {"soft": soft_target(ours.logits.float(), theirs.logits.float(), self.temperature)}
