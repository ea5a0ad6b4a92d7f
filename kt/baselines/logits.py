"""KD: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015."""

from __future__ import annotations

import torch
from torch import Tensor

from kt.classifier import Classifier
from kt.errors import UserError
from kt.functional import soft_target
from kt.methods.base import METHODS, Method
from kt.phase import Batch
from kt.transfer import TransferModel


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
        self.temperature, self.alpha, self.task_weight = temperature, alpha, task_weight

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.distil(model, model.student.extract(batch["inputs"]), batch)

    def distil(self, model: TransferModel, levels: list[Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses of the head on stage outputs, whichever of the stages are frozen."""
        output = model.student.task(levels, batch)
        with torch.no_grad():
            target = model.teacher(batch["inputs"])
        soft = soft_target(output.logits.float(), target.float(), self.temperature)
        logged = {"loss_task": output.loss, "loss_soft": soft, **output.scalars}
        return self.task_weight * output.loss + self.alpha * soft, logged
