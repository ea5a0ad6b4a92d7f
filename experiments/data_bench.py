"""`python -m experiments.bench --data`: images per second of loaders and of scoring beside those of a KD step.

Sets of image files are drawn into a temporary folder, small ones as of CIFAR-100 and large ones as of ImageNet, and
read as `dataset=imagefolder` reads them: kept in memory, or streamed from the disk. What is timed is an epoch's batches
after the first one, as training draws them and as scoring does; scoring itself; and, in turn with them, the step that
the batches are for.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from experiments.benched import CLOCKS, SIZE, image_batch, make_model, timed
from kt.data import Data, build_data
from kt.data.loaders import Loader
from kt.engine import Engine, measured_loop
from kt.settings import Schedule, defaults

FOLDER = "drawn"
LARGE = ("resnet34", "resnet18")  # teacher and student of large images
CLASSES = 4  # folders; how many makes no difference


@dataclass(frozen=True)
class Kind:
    """Images of one kind.

    Attributes:
        side: Of the squares that networks see, in pixels.
        shape: Of the files: height and width.
        suffix: Of the files' names, which says the format.
        augmentation: As training has it.
        teacher, student: Between which KD is timed.
        batch: Images of its step and of the loaders' batches.
    """

    side: int
    shape: tuple[int, int]
    suffix: str
    augmentation: str
    teacher: str
    student: str
    batch: int


def kinds_of(arguments: argparse.Namespace) -> list[Kind]:
    """Small images for the bench's networks and batch, and large ones for torchvision's, an eighth of them a step."""
    small = Kind(SIZE, (SIZE, SIZE), "png", "crop_flip", arguments.teacher, arguments.student, arguments.batch)
    shape = (375, 500)  # about the mean of ImageNet's files
    large = Kind(224, shape, "jpg", "imagenet", *LARGE, max(2, arguments.batch // 8))
    return [small, large]


def draw_images(folder: Path, kind: Kind, count: int) -> None:
    """Writes smooth images, which compress about as photographs do, half of them to test on."""
    random = np.random.default_rng(0)
    for split, number in itertools.product(("train", "val"), range(count)):
        coarse = random.integers(0, 256, (max(2, kind.shape[0] // 8), max(2, kind.shape[1] // 8), 3), np.uint8)
        path = folder / FOLDER / split / f"class{number % CLASSES}" / f"{number:05}.{kind.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize(kind.shape[::-1], Image.Resampling.BICUBIC).save(path)


def batches(loader: Loader, epoch: int) -> Iterator[Any]:
    """An epoch's batches but for the first, for which the loader is set up."""
    found = iter(loader.epoch(epoch))
    next(found)
    return found


def bench_data(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Medians of images per second; prints them and returns them."""
    rows = [row for kind in kinds_of(arguments) for row in _bench_kind(kind, arguments)]
    table = Table(title=f"images/s, {torch.get_num_threads()} threads, {arguments.workers} processes that read files")
    for column in ("images", "read", "training batches", "test batches", "scoring", "KD step", "batches/step"):
        table.add_column(column, justify="left" if column in ("images", "read") else "right")
    for row in rows:
        rates = [f"{row[key]:.0f}" for key in ("train", "test", "scoring", "step")]
        table.add_row(f"{row['side']}x{row['side']}", row["read"], *rates, f"{row['train'] / row['step']:.1f}")
    console.print(table)
    return rows


def _bench_kind(kind: Kind, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one kind of images, resident and streamed."""
    device = torch.device(arguments.device)
    time = partial(timed, device=device, clock=CLOCKS[arguments.clock])
    chosen = argparse.Namespace(**{**vars(arguments), "teacher": kind.teacher, "student": kind.student})
    count = kind.batch * (arguments.batches + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder, kind, count)
        dataset = {"name": "imagefolder", "task": "classification", "folder": FOLDER, "image_size": kind.side}
        dataset |= {"augmentation": kind.augmentation}
        options: dict[str, Any] = {"batch_size": kind.batch, "seed": 0, "device": device, "workers": arguments.workers}
        read = {
            how: build_data({**dataset, "resident": kept}, folder, **options)
            for how, kept in (("resident", True), ("streamed", False))
        }
        model = make_model("kd", chosen, size=kind.side)
        batch = image_batch(kind.batch, device, kind.side)
        engine = Engine({**defaults(Schedule), "lr": arguments.lr}, device, folder)
        loop = measured_loop(model, model.method.phases()[-1], batch, engine)
        taken: dict[tuple[str, str], list[float]] = {}
        for turn in range(arguments.warmup + arguments.steps):
            seconds = {("", "step"): time(partial(loop.advance, batch)) / kind.batch}
            for how, data in read.items():
                for what, (function, images) in _parts(data, model.student, kind, arguments, turn).items():
                    seconds[how, what] = time(function) / images
            for key, value in seconds.items():
                if turn >= arguments.warmup:
                    taken.setdefault(key, []).append(value)
    rates = {key: 1 / statistics.median(values) for key, values in taken.items()}
    return [
        {"side": kind.side, "read": how, "step": rates["", "step"], **{what: rates[how, what] for what in MEASURED}}
        for how in read
    ]


MEASURED = ("train", "test", "scoring")


def _parts(
    data: Data, student: Any, kind: Kind, arguments: argparse.Namespace, turn: int
) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed of a set, and of how many images it is."""
    count = kind.batch * arguments.batches

    def drain(found: Iterator[Any]) -> None:
        for _ in found:
            pass

    return {
        "train": (partial(drain, batches(data.train, turn)), count),
        "test": (partial(drain, batches(data.test, 0)), count),
        "scoring": (partial(data.score, student), count + kind.batch),
    }
