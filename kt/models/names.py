"""The names of all networks, readable without importing torch."""

TORCHVISION = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg16",
    "mobilenet_v2",
    "shufflenet_v2",
)
TIMM = ("mobilenet_v1", "deit_tiny", "deit_small", "vit_small")
CIFAR = (
    "resnet8",
    "resnet20",
    "resnet20_half",
    "resnet32",
    "resnet56",
    "resnet110",
    "resnet8x4",
    "resnet32x4",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
    "shufflenet_v1_32",
    "shufflenet_v2_32",
)
NETWORK_NAMES: tuple[str, ...] = (*TORCHVISION, *TIMM, *CIFAR)
