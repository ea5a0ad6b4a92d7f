"""Folded networks against the same networks before they were folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import kt.transfer
import method_settings
from checks import bits, step_each_phase
from kt.features import Features
from kt.folding import fold_norms, is_folded
from kt.models import NETWORKS, build_network
from kt.models.cifar import WideResNet
from kt.stages import head_of, stages_of
from kt.transfer import TransferModel, freeze_teacher

torch.set_num_threads(1)

# One of every way to build a detector, segmentor, pose or depth network, and its channels.
DENSE = {
    "fasterrcnn_mobilenet_v1": "detection",
    "semantic_fpn_resnet50": "segmentation",
    "deeplabv2_vgg16_bn": "segmentation",
    "deeplabv3_resnet50": "segmentation",
    "pspnet_mobilenet_v2": "segmentation",
    "pifpaf_resnet50": "keypoints",
    "depth_resnet18": "depth",
}


def unsettled(network: nn.Module) -> nn.Module:
    """The network, frozen, with normalisations that do something to every channel."""
    draw = torch.Generator().manual_seed(0)
    for norm in norms(network):
        for tensor, low, high in (
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.5, 0.5),
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 1.5),
        ):
            tensor.data.uniform_(low, high, generator=draw)
    return freeze_teacher(network)


def norms(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def images(count: int = 3, *size: int) -> Tensor:
    return torch.rand(count, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for own, before in zip(found, expected, strict=True):
        assert (own - before).norm() <= 1e-4 * before.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_gives_the_same_maps(name: str) -> None:
    network = unsettled(build_network(name, num_classes=7, width=0.25, image_size=32))
    before = bits(network.state_dict())

    def run() -> list[Tensor]:
        x, found = images(), [network(images())]
        for stage in stages_of(network):
            pre, x = stage.both(x)
            found += [pre, x]
        return [*found, head_of(network)(x)]

    expected = run()
    fold_norms(network)
    assert_close(run(), expected)
    assert bits(network.state_dict()) == before
    folded = sum(map(is_folded, norms(network)))
    if isinstance(network, WideResNet):
        # Half of its normalisations follow a sum.
        assert folded == len(norms(network)) // 2
    else:
        assert folded == len(norms(network))


@pytest.mark.parametrize("name", DENSE)
def test_so_does_a_folded_dense_network(name: str) -> None:
    pytest.importorskip("mmdet", reason="mmdet and mmseg are not installed (bash install.sh full)")
    import dense_settings  # needs them

    model = dense_settings.make_network(name, DENSE[name], seed=0)
    unsettled(model)
    x = images(1, 32, 64)

    def run() -> list[Tensor]:
        features = Features(model, x, graph=False)
        found = [*features.levels]
        if model.gives_depth:
            found.append(features.depth)
        elif model.pixel_classifier is not None:
            found += features.pixels
        return found

    expected = run()
    fold_norms(model)
    assert_close(run(), expected)
    # Those behind a transposed convolution stay.
    transposed = sum(isinstance(module, nn.ConvTranspose2d) for module in model.modules())
    assert sum(map(is_folded, norms(model))) == len(norms(model)) - transposed > 0


def mm_backbones() -> list[tuple[str, Callable[[], nn.Module]]]:
    from mmdet.models.backbones import MobileNetV2, ResNetV1d
    from mmseg.models.backbones import ResNet

    return [
        ("mmdet MobileNetV2", lambda: MobileNetV2(widen_factor=0.25)),
        ("mmdet ResNetV1d", lambda: ResNetV1d(depth=50, base_channels=8, stem_channels=8)),
        ("mmseg ResNet", lambda: ResNet(18, base_channels=16, stem_channels=16)),
    ]


@pytest.mark.parametrize("number", range(3))
def test_so_does_a_folded_backbone_of_mm(number: int) -> None:
    pytest.importorskip("mmdet")
    name, make = mm_backbones()[number]
    backbone = unsettled(make())
    x = images(1, 64, 64)
    expected = backbone(x)
    fold_norms(backbone)
    assert_close(backbone(x), expected)
    assert all(map(is_folded, norms(backbone))), name


class Block(nn.Module):
    """A convolution and a normalisation that must stay two layers, for one of several reasons."""

    def __init__(self, why: str):
        super().__init__()
        self.why = why
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        if why == "shared":
            self.other = nn.Sequential(self.conv)
        if why == "hook":
            self.conv.register_forward_hook(lambda *_: None)
        if why == "other weights":
            self.conv = Standardised(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.why == "read twice":
            return self.norm(y) + y
        if self.why == "called twice":
            return self.norm(y) + self.conv(x + 1)
        if self.why == "weight read":
            return self.norm(y) + self.conv.weight.mean()
        if self.why == "depends on data" and x.mean() > 0:
            return self.norm(y) + y
        if self.why == "activation":
            return self.norm(y.relu())
        return self.norm(y)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


@pytest.mark.parametrize(
    "why",
    [
        *("none", "shared", "hook", "other weights", "read twice", "called twice", "weight read", "depends on data"),
        *("activation", "trains"),
    ],
)
def test_what_is_more_than_an_affine_map_behind_a_convolution_stays(why: str) -> None:
    torch.manual_seed(0)
    block = unsettled(nn.Sequential(Block(why)))
    if why == "trains":
        freeze_teacher(block, "batch")
    expected = block(images())
    fold_norms(block)
    (norm,) = norms(block)
    assert is_folded(norm) == (why == "none")
    torch.testing.assert_close(block(images()), expected, rtol=1e-4, atol=1e-5)


def test_a_placed_model_has_folded_teachers_and_copies_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = method_settings.make_model("kd", 10)
    model = TransferModel(model.student, model.method, {"teacher": unsettled(model.teacher)})
    expected = model.teacher(images())
    model.place("cpu")
    assert all(map(is_folded, norms(model.teacher))) and not any(map(is_folded, norms(model.student)))
    twin = copy.deepcopy(model)
    assert_close([twin.double().teacher(images().double()).float()], [expected])
    for norm in norms(model.teacher):
        norm.bias.data += 1
    before = Features(model.teacher, images(), graph=False).logits
    assert_close([before], [expected])  # the weights are those of the last placing
    moved = model.place("cpu").teacher(images())
    assert (moved - expected).norm() > 0.01 * expected.norm()
    assert_close([twin.teacher(images().double()).float()], [expected])
    monkeypatch.setattr(kt.transfer, "fold_norms", lambda network: None)
    plain = TransferModel(model.student, model.method, {"teacher": method_settings.make_teacher("resnet20", 10)})
    assert not any(map(is_folded, norms(plain.place("cpu").teacher)))


@pytest.mark.parametrize("name", ["hybrid_forward", "distpro_search", "kcd", "m2as", "ofd", "reviewkd"])
def test_a_step_beside_a_folded_teacher_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = method_settings.make_data()
    batch = next(data.train.epoch(0))
    found = []
    for folded in (True, False):
        if not folded:
            monkeypatch.setattr(kt.transfer, "fold_norms", lambda network: None)
        model = method_settings.make_model(name, data.spec.num_classes)
        found.append(step_each_phase(model, batch, tmp_path))
        assert any(map(is_folded, norms(model.teacher))) == folded
    ours, expected = found
    for key, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-2, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
