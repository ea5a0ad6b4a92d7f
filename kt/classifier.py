"""An image classifier as an mmengine model: any network with stages, and its own input normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from kt.precision import views_in
from kt.stages import Head, Stage, head_of, normalisation_of, run_stages, stages_of


class Pixels(NamedTuple):
    """What a segmentor's decode head knows of each pixel.

    Attributes:
        features: What its last layer reads, (n, c, h, w).
        logits: What it gives, class scores (n, classes, h, w).
    """

    features: Tensor
    logits: Tensor


@dataclass
class TaskOutput:
    """What the student's own head makes of a list of stage outputs.

    Attributes:
        loss: The task loss, a scalar: a classifier's mean cross-entropy, the sum of another network's losses.
        logits: Class scores of a classifier, (n, classes).
        scalars: What else is worth logging, on the device: a classifier's top-1 `accuracy` of this batch in percent,
            the single losses of a detector or segmentor.
        pixels: Of a segmentor.
        depth: Of a depth network, (n, h, w) in metres.
    """

    loss: Tensor
    logits: Tensor | None
    scalars: dict[str, Tensor]
    pixels: Pixels | None = None
    depth: Tensor | None = None


class Classifier(BaseModel):
    """Wraps a plain network; its parameters are the network's and nothing else.

    Args:
        network: A torchvision, timm or kt classification network.
        normalisation: `(mean, std)` per RGB channel for images in 0..1; by default the network's own.
    """

    memory_format = torch.channels_last
    precision = "fp32"  # of a frozen network's stages and head, see `kt.precision`

    def __init__(self, network: nn.Module, normalisation: tuple[Sequence[float], Sequence[float]] | None = None):
        super().__init__()
        self.network = network
        if normalisation is None:
            own = normalisation_of(network)
            normalisation = (own.mean, own.std)
        for name, values in zip(("mean", "std"), normalisation, strict=True):
            # Not persistent: the exported state dict is the plain network's.
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        # The views hold modules of this very network: a copy must make its own.
        return {key: value for key, value in self.__dict__.items() if key not in ("_stages", "_head")}

    @property
    def stages(self) -> list[Stage]:
        """Views of the network's stages, in order."""
        if "_stages" not in self.__dict__:
            self.__dict__["_stages"] = views_in(self.precision, *stages_of(self.network))
        return self.__dict__["_stages"]

    @property
    def reads(self) -> list[int]:
        """The stages whose outputs the head reads: the last one."""
        return [len(self.stages) - 1]

    @property
    def head(self) -> Head:
        """A view of what follows the last stage."""
        if "_head" not in self.__dict__:
            self.__dict__["_head"] = views_in(self.precision, head_of(self.network))[0]
        return self.__dict__["_head"]

    def normalise(self, inputs: Tensor) -> Tensor:
        """Images (n, 3, h, w) in 0..1 as this network wants to see them."""
        return (inputs - self.mean) / self.std

    def extract(self, inputs: Tensor, depth: int | None = None) -> list[Tensor]:
        """Outputs of the first `depth` stages (all by default) for images in 0..1."""
        return run_stages(self.stages[:depth], self.normalise(inputs))

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch itself: loaders of images to classify make tensors already."""
        return dict(batch)

    def task(self, levels: Sequence[Tensor], batch: Mapping[str, Any]) -> TaskOutput:
        """The task loss of the head on the last of the stage outputs, whoever made it."""
        logits, labels = self.head(levels[-1]), batch["labels"]
        hits = (logits.detach().argmax(1) == labels).float().mean() * 100
        return TaskOutput(F.cross_entropy(logits.float(), labels), logits, {"accuracy": hits})

    def forward(  # type: ignore[override]
        self, inputs: Tensor, labels: Tensor | None = None, indices: Tensor | None = None, mode: str = "tensor"
    ) -> Any:
        """Logits for `mode` tensor or predict, `{'loss': cross-entropy}` for mode loss."""
        levels = self.extract(inputs)
        if mode == "loss":
            if labels is None:
                raise ValueError("mode='loss' needs labels")
            return {"loss": self.task(levels, {"labels": labels}).loss}
        return self.head(levels[-1])
