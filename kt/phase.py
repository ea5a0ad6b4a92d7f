"""What a phase is: which parameters train with which optimizers, by which loss or step, on which images, how long.

`kt.engine` runs phases. A method whose step is one loss and one update gives a phase's `loss`. One that updates several
sets of parameters, or draws from several loaders, gives a `step`, which says with two verbs what one step does:

    def step(self, loop: Loop, batch: Batch) -> dict[str, Tensor]:
        for _ in range(self.inner):
            held_out = loop.next("held_out")
            loop.update("auxiliary", self.regression(loop.model, held_out))
        output = loop.model.student.task(loop.model.student.extract(batch["inputs"]), batch)
        loop.update("main", output.loss + self.match(loop.model, batch))
        return {"loss": output.loss, **output.scalars}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kt.settings import Schedule, check_settings

if TYPE_CHECKING:
    import torch
    from mmengine.optim import OptimWrapper
    from torch import Tensor

    from kt.data import Data
    from kt.data.loaders import Loader

# What a loader yields, prepared by the student, with `step` (steps done before it) and `total` (all of the phase).
Batch = dict[str, Any]
Model: TypeAlias = Any  # a `kt.transfer.TransferModel`; it holds the phase it is in, and so is not imported here
Groups = Callable[[Model], list[dict[str, Any]]]
Loss: TypeAlias = "Callable[[Model, Batch], tuple[Tensor, dict[str, Tensor]]]"
Step: TypeAlias = "Callable[[Loop, Batch], Mapping[str, Tensor | float]]"

MAIN = "main"  # the optimizer of a phase that has one
TRAIN = "train"  # the loader whose batches a phase goes through
BETAS = (0.9, 0.999)  # torch's of Adam
# What an optimizer may have otherwise than the schedule says.
OPTIMIZER_KEYS = (
    *("optimizer", "lr", "momentum", "nesterov", "weight_decay", "clip_grad"),
    *("policy", "milestones", "gamma", "warmup_epochs"),
)
CONSTANT: Mapping[str, Any] = {"policy": "constant", "warmup_epochs": 0}  # as initialisation phases have it


def everything(model: Model) -> list[dict[str, Any]]:
    """The default parameter group: the student and whatever the method trains beside it."""
    return [{"params": [*model.student.parameters(), *model.method.parameters()]}]


def student_alone(model: Model) -> list[dict[str, Any]]:
    """The student without what the method has beside it."""
    return [{"params": [*model.student.parameters()]}]


@dataclass
class Trained:
    """Parameters that one optimizer trains.

    Attributes:
        groups: From the model to parameter groups (`params`, optionally `lr_factor`).
        schedule: What is otherwise than in the schedule: some of `OPTIMIZER_KEYS`.
        betas: Of Adam and AdamW; schedules have none.

    Raises:
        ValueError: It changes another key, or to a value that the key cannot have.
    """

    groups: Groups = everything
    schedule: Mapping[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = BETAS

    def __post_init__(self) -> None:
        for key in self.schedule:
            if key not in OPTIMIZER_KEYS:
                raise ValueError(f"an optimizer has no {key!r} of its own; expected one of {', '.join(OPTIMIZER_KEYS)}")
        check_settings(self.schedule, Schedule, "schedule.", whole=False)


def only(groups: Groups, **schedule: Any) -> dict[str, Trained]:
    """The optimizer of a phase that has one: see `Trained`."""
    return {MAIN: Trained(groups, schedule)}


@dataclass
class Phase:
    """One stretch of training.

    Attributes:
        name: Folder and log name; the phase that yields the result is called `train`.
        loss: `(model, batch) -> (loss, scalars to log)`; runs inside the (possibly data-parallel) forward. The mean
            over passes and processes makes one update of the phase's one optimizer.
        step: Instead of a loss: `(loop, batch) -> scalars to log`; draws and updates by itself, see `Loop`.
        trains: The optimizers by name; nothing else gets a gradient, and no parameter has two of them.
        loaders: Further loaders that a step draws from, by name, as functions of the data; one called `train` replaces
            the training set.
        fraction: Length as a share of the schedule's steps (at least one).
        evaluate: Score the student on the test set at the schedule's interval.
        enter: Called with the model once, when the phase starts from scratch (not when it resumes).
        before_epoch: Called with the model and the loop before every epoch, also the first one after resuming; what it
            does may depend on the epoch, the loop's loaders and the model's state, which a resumed run has alike.

    Raises:
        ValueError: It has neither a loss nor a step or both, or a loss and not one optimizer.
    """

    name: str
    loss: Loss | None = None
    step: Step | None = None
    trains: Mapping[str, Trained] = field(default_factory=lambda: {MAIN: Trained()})
    loaders: Mapping[str, Callable[[Data], Loader]] = field(default_factory=dict)
    fraction: float = 1.0
    evaluate: bool = True
    enter: Callable[[Model], None] | None = None
    before_epoch: Callable[[Model, Loop], None] | None = None

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.step is None):
            raise ValueError(f"phase '{self.name}': expected either a loss or a step")
        if self.loss is not None and len(self.trains) != 1:
            raise ValueError(f"phase '{self.name}': a loss makes one update; with several optimizers give a step")

    def steps(self, total: int) -> int:
        """Number of steps of this phase where the schedule has `total`."""
        return max(1, round(self.fraction * total))


class Loop(Protocol):
    """What a phase's functions may ask of the loop that runs them (`kt.engine.PhaseLoop`).

    Attributes:
        model: The `TransferModel` itself, never a wrapper around it.
        loaders: All of the phase by name, `train` among them.
        optimizers: mmengine's wrapper of each optimizer by name, at the current learning rates.
        schedules: The settings of each.
        epoch, max_epochs: The current epoch from 0, and how many there are, the last of which may be cut short.
        iter, max_iters: Steps done, and how many there are.
    """

    model: Model
    loaders: Mapping[str, Loader]
    optimizers: Mapping[str, OptimWrapper]
    schedules: Mapping[str, Mapping[str, Any]]
    epoch: int
    max_epochs: int
    iter: int
    max_iters: int

    @property
    def folder(self) -> Path:
        """The run's folder."""

    @property
    def device(self) -> torch.device:
        """Where the model and the batches live."""

    def autocast(self) -> AbstractContextManager:
        """The mixed-precision context of forward passes outside a step, which is in it already."""

    def next(self, loader: str) -> Batch:
        """The next batch of a further loader, which begins anew when it is through."""

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """What an optimizer trains, in the order in which `update` takes gradients."""

    def update(
        self, name: str, loss: Tensor | None = None, grads: Sequence[Tensor | None] | None = None, keep: bool = False
    ) -> None:
        """One update of one optimizer's parameters; nothing else changes or gets a gradient.

        Under several processes gradients are averaged over them, so that all must make the same calls.

        Args:
            name: The optimizer's.
            loss: A scalar; its gradients are those of this process's batch.
            grads: Instead of a loss: a gradient, or None, for each of `parameters(name)`.
            keep: Keep the loss's graph for another update.

        Raises:
            ValueError: There is no such optimizer, there is not either a loss or gradients, or not one for each.
        """


def phase_folder(cell: Path, index: int, phase: Phase) -> Path:
    """Where a phase keeps its checkpoint and log."""
    return cell / "phases" / f"{index}-{phase.name}"
