"""The two mechanisms every method is made of: stages to tap or route through, and phases to train in."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.dense import Backbone, DenseModel
from kt.errors import UserError, nearest
from kt.outside import load_outside
from kt.phase import Batch, Phase
from kt.settings import METHODS as SETTINGS
from kt.settings import complete
from kt.stages import Stage
from kt.transfer import TransferModel

Student = Classifier | DenseModel
Teacher = Classifier | DenseModel | Backbone

METHODS = Registry("method", scope="kt", locations=["kt.methods", "kt.baselines"])


class Method(nn.Module):
    """A way to train a student. Its children (adapters, auxiliary networks) train with it and are never exported.

    A method is built for one pair: `Method(student, teacher, **options)`, and reads only shapes from the two; at run
    time it is handed the `TransferModel`.

    Attributes:
        needs_teacher: Whether it can be built without one.
        starts_from_teacher: Whether the student starts from the teacher's weights.
        dense: Whether it can teach detectors and segmentors.
        compares_channels: Whether it compares the teacher's maps with the student's channel by channel, so that the
            order of the teacher's channels matters to it.
        companions: Further networks that it may be given beside the teacher, hidden like it, by name: whether each is
            built as the `student` or as the `teacher` is.
        wants_snapshots: Whether it is to be given the snapshots of the teacher's training, as `anchor0`, `anchor1`, ...
        hidden: The names of the networks that the model it is part of keeps hidden.
        facts: What a method wants the result file to say about the pair it was built for.
    """

    needs_teacher: ClassVar[bool] = True
    starts_from_teacher: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    compares_channels: ClassVar[bool] = False
    companions: ClassVar[Mapping[str, str]] = {}
    wants_snapshots: bool = False
    hidden: frozenset[str] = frozenset()

    def __init__(self, student: Student, teacher: Teacher | None):
        super().__init__()
        self.facts: dict[str, object] = {}
        if not self.dense and isinstance(student, DenseModel):
            able = ", ".join(sorted(name for name, kind in METHODS.module_dict.items() if kind.dense))
            raise UserError(f"method: this one teaches classifiers only; for detectors and segmentors choose {able}")
        if self.needs_teacher and teacher is None:
            raise UserError("teacher=none: this method needs a teacher; name a network, for example teacher=resnet56")

    def phases(self) -> list[Phase]:
        """The phases in order; the last one is `train` and yields the student."""
        return [Phase("train", self.loss)]

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the main phase and the device scalars to log (`accuracy` is that of the plain student)."""
        raise NotImplementedError

    def keeps(self) -> Mapping[str, Any]:
        """What stays beside the student of a method that has trained: file name -> content for `torch.save`."""
        return {}

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The passes that the main phase cannot do without, as callables; what the bench divides a step's time by."""
        depth = self.teacher_depth(model)
        student = [lambda: student_update(model, batch)]
        return student if depth == 0 else [*student, lambda: _teacher_forward(model, batch, depth)]

    def flops(self, model: TransferModel, batch: Batch) -> dict[str, float]:
        """Floating-point operations per image of a step, by name, for methods that make a claim about their cost.

        Args:
            model: The model; it must stay as it is.
            batch: A few images as a loader yields them.
        """
        return {}

    def teacher_depth(self, model: TransferModel) -> int | None:
        """How many teacher stages the main phase runs; None stands for the whole network with its head."""
        return None if self.needs_teacher else 0


def student_update(model: TransferModel, batch: Batch) -> None:
    """Forward and backward of the plain student."""
    model.student.task(model.student.extract(batch["inputs"]), batch).loss.backward()


@torch.no_grad()
def _teacher_forward(model: TransferModel, batch: Batch, depth: int | None) -> None:
    levels = model.teacher.extract(batch["inputs"], depth)
    if depth is None:
        model.teacher.head(levels[-1])


def pair_stages(student: Sequence[Stage], teacher: Sequence[Stage]) -> list[tuple[int, int]]:
    """Pairs (student stage, teacher stage) of equal nominal stride.

    Networks with no stride in common, and those that repeat one (a ViT's block groups), are paired from the end.
    """
    ours = {stage.stride: i for i, stage in enumerate(student)}
    theirs = {stage.stride: i for i, stage in enumerate(teacher)}
    unique = len(ours) == len(student) and len(theirs) == len(teacher)
    shared = [stride for stride in ours if stride in theirs] if unique else []
    if shared:
        return [(ours[stride], theirs[stride]) for stride in shared]
    count = min(len(student), len(teacher))
    return [(len(student) - count + i, len(teacher) - count + i) for i in range(count)]


@torch.no_grad()
def teacher_levels(model: TransferModel, batch: Batch, depth: int | None = None) -> list[Tensor]:
    """The teacher's stage outputs, only as deep as asked."""
    return model.teacher.extract(batch["inputs"], depth)


def find_method(name: str) -> type[Method]:
    """The registered class behind a method's name; `a+b` is method a around method b.

    Raises:
        UserError: There is no such method.
    """
    load_outside()
    outer = name.partition("+")[0]
    schema = SETTINGS.get(outer)
    if schema is not None and schema.module is not None:
        importlib.import_module(schema.module)
    kind = METHODS.get(outer)
    if kind is None:
        known = sorted(METHODS.module_dict)
        raise UserError(f"method={name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
    return kind


def build_method(name: str, student: Student, teacher: Teacher | None, **options: object) -> Method:
    """The registered method `name` for a pair of networks.

    `build_method("kcd+fitnet", ...)` is `build_method("kcd", ..., base={"name": "fitnet"})`.

    Args:
        name: The method.
        student, teacher: The networks.
        options: As `kt.settings` has them; what is left out has its default.

    Raises:
        UserError: There is no such method or option, or a value is none that the option may have.
    """
    kind, inner = find_method(name), name.partition("+")[2]
    if inner:
        settings = options.get("base")
        base = {"name": inner, **(settings if isinstance(settings, Mapping) else {})}
        if base["name"] != inner:
            raise UserError(f"method={name!r}: its base is {base['name']!r}; expected {inner!r}")
        options["base"] = base
    return kind(student, teacher, **complete(name, options))
