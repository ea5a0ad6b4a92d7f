"""Datasets in a folder of the user's: detection in COCO's form, segmentation as images and label maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations as LoadBoxes
from mmengine.dataset import BaseDataset

from kt.data.cityscapes import ReadMap
from kt.data.dense_source import (
    ReadImage,
    SegmentationList,
    Source,
    check_images,
    missing,
    no_images,
    quiet,
    read_coco_form,
)
from kt.data.images import opened
from kt.data.names import IMAGE_ENDS
from kt.errors import UserError


class ToClasses(BaseTransform):
    """Makes pixels that do not count 255, and refuses ids that are no class.

    Args:
        classes: Number of classes.
        ignore: The id of pixels that do not count, beside 255.
    """

    def __init__(self, classes: int, ignore: int):
        self.classes, self.ignore = classes, ignore
        self.strange = np.arange(256) >= classes
        self.strange[[ignore, 255]] = False

    def transform(self, results: dict) -> dict:
        """Replaces `gt_seg_map`.

        Raises:
            UserError: It holds another id.
        """
        ids = results["gt_seg_map"]
        strange = ids[self.strange[ids]]
        if len(strange):
            path, largest = results["seg_map_path"], int(strange.max())
            raise UserError(f"{path}: holds the id {largest}; expected 0 to {self.classes - 1}, {self.ignore} or 255")
        results["gt_seg_map"] = np.where(ids == self.ignore, np.uint8(255), ids)
        return results


def folder_of(dataset: Mapping[str, Any], root: Path, layout: str) -> Path:
    """The folder that a config names, of which an error says what it is to hold.

    Raises:
        UserError: It names none, or there is no such folder.
    """
    if not dataset["folder"]:
        raise UserError(f"dataset.folder=null: expected the folder below data_root that holds {layout}")
    folder = root / dataset["folder"]
    if not folder.is_dir():
        raise missing(root, folder, layout)
    return folder


def splits_of(dataset: Mapping[str, Any]) -> dict[str, str]:
    """What the folder calls `train` and `test`.

    Raises:
        UserError: The config does not say.
    """
    for key in ("train_split", "test_split"):
        if not dataset[key]:
            raise UserError(f"dataset.{key}=null: expected the name of a split, such as train or val2017")
    return {"train": dataset["train_split"], "test": dataset["test_split"]}


def read_coco(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """Detection in COCO's form, with the classes that the annotations name; crowds are ignored.

    Raises:
        UserError: A file is missing, is not in this form, or the splits have other classes.
    """
    layout = (
        "annotations/instances_<split>.json and the images in <split>/ (COCO: https://cocodataset.org, or your own)"
    )
    folder, splits = folder_of(dataset, root, layout), splits_of(dataset)
    names: dict[str, tuple[str, ...]] = {}
    for part, split in splits.items():
        path = folder / "annotations" / f"instances_{split}.json"
        if not path.exists():
            raise missing(root, path, f"{folder}/{layout}")
        names[part], images = read_coco_form(path, f"{folder}/{layout}")
        if not images:
            raise no_images(root, path, f"{folder}/{layout}")
        check_images(root, folder / split, images, path, f"{folder}/{layout}")
    if names["train"] != names["test"]:
        odd = sorted(set(names["train"]) ^ set(names["test"])) or ["their order"]
        raise UserError(f"dataset.folder: {folder} has other classes in {' and '.join(splits.values())}: {odd[0]!r}")

    def open_split(part: str, pipeline: list[Any], training: bool) -> BaseDataset:
        with quiet():
            return CocoDataset(
                ann_file=str(folder / "annotations" / f"instances_{splits[part]}.json"),
                data_prefix={"img": str(folder / splits[part])},
                metainfo={"classes": names["train"]},
                pipeline=pipeline,
                test_mode=True,
            )

    return Source(open_split, names["train"], ReadImage(), [LoadBoxes(with_bbox=True)])


def pairs_of(
    dataset: Mapping[str, Any], root: Path, layout: str, truth: tuple[str, str]
) -> dict[str, list[dict[str, str]]]:
    """The samples of a folder of one's own: images, each with a PNG of its truth that has the same name.

    Args:
        dataset: Its config.
        root: Holds the folder.
        layout: What is expected in it.
        truth: The folder of the PNGs, and their key in a sample.

    Raises:
        UserError: A file is missing.
    """
    folder, samples = folder_of(dataset, root, layout), {}
    for part, split in splits_of(dataset).items():
        place = folder / "images" / split
        if not place.is_dir():
            raise missing(root, place, f"{folder}/{layout}")
        images = sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_ENDS)
        if not images:
            raise no_images(root, place, f"{folder}/{layout}")
        found = [(image, folder / truth[0] / split / f"{image.stem}.png") for image in images]
        if absent := next((path for _, path in found if not path.exists()), None):
            raise missing(root, absent, f"{folder}/{layout}")
        samples[part] = [{"img_path": str(image), truth[1]: str(path)} for image, path in found]
    return samples


def read_segfolder(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """Segmentation of images/<split>/*.png|jpg with label maps labels/<split>/*.png, 8 bit class ids.

    `classes.json` in the folder, `{"classes": [names], "ignore_index": id}`, says what the ids are and which id does
    not count (255 by default). Without it the classes are named "0", "1", ... up to the largest id below 255 in the
    training labels, and only 255 does not count: of a set like CamVid, whose id 11 is "void", that makes twelve
    classes, and void counts as one of them.

    Raises:
        UserError: A file is missing or says something else.
    """
    layout = (
        "images/<split>/*.png|jpg, labels/<split>/*.png of the same names and, if you like, classes.json (your own)"
    )
    folder = folder_of(dataset, root, layout)
    samples = pairs_of(dataset, root, layout, ("labels", "seg_map_path"))
    described = folder / "classes.json"
    if described.exists():
        try:
            read = json.loads(described.read_text())
            names, ignore = tuple(str(name) for name in read["classes"]), int(read.get("ignore_index", 255))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            form = '{"classes": ["road", ...], "ignore_index": 255}'
            raise UserError(f"{described}: cannot be read ({reason}); expected {form}") from None
        if not len(names) <= ignore <= 255:
            expected = f"expected {len(names)} (the number of classes) to 255"
            raise UserError(f"{described}: ignore_index={ignore} is a class or no 8 bit id; {expected}")
    else:
        names, ignore = tuple(str(number) for number in range(_largest(samples["train"]) + 1)), 255

    def open_split(part: str, pipeline: list[Any], training: bool) -> BaseDataset:
        common: dict[str, Any] = {"metainfo": {"classes": names}, "pipeline": pipeline, "test_mode": True}
        return SegmentationList(samples[part], **common)

    return Source(open_split, names, ReadImage(), [ReadMap(), ToClasses(len(names), ignore)])


def _largest(samples: list[dict[str, str]]) -> int:
    """The largest class id below 255."""
    largest = 0
    for sample in samples:
        path = sample["seg_map_path"]
        with opened(path) as image:
            ids = np.asarray(image)
        if ids.ndim != 2:
            raise UserError(f"{path}: has {ids.shape[-1]} channels; expected one, the class ids")
        largest = max(largest, int(ids[ids < 255].max(initial=0)))
    return largest
