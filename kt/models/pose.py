"""A network for keypoints: any backbone of mmdet or mmseg with a light top-down pathway to heatmaps at stride 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmseg.registry import MODELS as PARTS
from torch import Tensor, nn

STRIDE = 4
# How much more a pixel at a keypoint weighs than one far from all.
FOREGROUND = 10.0


@MODELS.register_module(name="PoseNetwork")
class PoseNetwork(BaseModel):
    """Heatmaps of keypoints, built like mmseg's segmentors.

    Args:
        backbone: Config of a backbone of mmseg (or, with a scope in `type`, of another library).
        data_preprocessor: Config of a data preprocessor of mmseg.
        num_keypoints: How many heatmaps.
        in_channels: Channels of the maps that are read.
        out_indices: Which of the maps that the backbone returns are read, the finest first; by default all.
        channels: Width of the pathway.
        init_cfg: As mmengine's.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        data_preprocessor: Mapping[str, Any],
        num_keypoints: int,
        in_channels: Sequence[int],
        out_indices: Sequence[int] | None = None,
        channels: int = 64,
        init_cfg: Any = None,
    ):
        # Whatever scope is the default where this is built, the parts are mmseg's.
        with DefaultScope.overwrite_default_scope("mmseg"):
            preprocessor, network = PARTS.build(dict(data_preprocessor)), PARTS.build(dict(backbone))
        super().__init__(data_preprocessor=preprocessor, init_cfg=init_cfg)
        self.backbone = network
        self.num_keypoints = num_keypoints
        self.out_indices = tuple(range(len(in_channels)) if out_indices is None else out_indices)
        if len(self.out_indices) != len(in_channels):
            raise ValueError(f"{len(in_channels)} in_channels for {len(self.out_indices)} out_indices")
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.final = nn.Conv2d(channels, num_keypoints, 1)
        # Nearly empty heatmaps at first, as nearly all of a heatmap is empty.
        nn.init.normal_(self.final.weight, std=0.001)
        nn.init.zeros_(self.final.bias)

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The backbone's maps that are read.

        Args:
            inputs: Normalised images, (n, 3, h, w).
        """
        levels = self.backbone(inputs)
        return tuple(levels[index] for index in self.out_indices)

    def heatmaps(self, inputs: Tensor) -> Tensor:
        """Heatmaps (n, k, ceil(h / 4), ceil(w / 4)) of normalised images (n, 3, h, w); 1 at a keypoint."""
        levels = self.extract_feat(inputs)
        merged = self.laterals[-1](levels[-1])
        for lateral, level in zip(reversed(self.laterals[:-1]), reversed(levels[:-1]), strict=True):
            merged = lateral(level) + F.interpolate(merged, size=level.shape[-2:], mode="nearest")
        size = [-(-side // STRIDE) for side in inputs.shape[-2:]]
        if list(merged.shape[-2:]) != size:
            merged = F.interpolate(merged, size=size, mode="bilinear", align_corners=False)
        return self.final(F.relu(merged))

    def loss(self, inputs: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """The squared error of the heatmaps.

        A pixel weighs 1 + 10 t, t being its true value, and the sum is divided by the sum of t over the batch (or 1),
        so that the loss is about as large with one person in an image as with many.

        Args:
            inputs: Normalised images, (n, 3, h, w).
            data_samples: With `gt_heatmaps`, (k, ceil(h / 4), ceil(w / 4)) each; smaller ones (of padded images) are
                padded with zeros.
        """
        found = self.heatmaps(inputs)
        height, width = found.shape[-2:]
        truth = torch.stack(
            [
                F.pad(
                    sample.gt_heatmaps,
                    (0, width - sample.gt_heatmaps.shape[2], 0, height - sample.gt_heatmaps.shape[1]),
                )
                for sample in data_samples
            ]
        ).to(found)
        error = (1 + FOREGROUND * truth) * (found - truth).square()
        return {"loss_heatmap": error.sum() / truth.sum().clamp(min=1)}

    def predict(self, inputs: Tensor, data_samples: Sequence[Any] | None = None) -> list[Any]:
        """The data samples with `pred_heatmaps`, float (k, ceil(h / 4), ceil(w / 4)) of the unpadded image."""
        if data_samples is None:
            raise ValueError("mode='predict' needs data samples")
        for sample, maps in zip(data_samples, self.heatmaps(inputs), strict=True):
            height, width = (-(-side // STRIDE) for side in sample.img_shape[:2])
            sample.pred_heatmaps = maps[:, :height, :width]
        return list(data_samples)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Heatmaps, losses or data samples with predictions, for `mode` tensor, loss or predict."""
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "predict":
            return self.predict(inputs, data_samples)
        if mode == "tensor":
            return self.heatmaps(inputs)
        raise ValueError(f"mode={mode!r}: expected tensor, loss or predict")
