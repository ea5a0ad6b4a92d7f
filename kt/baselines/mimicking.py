"""Baselines on the last stage's features: plain L2, route-constrained L2, and relations between samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt.baselines.features import match_size
from kt.classifier import Classifier
from kt.errors import UserError
from kt.functional import feature_l2, rkd_angle, rkd_distance
from kt.methods.base import METHODS, Method, Student, Teacher
from kt.phase import Batch, Loop, Phase
from kt.stages import as_map
from kt.transfer import TransferModel

REDUCTIONS = {"mean": 100.0, "sum": 1e-4}  # the weight that goes with each


@METHODS.register_module(name="l2")
class FeatureL2(Method):
    """The squared L2 distance of the last stage's maps before their last ReLU.

    The baseline of knowledge consistent distillation: channel i of the teacher teaches channel i of the student.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the distance; None takes 100 for `mean` and 1e-4 for `sum`.
        reduction: `mean` over all elements, or `sum` per image.
        match: What happens where the teacher has other channels: `rectangular` takes as many of its first ones as the
            student has, `adapter` brings the student's to the teacher's by a 1x1 convolution that only the loss sees,
            which starts as the identity on the channels that both have.
        preactivation: Compare before the last ReLU of the stage, where there is one.
    """

    dense = True
    compares_channels = True

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weight: float | None,
        reduction: str,
        match: str,
        preactivation: bool,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weight = REDUCTIONS[reduction] if weight is None else weight
        self.reduction, self.preactivation = reduction, preactivation
        ours, theirs = student.stages[-1].channels, teacher.stages[-1].channels
        self.adapter: nn.Module | None = None
        if match == "adapter" and ours != theirs:
            self.adapter = widening(ours, theirs)
        elif theirs < ours:
            raise UserError(
                f"method.match={match}: the teacher's last stage has {theirs} channels and the student's {ours}; "
                "expected match=adapter where the teacher has fewer"
            )

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages, no head."""
        return len(model.teacher.stages)

    def source(self, model: TransferModel) -> Teacher:
        """The network whose maps are the target."""
        return model.teacher

    def distance(self, model: TransferModel, batch: Batch, student: Tensor) -> Tensor:
        """The distance of a student's map from the target for this batch."""
        with torch.no_grad():
            levels = self.source(model).extract_both(batch["inputs"])[0 if self.preactivation else 1]
        target, guess = as_map(levels[-1]), as_map(student)
        if self.adapter is not None:
            guess = self.adapter(guess)
        guess = match_size(guess, target)
        return feature_l2(guess, target[:, : guess.shape[1]], self.reduction)

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        before, after = model.student.extract_both(batch["inputs"])
        output = model.student.task(after, batch)
        distance = self.distance(model, batch, (before if self.preactivation else after)[-1])
        logged = {"loss_task": output.loss, "loss_l2": distance, **output.scalars}
        return output.loss + self.weight * distance, logged


def widening(ours: int, theirs: int) -> nn.Conv2d:
    """A 1x1 convolution between channel counts that starts as the identity on the channels that both have."""
    adapter = nn.Conv2d(ours, theirs, 1)
    shared = min(ours, theirs)
    with torch.no_grad():
        adapter.weight[:shared, :, 0, 0] = torch.eye(shared, ours)
        adapter.bias.zero_()  # type: ignore[union-attr]
    return adapter


@METHODS.register_module(name="rco")
class RouteConstrained(FeatureL2):
    """Jin et al., "Knowledge Distillation via Route Constrained Optimization", ICCV 2019: the teacher's own route.

    The targets come from a sequence of anchors, snapshots of the teacher's training, each for an equal share of the
    epochs; the last one is the teacher. Here the anchors are imitated in their maps, as the knowledge consistent
    distillation paper's comparison does, and the learning rate follows one schedule over all of them, so that the
    length is that of the other methods.

    Args: those of `l2`. The model is handed the earlier anchors beside `teacher`, as `anchor0`, `anchor1`, ...
    """

    def __init__(self, *args: object, **options: object):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.anchor = "teacher"

    def route(self, model: TransferModel) -> list[str]:
        """The names of a model's anchors, in order.

        Raises:
            UserError: There are none but the teacher.
        """
        anchors = sorted((name for name in model.teachers if name.startswith("anchor")), key=lambda name: int(name[6:]))
        if not anchors:
            raise UserError(
                "method=rco: expected snapshots of the teacher's training; a teacher from a checkpoint has none: let "
                "it be trained (teacher.checkpoint=null teacher.pretrained=null)"
            )
        return [*anchors, "teacher"]

    def phases(self) -> list[Phase]:
        """One phase, whose target changes between epochs."""
        return [Phase("train", self.loss, before_epoch=self.choose_anchor)]

    def choose_anchor(self, model: TransferModel, loop: Loop) -> None:
        """The anchor of an epoch: anchors share the epochs equally."""
        route = self.route(model)
        self.anchor = route[loop.epoch * len(route) // loop.max_epochs]

    def source(self, model: TransferModel) -> Teacher:
        """The current anchor."""
        return model.teachers[self.anchor]  # type: ignore[return-value]


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

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        levels = model.student.extract(batch["inputs"])
        output = model.student.task(levels, batch)
        with torch.no_grad():
            target = model.teacher.head.pooled(model.teacher.extract(batch["inputs"])[-1]).float()
        feature = model.student.head.pooled(levels[-1]).float()
        distance, angle = rkd_distance(feature, target), rkd_angle(feature, target)
        logged = {"loss_task": output.loss, "loss_distance": distance, "loss_angle": angle, **output.scalars}
        return output.loss + self.weight * (distance + self.angle * angle), logged
