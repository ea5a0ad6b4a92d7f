"""Knowledge consistent distillation: reorder the teacher's channels to be those the student would grow by itself.

Han et al., "Fixing the Teacher-Student Knowledge Discrepancy in Distillation" (Algorithm 1):

1. keep the student's initial weights t0 and train it alone;
2. compare every channel of the trained student with every channel of the teacher, over the training set (eqs. 3, 4);
3. find the channel transform T that makes the teacher most consistent with the student (eqs. 6 to 8);
4. reset the student to t0, exactly, and train it with a distillation loss on T(teacher) (eqs. 9, 10).

T is a view of the teacher, so it composes with every method that compares channels: `base` is the method that is
trained on the view, by default plain L2, and `kcd+fitnet`, `kcd+ab`, `kcd+rco` are this method around those. A method
that does not look at single channels (`kcd+rkd`) gets the teacher as it is, and an L2 loss on the view `beside` it.
"FitNets, AB and RCO [...] are operated on the original feature maps": a base that sends the student's map through a
free 1x1 convolution first takes the channels in any order, and trains the same student whatever T is.

What the paper leaves open, and the choice here:

- The maps are those of the last stage before its last ReLU, pooled over space, of the unaugmented training images.
- Where the teacher has more channels, a rectangular assignment takes the most consistent ones (`match="rectangular"`);
  with `match="adapter"` T orders all of them, the matched ones first, and the student is widened by a 1x1 convolution.
- The learned strategies train one linear layer per position, or one residual block without a last ReLU (its targets
  have negative values), by the mean consistency of a batch, with the trained student's features; then they are frozen.
- With several class groups, groups are equal stretches of the class numbers, and an image takes its class's transform.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kt.consistency import StreamingConsistency
from kt.errors import UserError
from kt.features import Features, Transformed
from kt.functional import channel_consistency, match_channels
from kt.methods.base import METHODS, Compare, Compared, Method, Student, Teacher, build_method, find_method, task_alone
from kt.phase import CONSTANT, TRAIN, Batch, Loop, Loss, Phase, everything, only, student_alone
from kt.settings import FIXED, LEARNED, MATCHED
from kt.stages import as_map
from kt.transfer import TransferModel, evaluating

if TYPE_CHECKING:
    from kt.data import DataSpec

SOLO, SOURCE = "solo", "source"
FILE = "transform.pth"


def pooled(network: Any, inputs: Tensor) -> Tensor:
    """The last stage's map before its last ReLU, averaged over space: (n, c)."""
    return as_map(Features(network, inputs).before(-1)).mean((2, 3))


def shrunk_groups(groups: int, groups_for: int | None, classes: int) -> int:
    """The number of class groups on data with other classes than a number is meant for, in proportion on a log scale.

    One group stays one and one group per class stays one per class: of 1, 10, 100, 1000 groups of 1000 classes,
    10 classes get 1, 2, 5 and 10.
    """
    if groups_for is None or groups_for <= 1 or classes == groups_for:
        return groups
    return max(1, round(classes ** (math.log(groups) / math.log(groups_for))))


def read_transform(folder: Path) -> dict[str, Any]:
    """What a cell keeps of its transform: `transform` (a state dict), strategy, metric, images, seconds, epoch."""
    return torch.load(folder / FILE, map_location="cpu", weights_only=True)


class ChannelTransform(nn.Module):
    """T as a choice of teacher channels, one per class group.

    Attributes:
        channels: (groups, c) the teacher channel that stands at each place; at first their own order.
    """

    channels: Tensor

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.register_buffer("channels", torch.arange(channels).repeat(groups, 1))

    def forward(self, feature: Tensor, groups: Tensor | None = None) -> Tensor:
        """A teacher's map (n, c_t, h, w) with the channels of each sample's group (n,): (n, c, h, w)."""
        if len(self.channels) == 1 or groups is None:
            return feature.index_select(1, self.channels[0])
        return feature[torch.arange(len(feature), device=feature.device)[:, None], self.channels[groups]]


class LearnedTransform(nn.Module):
    """T as a small network: `subnet_fc` is one linear layer at every position, `subnet_res` a residual block.

    Args:
        kind: Which of the two.
        before: Teacher channels.
        after: Channels of the view.
    """

    def __init__(self, kind: str, before: int, after: int):
        super().__init__()
        self.linear = nn.Conv2d(before, after, 1)
        self.residual: nn.Module | None = None
        if kind == "subnet_res":
            self.residual = nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
            )

    def forward(self, feature: Tensor, groups: Tensor | None = None) -> Tensor:
        """(n, c, h, w) of a teacher's map (n, c_t, h, w)."""
        y = self.linear(feature)
        return y if self.residual is None else y + self.residual(feature)


@METHODS.register_module(name="kcd")
class KnowledgeConsistent(Method):
    """Knowledge consistent distillation for a student-teacher pair.

    The model may hand it `solo`, the same student trained alone; without it, a first phase trains one. From `source`, a
    second teacher, the transform is computed instead of from the one that teaches.

    Args:
        student: The student, with its initial weights t0.
        teacher: The teacher.
        strategy: How T is found: `bipartite`, `greedy`, `random`, `identity`, `subnet_fc` or `subnet_res`.
        metric: Of the consistency: `l1`, `l2`, `cosine`, `correlation` or `kl`.
        match: Where the teacher has other channels than the student: `rectangular` or `adapter`.
        groups: Into how many groups of classes the data are divided, each with a transform of its own.
        groups_for: The number of classes that `groups` is meant for, see `shrunk_groups`; None takes it as it is.
        update_every: Epochs, below 1 the share of the phase's length, after which T is computed again from the student
            in training; None never.
        student_state: Whether T is computed from the `trained` or the `initial` student.
        learn_fraction: Length of the phase of a learned strategy, as a share of the schedule.
        base: The method that is trained on the view: its `name` and options; None is `l2`.
        beside: Options of an L2 loss on the view that is added, for bases that do not compare channels.
        data, files: For the base.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        strategy: str,
        metric: str,
        match: str,
        groups: int,
        groups_for: int | None,
        update_every: float | None,
        student_state: str,
        learn_fraction: float,
        base: Mapping[str, Any] | None,
        beside: Mapping[str, Any] | None,
        data: DataSpec | None = None,
        files: Mapping[str, Path] | None = None,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.strategy, self.metric, self.match = strategy, metric, match
        self.update_every, self.student_state, self.learn_fraction = update_every, student_state, learn_fraction
        ours, theirs = student.stages[-1].channels, teacher.stages[-1].channels
        if theirs < ours and strategy not in LEARNED:
            raise UserError(
                f"method=kcd: the teacher's last stage has {theirs} channels, fewer than the student's {ours}; a "
                f"transform chooses among the teacher's (learned ones, {', '.join(LEARNED)}, need not)"
            )
        self.ours = ours
        self.classes = self._classes_of(student, groups)
        self.groups = shrunk_groups(groups, groups_for, self.classes)
        if not 1 <= self.groups <= max(1, self.classes):
            raise UserError(f"method.groups={groups}: expected 1 to {self.classes}, the number of classes")
        self.channels = channels = theirs if match == "adapter" else ours
        self.transform: ChannelTransform | LearnedTransform
        if strategy in LEARNED:
            self.transform = LearnedTransform(strategy, theirs, channels)
        else:
            self.transform = ChannelTransform(self.groups, channels)
            if strategy == "random":
                drawn = [match_channels(torch.zeros(theirs, ours), "random") for _ in range(self.groups)]
                self._set([self._completed(one, theirs) for one in drawn])
        *first, last = teacher.stages
        stages = [*first, dataclasses.replace(last, channels=channels)]
        view: Any = SimpleNamespace(stages=stages, head=getattr(teacher, "head", None))  # a detector has none
        settings = dict(base or {"name": "l2"})
        name = settings.pop("name")
        if issubclass(find_method(name), KnowledgeConsistent):
            raise UserError(f"method.base.name={name}: expected a method that is not itself built around another")
        sees_channels = find_method(name).compares_channels
        if not sees_channels and beside is None:
            raise UserError(f"method.beside=null: {name} does not compare channels, so the transform would be unused")
        self.base = build_method(name, student, view if sees_channels else teacher, data=data, files=files, **settings)
        pairs = getattr(self.base, "pairs", None)
        if sees_channels and pairs and pairs[-1][1] != len(first):
            seen = ", ".join(str(stage) for stage, _ in pairs)
            raise UserError(
                f"method.base: {name} compares stage {seen} of the student; expected the last one, "
                f"{len(student.stages) - 1}, too: its maps are what the transform reorders"
            )
        self.beside: Any = None
        if beside is not None:
            self.beside = build_method("l2", student, view, **{k: v for k, v in beside.items() if k != "name"})
        # What the student is reset to. It comes from its seed or file, so a resumed run builds the very same one.
        self._initial = {key: value.clone() for key, value in student.network.state_dict().items()}
        self.facts = {**self.base.facts, "transform": {"strategy": strategy, "metric": metric, "match": match}}
        self.facts["channels"] = {"teacher": theirs, "student": ours, "compared": channels}
        if self.groups != groups:
            self.facts["note"] = f"{self.groups} groups of {self.classes} classes"

    @staticmethod
    def _classes_of(student: Student, groups: int) -> int:
        """The number of classes; detectors and segmentors know only one group."""
        head = getattr(student, "head", None)
        if head is None and groups > 1:
            raise UserError(f"method.groups={groups}: expected 1, groups of classes are for classification only")
        return head.classifier.out_features if head is not None else 1

    # Phases

    def phases(self) -> list[Phase]:
        """The student alone, the learned transform, and the base's own phases on the transformed teacher.

        The first is left out where the model has a `solo` student or needs none; the second is for learned strategies.
        """
        found: list[Phase] = []
        matched = self.strategy not in FIXED
        if matched and self.student_state == "trained" and SOLO not in self.hidden:
            found.append(Phase("solo", task_alone, trains=only(student_alone)))
        if self.strategy in LEARNED:
            found.append(
                Phase(
                    "transform",
                    self.inconsistency,
                    trains=only(self._transform, **CONSTANT),
                    fraction=self.learn_fraction,
                    evaluate=False,
                )
            )
        for number, phase in enumerate(self.base.phases()):
            trains = {
                name: dataclasses.replace(each, groups=self._groups) if each.groups is everything else each
                for name, each in phase.trains.items()
            }
            starts = partial(self._before_epoch, phase.before_epoch, number == 0)
            loss = Compared(self, partial(self.on_view, self._compare_of(phase)))
            found.append(dataclasses.replace(phase, loss=loss, trains=trains, before_epoch=starts))
        return found

    def _compare_of(self, phase: Phase) -> Compare:
        """The loss of one of the base's phases as a function of features, which this method replaces by the view's.

        Raises:
            UserError: It is no such function, or the phase makes its updates itself.
        """
        if not isinstance(phase.loss, Compared):
            raise UserError(f"method.base: its phase '{phase.name}' has no loss that could be computed on the view")
        return phase.loss.compare

    def _transform(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*self.transform.parameters()]}]

    def _groups(self, model: TransferModel) -> list[dict[str, Any]]:
        """The student and what the losses train beside it, without the transform."""
        parts = [model.student, self.base] + ([] if self.beside is None else [self.beside])
        return [{"params": [parameter for part in parts for parameter in part.parameters()]}]

    def _before_epoch(
        self,
        base: Callable[[TransferModel, Loop], None] | None,
        first: bool,
        model: TransferModel,
        loop: Loop,
    ) -> None:
        """Finds the transform and resets the student before the first epoch; finds it again where it is dynamic."""
        if first and loop.epoch == 0:
            if self.strategy in MATCHED:
                self.match_teacher(model, loop, model.teachers.get(SOLO, model.student))
            else:
                self._found(loop, images=0, seconds=0.0)
            self.reset(model)
        elif self._is_due(loop):
            self.match_teacher(model, loop, model.student)
        if base is not None:
            base(model, loop)

    def _is_due(self, loop: Loop) -> bool:
        """Whether a dynamic transform is to be computed again before this epoch."""
        if self.update_every is None or loop.epoch == 0:
            return False
        share = self.update_every < 1
        every = max(1, round(self.update_every * loop.max_epochs)) if share else int(self.update_every)
        return loop.epoch % every == 0

    def reset(self, model: TransferModel) -> None:
        """Puts the student back to its initial weights and buffers, bit for bit."""
        model.student.network.load_state_dict(self._initial)

    # The transform

    def match_teacher(self, model: TransferModel, loop: Loop, student: Any) -> None:
        """Finds T from one pass over the unaugmented training set; only one group's sums are held at a time."""
        started = time.perf_counter()
        teacher = model.teachers.get(SOURCE, model.teacher)
        ours, theirs = self.ours, teacher.stages[-1].channels
        device, images = loop.device, 0
        matched: list[Tensor] = []

        def fresh() -> StreamingConsistency:
            return StreamingConsistency(self.metric, theirs, ours, device)

        sums = fresh()
        with evaluating(student), loop.autocast():
            for raw in loop.loaders[TRAIN].plain(by_class=self.groups > 1).epoch(0):
                batch = model.student.prepare(raw)
                features = pooled(student, batch["inputs"]), pooled(teacher, batch["inputs"])
                images += len(features[0])
                if self.groups == 1:
                    sums.update(*features)
                    continue
                numbers = self.group_of(batch["labels"])
                # Images come class by class, so a batch that has a later group ends the ones before it.
                for number in range(len(matched), self.groups):
                    chosen = numbers == number
                    sums.update(*(feature[chosen] for feature in features))
                    if int(numbers.max()) <= number:
                        break
                    matched.append(self._matched(sums, theirs))
                    sums = fresh()
        while len(matched) < self.groups:
            matched.append(self._matched(sums, theirs))
            sums = fresh()
        self._set(matched)
        self._found(loop, images, time.perf_counter() - started)

    def _matched(self, sums: StreamingConsistency, theirs: int) -> Tensor:
        """The channels of one group; a group without images keeps the teacher's order."""
        consistency = sums.matrix().nan_to_num(nan=0.0, posinf=math.inf, neginf=-1e30)
        return self._completed(match_channels(consistency, self.strategy).cpu(), theirs)

    def _completed(self, matched: Tensor, theirs: int) -> Tensor:
        """With an adapter, the teacher channels that no student channel has been given follow those that have."""
        if self.match == "rectangular":
            return matched
        used = torch.zeros(theirs, dtype=torch.bool)
        used[matched] = True
        return torch.cat([matched, torch.arange(theirs)[~used]])[:theirs]

    def _set(self, channels: Sequence[Tensor]) -> None:
        assert isinstance(self.transform, ChannelTransform)
        self.transform.channels.copy_(torch.stack(list(channels)))

    def _found(self, loop: Loop, images: int, seconds: float) -> None:
        """Remembers what the transform was found from and how long that took."""
        found = {"strategy": self.strategy, "metric": self.metric, "match": self.match, "images": images}
        self.facts["transform"] = {**found, "seconds": seconds, "epoch": loop.epoch}

    def keeps(self) -> Mapping[str, Any]:
        """The transform, as `read_transform` gives it."""
        state = {key: value.detach().cpu() for key, value in self.transform.state_dict().items()}
        return {**self.base.keeps(), FILE: {**cast(dict[str, Any], self.facts["transform"]), "transform": state}}

    def inconsistency(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The negated mean consistency of a batch between T(teacher) and the trained student, channel by channel."""
        student = model.teachers.get(SOLO, model.student)
        teacher = model.teachers.get(SOURCE, model.teacher)
        with evaluating(student):
            ours = pooled(student, batch["inputs"])
            target = as_map(Features(teacher, batch["inputs"]).before(-1))
        theirs = self.transform(target).mean((2, 3))[:, : self.ours]
        consistency = channel_consistency(ours, theirs, self.metric).diagonal().mean()
        return -consistency, {"consistency": consistency}

    def group_of(self, labels: Tensor) -> Tensor:
        """The class group of each label (n,)."""
        return labels * self.groups // self.classes

    def apply_transform(self, groups: Tensor | None, feature: Tensor) -> Tensor:
        """T of a teacher's map, without a graph."""
        if isinstance(self.transform, ChannelTransform):
            return self.transform(feature, groups)
        with evaluating(self.transform):
            return self.transform(feature)

    # Distillation

    def features(self, model: TransferModel, batch: Batch) -> tuple[Features, Features]:
        """Those that the base reads."""
        return self.base.features(model, batch)

    def on_view(
        self, compare: Compare, ours: Features, theirs: Features, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One of the base's losses, on the view if it compares channels, and the L2 loss beside it."""
        groups = self.group_of(batch["labels"]) if self.groups > 1 else None
        view = Transformed(theirs, partial(self.apply_transform, groups))
        if self.beside is not None:
            self.beside.ask(ours, view)
        loss, logged = compare(ours, view if self.base.compares_channels else theirs, batch)
        if self.beside is not None:
            loss, terms = self.beside.add_terms(loss, ours, view, batch)
            logged = {**logged, **terms}
        return loss, logged

    @property
    def loss(self) -> Loss:
        """The main phase's."""
        return Compared(self, partial(self.on_view, self._compare_of(self.base.phases()[-1])))

    def teacher_depth(self, model: TransferModel) -> int | None:
        """As deep as the base reads, and to the last stage where there is a loss beside it."""
        depth = self.base.teacher_depth(model)
        return depth if self.beside is None or depth is None else len(model.teacher.stages)
