"""Networks against the libraries' own constructors and the sizes that the literature prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from configs import composed
from experiments.build import build_classifier, build_student, describe_student
from kt.errors import UserError
from kt.models import NETWORKS, build_network
from kt.models.build import normalisation_of_weights
from kt.models.cifar import PreActivationBlock, Projection, shuffle
from kt.stages import IMAGENET, head_of

torch.set_num_threads(1)

# Million parameters with 100 classes. ResNets and wide ResNets: the benchmark's tables; ShuffleNets: counted from the
# published definitions (24-240-480-960 in three groups; 24-116-232-464-1024).
MILLIONS = {
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_16_2": 0.70,
    "wrn_16_4": 2.77,
    "wrn_28_4": 5.87,
    "wrn_40_1": 0.57,
    "wrn_40_2": 2.26,
    "shufflenet_v1_32": 0.95,
    "shufflenet_v2_32": 1.36,
}
TORCHVISION = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("vgg16", "vgg16_bn", "mobilenet_v2", "shufflenet_v2"),
)
TIMM = {
    "mobilenet_v1": "mobilenetv1_100",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
}


def size(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    """Keys and shapes of the state dict, in order."""
    return {key: value.shape for key, value in network.state_dict().items()}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts(name: str) -> None:
    assert round(size(build_network(name, 100, image_size=32)) / 1e6, 2) == pytest.approx(MILLIONS[name])


@pytest.mark.parametrize("name", (*TORCHVISION, *TIMM))
def test_full_width_is_the_library_s_network(name: str) -> None:
    with torch.device("meta"):
        if name in TIMM:
            import timm

            library = timm.create_model(TIMM[name], num_classes=11)
        else:
            library = torchvision.models.get_model(
                {"shufflenet_v2": "shufflenet_v2_x1_0"}.get(name, name), num_classes=11
            )
        own = build_network(name, 11)
    assert list(shapes(own).items()) == list(shapes(library).items())
    assert isinstance(own, type(library))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "shufflenet_v2", "mobilenet_v1", "deit_tiny"])
def test_the_library_s_weights_give_the_library_s_outputs(name: str) -> None:
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        library = timm.create_model(TIMM[name], num_classes=11).eval()
    else:
        library = torchvision.models.get_model({"shufflenet_v2": "shufflenet_v2_x1_0"}.get(name, name), num_classes=11)
    own = build_network(name, 11)
    own.load_state_dict(library.state_dict())
    x = torch.randn(1, 3, 224, 224) if name == "deit_tiny" else torch.randn(1, 3, 64, 64)
    assert torch.equal(own.eval()(x), library.eval()(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_width_slims(name: str) -> None:
    with torch.device("meta"):
        sizes = [size(build_network(name, 10, width, image_size=32)) for width in (0.25, 0.5, 1.0)]
    assert sizes[0] <= sizes[1] < sizes[2]
    if not name.endswith("_half"):
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_of_a_slim_network_stays_wide(name: str) -> None:
    with torch.device("meta"):
        slim, full = (build_network(name, 10, width, image_size=32) for width in (0.25, 1.0))
    wide = dict(full.named_modules())
    for key, own in slim.named_modules():
        if isinstance(own, nn.Conv2d):
            theirs = wide[key]
            # A quarter, but for rounding: no layer has fewer than 8 channels, nor six times as many (MobileNet v2).
            least = 48 if name.startswith("mobilenet_v2") else 24
            assert own.out_channels <= max(least, 0.4 * theirs.out_channels), key
            if not name.startswith("shufflenet"):
                assert own.out_channels % 8 == 0, key
    assert head_of(slim).classifier.out_features == 10


def test_a_slim_residual_branch_starts_small() -> None:
    for name, branches in {
        "resnet18": 8,
        "resnet50": 16,
        "resnet56": 27,
        "wrn_40_2": 18,
        "mobilenet_v2": 11,  # slim: one more block keeps its channels
    }.items():
        networks = {width: build_network(name, 10, width=width, image_size=32) for width in (0.25, 1.0)}
        damped = {
            width: [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and not (m.weight == 1).all()]
            for width, network in networks.items()
        }
        assert damped[1.0] == []
        assert len(damped[0.25]) == branches, name
        for norm in damped[0.25]:
            torch.testing.assert_close(norm.weight.square() * branches, torch.ones_like(norm.weight))


def test_the_damped_part_is_the_whole_branch() -> None:
    """With that normalisation at zero a block is its shortcut."""
    for name in ("resnet20", "resnet50", "wrn_16_2", "mobilenet_v2", "shufflenet_v1_32"):
        network = build_network(name, 10, width=0.25, image_size=32).eval()
        kinds = ("BasicBlock", "Bottleneck", "PreActivationBlock", "InvertedResidual", "ShuffleUnit")
        checked = 0
        for block in network.modules():
            norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d) and not (m.weight == 1).all()]
            plain = getattr(block, "shortcut", None) is None and getattr(block, "downsample", None) is None
            if type(block).__name__ in kinds and norms and plain:
                nn.init.zeros_(norms[0].weight)
                first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
                x = torch.rand(1, first.in_channels, 4, 4)
                torch.testing.assert_close(block(x), x)
                checked += 1
        assert checked >= 3, name


def test_scaled_weights_are_initialised_like_the_library_s() -> None:
    torch.manual_seed(0)
    for name in TORCHVISION:
        if name in ("resnet101", "resnet152"):
            continue
        for module in build_network(name, 10, width=0.25).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 20000 and name != "shufflenet_v2":
                fan_out = module.out_channels // module.groups * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
            if isinstance(module, nn.Linear) and name.startswith(("vgg", "mobilenet")) and module.weight.numel() > 3000:
                assert module.weight.std().item() == pytest.approx(0.01, rel=0.1), name
                assert module.bias.abs().max() == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_shuffle_is_torch_s_in_either_memory_format(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 12, 3, 5).to(memory_format=memory_format)
    found = shuffle(x, 3)
    assert torch.equal(found, F.channel_shuffle(x.contiguous(), 3))
    assert found.is_contiguous(memory_format=memory_format)


def test_a_wide_resnet_projects_the_normalised_input() -> None:
    torch.manual_seed(0)
    block, x = PreActivationBlock(4, 6, 2).eval(), torch.randn(2, 4, 8, 8)
    one, two = block.conv1.weight, block.conv2.weight
    # In eval mode with fresh statistics, normalisation divides by sqrt(1 + eps).
    active = F.relu(x / (1 + 1e-5) ** 0.5)
    inner = F.relu(F.conv2d(active, one, stride=2, padding=1) / (1 + 1e-5) ** 0.5)
    expected = F.conv2d(active, block.shortcut.weight, stride=2) + F.conv2d(inner, two, padding=1)
    torch.testing.assert_close(block(x), expected)


def test_weights_follow_the_seed_alone() -> None:
    networks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        networks.append(build_network("resnet8", 10).state_dict()["conv1.weight"])
    assert torch.equal(networks[0], networks[1]) and not torch.equal(networks[0], networks[2])


def test_the_small_stem() -> None:
    network = build_network("resnet18", 10, width=0.25, small_stem=True).eval()
    assert network.conv1.weight.shape == (16, 3, 3, 3)
    assert network.layer1(network.maxpool(network.conv1(torch.randn(1, 3, 32, 32)))).shape[-1] == 32


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"name": "resent50"}, ("resent50", "did you mean 'resnet50'")),
        ({"name": "vgg16", "small_stem": True}, ("small_stem", "vgg16")),
        ({"name": "resnet50", "pretrained": "IMAGENET_V1"}, ("IMAGENET_V1", "did you mean 'IMAGENET1K_V1'")),
        ({"name": "resnet50", "pretrained": "IMAGENET1K_V1", "width": 0.5}, ("pretrained", "width")),
        ({"name": "resnet20", "pretrained": "IMAGENET1K_V1"}, ("pretrained", "resnet20")),
        ({"name": "deit_tiny", "pretrained": "in1k"}, ("in1k", "fb_in1k")),
        ({"name": "deit_tiny", "image_size": 50}, ("image_size=50", "16")),
        ({"name": "resnet20", "width": 0}, ("width=0",)),
        ({"name": "resnet20", "num_classes": 0}, ("num_classes=0",)),
    ],
)
def test_mistakes_are_one_clear_line(arguments: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        build_network(**{"num_classes": 10, **arguments})
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_pretrained_weights_keep_all_but_another_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    published = torchvision.models.resnet18().state_dict()
    weights = type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, *args, **kwargs: published)
    same = build_network("resnet18", 1000, pretrained="IMAGENET1K_V1").state_dict()
    other = build_network("resnet18", 7, pretrained="IMAGENET1K_V1").state_dict()
    for key, value in published.items():
        assert torch.equal(same[key], value), key
        if not key.startswith("fc."):
            assert torch.equal(other[key], value), key
    assert other["fc.weight"].shape == (7, 512)


@pytest.mark.parametrize("name", [name for name, spec in NETWORKS.items() if spec.weights])
def test_weights_come_with_the_normalisation_that_their_library_states(name: str) -> None:
    spec = NETWORKS[name]
    assert spec.library and spec.weights
    if spec.family.startswith("timm"):
        import timm

        stated = timm.get_pretrained_cfg(f"{spec.library}.{spec.weights}")
    else:
        stated = torchvision.models.get_model_weights(spec.library)[spec.weights].transforms()
    assert normalisation_of_weights(name, spec.weights) == (tuple(stated.mean), tuple(stated.std))


def test_weights_that_are_not_the_default_have_their_own_normalisation() -> None:
    assert normalisation_of_weights("vit_small", "augreg_in1k") == ((0.5,) * 3, (0.5,) * 3)
    assert normalisation_of_weights("deit_tiny", "fb_in1k") == IMAGENET
    with pytest.raises(UserError, match="did you mean 'fb_in1k'"):
        normalisation_of_weights("deit_tiny", "in1k")


def test_a_failed_download_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def fail(self: object, *args: object, **kwargs: object) -> None:
        raise URLError("no route\nto host")

    weights = type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(weights, "get_state_dict", fail)
    with pytest.raises(UserError) as caught:
        build_network("resnet18", 10, pretrained="IMAGENET1K_V1")
    assert "IMAGENET1K_V1" in str(caught.value) and "no route" in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_known_without_torch() -> None:
    code = "import sys, kt, kt.models.names as n; assert 'resnet50' in n.NETWORKS; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("before", "after", "side"), [(8, 8, 48), (8, 16, 33), (16, 32, 32)])
def test_projections_are_strided_convolutions_to_the_bit(before: int, after: int, side: int) -> None:
    torch.manual_seed(0)
    projection, x = Projection(before, after, 1, 2, bias=False), torch.randn(4, before, side, side)
    found, wanted = projection(x), torch.nn.functional.conv2d(x, projection.weight, stride=2)
    assert torch.equal(found, wanted)


def test_narrow_networks_train_on_larger_images() -> None:
    """A gradient of 8 channels that kills the process where it is left to the library as it is."""
    code = (
        "import torch; from kt.models import build_network; torch.set_num_threads(1)\n"
        "net = build_network('resnet20', 10, width=0.25, image_size=48).to(memory_format=torch.channels_last)\n"
        "for _ in range(3):\n"
        "    x = torch.rand(64, 3, 48, 48).contiguous(memory_format=torch.channels_last)\n"
        "    net(x).square().mean().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_student_has_the_normalisation_of_the_weights_that_it_starts_from(tmp_path: Path) -> None:
    """The dataset's where they are drawn, the teacher's if it is fine-tuned, a checkpoint's as its description says."""
    config = composed("student=resnet8", "teacher=resnet8", "method=finetune")
    spec = SimpleNamespace(mean=(0.1,) * 3, std=(0.2,) * 3, num_classes=4, image_size=32, task="classification")
    network = {**config["student"]["network"], "width": 0.25}
    config["student"]["network"] = network
    theirs = build_classifier(network, 4, 32, ((0.5,) * 3, (0.25,) * 3))
    describe_student(tmp_path, config, theirs, None, spec)
    torch.save(theirs.network.state_dict(), tmp_path / "student.pth")
    given = {**config["student"], "checkpoint": str(tmp_path / "student.pth")}
    drawn = {**config, "method": {"name": "none"}}
    for changed, mean in ((drawn, 0.1), (config, 0.5), ({**drawn, "student": given}, 0.5)):
        student, _ = build_student(changed, spec, theirs)
        assert student.mean.flatten().tolist() == pytest.approx([mean] * 3)
