"""Pictures of the first test images: each as it is, as it should be understood, and as a student understands it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from kt.files import replacing

Pixels = NDArray[np.uint8]  # RGB (h, w, 3)

FIRST = 3  # test images that are shown
SIDE = 320  # the longer side of a picture, in pixels
LEAST_SCORE = 0.3  # boxes with less are not drawn
UNCOUNTED = 255  # in label maps
UNKNOWN = (150, 150, 150)  # where there is no depth, and boxes that do not count

_BOXES = f"Boxes with a score of at least {LEAST_SCORE:g}; grey ones in the truth do not count."
# What the pictures of a task show, in words.
KEYS = {
    "segmentation": "Black in the truth does not count.",
    "detection": _BOXES,
    "pedestrians": _BOXES,
    "depth": "Dark is near and bright is far, on the logarithmic scale of the truth; grey is where there is no depth.",
}

# Of the benchmark's makers, by the names that other data share.
CITYSCAPES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}


@dataclass(frozen=True)
class Picture:
    """A test image, its truth and what a student finds in it, of one size.

    Attributes:
        index: The image's place in the test set.
        image, truth, found: RGB (h, w, 3).
        note: What holds for this image alone, in words.
    """

    index: int
    image: Pixels
    truth: Pixels
    found: Pixels
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """The pictures of a student's score.

    Attributes:
        pictures: One per image, in the order of the test set.
        key: What all of them show, in words.
        names: Of the classes that are shown by their `colours` alone.
    """

    pictures: Sequence[Picture]
    key: str
    names: Sequence[str] = ()


class Boxes(NamedTuple):
    """An image's objects: x1, y1, x2, y2 (n, 4), classes (n,), -1 for what does not count, scores (n,) if found."""

    corners: NDArray[Any]
    labels: NDArray[Any]
    scores: NDArray[Any] | None = None


def colours(names: Sequence[str]) -> NDArray[np.uint8]:
    """The colour of each class, (n, 3): Cityscapes' where it has the name, else the next of PASCAL VOC's."""
    used = set(CITYSCAPES.values())
    spare = (colour for colour in map(_voc_colour, itertools.count(1)) if colour not in used)
    return np.array([CITYSCAPES.get(name) or next(spare) for name in names], np.uint8).reshape(-1, 3)


def _voc_colour(number: int) -> tuple[int, ...]:
    """A class's colour in PASCAL VOC's maps: its bits go to red, green and blue in turn, the highest ones first."""
    return tuple(sum((number >> 3 * bit + part & 1) << 7 - bit for bit in range(8)) for part in range(3))


# Pictures of a task


def of_labels(index: int, image: Pixels, truth: NDArray[Any], found: NDArray[Any], names: Sequence[str]) -> Picture:
    """Label maps (h, w) in the colours of their classes.

    Args:
        index: The image's place in the test set.
        image: Of any size.
        truth: With 255 for what does not count.
        found: Of the same size.
        names: Of the classes.
    """
    palette = np.zeros((UNCOUNTED + 1, 3), np.uint8)
    palette[: len(names)] = colours(names)
    size = _size(truth.shape)
    right, ours = (_resized(palette[labels], size, Image.Resampling.NEAREST) for labels in (truth, found))
    return Picture(index, _resized(image, size), right, ours)


def of_boxes(
    index: int, image: Pixels, shape: Sequence[int], truth: Boxes, found: Boxes, names: Sequence[str]
) -> Picture:
    """Boxes on the image, the more certain above the others.

    Args:
        index: The image's place in the test set.
        image: Of any size.
        shape: Height and width of the image that the boxes are on.
        truth, found: Its objects.
        names: Of the classes.
    """
    size = _size(shape)
    pixels, factor = _resized(image, size), size[0] / shape[1]
    right, ours = (_drawn(pixels, each, factor, names) for each in (truth, found))
    return Picture(index, pixels, right, ours)


def _drawn(image: Pixels, objects: Boxes, factor: float, names: Sequence[str]) -> Pixels:
    canvas = Image.fromarray(image)
    draw, font, palette = ImageDraw.Draw(canvas), ImageFont.load_default(13), colours(names)
    scores = np.ones(len(objects.labels)) if objects.scores is None else objects.scores
    for number in np.argsort(scores, kind="stable"):
        x1, y1, x2, y2 = np.clip(factor * objects.corners[number].astype(float), -SIDE, 2 * SIDE).tolist()
        # A network that has diverged may say anything.
        if not (scores[number] >= LEAST_SCORE and x1 <= x2 and y1 <= y2):
            continue
        label = int(objects.labels[number])
        colour = UNKNOWN if label < 0 else tuple(int(part) for part in palette[label])
        # Dark colours would not show on dark images.
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=3)
        draw.rectangle((x1, y1, x2, y2), outline=colour)
        name = names[label] if label >= 0 and len(names) > 1 else ""
        text = f"{name} {scores[number]:.2f}".strip() if objects.scores is not None else name
        if not text:
            continue
        width = draw.textlength(text, font=font)
        left, top = max(2.0, min(x1 + 1, canvas.width - width - 2)), max(0.0, y1 - 16)
        draw.rectangle((left - 2, top, left + width + 1, top + 15), fill=colour)
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
        draw.text((left, top), text, font=font, fill="black" if bright else "white")
    return np.asarray(canvas)


def of_depth(index: int, image: Pixels, truth: NDArray[Any], found: NDArray[Any]) -> Picture:
    """Depth maps (h, w) in metres on one logarithmic scale, from the smallest to the largest true depth of the image.

    Args:
        index: The image's place in the test set.
        image: Of any size.
        truth: 0 where nobody knows it.
        found: Of the same size.
    """
    known = truth[truth > 0]
    near, far = (float(known.min()), float(known.max())) if known.size else (1.0, 10.0)
    size = _size(truth.shape)
    right, ours = (_resized(_coloured(each, near, far), size, Image.Resampling.NEAREST) for each in (truth, found))
    note = f"{near:.2g} to {far:.2g} m" if known.size else ""
    return Picture(index, _resized(image, size), right, ours, note)


def _coloured(depth: NDArray[Any], near: float, far: float) -> Pixels:
    import cv2  # late: pages read pictures and draw none

    known = depth > 0
    share = np.clip(np.log(np.where(known, depth, near) / near) / max(np.log(far / near), 1e-6), 0, 1)
    painted = cv2.applyColorMap(np.rint(255 * share).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return np.where(known[..., None], painted, np.array(UNKNOWN, np.uint8))


def _size(shape: Sequence[int]) -> tuple[int, int]:
    """Width and height of the picture of an image (h, w)."""
    factor = SIDE / max(shape[:2])
    return max(1, round(factor * shape[1])), max(1, round(factor * shape[0]))


def _resized(pixels: Pixels, size: tuple[int, int], resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Pixels:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, resampling))


# Files


def write_sheet(path: Path, sheet: Sheet) -> None:
    """One PNG, an image in every row: the image, the truth, what the student finds; it also says what is where."""
    sizes = [picture.image.shape[:2] for picture in sheet.pictures]
    whole = np.full((sum(height for height, _ in sizes), 3 * max(width for _, width in sizes), 3), 255, np.uint8)
    top = 0
    for picture, (height, width) in zip(sheet.pictures, sizes, strict=True):
        for column, part in enumerate((picture.image, picture.truth, picture.found)):
            whole[top : top + height, column * width : (column + 1) * width] = part
        top += height
    described = [
        {"index": picture.index, "size": size, "note": picture.note}
        for picture, size in zip(sheet.pictures, sizes, strict=True)
    ]
    told = PngInfo()
    told.add_text("kt", json.dumps({"key": sheet.key, "names": list(sheet.names), "pictures": described}))
    with replacing(path) as file:
        Image.fromarray(whole).save(file, format="png", pnginfo=told, optimize=True)


def read_sheet(path: Path) -> Sheet | None:
    """What `write_sheet` has written; None if there is no such file, or another one by now."""
    try:
        with Image.open(path) as file:
            told, whole = json.loads(file.info["kt"]), np.asarray(file)
    except (OSError, ValueError, KeyError, SyntaxError):  # the last is Pillow's, of a damaged PNG
        return None
    pictures, top = [], 0
    for each in told["pictures"]:
        height, width = each["size"]
        row = whole[top : top + height]
        image, truth, found = (row[:, column * width : (column + 1) * width] for column in range(3))
        pictures.append(Picture(each["index"], image, truth, found, each["note"]))
        top += height
    return Sheet(pictures, told["key"], told["names"])
