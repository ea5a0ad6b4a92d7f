"""Embedded street scenes as datasets of mmdet and mmseg: segmentation, detection, pedestrians, keypoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets.transforms import LoadAnnotations as LoadBoxes
from mmengine.dataset import BaseDataset
from mmseg.structures import SegDataSample
from numpy.typing import NDArray

from kt.data import scenes
from kt.data.cache import drawn as cached
from kt.data.dense_source import DetectionList, SegmentationList, Source
from kt.data.images import TEST_SEED_OFFSET

DETECTED = tuple(name for name in scenes.CLASSES if name not in ("tree", "building"))
# Instances that a detector is asked for: their visible share, and their height in pixels.
LEAST_VISIBLE, LEAST_HEIGHT = 0.1, 4
# Persons at most that join the scenes of the tasks about persons; without them there are 0.8 a scene.
CROWD = 12
# Height of Cityscapes images, to which the heights of pedestrian subsets refer.
CITYSCAPES_HEIGHT = 1024
# Pedestrians a detector is trained on, in pixels at that height and visible share; others are ignored. Our choice: the
# "reasonable" subset, as CityPersons' authors train.
TRAINED_HEIGHT, TRAINED_VISIBLE = 50, 0.65
# Persons of whom less is visible have no keypoints.
POSE_VISIBLE = 0.2
HEATMAP_STRIDE = 4
# Standard deviation of a keypoint's blob, in pixels.
HEATMAP_SIGMA = 4.0


@dataclass
class Drawn:
    """Scenes and what is in them.

    Attributes:
        images: (n, h, w, 3), 8 bit BGR.
        semantic: (n, h, w): index into STUFF + CLASSES.
        scene: Number of the scene of each instance, (m,).
        label: Its index into CLASSES, (m,).
        box: x1, y1, x2, y2 around all its pixels, hidden ones included, (m, 4).
        visibility: Its visible share, (m,).
        keypoints: x, y and visible (2), hidden (1) or outside the image (0), (m, 7, 3); zeros unless it is a person.
    """

    images: NDArray[np.uint8]
    semantic: NDArray[np.uint8]
    scene: NDArray[np.int64]
    label: NDArray[np.int64]
    box: NDArray[np.float32]
    visibility: NDArray[np.float32]
    keypoints: NDArray[np.float32]


def draw(count: int, height: int, width: int, seed: int, style: str, crowd: int) -> Drawn:
    """The first `count` scenes of a seed; see `kt.data.scenes.draw_scene`."""
    images = np.empty((count, height, width, 3), np.uint8)
    semantic = np.empty((count, height, width), np.uint8)
    rows: list[tuple[int, int, tuple[int, ...], float, NDArray[np.float32]]] = []
    nowhere = np.zeros((len(scenes.KEYPOINTS), 3), np.float32)
    for number in range(count):
        scene = scenes.draw_scene(seed, number, height, width, style, crowd)
        images[number], semantic[number] = scene.image[..., ::-1], scene.semantic
        for one in scene.instances:
            points = nowhere if one.keypoints is None else one.keypoints
            rows.append((number, scenes.CLASSES.index(one.name), one.box, one.visibility, points))
    numbers, labels, boxes, visibility, keypoints = zip(*rows, strict=True)
    return Drawn(
        images,
        semantic,
        np.array(numbers, np.int64),
        np.array(labels, np.int64),
        np.array(boxes, np.float32),
        np.array(visibility, np.float32),
        np.stack(keypoints),
    )


def drawn(count: int, height: int, width: int, seed: int, style: str, crowd: int, cache: Path | None) -> Drawn:
    """Scenes, which the cache keeps."""
    name, code = f"street-{style}-{height}x{width}-{seed}-{crowd}-{count}", (scenes.__file__, __file__)
    return Drawn(**cached(cache, name, code, lambda: vars(draw(count, height, width, seed, style, crowd))))


def scene_seed(task: str, style: str, split: str) -> int:
    """The seed of a set of scenes.

    Segmentation and detection share their scenes, as the two tasks of Cityscapes share their images. Pedestrians,
    keypoints, the other style and the test split are other scenes.
    """
    task_seed = {"segmentation": 0, "detection": 0, "pedestrians": 1, "keypoints": 2}[task]
    return task_seed + 100 * scenes.STYLES.index(style) + (TEST_SEED_OFFSET if split == "test" else 0)


class ReadScene(BaseTransform):
    """Takes a scene's image from memory.

    Args:
        images: (n, h, w, 3) of each split, 8 bit BGR.
    """

    def __init__(self, images: Mapping[str, NDArray[np.uint8]]):
        self.images = images

    def transform(self, results: dict) -> dict:
        """Adds `img` and its shapes."""
        image = self.images[results["split"]][results["number"]].copy()
        shape = image.shape[:2]
        results.update(img=image, img_shape=shape, ori_shape=shape)
        return results


class ReadSemantic(BaseTransform):
    """Takes a scene's semantic map from memory.

    Args:
        maps: (n, h, w) of each split.
    """

    def __init__(self, maps: Mapping[str, NDArray[np.uint8]]):
        self.maps = maps

    def transform(self, results: dict) -> dict:
        """Adds `gt_seg_map`."""
        results["gt_seg_map"] = self.maps[results["split"]][results["number"]].copy()
        results["seg_fields"].append("gt_seg_map")
        return results


class ReadKeypoints(BaseTransform):
    """Takes a sample's keypoints as mmcv's transforms want them."""

    def transform(self, results: dict) -> dict:
        """Adds `gt_keypoints`, (persons, k, 3), and `gt_bboxes`, (persons, 4)."""
        results["gt_keypoints"] = results["keypoints"].copy()
        results["gt_bboxes"] = results["boxes"].copy()
        return results


class PackKeypoints(BaseTransform):
    """Packs an image with its keypoints and their heatmaps.

    The data sample has `gt_keypoints`, float (persons, k, 3): x and y in pixels of the packed image and visible (2),
    hidden (1) or absent (0); `gt_boxes`, float (persons, 4); and `gt_heatmaps`, float (k, h / 4, w / 4): at the centre
    of every cell the largest of exp(-d^2 / 2 s^2) over the keypoints of that kind that are present, s being 4 pixels.

    Args:
        mirrored: For each kind of keypoint the kind that it becomes in a mirrored image.
    """

    def __init__(self, mirrored: Sequence[int]):
        self.mirrored = list(mirrored)

    def transform(self, results: dict) -> dict:
        """`inputs`, uint8 (3, h, w) in BGR, and `data_samples`."""
        image = results["img"]
        points = np.asarray(results["gt_keypoints"], np.float32)
        if results.get("flip"):
            points = points[:, self.mirrored]
        sample = SegDataSample()
        sample.gt_keypoints = torch.from_numpy(np.ascontiguousarray(points))
        sample.gt_boxes = torch.from_numpy(np.asarray(results["gt_bboxes"], np.float32).reshape(-1, 4))
        sample.gt_heatmaps = torch.from_numpy(heatmaps(points, *image.shape[:2]))
        sample.set_metainfo({key: results[key] for key in ("img_shape", "ori_shape", "flip") if key in results})
        return {"inputs": torch.from_numpy(image.transpose(2, 0, 1).copy()), "data_samples": sample}


def heatmaps(points: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Heatmaps (k, ceil(h / 4), ceil(w / 4)) of keypoints (persons, k, 3); see `PackKeypoints`."""
    rows, columns = (math.ceil(side / HEATMAP_STRIDE) for side in (height, width))
    y = (np.arange(rows, dtype=np.float32) + 0.5) * HEATMAP_STRIDE
    x = (np.arange(columns, dtype=np.float32) + 0.5) * HEATMAP_STRIDE
    found = np.zeros((len(scenes.KEYPOINTS), rows, columns), np.float32)
    for person in points:
        for kind in np.nonzero(person[:, 2])[0]:
            along = np.exp(-((x - person[kind, 0]) ** 2) / (2 * HEATMAP_SIGMA**2))
            down = np.exp(-((y - person[kind, 1]) ** 2) / (2 * HEATMAP_SIGMA**2))
            np.maximum(found[kind], down[:, None] * along[None], out=found[kind])
    return found


def mirrored_keypoints() -> list[int]:
    """For each keypoint of `kt.data.scenes.KEYPOINTS` its partner on the other side of the body, or itself."""
    swap = {"left": "right", "right": "left"}
    names = (" ".join(swap.get(word, word) for word in name.split()) for name in scenes.KEYPOINTS)
    return [scenes.KEYPOINTS.index(name) for name in names]


def read_scenes(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """Embedded scenes for a dense task; nothing is read from `root`.

    - segmentation: the 13 classes STUFF + CLASSES.
    - detection: eight classes (no tree, no building), boxes around whole objects of which at least a tenth is visible
      and that are at least 4 pixels high.
    - pedestrians: persons; cyclists are ignored. Heights refer to images 1024 pixels high (`Source.height_unit`).
    - keypoints: seven points of every person of whom at least a fifth is visible.
    """
    task, style = dataset["task"], scenes.check_style(dataset["style"])
    height, width = dataset["image_size"]
    crowd = CROWD if task in ("pedestrians", "keypoints") else 0
    parts = {
        split: drawn(dataset[f"{split}_size"], height, width, scene_seed(task, style, split), style, crowd, cache)
        for split in ("train", "test")
    }
    unit = height / CITYSCAPES_HEIGHT
    images = {split: part.images for split, part in parts.items()}
    if task == "segmentation":
        labels: list[Any] = [ReadSemantic({split: part.semantic for split, part in parts.items()})]
        names: tuple[str, ...] = (*scenes.STUFF, *scenes.CLASSES)
    elif task == "keypoints":
        labels, names = [ReadKeypoints()], scenes.KEYPOINTS
    else:
        labels, names = [LoadBoxes(with_bbox=True)], DETECTED if task == "detection" else ("pedestrian",)

    def open_split(split: str, pipeline: list[Any], training: bool) -> BaseDataset:
        part = parts[split]
        samples = [{"split": split, "number": number} for number in range(len(part.images))]
        common: dict[str, Any] = {"metainfo": {"classes": names}, "pipeline": pipeline, "test_mode": True}
        # Serialising is for loading processes, and there are none.
        common["serialize_data"] = False
        if task == "segmentation":
            return SegmentationList(samples, **common)
        members: list[list[int]] = [[] for _ in samples]
        for row, number in enumerate(part.scene):
            members[number].append(row)
        for sample, rows in zip(samples, members, strict=True):
            if task == "keypoints":
                shown = [row for row in rows if _is(part, row, "person") and part.visibility[row] >= POSE_VISIBLE]
                sample.update(keypoints=part.keypoints[shown], boxes=part.box[shown])
            elif task == "detection":
                sample["instances"] = [instance for row in rows if (instance := _object(part, row))]
            else:
                found = (_pedestrian(part, row, unit, training) for row in rows)
                sample["instances"] = [instance for instance in found if instance]
        return DetectionList(samples, **common)

    return Source(open_split, names, ReadScene(images), labels, resident=True, height_unit=unit)


def _is(part: Drawn, row: int, name: str) -> bool:
    return scenes.CLASSES[part.label[row]] == name


def _object(part: Drawn, row: int) -> dict[str, Any] | None:
    """An instance for a detector, or None if it is none."""
    name, box = scenes.CLASSES[part.label[row]], part.box[row]
    if name not in DETECTED or part.visibility[row] < LEAST_VISIBLE or box[3] - box[1] < LEAST_HEIGHT:
        return None
    return {"bbox": box.tolist(), "bbox_label": DETECTED.index(name), "ignore_flag": 0}


def _pedestrian(part: Drawn, row: int, unit: float, training: bool) -> dict[str, Any] | None:
    """A person or (ignored) a cyclist, or None if it is neither."""
    if not (_is(part, row, "person") or _is(part, row, "cyclist")):
        return None
    return pedestrian(part.box[row].tolist(), float(part.visibility[row]), _is(part, row, "cyclist"), unit, training)


def pedestrian(box: list[float], visibility: float, ignore: bool, unit: float, training: bool) -> dict[str, Any]:
    """An instance of mmdet's form with its `visibility`.

    Args:
        box: x1, y1, x2, y2 in pixels, hidden parts included.
        visibility: Visible share.
        ignore: Whether it is no pedestrian but a region that does not count.
        unit: See `kt.data.dense_source.Source.height_unit`.
        training: Whether pedestrians that are too small or too much occluded to be learned are ignored as well.
    """
    if training:
        ignore = ignore or (box[3] - box[1]) / unit < TRAINED_HEIGHT or visibility < TRAINED_VISIBLE
    return {"bbox": box, "bbox_label": 0, "ignore_flag": int(ignore), "visibility": visibility}
