"""The two baselines that compare levels, knowledge review and the feature overhaul, against their formulas in NumPy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import Tensor, nn

from configs import composed
from experiments.meaning import settle
from kt.classifier import Classifier
from kt.errors import UserError
from kt.features import Features
from kt.functional import hierarchical_context, negative_mean
from kt.methods import build_method
from kt.models import build_network
from kt.train import fit
from kt.transfer import TransferModel
from method_settings import SCHEDULE, make_classifier, make_data, make_model

PAIRS = [
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "shufflenet_v1_32"),
    ("resnet32x4", "shufflenet_v2_32"),
    ("resnet56", "resnet20"),
    ("resnet50", "mobilenet_v1"),
    ("resnet34", "resnet18"),
    ("vit_base", "deit_tiny"),
    ("wrn_28_4", "wrn_16_4"),
]


def make_batch(n: int = 4, side: int = 32) -> dict[str, Any]:
    """Images to classify, in the middle of a phase."""
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"inputs": images, "labels": torch.arange(n) % 4, "indices": torch.arange(n), "step": 50, "total": 100}


def make_pair(method: str, teacher: str, student: str, **options: Any) -> TransferModel:
    """Slim networks and a method for them."""
    pair = [make_classifier(name, 4, seed) for seed, name in enumerate((student, teacher))]
    return TransferModel(pair[0], build_method(method, *pair, **options), {"teacher": pair[1]})


@pytest.mark.parametrize("method", ["reviewkd", "ofd"])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_pair_of_the_paper_learns_from_every_level(teacher: str, student: str, method: str) -> None:
    # Transformers have no batch normalisation that a margin could come from.
    options = {"margin": "measured"} if (method, teacher) == ("ofd", "vit_base") else {}
    model = make_pair(method, teacher, student, **options)
    model.train()
    loss, logged = model.method.loss(model, make_batch())
    assert torch.isfinite(loss) and logged[f"loss_{model.method.term}"] > 0
    assert loss > logged["loss_task"]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.method.parameters() if p.dim() == 4)


# Knowledge review


def wave(step: float, *shape: int) -> Tensor:
    """Irregular values in -1..1 that depend on nobody's random numbers."""
    return torch.sin(step * torch.arange(1, 1 + torch.Size(shape).numel()).double() ** 2).reshape(shape)


def make_review(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A method in eval mode with irregular weights, and maps of the given sides, shallow to deep."""
    method = make_pair("reviewkd", "resnet20", "resnet8").method.double().eval()
    for number, (key, value) in enumerate(method.state_dict().items(), 1):
        if value.is_floating_point():
            filled = wave(0.1 * number, *value.shape)
            value.copy_(filled.abs() + 0.5 if key.endswith("running_var") else filled)
    sides = zip(method.levels, ours, theirs, strict=True)
    maps = [(wave(0.3 * a, 2, level.channels, a, a), wave(0.7 * b, 2, level.channels, b, b)) for level, a, b in sides]
    return method, [own for own, _ in maps], [target for _, target in maps]


def convolve(x: np.ndarray, layers: nn.Sequential | nn.Conv2d) -> np.ndarray:
    """A convolution whose padding keeps the size, and the normalisation by running statistics that may follow."""
    convolution, norm = layers if isinstance(layers, nn.Sequential) else (layers, None)
    kernels = convolution.weight.detach().numpy()
    # The kernel's channels lie one behind the other, like the map's: one three-dimensional correlation of one layer.
    y = np.array(
        [[correlate(np.pad(i, ((0, 0), *2 * [2 * (k.shape[-1] // 2,)])), k, "valid")[0] for k in kernels] for i in x]
    )
    if norm is None:
        return y + convolution.bias.detach().numpy()[:, None, None]
    each = (norm.running_mean, norm.running_var + norm.eps, norm.weight, norm.bias)
    mean, variance, weight, bias = (value.detach().numpy()[:, None, None] for value in each)
    return (y - mean) / np.sqrt(variance) * weight + bias


def nearest(x: np.ndarray, side: int) -> np.ndarray:
    chosen = np.arange(side) * x.shape[-1] // side
    return x[:, :, chosen][:, :, :, chosen]


@pytest.mark.parametrize("theirs", [(8, 4, 2, 1), (16, 2, 8, 1)])
def test_the_fusions_are_those_of_the_formula(theirs: tuple[int, ...]) -> None:
    method, maps, targets = make_review((8, 4, 2, 1), theirs)
    expected, fused = 0.0, None
    for fusion, feature, target in list(zip(method.fusions, maps, targets, strict=True))[::-1]:
        x = convolve(feature.numpy(), fusion.narrow)
        if fused is not None:
            y = nearest(fused, x.shape[-1])
            gates = 1 / (1 + np.exp(-convolve(np.concatenate((x, y), 1), fusion.attention)))
            x = x * gates[:, 0, None] + y * gates[:, 1, None]
        fused = nearest(x, target.shape[-1])
        expected += hierarchical_context(torch.from_numpy(convolve(fused, fusion.widen)), target).item()
    assert method.distance(maps, targets).item() == pytest.approx(expected, rel=1e-9)


def test_a_published_value_of_the_fusions() -> None:
    # What torchdistill 1.1.5 gives for these weights and maps: AttentionBasedFusion and HierarchicalContextLoss.
    method, maps, targets = make_review((8, 4, 2, 1), (8, 4, 2, 1))
    assert method.distance(maps, targets).item() == pytest.approx(647.425763169836, rel=1e-10, abs=0)


def test_a_teacher_that_has_what_the_fusions_give_teaches_nothing() -> None:
    method, maps, targets = make_review((8, 4, 2, 1), (8, 4, 2, 1))
    guesses, fused = [], None
    for fusion, feature, target in list(zip(method.fusions, maps, targets, strict=True))[::-1]:
        guess, fused = fusion(feature.requires_grad_(), fused, target.shape[2:])
        guesses.insert(0, guess.detach())
    loss = method.distance(maps, guesses)
    loss.backward()
    assert loss == 0 and all(not feature.grad.any() for feature in maps)


@pytest.mark.parametrize(
    ("ramp", "step", "share"), [(0.25, 0, 0.0), (0.25, 10, 0.4), (0.25, 25, 1.0), (0.25, 99, 1.0), (0.0, 0, 1.0)]
)
def test_the_ramp_rises_to_its_end_and_stays(ramp: float, step: int, share: float) -> None:
    model, batch = make_pair("reviewkd", "resnet20", "resnet8", ramp=ramp), make_batch()
    ours, theirs = model.method.features(model, batch)
    found = model.method.terms(ours, theirs, {**batch, "step": step, "total": 100})["review"]
    torch.testing.assert_close(found, share * model.method.distance(*model.method.maps(ours, theirs)))


@pytest.mark.parametrize("preactivation", [False, True])
def test_the_teacher_is_read_before_its_relu_and_the_student_as_told(preactivation: bool) -> None:
    model = make_pair("reviewkd", "wrn_40_2", "resnet8", preactivation=preactivation)
    features = model.method.features(model, make_batch())
    model.method.ask(*features)
    ours, theirs = model.method.maps(*features)
    assert all((each.min() < 0) == preactivation for each in ours[:-1]) and all(each.min() < 0 for each in theirs[:-1])
    assert ours[-1].flatten(1).equal(features[0].pooled) and theirs[-1].flatten(1).equal(features[1].pooled)


def test_the_width_of_the_fusions() -> None:
    with torch.device("meta"):
        student, teacher = (Classifier(build_network(name, num_classes=7)) for name in ("mobilenet_v1", "resnet50"))
        for width, expected in ((None, 512), (256, 256)):
            method = build_method("reviewkd", student, teacher, width=width)
            assert {fusion.narrow[0].out_channels for fusion in method.fusions} == {expected}


# The overhaul of feature distillation


def test_the_term_halves_from_level_to_level() -> None:
    model = make_model("ofd", 4).eval()
    maps, targets = ([torch.randn(3, 8 * (1 + (i > 1)), 8 >> i, 8 >> i) for i in range(3)] for _ in range(2))
    for margin in model.method.margins:
        margin.fill_(-0.3)
    expected = 0.0
    for i, connector in enumerate(model.method.connectors):
        guess, target = convolve(maps[i].double().numpy(), connector.double()), targets[i].double().numpy()
        connector.float()
        target = np.maximum(target, -0.3)
        counted = np.where((guess > target) | (target > 0), (guess - target) ** 2, 0)
        expected += counted.sum() / 3 * 2.0 ** (i - 2)
    assert model.method.distance(maps, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("teacher", "norms"),
    [
        ("wrn_16_2", ["layer2.0.bn1", "layer3.0.bn1", "bn1"]),
        ("resnet20", ["layer1.2.bn2", "layer2.2.bn2", "layer3.2.bn2"]),
        ("resnet50", ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"]),
        ("mobilenet_v1", ["blocks.1.1.bn2", "blocks.2.1.bn2", "blocks.3.5.bn2", "blocks.4.1.bn2"]),
    ],
)
def test_margins_come_from_the_normalisation_before_the_relu(teacher: str, norms: list[str]) -> None:
    student = "resnet8" if len(norms) == 3 else "resnet18"
    model = make_pair("ofd", teacher, student)
    for module in model.teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(-2, 2)
            module.bias.data.normal_()
    model.method.phases()[0].before_epoch(model, SimpleNamespace(epoch=0))
    for path, margin in zip(norms, model.method.margins, strict=True):
        norm = model.teacher.network.get_submodule(path)
        expected = negative_mean(norm.bias, norm.weight)
        assert torch.equal(margin.flatten(), expected) and (margin < 0).all()


def test_measured_margins_are_means_over_the_training_images(tmp_path: Path) -> None:
    data = make_data()
    model = make_model("ofd", data.spec.num_classes)
    fit(model, data, tmp_path, {**SCHEDULE, "epochs": 1})
    images = torch.cat([batch["inputs"] for batch in data.train.plain().epoch(0)])
    theirs = Features(model.teacher, images, graph=False)
    for index, margin in enumerate(model.method.margins):
        maps = theirs.before(index).transpose(0, 1).flatten(1).numpy()
        expected = [channel[channel < 0].mean() if (channel < 0).any() else 0 for channel in maps]
        np.testing.assert_allclose(margin.flatten(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("teacher", "student"), [("vit_base", "deit_tiny"), ("shufflenet_v2_32", "resnet8")])
def test_a_teacher_without_such_a_normalisation_is_one_clear_line(teacher: str, student: str) -> None:
    with pytest.raises(UserError, match=r"^method\.margin=norm: the teacher's stage .* expected measured$"):
        make_pair("ofd", teacher, student)


@pytest.mark.parametrize(("student", "weight"), [("resnet8", 1e-3), ("resnet18", 1e-4)])
def test_the_released_code_divides_by_the_kind_of_images(student: str, weight: float) -> None:
    assert make_pair("ofd", student, student).method.weights == {"overhaul": weight}
    assert make_pair("ofd", student, student, weight=2.0).method.weights == {"overhaul": 2.0}


def test_the_overhaul_refuses_detectors_and_segmentors() -> None:
    overrides = ("dataset=scenes_seg", "student=semantic_fpn_resnet18", "teacher=semantic_fpn_resnet50")
    with pytest.raises(UserError, match="^method=ofd: teaches classifiers only; for segmentation choose"):
        settle(composed(*overrides, "method=ofd"))
