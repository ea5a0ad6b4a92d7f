"""What a score leaves beside its numbers: of each test image, so that students are compared on the same ones, of each
class, and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kt.evaluation.pictures import Sheet, write_sheet
from kt.files import replacing
from kt.ranks import gathered

Arrays = dict[str, NDArray[Any]]


@dataclass
class Outcomes:
    """What a score leaves beside its numbers; a score fills one that it is given.

    Attributes:
        images: `indices`, int64 (n,), rising, and beside it arrays of n rows: `top1` and `top5`, bool (n,), and
            `label` and `found`, int32 (n,), the true class and the one found; or
            `intersect`, `union` and `truth`, int32 (n, classes), in pixels; or in metres `rmse`, and of the true depth
            `depth_mean` and `depth_std`, float32 (n,), NaN for an image of which no depth is known.
        classes: `top1`, `iou` or `ap` -> class -> percent, None for a class that the test set lacks.
        sheet: Pictures of the first test images.
    """

    images: Arrays = field(default_factory=dict)
    classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    sheet: Sheet | None = None

    def beside(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The content of an evaluation's file."""
        return {**metrics, **({"classes": self.classes} if self.classes else {})}


def joined(own: Mapping[str, NDArray[Any]]) -> Arrays:
    """The outcomes of all processes' images, in the order of their indices; every process makes the same call."""
    parts = gathered(dict(own))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in own}
    order = np.argsort(whole["indices"], kind="stable")
    return {name: values[order] for name, values in whole.items()}


def keep_outcomes(path: Path, images: Mapping[str, NDArray[Any]], sheet: Sheet | None = None) -> None:
    """A file with what became of each image, and beside it one with the pictures, if there are any."""
    if images:
        with replacing(path) as file:
            np.savez_compressed(file, **images)  # type: ignore[arg-type]
    if sheet is not None:
        write_sheet(path.with_suffix(".png"), sheet)
