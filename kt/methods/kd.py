"""KD: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from kt.classifier import Classifier
from kt.dense import DenseModel
from kt.errors import UserError
from kt.features import Features
from kt.functional import soft_target
from kt.methods.base import METHODS, Method, Student, Teacher
from kt.phase import Batch


def check_classes(student: Classifier, teacher: Classifier, key: str) -> None:
    """Refuses a teacher whose scores are of other classes than the student's.

    Args:
        student: The student.
        teacher: Its teacher.
        key: What asks for soft targets.

    Raises:
        UserError: Says how many there are.
    """
    ours, theirs = (network.head.classifier.out_features for network in (student, teacher))
    if ours != theirs:
        raise UserError(
            f"{key}: the teacher knows {theirs} classes, the student {ours}; soft targets need the same ones"
        )


@METHODS.register_module(name="kd")
class KnowledgeDistillation(Method):
    """The task's loss and the soft targets of the teacher.

    A depth network has no distributions to soften: there the teacher's depth is a second truth, which every pixel has
    and which has the task's own measure, the mean absolute difference (Deng et al., DistPro, section 4.3).

    Args:
        student: The student.
        teacher: A teacher with the same classes, or a depth network for one.
        temperature: Softens both distributions; the loss contains its square.
        alpha: Weight of the soft targets.
        task_weight: Weight of the task's loss.

    Raises:
        UserError: The teacher gives another kind of answer.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        temperature: float,
        alpha: float,
        task_weight: float,
    ):
        super().__init__(student, teacher)
        self.temperature = temperature
        self.weights = {"task": task_weight, "soft": alpha}
        if isinstance(student, DenseModel):
            if not (isinstance(teacher, DenseModel) and teacher.gives_depth):
                raise UserError("method=kd: the teacher gives no depth; expected a depth network, as the student is")
            return
        # Or a view of one, as knowledge consistent distillation has it.
        check_classes(student, cast(Classifier, teacher), "method=kd")

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The soft targets."""
        if isinstance(ours.network, DenseModel):
            return {"soft": (ours.depth - theirs.depth).abs().mean()}
        return {"soft": soft_target(ours.logits.float(), theirs.logits.float(), self.temperature)}
