"""ShuffleNets for 32x32 images: Zhang et al. 2018 (V1, three groups) and Ma et al. 2018 (V2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolutions; a stride concatenates the pooled input."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        self.stride = stride
        branch = outputs - inputs if stride == 2 else outputs
        middle = branch // 4 // groups * groups
        first = 1 if inputs == 24 else groups
        self.first_groups = first
        self.reduce = _conv_bn(inputs, middle, 1, groups=first)
        self.spatial = _conv_bn(middle, middle, 3, stride, groups=middle)
        self.expand = _conv_bn(middle, branch, 1, groups=groups)

    def preactivation(self, x: Tensor) -> Tensor:
        """Before the last ReLU."""
        out = _shuffle(F.relu(self.reduce(x), inplace=True), self.first_groups)
        out = self.expand(F.relu(self.spatial(out), inplace=True))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
        return out + x

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.preactivation(x), inplace=True)


class ShuffleUnitV2(nn.Module):
    """Half of the channels pass through, the other half is convolved; a stride convolves both."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, half = stride, outputs // 2
        self.side: nn.Module | None = None
        if stride == 2:
            relu = nn.ReLU(inplace=True)
            self.side = nn.Sequential(_conv_bn(inputs, inputs, 3, 2, inputs), _conv_bn(inputs, half, 1), relu)
        first = inputs if stride == 2 else half
        self.main = nn.Sequential(
            _conv_bn(first, half, 1),
            nn.ReLU(inplace=True),
            _conv_bn(half, half, 3, stride, half),
            _conv_bn(half, half, 1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.side is None:
            left, right = x.chunk(2, 1)
            parts = [left, self.main(right)]
        else:
            parts = [self.side(x), self.main(x)]
        return _shuffle(torch.cat(parts, 1), 2)


class SmallShuffleNet(nn.Module):
    """A 1x1 stem at full resolution and three stages of units, each halving the map.

    Args:
        version: 1 or 2.
        channels: Output channels of the three stages.
        blocks: Units in each stage.
        last: Channels of a closing 1x1 convolution (V2), or None.
        num_classes: Number of classes.
        groups: Groups of V1's 1x1 convolutions.
    """

    def __init__(
        self,
        version: int,
        channels: tuple[int, int, int],
        blocks: tuple[int, int, int],
        last: int | None,
        num_classes: int,
        groups: int = 3,
    ):
        super().__init__()
        self.conv1 = _conv_bn(3, 24, 1)
        inputs = 24
        for number, (outputs, count) in enumerate(zip(channels, blocks, strict=True), 1):
            units: list[nn.Module] = []
            for i in range(count):
                stride = 2 if i == 0 else 1
                wide = inputs if i == 0 else outputs
                units.append(
                    ShuffleUnitV1(wide, outputs, stride, groups)
                    if version == 1
                    else ShuffleUnitV2(wide, outputs, stride)
                )
            setattr(self, f"layer{number}", nn.Sequential(*units))
            inputs = outputs
        self.conv_last = nn.Sequential(_conv_bn(inputs, last, 1), nn.ReLU(inplace=True)) if last else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last or inputs, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        """The 1x1 convolution at full resolution."""
        return F.relu(self.conv1(x), inplace=True)

    def pool(self, x: Tensor) -> Tensor:
        """The closing convolution, if there is one, and the spatial mean, (n, c)."""
        if self.conv_last is not None:
            x = self.conv_last(x)
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(self.stem(x))))))
