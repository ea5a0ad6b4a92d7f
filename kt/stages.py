"""A network as an ordered list of stages, cut where the resolution drops, and a head.

Stages are views: they hold the network's own modules, are registered nowhere, and running them in order is the
network's own feature extraction. A new network joins with one function each for `stages_of` and `head_of`:

    @stages_of.register
    def _(network: MyNetwork) -> list[Stage]:
        return [Stage("stem", 2, 32, [network.stem]), Stage("body", 4, 64, [network.body])]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, singledispatch

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from timm.models.efficientnet import EfficientNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VGG, MobileNetV2, ResNet, ShuffleNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck

from kt.errors import UserError
from kt.models.cifar_resnet import CifarBlock, CifarResNet
from kt.models.shufflenet import ShuffleUnitV1, SmallShuffleNet
from kt.models.wrn import WideResNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Step = Callable[[Tensor], Tensor]
# A step taken apart at its last activation: (what comes before it, the activation out of place).
Parts = tuple[Step, Step]


@dataclass
class Stage:
    """A view of consecutive modules of a network that work at one resolution.

    Attributes:
        name: For logs and messages.
        stride: Nominal output stride relative to the image.
        channels: Channels (or token width) of the output.
        steps: What runs, in order: modules of the network, or functions of such.
        owned: The network's modules that belong to the stage, if they are not the steps themselves.
        extra: Parameters of the network that belong to the stage and to no module of it (position embeddings).
    """

    name: str
    stride: int
    channels: int
    steps: Sequence[Step]
    owned: Sequence[nn.Module] | None = None
    extra: Sequence[nn.Parameter] = field(default_factory=tuple)

    def __call__(self, x: Tensor) -> Tensor:
        """The stage's output for the output of the stage before (for the first: the normalised image)."""
        for step in self.steps:
            x = step(x)
        return x

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(pre-activation, output)` in one computation; equal where the stage does not end in an activation."""
        for step in self.steps[:-1]:
            x = step(x)
        parts = _parts(self.steps[-1])
        if parts is None:
            x = self.steps[-1](x)
            return x, x
        before = parts[0](x)
        return before, parts[1](before)

    def preactivation(self, x: Tensor) -> Tensor:
        """The output before the stage's last ReLU."""
        return self.both(x)[0]

    def roots(self) -> list[nn.Module]:
        """The outermost modules of the stage."""
        if self.owned is not None:
            return list(self.owned)
        return [step for step in self.steps if isinstance(step, nn.Module)]

    def modules(self) -> Iterator[nn.Module]:
        """All modules of the stage."""
        for root in self.roots():
            yield from root.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the stage."""
        yield from self.extra
        for root in self.roots():
            yield from root.parameters()

    @property
    def depth(self) -> int:
        """Convolutions on the main path; shortcut projections are not counted."""
        names = [(name, module) for root in self.roots() for name, module in root.named_modules()]
        side = ("downsample", "shortcut")
        return sum(isinstance(module, nn.Conv2d) and not any(word in name for word in side) for name, module in names)


@dataclass
class Head:
    """A view of what follows the last stage.

    Attributes:
        pool: Last stage output -> penultimate feature, (n, c).
        classifier: The last linear layer, or the module that holds it and runs after pooling.
        owned: The network's modules of the head.
        before: Layers between the pooled feature and the last linear layer (VGG).
    """

    pool: Callable[[Tensor], Tensor]
    classifier: nn.Linear
    owned: Sequence[nn.Module]
    before: Callable[[Tensor], Tensor] | None = None

    def pooled(self, x: Tensor) -> Tensor:
        """The penultimate feature, (n, c), for the last stage's output."""
        x = self.pool(x)
        return x if self.before is None else self.before(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits for the last stage's output."""
        return self.classifier(self.pooled(x))

    def modules(self) -> Iterator[nn.Module]:
        """All modules of the head."""
        for root in self.owned:
            yield from root.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the head."""
        for root in self.owned:
            yield from root.parameters()


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per RGB channel of images in 0..1."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def normalisation_of(network: nn.Module) -> Normalisation:
    """The input normalisation a network wants: its attribute `kt_normalisation`, timm's own, or ImageNet's."""
    own = getattr(network, "kt_normalisation", None)
    if own is not None:
        return Normalisation(tuple(own[0]), tuple(own[1]))
    config = getattr(network, "default_cfg", None)
    if isinstance(config, dict) and "mean" in config and "std" in config:
        return Normalisation(tuple(config["mean"]), tuple(config["std"]))
    return Normalisation()


def as_map(feature: Tensor) -> Tensor:
    """A feature as (n, c, h, w): tokens (n, l, c) form a square map, without prefix tokens; maps pass through.

    Raises:
        ValueError: The tokens form no square.
    """
    if feature.dim() == 4:
        return feature
    if feature.dim() != 3:
        raise ValueError(f"expected a map (n, c, h, w) or tokens (n, l, c), got shape {tuple(feature.shape)}")
    n, tokens, channels = feature.shape
    side = int(tokens**0.5)
    if not 0 <= tokens - side * side <= 2:
        raise ValueError(f"{tokens} tokens form no square map, with or without class and distillation token")
    return feature[:, tokens - side * side :].transpose(1, 2).reshape(n, channels, side, side)


# Where the last activation of a step is


@singledispatch
def _parts(step: object) -> Parts | None:
    """A step taken apart at its last activation, or None if it does not end in one."""
    return None


@_parts.register(nn.ReLU)
def _(step: nn.Module) -> Parts:
    return (lambda x: x), F.relu


@_parts.register(nn.ReLU6)
def _(step: nn.Module) -> Parts:
    return (lambda x: x), F.relu6


@_parts.register(nn.Sequential)
def _(step: nn.Sequential) -> Parts | None:
    last = _parts(step[-1])
    if last is None:
        return None

    def before(x: Tensor) -> Tensor:
        for module in list(step)[:-1]:
            x = module(x)
        return last[0](x)

    return before, last[1]


@_parts.register(CifarBlock)
@_parts.register(ShuffleUnitV1)
def _(step: CifarBlock) -> Parts:
    return step.preactivation, F.relu


@_parts.register(BasicBlock)
def _(step: BasicBlock) -> Parts:
    def before(x: Tensor) -> Tensor:
        out = step.bn2(step.conv2(step.relu(step.bn1(step.conv1(x)))))
        return out + (x if step.downsample is None else step.downsample(x))

    return before, F.relu


@_parts.register(Bottleneck)
def _(step: Bottleneck) -> Parts:
    def before(x: Tensor) -> Tensor:
        out = step.relu(step.bn1(step.conv1(x)))
        out = step.bn3(step.conv3(step.relu(step.bn2(step.conv2(out)))))
        return out + (x if step.downsample is None else step.downsample(x))

    return before, F.relu


@_parts.register(BatchNormAct2d)
def _(step: BatchNormAct2d) -> Parts | None:
    activation = _parts(step.act)
    return None if activation is None else (partial(nn.BatchNorm2d.forward, step), activation[1])


@_parts.register(DepthwiseSeparableConv)
def _(step: DepthwiseSeparableConv) -> Parts | None:
    last = None if step.has_skip else _parts(step.bn2)
    if last is None:
        return None
    return (lambda x: last[0](step.conv_pw(step.se(step.aa(step.bn1(step.conv_dw(x))))))), last[1]


# Stages


@singledispatch
def stages_of(network: nn.Module) -> list[Stage]:
    """The stages of a network, in order.

    Raises:
        UserError: Nobody has said where this kind of network is cut.
    """
    raise UserError(
        f"{type(network).__name__} has no stages yet: register a function for it with kt.stages.stages_of.register "
        "(and kt.stages.head_of.register)"
    )


@singledispatch
def head_of(network: nn.Module) -> Head:
    """The head of a network.

    Raises:
        UserError: Nobody has said what follows the last stage of this kind of network.
    """
    raise UserError(f"{type(network).__name__} has no head yet: register one with kt.stages.head_of.register")


def _flat(pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.flatten(pool(x), 1)


def _out_channels(module: nn.Module) -> int:
    """Output channels of a stack of layers: those of its last normalisation or convolution."""
    last = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)][-1]
    return last.out_channels if isinstance(last, nn.Conv2d) else last.num_features


@stages_of.register
def _(network: ResNet) -> list[Stage]:
    stem: list[Step] = [network.conv1, network.bn1, network.relu]
    layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    channels = [_block_channels(layer[-1]) for layer in layers]
    if isinstance(network.maxpool, nn.Identity):  # the small stem keeps the resolution, and so belongs to layer1
        first = [Stage("layer1", 1, channels[0], [*stem, *layers[0]])]
        scale = 1
    else:
        first = [
            Stage("stem", 2, network.conv1.out_channels, stem),
            Stage("layer1", 4, channels[0], [network.maxpool, *layers[0]]),
        ]
        scale = 4
    rest = [Stage(f"layer{i + 1}", scale * 2**i, channels[i], list(layers[i])) for i in (1, 2, 3)]
    return first + rest


def _block_channels(block: nn.Module) -> int:
    return (block.bn3 if isinstance(block, Bottleneck) else block.bn2).num_features  # type: ignore[union-attr, return-value]


@head_of.register
def _(network: ResNet) -> Head:
    return Head(partial(_flat, network.avgpool), network.fc, [network.fc])


@stages_of.register
def _(network: CifarResNet) -> list[Stage]:
    def make(number: int, stride: int) -> Stage:
        layer: nn.Sequential = getattr(network, f"layer{number}")
        channels = layer[-1].bn2.num_features
        if number > 1:
            return Stage(f"layer{number}", stride, channels, list(layer))
        return Stage("layer1", stride, channels, [network.stem, *layer], [network.conv1, network.bn1, layer])

    return [make(1, 1), make(2, 2), make(3, 4)]


@head_of.register
def _(network: CifarResNet) -> Head:
    return Head(partial(_flat, network.avgpool), network.fc, [network.fc])


@stages_of.register
def _(network: WideResNet) -> list[Stage]:
    blocks = [network.block1, network.block2, network.block3]
    channels = [block[-1].conv2.out_channels for block in blocks]
    first = Stage("block1", 1, channels[0], [network.conv1, *blocks[0]])
    return [first, *(Stage(f"block{i + 1}", 2**i, channels[i], list(blocks[i])) for i in (1, 2))]


@head_of.register
def _(network: WideResNet) -> Head:
    return Head(network.pool, network.fc, [network.bn1, network.fc])


@stages_of.register
def _(network: SmallShuffleNet) -> list[Stage]:
    def width(unit: nn.Module) -> int:
        if isinstance(unit, ShuffleUnitV1):
            return unit.expand[1].num_features
        return 2 * unit.main[3][1].num_features  # type: ignore[index, union-attr, return-value]

    stages = [Stage("stem", 1, 24, [network.stem], [network.conv1])]
    for number in (1, 2, 3):
        layer: nn.Sequential = getattr(network, f"layer{number}")
        stages.append(Stage(f"layer{number}", 2**number, width(layer[-1]), list(layer)))
    return stages


@head_of.register
def _(network: SmallShuffleNet) -> Head:
    closing = [] if network.conv_last is None else [network.conv_last]
    return Head(network.pool, network.fc, [*closing, network.fc])


@stages_of.register
def _(network: VGG) -> list[Stage]:
    groups: list[list[nn.Module]] = [[]]
    for layer in network.features:
        if isinstance(layer, nn.MaxPool2d):
            groups.append([])
        groups[-1].append(layer)
    # The last pooling has no layers behind it: it belongs to the head.
    return [
        Stage(f"block{i + 1}", 2**i, _out_channels(nn.ModuleList(group)), group) for i, group in enumerate(groups[:-1])
    ]


@head_of.register
def _(network: VGG) -> Head:
    pool = network.features[-1]
    hidden = list(network.classifier)[:-1]

    def before(x: Tensor) -> Tensor:
        for layer in hidden:
            x = layer(x)
        return x

    return Head(lambda x: _flat(network.avgpool, pool(x)), network.classifier[-1], [pool, network.classifier], before)


@stages_of.register
def _(network: MobileNetV2) -> list[Stage]:
    layers = list(network.features)
    starts = [0] + [i for i, layer in enumerate(layers) if i and getattr(layer, "stride", 1) == 2] + [len(layers)]
    return [
        Stage(f"features{a}", 2 ** (i + 1), _out_channels(layers[b - 1]), layers[a:b])
        for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))
    ]


@head_of.register
def _(network: MobileNetV2) -> Head:
    def pool(x: Tensor) -> Tensor:
        return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)

    return Head(pool, network.classifier[-1], [network.classifier], network.classifier[0])


@stages_of.register
def _(network: ShuffleNetV2) -> list[Stage]:
    widths = [_out_channels(network.conv1), 0, 0, _out_channels(network.conv5)]
    widths[1], widths[2] = (2 * _out_channels(layer[-1].branch2) for layer in (network.stage2, network.stage3))
    return [
        Stage("stem", 2, widths[0], [network.conv1]),
        Stage("stage2", 8, widths[1], [network.maxpool, *network.stage2]),
        Stage("stage3", 16, widths[2], list(network.stage3)),
        Stage("stage4", 32, widths[3], [*network.stage4, network.conv5]),
    ]


@head_of.register
def _(network: ShuffleNetV2) -> Head:
    return Head(lambda x: x.mean([2, 3]), network.fc, [network.fc])


@stages_of.register
def _(network: EfficientNet) -> list[Stage]:
    if not isinstance(network.conv_head, nn.Identity):
        raise UserError("timm's EfficientNet family is cut into stages for MobileNet-v1 only (no head convolution)")
    groups: list[list[nn.Module]] = [[network.conv_stem, network.bn1]]
    for block in (block for blocks in network.blocks for block in blocks):
        if block.conv_dw.stride[0] == 2:
            groups.append([])
        groups[-1].append(block)
    return [Stage(f"blocks{i}", 2 ** (i + 1), _out_channels(group[-1]), group) for i, group in enumerate(groups)]


@head_of.register
def _(network: EfficientNet) -> Head:
    return Head(partial(network.forward_head, pre_logits=True), network.classifier, [network.classifier])


@stages_of.register
def _(network: VisionTransformer) -> list[Stage]:
    blocks = list(network.blocks)
    groups = min(4, len(blocks))
    borders = [round(i * len(blocks) / groups) for i in range(groups + 1)]
    stride = network.patch_embed.patch_size[0]

    def embed(x: Tensor) -> Tensor:
        return network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))

    tokens = [getattr(network, name, None) for name in ("cls_token", "reg_token", "pos_embed")]
    stages = []
    for i, (a, b) in enumerate(zip(borders, borders[1:], strict=False)):
        if i:
            stages.append(Stage(f"blocks{a}-{b - 1}", stride, network.embed_dim, blocks[a:b]))
            continue
        owned = [network.patch_embed, network.norm_pre, *blocks[a:b]]
        extra = [token for token in tokens if isinstance(token, nn.Parameter)]
        stages.append(Stage(f"blocks{a}-{b - 1}", stride, network.embed_dim, [embed, *blocks[a:b]], owned, extra))
    return stages


@head_of.register
def _(network: VisionTransformer) -> Head:
    def pool(x: Tensor) -> Tensor:
        return network.forward_head(network.norm(x), pre_logits=True)

    return Head(pool, network.head, [network.norm, network.fc_norm, network.head])


def run_stages(stages: Iterable[Stage], x: Tensor) -> list[Tensor]:
    """Outputs of all stages for a normalised image."""
    outputs = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs
