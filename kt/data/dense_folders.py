"""Datasets in a folder of the user's: detection in COCO's form, segmentation as images and label maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets.transforms import LoadAnnotations as LoadBoxes
from mmengine.dataset import BaseDataset

from kt.data.dense_source import (
    DetectionList,
    ReadImage,
    ReadMap,
    SegmentationList,
    Source,
    ToClasses,
    check_images,
    labelled,
    missing,
    no_images,
    read_coco_form,
    read_ids,
)
from kt.data.images import check_folders, listed, opened, orientation, tell_unread
from kt.errors import UserError


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
    names, images = {}, {}
    for part, split in splits.items():
        path = folder / "annotations" / f"instances_{split}.json"
        if not path.exists():
            raise missing(root, path, f"{folder}/{layout}")
        names[part], images[part] = read_coco_form(path, f"{folder}/{layout}")
        files = (image["file_name"] for image in images[part])
        check_images(root, folder / split, files, path, f"{folder}/{layout}")
    if odd := sorted(set(names["train"]) ^ set(names["test"])):
        raise UserError(f"dataset.folder: {folder} has other classes in {' and '.join(splits.values())}: {odd[0]!r}")
    samples = {part: labelled(images[part], names["train"], folder / split) for part, split in splits.items()}

    def open_split(part: str, pipeline: list[Any], training: bool) -> BaseDataset:
        common: dict[str, Any] = {"metainfo": {"classes": names["train"]}, "pipeline": pipeline, "test_mode": True}
        return DetectionList(samples[part], **common)

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
        within = listed(place)
        check_folders(within.folders, f"{folder}/{layout}")
        if not within.images:
            raise no_images(root, place, f"{folder}/{layout}")
        tell_unread(place, within.others)
        found = [(image, folder / truth[0] / split / f"{image.stem}.png") for image in within.images]
        if absent := next((path for _, path in found if not path.exists()), None):
            raise missing(root, absent, f"{folder}/{layout}")
        known = {path: image for image, path in found}
        if len(known) < len(found):
            image, path = next((image, path) for image, path in found if known[path] != image)
            raise UserError(f"{path}: would be the truth of {image.name} and of {known[path].name}; expected one image")
        spare = [path for path in listed(folder / truth[0] / split).images if path not in known]
        tell_unread(folder / truth[0] / split, spare, "belong to no image")
        for pair in found:
            check_pair(*pair)
        samples[part] = [{"img_path": str(image), truth[1]: str(path)} for image, path in found]
    return samples


def check_pair(image: Path, truth: Path) -> None:
    """Refuses a PNG that cannot be the truth of an image; only the heads of both files are read.

    Raises:
        UserError: They differ in size once each is turned by its own EXIF tag, or the truth has several channels.
    """
    sizes = []
    for path in (image, truth):
        with opened(path) as head:
            size, bands = head.size, len(head.getbands())
            sizes.append(size if orientation(head) > 4 else size[::-1])
    if sizes[0] != sizes[1]:
        of_truth, of_image = (f"{height} x {width}" for height, width in (sizes[1], sizes[0]))
        raise UserError(f"{truth}: has {of_truth} pixels; its image {image.name} has {of_image}")
    if bands != 1:
        raise UserError(f"{truth}: has {bands} channels; expected one (colours of classes have to become ids first)")


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
            read = json.loads(described.read_text(encoding="utf-8-sig"))
            if not isinstance(read["classes"], list) or not all(isinstance(name, str) for name in read["classes"]):
                raise TypeError("the classes are no list of names")
            if unknown := [key for key in read if key not in ("classes", "ignore_index")]:
                raise TypeError(f"it has the key {unknown[0]!r}")
            names, ignore = tuple(str(name) for name in read["classes"]), read.get("ignore_index", 255)
            if len(set(names)) < len(names) or type(ignore) is not int:
                raise TypeError(f"two classes have one name, or ignore_index={ignore} is no whole number")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            form = '{"classes": ["road", ...], "ignore_index": 255}'
            raise UserError(f"{described}: cannot be read ({reason}); expected {form}") from None
        if not len(names) <= ignore <= 255:
            expected = f"expected {len(names)} (the number of classes) to 255"
            raise UserError(f"{described}: ignore_index={ignore} is a class or no 8 bit id; {expected}")
        _ids(samples["train"], ignore, enough=2)
    else:
        names, ignore = tuple(str(number) for number in range(max(_ids(samples["train"], 255)) + 1)), 255

    def open_split(part: str, pipeline: list[Any], training: bool) -> BaseDataset:
        common: dict[str, Any] = {"metainfo": {"classes": names}, "pipeline": pipeline, "test_mode": True}
        return SegmentationList(samples[part], **common)

    return Source(open_split, names, ReadImage(), [ReadMap(), ToClasses(len(names), ignore)])


def _ids(samples: list[dict[str, str]], ignore: int, enough: int = 256) -> set[int]:
    """The class ids in label maps, of which the first ones are read until there are enough.

    Raises:
        UserError: There are not two.
    """
    found: set[int] = set()
    for sample in samples:
        found |= {*np.flatnonzero(np.bincount(read_ids(sample["seg_map_path"]).ravel())).tolist()} - {ignore, 255}
        if len(found) >= enough:
            break
    if len(found) < 2:
        cure = "of masks in black and white, 0 and 255, white has to become 1"
        held = f"one id that counts, {min(found)}" if found else "no id that counts"
        place = Path(samples[0]["seg_map_path"]).parent
        raise UserError(
            f"{place}: the label maps hold {held}; expected two classes or more (255 counts as none: {cure})"
        )
    return found
