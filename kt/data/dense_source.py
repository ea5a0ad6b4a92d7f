"""What readers of dense datasets share: one description of a dataset, lists of samples, and images that can be read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmdet.datasets import BaseDetDataset
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmseg.datasets import BaseSegDataset
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from kt.data.images import is_deep, opened, orientation
from kt.data.names import ANY, unseen
from kt.errors import UserError

logger = logging.getLogger(__name__)

SCALE_HINT = "or use scale=mini"


@dataclass
class Source:
    """A dense dataset before it is cut into training and test samples.

    Attributes:
        open: From a split (`train` or `test`), a pipeline, and whether it is for training, a dataset of mmdet or mmseg.
            The samples of a split are the same, in the same order, for both uses.
        class_names: Of the classes, or of the keypoints.
        load_image: The pipeline's step that reads the image.
        load_labels: The steps that read the ground truth; pixels of label maps that do not count are 255.
        resident: Whether the images are in memory already.
        height_unit: Image height over that of Cityscapes, see `kt.evaluation.miss_rate.miss_rates`.
    """

    open: Callable[[str, list[Any], bool], BaseDataset]
    class_names: tuple[str, ...]
    load_image: Any
    load_labels: list[Any]
    resident: bool = False
    height_unit: float = 1.0


class DetectionList(BaseDetDataset):
    """A dataset of mmdet whose samples are given: dicts with `instances` and what is read, such as `img_path`."""

    def __init__(self, samples: Sequence[dict[str, Any]], **kwargs: Any):
        self._samples = samples
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The samples, numbered."""
        return [{"img_id": number, **sample} for number, sample in enumerate(self._samples)]


class SegmentationList(BaseSegDataset):
    """A dataset of mmseg whose samples are given: dicts with `img_path` and `seg_map_path`, or what is read instead."""

    def __init__(self, samples: Sequence[dict[str, Any]], **kwargs: Any):
        self._samples = samples
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The samples with the fields that mmseg's transforms expect."""
        return [{"label_map": None, "reduce_zero_label": False, "seg_fields": [], **part} for part in self._samples]


class ReadImage(LoadImageFromFile):
    """mmcv's reader, which turns an image by its EXIF tag; it blames the file."""

    def transform(self, results: dict) -> dict | None:
        """Reads the image.

        Raises:
            UserError: It cannot be read, or has not the `height` and `width` that a sample may say.
        """
        path, told = results["img_path"], (results.get("height"), results.get("width"))
        try:
            # What Pillow cannot read OpenCV may.
            with (
                contextlib.suppress(Image.UnidentifiedImageError, Image.DecompressionBombError),
                Image.open(path) as head,
            ):
                is_deep(head, path)
                if head.format == "WEBP" and orientation(head) != 1:
                    raise UserError(f"{path}: is WebP, whose EXIF tag nobody reads; expected an image already turned")
            super().transform(results)
        except UserError:
            raise
        # What fails depends on the file: it is missing, it is no image, it ends early.
        except Exception as error:
            raise unreadable(path, error) from None
        if None not in told and told != results["ori_shape"]:
            raise UserError(f"{path}: has {_pixels(results['ori_shape'])}; its annotations are of {_pixels(told)}")
        return results


def _pixels(size: Sequence[Any]) -> str:
    return f"{size[0]} x {size[1]} pixels"


# By what Pillow multiplies the grey of PNGs of 2 and 4 bits, so that the brightest is white.
SPREAD = {"L;2": 85, "L;4": 17}


def read_ids(path: str) -> NDArray[np.uint8]:
    """A label map, (h, w), turned by its EXIF tag as images are; of one with a palette the numbers of its colours.

    Raises:
        UserError: It cannot be read, or is none of 8 bit ids.
    """
    with opened(path) as image:
        spread = SPREAD.get(str(image.tile[0].args), 1) if isinstance(image, PngImageFile) else 1
        if image.format == "JPEG":
            raise UserError(f"{path}: is a JPEG, which does not keep ids; expected a PNG")
        ids = np.asarray(ImageOps.exif_transpose(image)) // spread
    if ids.ndim != 2:
        cure = "colours of classes have to be replaced by ids first"
        raise UserError(f"{path}: has {ids.shape[-1]} channels; expected one, the class ids ({cure})")
    if ids.dtype.kind == "f" or not 0 <= ids.min() <= ids.max() <= 255:
        odd = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(f"{path}: holds the id {odd}; expected whole numbers from 0 to 255")
    return ids.astype(np.uint8)


class ReadMap(BaseTransform):
    """Reads a label map, which has to be as large as its image."""

    def transform(self, results: dict) -> dict:
        """Adds `gt_seg_map`.

        Raises:
            UserError: It cannot be read, or has another size.
        """
        path = results["seg_map_path"]
        ids = read_ids(path)
        if ids.shape != tuple(results["ori_shape"]):
            raise UserError(f"{path}: has {_pixels(ids.shape)}; its image has {_pixels(results['ori_shape'])}")
        results["gt_seg_map"] = ids
        results["seg_fields"].append("gt_seg_map")
        return results


class ToClasses(BaseTransform):
    """Makes pixels that do not count 255, and refuses ids that are no class.

    Args:
        classes: Number of classes.
        ignore: The id of pixels that do not count, beside 255.
    """

    def __init__(self, classes: int, ignore: int = 255):
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
            others = " or ".join(str(number) for number in dict.fromkeys((self.ignore, 255)))
            raise UserError(f"{path}: holds the id {largest}; expected 0 to {self.classes - 1}, {others}")
        results["gt_seg_map"] = np.where(ids == self.ignore, np.uint8(255), ids)
        return results


def unreadable(path: object, error: Exception) -> UserError:
    """The error for a file that is no image."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: cannot be read as an image ({reason})")


def missing(root: Path, path: Path, layout: str) -> UserError:
    """The error for a file or folder that is not there; `layout` says what is expected and where to get it."""
    return UserError(f"data_root={str(root)!r}: there is no {path}; expected {layout}; set data_root=, {SCALE_HINT}")


def no_images(root: Path, path: Path, layout: str) -> UserError:
    """The error for a folder without images."""
    return UserError(
        f"data_root={str(root)!r}: {path} holds no images; expected {layout}; set data_root=, {SCALE_HINT}"
    )


def check_images(root: Path, folder: Path, names: Iterable[str], listed: Path, layout: str, form: str = ANY) -> None:
    """Refuses a list that names an image that is not there, or that the state of the data would not tell.

    Args:
        root: Holds the data.
        folder: Of the images.
        names: The images', below that folder.
        listed: The file that names them.
        layout: What is expected and where to get it.
        form: As for `kt.data.names.unseen`.

    Raises:
        UserError: Says which image.
    """
    for name in names:
        if fault := unseen(name, form):
            raise UserError(f"{listed}: {fault}; expected {layout}")
        if not (folder / name).is_file():
            raise missing(root, folder / name, layout)


# Faults of a file that are told.
TOLD = 3
# So large a share of its boxes may be left out without a word: real files have a few below a pixel. Our choice.
SILENT = 0.01
LARGEST = 2**31  # of pixels and areas: more is no image's, and beyond single precision


def read_coco_form(path: Path, layout: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The classes of a file of COCO's form, in its order, and its images with their boxes.

    Returns:
        Names, and of every image `file_name`, `height`, `width`, `img_id` (its own id, or its place where one of them
        is no integer) and `instances`: `bbox` (x1, y1, x2, y2), `name` and `ignore_flag` (of crowds). As mmdet has it,
        without those that are marked `ignore`, lie outside of the image, or are smaller than a pixel.

    Raises:
        UserError: It has another form, of which the first faults are told, or no boxes.
    """

    def refused(faults: Sequence[str]) -> UserError:
        more = f" and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        return UserError(f"{path}: is not in COCO's form ({'; '.join(faults[:TOLD])}{more}); expected {layout}")

    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise refused([" ".join(str(error).split())]) from None
    parts: dict[str, list[dict[str, Any]]] = read if isinstance(read, dict) else {}
    if faults := [
        f"{name} is no list of objects"
        for name in ("categories", "images", "annotations")
        if not isinstance(rows := parts.get(name), list) or not all(isinstance(row, dict) for row in rows)
    ]:
        raise refused(faults)
    names: dict[str, str] = {}
    for row in parts["categories"]:
        key, name = _identifier(row, "id"), row.get("name")
        if key is None or not isinstance(name, str) or key in names or name in names.values():
            faults.append(f"category {_of(row, 'id', 'name')}, not an id and a name of its own")
        else:
            names[key] = name
    images: dict[str, dict[str, Any]] = {}
    files: set[str] = set()
    whole = all(type(row.get("id")) is int for row in parts["images"])
    for number, row in enumerate(parts["images"]):
        key, sides = _identifier(row, "id"), (row.get("height"), row.get("width"))
        if not isinstance(row.get("file_name"), str) or not all(_is_number(side) and side > 0 for side in sides):
            faults.append(f"image {_of(row, 'id', 'file_name', 'height', 'width')}, not a name and a size")
        elif key is None or key in images:
            faults.append(f"image {_of(row, 'id', 'file_name')}, not an id of its own")
        elif row["file_name"] in files:
            faults.append(f"image {_of(row, 'id', 'file_name')}, not a file of its own")
        else:
            files.add(row["file_name"])
            images[key] = {"img_id": row["id"] if whole else number, "file_name": row["file_name"]}
            images[key] |= {"height": sides[0], "width": sides[1], "instances": []}
    count = 0
    for row in () if faults else parts["annotations"]:
        image, name = images.get(_identifier(row, "image_id") or ""), names.get(_identifier(row, "category_id") or "")
        box, area = row.get("bbox"), row.get("area")
        if image is None or name is None:
            faults.append(f"annotation {_of(row, 'id', 'image_id', 'category_id')}, not an image and a category")
        elif not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            faults.append(f"annotation {_of(row, 'id', 'bbox')}, not x, y, width, height")
        elif not _is_number(area):
            faults.append(f"annotation {_of(row, 'id', 'area')}, not a number")
        elif odd := [key for key in ("iscrowd", "ignore") if row.get(key) not in (None, 0, 1)]:
            faults.append(f"annotation {_of(row, 'id', *odd)}, neither 0 nor 1")
        else:
            x, y, width, height = box
            inside = min(x + width, image["width"]) > max(x, 0) and min(y + height, image["height"]) > max(y, 0)
            if not row.get("ignore") and inside and area > 0 and width >= 1 and height >= 1:
                crowd = int(bool(row.get("iscrowd")))
                image["instances"].append({"bbox": [x, y, x + width, y + height], "name": name, "ignore_flag": crowd})
                count += not crowd
    if faults:
        raise refused(faults)
    if not count:
        raise UserError(f"{path}: holds no boxes that count; expected {layout}")
    rows, kept = parts["annotations"], sum(len(image["instances"]) for image in images.values())
    left = sum(not row.get("ignore") for row in rows) - kept
    if left > SILENT * len(rows):
        logger.warning(
            "%s: %d of %d boxes are left out, outside of their images or below a pixel", path, left, len(rows)
        )
    return tuple(names.values()), list(images.values())


def _of(row: dict[str, Any], *keys: str) -> str:
    """What a row says, in short."""
    return " ".join(f"{key}={reprlib.repr(row.get(key))}" for key in keys)


def _identifier(row: dict[str, Any], key: str) -> str | None:
    """An id, whether a file has it as a number or as a text."""
    value = row.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def labelled(images: Iterable[dict[str, Any]], classes: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Samples of mmdet's form from the images of `read_coco_form`; boxes of other classes are left out."""
    label = {name: number for number, name in enumerate(classes)}
    return [
        {
            **image,
            "img_path": str(folder / image["file_name"]),
            "instances": [
                {"bbox": one["bbox"], "bbox_label": label[one["name"]], "ignore_flag": one["ignore_flag"]}
                for one in image["instances"]
                if one["name"] in label
            ],
        }
        for image in images
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, neither pycocotools nor the libraries' logger writes to the terminal."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
