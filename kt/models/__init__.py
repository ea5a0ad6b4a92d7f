"""Networks: those of torchvision and timm by name, and those that no well-kept library has."""

from kt.models.build import build_network
from kt.models.names import NETWORK_NAMES

__all__ = ["NETWORK_NAMES", "build_network"]
