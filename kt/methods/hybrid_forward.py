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
from kt.methods.base import METHODS, Method, student_update
from kt.phases import Batch
from kt.stages import Stage
from kt.transfer import TransferModel, average_over_ranks, frozen_statistics

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
        student: Classifier,
        teacher: Classifier | None,
        balance: float | str = 1.0,
        switch_at: Sequence[Sequence[int]] | None = None,
        track_hybrid_stats: bool = False,
        interpolation: str = "bilinear",
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        if isinstance(balance, str) and balance != "dynamic":
            raise UserError(f"method.balance={balance!r}: expected 'dynamic' or a number >= 0")
        self.balance = balance
        self.track_hybrid_stats = track_hybrid_stats
        self.interpolation = interpolation
        stages = {STUDENT: student.stages, TEACHER: teacher.stages}
        self.groups = split_stages(switch_at or default_groups(student.stages, teacher.stages), stages)
        self.paths = [self._owners(STUDENT), self._owners(TEACHER)]
        # A path's layers are its main-path convolutions and the student's classifier.
        self.depths = [
            1 + sum(stages[who][i].depth for who, group in zip(path, self.groups, strict=True) for i in group[who])
            for path in self.paths
        ]
        plain_depth = 1 + sum(stage.depth for stage in student.stages)
        self.facts = {"path_depths": [*self.depths, plain_depth]}
        self.adapters = nn.ModuleDict()
        for number, path in enumerate(self.paths, 1):
            for border, owner in enumerate(path):
                receiver = path[border + 1] if border + 1 < len(path) else STUDENT
                if owner != receiver:
                    last = {who: stages[who][self.groups[border][who][-1]] for who in stages}
                    adapter = nn.Conv2d(last[owner].channels, last[receiver].channels, 1)
                    self.adapters[f"path{number}_{border}_to_{receiver}"] = adapter
        self._known_sizes: dict[tuple[int, ...], list[dict[str, tuple[int, ...]]]] = {}

    def _owners(self, first: str) -> list[str]:
        other = TEACHER if first == STUDENT else STUDENT
        return [first if border % 2 == 0 else other for border in range(len(self.groups))]

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`a (L1 + L2) + L3` and everything the paper's curves show."""
        inputs, labels = batch["inputs"], batch["labels"]
        levels = model.student.extract(inputs)
        plain = model.student.task(levels[-1], labels)
        ends = self.groups[0]
        sizes = self._sizes(model, inputs)
        with torch.no_grad():
            first_teacher_map = model.teacher.extract(inputs, ends[TEACHER][-1] + 1)[-1]
        keep = contextlib.nullcontext() if self.track_hybrid_stats else frozen_statistics(model.student)
        with keep:
            outputs = [
                model.student.task(self._follow(model, number, start, sizes), labels)
                for number, start in ((1, levels[ends[STUDENT][-1]]), (2, first_teacher_map))
            ]
        l1, l2, l3 = outputs[0].loss, outputs[1].loss, plain.loss
        if self.balance == "dynamic":
            balance = dynamic_balance(*average_over_ranks(torch.stack([l1, l2, l3]).detach()))
        else:
            balance = torch.full_like(l3, float(self.balance))
        logged = {"l1": l1, "l2": l2, "l3": l3, "balance": balance, "accuracy": plain.accuracy}
        logged.update(accuracy1=outputs[0].accuracy, accuracy2=outputs[1].accuracy)
        return balance * (l1 + l2) + l3, logged

    def _follow(self, model: TransferModel, number: int, x: Tensor, sizes: list[dict[str, tuple[int, ...]]]) -> Tensor:
        """The rest of path `number` after its first group, up to what the student's head reads."""
        path = self.paths[number - 1]
        networks: dict[str, Any] = {STUDENT: model.student, TEACHER: model.teacher}
        for border, owner in enumerate(path):
            if border:
                for index in self.groups[border][owner]:
                    x = networks[owner].stages[index](x)
            receiver = path[border + 1] if border + 1 < len(path) else STUDENT
            if owner != receiver:
                x = self.adapters[f"path{number}_{border}_to_{receiver}"](x)
                size = sizes[border][receiver]
                if tuple(x.shape[-2:]) != size:
                    x = F.interpolate(x, size=size, mode=self.interpolation, align_corners=False)
        return x

    @torch.no_grad()
    def _sizes(self, model: TransferModel, inputs: Tensor) -> list[dict[str, tuple[int, ...]]]:
        """Map sizes of both networks at every border for this input size; looked up once per size."""
        shape = tuple(inputs.shape[-2:])
        if shape not in self._known_sizes:
            probe, sizes = inputs[:1], {}
            for who, network in ((STUDENT, model.student), (TEACHER, model.teacher)):
                modes = {module: module.training for module in network.modules()}
                network.eval()
                sizes[who] = [tuple(level.shape[-2:]) for level in network.extract(probe)]
                for module, mode in modes.items():
                    module.training = mode
            self._known_sizes[shape] = [{who: sizes[who][group[who][-1]] for who in group} for group in self.groups]
        return self._known_sizes[shape]

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The plain student's update and what each hybrid path adds beyond it, each as a pass of its own."""
        with torch.no_grad():
            levels = model.student.extract(batch["inputs"])
        shared = levels[self.groups[0][STUDENT][-1]].detach().requires_grad_()
        sizes = self._sizes(model, batch["inputs"])

        def path1() -> None:
            model.student.task(self._follow(model, 1, shared, sizes), batch["labels"]).loss.backward()

        def path2() -> None:
            with torch.no_grad():
                start = model.teacher.extract(batch["inputs"], self.groups[0][TEACHER][-1] + 1)[-1]
            model.student.task(self._follow(model, 2, start, sizes), batch["labels"]).loss.backward()

        return [lambda: student_update(model, batch), path1, path2]
