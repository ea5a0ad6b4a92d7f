"""FitNets: a student's map regresses the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kt.functional import hint
from kt.methods.base import METHODS, Student, Teacher
from kt.methods.blocks import MapTransfer, match_size


@METHODS.register_module(name="fitnet")
class FitNet(MapTransfer):
    """Romero et al., "FitNets: Hints for Thin Deep Nets", 2015: one stage's map regresses the teacher's, or several do.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum of the hints (mean squared errors).
        hint_layer: Index of the student's stage; None takes the middle one, -1 the last. Several, or a name of
            `choose_pairs`, give as many hints.
        regressor: `conv_bn_relu` (1x1 convolution, batch normalisation, ReLU) or `conv`.
    """

    compares_channels = True
    term = "hint"
    stages_key = "method.hint_layer"

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weight: float,
        hint_layer: int | str | Sequence[int] | None,
        regressor: str,
    ):
        if hint_layer is None:
            hint_layer = len(student.stages) // 2
        if hint_layer == -1:
            hint_layer = "last"
        super().__init__(student, teacher, weight, [hint_layer] if isinstance(hint_layer, int) else hint_layer)
        assert teacher is not None
        self.regressors = nn.ModuleList()
        for i, j in self.pairs:
            ours, theirs = student.stages[i].channels, teacher.stages[j].channels
            layers: list[nn.Module] = [nn.Conv2d(ours, theirs, 1)]
            if regressor == "conv_bn_relu":
                layers += [nn.BatchNorm2d(theirs), nn.ReLU()]
            self.regressors.append(nn.Sequential(*layers))

    def distance(self, number: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """The mean squared error of the regressed map."""
        return hint(match_size(self.regressors[number](ours), theirs), theirs)
