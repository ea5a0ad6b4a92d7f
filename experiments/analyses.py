"""Analyses of finished cells, as `evaluation=<name>` asks for them: they train nothing and leave numbers and maps.

The names and what each needs beside the cell's own needs are in `experiments.schema.ANALYSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.build import build_teacher, needed_networks, read_data, set_threads
from experiments.devices import pick_device
from experiments.schema import MAPS
from kt.classifier import Classifier
from kt.data import Data
from kt.features import Features
from kt.files import replacing
from kt.functional import channel_divergence, channel_overlap, feature_l2
from kt.methods.kcd import FILE, ChannelTransform, LearnedTransform, read_transform
from kt.needs import WEIGHTS
from kt.ranks import is_first, sum_over_ranks
from kt.stages import as_map
from kt.students import load_model
from kt.transfer import freeze_teacher

Maps = Callable[[Tensor, Tensor], Tensor]  # inputs and labels -> maps (n, c, h, w)

OVERLAPS = (10, 20, 50, 100)
OVERLAP_CHANNELS = 1280  # the channels that these numbers are printed for
SHOWN_CLASS = "boy"  # of Figure 1; data without it show their first class


def analyse_cell(config: Mapping[str, Any], folder: Path, needs: Mapping[str, Path]) -> dict[str, Any]:
    """The numbers of a cell's analysis, and `labels` for those that mean something else than their names.

    Args:
        config: The cell's settled config; `evaluation` names the analysis.
        folder: The cell's folder.
        needs: Files of weights: `teacher` and what the analysis needs.
    """
    device = pick_device(config["device"])
    set_threads(config)
    data = read_data(config, config["dataset"], device)
    teacher = build_teacher(config, data.spec, needs["teacher"]) if "teacher" in needs else None
    networks: dict[str, Any] = {**needed_networks(needs, data.spec), "own": load_model(folder / WEIGHTS, "evaluation")}
    if teacher is not None:
        networks["teacher"] = teacher
    for network in networks.values():
        freeze_teacher(network.to(device).to(memory_format=network.memory_format))
    return ANALYSES[config["evaluation"]](networks, folder, data, device)


def last_map(network: Classifier) -> Maps:
    """The last stage's map before its last ReLU."""
    return lambda inputs, labels: as_map(Features(network, inputs).before(-1))


def transformed(network: Classifier, folder: Path, channels: int, classes: int, device: torch.device) -> Maps:
    """A teacher's map under the transform that a cell has kept; without one its first channels.

    Args:
        network: The teacher.
        folder: The cell's folder.
        channels: How many channels are compared.
        classes: Of the data.
        device: Where maps are.
    """
    plain = last_map(network)
    if not (folder / FILE).exists():
        return lambda inputs, labels: plain(inputs, labels)[:, :channels]
    kept = read_transform(folder)
    state = kept["transform"]
    transform: ChannelTransform | LearnedTransform
    if "channels" in state:
        groups, after = state["channels"].shape
        transform = ChannelTransform(groups, after)
    else:
        after, before = state["linear.weight"].shape[:2]
        groups, transform = 1, LearnedTransform(kept["strategy"], before, after)
    transform.load_state_dict(state)
    transform.eval().requires_grad_(False).to(device)
    return lambda inputs, labels: transform(plain(inputs, labels), labels * groups // classes)[:, :channels]


def pairs_of_maps(data: Any, ours: Maps, theirs: Maps) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Labels and both networks' maps, a batch at a time."""
    for batch in data.epoch(0):
        inputs, labels = batch["inputs"], batch["labels"]
        yield labels, ours(inputs, labels), theirs(inputs, labels)


@torch.no_grad()
def overlap(networks: Mapping[str, Any], folder: Path, data: Data, device: torch.device) -> dict[str, Any]:
    """Table 10: the share of the most active channels that two networks have in common, mean over the classes.

    The student trained alone is compared with the teacher, under the cell's transform; a cell without a teacher is
    compared with the student of the next seed. Activations are averaged over the training images of each class. The
    average maps of one class (Figure 1) are left beside the numbers.
    """
    classes = data.spec.num_classes
    ours = networks["solo"] if "solo" in networks else networks["own"]
    channels = ours.stages[-1].channels
    if "teacher" in networks:
        other: Maps = transformed(networks["teacher"], folder, channels, classes, device)
    else:
        other = last_map(networks["other"])
    names = list(data.spec.class_names)
    shown = names.index(SHOWN_CLASS) if SHOWN_CLASS in names else 0
    counts = torch.zeros(classes, device=device)
    means = [torch.zeros(classes, channels, device=device) for _ in range(2)]
    pictures: list[Any] = [0.0, 0.0]  # tensors once there is an image
    for labels, *maps in pairs_of_maps(data.train.plain(), last_map(ours), other):
        counts.index_add_(0, labels, torch.ones(len(labels), device=device))
        for index, found in enumerate(maps):
            # What the paper's figure shows is what leaves the stage.
            active = found.relu()
            means[index].index_add_(0, labels, active.mean((2, 3)))
            pictures[index] = pictures[index] + active[labels == shown].sum(0)
    counts, means = sum_over_ranks(counts), [sum_over_ranks(mean) for mean in means]
    pictures = [sum_over_ranks(picture) for picture in pictures]
    seen = counts > 0
    means = [mean[seen] / counts[seen][:, None] for mean in means]
    if is_first():
        arrays = [(picture / counts[shown]).cpu().numpy() for picture in pictures]
        with replacing(folder / "evaluations" / MAPS) as file:
            np.savez(file, student=arrays[0], other=arrays[1], shown_class=names[shown])
    shares, renamed = {}, {}
    for k in OVERLAPS:
        kept = max(1, round(k * min(1.0, channels / OVERLAP_CHANNELS)))
        shares[f"overlap_top{k}"] = 100.0 * float(channel_overlap(means[0], means[1], kept))
        if kept != k:
            renamed[f"overlap_top{k}"] = f"overlap of top {kept} of {channels}"
    return {**shares, "channels": channels, "labels": renamed}


@torch.no_grad()
def distances(ours: Maps, theirs: Maps, data: Data) -> dict[str, float]:
    """Means over the test images of the divergence of channels and of the L2 distance of maps."""
    total = torch.zeros(3, dtype=torch.float64)
    for _, mine, other in pairs_of_maps(data.test, ours, theirs):
        if mine.shape[2:] != other.shape[2:]:
            mine, other = mine.mean((2, 3), keepdim=True), other.mean((2, 3), keepdim=True)
        # Each image's own root of the sum of squares.
        lengths = torch.stack([feature_l2(a[None], b[None], "sum").sqrt() for a, b in zip(mine, other, strict=True)])
        divergence = channel_divergence(mine.mean((2, 3)), other.mean((2, 3)))
        total += torch.tensor([float(divergence) * len(mine), float(lengths.sum()), len(mine)], dtype=torch.float64)
    divergence_sum, length_sum, count = sum_over_ranks(total).tolist()
    return {"kl_divergence": divergence_sum / count, "l2_distance": length_sum / count}


def consistency(
    whose: str, networks: Mapping[str, Any], folder: Path, data: Data, device: torch.device
) -> dict[str, Any]:
    """Table 11: how far the cell's `own` student or the `solo` one is from the teacher under the cell's transform."""
    ours = networks[whose]
    channels, classes = ours.stages[-1].channels, data.spec.num_classes
    other = transformed(networks["teacher"], folder, channels, classes, device)
    return distances(last_map(ours), other, data)


ANALYSES: dict[str, Callable[..., dict[str, Any]]] = {
    "channel_overlap": overlap,
    "consistency_solo": partial(consistency, "solo"),
    "consistency": partial(consistency, "own"),
}
