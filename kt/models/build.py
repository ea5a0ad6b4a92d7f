"""One builder for every network and every width."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2, ResNet, ShuffleNetV2, get_model_weights
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import VGG, cfgs, make_layers

from kt.errors import UserError, nearest
from kt.models.cifar import (
    CifarResNet,
    PreActivationBlock,
    ShuffleNetV1,
    ShuffleUnit,
    WideResNet,
    initialise,
    shufflenet_v2_32,
)
from kt.models.names import NETWORKS, NetworkSpec, Normalisation
from kt.outside import load_outside
from kt.stages import head_of

IMAGENET_CLASSES = 1000
SHUFFLENET_V2_CHANNELS = (24, 116, 232, 464, 1024)


def slim(channels: int, width: float, divisor: int = 8) -> int:
    """A channel count times `width`, rounded to a multiple of `divisor`, at least `divisor`.

    Rounding takes away no more than a tenth (the rule of Howard et al., "MobileNets", in its authors' code). A width of
    1 changes nothing, multiple or not.
    """
    if width == 1:
        return channels
    wanted = channels * width
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * wanted else rounded + divisor


def damp_residuals(network: nn.Module) -> None:
    """Sets the last normalisation of each of L residual branches to 1 / sqrt(L): their sum does not grow with L.

    Deep networks then learn within the few hundred steps of a small training. Source of the factor: De and Smith,
    "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks", NeurIPS 2020.
    """
    norms = [norm for module in network.modules() if (norm := _branch_norm(module)) is not None]
    for norm in norms:
        nn.init.constant_(norm.weight, len(norms) ** -0.5)


def _branch_norm(module: nn.Module) -> nn.Module | None:
    """The last normalisation before a residual block's addition; None for anything else."""
    if isinstance(module, Bottleneck):
        return module.bn3
    # Where a ReLU and a convolution without bias follow, a factor on the normalisation is one on the branch.
    if isinstance(module, BasicBlock | PreActivationBlock):
        return module.bn2
    if isinstance(module, InvertedResidual) and module.use_res_connect:
        return module.conv[-1]
    if isinstance(module, ShuffleUnit) and module.shortcut is None:
        return module.bn3
    return None


class SlimResNet(ResNet):
    """torchvision's ResNet with every channel count scaled, and a choice of stems.

    Args:
        block: torchvision's residual block.
        layers: Blocks per layer.
        num_classes: Outputs of the classifier.
        width: Factor on every channel count.
        small_stem: A 3x3 stem of stride 1 without max-pool, for small images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int,
        width: float = 1.0,
        small_stem: bool = False,
    ):
        # The parent's constructor fixes the channel counts; all else (its layers, its forward) is used as it is.
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes = slim(64, width)
        self.dilation, self.groups, self.base_width = 1, 1, 64
        kernel, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, padding=1)
        planes = [slim(channels, width) for channels in (64, 128, 256, 512)]
        self.layer1 = self._make_layer(block, planes[0], layers[0])
        self.layer2 = self._make_layer(block, planes[1], layers[1], stride=2)
        self.layer3 = self._make_layer(block, planes[2], layers[2], stride=2)
        self.layer4 = self._make_layer(block, planes[3], layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[3] * block.expansion, num_classes)
        initialise(self)


def _torchvision_resnet(
    num_classes: int, width: float, block: str, layers: Sequence[int], small_stem: bool = False
) -> nn.Module:
    kind = {"basic": BasicBlock, "bottleneck": Bottleneck}[block]
    return SlimResNet(kind, layers, num_classes, width, small_stem)


def _torchvision_vgg(num_classes: int, width: float, batch_norm: bool = False) -> nn.Module:
    plan = [entry if isinstance(entry, str) else slim(entry, width) for entry in cfgs["D"]]
    if width == 1:
        return VGG(make_layers(plan, batch_norm), num_classes)
    # Drawing 120 million weights of a full classifier, only to replace it, would take seconds.
    with torch.device("meta"):
        network = VGG(nn.Sequential(), num_classes, init_weights=False)
    network.features = make_layers(plan, batch_norm)
    last, hidden = slim(512, width), slim(4096, width)
    network.classifier[0] = nn.Linear(last * 7 * 7, hidden)
    network.classifier[3] = nn.Linear(hidden, hidden)
    network.classifier[6] = nn.Linear(hidden, num_classes)
    initialise(network)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return network


def _torchvision_mobilenet_v2(num_classes: int, width: float, multiplier: float = 1.0) -> nn.Module:
    # The multiplier is the paper's (Sandler et al. 2018): it never narrows the last convolution.
    network = MobileNetV2(num_classes, width_mult=multiplier * width)
    if width < 1:
        # The library keeps the last convolution at its full 1280 channels.
        convolution, norm = network.features[-1][0], network.features[-1][1]
        last = slim(network.last_channel, width)
        network.features[-1][0] = nn.Conv2d(convolution.in_channels, last, 1, bias=False)
        network.features[-1][1] = nn.BatchNorm2d(last, norm.eps, norm.momentum)
        initialise(network.features[-1])
        network.classifier[1] = nn.Linear(last, num_classes)
        nn.init.normal_(network.classifier[1].weight, 0, 0.01)
        nn.init.zeros_(network.classifier[1].bias)
        network.last_channel = last
    return network


def _torchvision_shufflenet_v2(num_classes: int, width: float) -> nn.Module:
    return ShuffleNetV2([4, 8, 4], [slim(c, width) for c in SHUFFLENET_V2_CHANNELS], num_classes)


def _timm_mobilenet_v1(num_classes: int, width: float, library: str, **options: Any) -> nn.Module:
    import timm
    from timm.models.efficientnet import _gen_mobilenet_v1

    if width == 1:
        return timm.create_model(library, num_classes=num_classes, **options)
    # timm's models of this kind differ only in this factor, but their constructors do not pass it on.
    return _gen_mobilenet_v1(library.partition(".")[0], width, num_classes=num_classes)


def _timm_vit(
    num_classes: int, width: float, dim: int, heads: int, image_size: int, library: str, **options: Any
) -> nn.Module:
    import timm

    if image_size % 16:
        raise UserError(f"dataset.image_size={image_size}: expected a multiple of 16, the patch size of {library}")
    dim = slim(dim, width)
    heads = next(count for count in range(max(1, round(heads * width)), 0, -1) if dim % count == 0)
    options = {**options, "embed_dim": dim, "num_heads": heads, "img_size": image_size}
    return timm.create_model(library, num_classes=num_classes, **options)


def _cifar_resnet(num_classes: int, width: float, depth: int, channels: Sequence[int]) -> nn.Module:
    return CifarResNet(depth, [slim(c, width) for c in channels], num_classes)


def _wide_resnet(num_classes: int, width: float, depth: int, factor: int) -> nn.Module:
    channels = (16, 16 * factor, 32 * factor, 64 * factor)
    return WideResNet(depth, [slim(c, width) for c in channels], num_classes)


def _shufflenet_v1_32(num_classes: int, width: float) -> nn.Module:
    # Quarters of every difference of channel counts divide into three groups; multiples of 24 see to it.
    channels = [slim(24, width, 24)]
    for full in (240, 480, 960):
        channels.append(max(slim(full, width, 24), channels[-1] + 24))
    return ShuffleNetV1(channels, num_classes)


def _shufflenet_v2_32(num_classes: int, width: float) -> nn.Module:
    return shufflenet_v2_32([slim(c, width) for c in SHUFFLENET_V2_CHANNELS], num_classes)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "torchvision_resnet": _torchvision_resnet,
    "torchvision_vgg": _torchvision_vgg,
    "torchvision_mobilenet_v2": _torchvision_mobilenet_v2,
    "torchvision_shufflenet_v2": _torchvision_shufflenet_v2,
    "timm_mobilenet_v1": _timm_mobilenet_v1,
    "timm_vit": _timm_vit,
    "cifar_resnet": _cifar_resnet,
    "wide_resnet": _wide_resnet,
    "shufflenet_v1_32": _shufflenet_v1_32,
    "shufflenet_v2_32": _shufflenet_v2_32,
}


def _builder(family: str) -> Callable[..., nn.Module]:
    """What builds a family's networks."""
    module, _, function = family.partition(":")
    return getattr(importlib.import_module(module), function) if function else FAMILIES[family]


def build(
    name: str, num_classes: int, width: float, image_size: int, small_stem: bool, pretrained: str | None
) -> nn.Module:
    """See `kt.models.build_network`."""
    load_outside()
    if name not in NETWORKS:
        raise UserError(f"network.name={name!r}: expected one of {', '.join(NETWORKS)}{nearest(name, NETWORKS)}")
    spec = NETWORKS[name]
    if num_classes < 1:
        raise UserError(f"dataset.num_classes={num_classes}: expected at least 1")
    if width <= 0:
        raise UserError(f"network.width={width}: expected a number above 0")
    options = dict(spec.options)
    if small_stem:
        if spec.family != "torchvision_resnet":
            fitting = [other for other, s in NETWORKS.items() if s.family == "torchvision_resnet"]
            raise UserError(
                f"network.small_stem=true: expected false for {name}; only {', '.join(fitting)} have the choice"
            )
        options["small_stem"] = True
    if pretrained and (width != 1 or small_stem):
        raise UserError(
            f"network.pretrained={pretrained!r}: expected width=1 and small_stem=false; no other weights exist"
        )
    timm = spec.family.startswith("timm")
    if spec.family == "timm_vit":
        options["image_size"] = image_size
    if timm:
        options["library"] = spec.library
        if pretrained:
            return _timm_pretrained(name, spec, pretrained, num_classes, options)
    network = _builder(spec.family)(num_classes=num_classes, width=width, **options)
    if width < 1:
        # Slim networks are made for trainings of minutes; full ones start as their library or paper says.
        damp_residuals(network)
    if pretrained:
        _load_torchvision(network, name, spec, pretrained, num_classes)
    return network


def normalisation_of_weights(name: str, pretrained: str) -> Normalisation:
    """The input normalisation that ImageNet weights were trained with, in whatever role their network is.

    Args:
        name: One of `NETWORKS`.
        pretrained: The library's name of the weights, see `kt.models.build_network`.
    """
    spec = NETWORKS[name]
    if pretrained == spec.weights or not spec.family.startswith("timm"):
        return spec.normalisation
    import timm

    if pretrained not in _timm_weights(spec):
        raise _unknown_weights(name, pretrained, _timm_weights(spec))
    found = timm.get_pretrained_cfg(f"{spec.library}.{pretrained}")
    return Normalisation(found.mean, found.std)


def _unknown_weights(name: str, pretrained: str, known: Sequence[str]) -> UserError:
    choices = f"one of {', '.join(known)}" if known else "null (there are none)"
    return UserError(f"network.pretrained={pretrained!r}: expected {choices} for {name}{nearest(pretrained, known)}")


def _unreachable(name: str, pretrained: str, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(
        f"network.pretrained={pretrained!r}: cannot download the weights of {name} ({reason}); give "
        "network.pretrained=null and a checkpoint file instead"
    )


def _load_torchvision(network: nn.Module, name: str, spec: NetworkSpec, pretrained: str, num_classes: int) -> None:
    known = dict(get_model_weights(spec.library).__members__) if spec.library else {}
    if pretrained not in known:
        raise _unknown_weights(name, pretrained, list(known))
    try:
        state: Mapping[str, Tensor] = known[pretrained].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        # No network (URLError is an OSError), or a file whose hash is not that of its name.
        raise _unreachable(name, pretrained, error) from None
    if num_classes != IMAGENET_CLASSES:
        fresh = {id(parameter) for parameter in head_of(network).classifier.parameters()}
        own = {key: p.detach() for key, p in network.named_parameters() if id(p) in fresh}
        state = {**state, **own}
    network.load_state_dict(state)


def _timm_weights(spec: NetworkSpec) -> list[str]:
    import timm

    return [found.partition(".")[2] for found in timm.list_pretrained(f"{spec.library}.*")]


def _timm_pretrained(
    name: str, spec: NetworkSpec, pretrained: str, num_classes: int, options: dict[str, Any]
) -> nn.Module:

    known = _timm_weights(spec)
    if pretrained not in known:
        raise _unknown_weights(name, pretrained, known)
    options = {**options, "library": f"{spec.library}.{pretrained}", "pretrained": True}
    try:
        return _builder(spec.family)(num_classes=num_classes, width=1.0, **options)
    except (OSError, RuntimeError) as error:
        raise _unreachable(name, pretrained, error) from None
