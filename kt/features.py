"""What losses read of a network for a batch: one pass, only as deep as somebody asks, and every stage at most once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kt.errors import UserError
from kt.stages import STEM, as_map
from kt.transfer import evaluating, frozen_statistics

if TYPE_CHECKING:
    from kt.classifier import Pixels, TaskOutput


@dataclass(frozen=True)
class Level:
    """One of the maps by which a network is compared with another.

    Attributes:
        stage: The stage that it is of, from 0; None for the pooled feature.
        channels: Its channels.
    """

    stage: int | None
    channels: int


def pair_levels(student: Any, teacher: Any, pooled: bool = False) -> tuple[list[Level], list[Level]]:
    """The levels of two networks, as many of each, from the first to the last: stages without a stem.

    They are paired from the end, whatever their sizes: that is how Chen et al. ("Distilling Knowledge via Knowledge
    Review", 2021) pair a wide ResNet with a ShuffleNet, whose maps are half as large.

    Args:
        student, teacher: Classifiers, or without a pooled feature anything with stages.
        pooled: Whether the penultimate features are the last pair.

    Raises:
        UserError: A network without a head is to give a pooled feature.
    """
    if pooled and not hasattr(teacher, "head"):
        raise UserError("teacher: its pooled feature is compared with the student's; expected a classifier")
    found = []
    for network in (student, teacher):
        levels = [
            Level(index, (stage.inner or stage).channels)
            for index, stage in enumerate(network.stages)
            if stage.name != STEM
        ]
        found.append(levels + [Level(None, network.head.classifier.in_features)] if pooled else levels)
    count = min(map(len, found))
    ours, theirs = (levels[-count:] for levels in found)
    return ours, theirs


class Features:
    """The features of one network for one batch. Stages are counted from 0, or from the last one by -1, -2, ...

    Args:
        network: A classifier, detector, segmentor or backbone.
        inputs: The images of a prepared batch.
        graph: Whether gradients can flow back; of a teacher they never do.
        frozen: How many stages, from the first, run in eval mode and without a graph.
    """

    def __init__(self, network: Any, inputs: Tensor, graph: bool = True, frozen: int = 0):
        self.network, self.inputs, self.graph, self.frozen = network, inputs, graph, frozen
        self._outputs: list[Tensor] = []
        self._before: dict[int, Tensor] = {}
        self._inner: dict[int, tuple[Tensor, Tensor]] = {}
        self._normed: dict[int, Tensor] = {}
        self._task: TaskOutput | None = None

    def _recording(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.graph else torch.no_grad()

    def _index(self, index: int) -> int:
        return range(len(self.network.stages))[index]

    def _run(self, last: int, both: bool = False) -> None:
        """Runs the stages up to one, which gives its pre-activation and its inner map as well if `both`."""
        for number in range(len(self._outputs), last + 1):
            stage = self.network.stages[number]
            with evaluating(stage) if number < self.frozen else self._recording():
                x = self._outputs[-1] if number else self.network.normalise(self.inputs)
                if both and number == last:
                    self._inner[number], (self._before[number], y) = stage.inside(x)
                else:
                    y = stage(x)
            self._outputs.append(y)

    def level(self, index: int) -> Tensor:
        """The output of a stage, (n, c, h, w) or tokens (n, l, c)."""
        index = self._index(index)
        self._run(index)
        return self._outputs[index]

    def before(self, index: int) -> Tensor:
        """What the last ReLU of a stage reads; the output where no ReLU comes last.

        Raises:
            RuntimeError: The stage has run for its output already: who needs both asks for this first.
        """
        index = self._index(index)
        self._run(index, both=True)
        if index not in self._before:
            raise RuntimeError(f"stage {index} has run: ask for its pre-activation before its or a later output")
        return self._before[index]

    def at(self, level: Level, activated: bool = False) -> Tensor:
        """The map of a level, (n, c, h, w); of the pooled feature (n, c, 1, 1).

        Args:
            level: Of `pair_levels`.
            activated: Whether its last ReLU has been applied. Without it, a stage that ends in a sum is taken behind
                the normalisation that the next stage begins with, whose running statistics stay as they are.

        Raises:
            RuntimeError: As `before` does, of levels that are not the stage's output.
        """
        if level.stage is None:
            return self.pooled[:, :, None, None]
        index, stage = level.stage, self.network.stages[level.stage]
        if activated and stage.inner is None:
            return as_map(self.level(index))
        if not activated and stage.norm is not None:
            if index not in self._normed:
                with self._recording(), frozen_statistics(stage.norm):
                    self._normed[index] = stage.norm(self.level(index))
            return self._normed[index]
        self.before(index)
        return as_map(self._inner[index][activated])

    @property
    def levels(self) -> list[Tensor]:
        """The outputs of all stages."""
        self._run(self._index(-1))
        return self._outputs

    @property
    def pooled(self) -> Tensor:
        """A classifier's penultimate feature, (n, c)."""
        with self._recording():
            return self.network.head.pooled(self.level(-1))

    @property
    def logits(self) -> Tensor:
        """A classifier's class scores, (n, classes): those of `task` where it has been asked for."""
        if self._task is not None and self._task.logits is not None:
            return self._task.logits
        with self._recording():
            return self.network.head(self.level(-1))

    @property
    def depth(self) -> Tensor:
        """A depth network's answer in metres, (n, h, w): that of `task` where it has been asked for."""
        if self._task is not None and self._task.depth is not None:
            return self._task.depth
        with self._recording():
            return self.network.depth(self.levels, self.inputs)

    @property
    def pixels(self) -> Pixels:
        """What a segmentor's decode head knows of each pixel: of `task` where it has been asked for."""
        if self._task is not None and self._task.pixels is not None:
            return self._task.pixels
        with self._recording():
            return self.network.pixels(self.levels)

    def task(self, batch: Mapping[str, Any]) -> TaskOutput:
        """The network's own task loss on these features, computed once."""
        if self._task is None:
            self._task = self.network.task(self.levels, batch)
        return self._task


class Transformed(Features):
    """Another network's features with a transform of the last stage's maps; what its head makes of them stays.

    Args:
        original: The features; both read the same pass.
        transform: From a map (n, c, h, w) of the last stage to the one that stands for it.
    """

    def __init__(self, original: Features, transform: Callable[[Tensor], Tensor]):
        super().__init__(original.network, original.inputs, original.graph, original.frozen)
        self._original, self._transform = original, transform
        self._last: dict[str, Tensor] = {}

    def _read(self, what: str, index: int) -> Tensor:
        feature = getattr(self._original, what)(index)
        if self._index(index) != self._index(-1):
            return feature
        if what not in self._last:
            self._last[what] = self._transform(as_map(feature))
        return self._last[what]

    def level(self, index: int) -> Tensor:
        """The output of a stage."""
        return self._read("level", index)

    def before(self, index: int) -> Tensor:
        """What the last ReLU of a stage reads."""
        return self._read("before", index)

    def at(self, level: Level, activated: bool = False) -> Tensor:
        """The map of a level."""
        found = self._original.at(level, activated)
        return self._transform(found) if level.stage == self._index(-1) else found

    @property
    def levels(self) -> list[Tensor]:
        """The outputs of all stages."""
        return [*self._original.levels[:-1], self.level(-1)]

    @property
    def pooled(self) -> Tensor:
        """The original's."""
        return self._original.pooled

    @property
    def logits(self) -> Tensor:
        """The original's."""
        return self._original.logits
