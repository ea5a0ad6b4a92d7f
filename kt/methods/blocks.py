"""A pair of networks block by block: where both are cut, and whose parameters a block has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kt.errors import UserError
from kt.methods.base import pair_stages
from kt.stages import Stage

# The stem of a network for large images halves them twice; what it makes of them is no block's map.
STEM_STRIDE, SMALL_IMAGE_STRIDE = 4, 8


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
        least = STEM_STRIDE if student[-1].stride > SMALL_IMAGE_STRIDE else 1
        return [pair for pair, stride in zip(pairs, strides, strict=True) if stride >= least] or pairs
    lost = sorted(set(cut_at) - set(strides))
    if lost or not cut_at:
        raise UserError(
            f"method.cut_at={list(cut_at)}: expected some of {strides}, the strides that student and teacher share"
        )
    return [pair for pair, stride in zip(pairs, strides, strict=True) if stride in cut_at]


def match_size(feature: Tensor, reference: Tensor) -> Tensor:
    """Resizes a map to the reference's height and width where they differ (bilinear)."""
    size = reference.shape[-2:]
    if feature.shape[-2:] == size:
        return feature
    return F.interpolate(feature, size=size, mode="bilinear", align_corners=False)


def parameters_of(stages: Iterable[Stage]) -> list[nn.Parameter]:
    """The parameters of some stages."""
    return [parameter for stage in stages for parameter in stage.parameters()]


def parameters_outside(network: nn.Module, stages: Iterable[Stage]) -> list[nn.Parameter]:
    """A network's parameters that belong to none of some of its stages."""
    inside = {id(parameter) for parameter in parameters_of(stages)}
    return [parameter for parameter in network.parameters() if id(parameter) not in inside]
