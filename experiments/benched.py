"""What the benches time: a clock, methods on freshly drawn networks, and batches."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.groups import dataset_choice
from kt.classifier import Classifier
from kt.clock import seconds
from kt.data import DATASETS, DataSpec, build_data
from kt.dense import DenseModel
from kt.methods import build_method, find_method
from kt.models import build_network
from kt.models.names import DENSE_NETWORKS
from kt.settings import METHODS, kinds
from kt.stages import IMAGENET
from kt.transfer import TransferModel

CLASSES, SIZE = 100, 32
DENSE_CLASSES = {"detection": 8, "segmentation": 13, "keypoints": 7, "depth": 1}
DENSE_SIZE = (128, 256)
# Seconds by name: a processor's own are those to read where others compute beside, and one thread computes here.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(function: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one call takes, device work included."""
    start = seconds(device, clock)
    function()
    return seconds(device, clock) - start


def make_model(
    name: str, arguments: argparse.Namespace, size: int = SIZE, teacher_precision: str = "fp32", **options: Any
) -> TransferModel:
    """The method on freshly drawn networks (speed does not depend on weights).

    Args:
        name: The method.
        arguments: The bench's: which networks, and how many images the training set has.
        size: Side of the images that classifiers see.
        teacher_precision: `fp32` or `bf16`.
        options: The method's.
    """
    torch.manual_seed(0)
    if arguments.student in DENSE_NETWORKS:
        student, teacher, facts = *_dense_networks(name, arguments), None
    else:
        student, teacher, facts = _classifiers(name, arguments, size)
    if facts is not None and "first_epochs" in kinds(METHODS[name]):
        options["first_epochs"] = 0  # what is timed is the step that comes after them
    method = build_method(name, student, teacher, data=facts, **options)
    return TransferModel(
        student, method, {"teacher": teacher} if teacher else None, teacher_precision=teacher_precision
    )


def _classifiers(name: str, arguments: argparse.Namespace, size: int) -> tuple[Classifier, Classifier | None, DataSpec]:
    """Student, teacher, and the facts of as many images as the bench says."""
    settings = {"num_classes": CLASSES, "image_size": size, "small_stem": arguments.small_stem}
    student_name = arguments.teacher if find_method(name).starts_from_teacher else arguments.student
    student = Classifier(build_network(student_name, **settings))
    teacher = Classifier(build_network(arguments.teacher, **settings)) if METHODS[name].needs_teacher else None
    labels = labels_of(max(arguments.images, arguments.batch))
    return student, teacher, DataSpec("images", CLASSES, size, *IMAGENET, len(labels), 0, (), labels=labels)


def _dense_networks(name: str, arguments: argparse.Namespace) -> tuple[DenseModel, DenseModel | None]:
    """Detectors, segmentors, pose or depth networks."""
    from experiments.build import build_dense_model

    def make(network: str) -> DenseModel:
        settings = {"name": network, "width": arguments.width, "config": None, "options": None}
        return build_dense_model(settings, DENSE_CLASSES[DENSE_NETWORKS[network].task], DENSE_SIZE, IMAGENET)[0]

    student = make(arguments.student)
    return student, make(arguments.teacher) if METHODS[name].needs_teacher else None


def dense_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Embedded scenes for the student's task."""
    task = DENSE_NETWORKS[arguments.student].task
    able = next(name for name, spec in DATASETS.items() if spec.embedded and task in spec.readers)
    dataset = {**dataset_choice(able), "task": task, "image_size": list(DENSE_SIZE)}
    dataset |= {"train_size": arguments.batch, "test_size": 1, "augmentation": "none"}
    data = build_data(dataset, ".", batch_size=arguments.batch, seed=0)
    return next(data.train.epoch(0))


def labels_of(images: int) -> NDArray[np.int64]:
    """The classes of so many images."""
    return np.arange(images) % CLASSES


def image_batch(count: int, device: torch.device, size: int = SIZE) -> dict[str, Any]:
    """So many random images to classify, of a side of `size` pixels."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {
        "inputs": images.to(device).contiguous(memory_format=torch.channels_last),
        "labels": torch.from_numpy(labels_of(count)).to(device),
        "indices": torch.arange(count, device=device),
    }
