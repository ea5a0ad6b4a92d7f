"""Learning a fresh classifier on features that were learnt before and stay fixed.

Source: "Feature Matters: A Stage-by-Stage Approach for Task Independent Knowledge Transfer", section 4.2: a network is
trained end to end, its classifier is drawn anew, its features are frozen, and the rest is trained once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kt.baselines.logits import KnowledgeDistillation
from kt.baselines.plain import Scratch
from kt.classifier import Classifier
from kt.methods.base import METHODS
from kt.methods.blocks import pair_blocks, parameters_outside
from kt.phase import Batch, Phase, only, student_alone
from kt.transfer import TransferModel, evaluating


def count_frozen(student: Classifier, part: str) -> int:
    """How many stages, from the first, a part of a network has: `features` all, `first_block` those of the first."""
    return len(student.stages) if part == "features" else pair_blocks(student.stages, student.stages)[0][0] + 1


def extract_on_frozen(student: Classifier, inputs: Tensor, count: int) -> list[Tensor]:
    """Stage outputs, the first `count` of them from frozen stages."""
    with evaluating(*student.stages[:count]):
        levels = student.extract(inputs, count)
    for stage in student.stages[count:]:
        levels.append(stage(levels[-1]))
    return levels


@METHODS.register_module(name="fixed_feature")
class FixedFeature(Scratch):
    """Takes the features of a trained network of the same architecture and trains the rest by the task loss.

    Args:
        student: The student, of the teacher's architecture; its classifier is fresh.
        teacher: The trained network.
        frozen: What stays fixed: all `features`, or the `first_block` alone.
    """

    needs_teacher = True
    starts_from_teacher = True
    dense = False

    def __init__(self, student: Classifier, teacher: Classifier | None, frozen: str):
        super().__init__(student, teacher)
        self.count = count_frozen(student, frozen)

    def phases(self) -> list[Phase]:
        """The only one: what is not frozen."""
        return [Phase("train", self.loss, trains=only(self._rest))]

    def _rest(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": parameters_outside(model.student, model.student.stages[: self.count])}]

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = model.student.task(extract_on_frozen(model.student, batch["inputs"], self.count), batch)
        return output.loss, output.scalars

    def teacher_depth(self, model: TransferModel) -> int:
        """The teacher gives its weights, never a pass."""
        return 0


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
            Phase("kd", self.whole, trains=only(student_alone)),
            Phase("train", self.loss, trains=only(self._rest), enter=self.draw_classifier),
        ]

    def whole(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of KD."""
        return super().loss(model, batch)

    @torch.no_grad()
    def draw_classifier(self, model: TransferModel) -> None:
        """Replaces the classifier's weights by fresh ones."""
        for name, value in model.student.head.classifier.state_dict().items():
            value.copy_(getattr(self, f"fresh_{name}"))

    def _rest(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": parameters_outside(model.student, model.student.stages[: self.count])}]

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        levels = extract_on_frozen(model.student, batch["inputs"], self.count)
        if self.retrain == "kd":
            return self.distil(model, levels, batch)
        output = model.student.task(levels, batch)
        return output.loss, output.scalars

    def teacher_depth(self, model: TransferModel) -> int | None:
        """The second phase asks the teacher only for soft targets."""
        return None if self.retrain == "kd" else 0
