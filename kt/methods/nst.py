"""Neuron selectivity transfer."""

from __future__ import annotations

from torch import Tensor

from kt.functional import nst
from kt.methods.base import METHODS
from kt.methods.blocks import MapTransfer


@METHODS.register_module(name="nst")
class NeuronSelectivityTransfer(MapTransfer):
    """Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017.

    The squared maximum mean discrepancy of channel activations under a polynomial kernel, of every stage.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum over stages (50: RepDistiller's for CIFAR-100).
        stages: Which stages are compared, see `choose_pairs`.
    """

    term = "selectivity"

    def distance(self, number: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """Of channel activations."""
        return nst(ours, theirs)
