"""What became of each test image: kept beside a score, so that students are compared on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kt.files import replacing
from kt.ranks import gathered

# `indices`, int64 (n,), rising, and beside it arrays of n rows: `top1` and `top5`, bool (n,); or `intersect`, `union`
# and `truth`, int32 (n, classes), in pixels; or in metres `rmse`, and of the true depth `depth_mean` and `depth_std`,
# float32 (n,), NaN for an image of which no depth is known.
Outcomes = dict[str, NDArray[Any]]


def joined(own: Mapping[str, NDArray[Any]]) -> Outcomes:
    """The outcomes of all processes' images, in the order of their indices; every process makes the same call."""
    parts = gathered(dict(own))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in own}
    order = np.argsort(whole["indices"], kind="stable")
    return {name: values[order] for name, values in whole.items()}


def keep_outcomes(path: Path, outcomes: Mapping[str, NDArray[Any]]) -> None:
    """A file with the outcomes, if there are any."""
    if outcomes:
        with replacing(path) as file:
            np.savez_compressed(file, **outcomes)  # type: ignore[arg-type]
