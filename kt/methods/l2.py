"""Plain L2 on the last stage's maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt.errors import UserError
from kt.features import Features
from kt.functional import feature_l2
from kt.methods.base import METHODS, Method, Student, Teacher
from kt.methods.blocks import match_size
from kt.phase import Batch
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
        self.weights = {"l2": REDUCTIONS[reduction] if weight is None else weight}
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

    def ask(self, ours: Features, theirs: Features) -> None:
        """Asks for the last stages' pre-activations."""
        if self.preactivation:
            ours.before(-1), theirs.before(-1)

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The distance."""
        guess, target = (as_map(each.before(-1) if self.preactivation else each.level(-1)) for each in (ours, theirs))
        if self.adapter is not None:
            guess = self.adapter(guess)
        guess = match_size(guess, target)
        return {"l2": feature_l2(guess, target[:, : guess.shape[1]], self.reduction)}


def widening(ours: int, theirs: int) -> nn.Conv2d:
    """A 1x1 convolution between channel counts that starts as the identity on the channels that both have."""
    adapter = nn.Conv2d(ours, theirs, 1)
    shared = min(ours, theirs)
    with torch.no_grad():
        adapter.weight[:shared, :, 0, 0] = torch.eye(shared, ours)
        adapter.bias.zero_()  # type: ignore[union-attr]
    return adapter
