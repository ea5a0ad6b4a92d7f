"""One builder for every network, at any width."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kt.errors import UserError, nearest
from kt.models.cifar_resnet import CifarResNet
from kt.models.names import NETWORK_NAMES, TORCHVISION
from kt.models.shufflenet import SmallShuffleNet
from kt.models.wrn import WideResNet

CIFAR_RESNETS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "resnet8": (8, (16, 16, 32, 64)),
    "resnet20": (20, (16, 16, 32, 64)),
    "resnet20_half": (20, (8, 8, 16, 32)),
    "resnet32": (32, (16, 16, 32, 64)),
    "resnet56": (56, (16, 16, 32, 64)),
    "resnet110": (110, (16, 16, 32, 64)),
    "resnet8x4": (8, (32, 64, 128, 256)),
    "resnet32x4": (32, (32, 64, 128, 256)),
}
WIDE_RESNETS = {"wrn_16_2": (16, 2), "wrn_40_1": (40, 1), "wrn_40_2": (40, 2)}
VITS = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "vit_small": "vit_small_patch16_224",
}
TORCHVISION_NAMES = {"shufflenet_v2": "shufflenet_v2_x1_0"}


def scaled(channels: int, width: float) -> int:
    """`channels * width`, rounded to a multiple of 8 and at least 8; unchanged at width 1."""
    return channels if width == 1.0 else max(8, int(channels * width / 8 + 0.5) * 8)


def build_network(
    name: str,
    num_classes: int,
    width: float = 1.0,
    image_size: int = 224,
    small_stem: bool = False,
    pretrained: str | None = None,
) -> nn.Module:
    """A freshly initialised (or pretrained) classification network.

    Args:
        name: One of `kt.models.NETWORK_NAMES`.
        num_classes: Number of classes.
        width: Factor on every channel count; 1 gives the library's own network, key by key.
        image_size: Side of the images; only vision transformers depend on it.
        small_stem: For torchvision ResNets: a 3x3 stem of stride 1 without pooling, as used for 32x32 images.
        pretrained: Name of torchvision weights, for example `IMAGENET1K_V1`; a classifier of another size starts fresh.

    Raises:
        UserError: Unknown network or weights, or an option that the network does not have.
    """
    if name not in NETWORK_NAMES:
        raise UserError(f"network={name!r}: expected one of {', '.join(NETWORK_NAMES)}{nearest(name, NETWORK_NAMES)}")
    if pretrained is not None and (name not in TORCHVISION or width != 1.0 or small_stem):
        raise UserError(
            f"pretrained={pretrained!r}: only full-width torchvision networks have weights, not {name!r} like this"
        )
    if small_stem and not (name in TORCHVISION and name.startswith("resnet")):
        raise UserError(f"small_stem=true: only torchvision ResNets have one, not {name!r}")
    if name in CIFAR_RESNETS:
        depth, channels = CIFAR_RESNETS[name]
        return CifarResNet(depth, tuple(scaled(c, width) for c in channels), num_classes)  # type: ignore[arg-type]
    if name in WIDE_RESNETS:
        depth, wide = WIDE_RESNETS[name]
        slim = [scaled(c, width) for c in (16, 16 * wide, 32 * wide, 64 * wide)]
        return WideResNet(depth, tuple(slim), num_classes)  # type: ignore[arg-type]
    if name == "shufflenet_v1_32":
        # Multiples of 12 keep three groups and the bottleneck's quarter whole.
        out = tuple(c if width == 1.0 else max(48, int(c * width / 12 + 0.5) * 12) for c in (240, 480, 960))
        return SmallShuffleNet(1, out, (4, 8, 4), None, num_classes)  # type: ignore[arg-type]
    if name == "shufflenet_v2_32":
        out = tuple(scaled(c, width) for c in (116, 232, 464))
        return SmallShuffleNet(2, out, (4, 8, 4), scaled(1024, width), num_classes)  # type: ignore[arg-type]
    if name in VITS:
        return _vit(VITS[name], num_classes, width, image_size)
    if name == "mobilenet_v1":
        network: nn.Module = timm.create_model("mobilenetv1_100", num_classes=num_classes)
        return network if width == 1.0 else _slim(network, width)
    return _torchvision(name, num_classes, width, small_stem, pretrained)


def _vit(name: str, num_classes: int, width: float, image_size: int) -> nn.Module:
    settings: dict[str, Any] = {"num_classes": num_classes, "img_size": image_size}
    if image_size < 64:
        settings["patch_size"] = 4
    if width != 1.0:
        heads = timm.create_model(name, num_classes=num_classes).blocks[0].attn.num_heads
        heads = max(1, int(heads * width + 0.5))
        settings.update(num_heads=heads, embed_dim=64 * heads)
    return timm.create_model(name, **settings)


def _torchvision(name: str, num_classes: int, width: float, small_stem: bool, pretrained: str | None) -> nn.Module:
    library_name = TORCHVISION_NAMES.get(name, name)
    if name == "shufflenet_v2" and width != 1.0:
        # Units split channels in halves: scale the halves, not every layer by itself.
        wide = [scaled(c, width) for c in (24, 116, 232, 464, 1024)]
        return torchvision.models.ShuffleNetV2([4, 8, 4], wide, num_classes=num_classes)
    if pretrained is None:
        network = torchvision.models.get_model(library_name, weights=None, num_classes=num_classes)
    else:
        network = _pretrained(library_name, pretrained, num_classes)
    if small_stem:
        network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network if width == 1.0 else _slim(network, width)


def _pretrained(library_name: str, weights: str, num_classes: int) -> nn.Module:
    known = list(torchvision.models.get_model_weights(library_name).__members__)
    if weights not in known:
        raise UserError(f"pretrained={weights!r}: {library_name} has {', '.join(known)}{nearest(weights, known)}")
    try:
        network = torchvision.models.get_model(library_name, weights=weights)
    except (URLError, OSError) as error:
        raise UserError(
            f"pretrained={weights!r}: the weights of {library_name} could not be downloaded ({error}); "
            "give teacher.checkpoint= a file, or use scale=mini"
        ) from None
    if num_classes != 1000:
        last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        fresh = nn.Linear(last.in_features, num_classes)
        for parent in network.modules():
            for child_name, child in parent.named_children():
                if child is last:
                    setattr(parent, child_name, fresh)
    return network


def _slim(network: nn.Module, width: float) -> nn.Module:
    """Rebuilds every layer of a network at a fraction of its channels, in place; input and classes stay.

    Equal channel counts shrink equally, so sums of branches still fit. Weights are drawn anew (He initialisation).
    """
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    last_channels = convolutions[-1].out_channels
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            inputs = module.in_channels if module.in_channels == 3 else scaled(module.in_channels, width)
            outputs = scaled(module.out_channels, width)
            if module.groups == module.in_channels:
                module.groups = inputs
            module.in_channels, module.out_channels = inputs, outputs
            module.weight = nn.Parameter(torch.empty(outputs, inputs // module.groups, *module.kernel_size))
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros(outputs))
        elif isinstance(module, _BatchNorm):
            module.num_features = scaled(module.num_features, width)
            module.weight = nn.Parameter(torch.ones(module.num_features))
            module.bias = nn.Parameter(torch.zeros(module.num_features))
            module.running_mean = torch.zeros(module.num_features)
            module.running_var = torch.ones(module.num_features)
        elif isinstance(module, nn.Linear):
            positions = module.in_features // last_channels if module is linears[0] else 1
            module.in_features = scaled(module.in_features // positions, width) * positions
            if module is not linears[-1]:
                module.out_features = scaled(module.out_features, width)
            module.weight = nn.Parameter(torch.empty(module.out_features, module.in_features).normal_(0, 0.01))
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    return network
