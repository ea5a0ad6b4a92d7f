"""Hybrid forward against what the paper states, computed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kt.classifier import Classifier
from kt.errors import UserError
from kt.methods import build_method
from kt.models import build_network
from kt.phase import Phase
from kt.transfer import TransferModel
from method_settings import make_classifier, make_model

CLASSES = 6


def batch(n: int = 8, size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"inputs": torch.rand(n, 3, size, size, generator=generator), "labels": torch.arange(n) % CLASSES}


def model_with(**options: Any) -> TransferModel:
    model = make_model("hybrid_forward", CLASSES, **options)
    model.phase = model.method.phases()[0]
    return model.train()


def by_hand(model: TransferModel, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L1, L2, L3 of the three-stage pair, written out: student-teacher-student, teacher-student-teacher, plain."""
    student, teacher, adapters = model.student, model.teacher, model.method.adapters
    s, t, x, y = student.stages, teacher.stages, data["inputs"], data["labels"]

    def loss(feature: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(student.head(feature), y)

    x1 = s[0](student.normalise(x))
    x1 = t[1](adapters["path1_0_to_teacher"](x1))
    l1 = loss(s[2](adapters["path1_1_to_student"](x1)))
    x2 = t[0](teacher.normalise(x))
    x2 = s[1](adapters["path2_0_to_student"](x2))
    l2 = loss(adapters["path2_2_to_student"](t[2](adapters["path2_1_to_teacher"](x2))))
    return l1, l2, loss(s[2](s[1](s[0](student.normalise(x)))))


def gradients(loss: torch.Tensor, model: TransferModel) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def test_paths_have_the_46_and_32_layers_of_the_paper() -> None:
    student = Classifier(build_network("mobilenet_v1", num_classes=10, width=0.25))
    teacher = Classifier(build_network("resnet50", num_classes=10, width=0.25))
    method = build_method("hybrid_forward", student, teacher)
    assert method.depths == [46, 32] and method.facts == {"path_depths": [46, 32, 28]}
    apart = build_method("hybrid_forward", student, teacher, switch_at=[[2], [4], [8], [16], [32]])
    assert apart.depths != [46, 32]


@pytest.mark.parametrize("balance", ["dynamic", 1.0, 0.25])
def test_loss_and_gradient_are_those_of_the_equations(balance: Any) -> None:
    model, data = model_with(balance=balance), batch()
    twin = copy.deepcopy(model)
    loss, logged = model(**data, mode="loss")
    l1, l2, l3 = by_hand(twin, data)
    for name, value in (("l1", l1), ("l2", l2), ("l3", l3)):
        torch.testing.assert_close(logged[name], value.detach())
    a = (2 * l3 / (l1 + l2)).item() if balance == "dynamic" else balance
    assert float(logged["balance"]) == pytest.approx(a, rel=1e-5)
    # Eq. 2: the balance is a constant of the gradient.
    parts = [gradients(value, twin) for value in (l1, l2, l3)]
    expected = [a * (g1 + g2) + g3 for g1, g2, g3 in zip(*parts, strict=True)]
    for found, wanted in zip(gradients(loss, model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    assert any(g1.abs().sum() > 0 for g1 in parts[0]), "no gradient flows through the teacher's stages"


def test_dynamic_balance_makes_the_hybrid_part_as_heavy_as_twice_the_task() -> None:
    loss, logged = model_with(balance="dynamic")(**batch(), mode="loss")
    assert loss.item() == pytest.approx(3 * float(logged["l3"]), rel=1e-5)


def statistics(model: TransferModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.student.state_dict().items() if "running" in k or "num_batches" in k}


def test_only_the_plain_pass_updates_running_statistics() -> None:
    hybrid, plain, tracked = model_with(), model_with(), model_with(track_hybrid_stats=True)
    before = statistics(hybrid)
    hybrid(**batch(), mode="loss")
    tracked(**batch(), mode="loss")
    plain.student(batch()["inputs"])
    after, expected = statistics(hybrid), statistics(plain)
    assert all(torch.equal(after[key], expected[key]) for key in expected)
    assert not any(torch.equal(after[key], before[key]) for key in before)
    assert any(not torch.equal(after[key], value) for key, value in statistics(tracked).items())
    assert all(m.track_running_stats for m in hybrid.student.modules() if hasattr(m, "track_running_stats"))


def test_hybrid_passes_of_frozen_norm_layers_use_running_statistics() -> None:
    model = model_with()
    model.student.eval()
    before = statistics(model)
    _, logged = model(**batch(), mode="loss")
    l1, l2, l3 = by_hand(model, batch())
    torch.testing.assert_close(logged["l1"], l1.detach())
    assert all(torch.equal(value, before[key]) for key, value in statistics(model).items())


def test_the_shared_stage_runs_once_and_the_first_teacher_stage_without_a_graph() -> None:
    model, data = model_with(), batch()
    model(**data, mode="loss")  # the first batch of a size also looks up the sizes of all maps
    calls = []
    first = next(module for module in model.student.network.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append("student stage 1"))
    seen = {}
    for name, adapter in model.method.adapters.items():
        adapter.register_forward_hook(lambda m, inputs, out, name=name: seen.update({name: inputs[0].requires_grad}))
    model(**data, mode="loss")
    assert calls == ["student stage 1"]
    assert seen == {
        "path1_0_to_teacher": True,
        "path1_1_to_student": True,
        "path2_0_to_student": False,
        "path2_1_to_teacher": True,
        "path2_2_to_student": True,
    }


def test_teacher_norm_batch_uses_the_batch_and_records_nothing() -> None:
    student, data = make_classifier("resnet8", CLASSES, 2), batch()
    outputs, states = [], []
    for norm in ("eval", "batch"):
        teacher = make_classifier("resnet20", CLASSES, 1)
        model = TransferModel(student, build_method("hybrid_forward", student, teacher), {"teacher": teacher}, norm)
        model.train()
        outputs.append(model.teacher(data["inputs"]))
        states.append(model.teacher.state_dict())
    assert not torch.allclose(outputs[0], outputs[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_maps_of_different_size_are_interpolated() -> None:
    torch.manual_seed(0)
    student = Classifier(build_network("resnet18", num_classes=CLASSES, width=0.125, image_size=32, small_stem=True))
    teacher = Classifier(build_network("resnet20", num_classes=CLASSES, width=0.25, image_size=32))
    student.train()
    # The student's strides are 1, 2, 4, 8: its last two stages answer to the teacher's last one.
    method = build_method("hybrid_forward", student, teacher)
    model = TransferModel(student, method, {"teacher": teacher})
    model.phase = Phase("train", method.loss)
    loss, _ = model(**batch(), mode="loss")
    loss.backward()
    assert all(adapter.weight.grad is not None for adapter in method.adapters.values())


def test_switch_points_that_do_not_fit_name_the_strides() -> None:
    with pytest.raises(UserError, match=r"stages of stride \[4\], which no group names"):
        model_with(switch_at=[[1], [2]])
    with pytest.raises(UserError, match="rising strides"):
        model_with(switch_at=[[2], [1], [4]])
    with pytest.raises(UserError, match="no border"):
        model_with(switch_at=[[1, 2, 4]])
    with pytest.raises(UserError, match="method.balance=dynamical: expected dynamic or a number >= 0"):
        model_with(balance="dynamical")
