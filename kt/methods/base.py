"""The two mechanisms every method is made of: stages to tap or route through, and phases to train in."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.dense import Backbone, DenseModel
from kt.errors import UserError, nearest
from kt.features import Features
from kt.outside import load_outside
from kt.phase import Batch, Loss, Phase
from kt.settings import METHODS as SETTINGS
from kt.settings import Method as Settings
from kt.settings import accumulates, complete, settings_of, shown
from kt.stages import Stage
from kt.transfer import TransferModel

if TYPE_CHECKING:
    from kt.data import DataSpec

Student = Classifier | DenseModel
Teacher = Classifier | DenseModel | Backbone
# A loss that reads the student and its target: `(ours, theirs, batch) -> (loss, scalars to log)`.
Compare: TypeAlias = Callable[[Features, Features, Batch], tuple[Tensor, dict[str, Tensor]]]

# Adds terms to a loss: `(loss, ours, theirs, batch) -> (loss, scalars to log)`.
AddTerms: TypeAlias = Callable[[Tensor, Features, Features, Batch], tuple[Tensor, dict[str, Tensor]]]

METHODS = Registry("method", scope="kt", locations=["kt.methods"])


def add_nothing(loss: Tensor, ours: Features, theirs: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss as it is."""
    return loss, {}


@dataclass(frozen=True)
class Compared:
    """A phase's loss that knows the networks by their features alone, so that a method around this one may change them.

    Attributes:
        method: The method that says which two networks.
        compare: The loss.
    """

    method: Method
    compare: Compare

    def __call__(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compare(*self.method.features(model, batch), batch)


class Method(nn.Module):
    """A way to train a student. Its children (adapters, auxiliary networks) train with it and are never exported.

    A method is built for one pair: `Method(student, teacher, **options)`, and reads only shapes from the two; at run
    time it is handed the `TransferModel`. Its loss is the task's and weighted `terms`; one that is no such sum is a
    `loss(model, batch)` of its own. A constructor that has a parameter `data` is handed the facts of the data
    (`kt.data.DataSpec`, None where nobody told them), one with `files` the files that its settings need of other cells.

    Attributes:
        weights: Of each term by name, and of the task's loss, `task`, where it is not 1.
        starts_from_teacher: Whether the student starts from the teacher's weights.
        compares_channels: Whether it compares the teacher's maps with the student's channel by channel, so that the
            order of the teacher's channels matters to it.
        accumulates: Whether its losses are means over images, see `kt.settings.accumulates`.
        hidden: The names of the networks that the model it is part of keeps hidden.
        facts: What a method wants the result file to say about the pair it was built for.
        around: Adds the terms of a method around this one to a loss, as its `add_terms` does; by itself nothing.
    """

    starts_from_teacher: ClassVar[bool] = False
    compares_channels: ClassVar[bool] = False
    accumulates: bool = False
    hidden: frozenset[str] = frozenset()

    def __init__(self, student: Student, teacher: Teacher | None):
        super().__init__()
        self.facts: dict[str, object] = {}
        self.weights: dict[str, float] = {}
        self.around: AddTerms = add_nothing

    @property
    def takes_terms(self) -> bool:
        """Whether a method around this one can add terms to its main phase's loss, by `around`."""
        loss = self.loss
        return isinstance(loss, Compared) and loss.method is self and type(self).terms is not Method.terms

    def phases(self) -> list[Phase]:
        """The phases in order; the last one is `train` and yields the student."""
        return [Phase("train", self.loss)]

    @property
    def loss(self) -> Loss:
        """The main phase's: from model and batch to the loss and the device scalars to log."""
        return Compared(self, self.compare)

    def target(self, model: TransferModel) -> Any:
        """The network that the student is compared with."""
        return model.teacher

    def features(self, model: TransferModel, batch: Batch) -> tuple[Features, Features]:
        """What losses read of the student and of its target, each from one pass."""
        inputs = batch["inputs"]
        return Features(model.student, inputs), Features(self.target(model), inputs, graph=False)

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """What is added to the task's loss in the main phase: unweighted scalars by name, logged as `loss_<name>`."""
        raise NotImplementedError

    def ask(self, ours: Features, theirs: Features) -> None:
        """Asks for the pre-activations that `terms` reads, before anybody asks for outputs: one run gives both."""

    def compare(self, ours: Features, theirs: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss and the weighted terms (`accuracy` is that of the plain student)."""
        self.ask(ours, theirs)
        output = ours.task(batch)
        loss = self.weights["task"] * output.loss if "task" in self.weights else output.loss
        loss, logged = self.add_terms(loss, ours, theirs, batch)
        loss, further = self.around(loss, ours, theirs, batch)
        logged |= further
        return loss, ({"loss_task": output.loss} if logged else {}) | logged | output.scalars

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The sum of some terms under the method's weights."""
        return reduce(add, (self.weights[name] * term for name, term in terms.items()))

    def add_terms(
        self, loss: Tensor, ours: Features, theirs: Features, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss with the weighted terms added, and the terms to log."""
        terms = self.terms(ours, theirs, batch)
        loss = loss + self.weighted(terms) if terms else loss
        return loss, {f"loss_{name}": term for name, term in terms.items()}

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
        return None


def task_alone(model: TransferModel, batch: Batch, frozen: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's own task loss, and what it logs; the first `frozen` stages stay as they are."""
    output = Features(model.student, batch["inputs"], frozen=frozen).task(batch)
    return output.loss, output.scalars


def student_update(model: TransferModel, batch: Batch) -> None:
    """Forward and backward of the plain student."""
    task_alone(model, batch)[0].backward()


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


def _register(name: str, schema: type[Settings]) -> None:
    """Imports the module that registers a method.

    Raises:
        UserError: There is no such module, or it registers no method of that name.
    """
    module, said = schema.module or f"kt.methods.{name}", f"{schema.__module__}.{schema.__name__}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"method={name}: there is no module {module}, which `module` of {said} names") from None
    if name not in METHODS:
        raise UserError(f"method={name}: {module} registers no such; expected @METHODS.register_module(name={name!r})")


def find_method(name: str) -> type[Method]:
    """The registered class behind a method's name; `a+b` is method a around method b.

    Raises:
        UserError: There is no such method, or nothing registers it.
    """
    load_outside()
    outer = name.partition("+")[0]
    schema = SETTINGS.get(outer)
    if schema is not None:
        _register(outer, schema)
    kind = METHODS.get(outer)
    if kind is None:
        known = sorted({name for name in SETTINGS if "+" not in name} | set(METHODS.module_dict))
        raise UserError(f"method={name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
    return kind


def build_method(
    name: str,
    student: Student,
    teacher: Teacher | None = None,
    *,
    data: DataSpec | None = None,
    files: Mapping[str, Path] | None = None,
    **options: object,
) -> Method:
    """The registered method `name` for a pair of networks.

    `build_method("kcd+fitnet", ...)` is `build_method("kcd", ..., base={"name": "fitnet"})`.

    Args:
        name: The method.
        student, teacher: The networks.
        data: The facts of the data (`Data.spec`), for a constructor that asks for them.
        files: The files needed of other cells, by need, for a constructor that asks for them.
        options: As `kt.settings` has them; what is left out has its default.

    Raises:
        UserError: There is no such method or option, a value is none that the option may have, the method needs a
            teacher and there is none, or it cannot teach such a student.
    """
    kind, inner, schema = find_method(name), name.partition("+")[2], settings_of(name)
    for role, network in (("student", student), ("teacher", teacher)):
        if network is not None and not hasattr(network, "stages"):
            raise UserError(
                f"{role}={type(network).__name__}: expected a network with its normalisation, such as "
                "kt.classifier.Classifier(network, (mean, std))"
            )
    if schema is not None and isinstance(student, DenseModel):
        task, whom = ("depth", "depth") if student.gives_depth else ("detection", "detectors and segmentors")
        if not schema.teaches(task):
            able = sorted(other for other, known in SETTINGS.items() if known.teaches(task) and "+" not in other)
            raise UserError(f"method={name}: teaches classifiers only; for {whom} choose {', '.join(able)}")
    if schema is not None and schema.needs_teacher and teacher is None:
        raise UserError(f"teacher=none: {name} needs a teacher; name a network, for example teacher=resnet56")
    if isinstance(student, Classifier) and isinstance(teacher, DenseModel | Backbone):
        raise UserError(f"method={name}: the teacher is no classifier, as the student is; name one")
    given = options.get("base")
    if isinstance(given, Mapping | None) and (inner or given):
        base = {"name": inner or (schema and schema.base_alone), **(given or {})}
        if inner and base["name"] != inner:
            raise UserError(f"method={name!r}: its base is {base['name']!r}; expected {inner!r}")
        if not isinstance(base["name"], str):
            raise UserError(f"method.base.name={shown(base['name'])}: expected the name of a method")
        options["base"] = base
    parameters = inspect.signature(kind).parameters
    handed: dict[str, Any] = {key: value for key, value in (("data", data), ("files", files)) if key in parameters}
    built = kind(student, teacher, **handed, **complete(name, options))
    built.accumulates = accumulates({"name": name, **options})
    return built
