"""Activation checkpointing: every method's losses, gradients and statistics are those without it, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dense_settings
import method_settings
from checks import bits, keeping, step_each_phase
from kt.methods import build_method
from kt.transfer import TransferModel

torch.set_num_threads(1)

# Those that no classifier is taught by, and detectors whose losses draw random numbers.
DENSE = [name for name in dense_settings.SETTINGS if " ifvd" in name]
DENSE += ["retinanet hybrid_forward", "faster r-cnn hybrid_forward", "depth distpro_search"]


def with_dropout(model: TransferModel) -> TransferModel:
    """A model whose student has dropout, behind the first normalisation."""
    layer = next(each for each in model.student.modules() if isinstance(each, nn.BatchNorm2d))
    layer.register_forward_hook(lambda layer, _, output: torch.dropout(output, 0.5, layer.training))
    return model


def compare(model: TransferModel, batch: dict[str, Any], folder: Path, precision: str = "fp32") -> None:
    """Asserts that a model's steps are the same with and without."""
    kept, recomputed = (
        bits(step_each_phase(copy.deepcopy(model), batch, folder, precision=precision, activation_checkpointing=on))
        for on in (False, True)
    )
    assert {key for key in kept if kept[key] != recomputed[key]} == set()


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return next(method_settings.make_data().train.epoch(0))


@pytest.mark.parametrize("name", method_settings.SETTINGS)
def test_a_step_of_every_method_is_the_same(name: str, batch: dict[str, Any], tmp_path: Path) -> None:
    compare(with_dropout(method_settings.make_model(name, 10)), batch, tmp_path)


def test_a_step_in_mixed_precision_and_forward_mode_is_the_same(batch: dict[str, Any], tmp_path: Path) -> None:
    model = with_dropout(method_settings.make_model("distpro_search", 10, hypergradient="jvp"))
    compare(model, batch, tmp_path, "bf16")


def test_attention_behind_which_gradients_are_differentiated_is_the_same(batch: dict[str, Any], tmp_path: Path) -> None:
    """Its kernel is another one within the steps that are unrolled."""
    student, teacher = (method_settings.make_classifier("deit_tiny", 10, seed) for seed in (0, 1))
    model = TransferModel(student, build_method("l2t", student, teacher), {"teacher": teacher})
    compare(model, {key: value[:2] for key, value in batch.items()}, tmp_path)


@pytest.mark.parametrize("name", DENSE)
def test_a_step_of_dense_networks_is_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="mmdet and mmseg are not installed (bash install.sh full)")
    compare(
        dense_settings.make_model(name),
        next(dense_settings.make_data(dense_settings.SETTINGS[name].task).train.epoch(0)),
        tmp_path,
    )


def kept_for_backward(model: TransferModel, batch: dict[str, Any], folder: Path, on: bool) -> int:
    """Bytes that are kept between the passes forward and backward of a step, parameters included."""
    with keeping() as sizes:
        step_each_phase(model, batch, folder, activation_checkpointing=on)
    return sum(sizes.values())


@pytest.mark.parametrize(("name", "factor"), [("none", 3), ("hybrid_forward", 2.75)])
def test_a_step_keeps_less(name: str, factor: float, batch: dict[str, Any], tmp_path: Path) -> None:
    """Of hybrid forward, this includes the teacher's stages through which gradients pass.

    They keep less in any case: folded ones have no normalisations that would keep their inputs.
    """
    model = method_settings.make_model(name, 10)
    kept = [kept_for_backward(copy.deepcopy(model), batch, tmp_path / str(on), on) for on in (False, True)]
    assert kept[1] < kept[0] / factor, kept
