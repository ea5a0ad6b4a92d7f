"""Activation boundaries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.features import Features
from kt.functional import activation_boundary, soft_target
from kt.methods.base import METHODS, Method
from kt.methods.blocks import as_it_is, choose_pairs, initialisation, match_size
from kt.methods.kd import check_classes
from kt.phase import Batch, Phase, only, student_alone
from kt.stages import as_map
from kt.transfer import TransferModel


@METHODS.register_module(name="ab")
class ActivationBoundary(Method):
    """Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI 2019.

    A first phase pulls the student's pre-activations to the teacher's side of zero, without a task loss; then the
    student trains by cross-entropy (or by soft targets alone, as the authors' code does).

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the boundary loss on top of the released code's scale (see `boundary`).
        margin: How far beyond zero.
        init_fraction: Length of the first phase as a share of the schedule.
        after: `task` or `kd`.
        temperature: Of the soft targets, if `after` is `kd`.
        stages: `all` or `last`.
        connector: `conv_bn` (1x1 convolution, batch normalisation), or `none` or `first`, see `as_it_is`.
    """

    compares_channels = True

    # The released CIFAR-100 code divides the sum over three stages by 1000 and multiplies it by 3.
    SCALE = 3 / 1000

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        weight: float,
        margin: float,
        init_fraction: float,
        after: str,
        temperature: float,
        stages: str,
        connector: str,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weight, self.margin, self.init_fraction = weight, margin, init_fraction
        self.after, self.temperature = after, temperature
        if after == "kd":
            check_classes(student, teacher, "method.after=kd")
            self.weights = {"task": 0.0, "soft": 1.0}
        self.pairs = choose_pairs(student, teacher, stages)
        self.connectors = nn.ModuleList()
        for i, j in self.pairs:
            ours, theirs = student.stages[i].channels, teacher.stages[j].channels
            if connector == "conv_bn":
                self.connectors.append(nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs)))
            else:
                self.connectors.append(as_it_is(connector, ours, theirs, "method.connector"))

    def phases(self) -> list[Phase]:
        """Boundaries, then the task."""
        return [
            initialisation("boundaries", self, self.boundary, self.pairs, self.connectors, self.init_fraction),
            Phase("train", self.loss, trains=only(student_alone)),
        ]

    def teacher_depth(self, model: TransferModel) -> int | None:
        """The main phase asks the teacher only for soft targets."""
        return None if self.after == "kd" else 0

    def boundary(self, ours: Features, theirs: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over stages, each half as heavy as the next deeper one."""
        total = torch.zeros((), device=batch["inputs"].device)
        for number, ((i, j), connector) in enumerate(zip(self.pairs, self.connectors, strict=True), 1):
            target = as_map(theirs.before(j))
            guess = match_size(connector(as_map(ours.before(i))), target)
            missed = activation_boundary(guess, target[:, : guess.shape[1]], self.margin)
            total = total + 2.0 ** (number - len(self.pairs)) * missed
        return self.weight * self.SCALE * total, {}

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """None, or the soft targets, which replace the task's loss."""
        if self.after == "task":
            return {}
        return {"soft": soft_target(ours.logits.float(), theirs.logits.float(), self.temperature)}
