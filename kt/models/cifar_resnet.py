"""ResNets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2.

Shortcuts that change shape are 1x1 convolutions with batch normalisation, as in the distillation literature.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ReLU after the addition."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != planes:
            shortcut = nn.Conv2d(inputs, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes))

    def preactivation(self, x: Tensor) -> Tensor:
        """The sum before the last ReLU."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return out + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.preactivation(x), inplace=True)


class CifarResNet(nn.Module):
    """A residual network of three groups of blocks at 32, 16 and 8 pixels.

    Args:
        depth: 6n + 2 layers.
        channels: Channels of the stem and of the three groups.
        num_classes: Number of classes.
    """

    def __init__(self, depth: int, channels: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"depth {depth}: expected 6n + 2")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        inputs = channels[0]
        for number, planes in enumerate(channels[1:], 1):
            layers = [
                CifarBlock(inputs if i == 0 else planes, planes, 2 if i == 0 and number > 1 else 1)
                for i in range(blocks)
            ]
            setattr(self, f"layer{number}", nn.Sequential(*layers))
            inputs = planes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution."""
        return F.relu(self.bn1(self.conv1(x)), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.avgpool(x).flatten(1))
