"""Loaders whose epochs are pure functions of (seed, epoch, rank): a resumed run sees the very same batches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kt.errors import UserError

Batch = dict[str, Tensor]
PADDING = 4


class Loader(Protocol):
    """What training and evaluation ask of a set of images."""

    batch_size: int

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """An epoch's batches from `first` on: `inputs` (n, 3, h, w) float in 0..1, `labels` (n,), `indices` (n,)."""

    def plain(self, by_class: bool = False) -> Loader:
        """The same images, each once over all processes and without augmentation, class by class if asked for."""


def endless(loader: Loader, first: int = 0) -> Iterator[Batch]:
    """A loader's batches from number `first` on, epoch after epoch; a pure function of the two."""
    turn, start = divmod(first, len(loader))
    for epoch in itertools.count(turn):
        yield from loader.epoch(epoch, start if epoch == turn else 0)


class _Stretches:
    """A loader whose epochs are stretches of equal length of another one's endless stream of batches."""

    def __init__(self, loader: Loader, length: int):
        self.loader, self.length, self.batch_size = loader, length, loader.batch_size

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """One stretch."""
        return itertools.islice(endless(self.loader, epoch * self.length + first), self.length - first)

    def plain(self, by_class: bool = False) -> Loader:
        """The whole set that the stretches are taken from."""
        return self.loader.plain(by_class)


def by_iterations(loader: Loader, iterations: int, interval: int | None) -> tuple[Loader, int]:
    """A loader and a number of epochs that together make `iterations` steps, each epoch `interval` of them.

    Raises:
        UserError: The interval does not divide the iterations.
    """
    interval = interval or iterations
    if iterations % interval:
        raise UserError(f"schedule.interval={interval}: expected a divisor of schedule.iterations={iterations}")
    if len(loader) == 0:
        raise UserError("schedule.batch_size: the training set is smaller than one batch")
    return _Stretches(loader, interval), iterations // interval


def epoch_order(
    size: int, seed: int, epoch: int, shuffle: bool, rank: int, world: int, batch_size: int
) -> list[Tensor]:
    """Index batches of one epoch on one rank.

    Shuffled batches are all of the same size and the remainder is left out (unless the set is smaller than one batch),
    so ranks take equally many steps; unshuffled ones cover the set exactly once over all ranks.
    """
    if not shuffle:
        return list(torch.arange(rank, size, world).split(batch_size))
    generator = torch.Generator().manual_seed(_mix(seed, epoch, 0))
    order = torch.randperm(size, generator=generator)
    per_rank = size // world
    mine = order[rank : per_rank * world : world]
    if per_rank < batch_size:
        return [mine]
    return list(mine[: per_rank // batch_size * batch_size].split(batch_size))


def _mix(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Zero-pads by 4, crops back at random and mirrors at random, every image on its own.

    Args:
        images: uint8, (n, h, w, 3).
        generator: On the CPU, so that draws are the same on every device.

    Returns:
        uint8, (n, h, w, 3).
    """
    n, height, width, _ = images.shape
    device = images.device
    shifts = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator).to(device)
    mirrored = (torch.rand(n, generator=generator) < 0.5).to(device)
    padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    rows = shifts[0][:, None] + torch.arange(height, device=device)
    ahead = torch.arange(width, device=device)
    columns = shifts[1][:, None] + torch.where(mirrored[:, None], width - 1 - ahead, ahead)
    return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def resized_crop_flip(images: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.08, 1.0)) -> Tensor:
    """A random part of each image (area within `scale`, aspect 3:4 to 4:3) at full size, mirrored at random.

    Args:
        images: float in 0..1, (n, 3, h, w).
        generator: On the CPU.
        scale: Range of the area kept.
    """
    n = len(images)
    area = torch.empty(n).uniform_(*scale, generator=generator)
    ratio = torch.exp(torch.empty(n).uniform_(float(np.log(3 / 4)), float(np.log(4 / 3)), generator=generator))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (torch.rand(2, n, generator=generator) * 2 - 1) * (1 - torch.stack([width, height]))
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([width * mirror, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class ResidentLoader:
    """Images as 8-bit numbers on the device, augmented there a batch at a time.

    Args:
        images: uint8, (n, h, w, 3).
        labels: int64, (n,).
        batch_size: Images a batch.
        augmentation: `none`, `crop_flip` or `imagenet`.
        shuffle: Training order; False for evaluation.
        seed: Of order and augmentation.
        device: Where images live.
        rank, world: This process among all.
        indices: Numbers of the samples if they are not 0..n-1 (subsets).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        augmentation: str,
        shuffle: bool,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        indices: Tensor | None = None,
    ):
        self.images, self.labels = images.to(device), labels.to(device)
        self.indices = torch.arange(len(labels)) if indices is None else indices
        self.indices = self.indices.to(device)
        self.batch_size, self.augmentation, self.shuffle = batch_size, augmentation, shuffle
        self.seed, self.rank, self.world = seed, rank, world

    def _order(self, epoch: int) -> list[Tensor]:
        size = len(self.labels)
        return epoch_order(size, self.seed, epoch, self.shuffle, self.rank, self.world, self.batch_size)

    def __len__(self) -> int:
        return len(self._order(0))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """One epoch's batches."""
        for number, chosen in enumerate(self._order(epoch)[first:], first):
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch, 1, self.rank, number))
            chosen = chosen.to(self.images.device)
            images = self.images[chosen]
            if self.augmentation == "crop_flip":
                images = crop_flip(images, generator)
            # Permuting height-width-channel storage is channels_last already.
            inputs = images.permute(0, 3, 1, 2).float().div_(255)
            if self.augmentation == "imagenet":
                inputs = resized_crop_flip(inputs, generator).contiguous(memory_format=torch.channels_last)
            yield {"inputs": inputs, "labels": self.labels[chosen], "indices": self.indices[chosen]}

    def plain(self, by_class: bool = False) -> ResidentLoader:
        """See `Loader.plain`."""
        other = copy.copy(self)
        other.shuffle, other.augmentation = False, "none"
        if by_class:
            order = torch.argsort(self.labels, stable=True)
            other.images, other.labels, other.indices = self.images[order], self.labels[order], self.indices[order]
        return other


class _EpochView(Dataset):
    """A dataset of one epoch: every sample's augmentation is seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, indices: list[int], seed: int, epoch: int):
        self.dataset, self.indices, self.seed, self.epoch = dataset, indices, seed, epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        index = self.indices[position]
        # Workers and the main process alike draw from torch's global generator.
        state = torch.get_rng_state()
        torch.manual_seed(_mix(self.seed, self.epoch, index))
        image, label = self.dataset[index]
        torch.set_rng_state(state)
        return image, label, index


class StreamingLoader:
    """Images from disk through the ordinary DataLoader, for sets that do not fit into memory.

    Args:
        dataset: Gives `(image tensor (3, h, w) in 0..1, label)`, augmentation included, drawn from torch's generator.
        indices: Samples that take part.
        batch_size: Images a batch.
        shuffle: Training order; False for evaluation.
        seed: Of order and augmentation.
        device: Where batches go.
        rank, world: This process among all.
        workers: Loading processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Tensor,
        batch_size: int,
        shuffle: bool,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        workers: int = 4,
    ):
        self.dataset, self.indices, self.batch_size, self.shuffle = dataset, indices, batch_size, shuffle
        self.seed, self.device, self.rank, self.world, self.workers = seed, device, rank, world, workers

    def _order(self, epoch: int) -> list[Tensor]:
        size = len(self.indices)
        return epoch_order(size, self.seed, epoch, self.shuffle, self.rank, self.world, self.batch_size)

    def __len__(self) -> int:
        return len(self._order(0))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """One epoch's batches."""
        batches = self._order(epoch)[first:]
        chosen = self.indices[torch.cat(batches)].tolist() if batches else []
        view = _EpochView(self.dataset, chosen, self.seed, epoch)
        loader = DataLoader(view, self.batch_size, num_workers=self.workers, pin_memory=self.device.type == "cuda")
        for images, labels, indices in loader:
            inputs = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            yield {"inputs": inputs, "labels": labels.to(self.device), "indices": indices.to(self.device)}

    def plain(self, by_class: bool = False) -> StreamingLoader:
        """See `Loader.plain`; the dataset says what it is without augmentation and which labels it has."""
        other = copy.copy(self)
        other.shuffle, other.dataset = False, self.dataset.plain()  # type: ignore[attr-defined]
        if by_class:
            labels = self.dataset.labels()  # type: ignore[attr-defined]
            other.indices = self.indices[torch.argsort(labels[self.indices], stable=True)]
        return other
