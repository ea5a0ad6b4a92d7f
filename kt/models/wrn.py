"""Wide residual networks: Zagoruyko and Komodakis, "Wide Residual Networks", 2016."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        same = inputs == planes and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-width.

    Args:
        depth: 6n + 4 layers.
        channels: Channels of the stem and of the three groups.
        num_classes: Number of classes.
    """

    def __init__(self, depth: int, channels: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"depth {depth}: expected 6n + 4")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        inputs = channels[0]
        for number, planes in enumerate(channels[1:], 1):
            layers = [
                WideBlock(inputs if i == 0 else planes, planes, 2 if i == 0 and number > 1 else 1)
                for i in range(blocks)
            ]
            setattr(self, f"block{number}", nn.Sequential(*layers))
            inputs = planes
        self.bn1 = nn.BatchNorm2d(inputs)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2.0 / fan))

    def pool(self, x: Tensor) -> Tensor:
        """Last normalisation and ReLU, then the spatial mean, (n, c)."""
        return self.avgpool(F.relu(self.bn1(x), inplace=True)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.pool(x))
