"""Networks for 32x32 images as the distillation literature uses them.

The shapes are those of the common CIFAR-100 benchmark (HobbitLong/RepDistiller, `models/`). CIFAR ResNets are made of
torchvision's blocks and bear torchvision's parameter names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.shufflenetv2 import ShuffleNetV2

from kt.stages import STEM, Head, Stage, flatten, head_of, make_stage, stages_of


def initialise(network: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, ones and zeros for normalisation.

    Of a transposed convolution it is by the fan-in, which torch takes for its fan-out.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class Projection(nn.Conv2d):
    """A 1x1 convolution with a stride, computed on the pixels that it reads, to the same bits.

    In channels_last on CPUs with AVX-512, torch 2.13 (oneDNN) writes beyond its memory in the gradient of such weights
    if they read 8 channels from maps of 46 pixels a side or more.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], weight, bias)


class CifarResNet(nn.Module):
    """He et al., "Deep Residual Learning", 2016, sec. 4.2: three layers of basic blocks, with projection shortcuts.

    Args:
        depth: 6n + 2 layers, n blocks per layer.
        channels: Channels of the stem and the three layers.
        num_classes: Outputs of the classifier.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, depth: int, channels: Sequence[int], num_classes: int):
        super().__init__()
        blocks = (depth - 2) // 6
        before, *planes = channels
        self.conv1 = nn.Conv2d(3, before, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        for number, after in enumerate(planes, 1):
            layer = []
            for i in range(blocks):
                stride = 2 if number > 1 and i == 0 else 1
                downsample = None
                if stride != 1 or before != after:
                    downsample = nn.Sequential(Projection(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
                layer.append(BasicBlock(before, after, stride, downsample))
                before = after
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, h, w)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, and a shortcut.

    Where the shape changes, the shortcut is a projection of the normalised input.
    """

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        same = before == after and stride == 1
        self.shortcut = None if same else Projection(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """A map (n, after, h / stride, w / stride) of a map (n, before, h, w)."""
        y = self.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.conv2(self.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis, "Wide Residual Networks", 2016, without dropout.

    Args:
        depth: 6n + 4 layers, n blocks per layer.
        channels: Channels of the stem and the three layers.
        num_classes: Outputs of the classifier.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, depth: int, channels: Sequence[int], num_classes: int):
        super().__init__()
        blocks = (depth - 4) // 6
        before, *planes = channels
        self.conv1 = nn.Conv2d(3, before, 3, padding=1, bias=False)
        for number, after in enumerate(planes, 1):
            layer = []
            for i in range(blocks):
                layer.append(PreActivationBlock(before, after, 2 if number > 1 and i == 0 else 1))
                before = after
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, h, w)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn1(x))), 1))


class ShuffleUnit(nn.Module):
    """Zhang et al., "ShuffleNet", 2018, fig. 2: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    With stride 2 the input, average-pooled, is concatenated to the result instead of added.

    Args:
        before: Channels of the input.
        after: Channels of the output; `after` minus those concatenated must divide by 4 * groups.
        stride: 1 or 2.
        groups: Groups of the second 1x1 convolution.
        first_groups: Groups of the first one (1 on a thin input).
    """

    def __init__(self, before: int, after: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        made = after - before if stride == 2 else after
        middle = made // 4
        self.groups, self.channels = first_groups, after
        self.conv1 = nn.Conv2d(before, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, made, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None

    def preactivation(self, x: Tensor) -> Tensor:
        """What the unit's last ReLU reads."""
        y = self.relu(self.bn1(self.conv1(x)))
        if self.groups > 1:
            y = shuffle(y, self.groups)
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return y + x if self.shortcut is None else torch.cat((y, self.shortcut(x)), 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map (n, after, h / stride, w / stride) of a map (n, before, h, w)."""
        return self.relu(self.preactivation(x))


@torch.fx.wrap  # its branches are nothing for a tracer
def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels (g, c/g) of a map (n, c, h, w) in the order (c/g, g); the memory format stays."""
    n, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        last = x.permute(0, 2, 3, 1).reshape(n, h, w, groups, c // groups).transpose(3, 4)
        return last.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNetV1(nn.Module):
    """ShuffleNet v1 for 32x32 images: a 1x1 stem of stride 1, then layers of 4, 8 and 4 units.

    Args:
        channels: Channels of the stem and the three layers, multiples of 8 * groups that rise.
        num_classes: Outputs of the classifier.
        groups: Groups of the 1x1 convolutions.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, channels: Sequence[int], num_classes: int, groups: int = 3):
        super().__init__()
        before, *planes = channels
        self.conv1 = nn.Conv2d(3, before, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        for number, (after, units) in enumerate(zip(planes, (4, 8, 4), strict=True), 1):
            layer = []
            for i in range(units):
                first_groups = 1 if number == 1 and i == 0 else groups
                layer.append(ShuffleUnit(before, after, 2 if i == 0 else 1, groups, first_groups))
                before = after
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, h, w)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def shufflenet_v2_32(channels: Sequence[int], num_classes: int) -> ShuffleNetV2:
    """torchvision's ShuffleNet v2 (Ma et al., 2018) for 32x32 images: a 1x1 stem of stride 1, no max-pool."""
    network = ShuffleNetV2([4, 8, 4], list(channels), num_classes)
    network.conv1[0] = nn.Conv2d(3, channels[0], 1, bias=False)
    network.maxpool = nn.Identity()
    return network


@stages_of.register(CifarResNet)
def _(net: Any) -> list[Stage]:
    first = make_stage("layer1", 1, net.conv1, net.bn1, net.relu, net.layer1)
    return [first, make_stage("layer2", 2, net.layer2), make_stage("layer3", 4, net.layer3)]


@stages_of.register(WideResNet)
def _(net: Any) -> list[Stage]:
    # Inner layers end in a sum that the next layer normalises; only the last one has an activation of its own.
    return [
        make_stage("layer1", 1, net.conv1, net.layer1, norm=net.layer2[0].bn1),
        make_stage("layer2", 2, net.layer2, norm=net.layer3[0].bn1),
        make_stage("layer3", 4, net.layer3, net.bn1, net.relu),
    ]


@stages_of.register(ShuffleNetV1)
def _(net: Any) -> list[Stage]:
    stages = [make_stage(STEM, 1, net.conv1, net.bn1, net.relu)]
    for number, layer in enumerate((net.layer1, net.layer2, net.layer3), 1):
        stages.append(make_stage(f"layer{number}", 2**number, layer, channels=layer[-1].channels))
    return stages


@head_of.register(CifarResNet)
@head_of.register(WideResNet)
@head_of.register(ShuffleNetV1)
def _(net: Any) -> Head:
    return Head((net.avgpool, flatten()), (), net.fc)
