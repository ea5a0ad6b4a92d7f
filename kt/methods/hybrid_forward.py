"""Hybrid forward: alternate student and teacher stages in one forward pass.

Song et al., "Robust Knowledge Transfer via Hybrid Forward on the Teacher-Student Model", AAAI 2021.

A mini-batch takes three paths to the student's head and the task's own loss: path 1 starts in the student and
alternates, path 2 is its complement and starts in the teacher, path 3 is the plain student.
The loss is `L = a (L1 + L2) + L3` (eq. 1) with `a = 2 L3 / (L1 + L2)` per mini-batch, constant in the gradient
(eq. 2), or a fixed number: on ImageNet the paper simply adds the losses.

What the paper leaves open, and the choice here:

- Where paths switch: `[[2], [4, 8], [16], [32]]` (nominal strides) is the one grouping that gives the 46 and 32 layers
  the paper counts for ResNet-50 and MobileNet-v1.
- Adapters: a 1x1 convolution with bias at every switch, then bilinear interpolation where sizes differ.
- Hybrid passes normalise by the batch like the plain pass but leave running statistics to the plain pass.
- Teacher normalisation layers stay in eval mode, so not one bit of the teacher changes.
- Heads that read several stages (FPN, RPN): every map comes from the path. One that a teacher stage made passes an
  adapter to the student's channels and size; where a path switches at that very map, it is the switch's adapter.

Two computations are saved exactly: path 1's first group is the plain pass's, and path 2's first group is a teacher
pass without a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.errors import UserError
from kt.functional import dynamic_balance
from kt.methods.base import METHODS, Method, Student, Teacher, student_update
from kt.phase import Batch
from kt.ranks import mean_over_ranks
from kt.stages import Stage
from kt.transfer import TransferModel, frozen_statistics

STUDENT, TEACHER = "student", "teacher"
IMAGENET_GROUPS = ((1, 2), (4, 8), (16,), (32,))
SMALL_IMAGE_GROUPS = ((1,), (2,), (4,), (8,))


def default_groups(student: Sequence[Stage], teacher: Sequence[Stage]) -> list[list[int]]:
    """The grouping of nominal strides at whose borders paths switch, for a pair of networks."""
    strides = {stage.stride for stage in (*student, *teacher)}
    groups = SMALL_IMAGE_GROUPS if max(strides) <= 8 else IMAGENET_GROUPS
    present = [[stride for stride in group if stride in strides] for group in groups]
    return [group for group in present if group]


def split_stages(
    groups: Sequence[Sequence[int]], networks: Mapping[str, Sequence[Stage]]
) -> list[dict[str, list[int]]]:
    """Stage indices of each network in each group of strides.

    A group that one of the networks lacks merges with the next one (the last with the one before).

    Raises:
        UserError: A network has a stride that no group names, or fewer than two groups remain.
    """
    named = [stride for group in groups for stride in group]
    if sorted(named) != named or len(set(named)) != len(named):
        raise UserError(f"method.switch_at={[list(g) for g in groups]}: expected rising strides, each named once")
    split: list[dict[str, list[int]]] = []
    for group in groups:
        split.append({who: [i for i, s in enumerate(stages) if s.stride in group] for who, stages in networks.items()})
    for who, stages in networks.items():
        lost = sorted({stage.stride for stage in stages} - set(named))
        if lost:
            raise UserError(
                f"method.switch_at={[list(g) for g in groups]}: the {who} has stages of stride {lost}, "
                f"which no group names; its strides are {sorted({s.stride for s in stages})}"
            )
    merged: list[dict[str, list[int]]] = []
    pending: dict[str, list[int]] = {who: [] for who in networks}
    for part in split:
        pending = {who: pending[who] + part[who] for who in networks}
        if all(pending.values()):
            merged.append(pending)
            pending = {who: [] for who in networks}
    if any(pending.values()) and merged:
        merged[-1] = {who: merged[-1][who] + pending[who] for who in networks}
    if len(merged) < 2:
        raise UserError(
            f"method.switch_at={[list(g) for g in groups]}: student strides {[s.stride for s in networks[STUDENT]]} "
            f"and teacher strides {[s.stride for s in networks[TEACHER]]} leave no border at which a path could switch"
        )
    return merged


@METHODS.register_module(name="hybrid_forward")
class HybridForward(Method):
    """Hybrid forward for a student-teacher pair.

    Args:
        student: The student.
        teacher: The teacher.
        balance: `"dynamic"` or the fixed weight of the two hybrid losses.
        switch_at: Groups of nominal strides; paths switch between groups. None picks them by the networks' strides.
        track_hybrid_stats: Let hybrid passes update the student's running statistics too (for ablation only).
        interpolation: Mode in which an adapter resizes a map.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        balance: float | str,
        switch_at: Sequence[Sequence[int]] | None,
        track_hybrid_stats: bool,
        interpolation: str,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.balance = balance
        self.track_hybrid_stats = track_hybrid_stats
        self.interpolation = interpolation
        stages = {STUDENT: student.stages, TEACHER: teacher.stages}
        self.groups = split_stages(switch_at or default_groups(student.stages, teacher.stages), stages)
        self.paths = [self._owners(STUDENT), self._owners(TEACHER)]
        # A path's layers are its main-path convolutions and the student's classifier.
        last = 1 if isinstance(student, Classifier) else 0
        self.depths = [
            last + sum(stages[who][i].depth for who, group in zip(path, self.groups, strict=True) for i in group[who])
            for path in self.paths
        ]
        plain_depth = last + sum(stage.depth for stage in student.stages)
        self.facts = {"path_depths": [*self.depths, plain_depth]}
        self.adapters = nn.ModuleDict()
        for number, path in enumerate(self.paths, 1):
            for border, owner in enumerate(path):
                receiver = path[border + 1] if border + 1 < len(path) else STUDENT
                if owner != receiver:
                    ends = {who: stages[who][self.groups[border][who][-1]] for who in stages}
                    adapter = nn.Conv2d(ends[owner].channels, ends[receiver].channels, 1)
                    self.adapters[f"path{number}_{border}_to_{receiver}"] = adapter
                if owner == TEACHER:
                    for index in self._levels_between(student.reads, border):
                        source = self._source(stages, border, student.stages[index].stride)
                        adapter = nn.Conv2d(teacher.stages[source].channels, student.stages[index].channels, 1)
                        self.adapters[f"path{number}_level{index}"] = adapter
        self.sources = {
            index: self._source(stages, border, student.stages[index].stride)
            for border in range(len(self.groups))
            for index in self._levels_between(student.reads, border)
        }
        self._known_sizes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}

    def _levels_between(self, reads: Sequence[int], border: int) -> list[int]:
        """The student stages of a group whose output the head reads, but for the last, where every path switches."""
        return [index for index in self.groups[border][STUDENT][:-1] if index in reads]

    def _source(self, stages: Mapping[str, Sequence[Stage]], border: int, stride: int) -> int:
        """The teacher stage of a group that stands for the student's stage of a stride: the deepest of at most that."""
        mine = self.groups[border][TEACHER]
        return max((i for i in mine if stages[TEACHER][i].stride <= stride), default=mine[0])

    def _owners(self, first: str) -> list[str]:
        other = TEACHER if first == STUDENT else STUDENT
        return [first if border % 2 == 0 else other for border in range(len(self.groups))]

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`a (L1 + L2) + L3` and everything the paper's curves show."""
        levels = model.student.extract(batch["inputs"])
        plain = model.student.task(levels, batch)
        sizes = self._teacher_sizes(model, batch["inputs"])
        keep = contextlib.nullcontext() if self.track_hybrid_stats else frozen_statistics(model.student)
        with keep:
            first = self._follow(model, 1, self._start(model, batch, 1, levels), levels, sizes)
            second = self._follow(model, 2, self._start(model, batch, 2, levels), levels, sizes)
            outputs = [model.student.task(path, batch) for path in (first, second)]
        l1, l2, l3 = outputs[0].loss, outputs[1].loss, plain.loss
        if self.balance == "dynamic":
            balance = dynamic_balance(*mean_over_ranks(torch.stack([l1, l2, l3]).detach()))
        else:
            balance = torch.full_like(l3, float(self.balance))
        logged = {"l1": l1, "l2": l2, "l3": l3, "balance": balance, **plain.scalars}
        for number, output in enumerate(outputs, 1):
            if "accuracy" in output.scalars:
                logged[f"accuracy{number}"] = output.scalars["accuracy"]
        return balance * (l1 + l2) + l3, logged

    def _start(self, model: TransferModel, batch: Batch, number: int, levels: Sequence[Tensor]) -> dict[int, Tensor]:
        """The outputs of a path's first group by stage: the plain pass's own, or the teacher's without a graph."""
        group = self.groups[0]
        if self.paths[number - 1][0] == STUDENT:
            return {index: levels[index] for index in group[STUDENT]}
        with torch.no_grad():
            maps = model.teacher.extract(batch["inputs"], group[TEACHER][-1] + 1)
        return {index: maps[index] for index in group[TEACHER]}

    def _follow(
        self,
        model: TransferModel,
        number: int,
        maps: dict[int, Tensor],
        plain: Sequence[Tensor],
        teacher_sizes: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:
        """The rest of path `number` after its first group.

        Args:
            model: The networks.
            number: 1 or 2.
            maps: The outputs of the first group, by stage of the network that made them.
            plain: The plain pass's outputs, for their sizes.
            teacher_sizes: Heights and widths of the teacher's maps.

        Returns:
            What stands for each of the student's stage outputs; those that no head reads are the plain pass's.
        """
        path = self.paths[number - 1]
        networks: dict[str, Any] = {STUDENT: model.student, TEACHER: model.teacher}
        levels = list(plain)
        x = plain[0]
        for border, owner in enumerate(path):
            group = self.groups[border]
            if border:
                maps = {}
                for index in group[owner]:
                    maps[index] = x = networks[owner].stages[index](x)
            x = maps[group[owner][-1]]
            if owner == STUDENT:
                levels[group[STUDENT][0] : group[STUDENT][-1] + 1] = [maps[index] for index in group[STUDENT]]
            else:
                for index in self._levels_between(model.student.reads, border):
                    adapted = self.adapters[f"path{number}_level{index}"](maps[self.sources[index]])
                    levels[index] = self._resize(adapted, plain[index].shape[-2:])
            receiver = path[border + 1] if border + 1 < len(path) else STUDENT
            if owner != receiver:
                x = self.adapters[f"path{number}_{border}_to_{receiver}"](x)
                end = group[receiver][-1]
                x = self._resize(x, plain[end].shape[-2:] if receiver == STUDENT else teacher_sizes[end])
                if receiver == STUDENT:
                    levels[end] = x
        return levels

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(x.shape[-2:]) == tuple(size):
            return x
        corners = None if self.interpolation == "nearest" else False
        return F.interpolate(x, size=tuple(size), mode=self.interpolation, align_corners=corners)

    @torch.no_grad()
    def _teacher_sizes(self, model: TransferModel, inputs: Tensor) -> list[tuple[int, ...]]:
        """Heights and widths of the teacher's maps for this input size; looked up once per size."""
        shape = tuple(inputs.shape[-2:])
        if shape not in self._known_sizes:
            maps = model.teacher.extract(inputs[:1])
            self._known_sizes[shape] = [tuple(level.shape[-2:]) for level in maps]
        return self._known_sizes[shape]

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The plain student's update and what each hybrid path adds beyond it, each as a pass of its own."""
        with torch.no_grad():
            levels = model.student.extract(batch["inputs"])
        shared = [level.detach().requires_grad_() for level in levels]
        sizes = self._teacher_sizes(model, batch["inputs"])

        def path(number: int) -> None:
            followed = self._follow(model, number, self._start(model, batch, number, shared), levels, sizes)
            model.student.task(followed, batch).loss.backward()

        return [lambda: student_update(model, batch), lambda: path(1), lambda: path(2)]
