"""A network for depth: any backbone of mmdet or mmseg with the decoder of Sparse-to-Dense.

Importing this module registers `DepthNetwork` and `DepthPreprocessor` with mmengine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS as PARTS
from torch import Tensor, nn

from kt.functional import depth_error
from kt.models.cifar import initialise
from kt.models.maps import MapNetwork

UPSAMPLED = 4  # times that the decoder doubles a map


@PARTS.register_module(name="DepthPreprocessor")
class DepthPreprocessor(SegDataPreProcessor):
    """mmseg's, behind which images may have a fourth channel: measured depth in metres, 0 where there is none.

    Args:
        sparse: Whether they have; it is the data samples' `sparse_depth`, (h, w) each.
        kwargs: mmseg's.
    """

    def __init__(self, sparse: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.sparse = sparse

    def forward(self, data: dict, training: bool = False) -> dict[str, Any]:
        """A batch as mmseg's makes it, with the fourth channel."""
        data = super().forward(data, training)
        if self.sparse:
            measured = torch.stack([sample.sparse_depth for sample in data["data_samples"]])
            data["inputs"] = torch.cat([data["inputs"], measured[:, None].to(data["inputs"])], 1)
        return data


class DepthDecoder(nn.Module):
    """From the last map of a backbone to depth at half the image's size (`deconv3`).

    Source: Ma and Karaman, "Sparse-to-Dense: Depth Prediction from Sparse Depth Samples and a Single Image", ICRA 2018,
    section III-A; sizes and initialisation are those of its released PyTorch code.

    Args:
        in_channels: Channels of the map.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        widths = [in_channels >> times for times in range(1, UPSAMPLED + 2)]
        self.narrow = nn.Sequential(nn.Conv2d(in_channels, widths[0], 1, bias=False), nn.BatchNorm2d(widths[0]))
        self.enlarge = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                )
                for before, after in zip(widths, widths[1:], strict=False)
            )
        )
        self.final = nn.Conv2d(widths[-1], 1, 3, padding=1, bias=False)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Depth (n, 1, 16 h, 16 w) of a map (n, c, h, w)."""
        return self.final(self.enlarge(self.narrow(x)))


@MODELS.register_module(name="DepthNetwork")
class DepthNetwork(MapNetwork):
    """Depth in metres.

    Args:
        in_channels: Channels of the last map that the backbone returns.
        kwargs: `MapNetwork`'s; the data preprocessor, which may be a `DepthPreprocessor`, does not pad.
    """

    def __init__(self, in_channels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.decode_head = DepthDecoder(in_channels)

    def decode_depth(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Depth (n, *size) of what the backbone returns for images of a size."""
        depth = self.decode_head(levels[-1])
        return F.interpolate(depth, size=tuple(size), mode="bilinear", align_corners=True)[:, 0]

    def answer(self, inputs: Tensor) -> Tensor:
        """Depth (n, h, w) of normalised images (n, 3 or 4, h, w)."""
        return self.decode_depth(self.backbone(inputs), inputs.shape[-2:])

    def compare(self, found: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """The error of depth (n, h, w) against the samples' `gt_depth`, (h, w) in metres, 0 where nobody knows it."""
        return {"loss_depth": depth_error(found, torch.stack([sample.gt_depth for sample in data_samples]).to(found))}

    def keep(self, sample: Any, found: Tensor) -> None:
        """`pred_depth`, float (h, w) in metres."""
        sample.pred_depth = found
