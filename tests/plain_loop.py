"""KD and CRD as RepDistiller's script trains them: the plain loop beside which `tests/gpu.py` times ours.

What makes it one (`train_student.py`, `helper/loops.py`, `dataset/cifar100.py` and `crd/` of HobbitLong/RepDistiller):
loading processes augment images one by one with PIL and draw CRD's negatives, the device waits for each batch, and the
host for the loss and the accuracies of each step. Written anew, after the papers' formulas.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kt.models.names import IMAGENET
from kt.stages import head_of

TEMPERATURE, MOMENTUM, DIMENSION = 0.07, 0.5, 128  # of CRD


class Images(Dataset):
    """Images (n, h, w, 3) of 8 bits with labels, augmented; with negatives also the images to contrast each with."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], negatives: int = 0):
        self.images, self.labels, self.negatives = images, labels, negatives
        self.others = [np.flatnonzero(labels != label) for label in range(labels.max() + 1)] if negatives else []
        steps = [transforms.RandomCrop(images.shape[1], padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET.mean, IMAGENET.std)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label = self.transform(Image.fromarray(self.images[index])), int(self.labels[index])
        if not self.negatives:
            return image, label, index
        others = self.others[label]
        drawn = np.random.choice(others, self.negatives, replace=self.negatives > len(others))
        return image, label, index, np.concatenate([[index], drawn])


class Contrast(nn.Module):
    """CRD's loss with its memories of both networks' embeddings."""

    memory: Tensor

    def __init__(self, widths: tuple[int, int], images: int):
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(width, DIMENSION) for width in widths)
        self.register_buffer("memory", F.normalize(torch.rand(2, images, DIMENSION) * 2 - 1, dim=2))
        self.constants: list[Tensor] = []

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, chosen: Tensor) -> Tensor:
        """Of pooled features (b, c), the images' numbers (b,) and those each is contrasted with, itself first."""
        images, negatives = self.memory.shape[1], chosen.shape[1] - 1
        found = [F.normalize(layer(each)) for layer, each in zip(self.embed, (student, teacher), strict=True)]
        loss = torch.zeros((), device=index.device)
        for side, own in enumerate(found):
            rows = self.memory[1 - side][chosen.reshape(-1)].view(len(index), negatives + 1, DIMENSION)
            odds = torch.exp(torch.bmm(rows, own[:, :, None])[:, :, 0] / TEMPERATURE)
            if len(self.constants) == side:
                self.constants.append(odds.mean().detach() * images)
            odds = odds / self.constants[side]
            noise = negatives / images
            loss = loss - torch.log(odds[:, 0] / (odds[:, 0] + noise + 1e-7)).mean()
            loss = loss - torch.log(noise / (odds[:, 1:] + noise + 1e-7)).sum(1).mean()
        with torch.no_grad():
            for side, own in enumerate(found):
                moved = self.memory[side][index] * MOMENTUM + own * (1 - MOMENTUM)
                self.memory[side][index] = F.normalize(moved)
        return loss


def _pooled(network: nn.Module) -> list[Tensor]:
    """A list whose one element is what the network's classifier has last read."""
    seen: list[Tensor] = []
    head_of(network).classifier.register_forward_pre_hook(
        lambda module, given: seen.__setitem__(slice(None), given[:1])
    )
    return seen


def _accuracies(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Top-1 and top-5, in percent."""
    hits = logits.topk(5, 1).indices.eq(labels[:, None])
    return [hits[:, :k].any(1).float().sum() * (100 / len(labels)) for k in (1, 5)]


class PlainLoop:
    """Epochs of KD (soft targets and labels) or of CRD (labels and contrast).

    Args:
        student, teacher: Bare networks.
        images, labels: The training set.
        negatives: Of CRD; 0 is KD.
        batch_size: Images of a step.
        device: Where to compute.
        workers: Loading processes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        negatives: int,
        batch_size: int,
        device: str,
        workers: int = 8,
    ):
        self.student, self.teacher, self.device = student.to(device).train(), teacher.to(device).eval(), device
        data = Images(images, labels, negatives)
        self.loader = DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=workers)
        self.contrast: Contrast | None = None
        trained = nn.ModuleList([self.student])
        if negatives:
            self.seen = _pooled(self.student), _pooled(self.teacher)
            widths = [head_of(each).classifier.in_features for each in (self.student, self.teacher)]
            self.contrast = Contrast((widths[0], widths[1]), len(images)).to(device)
            trained.append(self.contrast)
        self.optimizer = torch.optim.SGD(trained.parameters(), 0.05, 0.9, weight_decay=5e-4)

    def loss(self, logits: Tensor, data: list[Tensor]) -> Tensor:
        """Of a batch whose images the student has just seen; labels, numbers and contrasts are on the device."""
        images, labels, *rest = data
        with torch.no_grad():
            theirs = self.teacher(images)
        supervised = F.cross_entropy(logits, labels)
        if self.contrast is not None:
            return supervised + 0.8 * self.contrast(self.seen[0][0], self.seen[1][0], *rest)
        soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(theirs / 4, 1), reduction="sum") * 16 / len(logits)
        return 0.1 * supervised + 0.9 * soft

    def step(self, data: list[Tensor]) -> list[float]:
        """One update; the loss and both accuracies on the host."""
        data = [each.to(self.device) for each in data]
        logits = self.student(data[0])
        loss = self.loss(logits, data)
        told = [loss.item(), *(each.item() for each in _accuracies(logits, data[1]))]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return told

    def rate(self, steps: int, warmup: int) -> float:
        """Steps a second, the loading of their images included."""
        return steps_per_second(self._endless(), self.step, steps, warmup)

    def _endless(self) -> Any:
        while True:
            yield from self.loader


def steps_per_second(batches: Any, step: Callable[[Any], Any], steps: int, warmup: int) -> float:
    """How many steps a loop makes, that on the device included, after a few that do not count."""
    start = 0.0
    for number in range(warmup + steps):
        if number == warmup:
            _wait()
            start = time.perf_counter()
        step(next(batches))
    _wait()
    return steps / (time.perf_counter() - start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
