"""Depth from images: the embedded scenes, NYUv2 in Sparse-to-Dense's files, and folders of one's own.

In a sample, `gt_seg_map` holds metres, float32 (h, w), 0 where nobody knows them: so mmcv's transforms move it with the
image, by nearest neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmseg.structures import SegDataSample
from numpy.typing import NDArray
from PIL import ImageOps

from kt.data import scenes
from kt.data.cache import drawn as cached
from kt.data.dense_folders import pairs_of
from kt.data.dense_scenes import ReadScene, ReadSemantic, scene_seed
from kt.data.dense_source import ReadImage, SegmentationList, Source, missing, no_images
from kt.data.images import opened
from kt.errors import UserError
from kt.files import find

NAMES = ("depth",)
MILLIMETRES = 1000
# The embedded street is a model at a tenth of its size: as deep as a room, so that settings for rooms fit it.
MODEL_SCALE = 10
# Beyond the furthest objects, in the scenes' own metres, nothing is measured: errors there would hide all others.
REACH = scenes.FARTHEST_OBJECT
# Sparse-to-Dense's training images: turned by so many degrees at most, enlarged by up to so much, and with
# brightness, contrast and saturation times 1 - JITTER to 1 + JITTER.
LARGEST_ANGLE, LARGEST_ZOOM, JITTER = 5.0, 1.5, 0.4
# What it leaves out of NYUv2's images on every side, of 480 x 640 pixels: a white frame.
FRAME = (12, 16)
NYU_LAYOUT = (
    "nyudepthv2/train/<scene>/*.h5 and nyudepthv2/val/official/*.h5 "
    "(http://datasets.lids.mit.edu/sparse-to-dense/data/nyudepthv2.tar.gz)"
)


# Reading


class ReadDepth(BaseTransform):
    """Reads a depth map of 16 bit in millimetres, turned by its EXIF tag as images are."""

    def transform(self, results: dict) -> dict:
        """Adds `gt_seg_map`.

        Raises:
            UserError: It cannot be read, has not 16 bit and one channel, or another size than its image.
        """
        path = results["depth_path"]
        with opened(path) as image:
            mode, depth = image.mode, np.asarray(ImageOps.exif_transpose(image))
        if not mode.startswith("I"):
            raise UserError(f"{path}: is an image of the kind {mode}; expected 16 bit and one channel, millimetres")
        if depth.shape != results["img"].shape[:2]:
            sizes = (" x ".join(map(str, each)) for each in (depth.shape, results["img"].shape[:2]))
            raise UserError(f"{path}: has {next(sizes)} pixels; expected its image's {next(sizes)}")
        results["gt_seg_map"] = depth.astype(np.float32) / MILLIMETRES
        return results


class ReadPair(BaseTransform):
    """Reads image and depth of a file of Sparse-to-Dense's: `rgb`, uint8 (3, h, w), and `depth`, (h, w) in metres."""

    def transform(self, results: dict) -> dict:
        """Adds `img`, `gt_seg_map` and their shapes, without NYUv2's frame.

        Raises:
            UserError: It cannot be read, or holds arrays of another form.
        """
        import h5py

        path = results["img_path"]
        try:
            with h5py.File(path, "r") as file:
                image, depth = np.asarray(file["rgb"]), np.asarray(file["depth"])
        except (OSError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read ({reason}); expected HDF5 with rgb and depth") from None
        fits = image.dtype == np.uint8 and np.issubdtype(depth.dtype, np.floating) and image.shape == (3, *depth.shape)
        if not fits or depth.ndim != 2:
            found = " and ".join(
                f"{name} {each.dtype} {each.shape}" for name, each in (("rgb", image), ("depth", depth))
            )
            raise UserError(f"{path}: holds {found}; expected rgb uint8 (3, h, w) and depth (h, w) of floats")
        if (depth < 0).any():
            raise UserError(f"{path}: holds depth below 0 ({depth[depth < 0].min()}); expected metres, or 0")
        inner = tuple(slice(each, -each) for each in FRAME)
        results["img"] = np.ascontiguousarray(image[::-1].transpose(1, 2, 0)[inner])
        # What is no number has no depth either: 0, as where nothing was measured.
        results["gt_seg_map"] = np.nan_to_num(depth[inner].astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        results["img_shape"] = results["ori_shape"] = results["img"].shape[:2]
        return results


# Training images


class CutMiddle(BaseTransform):
    """Cuts image and depth to the largest part in the middle that has the proportions of a size.

    Args:
        size: Height and width.
    """

    def __init__(self, size: Sequence[int]):
        self.size = size

    def transform(self, results: dict) -> dict:
        """Replaces `img` and `gt_seg_map`."""
        whole = results["img"].shape[:2]
        factor = min(side / wanted for side, wanted in zip(whole, self.size, strict=True))
        kept = [round(factor * wanted) for wanted in self.size]
        first = [(side - part) // 2 for side, part in zip(whole, kept, strict=True)]
        part = tuple(slice(start, start + length) for start, length in zip(first, kept, strict=True))
        results["img"], results["gt_seg_map"] = (np.ascontiguousarray(results[k][part]) for k in ("img", "gt_seg_map"))
        results["img_shape"] = results["img"].shape[:2]
        return results


class Approach(BaseTransform):
    """Turns an image and enlarges it about its middle, which brings everything nearer, and changes its colours.

    Enlarged by s, an image is that of a camera from which every point is 1 / s as far away at the same distance from
    the optical axis. Sparse-to-Dense, whose ranges these are, enlarges all of its training images by another 250 / 240,
    for which it does not correct the depth; not here.
    """

    def transform(self, results: dict) -> dict:
        """Replaces `img` and `gt_seg_map`."""
        zoom = np.random.uniform(1, LARGEST_ZOOM)
        turn = turning(results["img"].shape[:2], np.random.uniform(-LARGEST_ANGLE, LARGEST_ANGLE), zoom)
        results["img"] = jittered(turned(results["img"], turn, cv2.INTER_LINEAR))
        results["gt_seg_map"] = turned(results["gt_seg_map"], turn, cv2.INTER_NEAREST) / np.float32(zoom)
        return results


def turning(size: Sequence[int], angle: float, zoom: float) -> NDArray[np.float64]:
    """The map (2, 3) of pixels (x, y, 1) of an image of height and width when it turns by degrees and is enlarged."""
    height, width = size
    return np.asarray(cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, zoom))


def turned(image: NDArray[Any], turn: NDArray[np.float64], interpolation: int) -> NDArray[Any]:
    """An image or depth map under `turning`; what comes from outside of it is 0."""
    return np.asarray(cv2.warpAffine(image, turn, image.shape[1::-1], flags=interpolation))


def jittered(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image (h, w, 3), BGR, with other brightness, contrast and saturation, changed in random order."""
    pixels = image.astype(np.float32)
    for kind in np.random.permutation(3):
        factor = np.float32(np.random.uniform(1 - JITTER, 1 + JITTER))
        grey = pixels @ np.array([0.114, 0.587, 0.299], np.float32)
        anchor = (np.float32(0), grey.mean(), grey[..., None])[kind]
        pixels = np.clip(anchor + factor * (pixels - anchor), 0, 255)
    return np.rint(pixels).astype(np.uint8)


class PackDepth(BaseTransform):
    """Packs an image with its depth, `gt_depth`, and measured pixels of it, `sparse_depth`: float (h, w), 0 elsewhere.

    Args:
        samples: How many pixels are measured, on average; 0 for no `sparse_depth`.
        fixed: Whether an image always has the same ones.
    """

    def __init__(self, samples: int, fixed: bool):
        self.samples, self.fixed = samples, fixed

    def transform(self, results: dict) -> dict:
        """`inputs`, uint8 (3, h, w) in BGR, and `data_samples`."""
        depth = results["gt_seg_map"]
        sample = SegDataSample()
        sample.gt_depth = torch.from_numpy(depth.copy())
        if self.samples:
            rng = np.random.default_rng(results["sample_idx"]) if self.fixed else np.random
            sample.sparse_depth = torch.from_numpy(measured(depth, self.samples, rng.uniform(size=depth.shape)))
        sample.set_metainfo({key: results[key] for key in ("img_shape", "ori_shape", "flip") if key in results})
        return {"inputs": torch.from_numpy(results["img"].transpose(2, 0, 1).copy()), "data_samples": sample}


def measured(depth: NDArray[np.float32], samples: int, drawn: NDArray[np.float64]) -> NDArray[np.float32]:
    """Depth (h, w) at so many of its known pixels on average, and 0 elsewhere.

    Args:
        depth: (h, w), 0 where it is not known.
        samples: How many.
        drawn: Of each pixel a number, uniform over 0..1.

    Source: Ma and Karaman, "Sparse-to-Dense", 2018, section III-C: each known pixel alike and independently.
    """
    known = depth > 0
    return np.where(known & (drawn * known.sum() < samples), depth, np.float32(0))


# Datasets


def read_scenes(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """The scenes of segmentation with their depth, at a tenth of its scale; the sky, and all that is as far, has none.

    Nothing is read from `root`.
    """
    style, (height, width) = scenes.check_style(dataset["style"]), dataset["image_size"]
    parts = {split: _drawn(dataset[f"{split}_size"], height, width, style, split, cache) for split in ("train", "test")}
    images, depths = ({split: part[key] for split, part in parts.items()} for key in ("images", "depth"))
    samples = {
        split: [{"split": split, "number": number} for number in range(len(part))] for split, part in images.items()
    }
    return _source(samples, ReadScene(images), [ReadSemantic(depths)], resident=True)


def _drawn(
    count: int, height: int, width: int, style: str, split: str, cache: Path | None
) -> Mapping[str, NDArray[Any]]:
    """Scenes, which the cache keeps: `images`, 8 bit BGR (n, h, w, 3), and `depth` in metres, float32 (n, h, w)."""
    seed = scene_seed("segmentation", style, split)

    def draw() -> dict[str, NDArray[Any]]:
        found = [scenes.draw_scene(seed, number, height, width, style) for number in range(count)]
        depth = np.stack([scene.depth for scene in found])
        near = np.where(depth <= REACH, depth / MODEL_SCALE, 0)
        return {"images": np.stack([scene.image[..., ::-1] for scene in found]), "depth": near.astype(np.float32)}

    name = f"depth-{style}-{height}x{width}-{seed}-{count}"
    return cached(cache, name, (scenes.__file__, __file__), draw)


def read_depthfolder(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """images/<split>/*.png|jpg with depth/<split>/*.png of the same names, 16 bit in millimetres, 0 for no reading.

    Raises:
        UserError: A file is missing.
    """
    layout = "images/<split>/*.png|jpg and depth/<split>/*.png of the same names, 16 bit in millimetres (your own)"
    samples = pairs_of(dataset, root, layout, ("depth", "depth_path"))
    if not any(_is_known(sample["depth_path"]) for sample in samples["train"]):
        place = Path(samples["train"][0]["depth_path"]).parent
        raise UserError(f"{place}: no pixel has a depth; expected millimetres, 0 only where there is no reading")
    return _source(samples, ReadImage(), [ReadDepth()])


def _is_known(path: str) -> bool:
    """Whether any pixel of a depth map has a depth."""
    with opened(path) as image:
        return bool(np.asarray(image).any())


def read_nyuv2(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """NYUv2 as the authors of Sparse-to-Dense packed it.

    Raises:
        UserError: h5py or a folder is missing.
    """
    try:
        import h5py  # noqa: F401 - whoever reads other data does without it
    except ImportError:
        raise UserError("dataset=nyuv2: its files are HDF5; expected the package h5py (pip install h5py)") from None
    samples: dict[str, list[dict[str, Any]]] = {}
    for part, split in (("train", "train"), ("test", "val")):
        place = root / "nyudepthv2" / split
        if not place.is_dir():
            raise missing(root, place, NYU_LAYOUT)
        samples[part] = [{"img_path": str(path)} for path in sorted(find(place, "*/*.h5"))]
        if not samples[part]:
            raise no_images(root, place, NYU_LAYOUT)
    return _source(samples, ReadPair(), [])


def _source(
    samples: Mapping[str, Sequence[dict[str, Any]]], load_image: Any, load_labels: list[Any], resident: bool = False
) -> Source:
    def open_split(split: str, pipeline: list[Any], training: bool) -> BaseDataset:
        common: dict[str, Any] = {"metainfo": {"classes": NAMES}, "pipeline": pipeline, "test_mode": True}
        # Serialising is for loading processes, and there are none for what is in memory.
        return SegmentationList(samples[split], serialize_data=not resident, **common)

    return Source(open_split, NAMES, load_image, load_labels, resident=resident)
