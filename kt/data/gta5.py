"""GTA5: rendered street scenes with the 19 classes of Cityscapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from kt.data.cityscapes import STUFF_AND_THINGS, ToTrainIds
from kt.data.dense_source import ReadImage, ReadMap, SegmentationList, Source, missing, no_images
from kt.errors import UserError
from kt.files import find

LAYOUT = (
    "the official gta5/images/*.png and gta5/labels/*.png of the same names (https://download.visinf.tu-darmstadt.de/"
    "data/from_games)"
)
VALIDATION_SIZE, VALIDATION_SEED = 500, 0


def split_names(names: Sequence[str], validation: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Training and validation images, both in the order of their names.

    Args:
        names: All images.
        validation: Those to validate on. By default 500 (a tenth of fewer than 5000, but at least one), drawn from
            the sorted names with seed 0: GTA5 has no validation set for this purpose, so every study draws its own.
    """
    ordered = sorted(names)
    if validation is None:
        count = min(VALIDATION_SIZE, max(1, len(ordered) // 10))
        chosen = np.random.default_rng(VALIDATION_SEED).choice(len(ordered), count, replace=False)
        validation = [ordered[index] for index in chosen]
    held = set(validation)
    return [name for name in ordered if name not in held], [name for name in ordered if name in held]


def read_gta5(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Source:
    """GTA5 for segmentation; label ids of Cityscapes become train ids.

    The validation images are those that `gta5/val.txt` names, one a line, where it exists; see `split_names`.

    Raises:
        UserError: A folder or file is missing.
    """
    folder = root / "gta5"
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise missing(root, folder / part, LAYOUT)
    names = [path.name for path in find(folder / "images", "*.png")]
    if len(names) < 2:
        raise no_images(root, folder / "images", LAYOUT)
    validation, listed = None, folder / "val.txt"
    if listed.exists():
        text = listed.read_text(encoding="utf-8-sig", errors="replace")
        validation = [Path(line.strip()).stem + ".png" for line in text.splitlines() if line.strip()]
        strangers = sorted(set(validation) - set(names))
        if strangers or not validation:
            problem = f"names {strangers[0]}, which is not in {folder / 'images'}" if strangers else "is empty"
            raise UserError(f"{listed}: {problem}; expected one image name a line (or no such file)")
    labelled = {path.name for path in find(folder / "labels", "*.png")}
    unlabelled = sorted(set(names) - labelled)
    if unlabelled:
        raise missing(root, folder / "labels" / unlabelled[0], LAYOUT)
    splits = dict(zip(("train", "test"), split_names(names, validation), strict=True))

    def open_split(split: str, pipeline: list[Any], training: bool) -> BaseDataset:
        samples = [
            {"img_path": str(folder / "images" / name), "seg_map_path": str(folder / "labels" / name)}
            for name in splits[split]
        ]
        return SegmentationList(samples, metainfo={"classes": STUFF_AND_THINGS}, pipeline=pipeline, test_mode=True)

    return Source(open_split, STUFF_AND_THINGS, ReadImage(), [ReadMap(), ToTrainIds()])
