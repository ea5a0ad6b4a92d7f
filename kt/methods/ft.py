"""Factor transfer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.features import Features
from kt.functional import factor_transfer, hint
from kt.methods.base import METHODS, Compared, Method
from kt.methods.blocks import match_size
from kt.phase import CONSTANT, Batch, Phase, only
from kt.stages import as_map
from kt.transfer import TransferModel


def _leaky_stack(channels: list[int], transposed: bool = False, normalised: bool = False) -> nn.Sequential:
    """3x3 convolutions between the given channel counts, each followed by an optional BN and a leaky ReLU."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers.append(kind(before, after, 3, padding=1))
        if normalised:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


@METHODS.register_module(name="ft")
class FactorTransfer(Method):
    """Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", 2018.

    A first phase trains the paraphraser, an autoencoder on the teacher's last map; then the student's translator
    imitates its factors.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the factor distance.
        factor: Factor channels as a share of the teacher's channels.
        init_fraction: Length of the paraphraser's phase as a share of the schedule.
        paraphraser_lr: Learning rate of that phase.
        form: `repdistiller` (normalised mean-square maps) or `official` (normalised raw factors).
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        weight: float,
        factor: float,
        init_fraction: float,
        paraphraser_lr: float,
        form: str,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weights = {"factor": weight}
        self.form = form
        self.init_fraction, self.paraphraser_lr = init_fraction, paraphraser_lr
        ours, theirs = student.stages[-1].channels, teacher.stages[-1].channels
        factors = max(1, int(theirs * factor))
        self.encoder = _leaky_stack([theirs, theirs, factors, factors])
        self.decoder = _leaky_stack([factors, factors, theirs, theirs], transposed=True)
        self.translator = _leaky_stack([ours, ours, factors, factors], normalised=True)

    def phases(self) -> list[Phase]:
        """Paraphraser, then student and translator."""
        return [
            Phase(
                "paraphraser",
                Compared(self, self.reconstruction),
                trains=only(self._autoencoder, lr=self.paraphraser_lr, **CONSTANT),
                fraction=self.init_fraction,
                evaluate=False,
            ),
            Phase("train", self.loss, trains=only(self._groups)),
        ]

    def _autoencoder(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*self.encoder.parameters(), *self.decoder.parameters()]}]

    def _groups(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*model.student.parameters(), *self.translator.parameters()]}]

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages, no head."""
        return len(model.teacher.stages)

    def reconstruction(self, ours: Features, theirs: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the autoencoder."""
        target = as_map(theirs.level(-1))
        return hint(self.decoder(self.encoder(target)), target), {}

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The distance of the factors."""
        with torch.no_grad():
            target = self.encoder(as_map(theirs.level(-1)))
        guess = match_size(self.translator(as_map(ours.level(-1))), target)
        return {"factor": factor_transfer(guess, target, form=self.form)}
