"""FitNets: a student's map regresses the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kt.dense import DenseModel
from kt.errors import UserError
from kt.features import Features
from kt.functional import hint
from kt.methods.base import METHODS, Student, Teacher
from kt.methods.blocks import MapTransfer, as_it_is, initialisation, match_size
from kt.methods.kd import KnowledgeDistillation
from kt.phase import Batch, Loss, Phase, only, student_alone
from kt.transfer import TransferModel


@METHODS.register_module(name="fitnet")
class FitNet(MapTransfer):
    """Romero et al., "FitNets: Hints for Thin Deep Nets", 2015: one stage's map regresses the teacher's, or several do.

    The paper trains in two stages: the student up to the guided layer by the hint alone, then all of it by KD (which
    has the weights of `kt.methods.kd` here; the paper lowers that of the soft target from 4 to 1). With
    `init_fraction=None` there is one, as in the field's later comparisons: the hint beside the cross-entropy.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum of the hints (mean squared errors).
        hint_layer: Index of the student's stage; None takes the middle one, -1 the last. Several, or a name of
            `choose_pairs`, give as many hints.
        regressor: `conv_bn_relu` (1x1 convolution, batch normalisation, ReLU), `conv`, or `none` or `first`, see
            `as_it_is`.
        init_fraction: Length of the first stage as a share of the schedule; None leaves it out.
        temperature: Of KD after the first stage.
        alpha: Weight of its soft target.
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
        init_fraction: float | None,
        temperature: float,
        alpha: float,
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
            if not regressor.startswith("conv"):
                self.regressors.append(as_it_is(regressor, ours, theirs, "method.regressor"))
                continue
            layers: list[nn.Module] = [nn.Conv2d(ours, theirs, 1)]
            if regressor == "conv_bn_relu":
                layers += [nn.BatchNorm2d(theirs), nn.ReLU()]
            self.regressors.append(nn.Sequential(*layers))
        self.init_fraction = init_fraction
        self.kd: KnowledgeDistillation | None = None
        if init_fraction is not None:
            if isinstance(student, DenseModel):
                raise UserError(f"method.init_fraction={init_fraction}: expected null; KD teaches classifiers only")
            self.kd = KnowledgeDistillation(student, teacher, temperature, alpha, task_weight=1.0)

    def phases(self) -> list[Phase]:
        """The hint beside the task, or the hint and then KD."""
        if self.init_fraction is None:
            return super().phases()
        return [
            initialisation("hint", self, self.hints, self.pairs, self.regressors, self.init_fraction),
            Phase("train", self.loss, trains=only(student_alone)),
        ]

    @property
    def loss(self) -> Loss:
        """The main phase's."""
        return super().loss if self.kd is None else self.kd.loss

    def teacher_depth(self, model: TransferModel) -> int | None:
        """Up to the last pair, or what KD needs."""
        return super().teacher_depth(model) if self.kd is None else self.kd.teacher_depth(model)

    def hints(self, ours: Features, theirs: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted hints alone."""
        return self.weighted(self.terms(ours, theirs, batch)), {}

    def distance(self, number: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """The mean squared error of the regressed map."""
        guess = match_size(self.regressors[number](ours), theirs)
        return hint(guess, theirs[:, : guess.shape[1]])
