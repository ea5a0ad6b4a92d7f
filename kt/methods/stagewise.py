"""Stage by stage: the student learns the teacher's maps one stage after the other, then its head learns the task.

"Feature Matters: A Stage-by-Stage Approach for Task Independent Knowledge Transfer", ICLR 2019 submission, anonymous.

Phase i of K trains student stage i alone to give the teacher's map at the same place (l2 distance, eq. 7), on what the
student's own frozen stages before it make of the image; the final phase trains only the head by the task's own loss on
the frozen features. No phase mixes the two losses, and none after the K-th asks the teacher for anything.

What the paper leaves open, and the choice here:

- Where the networks are cut: at the down-sampling layers, as stated. A stem belongs to the first block, so that a
  ResNet has the paper's four blocks with either stem (`cut_at`).
- How long a phase is: "besides the number of stages, we keep all other hyper-parameters same", so a phase is as long as
  a whole training and has a learning-rate schedule of its own (`phase_length: full`); `split` shares one length among
  the K phases.
- Frozen stages run in eval mode and without a graph: neither weights nor running statistics change by one bit. The
  teacher runs as deep as the phase reads it.
- Channels that differ: a 1x1 convolution on the student's side that only the loss sees. Sizes that differ: bilinear.
- The l2 distance is the mean over all elements.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from kt.cost import count_flops
from kt.errors import UserError
from kt.features import Features
from kt.functional import hint
from kt.methods.base import METHODS, Method, Student, Teacher, task_alone
from kt.methods.blocks import match_size, pair_blocks, parameters_of, parameters_outside
from kt.phase import Batch, Phase, only, student_alone
from kt.stages import Stage, as_map
from kt.transfer import TransferModel, evaluating

PHASE_LENGTHS = ("full", "split")


def blocks_with_parameters(stages: Sequence[Stage], blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Blocks in which something can be trained; one that the student itself keeps frozen joins the next.

    Raises:
        UserError: Nothing can be trained at the end.
    """
    kept: list[tuple[int, int]] = []
    for block in blocks:
        first = kept[-1][0] + 1 if kept else 0
        if any(parameter.requires_grad for parameter in parameters_of(stages[first : block[0] + 1])):
            kept.append(block)
    if kept[-1:] != [blocks[-1]]:
        raise UserError("student: it keeps its last stage frozen, so there are no features to train")
    return kept


def merge_from_the_end(blocks: Sequence[tuple[int, int]], stages: int | None) -> list[tuple[int, int]]:
    """K blocks out of more: the last K-th and all behind it become one, known by its last pair.

    Args:
        blocks: `(student stage, teacher stage)` at the end of each block.
        stages: K; None keeps all.

    Raises:
        UserError: There are fewer than K.
    """
    if stages is not None and not 1 <= stages <= len(blocks):
        raise UserError(
            f"method.stages={stages}: expected 1 to {len(blocks)}, the blocks that student and teacher have in common"
        )
    count = stages or len(blocks)
    return [*blocks[: count - 1], blocks[-1]]


@METHODS.register_module(name="stagewise")
class Stagewise(Method):
    """Stage-by-stage feature transfer for a student-teacher pair.

    Args:
        student: The student; of a detector or segmentor the backbone mimics, and neck and heads train last.
        teacher: The teacher.
        stages: K, how many phases the features take: 1 is end-to-end mimicking, 2 the first block and then the rest.
            None takes as many as there are blocks.
        cut_at: Nominal strides at whose ends the networks are cut; None for those of the blocks.
        phase_length: `full` (each feature phase as long as the schedule) or `split` (all K together as long as it).
        head_length: Length of the final phase as a share of the schedule.

    Raises:
        UserError: The pair has not that many blocks, or the teacher gives no map at the end of the student's features.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        stages: int | None,
        cut_at: Sequence[int] | None,
        phase_length: str,
        head_length: float,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        if phase_length not in PHASE_LENGTHS:
            raise UserError(f"method.phase_length={phase_length!r}: expected one of {', '.join(PHASE_LENGTHS)}")
        blocks = pair_blocks(student.stages, teacher.stages, cut_at)
        last = student.stages[-1].stride
        if student.stages[blocks[-1][0]].stride != last:
            key = "teacher" if cut_at is None else f"method.cut_at={list(cut_at)}"
            raise UserError(f"{key}: expected a stage of stride {last}, where the student's features end")
        self.blocks = merge_from_the_end(blocks_with_parameters(student.stages, blocks), stages)
        self.phase_length, self.head_length = phase_length, head_length
        self.adapters = nn.ModuleList()
        for i, j in self.blocks:
            ours, theirs = student.stages[i].channels, teacher.stages[j].channels
            self.adapters.append(nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1))
        names = [[stage.name for stage in student.stages[first : end + 1]] for first, end in self.spans]
        self.facts = {"stages": dict(zip(self.feature_phases, names, strict=True))}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """`(first, last)` student stage of each feature phase."""
        ends = [i for i, _ in self.blocks]
        return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))

    @property
    def feature_phases(self) -> list[str]:
        """Their names."""
        return [f"stage{number}" for number in range(1, len(self.blocks) + 1)]

    def phases(self) -> list[Phase]:
        """K feature phases, then the head's."""
        share = 1.0 if self.phase_length == "full" else 1.0 / len(self.blocks)
        found = [
            Phase(
                name,
                partial(self.mimic, first, number),
                trains=only(partial(self._features, first, number)),
                fraction=share,
                # The head has learnt nothing yet.
                evaluate=False,
            )
            for number, (name, (first, _)) in enumerate(zip(self.feature_phases, self.spans, strict=True))
        ]
        return [*found, Phase("train", self.loss, trains=only(self._head), fraction=self.head_length)]

    def _features(self, first: int, number: int, model: TransferModel) -> list[dict[str, Any]]:
        last = self.blocks[number][0]
        own = parameters_of(model.student.stages[first : last + 1])
        return [{"params": [*own, *self.adapters[number].parameters()]}]

    def _head(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": parameters_outside(model.student, model.student.stages)}]

    def mimic(self, first: int, number: int, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The l2 distance at the end of a block, on frozen stages before some stage.

        Args:
            first: The first student stage that trains.
            number: The block, from 0.
            model: The networks.
            batch: A prepared batch.
        """
        i, j = self.blocks[number]
        _, theirs = self.features(model, batch)
        ours = Features(model.student, batch["inputs"], frozen=first)
        target = as_map(theirs.level(j))
        return hint(match_size(self.adapters[number](as_map(ours.level(i))), target), target), {}

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The task loss of the head on frozen features."""
        return task_alone(model, batch, len(model.student.stages))

    def teacher_depth(self, model: TransferModel) -> int:
        """The final phase needs no teacher."""
        return 0

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The frozen features, and forward and backward of the head on them."""
        with evaluating(*model.student.stages):
            levels = model.student.extract(batch["inputs"])

        def features() -> None:
            with evaluating(*model.student.stages):
                model.student.extract(batch["inputs"])

        return [features, lambda: model.student.task(levels, batch).loss.backward()]

    def flops(self, model: TransferModel, batch: Batch) -> dict[str, float]:
        """Of each phase, of end-to-end mimicking (`end_to_end`, K = 1) and of the student's own training (`task`)."""
        twin = copy.deepcopy(model)
        method, last = twin.method, len(self.blocks) - 1
        whole = Phase("end_to_end", partial(method.mimic, 0, last), trains=only(partial(method._features, 0, last)))
        phases = [*method.phases(), whole, Phase("task", task_alone, trains=only(student_alone))]
        return {phase.name: count_flops(twin, phase, batch) for phase in phases}
