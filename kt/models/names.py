"""The networks that a config can name. This module imports no torch: composing and planning stay quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kt.files import at_home


class Normalisation(NamedTuple):
    """How a network wants its input: `(image - mean) / std` per channel for RGB images in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels in -1..1


@dataclass(frozen=True)
class NetworkSpec:
    """What a name stands for.

    Attributes:
        family: The builder, a key of `kt.models.build.FAMILIES`, or `module:function` of another package; it is called
            with `num_classes`, `width` and the options.
        options: Its arguments.
        library: The name under which torchvision or timm knows the network and its pretrained weights.
        weights: The library's name of the ImageNet weights that a backbone of this kind starts from.
        normalisation: What those weights were trained with; the network then has it in every role.
        teaches: Whether a classifier with these weights is the papers' teacher as it is.
    """

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    library: str | None = None
    weights: str | None = None
    normalisation: Normalisation = IMAGENET
    teaches: bool = False


def _resnet(name: str, block: str, *layers: int) -> NetworkSpec:
    # The weights of the papers; V2 is another network.
    return NetworkSpec("torchvision_resnet", {"block": block, "layers": layers}, name, "IMAGENET1K_V1", teaches=True)


def _cifar(depth: int, *channels: int) -> NetworkSpec:
    return NetworkSpec("cifar_resnet", {"depth": depth, "channels": channels})


def _wrn(depth: int, factor: int) -> NetworkSpec:
    return NetworkSpec("wide_resnet", {"depth": depth, "factor": factor})


WEIGHTS_DATASET = "imagenet"  # whose classes the libraries' pretrained classifiers tell apart

# With those of other packages, once `kt.outside` has looked for them.
NETWORKS: dict[str, NetworkSpec] = {
    # ImageNet networks, torchvision
    "resnet18": _resnet("resnet18", "basic", 2, 2, 2, 2),
    "resnet34": _resnet("resnet34", "basic", 3, 4, 6, 3),
    "resnet50": _resnet("resnet50", "bottleneck", 3, 4, 6, 3),
    "resnet101": _resnet("resnet101", "bottleneck", 3, 4, 23, 3),
    "resnet152": _resnet("resnet152", "bottleneck", 3, 8, 36, 3),
    "vgg16": NetworkSpec("torchvision_vgg", library="vgg16", weights="IMAGENET1K_V1"),
    "vgg16_bn": NetworkSpec("torchvision_vgg", {"batch_norm": True}, "vgg16_bn", weights="IMAGENET1K_V1"),
    "mobilenet_v2": NetworkSpec("torchvision_mobilenet_v2", library="mobilenet_v2", weights="IMAGENET1K_V1"),
    "mobilenet_v2_half": NetworkSpec("torchvision_mobilenet_v2", {"multiplier": 0.5}),
    "shufflenet_v2": NetworkSpec("torchvision_shufflenet_v2", library="shufflenet_v2_x1_0"),
    # ImageNet networks, timm
    "mobilenet_v1": NetworkSpec(
        "timm_mobilenet_v1", library="mobilenetv1_100", weights="ra4_e3600_r224_in1k", normalisation=HALVES
    ),
    "deit_tiny": NetworkSpec("timm_vit", {"dim": 192, "heads": 3}, "deit_tiny_patch16_224"),
    "deit_small": NetworkSpec("timm_vit", {"dim": 384, "heads": 6}, "deit_small_patch16_224"),
    "vit_small": NetworkSpec("timm_vit", {"dim": 384, "heads": 6}, "vit_small_patch16_224"),
    # Of timm's weights for this name the only ones with the 85.1 % that DistPro prints.
    "vit_base": NetworkSpec(
        "timm_vit",
        {"dim": 768, "heads": 12},
        "vit_base_patch16_224",
        weights="augreg2_in21k_ft_in1k",
        normalisation=HALVES,
        teaches=True,
    ),
    # networks for 32x32 images
    "resnet8": _cifar(8, 16, 16, 32, 64),
    "resnet20": _cifar(20, 16, 16, 32, 64),
    "resnet20_half": _cifar(20, 8, 8, 16, 32),
    "resnet32": _cifar(32, 16, 16, 32, 64),
    "resnet56": _cifar(56, 16, 16, 32, 64),
    "resnet110": _cifar(110, 16, 16, 32, 64),
    "resnet8x4": _cifar(8, 32, 64, 128, 256),
    "resnet32x4": _cifar(32, 32, 64, 128, 256),
    "wrn_16_2": _wrn(16, 2),
    "wrn_16_4": _wrn(16, 4),
    "wrn_28_4": _wrn(28, 4),
    "wrn_40_1": _wrn(40, 1),
    "wrn_40_2": _wrn(40, 2),
    "shufflenet_v1_32": NetworkSpec("shufflenet_v1_32"),
    "shufflenet_v2_32": NetworkSpec("shufflenet_v2_32"),
}


@dataclass(frozen=True)
class DenseSpec:
    """A detector, segmentor, pose or depth network.

    Attributes:
        architecture: A key of `kt.models.dense.ARCHITECTURES`.
        backbone: A key of `NETWORKS`.
        task: What it does: detection, segmentation, keypoints or depth.
    """

    architecture: str
    backbone: str
    task: str


_PYRAMID_BACKBONES = ("resnet18", "resnet50", "resnet101", "resnet152", "mobilenet_v1")

DENSE_NETWORKS: dict[str, DenseSpec] = {
    **{f"fasterrcnn_{name}": DenseSpec("fasterrcnn", name, "detection") for name in _PYRAMID_BACKBONES},
    **{f"retinanet_{name}": DenseSpec("retinanet", name, "detection") for name in _PYRAMID_BACKBONES},
    **{f"semantic_fpn_{name}": DenseSpec("semantic_fpn", name, "segmentation") for name in _PYRAMID_BACKBONES},
    **{f"deeplabv2_{name}": DenseSpec("deeplabv2", name, "segmentation") for name in ("vgg16", "vgg16_bn")},
    "deeplabv2_resnet101": DenseSpec("deeplabv2", "resnet101", "segmentation"),
    "deeplabv3_resnet50": DenseSpec("deeplabv3", "resnet50", "segmentation"),
    "deeplabv3_resnet101": DenseSpec("deeplabv3", "resnet101", "segmentation"),
    **{
        f"pspnet_{name}": DenseSpec("pspnet", name, "segmentation")
        for name in ("resnet18", "resnet101", "mobilenet_v2")
    },
    "pifpaf_resnet50": DenseSpec("pose", "resnet50", "keypoints"),
    **{f"depth_{name}": DenseSpec("depth", name, "depth") for name in ("resnet18", "resnet50")},
}
# The name of a network that a config file of mmdet or mmseg describes.
CONFIG_NETWORK = "config"


def pretrained_weights(name: str) -> tuple[str | None, str | None]:
    """Which ImageNet weights a network has by default, where the scale takes any: as a teacher, and as a student.

    A classifier may be a teacher as its library brings it; of detectors and segmentors the backbone starts from them.
    Unstated in the papers for students: the field's default.
    """
    if name in DENSE_NETWORKS:
        backbone = NETWORKS[DENSE_NETWORKS[name].backbone].weights
        return backbone, backbone
    spec = NETWORKS.get(name)
    return (spec.weights if spec is not None and spec.teaches else None), None


def folder_of_weights(name: str, weights: str) -> Path | None:
    """The folder to which a library would fetch pretrained weights of a network; None where they seem to be there.

    A file's name tells torchvision's network, but not which of its weights.

    Args:
        name: One of `NETWORKS`, or of `DENSE_NETWORKS`, whose backbone is meant.
        weights: The library's name of them.
    """
    spec = NETWORKS[DENSE_NETWORKS[name].backbone if name in DENSE_NETWORKS else name]
    cache = at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if spec.family.startswith("timm"):
        home = at_home(os.environ.get("HF_HOME") or cache / "huggingface")
        folder, pattern = (
            at_home(os.environ.get("HF_HUB_CACHE") or home / "hub"),
            f"models--timm--{spec.library}.{weights}",
        )
    else:
        home = at_home(os.environ.get("TORCH_HOME") or cache / "torch")
        folder, pattern = home / "hub" / "checkpoints", f"{spec.library}-*.pth"
    return None if any(folder.glob(pattern)) else folder
