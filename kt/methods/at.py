"""Attention transfer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kt.functional import attention_transfer
from kt.methods.base import METHODS, Student, Teacher
from kt.methods.blocks import MapTransfer


@METHODS.register_module(name="at")
class AttentionTransfer(MapTransfer):
    """Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017: spatial attention maps of every stage.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum over stages.
        form: `mean` (as the released code computes it) or `sum` (the paper's norm).
        stages: Which stages are compared, see `choose_pairs`.
    """

    term = "attention"

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weight: float,
        form: str,
        stages: str | Sequence[int],
    ):
        super().__init__(student, teacher, weight, stages)
        self.form = form

    def distance(self, number: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """Of attention maps."""
        return attention_transfer(ours, theirs, form=self.form)
