"""Networks by name: the libraries' own, and those for 32x32 images that no well-kept library has.

Importing this package imports no torch; building does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt.models.names import NETWORKS, NetworkSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NETWORKS", "NetworkSpec", "build_network"]


def build_network(
    name: str,
    num_classes: int,
    width: float = 1.0,
    image_size: int = 224,
    small_stem: bool = False,
    pretrained: str | None = None,
) -> nn.Module:
    """A plain network with fresh weights drawn from torch's global random numbers.

    Args:
        name: One of `NETWORKS`.
        num_classes: Outputs of the classifier.
        width: Factor on every channel count (see `kt.models.build.slim`); 1.0 is exactly the library's network. Below
            it residual branches start damped (`kt.models.build.damp_residuals`).
        image_size: Height and width of the images; only vision transformers depend on it.
        small_stem: For torchvision ResNets on small images: a 3x3 stem of stride 1 without max-pool.
        pretrained: The library's name of its ImageNet weights: torchvision's such as `IMAGENET1K_V1`, timm's tag such
            as `fb_in1k`. With another number of classes than theirs the classifier alone is drawn afresh.

    Raises:
        UserError: An argument does not fit, or the weights cannot be had.
    """
    from kt.models.build import build

    return build(name, num_classes, width, image_size, small_stem, pretrained)
