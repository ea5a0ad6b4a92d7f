"""CityPersons: pedestrians of Cityscapes, labelled anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.datasets.transforms import LoadAnnotations as LoadBoxes
from mmengine.dataset import BaseDataset
from scipy.io import loadmat

from kt.data.cityscapes import SPLITS
from kt.data.dense_scenes import CITYSCAPES_HEIGHT, pedestrian
from kt.data.dense_source import DetectionList, ReadImage, Source, check_images, missing, no_images
from kt.data.images import opened
from kt.data.names import CITY_IMAGES
from kt.errors import UserError

LAYOUT = (
    "citypersons/annotations/anno_{train,val}.mat (https://github.com/cvgroup-njust/CityPersons) beside the official "
    "cityscapes/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png (https://www.cityscapes-dataset.com)"
)
PEDESTRIAN = 1
STRAYS = (
    0.1  # share of pedestrians that may have their middle outside the image, if their boxes are of images of its size
)


def read_annotations(path: Path) -> list[tuple[str, list[tuple[list[float], float, bool]]]]:
    """What an official annotation file says.

    Returns:
        For every image `<city>/<file name>` and its boxes: x1, y1, x2, y2 of the whole person, the visible share, and
        whether it is ignored (everything but class 1: regions to ignore, riders, sitting and other persons, groups).

    Raises:
        UserError: The file is none of CityPersons.
    """
    try:
        content = loadmat(str(path))
        (table,) = (value for key, value in content.items() if not key.startswith("__"))
        images = []
        for cell in table.ravel():
            record = cell[0, 0]
            city, name = str(record["cityname"].item()), str(record["im_name"].item())
            boxes = []
            for row in record["bbs"].astype(float).reshape(-1, 10):
                kind, x, y, width, height, _, _, _, seen_width, seen_height = row.tolist()
                share = seen_width * seen_height / max(width * height, 1e-9)
                boxes.append(([x, y, x + width, y + height], share, kind != PEDESTRIAN))
            images.append((f"{city}/{name}", boxes))
    # scipy and NumPy raise many kinds of errors on other contents.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is no annotation file of CityPersons ({reason}); expected {LAYOUT}") from None
    return images


def read_citypersons(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """CityPersons, train and val, for pedestrian detection.

    Training ignores pedestrians below 50 pixels or 65 percent visible as well (see `kt.data.dense_scenes.pedestrian`).
    Heights of the miss rate's subsets refer to images 1024 pixels high.

    Raises:
        UserError: A file is missing.
    """
    annotated, height = {}, CITYSCAPES_HEIGHT
    for part, split in SPLITS.items():
        path = root / "citypersons" / "annotations" / f"anno_{split}.mat"
        if not path.exists():
            raise missing(root, path, LAYOUT)
        annotated[part] = read_annotations(path)
        folder, names = root / "cityscapes" / "leftImg8bit" / split, [name for name, _ in annotated[part]]
        if not names:
            raise no_images(root, path, LAYOUT)
        check_images(root, folder, names, path, LAYOUT, CITY_IMAGES)
        with opened(folder / names[-1]) as image:
            width, height = image.size
        boxes = [box for _, found in annotated[part] for box, _, ignored in found if not ignored]
        strays = sum(x1 + x2 >= 2 * width or y1 + y2 >= 2 * height for x1, y1, x2, y2 in boxes)
        if strays > STRAYS * len(boxes):
            raise UserError(
                f"{path}: {strays} of {len(boxes)} pedestrians are outside images of {height} x {width} pixels, as "
                f"{folder / names[-1]} is; expected the official images, or boxes scaled with them"
            )
    unit = height / CITYSCAPES_HEIGHT

    def open_split(part: str, pipeline: list[Any], training: bool) -> BaseDataset:
        folder = root / "cityscapes" / "leftImg8bit" / SPLITS[part]
        samples = [
            {
                "img_path": str(folder / name),
                "instances": [pedestrian(box, share, ignored, unit, training) for box, share, ignored in boxes],
            }
            for name, boxes in annotated[part]
        ]
        return DetectionList(samples, metainfo={"classes": ("pedestrian",)}, pipeline=pipeline, test_mode=True)

    labels = [LoadBoxes(with_bbox=True)]
    return Source(open_split, ("pedestrian",), ReadImage(), labels, height_unit=unit)
