"""Every loss, consistency, matching, balance and process formula, once, as a pure function of tensors, batch first."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kt.errors import nearest

METRICS = ("l1", "l2", "cosine", "correlation", "kl")
STRATEGIES = ("bipartite", "greedy", "random", "identity")
NORMALISATIONS = ("biased_softmax", "softmax", "biased_l1", "l1", "sigmoid")
# Rows of a memory over rows chosen of it, from where on gathering rows beats a product with all of them.
GATHER_ABOVE = 40
CONTRAST_EPSILON = 1e-7
SMALLEST_NORM = 1e-8  # of vectors in cosine similarities, torch's
FPPI_POINTS = np.logspace(-2, 0, 9)


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape")


def _maps(*features: Tensor) -> None:
    for feature in features:
        if feature.dim() != 4:
            raise ValueError(f"expected a map (n, c, h, w), got shape {tuple(feature.shape)}")


def _same_batch(student: Tensor, teacher: Tensor) -> None:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have equal batches")


def _pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools whichever map is larger to the size of the other."""
    _maps(student, teacher)
    _same_batch(student, teacher)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return tuple(f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in (student, teacher))  # type: ignore[return-value]


def dynamic_balance(l1: Tensor, l2: Tensor, l3: Tensor) -> Tensor:
    """The weight of the hybrid losses, `2 L3 / (L1 + L2)`, constant in the gradient.

    Args:
        l1: Loss of the path that starts in the student, a scalar.
        l2: Loss of the path that starts in the teacher, a scalar.
        l3: Loss of the plain student, a scalar.

    Returns:
        A detached scalar. Were it not detached, the total `a (L1 + L2) + L3` would be `3 L3` with the gradient of
        that: none for the hybrid paths.

    Source: hybrid forward (Song et al. 2021), eqs. 1 and 2.
    """
    for value in (l1, l2, l3):
        if value.numel() != 1:
            raise ValueError(f"expected scalar losses, got shape {tuple(value.shape)}")
    return (2 * l3 / (l1 + l2)).detach()


def soft_target(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(teacher || student)` of softened distributions, mean over the batch.

    Args:
        student_logits: (n, classes).
        teacher_logits: (n, classes).
        temperature: T > 0.

    Source: Hinton et al. 2015, section 2.
    """
    _same_shape(student_logits, teacher_logits)
    if student_logits.dim() != 2:
        raise ValueError(f"expected logits (n, classes), got shape {tuple(student_logits.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: expected more than 0")
    ours = F.log_softmax(student_logits / temperature, dim=1)
    theirs = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def depth_error(found: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of depths over the pixels of a batch whose truth is known; 0 if there are none.

    Args:
        found: (n, h, w), in metres.
        truth: (n, h, w), in metres; 0 where nobody knows it.

    Source: Ma and Karaman, "Sparse-to-Dense", 2018, section III-B (L1), on valid pixels as its released code does.
    """
    _same_shape(found, truth)
    known = truth > 0
    return ((found - truth).abs() * known).sum() / known.sum().clamp(min=1)


def pixel_soft_target(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """`KL(teacher || student)` of each pixel's class distributions, mean over pixels and classes.

    Args:
        student_logits: (n, classes, h, w).
        teacher_logits: (n, classes, h, w).

    Source: Wang et al. 2020 (IFVD), eq. 4; that its sum over classes is a mean is the released code's.
    """
    _maps(student_logits, teacher_logits)
    _same_shape(student_logits, teacher_logits)
    ours, theirs = (F.log_softmax(logits, dim=1) for logits in (student_logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).mean()


def class_similarity(feature: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Cosine similarity of each pixel's feature with the mean feature of its class in its image.

    Args:
        feature: (n, c, h, w).
        labels: Integers (n, h, w); pixels of other values than 0 to `classes` - 1 are ignored.
        classes: Their number.

    Returns:
        (n, h, w), 1 at pixels that are ignored.

    Source: Wang et al. 2020 (IFVD), eqs. 1 and 2.
    """
    _maps(feature)
    if labels.shape != (feature.shape[0], *feature.shape[2:]):
        raise ValueError(f"expected labels (n, h, w) of features {tuple(feature.shape)}, got {tuple(labels.shape)}")
    pixels, index = feature.flatten(2), labels.flatten(1)
    counted = (index >= 0) & (index < classes)
    index = torch.where(counted, index, 0)[:, None]
    # Sums over the pixels of each class, and products of pixels with each centre, take no map for every class.
    members = torch.zeros(len(pixels), classes, pixels.shape[2], dtype=pixels.dtype, device=pixels.device)
    members.scatter_(1, index, counted[:, None].to(pixels.dtype))
    centres = members @ pixels.transpose(1, 2) / members.sum(2).clamp(min=1)[:, :, None]
    products = (centres @ pixels).gather(1, index)[:, 0]
    lengths = [each.norm(dim=dim).clamp(min=SMALLEST_NORM) for each, dim in ((pixels, 1), (centres, 2))]
    cosines = products / (lengths[0] * lengths[1].gather(1, index[:, 0]))
    return torch.where(counted, cosines, 1).view(labels.shape)


def intra_class_variation(student: Tensor, teacher: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean squared difference of two networks' class similarities over all pixels, of which ignored ones give 0.

    Args:
        student: Features (n, c_s, h, w).
        teacher: Features (n, c_t, h, w).
        labels: See `class_similarity`.
        classes: See `class_similarity`.

    Source: Wang et al. 2020 (IFVD), eq. 3.
    """
    return F.mse_loss(class_similarity(student, labels, classes), class_similarity(teacher, labels, classes))


def attention_map(feature: Tensor) -> Tensor:
    """Mean over channels of the squared map, flattened and of unit L2 norm: (n, c, h, w) -> (n, h w).

    Source: Zagoruyko and Komodakis 2017, section 3.1 (p = 2).
    """
    _maps(feature)
    return F.normalize(feature.pow(2).mean(1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, form: str = "mean") -> Tensor:
    """Distance of attention maps; channels may differ, sizes are pooled to the smaller one.

    Args:
        student: (n, c_s, h, w).
        teacher: (n, c_t, h', w').
        form: `mean` of squared differences as the authors' code computes it, or `sum`: the mean over samples of the
            L2 norm of the difference, as in eq. 2 of the paper.
    """
    student, teacher = _pool_to_smaller(student, teacher)
    difference = attention_map(student) - attention_map(teacher)
    if form == "mean":
        return difference.pow(2).mean()
    if form == "sum":
        return difference.norm(dim=1).mean()
    raise ValueError(f"form {form!r}: expected mean or sum")


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two features of the same shape (Romero et al. 2015, eq. 3, as a mean)."""
    _same_shape(student, teacher)
    return F.mse_loss(student, teacher)


def feature_l2(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Squared L2 distance of two features of the same shape.

    Args:
        student: (n, ...).
        teacher: (n, ...).
        reduction: `mean` over all elements, or `sum` per sample, averaged over the batch.

    Source: knowledge consistent distillation, eq. 9 with L_d the squared Euclidean distance.
    """
    if reduction == "mean":
        return hint(student, teacher)
    if reduction != "sum":
        raise ValueError(f"reduction {reduction!r}: expected mean or sum")
    _same_shape(student, teacher)
    return (student - teacher).pow(2).sum() / student.shape[0]


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of channel activations under the kernel `(x . y)^2`.

    Args:
        student: (n, c_s, h, w).
        teacher: (n, c_t, h', w'); sizes are pooled to the smaller one.

    Returns:
        Mean over samples and channel pairs of `k(t, t) + k(s, s) - 2 k(s, t)`, every channel of unit norm over space.

    Source: Huang and Wang, "Like What You Like", 2017, eq. 7 with d = 2, c = 0.
    """
    student, teacher = _pool_to_smaller(student, teacher)
    s, t = (F.normalize(f.flatten(2), dim=2) for f in (student, teacher))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(1, 2)).pow(2).mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def factor_transfer(student: Tensor, teacher: Tensor, form: str = "repdistiller") -> Tensor:
    """L1 distance of normalised factors.

    Args:
        student: Translated student factor, (n, c, h, w).
        teacher: Paraphrased teacher factor, (n, c, h, w).
        form: `repdistiller` compares mean-square maps over channels, `official` the raw factors (Kim et al., eq. 3).
    """
    _maps(student, teacher)
    if form == "official":
        _same_shape(student, teacher)
        return F.l1_loss(F.normalize(student.flatten(1), dim=1), F.normalize(teacher.flatten(1), dim=1))
    if form == "repdistiller":
        student, teacher = _pool_to_smaller(student, teacher)
        return F.l1_loss(attention_map(student), attention_map(teacher))
    raise ValueError(f"form {form!r}: expected repdistiller or official")


def activation_boundary(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Squared distance by which student pre-activations miss the teacher's side of zero plus a margin.

    Args:
        student: Pre-activations, (n, ...).
        teacher: Pre-activations of the same shape.
        margin: How far beyond zero.

    Returns:
        Sum over elements divided by the batch size.

    Source: Heo et al. 2019 (AAAI), eq. 5.
    """
    _same_shape(student, teacher)
    on = teacher > 0
    distance = torch.where(on, F.relu(margin - student), F.relu(margin + student))
    return distance.pow(2).sum() / student.shape[0]


def _pairwise_distances(feature: Tensor) -> Tensor:
    square = feature.pow(2).sum(1)
    gram = feature @ feature.t()
    distance = (square[:, None] + square[None, :] - 2 * gram).clamp(min=1e-12).sqrt()
    return distance * (1 - torch.eye(len(feature), dtype=distance.dtype, device=distance.device))


def _features(student: Tensor, teacher: Tensor) -> None:
    _same_batch(student, teacher)
    if student.dim() != 2 or teacher.dim() != 2:
        raise ValueError(f"expected features (n, c), got {tuple(student.shape)} and {tuple(teacher.shape)}")


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between pairwise distances, each network's divided by its mean over distinct pairs.

    Args:
        student: (n, c_s).
        teacher: (n, c_t).

    Source: Park et al., "Relational Knowledge Distillation", 2019, eqs. 5 to 8.
    """
    _features(student, teacher)
    scaled = []
    for feature in (student, teacher):
        distance = _pairwise_distances(feature)
        scaled.append(distance / distance[distance > 0].mean())
    return F.smooth_l1_loss(scaled[0], scaled[1])


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles of all triplets.

    Args:
        student: (n, c_s).
        teacher: (n, c_t).

    Source: Park et al., "Relational Knowledge Distillation", 2019, eqs. 9 to 11.
    """
    _features(student, teacher)
    cosines = []
    for feature in (student, teacher):
        sides = F.normalize(feature[None] - feature[:, None], dim=2)
        cosines.append((sides @ sides.transpose(1, 2)).flatten())
    return F.smooth_l1_loss(cosines[0], cosines[1])


def image_errors(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """The squared difference of two features of the same shape (n, ...), image by image: (n,).

    Args:
        student: (n, ...).
        teacher: (n, ...).
        reduction: `mean` or `sum` over the elements of each image.
    """
    _same_shape(student, teacher)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: expected mean or sum")
    errors = F.mse_loss(student, teacher, reduction="none").flatten(1)
    return errors.mean(1) if reduction == "mean" else errors.sum(1)


def pair_weights(logits: Tensor) -> Tensor:
    """Weights of target layers, `Q softmax`: their mean is one, so that they cannot all vanish.

    Args:
        logits: (..., Q).
    """
    return logits.shape[-1] * torch.softmax(logits, dim=-1)


def subspace_loss(errors: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over target layers of the auxiliary subspace's errors, plus the mean over all direct pairs.

    Args:
        errors: (p + 1, q, n), of each target layer and image: first those of p source layers as they are, last those
            of the source features that went through the auxiliary network.
        weights: Of the errors, of the same shape.

    Source: MAKD (Chen et al.), eq. 5; eq. 3 with p = 0, and eq. 2 with a single target layer.
    """
    weighted = errors if weights is None else weights * errors
    adapted = weighted[-1].mean()
    return adapted + weighted[:-1].mean() if len(errors) > 1 else adapted


def similarities(embeddings: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
    """Inner products of embeddings with rows of a memory.

    One product with the whole memory and a gather of its scores is far cheaper than a gather of rows, until the memory
    has many more rows than are chosen.

    Args:
        embeddings: (n, d).
        memory: (rows, d).
        chosen: Rows for each embedding, (n, k).

    Returns:
        (n, k).
    """
    if len(memory) <= GATHER_ABOVE * chosen.shape[1]:
        return (embeddings @ memory.t()).gather(1, chosen)
    return (memory[chosen] @ embeddings[:, :, None]).squeeze(2)


def noise_contrast(likelihoods: Tensor, noise: float) -> Tensor:
    """Negative log-likelihood of telling one sample apart from k draws of noise, mean over the batch.

    Args:
        likelihoods: Of the sample (first column) and of the draws under the model, (n, 1 + k).
        noise: k times the likelihood of a draw under the noise.

    Returns:
        Mean of `-log p / (p + noise) - sum_k log noise / (q_k + noise)`.

    Source: Tian et al., "Contrastive Representation Distillation", 2020, with their code's small constant, which keeps
    logarithms finite.
    """
    if likelihoods.dim() != 2 or likelihoods.shape[1] < 2:
        raise ValueError(f"expected likelihoods (n, 1 + k), got shape {tuple(likelihoods.shape)}")
    sample, draws = likelihoods.split([1, likelihoods.shape[1] - 1], dim=1)
    told = (sample / (sample + noise + CONTRAST_EPSILON)).log().sum()
    return ((draws + CONTRAST_EPSILON).div(noise).log1p().sum() - told) / len(likelihoods)


def weighted_matching(student: Tensor, teacher: Tensor, channels: Tensor, pair: Tensor) -> Tensor:
    """Squared distance of maps under weights of each sample's channels and of the pair of maps, mean over the batch.

    Args:
        student: (n, c, h, w).
        teacher: (n, c, h, w).
        channels: Weights of the channels, (n, c).
        pair: Weight of the pair, (n,).

    Source: Jang et al., "Learning What and Where to Transfer", 2019, section 2.1.
    """
    _maps(student, teacher)
    _same_shape(student, teacher)
    return (pair * (channels * (student - teacher).pow(2).mean((2, 3))).sum(1)).mean()


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE of the maps and of their average-pooled versions (4, 2, 1), weighted 1, 1/2, 1/4, 1/8, over the weights' sum.

    Levels at which the map is no larger than the pooled size are left out.

    Args:
        student: (n, c, h, w).
        teacher: (n, c, h, w).

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3.3.
    """
    _maps(student, teacher)
    _same_shape(student, teacher)
    # Pooling is linear: the difference of pooled maps is the pooled difference.
    difference = student - teacher
    loss, weight, total = difference.square().mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= student.shape[2]:
            continue
        weight /= 2
        pooled = F.adaptive_avg_pool2d(difference, size)
        loss = loss + weight * pooled.square().mean()
        total += weight
        if difference.shape[2] % size == 0 == difference.shape[3] % size:
            difference = pooled  # of equal parts, whose means larger parts are means of
    return loss / total


def negative_mean(mean: Tensor, std: Tensor) -> Tensor:
    """The expected value of normal variables where they are negative, `mean - std phi(mean / std) / Phi(-mean / std)`.

    Where they hardly ever are (1 in 1000), it is -3 times the standard deviation.

    Args:
        mean: (c,).
        std: (c,); the sign does not matter.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, section 3; the fallback is the
    released code's.
    """
    if mean.shape != std.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and std {tuple(std.shape)} must have the same shape")
    location, scale = mean.double(), std.double().abs()
    ratio = location / scale.clamp(min=1e-12)
    share = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    return torch.where(share > 1e-3, location - scale * density / share, -3 * scale).to(mean.dtype)


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Squared distance from a teacher's response; from a negative one, raised to the margin, only of larger ones.

    Args:
        student: (n, c, h, w).
        teacher: Pre-activations, (n, c, h, w).
        margin: Negative, (1, c, 1, 1).

    Returns:
        Sum over elements divided by the batch size.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, section 3.
    """
    _maps(student, teacher)
    _same_shape(student, teacher)
    target = torch.maximum(teacher, margin)
    counts = (student > target) | (teacher > 0)
    return torch.where(counts, student - target, 0).square().sum() / student.shape[0]


def channel_consistency(student: Tensor, teacher: Tensor, metric: str) -> Tensor:
    """How much every teacher channel acts like every student channel; larger is more consistent.

    Args:
        student: Pooled activations, (n, c_student).
        teacher: Pooled activations, (n, c_teacher).
        metric: `l1` or `l2` (inverse norm of the difference), `cosine`, `correlation` (Pearson) or `kl` (negated
            divergence of the teacher channel's softmax over the samples from the student channel's).

    Returns:
        (c_teacher, c_student).

    Source: knowledge consistency distillation, eqs. 3 and 4.
    """
    _features(student, teacher)
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}{nearest(metric, METRICS)}")
    if metric in ("l1", "l2"):
        distance = torch.cdist(
            teacher.t().contiguous(),
            student.t().contiguous(),
            p=1.0 if metric == "l1" else 2.0,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        return 1 / distance
    if metric == "kl":
        ours, theirs = F.log_softmax(student, 0), F.log_softmax(teacher, 0)
        weights = theirs.exp()
        return weights.t() @ ours - (weights * theirs).sum(0)[:, None]
    if metric == "correlation":
        student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    return F.normalize(teacher, dim=0).t() @ F.normalize(student, dim=0)


def match_channels(consistency: Tensor, strategy: str, generator: torch.Generator | None = None) -> Tensor:
    """The teacher channel for every student channel.

    Args:
        consistency: (c_teacher, c_student).
        strategy: `bipartite` (maximum-weight one-to-one assignment), `greedy` (the best for each, repeats allowed),
            `random` (one-to-one) or `identity`.
        generator: Of the random strategy.

    Returns:
        LongTensor (c_student,).

    Raises:
        ValueError: Unknown strategy, or a one-to-one strategy with fewer teacher than student channels.
    """
    if consistency.dim() != 2:
        raise ValueError(f"expected a matrix (c_teacher, c_student), got shape {tuple(consistency.shape)}")
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}{nearest(strategy, STRATEGIES)}"
        )
    theirs, ours = consistency.shape
    if strategy == "greedy":
        return consistency.argmax(0)
    if theirs < ours:
        raise ValueError(f"strategy {strategy!r} is one-to-one: {theirs} teacher channels cannot serve {ours}")
    if strategy == "identity":
        return torch.arange(ours)
    if strategy == "random":
        return torch.randperm(theirs, generator=generator)[:ours]
    # An identical pair has infinite consistency, which the solver refuses: it outweighs any sum of finite ones.
    matrix = consistency.detach().cpu().double().numpy()
    finite = np.abs(matrix[np.isfinite(matrix)])
    matrix = np.nan_to_num(matrix, posinf=1 + 2 * ours * (finite.max() if finite.size else 1.0))
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    matched = torch.empty(ours, dtype=torch.long)
    matched[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return matched


def channel_overlap(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Mean over samples of the share of the k most active channels that both networks have in common.

    Args:
        student: Pooled activations, (n, c).
        teacher: Pooled activations of the same (matched) channels, (n, c).
        k: 1 to c.
    """
    _same_shape(student, teacher)
    if student.dim() != 2 or not 1 <= k <= student.shape[1]:
        raise ValueError(f"k={k}: expected features (n, c) and 1 <= k <= c, got shape {tuple(student.shape)}")
    marks = [torch.zeros_like(f).scatter_(1, f.topk(k, dim=1).indices, 1.0) for f in (student, teacher)]
    return (marks[0] * marks[1]).sum(1).mean() / k


def channel_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """`KL(teacher || student)` of the softmax over channels, mean over samples.

    Args:
        student: Pooled activations, (n, c).
        teacher: Pooled activations of the same (matched) channels, (n, c).
    """
    _same_shape(student, teacher)
    return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True)


def biased_softmax(logits: Tensor, bias: float) -> Tensor:
    """`exp(l) / (sum exp(l) + exp(bias))`: weights that sum to less than one (DistPro, section 3.2).

    Args:
        logits: (..., pathways).
        bias: The logit of "no pathway".
    """
    constant = torch.full_like(logits[..., :1], bias)
    return torch.softmax(torch.cat([logits, constant], dim=-1), dim=-1)[..., :-1]


def pathway_weights(logits: Tensor, normalisation: str = "biased_softmax") -> Tensor:
    """Weights of pathways from their logits l, each strategy of DistPro's Table 7.

    Args:
        logits: (..., pathways).
        normalisation: `biased_softmax` with 1 as the logit of "no pathway", `softmax`, `biased_l1` and `l1`
            (`|l| / (sum |l| + 1)` and without the 1; the table prints l itself, but a map that is to differ from the
            teacher's teaches nothing), or `sigmoid`.

    Returns:
        Of the same shape.
    """
    if normalisation == "biased_softmax":
        return biased_softmax(logits, 1.0)
    if normalisation == "softmax":
        return torch.softmax(logits, dim=-1)
    if normalisation == "sigmoid":
        return torch.sigmoid(logits)
    if normalisation not in NORMALISATIONS:
        hint = nearest(normalisation, NORMALISATIONS)
        raise ValueError(f"normalisation {normalisation!r}: expected one of {', '.join(NORMALISATIONS)}{hint}")
    size = logits.abs()
    return size / (size.sum(-1, keepdim=True) + (normalisation == "biased_l1"))


def interpolate_process(process: Tensor, length: int) -> Tensor:
    """A recorded process of weights, linearly interpolated to another number of steps; both ends are kept.

    Args:
        process: (steps, pathways).
        length: Steps wanted, at least 1.

    Returns:
        (length, pathways).
    """
    if process.dim() != 2 or len(process) == 0 or length < 1:
        raise ValueError(
            f"expected a process (steps, pathways) and length >= 1, got {tuple(process.shape)} and {length}"
        )
    if len(process) == 1:
        return process.expand(length, -1).clone()
    position = torch.linspace(0, len(process) - 1, length, dtype=torch.float64, device=process.device)
    low = position.floor().long().clamp(max=len(process) - 2)
    share = (position - low).to(process.dtype)[:, None]
    return process[low] * (1 - share) + process[low + 1] * share


def log_average_miss_rate(miss_rate: ArrayLike, fppi: ArrayLike) -> float:
    """Geometric mean of the miss rate at nine log-spaced false positives per image from 1e-2 to 1.

    Args:
        miss_rate: In 0..1, along falling score thresholds.
        fppi: False positives per image along the same thresholds, not falling.

    Returns:
        In 0..1. A point that the curve does not reach takes the miss rate at the largest FPPI below it, or 1.

    Source: Dollar et al., "Pedestrian Detection: An Evaluation of the State of the Art", 2012.
    """
    misses, positives = np.asarray(miss_rate, float), np.asarray(fppi, float)
    if misses.shape != positives.shape or misses.ndim != 1:
        raise ValueError(f"miss_rate {misses.shape} and fppi {positives.shape} must be curves of the same length")
    at = np.searchsorted(positives, FPPI_POINTS, side="right") - 1
    sampled = np.where(at >= 0, misses[np.maximum(at, 0)] if misses.size else 1.0, 1.0)
    return float(np.exp(np.log(np.maximum(sampled, 1e-10)).mean()))
