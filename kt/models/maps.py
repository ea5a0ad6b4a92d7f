"""What networks that answer with maps have in common: a backbone of mmdet or mmseg, built like mmseg's segmentors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from torch import Tensor


class MapNetwork(BaseModel):
    """A backbone; who inherits gives the answer, its losses, and where a data sample keeps it.

    Args:
        backbone: Config of a backbone of mmseg (or, with a scope in `type`, of another library).
        data_preprocessor: Config of a data preprocessor of mmseg.
        init_cfg: As mmengine's.
    """

    def __init__(self, backbone: Mapping[str, Any], data_preprocessor: Mapping[str, Any], init_cfg: Any = None):
        # Whatever scope is the default where this is built, the parts are mmseg's.
        with DefaultScope.overwrite_default_scope("mmseg"):
            preprocessor, network = MODELS.build(dict(data_preprocessor)), MODELS.build(dict(backbone))
        super().__init__(data_preprocessor=preprocessor, init_cfg=init_cfg)
        self.backbone = network

    def answer(self, inputs: Tensor) -> Tensor:
        """One map or more (n, ...) of each of the normalised images (n, c, h, w)."""
        raise NotImplementedError

    def compare(self, found: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Losses of answers, by name."""
        raise NotImplementedError

    def keep(self, sample: Any, found: Tensor) -> None:
        """Writes the answer for an image into its data sample."""
        raise NotImplementedError

    def loss(self, inputs: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Losses of what it answers to normalised images."""
        return self.compare(self.answer(inputs), data_samples)

    def predict(self, inputs: Tensor, data_samples: Sequence[Any] | None = None) -> list[Any]:
        """The data samples with the answers to normalised images."""
        if data_samples is None:
            raise ValueError("mode='predict' needs data samples")
        for sample, found in zip(data_samples, self.answer(inputs), strict=True):
            self.keep(sample, found)
        return list(data_samples)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Answers, losses or data samples with answers, for `mode` tensor, loss or predict."""
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "predict":
            return self.predict(inputs, data_samples)
        if mode == "tensor":
            return self.answer(inputs)
        raise ValueError(f"mode={mode!r}: expected tensor, loss or predict")
