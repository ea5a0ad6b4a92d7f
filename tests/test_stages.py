"""Stages against the networks themselves: every comparison is with `network(x)` or with what the layers say."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kt.errors import UserError
from kt.models import NETWORKS, build_network
from kt.stages import as_map, head_of, normalisation_of, stages_of

torch.set_num_threads(1)

SMALL_IMAGES = {"small", "vgg16", "vgg16_bn", "resnet8", "wrn_16_2", "shufflenet_v1_32", "shufflenet_v2_32"}
# One network of every family and kind of block; `small` is resnet18 with the stem for small images.
STRIDES = {
    "resnet18": [2, 4, 8, 16, 32],
    "resnet50": [2, 4, 8, 16, 32],
    "small": [1, 2, 4, 8],
    "vgg16": [1, 2, 4, 8, 16],
    "vgg16_bn": [1, 2, 4, 8, 16],
    "mobilenet_v2": [2, 4, 8, 16, 32],
    "shufflenet_v2": [2, 8, 16, 32],
    "mobilenet_v1": [2, 4, 8, 16, 32],
    "deit_tiny": [16, 16, 16, 16],
    "resnet8": [1, 2, 4],
    "wrn_16_2": [1, 2, 4],
    "shufflenet_v1_32": [1, 2, 4, 8],
    "shufflenet_v2_32": [1, 2, 4, 8],
}
FAMILIES = tuple(STRIDES)
# Stages that do not end in a ReLU: linear bottlenecks (MobileNet v2, but for its last convolution), sums that the next
# layer normalises (wide ResNets), transformer blocks.
LINEAR = {"mobilenet_v2": {0, 1, 2, 3}, "wrn_16_2": {0, 1}, "deit_tiny": {0, 1, 2, 3}}


def make(name: str) -> nn.Module:
    """A slim network with weights and statistics that no symmetry hides behind."""
    torch.manual_seed(0)
    size = 32 if name in SMALL_IMAGES else 64
    settings = {"name": "resnet18", "small_stem": True} if name == "small" else {"name": name}
    width = 0.125 if name.startswith("vgg") else 0.25
    network = build_network(**settings, num_classes=7, width=width, image_size=size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def images(name: str) -> Tensor:
    """Three images of the size that `make` prepares the network for."""
    size = 32 if name in SMALL_IMAGES else 64
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Every stage's output and the logits."""
    found = []
    for stage in stages_of(network):
        x = stage(x)
        found.append(x)
    return [*found, head_of(network)(x)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_and_head_are_the_network(name: str, training: bool, channels_last: bool) -> None:
    network, x = make(name).train(training), images(name)
    if channels_last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(network)
    keys = list(network.state_dict())
    torch.manual_seed(5)
    expected = twin(x)
    torch.manual_seed(5)
    found = outputs(network, x)[-1]
    assert torch.equal(found, expected)
    assert list(network.state_dict()) == keys
    # The running statistics moved by the same amounts, and by as much as one pass moves them.
    for key, value in twin.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key
    found.square().sum().backward()
    expected.square().sum().backward()
    for (key, own), (_, theirs) in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        assert own.grad is not None and torch.equal(own.grad, theirs.grad), key


@pytest.mark.parametrize("name", FAMILIES)
def test_strides_and_channels_are_those_of_the_maps(name: str) -> None:
    network, x = make(name).eval(), images(name)
    stages = stages_of(network)
    assert [stage.stride for stage in stages] == STRIDES[name]
    assert len({stage.name for stage in stages}) == len(stages)
    for stage, output in zip(stages, outputs(network, x), strict=False):
        size = x.shape[-1] // stage.stride
        assert as_map(output).shape == (3, stage.channels, size, size), stage.name


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_and_head_divide_the_network(name: str) -> None:
    network = make(name)
    parts = [*stages_of(network), head_of(network)]
    parameters = [id(p) for part in parts for p in part.parameters()]
    assert sorted(parameters) == sorted(id(p) for p in network.parameters())
    norms = [id(m) for part in parts for m in part.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert sorted(norms) == sorted(id(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))
    assert all(list(stage.parameters()) for stage in stages_of(network)), "a stage has nothing to train"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_preactivation_is_what_the_last_relu_reads(name: str, training: bool) -> None:
    network, x = make(name).train(training), images(name)
    twin = copy.deepcopy(network)
    expected = outputs(twin, x)[:-1]
    relu = F.relu6 if name.startswith("mobilenet") else F.relu
    for index, (stage, output) in enumerate(zip(stages_of(network), expected, strict=True)):
        before, after = stage.both(x)
        assert torch.equal(after, output), stage.name
        if index in LINEAR.get(name, ()):
            assert torch.equal(before, output), stage.name
        else:
            assert torch.equal(relu(before), output), stage.name
            assert before.min() < 0, f"{stage.name}: not before the ReLU"
        x = after
    # One run each: the statistics moved once.
    for key, value in twin.state_dict().items():
        assert key.startswith(("fc", "classifier")) or torch.equal(network.state_dict()[key], value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_preactivation_alone_is_the_first_of_both(name: str) -> None:
    network, x = make(name).eval(), images(name)
    for stage in stages_of(network):
        before, after = stage.both(x)
        assert torch.equal(stage.preactivation(x), before)
        x = after


@pytest.mark.parametrize("name", FAMILIES)
def test_no_stage_overwrites_what_a_loss_keeps(name: str) -> None:
    network, x = make(name).train(), images(name)
    kept, copies = [], []
    for stage in stages_of(network):
        x.requires_grad_() if x.is_leaf else x.retain_grad()
        before, x = stage.both(x)
        kept += [before, x]
        copies += [before.detach().clone(), x.detach().clone()]
    logits = head_of(network)(x)
    assert all(torch.equal(now, then) for now, then in zip(kept, copies, strict=True))
    # Plain calls hand on tensors that in-place layers made; they too must survive until a loss reads them.
    plain = outputs(network, images(name))
    copies = [output.detach().clone() for output in plain]
    head_of(network)(plain[-2])
    for stage, output in zip(stages_of(network)[1:], plain, strict=False):
        stage(output)
    assert all(torch.equal(now, then) for now, then in zip(plain, copies, strict=True))
    (logits.sum() + sum(k.square().mean() for k in kept)).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_ends_in_its_classifier(name: str) -> None:
    network, x = make(name).eval(), images(name)
    head = head_of(network)
    last = outputs(network, x)[-2]
    pooled = head.pooled(last)
    assert isinstance(head.classifier, nn.Linear) and head.classifier.out_features == 7
    assert pooled.shape == (3, head.classifier.in_features)
    assert torch.equal(F.linear(pooled, head.classifier.weight, head.classifier.bias), network(x))


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v2"])
def test_the_penultimate_feature_is_before_dropout(name: str) -> None:
    network, x = make(name), images(name)
    head, last = head_of(network), outputs(network.eval(), x)[-2]
    network.train()
    if name == "mobilenet_v2":
        assert torch.allclose(head.pooled(last), last.mean((2, 3)))
    else:
        torch.manual_seed(0)
        feature = head.pooled(last)
        torch.manual_seed(0)
        x = torch.flatten(network.avgpool(network.features[-1](last)), 1)
        assert torch.equal(feature, network.classifier[:5](x))


def test_depths_count_the_layers_of_the_paper() -> None:
    # Hybrid forward, fig. 6: 28 and 50 layers with the classifier, which is the head's.
    assert [stage.depth for stage in stages_of(make("mobilenet_v1"))] == [3, 4, 4, 12, 4]
    assert [stage.depth for stage in stages_of(make("resnet50"))] == [1, 9, 12, 18, 9]
    assert 1 + sum(stage.depth for stage in stages_of(make("resnet18"))) == 18
    assert [3 + sum(stage.depth for stage in stages_of(make(name))) for name in ("vgg16", "vgg16_bn")] == [16, 16]
    for name, layers in {"resnet8": 8, "resnet110": 110, "wrn_16_2": 14, "wrn_40_1": 38}.items():
        # A wide ResNet's name counts two layers that only its projections could make up.
        assert 1 + sum(stage.depth for stage in stages_of(make(name))) == layers, name


def test_views_of_a_copy_are_the_copy() -> None:
    network = make("resnet8")
    stages = stages_of(network)
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.data.zero_()
    x = images("resnet8")
    assert stages[0](x).abs().sum() > 0
    assert stages_of(twin)[0](x).abs().sum() == 0
    assert {id(p) for s in stages_of(twin) for p in s.parameters()} <= {id(p) for p in twin.parameters()}


def test_a_dilated_network_keeps_its_nominal_strides() -> None:
    from torchvision.models import resnet50

    network = resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    x = torch.randn(1, 3, 64, 64)
    assert [stage.stride for stage in stages_of(network)] == [2, 4, 8, 16, 32]
    *maps, logits = outputs(network, x)
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 8, 8]
    assert torch.equal(logits, network(x))


def test_tokens_become_maps() -> None:
    tokens = torch.arange(2 * 10 * 4.0).view(2, 10, 4)
    found = as_map(tokens)
    assert found.shape == (2, 4, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(found[:, :, row, column], tokens[:, 1 + 3 * row + column])
    assert torch.equal(as_map(tokens[:, 1:]), found)
    maps = torch.randn(2, 4, 3, 5)
    assert as_map(maps) is maps
    with pytest.raises(ValueError, match="square"):
        as_map(torch.randn(2, 7, 4))


def test_every_network_brings_its_normalisation() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (normalisation_of(make("resnet8")).mean, normalisation_of(make("resnet8")).std) == imagenet
    assert normalisation_of(make("mobilenet_v1")).mean == (0.5, 0.5, 0.5)
    assert normalisation_of(make("deit_tiny")).mean == imagenet[0]
    network = make("mobilenet_v1")
    network.kt_normalisation = ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    own = normalisation_of(copy.deepcopy(network))
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_an_unknown_network_is_one_clear_line() -> None:
    for function in (stages_of, head_of):
        with pytest.raises(UserError) as caught:
            function(nn.Linear(3, 3))
        assert "Linear" in str(caught.value) and "register" in str(caught.value) and "\n" not in str(caught.value)


def test_a_subclass_with_another_forward_is_not_taken_for_its_base() -> None:
    import timm

    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    for function in (stages_of, head_of):
        with pytest.raises(UserError, match="Distilled"):
            function(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_has_stages(name: str) -> None:
    network = build_network(name, num_classes=5, width=0.125, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(network, x)[-1], network(x))
    assert network(x).shape == (2, 5)
