"""Stages: any network as an ordered list of views of its own modules, and a head.

A network is cut where its resolution drops. Running the stages in order and then the head calls the network's own
modules in the network's own order, so the result, the running statistics and the random numbers drawn are exactly those
of `network(x)`. Views are made on demand, are no modules and are never registered: state dicts stay vanilla.

A network becomes known by `stages_of.register` and `head_of.register`; classes of libraries that need not be installed
are registered by qualified name (`_library`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, singledispatch
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kt.compiling import run_steps
from kt.errors import UserError
from kt.folding import is_folded
from kt.models.names import IMAGENET, Normalisation
from kt.precision import in_own_precision
from kt.recomputing import recomputed

Map = Callable[[Tensor], Tensor]

# Children that lie beside the main path, by the names the supported libraries give them: shortcut projections,
# squeeze-and-excitation and the shorter branch of a ShuffleNet v2 unit.
SIDE_PATHS = frozenset({"downsample", "shortcut", "se", "branch1"})
# The name of a first stage without blocks.
STEM = "stem"


class Piece:
    """A part of a network's forward that is no module of its own, with the modules and parameters that it reads."""

    def __init__(self, function: Map, *owned: nn.Module | nn.Parameter | None):
        self._function = function
        self._owned = [part for part in owned if part is not None]

    def __call__(self, x: Tensor) -> Tensor:
        return self._function(x)

    def modules(self) -> Iterator[nn.Module]:
        """Its torch modules, nested ones included."""
        return chain.from_iterable(part.modules() for part in self._owned if isinstance(part, nn.Module))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""
        for part in self._owned:
            if isinstance(part, nn.Module):
                yield from part.parameters()
            else:
                yield part


Step = nn.Module | Piece


@dataclass(eq=False)
class Stage:
    """A view of one stage.

    Attributes:
        name: Unique within the network.
        stride: Nominal down-sampling from the image to this stage's output (a dilated layer counts as if strided).
        channels: Channels of the output, or the width of its tokens.
        steps: The network's own modules, in order.
        inner: The first part of the stage, where not the stage's output but that of this part is the map that other
            networks' maps are compared with.
        norm: Where the stage ends in a sum: the normalisation, the next stage's, of which an activation follows.
        precision: `fp32`, or `bf16` for a frozen network's, see `kt.precision`.
    """

    name: str
    stride: int
    channels: int
    steps: tuple[Step, ...] = field(repr=False)
    inner: Stage | None = field(default=None, repr=False)
    norm: nn.Module | None = field(default=None, repr=False)
    precision: str = field(default="fp32", repr=False)
    _split: tuple[Map, Map] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._split = _split_chain(self.steps)

    @recomputed
    @in_own_precision
    def __call__(self, x: Tensor) -> Tensor:
        """The stage's output, (n, channels, h, w) or tokens (n, l, channels), for the output of the stage before."""
        return run_steps(self.steps, x)

    @recomputed
    @in_own_precision
    def preactivation(self, x: Tensor) -> Tensor:
        """What the stage's last ReLU reads, so that the ReLU of it is the output; the output where no ReLU comes last.

        In a ShuffleNet v2 unit, half of the channels bypass the last ReLU: they are the output's own. A stage that is
        needed both ways runs once by `both`; forward hooks on the stage's last block do not fire.
        """
        return self._split[0](x) if self._split else self(x)

    @recomputed
    @in_own_precision
    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(preactivation(x), self(x))` from one run; neither overwrites the other."""
        before = self.preactivation(x)
        return before, self._split[1](before) if self._split else before

    @recomputed
    @in_own_precision
    def inside(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`(inner.both(x), both(x))` from one run; twice the same where there is no inner part."""
        if self.inner is None:
            return (found := self.both(x)), found
        inner = self.inner.both(x)
        rest = Stage(self.name, self.stride, self.channels, self.steps[len(self.inner.steps) :])
        return inner, rest.both(inner[1])

    def modules(self) -> Iterator[nn.Module]:
        """Its torch modules, nested ones included."""
        return chain.from_iterable(step.modules() for step in self.steps)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""
        return chain.from_iterable(step.parameters() for step in self.steps)

    @property
    def depth(self) -> int:
        """Convolutions and linear layers on the main path; shortcut projections are not counted."""
        return sum(1 for _ in _main_layers(self.steps, nn.Conv2d, nn.Linear))

    @property
    def last_norm(self) -> nn.BatchNorm2d | None:
        """The batch normalisation that gives the compared map, the last one of the main path, or `norm`; if any."""
        part = self.inner or self
        *_, last = (None, *_main_layers(part.steps, nn.BatchNorm2d), *([part.norm] if part.norm else []))
        return last


def run_stages(stages: Iterable[Stage], x: Tensor) -> list[Tensor]:
    """The output of every stage, one after the other."""
    outputs = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs


@dataclass(eq=False)
class Head:
    """A view of what follows the last stage.

    Attributes:
        steps: From the last stage's output to the penultimate feature.
        dropout: What lies between that feature and the classifier.
        classifier: The last layer.
        precision: As a stage's.
    """

    steps: tuple[Step, ...]
    dropout: tuple[Step, ...]
    classifier: nn.Linear
    precision: str = "fp32"

    @in_own_precision
    def __call__(self, x: Tensor) -> Tensor:
        """Logits (n, classes) for the last stage's output."""
        return self.classifier(run_steps(self.dropout, self.pooled(x)))

    @in_own_precision
    def pooled(self, x: Tensor) -> Tensor:
        """The penultimate feature (n, c), before dropout, for the last stage's output."""
        return run_steps(self.steps, x)

    def modules(self) -> Iterator[nn.Module]:
        """Its torch modules, nested ones included."""
        return chain.from_iterable(step.modules() for step in (*self.steps, *self.dropout, self.classifier))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""
        return chain.from_iterable(step.parameters() for step in (*self.steps, *self.dropout, self.classifier))


def normalisation_of(network: nn.Module) -> Normalisation:
    """The input normalisation a network was made for.

    The attribute `kt_normalisation = (mean, std)` wins, then timm's `default_cfg`; all others get ImageNet's.
    """
    own = getattr(network, "kt_normalisation", None)
    if own is None:
        settings = getattr(network, "default_cfg", None) or {}
        own = (settings.get("mean", IMAGENET.mean), settings.get("std", IMAGENET.std))
    mean, std = own
    return Normalisation(tuple(mean), tuple(std))


def as_map(feature: Tensor) -> Tensor:
    """A stage output as a map (n, c, h, w): tokens (n, l, c) become a square map, without their class token.

    Raises:
        ValueError: The tensor is neither a map nor l = s*s or 1 + s*s tokens.
    """
    if feature.dim() == 4:
        return feature
    if feature.dim() == 3:
        n, length, channels = feature.shape
        for patches in (length, length - 1):
            side = math.isqrt(patches)
            if patches and side * side == patches:
                return feature[:, length - patches :].transpose(1, 2).reshape(n, channels, side, side)
    raise ValueError(f"a feature of shape {tuple(feature.shape)} is neither a map (n, c, h, w) nor a square of tokens")


# ---------------------------------------------------------------------------------------------------- dispatch

_STAGES: dict[str, Callable[[Any], list[Stage]]] = {}
_HEADS: dict[str, Callable[[Any], Head]] = {}
_OUTPUTS: dict[str, Callable[[Any], list[int]]] = {}
_SPLITS: dict[str, Callable[[Any], tuple[Map, Map] | None]] = {}


def _library(table: dict[str, Any], *names: str) -> Callable[[Callable], Callable]:
    """Registers a function for classes given by qualified name, so that their library is not imported."""

    def register(function: Callable) -> Callable:
        table.update(dict.fromkeys(names, function))
        return function

    return register


def _find(table: dict[str, Any], kind: type) -> Any:
    """The entry for a class or the nearest of its bases, unless the class has another forward than that base."""
    for base in kind.__mro__:
        function = table.get(f"{base.__module__}.{base.__qualname__}")
        if function is not None:
            parts = ("forward", "_forward_impl", "forward_features", "forward_head")
            same = all(getattr(kind, part, None) is getattr(base, part, None) for part in parts)
            return function if same else None
    return None


def _known(table: dict[str, Any], network: nn.Module) -> Any:
    function = _find(table, type(network))
    if function is None:
        kind = f"{type(network).__module__}.{type(network).__qualname__}"
        raise UserError(
            f"network={kind}: its stages are unknown; expected one of {', '.join(sorted(table))}, a network of "
            "kt.models or one registered with stages_of.register and head_of.register"
        )
    return function


@singledispatch
def stages_of(network: nn.Module) -> list[Stage]:
    """Views of the network's stages, in order.

    Raises:
        UserError: Nobody has said how to cut networks of this class.
    """
    return _known(_STAGES, network)(network)


@singledispatch
def head_of(network: nn.Module) -> Head:
    """A view of what follows the last stage: `head_of(net)(last stage's output) == net(x)`.

    Raises:
        UserError: Nobody has said what the head of networks of this class is.
    """
    return _known(_HEADS, network)(network)


@singledispatch
def outputs_of(backbone: nn.Module) -> list[int]:
    """Which stages' outputs a detector's or segmentor's backbone returns, in order: indices into `stages_of(backbone)`.

    Raises:
        UserError: Nobody has said what backbones of this class return.
    """
    return _known(_OUTPUTS, backbone)(backbone)


# ---------------------------------------------------------------------------------- helpers for those who register


def make_stage(name: str, stride: int, *steps: Step, channels: int | None = None, **rest: Any) -> Stage:
    """A stage of the given steps; `channels` are by default those of its last main-path convolution."""
    if channels is None:
        *_, last = _main_layers(steps, nn.Conv2d, nn.Linear)
        channels = last.out_channels
    return Stage(name, stride, channels, steps, **rest)


def without_widening(stages: Sequence[Stage]) -> list[Stage]:
    """Stages without a last layer that only widens the last map for a classifier, if there is one (MobileNet v2's)."""
    *others, last = stages
    *blocks, final = last.steps
    if blocks and isinstance(final, nn.Sequential) and isinstance(final[0], nn.Conv2d):
        last = make_stage(last.name, last.stride, *blocks)
    return [*others, last]


def flatten() -> Piece:
    """`torch.flatten(x, 1)` as a step."""
    return Piece(partial(torch.flatten, start_dim=1))


def _main_layers(steps: Iterable[Step], *kinds: type[nn.Module]) -> Iterator[Any]:
    """Layers of some kinds outside side paths, in order of registration."""
    for step in steps:
        if isinstance(step, kinds):
            yield step
        elif isinstance(step, nn.Module):
            yield from _main_layers((child for name, child in step.named_children() if name not in SIDE_PATHS), *kinds)
        else:
            yield from _main_layers((part for part in step._owned if isinstance(part, nn.Module)), *kinds)


def _strided(step: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.MaxPool2d)
    return any(isinstance(m, kinds) and m.stride in (2, (2, 2)) for m in step.modules())


def _cut(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Groups of consecutive modules; each one that halves the resolution begins a new group."""
    groups: list[list[nn.Module]] = []
    for module in modules:
        if not groups or _strided(module):
            groups.append([])
        groups[-1].append(module)
    return groups


def _head_of_sequential(steps: Sequence[Step], classifier: Iterable[nn.Module]) -> Head:
    """A head whose `classifier` is a chain of modules that ends in dropout and a linear layer."""
    *before, last = classifier
    assert isinstance(last, nn.Linear)
    cut = len(before)
    while cut and isinstance(before[cut - 1], nn.Dropout):
        cut -= 1
    return Head((*steps, *before[:cut]), tuple(before[cut:]), last)


# ------------------------------------------------------------------------------------------- before the last ReLU


def _split_last_relu(module: Any) -> tuple[Map, Map] | None:
    """`(f, g)` with `g(f(x)) == module(x)` and g its last ReLU, not in place; None if the module ends otherwise.

    A module that ends in a ReLU after more than a chain of modules says what comes before by a method `preactivation`.
    """
    if isinstance(module, nn.ReLU | nn.ReLU6):
        return (lambda x: x), F.relu6 if isinstance(module, nn.ReLU6) else F.relu
    if isinstance(module, nn.Sequential):
        return _split_chain(tuple(module))
    if hasattr(module, "preactivation"):
        return module.preactivation, F.relu
    function = _find(_SPLITS, type(module))
    return function(module) if function else None


def _split_chain(steps: Sequence[Any]) -> tuple[Map, Map] | None:
    steps = [step for step in steps if not isinstance(step, nn.Identity)]
    last = _split_last_relu(steps[-1]) if steps else None
    if last is None:
        return None
    before, activation = last
    return (lambda x: before(run_steps(steps[:-1], x))), activation


def _residual_sum(block: Any, convolutions: Sequence[tuple[str, str]], x: Tensor) -> Tensor:
    """The sum that a torchvision residual block hands to its last ReLU."""
    y = x
    for number, (conv, norm) in enumerate(convolutions):
        y = getattr(block, norm)(getattr(block, conv)(block.relu(y) if number else y))
    y += x if block.downsample is None else block.downsample(x)
    return y


@_library(_SPLITS, "torchvision.models.resnet.BasicBlock")
def _(block: Any) -> tuple[Map, Map]:
    return partial(_residual_sum, block, (("conv1", "bn1"), ("conv2", "bn2"))), F.relu


@_library(_SPLITS, "torchvision.models.resnet.Bottleneck")
def _(block: Any) -> tuple[Map, Map]:
    return partial(_residual_sum, block, (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))), F.relu


@_library(_SPLITS, *(f"{library}.models.backbones.resnet.BasicBlock" for library in ("mmdet", "mmseg")))
def _(block: Any) -> tuple[Map, Map]:
    return partial(_residual_sum, block, (("conv1", "norm1"), ("conv2", "norm2"))), F.relu


@_library(_SPLITS, *(f"{library}.models.backbones.resnet.Bottleneck" for library in ("mmdet", "mmseg")))
def _(block: Any) -> tuple[Map, Map] | None:
    if block.with_plugins:
        return None
    return partial(_residual_sum, block, (("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3"))), F.relu


@_library(_SPLITS, "torchvision.models.shufflenetv2.InvertedResidual")
def _(block: Any) -> tuple[Map, Map]:
    from torchvision.models.shufflenetv2 import channel_shuffle

    def before(branch: nn.Sequential, x: Tensor) -> Tensor:
        return run_steps(tuple(branch)[:-1], x)

    def preactivation(x: Tensor) -> Tensor:
        # ReLU commutes with the shuffle and leaves the bypassing half alone, which is not negative already.
        if block.stride == 1:
            bypass, x = x.chunk(2, dim=1)
        else:
            bypass = before(block.branch1, x)
        return channel_shuffle(torch.cat((bypass, before(block.branch2, x)), dim=1), 2)

    return preactivation, F.relu


@_library(_SPLITS, "timm.layers.norm_act.BatchNormAct2d")
def _(norm: Any) -> tuple[Map, Map] | None:
    last = _split_last_relu(norm.act)

    def before(x: Tensor) -> Tensor:
        # timm's layer is the plain batch normalisation it inherits from, then `drop` and `act`.
        return norm.drop(x if is_folded(norm) else nn.BatchNorm2d.forward(norm, x))

    return last and (before, last[1])


@_library(_SPLITS, "timm.models._efficientnet_blocks.DepthwiseSeparableConv")
def _(block: Any) -> tuple[Map, Map] | None:
    if block.has_skip or block.conv_s2d is not None:
        return None
    return _split_chain((block.conv_dw, block.bn1, block.aa, block.se, block.conv_pw, block.bn2))


# ------------------------------------------------------------------------------------------------------ torchvision


@_library(_STAGES, "torchvision.models.resnet.ResNet")
def _(net: Any) -> list[Stage]:
    stem: tuple[Any, ...] = (net.conv1, net.bn1, net.relu)
    stride = net.conv1.stride[0]
    stages = []
    if isinstance(net.maxpool, nn.MaxPool2d):
        stages.append(make_stage(STEM, stride, *stem))
        stem, stride = (net.maxpool,), 2 * stride
    else:
        # The stem of a network for small images keeps the resolution, and so belongs to the first layer.
        stem = (*stem, net.maxpool)
    stages.append(make_stage("layer1", stride, *stem, net.layer1))
    for number in (2, 3, 4):
        stages.append(make_stage(f"layer{number}", stride * 2 ** (number - 1), getattr(net, f"layer{number}")))
    return stages


@_library(_HEADS, "torchvision.models.resnet.ResNet")
def _(net: Any) -> Head:
    return Head((net.avgpool, flatten()), (), net.fc)


@_library(_STAGES, "torchvision.models.vgg.VGG")
def _(net: Any) -> list[Stage]:
    *groups, _ = _cut(net.features)
    return [make_stage(f"block{i + 1}", 2**i, *group) for i, group in enumerate(groups)]


@_library(_HEADS, "torchvision.models.vgg.VGG")
def _(net: Any) -> Head:
    # The last max-pool is the head's: nothing follows it at its resolution.
    *_, last = _cut(net.features)
    return _head_of_sequential((*last, net.avgpool, flatten()), net.classifier)


@_library(_STAGES, "torchvision.models.mobilenetv2.MobileNetV2")
def _(net: Any) -> list[Stage]:
    return [make_stage(f"stage{i}", 2**i, *group) for i, group in enumerate(_cut(net.features), 1)]


@_library(_HEADS, "torchvision.models.mobilenetv2.MobileNetV2")
def _(net: Any) -> Head:
    pool = Piece(partial(F.adaptive_avg_pool2d, output_size=(1, 1)))
    return _head_of_sequential((pool, flatten()), net.classifier)


@_library(_STAGES, "torchvision.models.shufflenetv2.ShuffleNetV2")
def _(net: Any) -> list[Stage]:
    stem = net.conv1[0].stride[0]
    # The pool alone would be a stage without parameters: it goes with the layer that follows it.
    pooled = stem * (2 if isinstance(net.maxpool, nn.MaxPool2d) else 1)
    layers = {"stage2": (net.maxpool, net.stage2), "stage3": (net.stage3,), "stage4": (net.stage4,)}
    stages = [make_stage(STEM, stem, net.conv1)]
    for number, (name, steps) in enumerate(layers.items(), 1):
        # A unit's output is the concatenation of both branches.
        channels = net._stage_out_channels[number]
        stages.append(make_stage(name, pooled * 2**number, *steps, channels=channels))
    # The last stage ends in a plain convolution, whose output the literature knows only pooled.
    units = stages.pop()
    return [*stages, make_stage(units.name, units.stride, *units.steps, net.conv5, inner=units)]


@_library(_HEADS, "torchvision.models.shufflenetv2.ShuffleNetV2")
def _(net: Any) -> Head:
    return Head((Piece(lambda x: x.mean([2, 3])),), (), net.fc)


# ------------------------------------------------------------------------------------------------------------- timm


@_library(_STAGES, "timm.models.efficientnet.EfficientNet")
def _(net: Any) -> list[Stage]:
    groups = _cut((net.conv_stem, net.bn1, *net.blocks, net.conv_head, net.bn2))
    return [make_stage(f"stage{i}", 2**i, *group) for i, group in enumerate(groups, 1)]


@_library(_HEADS, "timm.models.efficientnet.EfficientNet")
def _(net: Any) -> Head:
    def dropout(x: Tensor) -> Tensor:
        return F.dropout(x, net.drop_rate, net.training) if net.drop_rate > 0 else x

    return Head((net.global_pool,), (Piece(dropout),), net.classifier)


@_library(_STAGES, "timm.models.vision_transformer.VisionTransformer")
def _(net: Any, groups: int = 4) -> list[Stage]:
    def embed(x: Tensor) -> Tensor:
        return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))

    own = (net.patch_embed, net.pos_drop, net.patch_drop, net.norm_pre, net.cls_token, net.reg_token, net.pos_embed)
    blocks, count = list(net.blocks), len(net.blocks)
    stages = []
    for i in range(groups):
        steps = blocks[i * count // groups : (i + 1) * count // groups]
        first = () if i else (Piece(embed, *own),)
        stride = net.patch_embed.patch_size[0]
        stages.append(make_stage(f"blocks{i + 1}", stride, *first, *steps, channels=net.embed_dim))
    return stages


@_library(_HEADS, "timm.models.vision_transformer.VisionTransformer")
def _(net: Any) -> Head:
    return Head((net.norm, Piece(net.pool, net.attn_pool), net.fc_norm), (net.head_drop,), net.head)


# --------------------------------------------------------------------------------------------------- mmdet and mmseg

_MM_RESNETS = tuple(f"{library}.models.backbones.resnet.ResNet" for library in ("mmdet", "mmseg"))
_MM_MOBILENETS = tuple(f"{library}.models.backbones.mobilenet_v2.MobileNetV2" for library in ("mmdet", "mmseg"))
# Of layer1 to layer7 and conv2, whatever a segmentor dilates.
_MOBILENET_V2_STRIDES = (2, 4, 8, 16, 16, 32, 32, 32)


@_library(_STAGES, *_MM_RESNETS)
def _(net: Any) -> list[Stage]:
    stem = (net.stem,) if net.deep_stem else (net.conv1, net.norm1, net.relu)
    stages = [make_stage(STEM, 2, *stem)]
    for number, name in enumerate(net.res_layers):
        first = () if number else (net.maxpool,)
        stages.append(make_stage(name, 4 * 2**number, *first, getattr(net, name)))
    return stages


@_library(_OUTPUTS, *_MM_RESNETS)
def _(net: Any) -> list[int]:
    return [1 + index for index in range(len(net.res_layers)) if index in net.out_indices]


def _mobilenet_v2_groups(net: Any) -> list[list[int]]:
    """Numbers of the layers of each stage: a new one begins where the stride rises and behind every output."""
    groups: list[list[int]] = [[]]
    for index in range(max(net.out_indices) + 1):
        rises = index > 0 and _MOBILENET_V2_STRIDES[index] != _MOBILENET_V2_STRIDES[index - 1]
        if rises or index - 1 in net.out_indices:
            groups.append([])
        groups[-1].append(index)
    return groups


@_library(_STAGES, *_MM_MOBILENETS)
def _(net: Any) -> list[Stage]:
    stages: list[Stage] = []
    for group in _mobilenet_v2_groups(net):
        first = () if stages else (net.conv1,)
        steps = [getattr(net, net.layers[index]) for index in group]
        stages.append(make_stage(f"stage{len(stages) + 1}", _MOBILENET_V2_STRIDES[group[-1]], *first, *steps))
    return stages


@_library(_OUTPUTS, *_MM_MOBILENETS)
def _(net: Any) -> list[int]:
    return [number for number, group in enumerate(_mobilenet_v2_groups(net)) if group[-1] in net.out_indices]
