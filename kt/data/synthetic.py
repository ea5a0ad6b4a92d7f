"""Images in the place of a dataset that is not there: of its shape, number and classes, for rehearsals only.

`stand_in` lets a dataset's entry read these. They show nothing; a training step takes as long on them as on others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kt.data.names import CLASSIFICATION, DATASETS
from kt.errors import UserError
from kt.files import replacing

if TYPE_CHECKING:
    from kt.data.dense_source import Source
    from kt.data.images import Images

DISTINCT = 4  # images that are drawn; all others are these again


def stand_in(name: str) -> None:
    """From now on, in this process, a dataset consists of such images; an embedded one is drawn anyway."""
    spec = DATASETS[name]
    if not spec.embedded:
        DATASETS[name] = dataclasses.replace(spec, readers=dict.fromkeys(spec.readers, f"{__name__}:read"))


def is_stood_in(name: str) -> bool:
    """Whether a dataset consists of such images, or of others that need no files."""
    return DATASETS[name].embedded or f"{__name__}:read" in DATASETS[name].readers.values()


def read(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images | Source:
    """Both splits of a dataset's config; nothing is read from `root`.

    Raises:
        UserError: Nobody has published how many images or classes it has.
    """
    spec, name = DATASETS[dataset["name"]], dataset["name"]
    sizes = spec.published.get(dataset.get("domain") or "")
    classes = dataset["num_classes"] or spec.classes
    if sizes is None:
        raise UserError(f"dataset.name={name}: only its files tell how many images it has; put them below data_root")
    if classes is None:
        raise UserError(f"dataset.num_classes=null: only the files of {name} tell how many; set it")
    names = tuple(f"class {number}" for number in range(classes))
    if dataset["task"] == CLASSIFICATION:
        assert cache is not None
        return _classified(dataset["image_size"], sizes, names, cache)
    return _dense(dataset, root, cache, sizes, names)


def _classified(side: int, sizes: tuple[int, int], names: tuple[str, ...], folder: Path) -> Images:
    """One file for all: a million images in memory are more than a machine has, and as many names it always keeps."""
    from PIL import Image

    from kt.data.images import Images

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"synthetic-{side}.png"
    if not path.exists():
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        with replacing(path) as file:
            Image.fromarray(pixels).save(file, "PNG")
    train, test = (_OneFile(path, size, len(names)) for size in sizes)
    return Images(train, test, names)


class _OneFile(Sequence[tuple[Path, int]]):
    """The same file under each label in turn; a list of a million pairs is seconds of garbage collection."""

    def __init__(self, path: Path, length: int, classes: int):
        self.path, self.length, self.classes = path, length, classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.path, range(self.length)[index] % self.classes

    def __iter__(self) -> Iterator[tuple[Path, int]]:
        return zip(repeat(self.path, self.length), cycle(range(self.classes)))


class _Again:
    """A dataset's samples over and over, up to a number."""

    def __init__(self, dataset: Any, length: int):
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]


def _dense(
    dataset: Mapping[str, Any], root: Path, cache: Path | None, sizes: tuple[int, int], names: tuple[str, ...]
) -> Source:
    """Street scenes, whose labels are some of the classes."""
    drawn = {**dataset, "style": "photo", "train_size": DISTINCT, "test_size": DISTINCT}
    if dataset["task"] == "depth":
        from kt.data.depth import read_scenes
    else:
        from kt.data.dense_scenes import read_scenes
    few: Source = read_scenes(drawn, root, cache)
    lengths = dict(zip(("train", "test"), sizes, strict=True))

    def open_split(split: str, pipeline: list[Any], training: bool) -> Any:
        return _Again(few.open(split, pipeline, training), lengths[split])

    return dataclasses.replace(few, open=open_split, class_names=names)
