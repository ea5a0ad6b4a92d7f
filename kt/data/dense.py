"""From the config of a dense task's dataset to loaders and scores: all tasks but classification.

Datasets, augmentation and metrics are those of mmdet and mmseg. Added are order and augmentation that are pure
functions of (seed, epoch, sample), the embedded scenes, and what the libraries do not know (GTA5, CityPersons and its
miss rate).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform, RandomFlip, RandomResize, Resize
from mmdet.datasets.transforms import PackDetInputs
from mmdet.datasets.transforms import RandomFlip as RandomFlipBoxes
from mmdet.datasets.transforms import Resize as ResizeBoxes
from mmdet.evaluation import CocoMetric
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric, Evaluator
from mmseg.datasets.transforms import PackSegInputs, RandomCrop
from mmseg.evaluation import IoUMetric
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from kt.data.dense_scenes import HEATMAP_STRIDE, PackKeypoints, mirrored_keypoints
from kt.data.dense_source import Source, quiet
from kt.data.depth import Approach, CutMiddle, PackDepth
from kt.data.loaders import _mix, epoch_order, told_in_one_line
from kt.data.names import check_share, read_dataset
from kt.data.spec import Data, DataSpec
from kt.errors import UserError
from kt.evaluation import pictures
from kt.evaluation.depth import depth_errors, depth_spread
from kt.evaluation.miss_rate import Pedestrians, miss_rates
from kt.evaluation.outcomes import Outcomes, joined
from kt.models.names import IMAGENET
from kt.ranks import gathered
from kt.settings import count_passes

Batch = dict[str, Any]

# A keypoint is found within this share of the person's height, in persons of at least so many pixels.
PCK_SHARE, PCK_LEAST_HEIGHT = 0.2, 4 * HEATMAP_STRIDE

SCALES = (0.7, 2.1)  # of the augmentation `scale_flip`, that of IFVD's released code

# What COCO's protocol calls average precision, by the names under which mmdet gives them.
AVERAGE_PRECISIONS = {
    "ap": "bbox_mAP",
    "ap50": "bbox_mAP_50",
    "ap75": "bbox_mAP_75",
    "ap_s": "bbox_mAP_s",
    "ap_m": "bbox_mAP_m",
    "ap_l": "bbox_mAP_l",
}


class _Seeded(Dataset):
    """Samples of one epoch: augmentation is seeded by (seed, epoch, index), and nobody's random numbers change."""

    def __init__(self, dataset: BaseDataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        # mm transforms draw from numpy's and Python's generators.
        states = random.getstate(), np.random.get_state()
        seed = _mix(self.seed, self.epoch, index)
        random.seed(seed)
        np.random.seed(seed)
        try:
            return index, self.dataset[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _collate(samples: list[tuple[int, dict[str, Any]]]) -> Batch:
    return {
        "inputs": [sample["inputs"] for _, sample in samples],
        "data_samples": [sample["data_samples"] for _, sample in samples],
        "indices": torch.tensor([index for index, _ in samples]),
    }


def _one_thread(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)


class DenseLoader:
    """Batches as mmdet's and mmseg's own loaders make them, in an order that a resumed run can take up anywhere.

    Args:
        dataset: Of mmdet or mmseg; a sample has `inputs`, uint8 (3, h, w) in BGR, and `data_samples`.
        indices: Samples that take part.
        batch_size: Images of an update, over all processes and passes.
        shuffle: Training order; False for evaluation.
        seed: Of order and augmentation.
        rank, world: This process among all.
        workers: Loading processes; 0 loads in this one.
        unaugmented: Opens the same samples without augmentation, where there is one; opened when first asked for.
        device_batch: Images of a pass, see `kt.settings.count_passes`.
    """

    def __init__(
        self,
        dataset: BaseDataset,
        indices: NDArray[np.int64],
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        unaugmented: Callable[[], BaseDataset] | None = None,
        device_batch: int | None = None,
    ):
        self.unaugmented = unaugmented
        self.dataset, self.indices, self.batch_size, self.shuffle = dataset, indices, batch_size, shuffle
        self.seed, self.rank, self.world, self.workers = seed, rank, world, workers
        self.passes = count_passes(batch_size, device_batch, world)

    def _order(self, epoch: int) -> list[list[int]]:
        size, shared = len(self.indices), (self.rank, self.world, self.batch_size, self.passes)
        batches = epoch_order(size, self.seed, epoch, self.shuffle, *shared)
        return [self.indices[batch.numpy()].tolist() for batch in batches]

    def __len__(self) -> int:
        return len(self._order(0))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number `first` on.

        Yields:
            `inputs`: list of uint8 (3, h, w), BGR; `data_samples`: list; `indices`: int64 (n,), all on the CPU.

        Raises:
            UserError: A file cannot be read.
        """
        loader = DataLoader(
            _Seeded(self.dataset, self.seed, epoch),
            batch_sampler=self._order(epoch)[first:],  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_one_thread,
            # Its own, for a loader draws one number even if nothing is random.
            generator=torch.Generator().manual_seed(0),
        )
        with told_in_one_line():
            yield from loader

    def part(self, chosen: torch.Tensor) -> DenseLoader:
        """Some of the samples, by their places, as a set of their own."""
        other = copy.copy(self)
        other.indices = self.indices[chosen.numpy()]
        return other

    def plain(self, by_class: bool = False) -> DenseLoader:
        """The same images, each once over all processes and without augmentation.

        Raises:
            UserError: Dense images have no one class to be ordered by.
        """
        if by_class:
            raise UserError("method.groups: expected 1, groups of classes are for classification only")
        other = copy.copy(self)
        other.shuffle = False
        if self.unaugmented is not None:
            other.dataset = self.unaugmented()
        return other


def dense_data(
    dataset: Mapping[str, Any],
    data_root: Path,
    cache_root: Path | None,
    *,
    batch_size: int,
    seed: int,
    device_batch: int | None,
    rank: int,
    world: int,
    workers: int,
) -> Data:
    """Loaders and scores for a checked config of a dense dataset; see `kt.data.build_data`.

    Args:
        dataset: Its `image_size` is [height, width]: segmentation at exactly that; others keep their aspect, the longer
            side within the longer and the shorter within the shorter one, as mmdet resizes. `crop_size` is of training
            images of segmentation.

    Returns:
        `spec` (whose `image_size` is the longer side, whose classes of keypoints are the keypoints), `train` and `test`
        (`DenseLoader`), and `score`: from a model with `predict(batch) -> data samples` to metrics in percent of the
        whole test set over all processes: `miou`; `ap`, `ap50`, `ap75` and, for sizes that there are, `ap_s`, `ap_m`,
        `ap_l`; the four of `kt.evaluation.miss_rate`; `pck`; or the means over images of `kt.evaluation.depth`, not
        all of which are in percent.

    Raises:
        UserError: Something is wrong with the config or with the files.
    """
    task, augmentation = dataset["task"], dataset["augmentation"]
    size = tuple(dataset["image_size"])
    crop = dataset["crop_size"] and tuple(dataset["crop_size"])
    source: Source = read_dataset({**dataset, "image_size": list(size)}, data_root, cache_root)
    samples = dataset.get("depth_samples", 0)
    training = source.open("train", _pipeline(task, source, size, crop, augmentation, True, samples), True)
    chosen, held_out = _choose(len(training), dataset["subset"], dataset["validation"])
    testing = source.open(
        "train" if len(held_out) else "test", _pipeline(task, source, size, None, "none", False, samples), False
    )
    tested = held_out if len(held_out) else np.arange(len(testing))
    common: dict[str, Any] = {"batch_size": batch_size, "device_batch": device_batch, "seed": seed}
    common |= {"rank": rank, "world": world}
    common["workers"] = 0 if source.resident else workers

    def unaugmented() -> BaseDataset:
        # Crops go as well: their size is that of the whole image.
        return source.open("train", _pipeline(task, source, size, None, "none", True, samples), True)

    train = DenseLoader(training, chosen, shuffle=True, unaugmented=unaugmented, **common)
    test = DenseLoader(testing, tested, shuffle=False, **common)
    spec = DataSpec(
        dataset["name"],
        len(source.class_names),
        max(size),
        *((*IMAGENET.mean, 0.0), (*IMAGENET.std, 1.0)) if samples else IMAGENET,
        len(chosen),
        len(tested),
        source.class_names,
        task=task,
        largest_index=int(chosen.max()),
    )

    return Data(spec, train, test, functools.partial(_score, loader=test, task=task, source=source))


def _choose(size: int, subset: int | None, validation: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rising numbers of the training samples and of those held out, both out of the first `subset` of a permutation."""
    held = check_share(size, subset, validation)
    order = np.random.default_rng(0).permutation(size)[:subset]
    return np.sort(order[: len(order) - held]), np.sort(order[len(order) - held :])


def _pipeline(
    task: str,
    source: Source,
    size: tuple[int, int],
    crop: tuple[int, int] | None,
    augmentation: str,
    training: bool,
    samples: int = 0,
) -> list[Any]:
    """The libraries' usual pipelines. In tests the ground truth stays as large as the original image, but for depth."""
    scale = (size[1], size[0])
    if task == "depth":
        moved: list[Any] = [Approach()] if augmentation == "approach" else []
        moved += [RandomFlip(prob=0.5)] if augmentation != "none" else []
        fitted = [CutMiddle(size), Resize(scale=scale, keep_ratio=False)]
        pack = PackDepth(samples, fixed=augmentation == "none")
        return [source.load_image, *source.load_labels, *fitted, *moved, pack]
    if task == "keypoints":
        flip: list[BaseTransform] = [RandomFlip(prob=0.5)] if augmentation == "flip" else []
        pack = PackKeypoints(mirrored_keypoints())
        return [source.load_image, *source.load_labels, Resize(scale=scale, keep_ratio=True), *flip, pack]
    steps: list[Any]
    if task == "segmentation":
        resize, flipped = Resize(scale=scale, keep_ratio=False), RandomFlip(prob=0.5)
        steps = [RandomCrop(crop)] if crop else []
        pack = PackSegInputs()
    else:
        resize, flipped, steps = ResizeBoxes(scale=scale, keep_ratio=True), RandomFlipBoxes(prob=0.5), []
        # Metrics read the ground truth of the original image from `instances`.
        meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
        pack = PackDetInputs(meta_keys=meta if training else (*meta, "instances"))
    if not training:
        return [source.load_image, resize, *source.load_labels, pack]
    if augmentation == "scale_flip":
        resize = RandomResize(scale=scale, ratio_range=SCALES, keep_ratio=False)
    if augmentation != "none":
        steps.append(flipped)
    return [source.load_image, *source.load_labels, resize, *steps, pack]


class MissRate(BaseMetric):
    """`kt.evaluation.miss_rate` for mmdet's data samples, whose `instances` have a `visibility`.

    Args:
        height_unit: See `kt.evaluation.miss_rate.miss_rates`.
    """

    def __init__(self, height_unit: float):
        super().__init__(collect_device="gpu", prefix="kt")
        self.height_unit = height_unit

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keeps the boxes of a batch."""
        for sample in data_samples:
            truth, found = sample["instances"], sample["pred_instances"]
            self.results.append(
                Pedestrians(
                    np.array([one["bbox"] for one in truth], float).reshape(-1, 4),
                    np.array([one["visibility"] for one in truth], float),
                    np.array([one["ignore_flag"] for one in truth], bool),
                    found["bboxes"].cpu().numpy().astype(float).reshape(-1, 4),
                    found["scores"].cpu().numpy().astype(float),
                )
            )

    def compute_metrics(self, results: list[Pedestrians]) -> dict[str, float]:
        """The four miss rates."""
        return miss_rates(results, self.height_unit)


class Pck(BaseMetric):
    """Percentage of correct keypoints (PCK@0.2) of heatmaps, each person's keypoints sought in the person's true box.

    For every visible keypoint of every person at least 16 pixels high, the cell with the largest value of its heatmap
    among those that touch the box is taken. It is correct if its centre lies within 0.2 of the box's height of the
    keypoint. So persons are given and not detected, and false alarms elsewhere cost nothing. On the embedded scenes the
    true heatmaps reach about 95, for persons overlap, and noise about 23.
    """

    def __init__(self) -> None:
        super().__init__(collect_device="gpu", prefix="kt")

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Counts (correct, all) of each image."""
        for sample in data_samples:
            maps = sample["pred_heatmaps"].float().cpu().numpy()
            points, boxes = (sample[key].cpu().numpy() for key in ("gt_keypoints", "gt_boxes"))
            self.results.append(count_correct(maps, points, boxes))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """`pck` in percent; 0 if there is no keypoint."""
        correct, total = np.sum(results, axis=0)
        return {"pck": 100.0 * float(correct) / max(1, int(total))}


class DepthErrors(BaseMetric):
    """`kt.evaluation.depth` for data samples that have `pred_depth` and `gt_depth`, as means over the images."""

    def __init__(self) -> None:
        super().__init__(collect_device="gpu", prefix="kt")
        self.spreads: list[tuple[float, float]] = []

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keeps each image's errors, and mean and standard deviation of its truth."""
        for sample in data_samples:
            found, truth = (sample[key].float().cpu().numpy() for key in ("pred_depth", "gt_depth"))
            self.results.append(depth_errors(found, truth) or {})
            self.spreads.append(depth_spread(truth))

    def compute_metrics(self, results: list[dict[str, float]]) -> dict[str, float]:
        """Means over the images with any known depth.

        Raises:
            UserError: There are none.
        """
        known = [errors for errors in results if errors]
        if not known:
            raise UserError("dataset: no test image has a pixel of known depth")
        return {name: float(np.mean([errors[name] for errors in known])) for name in known[0]}


def count_correct(maps: NDArray[Any], points: NDArray[Any], boxes: NDArray[Any]) -> tuple[int, int]:
    """Keypoints that heatmaps (k, h / 4, w / 4) show where they are, and all of them; see `Pck`."""
    correct = total = 0
    for person, (x1, y1, x2, y2) in zip(points, boxes, strict=True):
        height = y2 - y1
        if height < PCK_LEAST_HEIGHT:
            continue
        top, left = (int(side // HEATMAP_STRIDE) for side in (y1, x1))
        bottom, right = (math.ceil(side / HEATMAP_STRIDE) for side in (y2, x2))
        for kind in np.nonzero(person[:, 2] == 2)[0]:
            part = maps[kind, top:bottom, left:right]
            row, column = np.unravel_index(int(part.argmax()), part.shape)
            y, x = (top + row + 0.5) * HEATMAP_STRIDE, (left + column + 0.5) * HEATMAP_STRIDE
            correct += bool(np.hypot(x - person[kind, 0], y - person[kind, 1]) <= PCK_SHARE * height)
            total += 1
    return correct, total


def _picture(task: str, index: int, image: torch.Tensor, sample: Any, names: Sequence[str]) -> pictures.Picture:
    """The picture of a test image, as a loader gives it, and a student's answer."""
    pixels = image.numpy()[::-1].transpose(1, 2, 0)
    if task == "segmentation":
        truth, answer = (part.data[0].cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg))
        return pictures.of_labels(index, pixels, truth, answer, names)
    if task == "depth":
        truth, answer = (part.float().cpu().numpy() for part in (sample.gt_depth, sample.pred_depth))
        return pictures.of_depth(index, pixels, truth, answer)
    corners = np.array([one["bbox"] for one in sample.instances], float).reshape(-1, 4)
    labels = np.array([-1 if one["ignore_flag"] else one["bbox_label"] for one in sample.instances], int)
    found = pictures.Boxes(*(sample.pred_instances[key].cpu().numpy() for key in ("bboxes", "labels", "scores")))
    return pictures.of_boxes(index, pixels, sample.ori_shape, pictures.Boxes(corners, labels), found, names)


def _metric(task: str, source: Source, by_class: bool) -> BaseMetric:
    # "gpu" gathers by the process group, whatever its device; "cpu" would leave a folder behind.
    if task == "segmentation":
        return IoUMetric(iou_metrics=["mIoU"], collect_device="gpu", prefix="kt")
    if task == "detection":
        return CocoMetric(metric="bbox", classwise=by_class, collect_device="gpu", prefix="kt")
    if task == "depth":
        return DepthErrors()
    return MissRate(source.height_unit) if task == "pedestrians" else Pck()


@torch.no_grad()
def _score(
    student: Any, outcomes: Outcomes | None = None, *, loader: DenseLoader, task: str, source: Source
) -> dict[str, float]:
    """Metrics of the plain student on a whole loader, over all processes; its modes are put back afterwards.

    `outcomes`, where given, gets each image's areas in segmentation, and its error and spread in depth (other scores
    are not made of those of images), each class's IoU or AP, and pictures of the first images, but for keypoints.
    """
    metric = _metric(task, source, outcomes is not None)
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = {"classes": source.class_names}
    modes = {module: module.training for module in student.modules()}
    student.eval()
    indices, shown = [], list[pictures.Picture]()
    first = set() if outcomes is None or task == "keypoints" else set(loader.indices[: pictures.FIRST].tolist())
    try:
        for batch in loader.epoch(0):
            indices.append(batch["indices"])
            answers = student.predict(batch)
            evaluator.process(answers)
            shown += [
                _picture(task, index, image, sample, source.class_names)
                for index, image, sample in zip(batch["indices"].tolist(), batch["inputs"], answers, strict=True)
                if index in first
            ]
    finally:
        for module, mode in modes.items():
            module.training = mode
    if outcomes is not None and task == "segmentation":
        places = {"intersect": 0, "union": 1, "truth": 3}
        areas = {
            k: np.stack([image[at].numpy() for image in metric.results]).astype(np.int32) for k, at in places.items()
        }
        outcomes.images = joined({"indices": torch.cat(indices).numpy(), **areas})
        whole = (outcomes.images[name].sum(axis=0, dtype=np.int64).tolist() for name in ("intersect", "union"))
        each = [100.0 * right / of if of else None for right, of in zip(*whole, strict=True)]
        outcomes.classes = {"iou": dict(zip(source.class_names, each, strict=True))}
    if outcomes is not None and task == "depth":
        errors = np.array([image.get("rmse", np.nan) for image in metric.results], np.float32)
        mean, std = np.array(metric.spreads, np.float32).T
        kept = {"indices": torch.cat(indices).numpy(), "rmse": errors, "depth_mean": mean, "depth_std": std}
        outcomes.images = joined(kept)
    if outcomes is not None and first:
        every = sorted(itertools.chain(*gathered(shown)), key=lambda picture: picture.index)
        coloured = source.class_names if task == "segmentation" else ()
        outcomes.sheet = pictures.Sheet(every, pictures.KEYS[task], coloured)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of no class
        found = {
            key.removeprefix("kt/"): float(value) for key, value in evaluator.evaluate(len(loader.indices)).items()
        }
    if task == "segmentation":
        if math.isnan(found["mIoU"]):
            raise UserError("dataset: no pixel of the test images' label maps counts")
        return {"miou": found["mIoU"]}
    if outcomes is not None and task == "detection":
        values = {name: 100.0 * found.get(f"{name}_precision", 0.0) for name in source.class_names}
        outcomes.classes = {"ap": {name: None if math.isnan(value) else value for name, value in values.items()}}
    if task == "detection":
        # Without a single detection mmdet gives no numbers, and -1 for sizes of which there is no object: those are
        # left out, unless there is no object at all.
        values = {name: found.get(key, 0.0) for name, key in AVERAGE_PRECISIONS.items()}
        return {name: 100.0 * max(0.0, value) for name, value in values.items() if value >= 0 or name in ("ap", "ap50")}
    return found
