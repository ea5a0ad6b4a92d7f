"""KD, then a fresh classifier on the features that it gave; the source is that of `fixed_feature`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.features import Features
from kt.methods.base import METHODS, Compared, task_alone
from kt.methods.blocks import parameters_outside
from kt.methods.fixed_feature import count_frozen
from kt.methods.kd import KnowledgeDistillation
from kt.phase import Batch, Phase, only, student_alone
from kt.transfer import TransferModel


@METHODS.register_module(name="kd_fixed_feature")
class DistilledFixedFeature(KnowledgeDistillation):
    """KD of the whole student, then a fresh classifier on the features that it has learnt.

    The first phase is `kd` itself: of the same seed it gives the same weights to the bit.

    Args:
        student: The student.
        teacher: A teacher with the same classes.
        temperature, alpha, task_weight: Those of `kd`.
        frozen: What stays fixed in the second phase: all `features`, or the `first_block` alone.
        retrain: What the second phase trains by: `kd` (the same loss) or `task`. The paper says "the same experiment".
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        temperature: float,
        alpha: float,
        task_weight: float,
        frozen: str,
        retrain: str,
    ):
        super().__init__(student, teacher, temperature, alpha, task_weight)
        self.count, self.retrain = count_frozen(student, frozen), retrain
        classifier = student.head.classifier
        fresh = nn.Linear(classifier.in_features, classifier.out_features, classifier.bias is not None)
        # Drawn now, when the random state follows from the seed whatever a resumed run has skipped.
        for name, value in fresh.state_dict().items():
            self.register_buffer(f"fresh_{name}", value.clone())

    def phases(self) -> list[Phase]:
        """KD, then what is not frozen."""
        return [
            Phase("kd", Compared(self, self.compare), trains=only(student_alone)),
            Phase("train", self.loss, trains=only(self._rest), enter=self.draw_classifier),
        ]

    @torch.no_grad()
    def draw_classifier(self, model: TransferModel) -> None:
        """Replaces the classifier's weights by fresh ones."""
        for name, value in model.student.head.classifier.state_dict().items():
            value.copy_(getattr(self, f"fresh_{name}"))

    def _rest(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": parameters_outside(model.student, model.student.stages[: self.count])}]

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.retrain == "task":
            return task_alone(model, batch, self.count)
        _, theirs = self.features(model, batch)
        return self.compare(Features(model.student, batch["inputs"], frozen=self.count), theirs, batch)

    def teacher_depth(self, model: TransferModel) -> int | None:
        """The second phase asks the teacher only for soft targets."""
        return None if self.retrain == "kd" else 0
