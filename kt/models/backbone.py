"""kt's networks as backbones of mmdet and mmseg models, and DeepLab v2's head.

Importing this module registers `StagedBackbone` and `DeepLabV2Head` with mmengine, so that a config of mmdet or mmseg
can name them after `custom_imports = dict(imports=["kt.models.backbone"])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kt.errors import UserError
from kt.models import build_network
from kt.models.cifar import initialise
from kt.stages import Stage, outputs_of, stages_of, without_widening


@MODELS.register_module(name="StagedBackbone")
class StagedBackbone(BaseModule):
    """Any network of `kt.models` without its head, returning the maps of some of its stages.

    Args:
        name: The network, one of `kt.models.NETWORKS`.
        width: Factor on its channel counts.
        out_strides: Nominal strides of the maps to return; of several stages of one stride, the last.
        output_stride: Stages beyond this stride are dilated instead of strided, as DeepLab does.
        stem_pool: Keep the max-pool of a ResNet's stem; strides stay nominal without it.
        norm_eval: Keep batch normalisation in eval mode, as detectors with pretrained backbones do.
        widening: Keep a last layer that only widens the last map for a classifier, as a MobileNet v2 has one.
        frozen_stride: Stages up to this nominal stride never change; 0 for none. 4 is mmdet's `frozen_stages=1`.
        pretrained: The library's name of its ImageNet weights, see `kt.models.build_network`.
        in_channels: Of the input. What reads those behind the colours is drawn afresh, whatever weights the rest has.
        init_cfg: mmengine's initialisation; the network comes initialised.

    Raises:
        UserError: The network has no stage of one of the strides.
    """

    def __init__(
        self,
        name: str,
        width: float = 1.0,
        out_strides: Sequence[int] = (4, 8, 16, 32),
        output_stride: int | None = None,
        stem_pool: bool = True,
        norm_eval: bool = False,
        widening: bool = True,
        frozen_stride: int = 0,
        pretrained: str | None = None,
        in_channels: int = 3,
        init_cfg: Any = None,
    ):
        super().__init__(init_cfg)
        network = build_network(name, num_classes=1, width=width, pretrained=pretrained)
        if in_channels != 3:
            _widen_input(network, in_channels)
        original = {id(tensor): key for key, tensor in network.state_dict(keep_vars=True).items()}
        stages = stages_of(network) if widening else without_widening(stages_of(network))
        ends = {stage.stride: index for index, stage in enumerate(stages)}
        for stride in out_strides:
            if stride not in ends:
                raise UserError(f"backbone.out_strides={list(out_strides)}: {name} has the strides {sorted(ends)}")
        kept = stages[: max(ends[stride] for stride in out_strides) + 1]
        if any(not isinstance(step, nn.Module) for stage in kept for step in stage.steps):
            raise UserError(f"backbone.name={name}: its stages give no maps; expected a convolutional network")
        if output_stride is not None:
            _dilate(kept, output_stride)
        # The stages are fixed here: a dilated network no longer shows where its resolution would drop.
        self.stages = nn.ModuleList()
        for stage in kept:
            pools = stem_pool and (output_stride is None or stage.stride <= output_stride)
            steps = (step for step in stage.steps if isinstance(step, nn.Module))
            self.stages.append(nn.Sequential(*(s for s in steps if pools or not isinstance(s, nn.MaxPool2d))))
        self.frozen = sum(stage.stride <= frozen_stride for stage in kept)
        self.stages[: self.frozen].requires_grad_(False)
        self.described = [(stage.name, stage.stride, stage.channels) for stage in kept]
        # Own key -> the key under which the whole network has it, as checkpoints of its library do.
        self.plain_names = {key: original[id(tensor)] for key, tensor in self.state_dict(keep_vars=True).items()}
        self.norm_eval = norm_eval
        self.outputs = sorted(ends[stride] for stride in out_strides)

    def init_weights(self) -> None:
        """Does nothing: networks come initialised or loaded."""

    def train(self, mode: bool = True) -> StagedBackbone:
        """Train or eval mode, but for frozen stages and for batch normalisation that is kept in eval mode."""
        super().train(mode)
        for stage in self.stages[: self.frozen]:
            stage.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the chosen stages, (n, c, h, w) each."""
        found = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.outputs:
                found.append(x)
        return tuple(found)


@stages_of.register
def _(network: StagedBackbone) -> list[Stage]:
    steps: list[Any] = [tuple(stage) for stage in network.stages]  # type: ignore[arg-type]
    return [Stage(*described, own) for described, own in zip(network.described, steps, strict=True)]


@outputs_of.register
def _(network: StagedBackbone) -> list[int]:
    return network.outputs


def _widen_input(network: nn.Module, channels: int) -> None:
    """Lets a network read further channels behind the colours."""
    name, first = next((name, each) for name, each in network.named_modules() if isinstance(each, nn.Conv2d))
    options = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding")}
    wide = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **options)
    initialise(wide)
    with torch.no_grad():
        wide.weight[:, : first.in_channels] = first.weight
        if wide.bias is not None and first.bias is not None:
            wide.bias.copy_(first.bias)
    network.set_submodule(name, wide)


def _dilate(stages: Sequence[Stage], output_stride: int) -> None:
    """Keeps the resolution from a stride on: strides become dilations of everything that follows.

    Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
    Fully Connected CRFs", section 3.1. `StagedBackbone` leaves out max-pools beyond the stride, as Tsai et al. 2018 do
    with VGG-16's; Chen et al. keep them with stride 1.
    """
    for stage in stages:
        if stage.stride <= output_stride:
            continue
        dilation = stage.stride // output_stride
        first = True
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                strided = module.stride[0] == 2
                if module.kernel_size[0] > 1:
                    # The layer that was strided still sees the finer grid that comes before it.
                    rate = dilation // 2 if strided and first else dilation
                    module.dilation = (rate, rate)
                    module.padding = tuple(rate * (size // 2) for size in module.kernel_size)
                    first = False
                if strided:
                    module.stride = (1, 1)


@MODELS.register_module(name="DeepLabV2Head")
class DeepLabV2Head(BaseDecodeHead):
    """Atrous spatial pyramid pooling of DeepLab v2: the sum of parallel dilated 3x3 classifiers.

    Source: Chen et al., "DeepLab", TPAMI 2018, section 3.3 (ASPP-L: rates 6, 12, 18, 24), without its CRF.

    Args:
        dilations: The rates.
        fc_channels: Width of a pair of 3x3 convolutions before the pyramid, dilated by 4 and without dropout, as the
            VGG-16 of Tsai et al. 2018 has them (fc6 and fc7 of its released code, which sums the first two rates alone;
            here all four, as the paper says); 0 for none, as with ResNet-101.
        kwargs: mmseg's `BaseDecodeHead`'s.
    """

    def __init__(self, dilations: Sequence[int] = (6, 12, 18, 24), fc_channels: int = 0, **kwargs: Any):
        in_channels = kwargs["in_channels"]
        super().__init__(channels=fc_channels or in_channels, **kwargs)
        self.conv_seg = nn.Identity()
        if fc_channels:
            self.fc = nn.Sequential(
                nn.Conv2d(in_channels, fc_channels, 3, padding=4, dilation=4),
                nn.ReLU(),
                nn.Conv2d(fc_channels, fc_channels, 3, padding=4, dilation=4),
                nn.ReLU(),
            )
        else:
            self.fc = nn.Sequential()
        self.pyramid = nn.ModuleList(
            nn.Conv2d(fc_channels or in_channels, self.num_classes, 3, padding=rate, dilation=rate)
            for rate in dilations
        )

    def init_weights(self) -> None:
        """Classifiers start near zero, as the sum of four would otherwise be large."""
        for convolution in self.pyramid:
            nn.init.normal_(convolution.weight, std=0.01)
            nn.init.zeros_(convolution.bias)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (n, classes, h, w) at the resolution of the map that the head reads."""
        x = self.fc(self._transform_inputs(inputs))
        return torch.stack([convolution(x) for convolution in self.pyramid]).sum(0)
