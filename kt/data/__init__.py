"""Datasets by name: embedded scenes, the usual benchmarks, and folders of one's own.

Importing this package imports no torch; building does, and for other tasks than classification mmdet and mmseg as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt.data.names import CLASSIFICATION, DATASETS, DatasetSpec, check_dataset, settings_of
from kt.data.spec import Data, DataSpec
from kt.errors import UserError, needs_mm
from kt.files import at_home
from kt.settings import Schedule, as_lists, check_settings, check_value, defaults, shown

if TYPE_CHECKING:
    import torch

    from kt.data.loaders import Loader

__all__ = ["DATASETS", "Data", "DataSpec", "DatasetSpec", "build_data", "unlabelled"]


def _checked(dataset: str | Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's whole config."""
    from kt.outside import load_outside  # which imports this package

    load_outside()
    if not isinstance(dataset, str | Mapping):
        raise UserError(f"dataset={shown(dataset)}: expected a dataset's name, or its settings")
    given = {"name": dataset} if isinstance(dataset, str) else {key: as_lists(each) for key, each in dataset.items()}
    schema = settings_of(given)
    own = dict(DATASETS[given["name"]].defaults) if "name" in given else {}
    own.pop("num_classes", None)  # a check of the published data: own data may have others
    if given.get("task", own.get("task")) != own.get("task"):
        own = {}  # they are of another task
    whole = {**defaults(schema), **{key: as_lists(each) for key, each in own.items()}, **given}
    check_settings(whole, schema, "dataset.")
    check_dataset(whole)
    return whole


def build_data(
    dataset: str | Mapping[str, Any],
    data_root: str | os.PathLike[str] = "data",
    *,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    device_batch: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    cache_root: Path | None = None,
) -> Data:
    """Loaders and scores for a dataset's config.

    Args:
        dataset: Its name, or its `name` and what differs from that choice's defaults: `image_size`, `augmentation` and
            the other keys of its settings (`kt.settings.Dataset`, if it has none of its own); a tuple is as good as a
            list. Where there are no such defaults, `task`, `image_size` and `augmentation` have to be given.
        data_root: Where real datasets lie.
        batch_size: Images of an update, over all processes and passes.
        seed: Of order and augmentation (never of the split or of the embedded images).
        device: Where batches of classification go; those of other tasks stay on the CPU.
        device_batch: Images of a pass; None is the batch size over the processes.
        rank, world: This process among all.
        workers: Loading processes of sets of files; by default one per core, eight at most.
        cache_root: Where drawn images and derived annotations may be kept.

    Returns:
        See `kt.data.images.image_data` and `kt.data.dense.dense_data`.

    Raises:
        UserError: Something is wrong with the config or with the files.
    """
    config = _checked(dataset)
    asked = {"batch_size": batch_size, "device_batch": device_batch}
    for key, value in asked.items():
        check_value(value, Schedule, key, key)
    options: dict[str, Any] = {**asked, "seed": seed}
    options |= {"rank": rank, "world": world}
    options["workers"] = min(8, os.cpu_count() or 1) if workers is None else workers
    if config["task"] == CLASSIFICATION:
        from kt.data.images import image_data

        return image_data(config, at_home(data_root), cache_root, device=device, **options)
    needs_mm(f"dataset.task={config['task']}")
    from kt.data.dense import dense_data

    return dense_data(config, at_home(data_root), cache_root, **options)


def unlabelled(
    dataset: str | Mapping[str, Any],
    share: float,
    data_root: str | os.PathLike[str],
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    cache_root: Path | None = None,
) -> Loader:
    """A loader of training images of a dataset for classification whose labels nobody is to read.

    Args:
        dataset: As for `build_data`; the dataset `unlabelled` takes any folder of images.
        share: Share of the training images that take part, drawn once and for all.
        data_root, batch_size, seed, device, rank, world, workers, cache_root: As for `build_data`.

    Raises:
        UserError: Something is wrong with the config or with the files.
    """
    from kt.data.images import unlabelled_loader

    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "seed": seed, "rank": rank, "world": world}
    options["workers"] = min(8, os.cpu_count() or 1) if workers is None else workers
    return unlabelled_loader(_checked(dataset), share, at_home(data_root), cache_root, **options)
