"""What a dataset is to all that train on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass
class DataSpec:
    """What networks, methods and results need to know about a dataset.

    Attributes:
        train_size, test_size: Images that take part.
        largest_index: Of the training images' `indices`, which have gaps where only some images take part.
        labels: The class of each training image by its index, (largest_index + 1,), -1 in the gaps; of a classification
            set.
    """

    name: str
    num_classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int
    test_size: int
    class_names: tuple[str, ...]
    task: str = "classification"
    largest_index: int | None = None
    labels: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)


@dataclass
class Data:
    """A dataset ready for training.

    Attributes:
        spec: What it is.
        train, test: Loaders (`kt.data.loaders.Loader`, `kt.data.dense.DenseLoader`).
        score: Metrics in percent (of depth also in metres) of a student on the whole test set, over all processes. A
            second argument, `kt.evaluation.outcomes.Outcomes`, gets what the task's score leaves beside them; another
            `loader` takes the test set's place.
        further: Loaders of other images that a method draws from, by name (`m2a2s`: `source`).
    """

    spec: DataSpec
    train: Any
    test: Any
    score: Callable[..., dict[str, float]]
    further: dict[str, Any] = field(default_factory=dict)
