"""A pair of networks stage by stage: where both are cut, which maps are compared, whose parameters a block has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kt.errors import UserError, nearest
from kt.features import Features, pair_levels
from kt.methods.base import Compare, Compared, Method, Student, Teacher, pair_stages
from kt.phase import CONSTANT, Batch, Phase, only
from kt.stages import Stage, as_map
from kt.transfer import TransferModel

# The stem of a network for large images halves them twice; what it makes of them is no block's map.
STEM_STRIDE, SMALL_IMAGE_STRIDE = 4, 8


def without_stem(stages: Sequence[Stage]) -> list[int]:
    """The stages of a network but the stem of one for large images."""
    least = STEM_STRIDE if stages[-1].stride > SMALL_IMAGE_STRIDE else 1
    return [index for index, stage in enumerate(stages) if stage.stride >= least]


def pair_blocks(
    student: Sequence[Stage], teacher: Sequence[Stage], cut_at: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Pairs (student stage, teacher stage) at the ends of the blocks between down-sampling layers.

    Args:
        student: The student's stages.
        teacher: The teacher's.
        cut_at: Nominal strides of the blocks' ends. None takes all that both have, but the stem's of a network for
            large images belongs to its first block: a ResNet has four blocks with either stem.

    Raises:
        UserError: The networks do not both have one of the strides.
    """
    pairs = pair_stages(student, teacher)
    strides = [student[i].stride for i, _ in pairs]
    if cut_at is None:
        kept = without_stem(student)
        return [pair for pair in pairs if pair[0] in kept] or pairs
    lost = sorted(set(cut_at) - set(strides))
    if lost or not cut_at:
        raise UserError(
            f"method.cut_at={list(cut_at)}: expected some of {strides}, the strides that student and teacher share"
        )
    return [pair for pair, stride in zip(pairs, strides, strict=True) if stride in cut_at]


def choose_pairs(
    student: Student, teacher: Teacher, stages: str | Sequence[int], key: str = "method.stages"
) -> list[tuple[int, int]]:
    """Pairs (student stage, teacher stage) whose maps are compared.

    Args:
        student: The student.
        teacher: The teacher.
        stages: `all` that have a teacher stage of the same stride, the `last` of them, `blocks` for the ends of the
            blocks (every stage but a stem), or the student's stages counted from 0.
        key: What error messages call it.

    Raises:
        UserError: It is none of these, or a stage has no teacher stage of the same stride.
    """
    pairs = pair_stages(student.stages, teacher.stages)
    named = {"all": pairs, "last": pairs[-1:], "blocks": pair_blocks(student.stages, teacher.stages)}
    if isinstance(stages, str):
        if stages not in named:
            raise UserError(f"{key}={stages}: expected {', '.join(named)} or numbers of stages{nearest(stages, named)}")
        return named[stages]
    found = dict(pairs)
    for index in stages:
        if index not in found:
            raise UserError(
                f"{key}={index}: expected one of {sorted(found)}, the student's stages that have a teacher stage of "
                "the same stride"
            )
    return [(index, found[index]) for index in sorted(set(stages))]


def as_it_is(how: str, ours: int, theirs: int, key: str) -> nn.Module:
    """What a student's map goes through where nothing stands between it and the teacher's channels of the same number.

    Args:
        how: `none` for maps of equally many channels, `first` where the teacher's further ones are left out.
        ours: The student's channels.
        theirs: The teacher's.
        key: What error messages call the choice.

    Raises:
        UserError: The teacher has other channels than that.
    """
    if ours == theirs or (how == "first" and ours < theirs):
        return nn.Identity()
    wanted = f"first (the teacher's first {ours}) or a convolution" if ours < theirs else "a convolution"
    raise UserError(f"{key}={how}: the teacher's map has {theirs} channels, the student's {ours}; expected {wanted}")


def initialisation(
    name: str, method: Method, compare: Compare, pairs: Sequence[tuple[int, int]], beside: nn.Module, fraction: float
) -> Phase:
    """A first phase that trains the student as deep as it is compared, at a constant rate and without a score.

    Args:
        name: The phase's.
        method, compare: Whose loss it is, and the loss.
        pairs: The stages that are compared (student, teacher).
        beside: What else trains.
        fraction: The phase's length as a share of the schedule.
    """
    groups = partial(_up_to, max(ours for ours, _ in pairs), beside)
    trains = only(groups, **CONSTANT)
    return Phase(name, Compared(method, compare), trains=trains, fraction=fraction, evaluate=False)


def _up_to(last: int, beside: nn.Module, model: TransferModel) -> list[dict[str, Any]]:
    return [{"params": [*parameters_of(model.student.stages[: last + 1]), *beside.parameters()]}]


class MapTransfer(Method):
    """The task loss and a distance of maps, summed over pairs of stages.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum.
        stages: Which stages are compared, see `choose_pairs`.
    """

    term: ClassVar[str]
    stages_key: ClassVar[str] = "method.stages"  # what errors call the stages

    def __init__(self, student: Student, teacher: Teacher | None, weight: float, stages: str | Sequence[int]):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weights = {self.term: weight}
        self.pairs = choose_pairs(student, teacher, stages, self.stages_key)

    def distance(self, number: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """The distance, a scalar, of a student's map (n, c_s, h, w) from a teacher's (n, c_t, h', w').

        Args:
            number: Which of the pairs, from 0.
            ours, theirs: The maps.
        """
        raise NotImplementedError

    def teacher_depth(self, model: TransferModel) -> int | None:
        """Up to the last pair."""
        return max(theirs for _, theirs in self.pairs) + 1

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The sum."""
        distances = [
            self.distance(number, as_map(ours.level(i)), as_map(theirs.level(j)))
            for number, (i, j) in enumerate(self.pairs)
        ]
        return {self.term: torch.stack(distances).sum()}


class LevelTransfer(Method):
    """The task's loss and one term of the maps of all levels, the teacher's before their last ReLU.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the term.
        pooled: Whether the pooled features are levels too.
        preactivation: Whether the student's maps are read before their last ReLU too.
    """

    term: ClassVar[str]

    def __init__(
        self, student: Student, teacher: Teacher | None, weight: float, pooled: bool, preactivation: bool = True
    ):
        super().__init__(student, teacher)
        self.weights = {self.term: weight}
        self.preactivation = preactivation
        self.levels, self.target_levels = pair_levels(student, teacher, pooled)

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """The term, a scalar, of the student's maps (n, c_s, h, w) and the teacher's (n, c_t, h', w')."""
        raise NotImplementedError

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages, no head."""
        return len(model.teacher.stages)

    def maps(self, ours: Features, theirs: Features) -> tuple[list[Tensor], list[Tensor]]:
        """What is compared: the student's maps and the teacher's."""
        activated = not self.preactivation
        return [ours.at(level, activated) for level in self.levels], [theirs.at(level) for level in self.target_levels]

    def ask(self, ours: Features, theirs: Features) -> None:
        """Asks for all of them."""
        self.maps(ours, theirs)

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The distance."""
        return {self.term: self.distance(*self.maps(ours, theirs))}

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The plain ones, and forward and backward of what the maps go through."""
        ours, theirs = self.maps(
            *(Features(each, batch["inputs"], graph=False) for each in (model.student, model.teacher))
        )
        ours = [each.detach().requires_grad_() for each in ours]
        return [*super().passes(model, batch), lambda: self.distance(ours, theirs).backward()]


def match_size(feature: Tensor, reference: Tensor) -> Tensor:
    """Resizes a map to the reference's height and width where they differ (bilinear)."""
    size = reference.shape[-2:]
    if feature.shape[-2:] == size:
        return feature
    return F.interpolate(feature, size=size, mode="bilinear", align_corners=False)


def nearest_size(feature: Tensor, size: torch.Size) -> Tensor:
    """Resizes a map to a height and width where they differ (nearest neighbours)."""
    return feature if feature.shape[2:] == size else F.interpolate(feature, size=size, mode="nearest")


def parameters_of(stages: Iterable[Stage]) -> list[nn.Parameter]:
    """The parameters of some stages."""
    return [parameter for stage in stages for parameter in stage.parameters()]


def parameters_outside(network: nn.Module, stages: Iterable[Stage]) -> list[nn.Parameter]:
    """A network's parameters that belong to none of some of its stages."""
    inside = {id(parameter) for parameter in parameters_of(stages)}
    return [parameter for parameter in network.parameters() if id(parameter) not in inside]
