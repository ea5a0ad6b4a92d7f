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
from kt.errors import needs_mm
from kt.files import at_home
from kt.settings import as_lists, check_settings, defaults

if TYPE_CHECKING:
    import torch

    from kt.data.loaders import Loader

__all__ = ["DATASETS", "Data", "DataSpec", "DatasetSpec", "build_data", "unlabelled"]


def _checked(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's whole config."""
    from kt.outside import load_outside  # which imports this package

    load_outside()
    schema = settings_of(dataset)
    whole = {**defaults(schema), **{key: as_lists(value) for key, value in dataset.items()}}
    check_settings(whole, schema, "dataset.")
    check_dataset(whole)
    return whole


def build_data(
    dataset: Mapping[str, Any],
    data_root: str | os.PathLike[str],
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    device_batch: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    cache_root: Path | None = None,
) -> Data:
    """Loaders and scores for a dataset's config.

    Args:
        dataset: `name`, `task`, `image_size`, `augmentation` and what else differs from the defaults of its settings
            (`kt.settings.Dataset`, if it has none of its own); a tuple is as good as a list.
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
    dataset = _checked(dataset)
    options: dict[str, Any] = {"batch_size": batch_size, "device_batch": device_batch, "seed": seed}
    options |= {"rank": rank, "world": world}
    options["workers"] = min(8, os.cpu_count() or 1) if workers is None else workers
    if dataset["task"] == CLASSIFICATION:
        from kt.data.images import image_data

        return image_data(dataset, at_home(data_root), cache_root, device=device, **options)
    needs_mm(f"dataset.task={dataset['task']}")
    from kt.data.dense import dense_data

    return dense_data(dataset, at_home(data_root), cache_root, **options)


def unlabelled(
    dataset: Mapping[str, Any],
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
    dataset = _checked(dataset)
    from kt.data.images import unlabelled_loader

    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "seed": seed, "rank": rank, "world": world}
    options["workers"] = min(8, os.cpu_count() or 1) if workers is None else workers
    return unlabelled_loader(dataset, share, at_home(data_root), cache_root, **options)
