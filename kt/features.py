"""What losses read of a network for a batch: one pass, only as deep as somebody asks, and every stage at most once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kt.stages import as_map
from kt.transfer import evaluating

if TYPE_CHECKING:
    from kt.classifier import TaskOutput


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
        self._task: TaskOutput | None = None

    def _recording(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.graph else torch.no_grad()

    def _index(self, index: int) -> int:
        return range(len(self.network.stages))[index]

    def _run(self, last: int, both: bool = False) -> None:
        """Runs the stages up to one, which gives its pre-activation as well if `both`."""
        for number in range(len(self._outputs), last + 1):
            stage = self.network.stages[number]
            with evaluating(stage) if number < self.frozen else self._recording():
                x = self._outputs[-1] if number else self.network.normalise(self.inputs)
                if both and number == last:
                    self._before[number], y = stage.both(x)
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
