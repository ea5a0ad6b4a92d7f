"""Every formula against an independent computation: loops, NumPy, SciPy, brute force, closed forms, published code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, gmean, truncnorm

from kt import functional as kf

RNG = np.random.default_rng(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values)


def smooth_l1(a: np.ndarray, b: np.ndarray) -> float:
    gap = np.abs(a - b)
    return float(np.where(gap < 1, gap**2 / 2, gap - 0.5).mean())


def test_dynamic_balance_is_a_constant_of_the_gradient() -> None:
    w = torch.tensor(1.5, requires_grad=True)
    l1, l2, l3 = w**2, 3 * w, torch.exp(w)
    a = kf.dynamic_balance(l1, l2, l3)
    expected = 2 * math.exp(1.5) / (1.5**2 + 4.5)
    assert a.item() == pytest.approx(expected) and not a.requires_grad
    (gradient,) = torch.autograd.grad(a * (l1 + l2) + l3, w)
    # Eq. 2; were the balance not detached, the gradient would be 3 exp(w).
    assert gradient.item() == pytest.approx(expected * (2 * 1.5 + 3) + math.exp(1.5))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_target(temperature: float) -> None:
    s, t = draw(5, 7), draw(5, 7)
    p, q = softmax(t.numpy() / temperature, 1), softmax(s.numpy() / temperature, 1)
    expected = temperature**2 * np.mean([entropy(a, b) for a, b in zip(p, q, strict=True)])
    assert kf.soft_target(s, t, temperature).item() == pytest.approx(expected)
    assert kf.soft_target(t, t, temperature).item() == pytest.approx(0)


def attention(feature: np.ndarray) -> np.ndarray:
    n, c, h, w = feature.shape
    maps = [
        [[sum(feature[i, k, y, x] ** 2 for k in range(c)) / c for x in range(w)] for y in range(h)] for i in range(n)
    ]
    return np.stack([unit(np.array(m).ravel()) for m in maps])


def test_attention() -> None:
    s, t = draw(3, 4, 5, 6), draw(3, 7, 5, 6)
    a, b = attention(s.numpy()), attention(t.numpy())
    np.testing.assert_allclose(kf.attention_map(s).numpy(), a)
    assert kf.attention_transfer(s, t).item() == pytest.approx(((a - b) ** 2).mean())
    expected = np.mean([np.linalg.norm(x - y) for x, y in zip(a, b, strict=True)])
    assert kf.attention_transfer(s, t, form="sum").item() == pytest.approx(expected)
    large = t.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert kf.attention_transfer(s, large).item() == pytest.approx(((a - b) ** 2).mean())


def test_hint() -> None:
    s, t = draw(3, 4, 2, 2), draw(3, 4, 2, 2)
    assert kf.hint(s, t).item() == pytest.approx(np.mean((s.numpy() - t.numpy()) ** 2))


def test_nst() -> None:
    s, t = draw(2, 3, 4, 4), draw(2, 5, 4, 4)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        total = []
        for i in range(2):
            for x in a[i].numpy():
                for y in b[i].numpy():
                    total.append((unit(x.ravel()) @ unit(y.ravel())) ** 2)
        return float(np.mean(total))

    assert kf.nst(s, t).item() == pytest.approx(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t))


def test_factor_transfer() -> None:
    s, t = draw(2, 3, 4, 4), draw(2, 3, 4, 4)
    a, b = attention(s.numpy()), attention(t.numpy())
    assert kf.factor_transfer(s, t).item() == pytest.approx(np.abs(a - b).mean())
    raw = [np.stack([unit(f.ravel()) for f in x.numpy()]) for x in (s, t)]
    assert kf.factor_transfer(s, t, form="official").item() == pytest.approx(np.abs(raw[0] - raw[1]).mean())


def test_activation_boundary() -> None:
    s, t = draw(3, 2, 2, 2), draw(3, 2, 2, 2)
    expected = 0.0
    for x, y in zip(s.numpy().ravel(), t.numpy().ravel(), strict=True):
        miss = 1.0 - x if y > 0 else 1.0 + x
        expected += max(miss, 0.0) ** 2
    assert kf.activation_boundary(s, t, 1.0).item() == pytest.approx(expected / 3)
    assert kf.activation_boundary(torch.where(t > 0, 1.0, -1.0), t, 1.0).item() == 0


def test_relational() -> None:
    s, t = draw(6, 3), draw(6, 5)
    distances = [cdist(f.numpy(), f.numpy()) for f in (s, t)]
    scaled = [d / d[d > 0].mean() for d in distances]
    assert kf.rkd_distance(s, t).item() == pytest.approx(smooth_l1(*scaled), rel=1e-5)
    angles = []
    for f in (s.numpy(), t.numpy()):
        values = np.zeros((6, 6, 6))
        for i, j, k in itertools.product(range(6), repeat=3):
            if i not in (j, k):
                values[i, j, k] = unit(f[j] - f[i]) @ unit(f[k] - f[i])
        angles.append(values)
    assert kf.rkd_angle(s, t).item() == pytest.approx(smooth_l1(*angles))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (6, 10), (4, 4), (2, 3), (1, 1)])
def test_hierarchical_context(height: int, width: int) -> None:
    s, t = draw(2, 3, height, width), draw(2, 3, height, width)

    def parts(length: int, size: int) -> list[slice]:
        return [slice(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]

    def pooled(f: torch.Tensor, size: int) -> np.ndarray:
        return np.array([[f.numpy()[:, :, y, x].mean((2, 3)) for x in parts(width, size)] for y in parts(height, size)])

    weights, losses = [1.0], [np.mean((s.numpy() - t.numpy()) ** 2)]
    for size in (size for size in (4, 2, 1) if size < height):
        weights.append(weights[-1] / 2)
        losses.append(np.mean((pooled(s, size) - pooled(t, size)) ** 2))
    expected = np.dot(weights, losses) / sum(weights)
    assert kf.hierarchical_context(s, t).item() == pytest.approx(expected)


@pytest.mark.parametrize(("side", "checkerboard"), [(1, 1.0), (2, 1 / 1.5), (4, 1 / 1.75), (8, 1 / 1.875)])
def test_what_pooling_cancels_counts_once(side: int, checkerboard: float) -> None:
    """Levels of 4, 2 and 1 pixels see nothing of a checkerboard, and of a constant difference as much as the map."""
    zero, signs = draw(2, 3, side, side) * 0, (-1.0) ** torch.arange(side)
    assert kf.hierarchical_context(zero + 0.7, zero).item() == pytest.approx(0.7**2)
    board = (signs[:, None] * signs).double()
    assert kf.hierarchical_context(zero + board, zero).item() == pytest.approx(checkerboard)


@pytest.mark.parametrize(
    ("std", "mean", "expected"),
    [(1, 0, -0.797885), (1, -1, -1.287600), (1, 1, -0.525135), (2, 0.5, -1.427108), (-1, -1, -1.2876), (1, 4, -3)],
)
def test_negative_means_of_normal_distributions(std: float, mean: float, expected: float) -> None:
    found = kf.negative_mean(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_negative_means_are_those_that_scipy_gives() -> None:
    mean, std = draw(50).clamp(-1.5, 1.5), draw(50).abs() + 0.5  # beyond three deviations OFD's code has -3 std
    expected = truncnorm.mean(-np.inf, -mean.numpy() / std.numpy(), loc=mean.numpy(), scale=std.numpy())
    np.testing.assert_allclose(kf.negative_mean(mean, std), expected)
    zero = torch.zeros(3)
    np.testing.assert_allclose(kf.negative_mean(torch.tensor([-2.0, 0.0, 2.0]), zero), [-2, 0, 0], atol=1e-6)


def test_partial_l2_by_hand() -> None:
    # Above and below a positive response; above the margin of a suppressed one, and below it (though above itself).
    t, s = (torch.tensor(values).view(1, 1, 2, 2) for values in ([2.0, 2.0, -3.0, -3.0], [3.0, 0.0, -0.5, -2.0]))
    margin = torch.tensor([-1.0]).view(1, 1, 1, 1)
    assert kf.partial_l2(s, t, margin).item() == 1 + 4 + 0.25 + 0
    # A suppressed response above the margin is a target itself.
    assert kf.partial_l2(s, torch.full_like(t, -0.75), margin).item() == 3.75**2 + 0.75**2 + 0.25**2
    assert kf.partial_l2(s.expand(3, -1, -1, -1), t.expand(3, -1, -1, -1), margin).item() == 5.25


def wave(step: float, *shape: int) -> torch.Tensor:
    """Irregular values in -1..1 that depend on nobody's random numbers."""
    return torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) ** 2).reshape(shape)


MAPS = (wave(0.3, 2, 3, 8, 8), wave(0.7, 2, 3, 8, 8))
WIDE = wave(0.7, 2, 5, 8, 8)
LOGITS = (3 * wave(0.3, 4, 5), 3 * wave(0.7, 4, 5))
LABELS = torch.tensor([0, 1, 2, 4])
# One sample lies far out for the student only: distances that differ by more than 1 take smooth L1's other branch.
FEATURES = (wave(0.3, 6, 3) * torch.tensor([1, 1, 1, 1, 1, 9])[:, None], wave(0.7, 6, 5))


@pytest.mark.parametrize(
    ("loss", "published"),
    [
        # What the classes of torchdistill 1.1.5 (losses.mid_level) return for the same tensors, in double precision.
        # KDLoss with alpha=0 is the soft part without its T^2, which is written out here.
        pytest.param(lambda: kf.soft_target(*LOGITS, 1.0), 2.58261571747, id="KDLoss-T1"),
        pytest.param(lambda: kf.soft_target(*LOGITS, 4.0), 4.0**2 * 0.263232642474, id="KDLoss-T4"),
        # KDLoss(temperature=4, alpha=0.1): its alpha weighs the cross-entropy, 1 - alpha the soft part, T^2 included.
        pytest.param(
            lambda: 0.1 * torch.nn.functional.cross_entropy(LOGITS[0], LABELS) + 0.9 * kf.soft_target(*LOGITS, 4.0),
            3.9524227573,
            id="KDLoss-with-labels",
        ),
        # ATLoss: "code" is a mean over samples and positions, "paper" the mean over samples of a norm (eq. 2).
        pytest.param(lambda: kf.attention_transfer(MAPS[0], WIDE), 0.00367783662611, id="ATLoss-code"),
        pytest.param(lambda: kf.attention_transfer(MAPS[0], WIDE, form="sum"), 0.485151947607, id="ATLoss-paper"),
        # FTLoss(p=1, reduction="mean"): the paper's norm (eq. 3) divided by the number of elements.
        pytest.param(lambda: kf.factor_transfer(*MAPS, form="official"), 0.0866697462047, id="FTLoss"),
        # FTLoss of the factors' mean squares over channels, which is what `repdistiller` compares.
        pytest.param(lambda: kf.factor_transfer(MAPS[0], WIDE), 0.0485892398618, id="FTLoss-of-mean-squares"),
        # AltActTransferLoss(reduction="mean"): a sum over elements, a mean over samples.
        pytest.param(lambda: kf.activation_boundary(*MAPS, 1.0), 299.900190295, id="AltActTransferLoss-1"),
        pytest.param(lambda: kf.activation_boundary(*MAPS, 0.5), 139.911705975, id="AltActTransferLoss-0.5"),
        # RKDLoss(reduction="mean"), one factor 1 and the other 0: means over all n^2 pairs and all n^3 triplets, those
        # that repeat a sample (and add nothing) included.
        pytest.param(lambda: kf.rkd_distance(*FEATURES), 0.338152151218, id="RKDLoss-distance"),
        pytest.param(lambda: kf.rkd_angle(*FEATURES), 0.0920376203203, id="RKDLoss-angle"),
        # HierarchicalContextLoss(reduction="mean", output_sizes=[4, 2, 1]), which leaves out 4 for a 4x4 map.
        pytest.param(lambda: kf.hierarchical_context(*MAPS), 0.6085888588, id="HierarchicalContextLoss-8"),
        pytest.param(
            lambda: kf.hierarchical_context(wave(0.3, 2, 3, 4, 4), wave(0.7, 2, 3, 4, 4)),
            0.67575341564,
            id="HierarchicalContextLoss-4",
        ),
        # SimpleLossWrapper around torch's MSELoss, which is what its hint training uses.
        pytest.param(lambda: kf.hint(*MAPS), 1.00629114811, id="MSELoss"),
    ],
)
def test_published_loss_values(loss: Callable[[], torch.Tensor], published: float) -> None:
    assert loss().item() == pytest.approx(published, rel=1e-10, abs=0)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine", "correlation", "kl"])
def test_channel_consistency(metric: str) -> None:
    s, t = draw(20, 3), draw(20, 4)
    expected = np.zeros((4, 3))
    for i, j in itertools.product(range(4), range(3)):
        a, b = t[:, i].numpy(), s[:, j].numpy()
        expected[i, j] = {
            "l1": lambda a, b: 1 / np.abs(a - b).sum(),
            "l2": lambda a, b: 1 / np.linalg.norm(a - b),
            "cosine": lambda a, b: unit(a) @ unit(b),
            "correlation": lambda a, b: np.corrcoef(a, b)[0, 1],
            "kl": lambda a, b: -np.sum(softmax(a) * (log_softmax(a) - log_softmax(b))),
        }[metric](a, b)
    np.testing.assert_allclose(kf.channel_consistency(s, t, metric).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("theirs", "ours"), [(4, 4), (6, 4), (5, 1)])
def test_bipartite_matching_is_the_best_of_all(theirs: int, ours: int) -> None:
    matrix = draw(theirs, ours)
    best = max(
        itertools.permutations(range(theirs), ours), key=lambda p: sum(matrix[i, j].item() for j, i in enumerate(p))
    )
    assert kf.match_channels(matrix, "bipartite").tolist() == list(best)


def test_matching_strategies() -> None:
    matrix = draw(6, 4)
    assert kf.match_channels(matrix, "greedy").tolist() == matrix.numpy().argmax(0).tolist()
    assert kf.match_channels(matrix, "identity").tolist() == [0, 1, 2, 3]
    chosen = kf.match_channels(matrix, "random", torch.Generator().manual_seed(0)).tolist()
    assert len(set(chosen)) == 4 and max(chosen) < 6
    # A permuted copy is found, though its consistency with itself is infinite.
    s = draw(10, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    for metric in kf.METRICS:
        found = kf.match_channels(kf.channel_consistency(s, s[:, order], metric), "bipartite")
        assert order[found].tolist() == [0, 1, 2, 3, 4], metric
    with pytest.raises(ValueError, match="3 teacher channels cannot serve 4"):
        kf.match_channels(draw(3, 4), "bipartite")


def test_channel_overlap() -> None:
    s, t = draw(7, 10), draw(7, 10)
    shares = []
    for a, b in zip(s.numpy(), t.numpy(), strict=True):
        shares.append(len(set(np.argsort(a)[-4:]) & set(np.argsort(b)[-4:])) / 4)
    assert kf.channel_overlap(s, t, 4).item() == pytest.approx(np.mean(shares))


def test_biased_softmax() -> None:
    logits = np.array([0.3, -1.0, 2.0])
    expected = np.exp(logits) / (np.exp(logits).sum() + math.e)
    np.testing.assert_allclose(kf.biased_softmax(torch.from_numpy(logits), 1.0).numpy(), expected)
    assert torch.isfinite(kf.biased_softmax(torch.tensor([1000.0, 0.0]), 1.0)).all()


@pytest.mark.parametrize("length", [1, 4, 9, 23])
def test_interpolate_process(length: int) -> None:
    process = draw(9, 3)
    places = np.linspace(0, 8, length)
    expected = np.stack([np.interp(places, np.arange(9), column) for column in process.numpy().T], 1)
    np.testing.assert_allclose(kf.interpolate_process(process, length).numpy(), expected)


def test_log_average_miss_rate() -> None:
    # A step curve: below 0.1 false positives an image half of the people are missed, above it a fifth.
    fppi = np.array([0.005, 0.05, 0.1, 0.5, 2.0])
    miss = np.array([0.5, 0.5, 0.2, 0.2, 0.2])
    points = 10.0 ** np.arange(-2, 0.01, 0.25)
    expected = gmean([0.5 if p < 0.1 - 1e-12 else 0.2 for p in points])
    assert kf.log_average_miss_rate(miss, fppi) == pytest.approx(expected)
    # A curve that starts late misses everyone before; one that ends early keeps its last value.
    assert kf.log_average_miss_rate([0.4], [0.5]) == pytest.approx(gmean([1.0] * 7 + [0.4] * 2))
    assert kf.log_average_miss_rate([0.3], [0.001]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kf.soft_target(draw(2, 3), draw(2, 4), 4), r"student \(2, 3\) and teacher \(2, 4\)"),
        (lambda: kf.soft_target(draw(2, 3), draw(2, 3), 0), "temperature 0"),
        (lambda: kf.hint(draw(2, 3, 4, 4), draw(2, 3, 2, 2)), "same shape"),
        (lambda: kf.attention_map(draw(2, 3)), r"\(2, 3\)"),
        (lambda: kf.attention_transfer(draw(2, 3, 4, 4), draw(3, 3, 4, 4)), "batch"),
        (lambda: kf.dynamic_balance(draw(2), draw(1), draw(1)), "scalar"),
        (lambda: kf.rkd_distance(draw(2, 3), draw(3, 3)), "batch"),
        (lambda: kf.partial_l2(draw(2, 3, 4, 4), draw(2, 3, 2, 2), draw(1, 3, 1, 1)), "same shape"),
        (lambda: kf.negative_mean(draw(3), draw(2)), "same shape"),
        (lambda: kf.channel_consistency(draw(2, 3), draw(2, 3), "cosin"), "did you mean 'cosine'"),
        (lambda: kf.match_channels(draw(2, 2), "gready"), "did you mean 'greedy'"),
        (lambda: kf.channel_overlap(draw(2, 3), draw(2, 3), 4), "k=4"),
        (lambda: kf.noise_contrast(draw(3), 1.0), "likelihoods"),
        (lambda: kf.weighted_matching(draw(2, 3, 4, 4), draw(2, 3, 2, 2), draw(2, 3), draw(2)), "same shape"),
        (lambda: kf.interpolate_process(draw(3), 4), "process"),
        (lambda: kf.log_average_miss_rate([1, 2], [1]), "same length"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["nst", "attention_transfer", "factor_transfer", "hierarchical_context", "rkd_angle"])
def test_gradients_by_finite_differences(name: str) -> None:
    shape = (3, 4) if name.startswith("rkd") else (2, 3, 4, 4)
    s, t = draw(*shape).requires_grad_(), draw(*shape)
    assert torch.autograd.gradcheck(lambda x: getattr(kf, name)(x, t), s)
