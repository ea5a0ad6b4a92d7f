"""Dense data: epochs as pure functions, ground truth, official layouts, scores, and one-line errors."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scipy.io
import torch

from kt.data.scenes import CLASSES, KEYPOINTS, STUFF, STYLES, draw_scene
from kt.errors import UserError

REASON = "dense tasks need mmdet and mmseg (the extra `mm`)"
pytest.importorskip("mmdet", reason=REASON)
pytest.importorskip("mmseg", reason=REASON)

from layouts import citypersons, cityscapes, coco, gta5, picture, real, segfolder
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData

from kt.data import build_data, dense_scenes
from kt.data.citypersons import read_annotations
from kt.data.cityscapes import STUFF_AND_THINGS, train_ids
from kt.data.dense import DenseLoader
from kt.data.dense_scenes import DETECTED, heatmaps, mirrored_keypoints, scene_seed
from kt.data.gta5 import split_names
from kt.evaluation import pictures
from kt.evaluation.outcomes import Outcomes
from tables.noise import mean_iou

SCENES: dict[str, Any] = {
    "name": "scenes",
    "task": "segmentation",
    "image_size": [48, 96],
    "crop_size": None,
    "augmentation": "flip",
    "subset": None,
    "validation": 0.0,
    "style": "photo",
    "train_size": 12,
    "test_size": 5,
    "folder": None,
    "train_split": None,
    "test_split": None,
    "num_classes": None,
}
BOXES = ("bboxes", "labels", "scores")
TASKS = ("segmentation", "detection", "pedestrians", "keypoints")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(root: Path | str = ".", batch_size: int = 4, **changes: Any) -> Any:
    common = {key: changes.pop(key) for key in ("rank", "world", "workers", "cache_root") if key in changes}
    return build_data({**SCENES, **changes}, root, batch_size=batch_size, seed=3, **{"workers": 0, **common})


def truth_of(sample: Any) -> list[torch.Tensor]:
    """All ground truth of a data sample."""
    if "gt_sem_seg" in sample:
        return [sample.gt_sem_seg.data]
    if "gt_heatmaps" in sample:
        return [sample.gt_heatmaps, sample.gt_keypoints]
    return [sample.gt_instances.bboxes.tensor, sample.gt_instances.labels, sample.ignored_instances.bboxes.tensor]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two batches are equal in images, ground truth and indices."""
    pairs = list(zip(a["inputs"], b["inputs"], strict=True))
    for one, other in zip(a["data_samples"], b["data_samples"], strict=True):
        pairs += zip(truth_of(one), truth_of(other), strict=True)
    return torch.equal(a["indices"], b["indices"]) and all(torch.equal(x, y) for x, y in pairs)


# Loaders


def test_importing_the_package_imports_no_mm_library() -> None:
    code = "import sys, kt.data, kt.evaluation.miss_rate; print({'mmcv', 'mmdet', 'mmseg'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("task", TASKS)
def test_an_epoch_is_a_pure_function_and_resumes_anywhere(task: str, cache: Path) -> None:
    options = {"task": task, "cache_root": cache, "crop_size": [32, 48] if task == "segmentation" else None}
    first, second = build(**options), build(**options)
    list(first.train.epoch(0))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    whole = list(first.train.epoch(2))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len(whole) == len(first.train) == 3
    for start in range(4):
        tail = list(second.train.epoch(2, first=start))
        assert len(tail) == 3 - start
        assert all(same(a, b) for a, b in zip(tail, whole[start:], strict=True))
    assert not same(whole[0], next(iter(second.train.epoch(1))))
    batch = whole[0]
    size = (3, 32, 48) if task == "segmentation" else (3, 48, 96)
    assert all(image.shape == size and image.dtype == torch.uint8 for image in batch["inputs"])
    assert len(batch["inputs"]) == len(batch["data_samples"]) == len(batch["indices"]) == 4
    assert batch["indices"].dtype == torch.int64


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_epoch(world: int, cache: Path) -> None:
    parts = [build(batch_size=2 * world, rank=rank, world=world, cache_root=cache) for rank in range(world)]
    for loader, exact in (("train", False), ("test", True)):
        found = [[i for batch in getattr(part, loader).epoch(1) for i in batch["indices"].tolist()] for part in parts]
        flat = sum(found, [])
        assert len(set(flat)) == len(flat)
        assert sorted(flat) == list(range(5 if exact else 12))


def test_flips_change_from_epoch_to_epoch_and_take_the_truth_along(cache: Path) -> None:
    data = build(style="synthetic", cache_root=cache)
    seen = set()
    for epoch in range(3):
        for batch in data.train.epoch(epoch):
            for image, sample, index in zip(
                batch["inputs"], batch["data_samples"], batch["indices"].tolist(), strict=True
            ):
                scene = draw_scene(scene_seed("segmentation", "synthetic", "train"), index, 48, 96, "synthetic")
                pixels, semantic = scene.image[..., ::-1], scene.semantic
                if sample.flip:
                    pixels, semantic = pixels[:, ::-1], semantic[:, ::-1]
                seen.add((index, sample.flip))
                np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
                np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), semantic)
    assert 15 < len(seen) < 24
    plain = build(augmentation="none", cache_root=cache)
    assert not any(sample.get("flip") for batch in plain.train.epoch(0) for sample in batch["data_samples"])


def test_scaled_images_have_scaled_truth(cache: Path) -> None:
    data = build(style="synthetic", augmentation="scale_flip", cache_root=cache)
    heights = set()
    for batch in data.train.epoch(0):
        for image, sample, index in zip(batch["inputs"], batch["data_samples"], batch["indices"].tolist(), strict=True):
            height, width = image.shape[1:]
            heights.add(height)
            assert 0.7 * 48 - 1 <= height <= 2.1 * 48 + 1 and abs(width - 2 * height) <= 2
            scene = draw_scene(scene_seed("segmentation", "synthetic", "train"), index, 48, 96, "synthetic")
            truth = cv2.resize(scene.semantic, (width, height), interpolation=cv2.INTER_NEAREST)
            np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), truth[:, ::-1] if sample.flip else truth)
    assert len(heights) > 6 and max(heights) > 60 and min(heights) < 48


def test_subset_and_validation(cache: Path) -> None:
    data = build(subset=9, validation=0.34, cache_root=cache)
    trained = [i for batch in data.train.epoch(0) for i in batch["indices"].tolist()]
    held = [i for batch in data.test.epoch(0) for i in batch["indices"].tolist()]
    assert (data.spec.train_size, data.spec.test_size) == (6, 3) and not set(trained) & set(held)
    order = np.random.default_rng(0).permutation(12)
    assert held == sorted(order[6:9].tolist()) and set(trained) <= set(order[:6].tolist())


def test_drawn_scenes_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = build(cache_root=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    monkeypatch.setattr(dense_scenes, "draw", None)
    kept = build(cache_root=tmp_path)
    assert kept.spec == fresh.spec and all(
        same(a, b) for a, b in zip(kept.test.epoch(0), fresh.test.epoch(0), strict=True)
    )


# Embedded ground truth


def test_scene_seeds_are_disjoint() -> None:
    seeds = {scene_seed(task, style, split) for task in TASKS[1:] for style in STYLES for split in ("train", "test")}
    assert len(seeds) == 6 * len(STYLES) and scene_seed("segmentation", "photo", "test") in seeds


def test_a_crowd_changes_nothing_unless_asked_for() -> None:
    plain, none = draw_scene(0, 3, 48, 96), draw_scene(0, 3, 48, 96, crowd=0)
    np.testing.assert_array_equal(plain.image, none.image)
    people = [
        sum(one.name == "person" for i in range(30) for one in draw_scene(0, i, 48, 96, crowd=c).instances)
        for c in (0, 12)
    ]
    assert people[1] > 3 * people[0]


@pytest.mark.parametrize("style", STYLES)
def test_segmentation_is_the_scene(style: str, cache: Path) -> None:
    data = build(style=style, cache_root=cache)
    assert data.spec.class_names == (*STUFF, *CLASSES) and (data.spec.task, data.spec.num_classes) == (
        "segmentation",
        13,
    )
    (batch,) = build(style=style, cache_root=cache, batch_size=5).test.epoch(0)
    for index, (image, sample) in enumerate(zip(batch["inputs"], batch["data_samples"], strict=True)):
        scene = draw_scene(scene_seed("segmentation", style, "test"), index, 48, 96, style)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy()[..., ::-1], scene.image)
        np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), scene.semantic)


def test_detection_boxes_are_those_of_the_instances(cache: Path) -> None:
    data = build(task="detection", cache_root=cache, batch_size=5)
    assert data.spec.class_names == DETECTED and len(DETECTED) == 8 and not {"tree", "building"} & set(DETECTED)
    (batch,) = data.test.epoch(0)
    total = 0
    for index, sample in enumerate(batch["data_samples"]):
        wanted = [
            (*one.box, DETECTED.index(one.name))
            for one in draw_scene(scene_seed("detection", "photo", "test"), index, 48, 96).instances
            if one.name in DETECTED and one.visibility >= 0.1 and one.box[3] - one.box[1] >= 4
        ]
        truth = sample.gt_instances
        found = torch.cat([truth.bboxes.tensor, truth.labels[:, None].float()], 1)
        assert found.tolist() == [list(map(float, row)) for row in wanted] and len(sample.ignored_instances) == 0
        total += len(wanted)
    assert total > 5


def test_pedestrians_and_what_is_ignored(cache: Path) -> None:
    data = build(task="pedestrians", cache_root=cache, batch_size=1, augmentation="none")
    unit = 48 / 1024
    positives = ignored = 0
    for split, loader in (("test", data.test), ("train", data.train)):
        for batch in loader.epoch(0):
            (sample,), (index,) = batch["data_samples"], batch["indices"].tolist()
            scene = draw_scene(scene_seed("pedestrians", "photo", split), index, 48, 96, crowd=dense_scenes.CROWD)
            people = [one for one in scene.instances if one.name == "person"]
            riders = [one for one in scene.instances if one.name == "cyclist"]
            if split == "test":
                told = {tuple(one["bbox"]): one for one in sample.instances}
                assert len(sample.instances) == len(people) + len(riders)
                assert all(told[one.box]["visibility"] == pytest.approx(one.visibility) for one in people)
                assert [one["ignore_flag"] for one in sample.instances].count(1) == len(riders)
            else:
                wanted = [
                    one.box
                    for one in people
                    if (one.box[3] - one.box[1]) / unit >= 50 and np.float32(one.visibility) >= 0.65
                ]
                assert sample.gt_instances.bboxes.tensor.tolist() == [list(map(float, box)) for box in wanted]
                assert len(sample.ignored_instances) == len(people) + len(riders) - len(wanted)
                positives, ignored = positives + len(wanted), ignored + len(sample.ignored_instances)
    assert positives > 5 and ignored > 5


def test_keypoints_heatmaps_and_mirrored_sides(cache: Path) -> None:
    assert [KEYPOINTS[i] for i in mirrored_keypoints()][:3] == ["head", "right shoulder", "left shoulder"]
    data = build(task="keypoints", cache_root=cache)
    assert data.spec.class_names == KEYPOINTS
    flips, peaks = set(), 0
    for batch in data.train.epoch(0):
        for sample, index in zip(batch["data_samples"], batch["indices"].tolist(), strict=True):
            scene = draw_scene(scene_seed("keypoints", "photo", "train"), index, 48, 96, crowd=dense_scenes.CROWD)
            people = [one for one in scene.instances if one.name == "person" and one.visibility >= 0.2]
            assert sample.gt_heatmaps.shape == (7, 12, 24) and len(sample.gt_keypoints) == len(sample.gt_boxes) == len(
                people
            )
            flips.add(bool(sample.flip))
            for one, points, box in zip(people, sample.gt_keypoints.numpy(), sample.gt_boxes.tolist(), strict=True):
                assert one.keypoints is not None
                x1, y1, x2, y2 = one.box
                expected = one.keypoints.copy()
                if sample.flip:
                    expected[:, 0] = 96 - expected[:, 0]
                    expected = expected[mirrored_keypoints()]
                    x1, x2 = 96 - x2, 96 - x1
                present = expected[:, 2] > 0
                np.testing.assert_allclose(points[present], expected[present], atol=1e-4)
                assert points[:, 2].tolist() == expected[:, 2].tolist() and box == [x1, y1, x2, y2]
                for kind in np.nonzero(present)[0]:
                    column, row = (points[kind, :2] // 4).astype(int)
                    centre = np.array([column, row]) * 4 + 2.0
                    value = np.exp(-((points[kind, :2] - centre) ** 2).sum() / 32)
                    assert sample.gt_heatmaps[kind, row, column] >= value - 1e-5
                    peaks += 1
    assert flips == {True, False} and peaks > 50
    assert heatmaps(np.zeros((2, 7, 3), np.float32), 10, 9).shape == (7, 3, 3)


# Scores


class Oracle(torch.nn.Module):
    """Predicts the truth of the first `known` batches, and nothing at all afterwards."""

    def __init__(self, known: int = 1000):
        super().__init__()
        self.known, self.part = known, torch.nn.BatchNorm1d(2)
        self.part.eval()

    def predict(self, batch: dict[str, Any]) -> list[Any]:
        assert not self.training and not torch.is_grad_enabled()
        samples = copy.deepcopy(batch["data_samples"])
        known = self.known > 0
        self.known -= 1
        for sample in samples:
            if "gt_sem_seg" in sample:
                truth = sample.gt_sem_seg.data
                sample.pred_sem_seg = PixelData(data=torch.where(truth == 255, 0, truth) * known)
            elif "gt_heatmaps" in sample:
                sample.pred_heatmaps = sample.gt_heatmaps * known
            else:
                counted = [one for one in sample.instances if known and not one["ignore_flag"]]
                boxes = torch.tensor([one["bbox"] for one in counted]).reshape(-1, 4)
                labels = torch.tensor([one["bbox_label"] for one in counted], dtype=torch.long)
                sample.pred_instances = InstanceData(bboxes=boxes, labels=labels, scores=torch.ones(len(counted)))
        return samples


def perfect(metrics: dict[str, float]) -> bool:
    """Whether every average precision that there is is 100."""
    return {"ap", "ap50", "ap75"} <= set(metrics) and set(metrics.values()) == {100.0}


def test_scores_of_the_truth_and_of_nothing(cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(cache)
    before = sorted(cache.iterdir())
    best = {
        "segmentation": {"miou": 100.0},
        # The scenes hold no object that COCO calls large.
        "detection": dict.fromkeys(("ap", "ap50", "ap75", "ap_s", "ap_m"), 100.0),
        "pedestrians": dict.fromkeys(
            ("mr_reasonable", "mr_reasonable_small", "mr_reasonable_occ_heavy", "mr_all"), 0.0
        ),
    }
    for task, expected in best.items():
        # Enough for a heavily occluded pedestrian to occur.
        data = build(task=task, test_size=60, cache_root=cache)
        student = Oracle()
        assert data.score(student) == pytest.approx(expected, abs=1e-6), task
        assert student.training and not student.part.training
        nothing = data.score(Oracle(0))
        if task == "pedestrians":
            assert set(nothing.values()) == {100.0}
        else:
            assert max(nothing.values()) < 10
    pose = build(task="keypoints", test_size=20, image_size=[96, 192], cache_root=cache)
    assert pose.score(Oracle())["pck"] > 90 and pose.score(Oracle(0))["pck"] < 40
    assert capfd.readouterr().out == ""
    assert [
        path for path in sorted(cache.iterdir()) if path not in before and path.suffix not in (".npz", ".lock")
    ] == []


def _score_in_group(rank: int, root: Path, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=2)
    kept = {task: Outcomes() for task in TASKS}
    found = {
        task: build(task=task, rank=rank, world=2, batch_size=2, cache_root=root).score(Oracle(1), kept[task])
        for task in TASKS
    }
    queue.put((found, kept))
    torch.distributed.destroy_process_group()


def test_two_processes_score_the_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # One batch of one image known on each of two ranks is one batch of two images known on one.
    left = {task: Outcomes() for task in TASKS}
    alone = {task: build(task=task, batch_size=2, cache_root=tmp_path).score(Oracle(1), left[task]) for task in TASKS}
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_score_in_group, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found, outcomes = zip(*(queue.get(timeout=60) for _ in processes), strict=True)
    for process in processes:
        process.join(30)
    for task in TASKS:
        assert found[0][task] == found[1][task] == pytest.approx(alone[task]), task
    test = build(task="segmentation", cache_root=tmp_path).test
    labels = [one.gt_sem_seg.data.flatten() for batch in test.epoch(0) for one in batch["data_samples"]]
    truth = [each.bincount(minlength=13).tolist() for each in labels]
    for every in outcomes:
        for task in TASKS:
            assert every[task].classes == left[task].classes
            sheets = [every[task].sheet, left[task].sheet]
            if task == "keypoints":
                assert sheets == [None, None]
                continue
            assert [picture.index for picture in sheets[0].pictures] == [0, 1, 2]
            assert [shown(each) for each in sheets[0].pictures] == [shown(each) for each in sheets[1].pictures]
        kept = every["segmentation"].images
        assert np.array_equal(kept["indices"], np.arange(len(kept["indices"]))) and kept["union"].dtype == np.int32
        areas = np.stack([kept["intersect"], kept["union"]]).sum(axis=1)
        assert np.array_equal(kept["truth"], truth)
        # The library rounds to two decimals.
        assert mean_iou(areas) == pytest.approx(alone["segmentation"]["miou"], abs=0.005)
    assert 0 < alone["segmentation"]["miou"] < 100 and 0 < alone["detection"]["ap"] < 100
    assert not (tmp_path / ".dist_test").exists()


class Inexact(Oracle):
    """Is somewhat wrong everywhere, and remembers what it has said: (truth, answer) of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[Any, Any]] = []

    def predict(self, batch: dict[str, Any]) -> list[Any]:
        samples = super().predict(batch)
        for sample in samples:
            if "pred_sem_seg" in sample:
                sample.pred_sem_seg.data = sample.pred_sem_seg.data.roll((1, 3), (1, 2))
                self.said.append((sample.gt_sem_seg.data.numpy(), sample.pred_sem_seg.data.numpy()))
                continue
            found = sample.pred_instances
            rng = np.random.default_rng(len(self.said))
            found.bboxes += torch.from_numpy(rng.uniform(-1.5, 1.5, found.bboxes.shape)).float()
            found.scores = torch.from_numpy(rng.uniform(size=len(found.scores))).float()
            found.labels[::4] = (found.labels[::4] + 1) % len(DETECTED)
            self.said.append((sample.instances, found))
        return samples


def first_scene() -> np.ndarray:
    return draw_scene(scene_seed("segmentation", "photo", "test"), 0, 48, 96, "photo").image


def shown(picture: pictures.Picture) -> list[bytes]:
    return [part.tobytes() for part in (picture.image, picture.truth, picture.found)]


def test_each_class_has_its_own_iou(cache: Path) -> None:
    student, outcomes = Inexact(), Outcomes()
    found = build(cache_root=cache).score(student, outcomes)
    truth, answer = (np.concatenate(maps) for maps in zip(*student.said, strict=True))
    expected = {}
    for number, name in enumerate((*STUFF, *CLASSES)):
        right, said = (truth == number), (answer == number) & (truth != 255)
        union = (right | said).sum()
        expected[name] = 100 * (right & said).sum() / union if union else None
    assert outcomes.classes == {"iou": pytest.approx(expected)}
    known = [value for value in expected.values() if value is not None]
    assert found["miou"] == pytest.approx(np.mean(known), abs=0.005) and len(known) < len(expected)
    drawn = pictures.of_labels(0, first_scene(), truth[0], answer[0], list(expected))
    assert outcomes.sheet is not None and shown(outcomes.sheet.pictures[0]) == shown(drawn)
    assert list(outcomes.sheet.names) == list(expected)


def test_each_class_has_its_own_ap(cache: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    student, outcomes = Inexact(), Outcomes()
    metrics = build(task="detection", test_size=20, cache_root=cache).score(student, outcomes)
    objects, answers = [], []
    for number, (truth, found) in enumerate(student.said):
        for one in truth:
            x1, y1, x2, y2 = one["bbox"]
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            objects.append({**box, "id": len(objects) + 1, "image_id": number, "category_id": one["bbox_label"]})
        for (x1, y1, x2, y2), label, score in zip(*(found[key].tolist() for key in BOXES), strict=True):
            answers.append(
                {"image_id": number, "category_id": label, "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )
    whole = COCO()
    whole.dataset = {
        "images": [{"id": number} for number in range(20)],
        "categories": [{"id": number} for number in range(len(DETECTED))],
        "annotations": objects,
    }
    expected = {}
    with contextlib.redirect_stdout(io.StringIO()):
        whole.createIndex()
        for number, name in enumerate(DETECTED):
            judge = COCOeval(whole, whole.loadRes(answers), "bbox")
            judge.params.catIds = [number]
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            expected[name] = 100 * judge.stats[0] if judge.stats[0] >= 0 else None
    # The library rounds to a tenth of a point.
    assert outcomes.classes == {"ap": pytest.approx(expected, abs=0.051)}
    known = [value for value in expected.values() if value is not None]
    assert len(set(np.round(known))) > 4 and metrics["ap"] == pytest.approx(np.mean(known), abs=0.051)
    truth, found = student.said[0]
    boxes = pictures.Boxes(*(np.array([one[key] for one in truth]) for key in ("bbox", "bbox_label")))
    answer = pictures.Boxes(*(found[key].numpy() for key in BOXES))
    drawn = pictures.of_boxes(0, first_scene(), (48, 96), boxes, answer, DETECTED)
    assert outcomes.sheet is not None and shown(outcomes.sheet.pictures[0]) == shown(drawn)


# The pose network


def test_the_pose_network_learns_and_predicts(cache: Path) -> None:
    from mmdet.registry import MODELS

    import kt.models.pose

    config = {
        "type": "PoseNetwork",
        "backbone": {"type": "ResNet", "depth": 18, "base_channels": 64},
        "data_preprocessor": {"type": "SegDataPreProcessor", "size_divisor": 32, "test_cfg": {"size_divisor": 32}},
        "num_keypoints": 7,
        "in_channels": [64, 128],
        "out_indices": [0, 1],
    }
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        network = MODELS.build(config)
    assert isinstance(network, kt.models.pose.PoseNetwork)
    data = build(task="keypoints", cache_root=cache, image_size=[40, 72])
    batch = next(iter(data.train.epoch(0)))
    prepared = network.data_preprocessor({"inputs": batch["inputs"], "data_samples": batch["data_samples"]}, True)
    assert prepared["inputs"].shape == (4, 3, 64, 96)
    assert [tuple(level.shape) for level in network.extract_feat(prepared["inputs"])] == [
        (4, 64, 16, 24),
        (4, 128, 8, 12),
    ]
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        total, _ = network.parse_losses(network(**prepared, mode="loss"))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.8 * losses[0]
    network.eval()
    with torch.no_grad():
        samples = network.test_step({"inputs": batch["inputs"], "data_samples": batch["data_samples"]})
    assert all(sample.pred_heatmaps.shape == (7, 10, 18) for sample in samples)
    with pytest.raises(ValueError, match="1 in_channels for 2 out_indices"):
        MODELS.build({**config, "in_channels": [64]})


# Official layouts, made by hand


def test_segfolder_names_and_ignored_ids(tmp_path: Path) -> None:
    settings = segfolder(tmp_path)
    data = build(tmp_path, **settings)
    assert data.spec.class_names == tuple(map(str, range(12))) and (data.spec.train_size, data.spec.test_size) == (6, 3)
    batch = next(iter(data.train.epoch(0)))
    assert batch["inputs"][0].shape == (3, 16, 32) and batch["data_samples"][0].gt_sem_seg.data.shape == (1, 16, 32)
    # The truth of test images stays as large as the image, as mmseg scores it.
    assert next(iter(data.test.epoch(0)))["data_samples"][0].gt_sem_seg.data.shape == (1, 32, 64)
    segfolder(tmp_path, {"classes": ["road", "sky", "car"], "ignore_index": 11})
    named = build(tmp_path, **settings)
    assert named.spec.class_names == ("road", "sky", "car")
    assert named.score(Oracle())["miou"] == 100.0
    ids = torch.cat([s.gt_sem_seg.data.flatten() for batch in named.train.epoch(0) for s in batch["data_samples"]])
    assert ids.unique().tolist() == [0, 1, 2, 255]
    (tmp_path / "street" / "classes.json").write_text('{"classes": ["road", "sky"], "ignore_index": 11}')
    with pytest.raises(UserError, match=r"labels/.*png: holds the id 2; expected 0 to 1, 11 or 255"):
        list(build(tmp_path, **settings).train.epoch(0))


def test_one_split_is_enough_where_a_share_is_held_out(tmp_path: Path) -> None:
    settings = {**segfolder(tmp_path), "test_split": "train"}
    with pytest.raises(UserError, match=r"dataset.test_split=train: expected two splits, .*dataset.validation"):
        build(tmp_path, **settings)
    data = build(tmp_path, **settings, validation=0.34)
    trained, held = (torch.cat([batch["indices"] for batch in part.epoch(0)]) for part in (data.train, data.test))
    assert sorted([*trained.tolist(), *held.tolist()]) == [*range(6)]


def test_loading_processes_change_nothing(tmp_path: Path) -> None:
    settings = segfolder(tmp_path)
    alone, helped = (
        build(tmp_path, **settings, crop_size=[8, 16]),
        build(tmp_path, **settings, crop_size=[8, 16], workers=2),
    )
    for a, b in zip(alone.train.epoch(1), helped.train.epoch(1), strict=True):
        assert same(a, b)
    (tmp_path / "street" / "images" / "train" / "0.jpg").write_bytes(b"no image")
    for data in (alone, helped):
        with pytest.raises(UserError, match=r"images/train/0.jpg: cannot be read as an image") as caught:
            for epoch in range(9):
                list(data.train.epoch(epoch))
        assert "\n" not in str(caught.value)


OFFICIAL = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
OFFICIAL |= {28: 15, 31: 16, 32: 17, 33: 18}


def test_gta5_labels_and_validation_images(tmp_path: Path) -> None:
    settings = gta5(tmp_path)
    data = build(tmp_path, **settings)
    assert (
        data.spec.class_names == STUFF_AND_THINGS and data.spec.class_names[0] == "road" and len(STUFF_AND_THINGS) == 19
    )
    assert (data.spec.train_size, data.spec.test_size) == (5, 1)
    (batch,) = data.test.epoch(0)
    expected = [OFFICIAL.get(i, 255) for i in range(34)]
    assert (batch["data_samples"][0].gt_sem_seg.data[0] == torch.tensor(expected)).all()
    assert {i: int(new) for i, new in enumerate(train_ids()) if new != 255} == OFFICIAL
    (tmp_path / "gta5" / "val.txt").write_text("00003.png\n00001\n")
    listed = build(tmp_path, **settings)
    names = [Path(sample.img_path).name for batch in listed.test.epoch(0) for sample in batch["data_samples"]]
    assert names == ["00001.png", "00003.png"] and listed.spec.train_size == 4


def test_gta5_draws_500_validation_images() -> None:
    names = [f"{i:05d}.png" for i in range(1, 24967)]
    train, held = split_names(names)
    assert len(held) == 500 and len(train) == 24466 and not set(train) & set(held)
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    assert split_names(shuffled) == (train, held)
    # A change of the draw would change the split of everyone who has trained.
    assert held[:3] == ["00069.png", "00134.png", "00158.png"]


@pytest.mark.parametrize("train", ["labelTrainIds", "labelIds"])
@pytest.mark.parametrize("val", ["labelTrainIds", "labelIds"])
def test_cityscapes_label_maps(train: str, val: str, tmp_path: Path) -> None:
    data = build(tmp_path, **cityscapes(tmp_path, train, val), augmentation="none", batch_size=1)
    assert (data.spec.train_size, data.spec.test_size, data.spec.num_classes) == (2, 1, 19)
    for batch in (*data.train.epoch(0), *data.test.epoch(0)):
        ids = batch["data_samples"][0].gt_sem_seg.data[0]
        assert (ids[4:20, 8:16] == 11).all() and (ids == 11).sum() == 128


@pytest.mark.parametrize("kept", [True, False])
def test_cityscapes_boxes_from_instances(kept: bool, tmp_path: Path) -> None:
    cache = tmp_path / "cache" if kept else None
    data = build(tmp_path, **cityscapes(tmp_path, "instanceIds"), cache_root=cache)
    assert data.spec.class_names[:3] == ("person", "rider", "car") and data.spec.num_classes == 8
    (batch,) = data.test.epoch(0)
    sample = batch["data_samples"][0]
    assert sample.gt_instances.bboxes.tensor.tolist() == [[8, 4, 16, 20], [30, 10, 60, 14]]
    assert sample.gt_instances.labels.tolist() == [0, 2]
    assert sample.ignored_instances.bboxes.tensor.tolist() == [[2, 25, 9, 30]]
    assert not kept or len(list(cache.iterdir())) == 2
    assert perfect(data.score(Oracle()))


def test_citypersons_annotations(tmp_path: Path) -> None:
    settings = citypersons(tmp_path)
    (one,) = read_annotations(tmp_path / "citypersons" / "annotations" / "anno_val.mat")
    assert one[0] == "munster/munster_000000_000019_leftImg8bit.png"
    assert one[1][1] == ([20, 2, 24, 12], pytest.approx(0.4), False)
    assert [ignored for _, _, ignored in one[1]] == [False, False, False, True, True]
    data = build(tmp_path, **settings, batch_size=2)
    (batch,) = data.train.epoch(0)
    sample = batch["data_samples"][0]
    # 10 pixels of 32 are 320 of 1024, one is 32: too small to learn; the second is too much occluded.
    assert sample.gt_instances.bboxes.tensor.tolist() == [[5, 2, 9, 12]] and len(sample.ignored_instances) == 4
    (batch,) = data.test.epoch(0)
    assert [one["ignore_flag"] for one in batch["data_samples"][0].instances] == [0, 0, 0, 1, 1]
    found = data.score(Oracle())
    assert found.pop("mr_reasonable_small") == 100 and found == pytest.approx(dict.fromkeys(found, 0), abs=1e-6)


def test_coco_boxes_classes_and_crowds(tmp_path: Path) -> None:
    data = build(tmp_path, **coco(tmp_path))
    assert data.spec.class_names == ("cat", "dog")
    (batch,) = data.test.epoch(0)
    truth = [
        (sample.gt_instances.bboxes.tensor.tolist(), sample.gt_instances.labels.tolist())
        for sample in batch["data_samples"]
    ]
    assert truth[0] == ([[2, 3, 22, 15], [5, 3, 25, 15]], [0, 1])
    assert truth[2] == ([[4, 3, 24, 15]], [0]) and len(batch["data_samples"][2].ignored_instances) == 1
    assert perfect(data.score(Oracle()))
    # Within 48 x 48 at their aspect, boxes along with them.
    batch = next(iter(build(tmp_path, **{**coco(tmp_path), "image_size": [48, 48]}).train.epoch(0)))
    sample = batch["data_samples"][batch["indices"].tolist().index(0)]
    assert batch["inputs"][0].shape == (3, 24, 48)
    torch.testing.assert_close(sample.gt_instances.bboxes.tensor[0], torch.tensor([2.0, 3, 22, 15]) * 0.75)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "scnes"}, r"dataset.name=scnes.*did you mean 'scenes'"),
        ({"task": "segmentaton"}, r"dataset.task=segmentaton: expected one of.*did you mean 'segmentation'"),
        ({"name": "gta5", "task": "detection"}, r"dataset.task=detection: for gta5 expected one of segmentation"),
        ({"augmentation": "imagenet"}, r"dataset.augmentation=imagenet: for segmentation expected one of none, flip"),
        ({"image_size": 48}, r"dataset.image_size=48: expected \[height, width\]"),
        ({"crop_size": [64, 64]}, r"dataset.crop_size=\[64, 64\]: .*at most image_size=\[48, 96\], for segm"),
        ({"crop_size": [16, 16], "task": "detection"}, r"dataset.crop_size=\[16, 16\]: expected null, for detection"),
        ({"num_classes": 19}, r"dataset.num_classes=19: scenes has 13 classes"),
        ({"style": "foto"}, r"did you mean 'photo'"),
        ({"subset": 13}, r"dataset.subset=13: expected 1 to 12"),
        ({"validation": 1.5}, r"dataset.validation=1.5: expected a number >= 0 and < 1"),
        ({"validation": 0.99}, r"none would be left"),
        ({"name": "coco", "task": "detection"}, r"dataset.folder=null: expected the folder below data_root"),
        ({"name": "segfolder", "folder": "x"}, r"there is no .*/x; expected .*labels/<split>.*use scale=mini"),
        ({"name": "cityscapes"}, r"leftImg8bit/train; expected.*cityscapes-dataset.com.*use scale=mini"),
        ({"name": "gta5"}, r"gta5/images; expected.*use scale=mini"),
        ({"name": "citypersons", "task": "pedestrians"}, r"anno_train.mat; expected.*use scale=mini"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, cache_root=cache, **changes)
    assert "\n" not in str(caught.value)


def spoil_segfolder(root: Path, what: str) -> dict[str, Any]:
    settings = segfolder(root)
    street = root / "street"
    if what == "split":
        return {**settings, "test_split": "test"}
    if what == "no split":
        return {**settings, "test_split": None}
    if what == "label":
        (street / "labels" / "val" / "1.png").unlink()
    elif what == "colours":
        picture(street / "labels" / "train" / "1.png")
    elif what == "empty":
        for path in (street / "images" / "val").iterdir():
            path.unlink()
    else:
        (street / "classes.json").write_text(what)
    return settings


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("split", r"there is no .*images/test; expected"),
        ("no split", r"dataset.test_split=null: expected the name of a split"),
        ("label", r"there is no .*labels/val/1.png; expected"),
        ("colours", r"labels/train/1.png: has 3 channels; expected one"),
        ("empty", r"images/val holds no images; expected"),
        ("{", r"classes.json: cannot be read"),
        (
            '{"classes": ["a", "b"], "ignore_index": 1}',
            r"ignore_index=1 is a class or no 8 bit id; expected 2",
        ),
    ],
)
def test_mistakes_in_segfolder(what: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, **spoil_segfolder(tmp_path, what))
    assert "\n" not in str(caught.value)


def test_mistakes_in_files(tmp_path: Path) -> None:
    messages = []

    def fails(root: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            build(root, **settings)
        messages.append(str(caught.value))

    root = tmp_path / "coco"
    settings = coco(root)
    (root / "pets" / "val" / "0.jpg").unlink()
    fails(root, settings, r"there is no .*val/0.jpg; expected")
    settings = coco(root)
    path = root / "pets" / "annotations" / "instances_val.json"
    good = path.read_text()
    for name, fault in (("../train/0.jpg", "not below the folder"), ("0.gif", "not end as an image does")):
        path.write_text(good.replace('"0.jpg"', f'"{name}"'))
        fails(root, settings, rf"instances_val.json: {name} .*{fault}.*; expected .*cocodataset.org")
    path.write_text(good)
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    fails(root, settings, r"other classes in train and val: 'cat'")
    path.write_text('{"images": []}')
    fails(root, settings, r"instances_val.json: is not in COCO's form \(categories is no list of objects; annotations")
    path.unlink()
    fails(root, settings, r"there is no .*instances_val.json; expected .*cocodataset.org")

    root = tmp_path / "gta5"
    settings = gta5(root)
    (root / "gta5" / "val.txt").write_text("00009.png")
    fails(root, settings, r"val.txt: names 00009.png, which is not in")
    (root / "gta5" / "val.txt").unlink()
    (root / "gta5" / "labels" / "00002.png").unlink()
    fails(root, settings, r"there is no .*labels/00002.png; expected the official")

    root = tmp_path / "citypersons"
    settings = citypersons(root)
    (root / "cityscapes" / "leftImg8bit" / "val" / "munster" / "munster_000000_000019_leftImg8bit.png").rename(
        root / "x"
    )
    fails(root, settings, r"there is no .*munster_000000_000019_leftImg8bit.png; expected")
    listed = root / "citypersons" / "annotations" / "anno_val.mat"
    scipy.io.savemat(listed, {"anno_val_aligned": np.empty((1, 0), object)})
    fails(root, settings, r"anno_val.mat holds no images; expected")
    listed.write_bytes(b"no mat")
    fails(root, settings, r"anno_val.mat: is no annotation file of CityPersons")

    root = tmp_path / "cityscapes"
    cityscapes(root)
    boxes = {"name": "cityscapes", "task": "detection"}
    fails(root, boxes, r"gtFine_instanceIds.png; expected .*instances_train.json")
    path = root / "cityscapes" / "annotations" / "instances_train.json"
    path.parent.mkdir()
    path.write_text(good)
    fails(root, boxes, r"instances_train.json: 0.jpg is not of the form \*/\*_leftImg8bit.png; expected the official")
    (root / "cityscapes" / "gtFine" / "train" / "ulm" / "ulm_000000_000019_gtFine_labelTrainIds.png").unlink()
    fails(
        root, {"name": "cityscapes"}, r"there is no .*ulm_000000_000019_gtFine_labelTrainIds.png; expected the official"
    )
    assert all("\n" not in message for message in messages)


# Real images


def test_real_cityscapes(data_root: Path) -> None:
    root = real(data_root, "cityscapes")
    settings = {"name": "cityscapes", "image_size": [96, 192], "subset": 40, "validation": 0.2}
    data = build(root, **settings, crop_size=[64, 96])
    batch = next(iter(data.train.epoch(0)))
    assert all(image.shape == (3, 64, 96) for image in batch["inputs"])
    ids = torch.cat([sample.gt_sem_seg.data.flatten() for sample in batch["data_samples"]]).unique().tolist()
    assert {0, 2}.issubset(ids) and max(set(ids) - {255}) < 19
    assert data.score(Oracle())["miou"] == 100.0
    boxes = build(root, **{**settings, "task": "detection"})
    assert boxes.spec.num_classes == 8 and perfect(boxes.score(Oracle()))


def test_real_camvid(data_root: Path) -> None:
    root = real(data_root, "camvid")
    folder = {"name": "segfolder", "folder": "camvid", "train_split": "train", "test_split": "val"}
    data = build(root, **folder, image_size=[96, 128], subset=20, validation=0.2)
    assert data.spec.num_classes in (11, 12) and data.score(Oracle())["miou"] == 100.0
    assert all(image.shape == (3, 96, 128) for image in next(iter(data.train.epoch(0)))["inputs"])


def test_real_pennfudan(data_root: Path) -> None:
    root = real(data_root, "pennfudan")
    settings = {"name": "coco", "task": "detection", "folder": "pennfudan", "image_size": [160, 240]}
    data = build(root, **settings, train_split="train", test_split="val")
    assert data.spec.num_classes == 1 and isinstance(data.train, DenseLoader)
    batch = next(iter(data.train.epoch(0)))
    for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
        height, width = image.shape[1:]
        long, short = max(height, width), min(height, width)
        assert long <= 240 and short <= 160 and (long == 240 or short == 160)
        box = sample.gt_instances.bboxes.tensor
        assert len(box) and (box[:, 2:] > box[:, :2]).all() and box.max() <= max(height, width)
    assert perfect(data.score(Oracle()))
