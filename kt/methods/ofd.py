"""The overhaul of feature distillation: a teacher's negative responses count only as far as a margin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.errors import UserError
from kt.features import Features
from kt.functional import negative_mean, partial_l2
from kt.methods.base import METHODS
from kt.methods.blocks import SMALL_IMAGE_STRIDE, LevelTransfer, match_size
from kt.phase import TRAIN, Loop, Phase
from kt.ranks import sum_over_ranks
from kt.transfer import TransferModel


@METHODS.register_module(name="ofd")
class FeatureOverhaul(LevelTransfer):
    """Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.

    Args:
        student: The student.
        teacher: The teacher. The released code leaves it in train mode, on purpose: see `kt.transfer.freeze_teacher`.
        weight: Weight of the sum over levels, each half as heavy as the next deeper one; None takes 1e-3 for networks
            for small images, else 1e-4.
        margin: Where a channel's margin comes from: `norm`, its normal distribution by the teacher's last normalisation
            (of a residual block, that of the branch alone), or `measured`, the mean of its negative responses to the
            training images.

    Raises:
        UserError: A margin is to come from a normalisation that the teacher does not have.
    """

    term = "overhaul"

    def __init__(self, student: Classifier, teacher: Classifier | None, weight: float | None, margin: str):
        if weight is None:
            weight = 1e-3 if student.stages[-1].stride <= SMALL_IMAGE_STRIDE else 1e-4
        super().__init__(student, teacher, weight, pooled=False)
        assert teacher is not None
        self.margin = margin
        self.connectors = nn.ModuleList()
        for number, (ours, theirs) in enumerate(zip(self.levels, self.target_levels, strict=True)):
            assert theirs.stage is not None
            stage = teacher.stages[theirs.stage]
            if margin == "norm" and (stage.last_norm is None or stage.last_norm.num_features != theirs.channels):
                raise UserError(
                    f"method.margin=norm: the teacher's stage {stage.name} does not end in a batch normalisation of "
                    f"its {theirs.channels} channels; expected measured"
                )
            convolution = nn.Conv2d(ours.channels, theirs.channels, 1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(theirs.channels)))
            self.register_buffer(f"margin{number}", torch.zeros(1, theirs.channels, 1, 1))

    @property
    def margins(self) -> list[Tensor]:
        """Of each level, (1, c_t, 1, 1)."""
        return [self.get_buffer(f"margin{number}") for number in range(len(self.levels))]

    def phases(self) -> list[Phase]:
        """The margins are found before the first epoch."""
        return [Phase("train", self.loss, before_epoch=self._before_epoch)]

    def _before_epoch(self, model: TransferModel, loop: Loop) -> None:
        if loop.epoch == 0:
            found = self.of_norms(model) if self.margin == "norm" else self.of_images(model, loop)
            for margin, values in zip(self.margins, found, strict=True):
                margin.copy_(values.view_as(margin))

    def of_norms(self, model: TransferModel) -> list[Tensor]:
        """Margins (c_t,) by scale and shift of the teacher's normalisations."""
        norms = [model.teacher.stages[level.stage].last_norm for level in self.target_levels]
        return [negative_mean(norm.bias.detach(), norm.weight.detach()) for norm in norms]

    def of_images(self, model: TransferModel, loop: Loop) -> list[Tensor]:
        """Margins (c_t,) by one pass over the unaugmented training images; 0 where no response is negative."""
        # Of each level: the sum of a channel's negative responses, and their number.
        sums = [torch.zeros(2, level.channels, dtype=torch.float64, device=loop.device) for level in self.target_levels]
        with loop.autocast():
            for raw in loop.loaders[TRAIN].plain().epoch(0):
                theirs = Features(model.teacher, model.student.prepare(raw)["inputs"], graph=False)
                for total, level in zip(sums, self.target_levels, strict=True):
                    negative = theirs.at(level).double().clamp(max=0)
                    total += torch.stack((negative.sum((0, 2, 3)), (negative < 0).sum((0, 2, 3))))
        return [total / count.clamp(min=1) for total, count in map(sum_over_ranks, sums)]

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """The sum over levels, each half as heavy as the next deeper one."""
        total = theirs[0].new_zeros(())
        for connector, feature, target, margin in zip(self.connectors, ours, theirs, self.margins, strict=True):
            total = total / 2 + partial_l2(match_size(connector(feature), target), target, margin)
        return total
