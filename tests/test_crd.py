"""CRD against noise-contrastive estimation in loops: losses, gradients, memory, constants, and who is a negative."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

import kt.functional
from kt import ranks
from kt.data import DataSpec, build_data
from kt.errors import UserError
from kt.methods import build_method
from method_settings import DATASET, make_data, make_model

CLASSES = 4
Matrix = NDArray[np.float64]


def spec_of(labels: NDArray[np.int64]) -> DataSpec:
    size = int((labels >= 0).sum())
    return DataSpec("x", CLASSES, 32, (0.5,) * 3, (0.25,) * 3, size, 1, "mark", ("a",) * CLASSES, labels=labels)


def unit(vector: Matrix) -> Matrix:
    return vector / math.sqrt(sum(float(value) ** 2 for value in vector))


def embed(features: list[Matrix], layers: list[tuple[Matrix, Matrix]]) -> list[Matrix]:
    """Each side's embeddings, sample by sample."""
    sides = zip(features, layers, strict=True)
    return [np.array([unit(weight @ x + bias) for x in feature]) for feature, (weight, bias) in sides]


def side_loss(embedded: Matrix, memory: Matrix, chosen: NDArray[np.int64], constant: float | None) -> Any:
    """One side's loss and its constant, sample by sample and draw by draw."""
    size, draws = len(memory), chosen.shape[1] - 1
    score = [[math.exp(float(v @ memory[i]) / 0.1) for i in rows] for v, rows in zip(embedded, chosen, strict=True)]
    constant = constant or size * float(np.mean(score))
    total = 0.0
    for own, *others in score:
        total += math.log(own / constant / (own / constant + draws / size + 1e-7))
        for other in others:
            total += math.log(draws / size / (other / constant + draws / size + 1e-7))
    return -total / len(embedded), constant


@pytest.mark.parametrize("gather_above", [0, 40])
def test_two_steps_are_those_of_loops(gather_above: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(kt.functional, "GATHER_ABOVE", gather_above)
    # Images 0, 3, 6, ... do not take part.
    labels = np.where(np.arange(30) % 3, np.arange(30) // 3 % CLASSES, -1)
    options = {"embedding": 6, "negatives": 7, "momentum": 0.3, "temperature": 0.1}
    model = make_model("crd", CLASSES, spec_of(labels), **options).double().eval()
    method, part = model.method, np.flatnonzero(labels >= 0)
    place = {int(index): int(method.rows[index]) for index in part}
    assert sorted(place.values()) == list(range(20)) and method.memories.shape == (2, 20, 6)
    assert method.memories.abs().max() <= math.sqrt(3 / 6)
    drawn: list[torch.Tensor] = []
    draw = method.draw
    monkeypatch.setattr(method, "draw", lambda labels: drawn.append(draw(labels)) or drawn[-1])
    memories = method.memories.numpy().copy()
    constants: list[float | None] = [None, None]
    for number, indices in enumerate(torch.tensor([[4, 17, 1, 28, 11], [11, 2, 28, 13, 29]])):
        inputs = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(number)).double()
        batch = {"inputs": inputs, "indices": indices, "labels": torch.from_numpy(labels)[indices]}
        ours, theirs = method.features(model, batch)
        terms = method.terms(ours, theirs, batch)
        rows = [place[int(index)] for index in indices]
        chosen = np.concatenate([np.array(rows)[:, None], drawn[-1].numpy()], 1)
        pooled = [each.pooled.detach().numpy() for each in (ours, theirs)]
        layers = [(each.weight.detach().numpy(), each.bias.detach().numpy()) for each in method.embeddings]
        embedded = embed(pooled, layers)
        sides = [side_loss(embedded[i], memories[1 - i], chosen, constants[i]) for i in (0, 1)]
        constants = [constant for _, constant in sides]
        assert [term.item() for term in terms.values()] == pytest.approx([loss for loss, _ in sides], rel=1e-9)
        assert method.constants.tolist() == pytest.approx(constants, rel=1e-9)
        # The gradient, along a random direction, reads the memory that the loss has read.
        slopes = [np.random.default_rng(side).normal(size=weight.shape) for side, (weight, _) in enumerate(layers)]
        totals = []
        for step in (1e-6, -1e-6):
            moved = embed(pooled, [(w + step * slope, b) for (w, b), slope in zip(layers, slopes, strict=True)])
            totals.append(sum(side_loss(moved[i], memories[1 - i], chosen, constants[i])[0] for i in (0, 1)))
        gradients = torch.autograd.grad(sum(terms.values()), [each.weight for each in method.embeddings])
        found = sum(float((g.numpy() * slope).sum()) for g, slope in zip(gradients, slopes, strict=True))
        assert found == pytest.approx((totals[0] - totals[1]) / 2e-6, rel=1e-5)
        for side in (0, 1):
            for row, vector in zip(rows, embedded[side], strict=True):
                memories[side, row] = unit(0.3 * memories[side, row] + 0.7 * vector)
        np.testing.assert_allclose(method.memories.numpy(), memories, rtol=1e-9)


def test_the_constants_are_means_over_processes(monkeypatch: Any) -> None:
    model = make_model("crd", 10)
    twin, batch = copy.deepcopy(model), next(iter(make_data().train.epoch(0)))
    for each in (model, twin):
        torch.manual_seed(0)
        each.method.terms(*each.method.features(each.eval(), batch), batch)
        monkeypatch.setattr(ranks, "mean_over_ranks", lambda value: 3 * value)
    torch.testing.assert_close(twin.method.constants, 3 * model.method.constants)


@pytest.mark.parametrize("negatives", [256, 4096])
def test_the_first_loss_is_that_of_random_embeddings(negatives: int) -> None:
    """About ln K + 1 + 1 / (2 * 128 * 0.07^2) a side."""
    labels = np.arange(3000) % CLASSES
    model = make_model("crd", CLASSES, spec_of(labels), negatives=negatives)
    batch = {"inputs": torch.rand(64, 3, 32, 32), "indices": torch.arange(64), "labels": torch.arange(64) % CLASSES}
    for loss in model.method.terms(*model.method.features(model, batch), batch).values():
        assert loss.item() == pytest.approx(math.log(negatives) + 1.8, abs=0.25)


def test_negatives_are_uniform_over_the_other_classes() -> None:
    labels = np.array([2, 0, -1, 1, 2, 2, 0, 3, 2, -1, 2, 1, 0])
    method = make_model("crd", CLASSES, spec_of(labels), negatives=20_000).method
    torch.manual_seed(0)
    drawn = method.draw(torch.arange(CLASSES))
    for label in range(CLASSES):
        counts = np.bincount(drawn[label], minlength=11)
        hits = {index: counts[method.rows[index]] for index in np.flatnonzero(labels >= 0)}
        assert sum(hits.values()) == 20_000
        assert not any(count for index, count in hits.items() if labels[index] == label)
        assert chisquare([count for index, count in hits.items() if labels[index] != label]).pvalue > 1e-3


def test_every_row_of_a_large_memory_can_be_drawn() -> None:
    """Single precision has 2^24 numbers between 0 and 1: of twice as many rows it would draw every other one."""
    method = make_model("crd", CLASSES, spec_of(np.array([0, 1])), negatives=1000).method
    method.memories = torch.empty(2, (1 << 25) + 1, 1, device="meta")
    method.sizes[:2] = torch.tensor([1, 1 << 25])
    torch.manual_seed(0)
    assert 400 < int((method.draw(torch.tensor([0])) % 2).sum()) < 600


def test_the_facts_of_the_data_name_each_images_class() -> None:
    spec = make_data().spec
    data = build_data({**DATASET, "subset": 24}, ".", batch_size=8, seed=0)
    seen: dict[int, int] = {}
    for each in data.train.epoch(0):
        seen |= dict(zip(each["indices"].tolist(), each["labels"].tolist(), strict=True))
    assert len(seen) == 24 and len(data.spec.labels) == data.spec.largest_index + 1 > 24
    assert {i: int(label) for i, label in enumerate(data.spec.labels) if label >= 0} == seen
    assert all(spec.labels[i] == label for i, label in seen.items()) and (spec.labels >= 0).all()


def test_data_that_it_cannot_remember_are_one_line() -> None:
    model = make_model("kd", CLASSES)
    with pytest.raises(UserError, match=r"^method=crd: it remembers every training image; expected .*data=data\.spec"):
        build_method("crd", model.student, model.teacher)
    with pytest.raises(UserError, match=r"^method=crd: all training images are of one class"):
        make_model("crd", CLASSES, spec_of(np.array([2, -1, 2])))
