"""Datasets by name: embedded scenes, the usual benchmarks, and folders of one's own.

Importing this package imports no torch; building does, and for other tasks than classification mmdet and mmseg as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt.data.names import CLASSIFICATION, DATASETS, DatasetSpec, check_dataset
from kt.data.spec import Data, DataSpec
from kt.errors import needs_mm
from kt.settings import Dataset, defaults

if TYPE_CHECKING:
    import torch

__all__ = ["DATASETS", "Data", "DataSpec", "DatasetSpec", "build_data"]


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
        dataset: `name`, `task`, `image_size`, `augmentation` and what else differs from the defaults of
            `kt.settings.Dataset`.
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
    from kt.outside import load_outside  # which imports this package

    load_outside()
    dataset = {**defaults(Dataset), **dataset}
    check_dataset(dataset)
    options: dict[str, Any] = {"batch_size": batch_size, "device_batch": device_batch, "seed": seed}
    options |= {"rank": rank, "world": world}
    options["workers"] = min(8, os.cpu_count() or 1) if workers is None else workers
    if dataset["task"] == CLASSIFICATION:
        from kt.data.images import image_data

        return image_data(dataset, Path(data_root), cache_root, device=device, **options)
    needs_mm(f"dataset.task={dataset['task']}")
    from kt.data.dense import dense_data

    return dense_data(dataset, Path(data_root), cache_root, **options)
