"""What readers of dense datasets share: one description of a dataset, lists of samples, and images that can be read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import BaseDetDataset
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmseg.datasets import BaseSegDataset

from kt.data.names import ANY, unseen
from kt.errors import UserError

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
        keep: What has to live as long as the source, such as a temporary folder.
    """

    open: Callable[[str, list[Any], bool], BaseDataset]
    class_names: tuple[str, ...]
    load_image: Any
    load_labels: list[Any]
    resident: bool = False
    height_unit: float = 1.0
    keep: Any = None


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
    """mmcv's reader, which blames the file."""

    def transform(self, results: dict) -> dict | None:
        """Reads the image.

        Raises:
            UserError: It cannot be read.
        """
        try:
            return super().transform(results)
        # What fails depends on the file: it is missing, it is no image, it ends early.
        except Exception as error:
            raise unreadable(results["img_path"], error) from None


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
        if not (folder / name).exists():
            raise missing(root, folder / name, layout)


def read_coco_form(path: Path, layout: str) -> tuple[tuple[str, ...], list[str]]:
    """The names of the classes and of the images in a file of COCO's form.

    Raises:
        UserError: It has another form.
    """
    try:
        read = json.loads(path.read_bytes())
        names = tuple(category["name"] for category in read["categories"])
        files = [str(image["file_name"]) for image in read["images"]]
        wanted = {"images": ("id", "width", "height"), "annotations": ("id", "bbox", "area", "category_id", "image_id")}
        for part, keys in wanted.items():
            if lost := next((key for each in read[part] for key in keys if key not in each), None):
                raise KeyError(f"{lost} of one of the {part}")
        for box in read["annotations"]:
            if len(box["bbox"]) != 4:
                raise ValueError(f"bbox {box['bbox']}, not x, y, width, height")
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not in COCO's form ({reason}); expected {layout}") from None
    return names, files


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
