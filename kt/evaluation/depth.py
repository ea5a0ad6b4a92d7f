"""Errors of depth maps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR = 1.25  # a depth is right within this factor, its square, or its cube


def depth_errors(found: NDArray[np.floating], truth: NDArray[np.floating]) -> dict[str, float] | None:
    """Errors of one image's depth over the pixels whose truth is known; None if there are none.

    `rmse` and `mae` in metres, `rel` as a share of the truth, and `delta1` to `delta3`: the percentage of pixels within
    a factor of 1.25, of its square and of its cube.

    Args:
        found: (h, w), in metres; a depth that is not positive is off by every factor.
        truth: (h, w), in metres; 0 where nobody knows it.

    Source: Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network", 2014, section 4.
    """
    known = truth > 0
    if not known.any():
        return None
    ours, true = found[known].astype(float), truth[known].astype(float)
    error = np.abs(ours - true)
    positive = ours > 0
    factor = np.full(len(true), np.inf)
    factor[positive] = np.maximum(ours[positive] / true[positive], true[positive] / ours[positive])
    return {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(error.mean()),
        "rel": float(np.mean(error / true)),
        **{f"delta{power}": 100.0 * float(np.mean(factor < NEAR**power)) for power in (1, 2, 3)},
    }


def depth_spread(truth: NDArray[np.floating]) -> tuple[float, float]:
    """Mean and standard deviation in metres of an image's known depth, not a number if there is none.

    Of one depth d for the whole image they give the RMSE: the root of std^2 + (mean - d)^2.

    Args:
        truth: (h, w), in metres; 0 where nobody knows it.
    """
    known = truth[truth > 0].astype(float)
    return (float(known.mean()), float(known.std())) if known.size else (np.nan, np.nan)
