"""Frozen teachers in reduced precision, beside students in single precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import method_settings
from checks import bits, step_each_phase
from kt.features import Features
from kt.precision import compute_in
from kt.transfer import TransferModel

torch.set_num_threads(1)

# Those that read a teacher in a way of their own: stages, heads, several teachers, channels, hypergradients, phases.
METHODS = ("kd", "hybrid_forward", "rco", "kcd", "kcd+rkd", "crd", "l2t", "m2as", "distpro_search", "ft", "ofd")


def in_bf16(model: TransferModel) -> TransferModel:
    return TransferModel(model.student, model.method, model.teachers, teacher_precision="bf16")


@pytest.fixture(scope="module")
def batch() -> Any:
    return next(method_settings.make_data().train.epoch(0))


def test_a_teacher_answers_in_single_precision_what_it_computed_in_half(batch: Any) -> None:
    teacher = method_settings.make_teacher("resnet20", 10)

    def read() -> dict[str, Tensor]:
        found = Features(teacher, batch["inputs"], graph=False)
        before = found.before(-1)
        return {"before": before, "level": found.level(0), "pooled": found.pooled, "logits": found.logits}

    exact = read()
    with torch.autocast("cpu", torch.bfloat16):
        everywhere = read()
    compute_in(teacher, "bf16")
    reduced = read()
    for name, value in reduced.items():
        assert value.dtype == torch.float32, name
        assert 1e-5 < (value - exact[name]).norm() / exact[name].norm() < 0.05, name
    assert torch.equal(reduced["level"], reduced["level"].bfloat16().float())
    # Beside a student in reduced precision nothing changes.
    with torch.autocast("cpu", torch.bfloat16):
        assert bits(read()) == bits(everywhere)
    twin = copy.deepcopy(teacher)
    assert torch.equal(Features(twin, batch["inputs"], graph=False).logits, reduced["logits"])
    compute_in(teacher, "fp32")
    assert bits(read()) == bits(exact)
    with pytest.raises(ValueError, match="teacher precision is 'fp16'; expected one of fp32, bf16"):
        compute_in(teacher, "fp16")


@pytest.mark.parametrize("name", METHODS)
def test_a_step_beside_such_a_teacher(name: str, batch: Any, tmp_path: Path) -> None:
    """Everything is in single precision as before, and about what it was."""
    exact = step_each_phase(method_settings.make_model(name, 10), batch, tmp_path)
    reduced = step_each_phase(in_bf16(method_settings.make_model(name, 10)), batch, tmp_path)
    assert {key: value.dtype for key, value in reduced.items()} == {key: value.dtype for key, value in exact.items()}
    scalars = [key for key in exact if "scalars loss" in key]
    assert scalars and all(torch.isfinite(value).all() for value in reduced.values())
    for key in scalars:
        torch.testing.assert_close(reduced[key], exact[key], rtol=0.05, atol=0.02)
    assert any(not torch.equal(reduced[key], value) for key, value in exact.items())
