"""What a difference of two scores may be by chance: of the test images and of the seeds. Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

LEVEL = 0.975  # quantile of a two-sided 95 % interval
DRAWS = 1000  # of a bootstrap: its standard error is then known to about 2 %
MOST_SEEDS = 1000


def paired_error(first: ArrayLike, second: ArrayLike) -> float:
    """The standard error of the difference of two means over the same n images.

    Args:
        first, second: (n,) outcomes of each image, n > 1.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))


def binomial_error(first: float, second: float, images: float, other_images: float | None = None) -> float:
    """The standard error of the difference of two independent shares, of so many images each."""
    return math.sqrt(first * (1 - first) / images + second * (1 - second) / (other_images or images))


def mean_iou(areas: NDArray[np.float64]) -> NDArray[np.float64]:
    """mIoU in percent from areas (..., 2, classes) of intersection and union; classes without a pixel are left out."""
    with np.errstate(invalid="ignore"):
        return 100.0 * np.nanmean(areas[..., 0, :] / areas[..., 1, :], axis=-1)


def bootstrap_error(first: Sequence[ArrayLike], second: Sequence[ArrayLike], draws: int = DRAWS) -> float:
    """The standard error of the difference of two mIoUs in percent, by drawing the test images again.

    Args:
        first, second: Of each seed, (n, 2, classes) areas of intersection and union of the same n images; an mIoU is
            the mean over the seeds.
        draws: Bootstrap samples; they are the same in every call.
    """
    images = len(np.asarray(first[0]))
    times = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=draws).astype(float)

    def scores(seeds: Sequence[ArrayLike]) -> NDArray[np.float64]:
        areas = [np.asarray(each, float) for each in seeds]
        return np.mean([mean_iou(np.tensordot(times, each, axes=1)) for each in areas], axis=0)

    return float((scores(first) - scores(second)).std(ddof=1))


def t_interval(first: ArrayLike, second: ArrayLike | None = None) -> float:
    """Half of the 95 % t interval of a mean, or of the difference of two means after Welch.

    Args:
        first, second: (k,) and (m,) values. Where one holds a single value, both are taken to vary alike.
    """
    groups = [np.asarray(each, float) for each in (first, second) if each is not None]
    several = [each for each in groups if len(each) > 1]
    variances = [each.var(ddof=1) for each in several]
    if len(several) < len(groups):
        variances, freedom = variances * len(groups), float(len(several[0]) - 1)
    squares = [variance / len(each) for variance, each in zip(variances, groups, strict=True)]
    if len(several) == len(groups):
        weights = [square**2 / (len(each) - 1) for square, each in zip(squares, groups, strict=True)]
        freedom = sum(squares) ** 2 / sum(weights) if sum(weights) else 1.0
    return float(stdtrit(freedom, LEVEL) * math.sqrt(sum(squares)))


def seeds_to_decide(error: float, effect: float) -> int | None:
    """How many seeds of each would tell a difference from its border; None if more than `MOST_SEEDS`.

    Args:
        error: Standard error of the difference of one seed of each.
        effect: How far the difference is from the border.
    """
    for seeds in range(2, MOST_SEEDS + 1):
        if stdtrit(2 * seeds - 2, LEVEL) * error / math.sqrt(seeds) < effect:
            return seeds
    return None
