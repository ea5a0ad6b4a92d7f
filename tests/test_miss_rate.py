"""Log-average miss rate on CityPersons' subsets: by hand, against another implementation, and with broken protocols."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kt.evaluation import miss_rate
from kt.evaluation.miss_rate import Pedestrians, miss_rates


def image(truth: list[tuple], found: list[tuple]) -> Pedestrians:
    """Truth as (x, y, w, h, visibility, ignore), detections as (x, y, w, h, score)."""
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h, *_ in truth], float).reshape(-1, 4)
    detections = np.array([(x, y, x + w, y + h) for x, y, w, h, _ in found], float).reshape(-1, 4)
    visibility, ignore = (np.array([row[i] for row in truth], kind) for i, kind in ((4, float), (5, bool)))
    return Pedestrians(boxes, visibility, ignore, detections, np.array([row[4] for row in found], float))


def reference(images: list[Pedestrians], heights: tuple, shares: tuple, unit: float = 1.0) -> float:
    """The same protocol threshold by threshold: every score cuts off, matching starts anew, counts give one point."""
    cuts = sorted({float(score) for one in images for score in one.scores}, reverse=True)
    points = []
    for cut in cuts:
        hits = alarms = total = 0
        for one in images:
            truth = []
            for box, share, ignore in zip(one.boxes.tolist(), one.visibility, one.ignore, strict=True):
                height = (box[3] - box[1]) / unit
                wanted = heights[0] <= height <= heights[1] and shares[0] <= share <= shares[1] and not ignore
                truth.append((box, wanted))
            total += sum(wanted for _, wanted in truth)
            used: set[int] = set()
            for score, box in sorted(
                zip(one.scores.tolist(), one.detections.tolist(), strict=True), key=lambda x: -x[0]
            ):
                height = (box[3] - box[1]) / unit
                if score < cut or height < heights[0] / 1.25 or height >= heights[1] * 1.25:
                    continue
                best, partner, excused = 0.5, None, False
                for number, (other, wanted) in enumerate(truth):
                    common = max(0.0, min(box[2], other[2]) - max(box[0], other[0])) * max(
                        0.0, min(box[3], other[3]) - max(box[1], other[1])
                    )
                    own = (box[2] - box[0]) * (box[3] - box[1])
                    if not wanted:
                        excused |= common / own >= 0.5
                    elif number not in used:
                        overlap = common / (own + (other[2] - other[0]) * (other[3] - other[1]) - common)
                        if overlap >= best:
                            best, partner = overlap, number
                if partner is not None:
                    used.add(partner)
                    hits += 1
                elif not excused:
                    alarms += 1
        points.append((alarms / len(images), 1 - hits / total if total else 1.0))
    logs = []
    for exponent in np.linspace(-2, 0, 9):
        # The curve falls: the last point within the allowance of false alarms is the best.
        within = [missed for alarms, missed in points if alarms <= 10**exponent]
        logs.append(math.log(max(within[-1] if within else 1.0, 1e-10)))
    return 100 * math.exp(sum(logs) / len(logs))


def crowd(seed: int, count: int = 25) -> list[Pedestrians]:
    """Images with pedestrians of all sizes, ignored regions, and detections near, doubled and far off."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        truth, found = [], []
        for _ in range(rng.integers(0, 6)):
            height = float(rng.choice([15.0, 20.0, 35.0, 50.0, 60.0, 75.0, 76.0, 120.0, 200.0]))
            row = (rng.uniform(0, 300), rng.uniform(0, 100), 0.41 * height, height)
            share = float(rng.choice([0.05, 0.2, 0.4, 0.65, 0.9, 1.0]))
            truth.append((*row, share, rng.random() < 0.2))
            for _ in range(rng.integers(0, 3)):
                noise = rng.normal(0, 0.08, 4) * height * np.array([0.4, 1, 0.4, 1])
                found.append((*(np.array(row) + noise), rng.random()))
        for _ in range(rng.integers(0, 3)):
            height = rng.uniform(12, 150)
            found.append((rng.uniform(0, 300), rng.uniform(0, 100), 0.41 * height, height, rng.random()))
        images.append(image(truth, found))
    return images


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("unit", [1.0, 0.25])
def test_agrees_with_another_implementation(seed: int, unit: float) -> None:
    images = crowd(seed)
    for one in images:
        one.boxes, one.detections = one.boxes * unit, one.detections * unit
    found = miss_rates(images, unit)
    ranges = {
        "mr_reasonable": ((50, math.inf), (0.65, math.inf)),
        "mr_reasonable_small": ((50, 75), (0.65, math.inf)),
        "mr_reasonable_occ_heavy": ((50, math.inf), (0.2, 0.65)),
        "mr_all": ((20, math.inf), (0.2, math.inf)),
    }
    assert list(found) == list(ranges)
    for name, (heights, shares) in ranges.items():
        assert found[name] == pytest.approx(reference(images, heights, shares, unit), rel=1e-9), name
    assert len(set(found.values())) == 4 and all(1 < value < 99 for value in found.values())


PERSON = (10.0, 10.0, 41.0, 100.0, 1.0, False)


def test_by_hand() -> None:
    perfect = image([PERSON], [(10, 10, 41, 100, 0.9)])
    assert miss_rates([perfect])["mr_reasonable"] == pytest.approx(0, abs=1e-6)
    assert miss_rates([image([PERSON], [])])["mr_all"] == 100
    # Nobody in the subset: nothing was found.
    assert miss_rates([perfect])["mr_reasonable_small"] == 100
    # One of two found, no false alarm: half is missed everywhere on the curve.
    assert miss_rates([perfect, image([PERSON], [])])["mr_reasonable"] == pytest.approx(50)
    # A better-scored false alarm on one of ten images: all is missed below 0.1 false positives an image.
    images = [perfect, *[image([], [])] * 8, image([], [(200, 10, 41, 100, 0.95)])]
    below = sum(point < 0.1 for point in np.logspace(-2, 0, 9))
    expected = 100 * math.exp((9 - below) * math.log(1e-10) / 9)
    assert below == 4 and miss_rates(images)["mr_reasonable"] == pytest.approx(expected)


def one_false_alarm_costs(truth: list[tuple], found: list[tuple]) -> bool:
    """Whether these detections spoil a set in which one pedestrian is found with a lower score."""
    images = [image([PERSON], [(10, 10, 41, 100, 0.1)]), image(truth, found)]
    return miss_rates(images)["mr_reasonable"] > 1e-3


def test_ignored_ground_truth_excuses_any_number_of_detections() -> None:
    group = (100.0, 10.0, 100.0, 100.0, 1.0, True)
    inside = [(100.0 + 10 * i, 10.0, 41.0, 100.0, 0.9 - i / 100) for i in range(5)]
    assert one_false_alarm_costs([], inside[:1])
    assert not one_false_alarm_costs([group], inside)
    # By the share of the detection, not by intersection over union, which is 0.41 here.
    assert not one_false_alarm_costs([group], [(159.0, 10.0, 41.0, 100.0, 0.9)])
    assert one_false_alarm_costs([group], [(185.0, 10.0, 41.0, 100.0, 0.9)])
    occluded = (100.0, 10.0, 41.0, 100.0, 0.3, False)
    assert not one_false_alarm_costs([occluded], [(100.0, 10.0, 41.0, 100.0, 0.9)] * 2)


def test_a_pedestrian_is_found_once_and_preferred_to_ignored_regions() -> None:
    found = (100.0, 10.0, 41.0, 100.0, 0.9)
    person, region = (100.0, 10.0, 41.0, 100.0, 1.0, False), (90.0, 0.0, 60.0, 120.0, 1.0, True)
    assert one_false_alarm_costs([person], [found, found])
    assert miss_rates([image([region, person], [found])])["mr_reasonable"] < 1e-3
    # The second detection of the same person lies in the region.
    assert not one_false_alarm_costs([region, person], [found, found])


def test_heights_far_from_the_subset_do_not_count() -> None:
    for height, costs in ((39.9, False), (40.1, True), (1000.0, True)):
        assert one_false_alarm_costs([], [(200.0, 10.0, 0.4 * height, height, 0.9)]) == costs
    small = [image([(10, 10, 25, 60, 1.0, False)], [(10, 10, 25, 60, 0.1)])]
    for height, costs in ((39.9, False), (40.1, True), (93.7, True), (93.8, False)):
        images = [*small, image([], [(200.0, 10.0, 0.4 * height, height, 0.9)])]
        assert (miss_rates(images)["mr_reasonable_small"] > 1e-3) == costs


def test_the_comparison_catches_a_metric_that_counts_ignored_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = crowd(1)
    right = miss_rates(images)
    overlaps = miss_rate._overlaps

    def blind(detections: np.ndarray, boxes: np.ndarray, over_detection: bool) -> np.ndarray:
        found = overlaps(detections, boxes, over_detection)
        return found * 0 if over_detection else found

    monkeypatch.setattr(miss_rate, "_overlaps", blind)
    wrong = miss_rates(images)
    assert all(wrong[name] > right[name] + 1 for name in right)
