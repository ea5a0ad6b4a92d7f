"""Log-average miss rate of pedestrian detectors on the subsets of CityPersons, by its official protocol.

Source: Zhang, Benenson, Schiele, "CityPersons: A Diverse Dataset for Pedestrian Detection", 2017, and its evaluation
script (`eval_MR_multisetup.py`), whose subsets, matching and curve these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kt.functional import log_average_miss_rate

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Subset:
    """Pedestrians that count: ranges of the height in pixels and of the visible share, both ends included."""

    height: tuple[float, float]
    visibility: tuple[float, float]


SUBSETS: dict[str, Subset] = {
    "mr_reasonable": Subset((50, np.inf), (0.65, np.inf)),
    "mr_reasonable_small": Subset((50, 75), (0.65, np.inf)),
    "mr_reasonable_occ_heavy": Subset((50, np.inf), (0.2, 0.65)),
    "mr_all": Subset((20, np.inf), (0.2, np.inf)),
}
IOU_THRESHOLD = 0.5
# Detections this factor outside a subset's heights still take part.
HEIGHT_MARGIN = 1.25
MAX_DETECTIONS = 1000


@dataclass
class Pedestrians:
    """Ground truth and detections of one image.

    Attributes:
        boxes: Ground truth x1, y1, x2, y2 in pixels of the image, hidden parts included, (n, 4).
        visibility: Visible share of each box in 0..1, (n,).
        ignore: Whether a box is a region where nothing counts (groups, riders, posters), bool (n,).
        detections: x1, y1, x2, y2, (m, 4).
        scores: (m,).
    """

    boxes: Array
    visibility: Array
    ignore: NDArray[np.bool_]
    detections: Array
    scores: Array


def miss_rates(images: Sequence[Pedestrians], height_unit: float = 1.0) -> dict[str, float]:
    """Log-average miss rate of every subset in percent; lower is better.

    A detection matches a pedestrian of the subset at an intersection over union of 0.5, each pedestrian once, better
    scores first. All other ground truth of the image is ignored: a detection half of whose area lies in it, and that
    matches no pedestrian of the subset, is neither right nor wrong. Detections whose height is outside the subset's
    range by more than a factor of 1.25 are left out.

    Args:
        images: The whole set, images without pedestrians included.
        height_unit: Heights are divided by it before they are compared with a subset's: 1 for images as large as those
            of Cityscapes (1024 pixels high), the image height over 1024 for smaller ones, so that a pedestrian belongs
            to the same subset at every scale.

    Returns:
        `mr_reasonable`, `mr_reasonable_small`, `mr_reasonable_occ_heavy`, `mr_all`; 100 where a subset is empty.
    """
    return {name: 100.0 * _miss_rate(images, subset, height_unit) for name, subset in SUBSETS.items()}


def _miss_rate(images: Sequence[Pedestrians], subset: Subset, height_unit: float) -> float:
    scores, hits, total = [], [], 0
    for image in images:
        image_scores, image_hits, count = _match(image, subset, height_unit)
        scores.append(image_scores)
        hits.append(image_hits)
        total += count
    if total == 0:
        return 1.0
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right = np.concatenate(hits)[order]
    missed = 1.0 - np.cumsum(right) / total
    return log_average_miss_rate(missed, np.cumsum(~right) / len(images))


def _match(image: Pedestrians, subset: Subset, height_unit: float) -> tuple[Array, NDArray[np.bool_], int]:
    """Scores of the detections that count, whether each is right, and how many pedestrians the subset has."""
    heights = (image.boxes[:, 3] - image.boxes[:, 1]) / height_unit
    counts = ~image.ignore & (heights >= subset.height[0]) & (heights <= subset.height[1])
    counts &= (image.visibility >= subset.visibility[0]) & (image.visibility <= subset.visibility[1])
    chosen = np.argsort(-image.scores, kind="stable")[:MAX_DETECTIONS]
    tall = (image.detections[chosen, 3] - image.detections[chosen, 1]) / height_unit
    inside = (tall >= subset.height[0] / HEIGHT_MARGIN) & (tall < subset.height[1] * HEIGHT_MARGIN)
    chosen = chosen[inside]
    detections = image.detections[chosen]
    overlaps = _overlaps(detections, image.boxes[counts], over_detection=False)
    ignored = _overlaps(detections, image.boxes[~counts], over_detection=True)

    taken = np.zeros(int(counts.sum()), bool)
    right = np.zeros(len(chosen), bool)
    kept = np.ones(len(chosen), bool)
    for number in range(len(chosen)):
        free = np.where(taken, -1.0, overlaps[number])
        if free.size and free.max() >= IOU_THRESHOLD:
            # Of equals the last, as in the official script.
            taken[len(free) - 1 - int(free[::-1].argmax())] = True
            right[number] = True
        elif ignored.shape[1] and ignored[number].max() >= IOU_THRESHOLD:
            kept[number] = False
    return image.scores[chosen][kept], right[kept], int(counts.sum())


def _overlaps(detections: Array, boxes: Array, over_detection: bool) -> Array:
    """Intersection of every detection with every box over their union (or over the detection's area), (m, n)."""
    top_left = np.maximum(detections[:, None, :2], boxes[None, :, :2])
    bottom_right = np.minimum(detections[:, None, 2:], boxes[None, :, 2:])
    common = np.clip(bottom_right - top_left, 0, None).prod(2)
    area = (detections[:, 2:] - detections[:, :2]).prod(1)[:, None]
    if not over_detection:
        area = area + (boxes[:, 2:] - boxes[:, :2]).prod(1)[None] - common
    return common / np.maximum(area, 1e-12)
