"""Relational knowledge distillation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kt.classifier import Classifier
from kt.errors import UserError
from kt.features import Features
from kt.functional import rkd_angle, rkd_distance
from kt.methods.base import METHODS, Method
from kt.phase import Batch
from kt.transfer import TransferModel


@METHODS.register_module(name="rkd")
class RelationalKnowledge(Method):
    """Park et al., "Relational Knowledge Distillation", CVPR 2019: distances and angles between samples of a batch.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the distance-wise loss.
        angle: Weight of the angle-wise loss over that of the distance-wise one.
    """

    def __init__(self, student: Classifier, teacher: Classifier | None, weight: float, angle: float):
        super().__init__(student, teacher)
        self.weight, self.angle = weight, angle

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages; of the head only what leads to the penultimate feature."""
        return len(model.teacher.stages)

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """Of distances and of angles.

        Raises:
            UserError: There is one image, and nothing to compare it with.
        """
        if len(batch["inputs"]) < 2:
            raise UserError("schedule.batch_size: method=rkd compares the images of a pass; expected two or more")
        feature, target = ours.pooled.float(), theirs.pooled.float()
        return {"distance": rkd_distance(feature, target), "angle": rkd_angle(feature, target)}

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """One weight for both; a product of the two weights would round otherwise."""
        return self.weight * (terms["distance"] + self.angle * terms["angle"])
