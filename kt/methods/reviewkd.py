"""Knowledge review: every level of the student, fused with all deeper ones, learns a level of the teacher.

What the released code has otherwise on CIFAR: a wide ResNet's last map there is the sum before its last normalisation,
here what is behind its ReLU, and the ramp rises once an epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.features import Features
from kt.functional import hierarchical_context
from kt.methods.base import METHODS, Student, Teacher
from kt.methods.blocks import LevelTransfer, nearest_size
from kt.phase import Batch


class Fusion(nn.Module):
    """Attention-based fusion (fig. 3a) of a student's map with what came of the next deeper one.

    Args:
        ours: Channels of the student's map.
        width: Channels of the fused map.
        theirs: Channels of the teacher's map.
        deepest: Whether there is no deeper map.
    """

    def __init__(self, ours: int, width: int, theirs: int, deepest: bool):
        super().__init__()
        self.narrow = _convolution(ours, width, 1)
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.widen = _convolution(width, theirs, 3)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The guess (n, theirs, *size) at the teacher's map, and the fused map (n, width, *size)."""
        x = self.narrow(feature)
        if self.attention is not None and deeper is not None:
            y = nearest_size(deeper, x.shape[2:])
            gates = torch.sigmoid(self.attention(torch.cat((x, y), 1)))
            x = x * gates[:, :1] + y * gates[:, 1:]
        x = nearest_size(x, size)
        return self.widen(x), x


def _convolution(before: int, after: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))


@METHODS.register_module(name="reviewkd")
class KnowledgeReview(LevelTransfer):
    """Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.

    Args:
        student: The student; a classifier's pooled feature is the last level.
        teacher: The teacher.
        weight: Weight of the sum of the hierarchical context losses.
        ramp: Share of the length over which the weight rises from 0.
        preactivation: Whether the student's maps are read before their last ReLU, as the teacher's are.
        width: Channels of the fused maps; None takes as many as the student's last level has, at most 512.
    """

    term = "review"

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weight: float,
        ramp: float,
        preactivation: bool,
        width: int | None,
    ):
        pooled = isinstance(student, Classifier)
        super().__init__(student, teacher, weight, pooled, preactivation)
        self.ramp = ramp
        width = width or min(512, self.levels[-1].channels)
        self.fusions = nn.ModuleList(
            Fusion(ours.channels, width, theirs.channels, deepest=ours is self.levels[-1])
            for ours, theirs in zip(self.levels, self.target_levels, strict=True)
        )

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """The sum over levels, which are fused from the deepest one on."""
        total, fused = theirs[0].new_zeros(()), None
        for fusion, feature, target in reversed(list(zip(self.fusions, ours, theirs, strict=True))):
            guess, fused = fusion(feature, fused, target.shape[2:])
            total = total + hierarchical_context(guess, target)
        return total

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The distance, times how far the ramp has risen."""
        share = min(1.0, batch["step"] / (self.ramp * batch["total"])) if self.ramp else 1.0
        return {name: share * term for name, term in super().terms(ours, theirs, batch).items()}
