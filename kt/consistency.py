"""Consistency of channels over a whole training set, in one streaming pass whose memory does not grow with the set.

The formulas are those of `kt.functional.channel_consistency` (knowledge consistent distillation, eqs. 3 and 4), written
as sums over samples; sums are kept in double precision, and those of several processes are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kt.errors import nearest
from kt.functional import METRICS
from kt.ranks import max_over_ranks, sum_over_ranks


class _Sums:
    """Sums of products: all that the L2 distance, the cosine and the correlation need."""

    def __init__(self, metric: str, teacher: int, student: int, device: torch.device):
        self.metric = metric
        zeros = {"dtype": torch.float64, "device": device}
        self.count = torch.zeros((), **zeros)  # type: ignore[call-overload]
        self.sums = [torch.zeros(channels, **zeros) for channels in (teacher, student)]  # type: ignore[call-overload]
        self.squares = [torch.zeros(channels, **zeros) for channels in (teacher, student)]  # type: ignore[call-overload]
        self.products = torch.zeros(teacher, student, **zeros)  # type: ignore[call-overload]

    def update(self, teacher: Tensor, student: Tensor) -> None:
        self.count += len(student)
        for index, feature in enumerate((teacher, student)):
            self.sums[index] += feature.sum(0)
            self.squares[index] += feature.pow(2).sum(0)
        self.products += teacher.t() @ student

    def matrix(self) -> Tensor:
        count, products = sum_over_ranks(self.count), sum_over_ranks(self.products)
        theirs, ours = (sum_over_ranks(square) for square in self.squares)
        if self.metric == "l2":
            return (theirs[:, None] + ours - 2 * products).clamp(min=0).rsqrt()
        if self.metric == "correlation":
            means = [sum_over_ranks(total) / count for total in self.sums]
            products = products - count * means[0][:, None] * means[1]
            theirs, ours = (square - count * mean**2 for square, mean in zip((theirs, ours), means, strict=True))
        # Rounding may leave a constant channel a sum of squares below zero; it is consistent with nothing.
        scales = [torch.where(square > 0, square, torch.inf).rsqrt() for square in (theirs, ours)]
        return scales[0][:, None] * products * scales[1]


class _Absolute:
    """Sums of absolute differences, a batch at a time."""

    def __init__(self, teacher: int, student: int, device: torch.device):
        self.distance = torch.zeros(teacher, student, dtype=torch.float64, device=device)

    def update(self, teacher: Tensor, student: Tensor) -> None:
        self.distance += torch.cdist(teacher.t().contiguous(), student.t().contiguous(), p=1.0)

    def matrix(self) -> Tensor:
        return 1 / sum_over_ranks(self.distance)


class _Divergence:
    """Log-sum-exps over samples, each relative to the largest value so far.

    With p the teacher's and q the student's softmax over the samples, `KL(p || q)` is
    `E_p[t] - lse(t) - E_p[s] + lse(s)`.
    """

    def __init__(self, teacher: int, student: int, device: torch.device):
        zeros = {"dtype": torch.float64, "device": device}
        self.peaks = [torch.full((c,), -torch.inf, **zeros) for c in (teacher, student)]  # type: ignore[call-overload]
        self.sums = [torch.zeros(c, **zeros) for c in (teacher, student)]  # type: ignore[call-overload]
        self.own = torch.zeros(teacher, **zeros)  # type: ignore[call-overload]
        self.cross = torch.zeros(teacher, student, **zeros)  # type: ignore[call-overload]

    def _raise(self, peaks: list[Tensor]) -> None:
        """Makes everything relative to higher peaks."""
        factors = [
            torch.where(torch.isfinite(old), (old - new).exp(), 0.0) for old, new in zip(self.peaks, peaks, strict=True)
        ]
        self.sums = [total * factor for total, factor in zip(self.sums, factors, strict=True)]
        self.own, self.cross = self.own * factors[0], self.cross * factors[0][:, None]
        self.peaks = peaks

    def update(self, teacher: Tensor, student: Tensor) -> None:
        features = (teacher, student)
        self._raise([torch.maximum(peak, f.amax(0)) for peak, f in zip(self.peaks, features, strict=True)])
        weights = [(f - peak).exp() for peak, f in zip(self.peaks, features, strict=True)]
        self.sums = [total + weight.sum(0) for total, weight in zip(self.sums, weights, strict=True)]
        self.own += (weights[0] * teacher).sum(0)
        self.cross += weights[0].t() @ student

    def matrix(self) -> Tensor:
        self._raise([max_over_ranks(peak) for peak in self.peaks])
        theirs, ours = (sum_over_ranks(total) for total in self.sums)
        entropy = sum_over_ranks(self.own) / theirs - (theirs.log() + self.peaks[0])
        return sum_over_ranks(self.cross) / theirs[:, None] - (ours.log() + self.peaks[1]) - entropy[:, None]


class StreamingConsistency:
    """The matrix of `kt.functional.channel_consistency` from any number of batches.

    Args:
        metric: `l1`, `l2`, `cosine`, `correlation` or `kl`.
        teacher: Teacher channels.
        student: Student channels.
        device: Where the sums live: O(teacher x student) numbers, whatever the number of samples.
    """

    def __init__(self, metric: str, teacher: int, student: int, device: torch.device | str = "cpu"):
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}{nearest(metric, METRICS)}")
        device = torch.device(device)
        self._sums: _Sums | _Absolute | _Divergence
        if metric == "l1":
            self._sums = _Absolute(teacher, student, device)
        elif metric == "kl":
            self._sums = _Divergence(teacher, student, device)
        else:
            self._sums = _Sums(metric, teacher, student, device)
        self.samples = 0

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Adds pooled activations (n, c_student) and (n, c_teacher) of the same samples."""
        if len(student) != len(teacher):
            raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in samples")
        if len(student):
            self._sums.update(teacher.double(), student.double())
            self.samples += len(student)

    def matrix(self) -> Tensor:
        """(c_teacher, c_student) in double precision, over all processes; larger is more consistent."""
        return self._sums.matrix()
