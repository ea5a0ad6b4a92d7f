"""A network for keypoints: any backbone of mmdet or mmseg with a light top-down pathway to heatmaps at stride 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from kt.models.maps import MapNetwork

STRIDE = 4
# How much more a pixel at a keypoint weighs than one far from all.
FOREGROUND = 10.0


@MODELS.register_module(name="PoseNetwork")
class PoseNetwork(MapNetwork):
    """Heatmaps of keypoints.

    Args:
        num_keypoints: How many heatmaps.
        in_channels: Channels of the maps that are read.
        out_indices: Which of the maps that the backbone returns are read, the finest first; by default all.
        channels: Width of the pathway.
        kwargs: `MapNetwork`'s.
    """

    def __init__(
        self,
        num_keypoints: int,
        in_channels: Sequence[int],
        out_indices: Sequence[int] | None = None,
        channels: int = 64,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
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

    def answer(self, inputs: Tensor) -> Tensor:
        """Heatmaps (n, k, ceil(h / 4), ceil(w / 4)) of normalised images (n, 3, h, w); 1 at a keypoint."""
        levels = self.extract_feat(inputs)
        merged = self.laterals[-1](levels[-1])
        for lateral, level in zip(reversed(self.laterals[:-1]), reversed(levels[:-1]), strict=True):
            merged = lateral(level) + F.interpolate(merged, size=level.shape[-2:], mode="nearest")
        size = [-(-side // STRIDE) for side in inputs.shape[-2:]]
        if list(merged.shape[-2:]) != size:
            merged = F.interpolate(merged, size=size, mode="bilinear", align_corners=False)
        return self.final(F.relu(merged))

    def compare(self, found: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """The squared error of the heatmaps.

        A pixel weighs 1 + 10 t, t being its true value, and the sum is divided by the sum of t over the batch (or 1),
        so that the loss is about as large with one person in an image as with many.

        Args:
            found: Heatmaps of images, (n, k, h, w).
            data_samples: With `gt_heatmaps`, (k, ceil(h / 4), ceil(w / 4)) each; smaller ones (of padded images) are
                padded with zeros.
        """
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

    def keep(self, sample: Any, found: Tensor) -> None:
        """`pred_heatmaps`, float (k, ceil(h / 4), ceil(w / 4)) of the unpadded image."""
        height, width = (-(-side // STRIDE) for side in sample.img_shape[:2])
        sample.pred_heatmaps = found[:, :height, :width]
