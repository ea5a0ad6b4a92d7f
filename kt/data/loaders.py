"""Loaders whose epochs are pure functions of (seed, epoch): a resumed run sees the very same batches.

An epoch is a permutation of the set, cut into updates of `batch_size` images and these into equal chunks: chunk c goes
to process c modulo their number, which takes its chunks of an update one after the other, in so many passes. So what an
update consists of, and how an image is augmented, does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from kt.errors import UserError
from kt.settings import count_passes

Batch = dict[str, Tensor]
# Of indices: rows, which nobody need make all at once, or parts of several lengths.
Batches = Tensor | tuple[Tensor, ...]
PADDING = 4
AT_ONCE = 256  # batches of which random numbers are drawn: a call takes hardly longer for many images than for a few
DRAWS = {"none": 0, "crop_flip": 3, "imagenet": 5}  # random numbers that an augmentation takes of each image


class Loader(Protocol):
    """What training and evaluation ask of a set of images.

    Attributes:
        batch_size: Images of an update, over all processes and passes.
        passes: How many of the batches that this process is given make up an update.
    """

    batch_size: int
    passes: int

    def __len__(self) -> int:
        """Batches of one epoch on this rank, each of one pass."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """An epoch's batches from `first` on: `inputs` (n, 3, h, w) float in 0..1, `labels` (n,), `indices` (n,)."""

    def plain(self, by_class: bool = False) -> Loader:
        """The same images, each once over all processes and without augmentation, class by class if asked for."""


def endless(loader: Loader, first: int = 0) -> Iterator[Batch]:
    """A loader's batches from number `first` on, epoch after epoch; a pure function of the two."""
    turn, start = divmod(first, len(loader))
    for epoch in itertools.count(turn):
        yield from loader.epoch(epoch, start if epoch == turn else 0)


def split(loader: ImageLoader, share: float) -> tuple[Loader, Loader]:
    """Two loaders of disjoint parts of a set, drawn at random from its seed; all else is as it was.

    Args:
        loader: Of the whole set.
        share: Of the images in the second part, which has at least one, as has the first.
    """
    size = len(loader.indices)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_mix(loader.seed, 2)))
    held = min(max(1, round(share * size)), size - 1)
    return loader.part(order[held:].sort().values), loader.part(order[:held].sort().values)


class _Stretches:
    """A loader whose epochs are stretches of equal length of another one's endless stream of batches."""

    def __init__(self, loader: Loader, length: int):
        self.loader, self.length, self.batch_size, self.passes = loader, length, loader.batch_size, loader.passes

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """One stretch."""
        return itertools.islice(endless(self.loader, epoch * self.length + first), self.length - first)

    def plain(self, by_class: bool = False) -> Loader:
        """The whole set that the stretches are taken from."""
        return self.loader.plain(by_class)


def by_iterations(loader: Loader, iterations: int, epochs: int) -> Loader:
    """A loader whose `epochs` make `iterations` updates, see `kt.settings.epochs_of`.

    Raises:
        UserError: There is not one batch.
    """
    if len(loader) == 0:
        raise UserError("schedule.batch_size: the training set is smaller than one batch")
    return _Stretches(loader, iterations // epochs * loader.passes)


def epoch_order(
    size: int, seed: int, epoch: int, shuffle: bool, rank: int, world: int, batch_size: int, passes: int = 1
) -> Batches:
    """Index batches of one epoch on one rank, `passes` of them for an update.

    Shuffled, all chunks of an epoch are of the same size, so that an update is the plain mean over them. What is left
    of the set after the last whole update is left out. A set smaller than one update is a single update of as many
    chunks, and what does not divide equally is left out. Unshuffled ones cover the set exactly once over all ranks.

    Raises:
        UserError: There are fewer images than chunks.
    """
    chunks = world * passes
    if not shuffle:
        return torch.arange(rank, size, world).split(max(1, batch_size // chunks))
    if size < chunks:
        raise UserError(f"schedule.batch_size: the training set has {size} images, an update is cut into {chunks}")
    updates, chunk = max(1, size // batch_size), min(size, batch_size) // chunks
    generator = torch.Generator().manual_seed(_mix(seed, epoch, 0))
    order = torch.randperm(size, generator=generator)[: updates * chunks * chunk]
    return order.view(-1, world, chunk)[:, rank]


def _each(batches: Batches) -> Iterator[Tensor]:
    """One after the other: a tensor that is gone through itself makes all of its rows at once."""
    return (batches[number] for number in range(len(batches)))


def _mix(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def uniform(seed: int, epoch: int, indices: Tensor, count: int) -> Tensor:
    """Random numbers in [0, 1) that depend on (seed, epoch, index) alone, all of a batch at once.

    Args:
        seed, epoch: What they follow from beside the index.
        indices: Numbers of samples, int64 (n,), on the CPU.
        count: How many each sample gets.

    Returns:
        float64, (count, n), on the CPU.

    Source: SplitMix64 (Steele, Lea, Flood 2014), each sample with a stream whose start is its hashed index.
    """
    starts = _hashed(indices.numpy().astype(np.uint64) * _GOLDEN + np.uint64(_mix(seed, epoch, 1)))
    streams = starts + np.arange(1, count + 1, dtype=np.uint64)[:, None] * _GOLDEN
    return torch.from_numpy((_hashed(streams) >> np.uint64(11)) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _hashed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's mixing function; products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Zero-pads by 4, crops back at random and mirrors at random, every image on its own.

    Args:
        images: uint8, (n, h, w, 3).
        draws: Uniform in [0, 1), (3, n): down, right, mirror.

    Returns:
        uint8, (n, h, w, 3).
    """
    n, height, width, _ = images.shape
    device = images.device
    shifts = (draws[:2] * (2 * PADDING + 1)).long().to(device)
    mirrored = (draws[2] < 0.5).to(device)
    padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    rows = shifts[0][:, None] + torch.arange(height, device=device)
    ahead = torch.arange(width, device=device)
    columns = shifts[1][:, None] + torch.where(mirrored[:, None], width - 1 - ahead, ahead)
    return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def resized_crop_flip(images: Tensor, draws: Tensor, scale: tuple[float, float] = (0.08, 1.0)) -> Tensor:
    """A random part of each image (area within `scale`, aspect 3:4 to 4:3) at full size, mirrored at random.

    Args:
        images: float in 0..1, (n, 3, h, w).
        draws: Uniform in [0, 1), (5, n): area, aspect, across, down, mirror.
        scale: Range of the area kept.
    """
    draws = draws.float()
    area = scale[0] + (scale[1] - scale[0]) * draws[0]
    ratio = (4 / 3) ** (2 * draws[1] - 1)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (draws[2:4] * 2 - 1) * (1 - torch.stack([width, height]))
    mirror = torch.where(draws[4] < 0.5, -1.0, 1.0)
    zero = torch.zeros(len(images))
    theta = torch.stack([torch.stack([width * mirror, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class ImageLoader:
    """Images of one size and a class each; their kinds differ in where the images come from, and not in a single bit.

    Args:
        labels: int64, (n,).
        batch_size: Images of an update, over all processes and passes.
        augmentation: `none`, `crop_flip` or `imagenet`.
        shuffle: Training order; False for evaluation.
        seed: Of order and augmentation.
        device: Where batches go, and where they are augmented.
        rank, world: This process among all.
        indices: Numbers of the samples if they are not 0..n-1 (subsets).
        device_batch: Images of a pass, see `kt.settings.count_passes`.
        size: Side to which images are resized, between `crop_flip` and `imagenet`; None leaves them as they are.
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        augmentation: str,
        shuffle: bool,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        indices: Tensor | None = None,
        device_batch: int | None = None,
        size: int | None = None,
    ):
        self.device, self.labels = device, labels.to(device)
        # On the CPU, where augmentation is drawn.
        self.indices = torch.arange(len(labels)) if indices is None else indices
        self.passes = count_passes(batch_size, device_batch, world)
        self.batch_size, self.augmentation, self.shuffle = batch_size, augmentation, shuffle
        self.seed, self.rank, self.world, self.size = seed, rank, world, size

    def _read(self, batches: Batches, epoch: int) -> Iterator[Tensor]:
        """The images at the positions of each batch, uint8 (n, h, w, 3)."""
        raise NotImplementedError

    def _draw(self, batches: Batches, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The numbers of each batch's samples, and the random numbers that its augmentation takes."""
        for start in range(0, len(batches), AT_ONCE):
            numbers = [self.indices[chosen] for chosen in batches[start : start + AT_ONCE]]
            draws = uniform(self.seed, epoch, torch.cat(numbers), DRAWS[self.augmentation])
            yield from zip(numbers, draws.split([len(each) for each in numbers], 1), strict=True)

    def _order(self, epoch: int) -> Batches:
        size, shared = len(self.labels), (self.rank, self.world, self.batch_size, self.passes)
        return epoch_order(size, self.seed, epoch, self.shuffle, *shared)

    def __len__(self) -> int:
        return len(self._order(0))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """One epoch's batches."""
        device, batches = self.device, self._order(epoch)[first:]
        parts = self._read(batches, epoch), _each(batches), self._draw(batches, epoch)
        for images, chosen, (own, drawn) in zip(*parts, strict=True):
            images = images.to(device, non_blocking=True)
            if self.augmentation == "crop_flip":
                images = crop_flip(images, drawn)
            # Permuting height-width-channel storage is channels_last already.
            inputs = images.permute(0, 3, 1, 2).float().div_(255)
            if self.size is not None and self.size != inputs.shape[2]:
                inputs = F.interpolate(inputs, size=(self.size,) * 2, mode="bilinear", antialias=True)
            if self.augmentation == "imagenet":
                inputs = resized_crop_flip(inputs, drawn).contiguous(memory_format=torch.channels_last)
            yield {"inputs": inputs, "labels": self.labels[chosen.to(device)], "indices": own.to(device)}

    def part(self, chosen: Tensor) -> Self:
        """Some of the images, by their places, as a set of their own."""
        other = copy.copy(self)
        other._take(chosen)
        return other

    def plain(self, by_class: bool = False) -> Self:
        """See `Loader.plain`."""
        other = copy.copy(self)
        other.shuffle, other.augmentation = False, "none"
        if by_class:
            other._take(torch.argsort(self.labels, stable=True))
        return other

    def _take(self, places: Tensor) -> None:
        """Keeps the images at those places, in that order."""
        self.labels, self.indices = self.labels[places], self.indices[places.cpu()]


class ResidentLoader(ImageLoader):
    """Images as 8-bit numbers on the device.

    Args:
        images: uint8, (n, h, w, 3).
        labels, options: See `ImageLoader`.
    """

    def __init__(self, images: Tensor, labels: Tensor, **options: Any):
        super().__init__(labels, **options)
        self.images = images.to(self.device)

    def _read(self, batches: Batches, epoch: int) -> Iterator[Tensor]:
        return (self.images[chosen.to(self.device)] for chosen in _each(batches))

    def _take(self, places: Tensor) -> None:
        super()._take(places)
        self.images = self.images[places]


class _EpochView(Dataset):
    """A dataset of one epoch: what is random in a sample is seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Tensor:
        # Workers and the main process alike draw from torch's global generator.
        state = torch.get_rng_state()
        torch.manual_seed(_mix(self.seed, self.epoch, index))
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(state)


class StreamingLoader(ImageLoader):
    """Images through the ordinary DataLoader, for sets that do not fit into memory.

    Args:
        dataset: Gives the image of an index, uint8 (h, w, 3); what is random in it is drawn from torch's generator.
            `plain()` gives the same without.
        labels, options: See `ImageLoader`.
        workers: Loading processes.
    """

    def __init__(self, dataset: Dataset, labels: Tensor, workers: int = 4, **options: Any):
        super().__init__(labels, **options)
        self.dataset, self.workers = dataset, workers

    def _read(self, batches: Batches, epoch: int) -> Iterator[Tensor]:
        loader = DataLoader(
            _EpochView(self.dataset, self.seed, epoch),
            batch_sampler=(self.indices[chosen].tolist() for chosen in _each(batches)),  # type: ignore[arg-type]
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # Its own, for a loader draws one number even if nothing is random.
            generator=torch.Generator().manual_seed(0),
        )
        with told_in_one_line():
            yield from loader

    def plain(self, by_class: bool = False) -> Self:
        other = super().plain(by_class)
        other.dataset = self.dataset.plain()  # type: ignore[attr-defined]
        return other


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Within, a mistake that a loading process finds comes without that process's whole traceback."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
