"""Features and the levels by which pairs of networks are compared, against hooks on the networks' own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import bits
from kt.classifier import Classifier
from kt.dense import Backbone, Normaliser
from kt.errors import UserError
from kt.features import Features, Level, pair_levels
from kt.models import build_network

# Channels of each level and of the pooled feature, as Chen et al. (2021) print or as the networks' papers define them.
CHANNELS = {
    "wrn_40_2": (32, 64, 128, 128),
    "wrn_16_2": (32, 64, 128, 128),
    "wrn_28_4": (64, 128, 256, 256),
    "wrn_16_4": (64, 128, 256, 256),
    "shufflenet_v1_32": (240, 480, 960, 960),
    "shufflenet_v2_32": (116, 232, 464, 1024),
    "resnet32x4": (64, 128, 256, 256),
    "resnet56": (16, 32, 64, 64),
    "resnet20": (16, 32, 64, 64),
    "resnet110": (16, 32, 64, 64),
    "resnet32": (16, 32, 64, 64),
    "resnet50": (256, 512, 1024, 2048, 2048),
    "mobilenet_v1": (128, 256, 512, 1024, 1024),
    "resnet34": (64, 128, 256, 512, 512),
    "resnet18": (64, 128, 256, 512, 512),
    "vit_base": (768,) * 5,
    "deit_tiny": (192,) * 5,
}
PAIRS = [
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "shufflenet_v1_32"),
    ("resnet32x4", "shufflenet_v1_32"),
    ("resnet32x4", "shufflenet_v2_32"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet50", "mobilenet_v1"),
    ("resnet34", "resnet18"),
    ("vit_base", "deit_tiny"),
    ("wrn_28_4", "wrn_16_4"),
]
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(name: str, width: float = 0.25) -> Classifier:
    """A network whose normalisation layers are not the identity."""
    torch.manual_seed(0)
    network = build_network(name, num_classes=7, width=width, image_size=32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return Classifier(network)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_levels_of_the_papers_pairs(teacher: str, student: str) -> None:
    with torch.device("meta"):
        pair = [Classifier(build_network(name, num_classes=7, image_size=32)) for name in (student, teacher)]
    with_pooled, without = (pair_levels(*pair, pooled=pooled) for pooled in (True, False))
    for name, levels, maps in zip((student, teacher), with_pooled, without, strict=True):
        assert tuple(level.channels for level in levels) == CHANNELS[name]
        assert levels[:-1] == maps and levels[-1].stage is None


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_level_has_the_channels_that_it_states(teacher: str, student: str, activated: bool) -> None:
    pair = [make(name) for name in (student, teacher)]
    for network, levels in zip(pair, pair_levels(*pair, pooled=True), strict=True):
        features = Features(network, IMAGES)
        maps = [features.at(level, activated) for level in levels]
        assert [found.shape[:2] for found in maps] == [(4, level.channels) for level in levels]
        assert maps[-1].shape[2:] == (1, 1)


# What the network itself computes there: the module whose output it is, and whether a ReLU has been applied.
TAPS = {
    "wrn_16_2": [("layer2.0.bn1", False), ("layer3.0.bn1", False), ("bn1", False)],
    "resnet20": [("layer1", True), ("layer2", True), ("layer3", True)],
    "resnet18": [("layer1", True), ("layer2", True), ("layer3", True), ("layer4", True)],
    "mobilenet_v1": [("blocks.1", True), ("blocks.2", True), ("blocks.3", True), ("blocks.4", True)],
    "shufflenet_v1_32": [("layer1", True), ("layer2", True), ("layer3", True)],
    "shufflenet_v2_32": [("stage2", True), ("stage3", True), ("stage4", True)],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TAPS)
def test_levels_are_what_the_network_computes_there(name: str, training: bool) -> None:
    # In double precision: order of summation makes gradients of single precision differ.
    plain, teacher = make(name).double().train(training), make("resnet18" if name == "mobilenet_v1" else name)
    model, images = copy.deepcopy(plain), IMAGES.double()
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda module, inputs, output: seen.update({path: output.clone()})

    for path, _ in TAPS[name]:
        plain.network.get_submodule(path).register_forward_hook(keep(path))
    logits = plain(images)
    features = Features(model, images)
    levels, _ = pair_levels(model, teacher, pooled=True)
    before = [features.at(level) for level in levels]
    after = [features.at(level, activated=True) for level in levels]
    relu = F.relu6 if name.startswith("mobilenet") else F.relu
    for (path, activated), one, two in zip(TAPS[name], before[:-1], after[:-1], strict=True):
        assert torch.equal(relu(one) if activated else one, seen[path]), path
        assert one.min() < 0
        if activated:
            assert torch.equal(two, seen[path]), path
    assert torch.equal(before[-1].flatten(1), model.head.pooled(features.level(-1)))
    # One pass for all of it: outputs, running statistics and gradients are those of the network.
    assert torch.equal(features.logits, logits)
    assert bits(model.state_dict()) == bits(plain.state_dict())
    logits.square().sum().backward()
    (features.logits.square().sum() + 0 * sum(map_.sum() for map_ in before)).backward()
    for (key, own), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, msg=key)


def test_the_sum_of_a_wide_resnet_s_layer_is_its_activated_level() -> None:
    model = make("wrn_16_2").train()
    features = Features(model, IMAGES)
    outputs = model.extract(IMAGES)
    for index, level in enumerate(pair_levels(model, model)[0]):
        assert torch.equal(features.at(level, activated=True), outputs[index])


def test_a_level_of_a_stage_that_has_run_is_refused() -> None:
    features = Features(make("resnet20"), IMAGES)
    assert features.levels
    features.at(Level(0, 8), activated=True)
    with pytest.raises(RuntimeError, match="stage 0 has run"):
        features.at(Level(0, 8))


def test_a_backbone_has_no_pooled_feature() -> None:
    backbone = Backbone(make("resnet18").network, Normaliser((0,) * 3, (1,) * 3))
    assert [level.stage for level in pair_levels(make("resnet18"), backbone)[1]] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="^teacher: its pooled feature .* expected a classifier$"):
        pair_levels(make("resnet18"), backbone, pooled=True)


def test_a_teacher_s_levels_have_no_graph() -> None:
    teacher = make("wrn_16_2")
    features = Features(teacher, IMAGES, graph=False)
    assert not any(features.at(level).requires_grad for level in pair_levels(teacher, teacher, pooled=True)[1])
