"""Cityscapes: segmentation with its 19 classes, detection of its eight kinds of things; and ids that GTA5 shares."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets import CityscapesDataset as CityscapesBoxes
from mmdet.datasets.transforms import LoadAnnotations as LoadBoxes
from mmengine.dataset import BaseDataset
from mmseg.datasets import CityscapesDataset as CityscapesMaps
from numpy.typing import NDArray
from PIL import ImageOps

from kt.data.dense_source import (
    DetectionList,
    ReadImage,
    ReadMap,
    Source,
    ToClasses,
    check_images,
    labelled,
    missing,
    no_images,
    read_coco_form,
)
from kt.data.images import opened
from kt.data.names import CITY_IMAGES
from kt.errors import UserError
from kt.files import checksum, find, read_sealed, write_sealed, writing

logger = logging.getLogger(__name__)

LAYOUT = (
    "the official cityscapes/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and "
    "cityscapes/gtFine/{train,val}/<city>/*_gtFine_*.png (https://www.cityscapes-dataset.com)"
)
IMAGE_END = "_leftImg8bit.png"
LABEL_IDS_END = "_gtFine_labelIds.png"
SPLITS = {"train": "train", "test": "val"}
THINGS: tuple[str, ...] = CityscapesBoxes.METAINFO["classes"]
STUFF_AND_THINGS: tuple[str, ...] = CityscapesMaps.METAINFO["classes"]
# The label ids of STUFF_AND_THINGS and of THINGS, from the official table (cityscapesscripts.helpers.labels).
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
THING_IDS = (24, 25, 26, 27, 28, 31, 32, 33)


def train_ids() -> NDArray[np.uint8]:
    """For every label id 0..255 the train id 0..18, or 255 where pixels do not count."""
    table = np.full(256, 255, np.uint8)
    table[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))
    return table


class ToTrainIds(BaseTransform):
    """Turns maps of label ids into ones of train ids.

    Args:
        end: Of the names of files that hold label ids; others hold train ids already.
    """

    def __init__(self, end: str = "") -> None:
        self.end, self.table = end, train_ids()

    def transform(self, results: dict) -> dict:
        """Replaces `gt_seg_map`."""
        if results["seg_map_path"].endswith(self.end):
            results["gt_seg_map"] = self.table[results["gt_seg_map"]]
        return results


def city_images(root: Path, split: str) -> list[Path]:
    """The images of an official split, in the order of their paths.

    Raises:
        UserError: The folder is missing or empty.
    """
    folder = root / "cityscapes" / "leftImg8bit" / split
    if not folder.is_dir():
        raise missing(root, folder, LAYOUT)
    found = sorted(path for path in find(folder, CITY_IMAGES) if path.is_file())
    if not found:
        raise no_images(root, folder, LAYOUT)
    return found


def read_cityscapes(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """Cityscapes, train and val.

    Segmentation reads `*_gtFine_labelTrainIds.png`, or in a split where those have not been made the
    `*_gtFine_labelIds.png` of the download. Detection reads `annotations/instances_<split>.json` or mmdet's
    `annotations/instancesonly_filtered_gtFine_<split>.json`; where neither exists, boxes around the instances of
    `*_gtFine_instanceIds.png` are taken and kept in the cache.

    Raises:
        UserError: A folder or file is missing.
    """
    images = {part: city_images(root, split) for part, split in SPLITS.items()}
    if dataset["task"] == "detection":
        return _boxes(root, images, cache)
    ends = {}
    for part, files in images.items():
        ends[part] = next(
            (end for end in ("labelTrainIds", "labelIds") if _truth(root, files[0], end).exists()), "labelTrainIds"
        )
        absent = next((path for image in files if not (path := _truth(root, image, ends[part])).exists()), None)
        if absent:
            raise missing(root, absent, LAYOUT)

    def open_split(part: str, pipeline: list[Any], training: bool) -> BaseDataset:
        folders = {"img_path": f"leftImg8bit/{SPLITS[part]}", "seg_map_path": f"gtFine/{SPLITS[part]}"}
        end = f"_gtFine_{ends[part]}.png"
        common: dict[str, Any] = {"pipeline": pipeline, "test_mode": True, "seg_map_suffix": end}
        return CityscapesMaps(data_root=str(root / "cityscapes"), data_prefix=folders, **common)

    return Source(
        open_split,
        STUFF_AND_THINGS,
        ReadImage(),
        [ReadMap(), ToTrainIds(LABEL_IDS_END), ToClasses(len(STUFF_AND_THINGS))],
    )


def _truth(root: Path, image: Path, end: str) -> Path:
    """The ground truth file of an image."""
    name = image.name.removesuffix(IMAGE_END)
    return root / "cityscapes" / "gtFine" / image.parts[-3] / image.parts[-2] / f"{name}_gtFine_{end}.png"


def _boxes(root: Path, images: Mapping[str, list[Path]], cache: Path | None) -> Source:
    with tempfile.TemporaryDirectory(prefix="kt-") as temporary:
        place = cache or Path(temporary)
        samples = {part: _annotations(root, SPLITS[part], files, place) for part, files in images.items()}

    def open_split(part: str, pipeline: list[Any], training: bool) -> BaseDataset:
        common: dict[str, Any] = {"metainfo": {"classes": THINGS}, "pipeline": pipeline, "test_mode": True}
        return DetectionList(samples[part], **common)

    return Source(open_split, THINGS, ReadImage(), [LoadBoxes(with_bbox=True)])


def _annotations(root: Path, split: str, images: list[Path], place: Path) -> list[dict[str, Any]]:
    """The samples of a split, from a file in COCO's form, which is made in the folder `place` if there is none."""
    folder, of_images = root / "cityscapes" / "annotations", root / "cityscapes" / "leftImg8bit" / split
    for name in (f"instances_{split}.json", f"instancesonly_filtered_gtFine_{split}.json"):
        if (folder / name).exists():
            _, found = read_coco_form(folder / name, LAYOUT)
            listed = (image["file_name"] for image in found)
            check_images(root, of_images, listed, folder / name, LAYOUT, CITY_IMAGES)
            samples = labelled(found, THINGS, of_images)
            if not any(sample["instances"] for sample in samples):
                raise UserError(f"{folder / name}: holds no boxes of {', '.join(THINGS)}; expected {LAYOUT}")
            return samples
    for image in images:
        if not (path := _truth(root, image, "instanceIds")).exists():
            raise missing(root, path, f"{LAYOUT} (or {folder}/instances_{split}.json in COCO's form)")
    sums = "".join(image.name + checksum(_truth(root, image, "instanceIds")) for image in images)
    code = hashlib.sha256(Path(__file__).read_bytes() + sums.encode()).hexdigest()[:8]
    path = place / f"cityscapes-boxes-{split}-{code}.json"
    if not read_sealed(path):
        if path.exists():
            logger.warning("%s is damaged: its boxes are taken from the images again", path)
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            write_sealed(path, coco_form(root, images))
    return labelled(read_coco_form(path, LAYOUT)[1], THINGS, of_images)


def coco_form(root: Path, images: list[Path]) -> dict[str, Any]:
    """Boxes around the things of images in COCO's form, from `*_gtFine_instanceIds.png`.

    A pixel of such a map is 1000 times its label id plus the instance's number, or the label id alone in a group whose
    members cannot be told apart; groups are crowds.
    """
    described: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        path = _truth(root, image, "instanceIds")
        with opened(path) as truth:
            ids = np.asarray(ImageOps.exif_transpose(truth)).astype(np.int64)
        name = "/".join(image.parts[-2:])
        described.append({"id": number, "file_name": name, "height": ids.shape[0], "width": ids.shape[1]})
        for value in np.unique(ids):
            label = int(value) // 1000 if value >= 1000 else int(value)
            if label not in THING_IDS:
                continue
            rows, columns = np.nonzero(ids == value)
            x, y = int(columns.min()), int(rows.min())
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y],
                    "area": len(rows),
                    "iscrowd": int(value < 1000),
                }
            )
    categories = [{"id": label, "name": name} for label, name in zip(THING_IDS, THINGS, strict=True)]
    return {"images": described, "annotations": boxes, "categories": categories}
