"""Contrastive representation distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kt import ranks
from kt.classifier import Classifier
from kt.errors import UserError
from kt.features import Features
from kt.functional import noise_contrast, similarities
from kt.methods.base import METHODS, Method
from kt.phase import Batch
from kt.transfer import TransferModel

if TYPE_CHECKING:
    from kt.data import DataSpec

SIDES = ("contrast_student", "contrast_teacher")


@METHODS.register_module(name="crd")
class ContrastiveRepresentation(Method):
    """Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.

    Each network's penultimate feature is embedded by a trained linear layer. From an image's embedding by one network,
    noise-contrastive estimation tells its own row of a memory of the other network's embeddings from rows of images of
    other classes. The rows follow the embeddings with momentum.

    As in the authors' code, the constant that normalises a side's likelihoods is that of the first batch. Negatives are
    drawn on the device, with replacement also where that code draws without.

    Args:
        student: The student.
        teacher: The teacher, of any classes.
        data: The facts of the training set, with its labels.
        weight: Weight of both contrasts.
        embedding: Size of the embeddings.
        negatives: How many each image is contrasted with.
        temperature: Of the embeddings' products.
        momentum: Share of its old embedding that an image's memory keeps.

    Raises:
        UserError: The data's labels are unknown, or all images are of one class.
    """

    rows: Tensor  # of the memory by an image's index
    starts: Tensor  # first row of each class
    sizes: Tensor  # rows of each class
    memories: Tensor  # embeddings of unit norm by student and teacher, (2, images, embedding)
    constants: Tensor  # that normalise the likelihoods of each side; 0 before the first batch

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        data: DataSpec | None,
        weight: float,
        embedding: int,
        negatives: int,
        temperature: float,
        momentum: float,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        if data is None or data.labels is None:
            raise UserError("method=crd: it remembers every training image; expected build_method(..., data=data.spec)")
        self.weights = dict.fromkeys(SIDES, weight)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        widths = [network.head.classifier.in_features for network in (student, teacher)]
        self.embeddings = nn.ModuleList(nn.Linear(width, embedding) for width in widths)
        # Class by class, so that the rows of all other classes are known by two numbers.
        labels = torch.from_numpy(data.labels)
        order = labels.argsort(stable=True)[(labels < 0).sum() :]
        sizes = torch.bincount(labels[order], minlength=data.num_classes)
        if sizes.max() == len(order):
            raise UserError("method=crd: all training images are of one class; expected others to contrast them with")
        rows = torch.full_like(labels, -1)
        rows[order] = torch.arange(len(order))
        for name, facts in (("rows", rows), ("starts", sizes.cumsum(0) - sizes), ("sizes", sizes)):
            self.register_buffer(name, facts, persistent=False)
        bound = (3 / embedding) ** 0.5
        self.register_buffer("memories", torch.empty(2, len(order), embedding).uniform_(-bound, bound))
        self.register_buffer("constants", torch.zeros(2))
        self._normalised = False

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages; of the head only what leads to the penultimate feature."""
        return len(model.teacher.stages)

    def draw(self, labels: Tensor) -> Tensor:
        """Rows of the memory of images of other classes, each as likely: (n,) -> (n, negatives)."""
        sizes, starts = self.sizes[labels, None], self.starts[labels, None]
        # In single precision some rows of a large set would be likelier than others.
        drawn = torch.rand(len(labels), self.negatives, dtype=torch.float64, device=labels.device)
        numbers = (drawn * (self.memories.shape[1] - sizes)).long()
        return numbers + sizes * (numbers >= starts)

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The contrast of the student's embeddings with the teacher's memory, and the other way round."""
        rows = self.rows[batch["indices"]]
        chosen = torch.cat([rows[:, None], self.draw(batch["labels"])], 1)
        precision = self.memories.dtype
        with torch.autocast(rows.device.type, enabled=False):
            embedded = [
                F.normalize(layer(each.pooled.to(precision)), dim=1)
                for layer, each in zip(self.embeddings, (ours, theirs), strict=True)
            ]
            scores = [
                (similarities(each, memory, chosen) / self.temperature).exp()
                for each, memory in zip(embedded, reversed(self.memories.unbind()), strict=True)
            ]
            self._normalise(scores)
            noise = self.negatives / self.memories.shape[1]
            losses = [noise_contrast(each / self.constants[side], noise) for side, each in enumerate(scores)]
            self._remember(rows, embedded)
        return dict(zip(SIDES, losses, strict=True))

    @torch.no_grad()
    def _normalise(self, scores: list[Tensor]) -> None:
        """Sets the constants once, so that a likelihood is on average that of one of all images."""
        if not self._normalised and not self.constants.any():
            means = torch.stack([each.mean() for each in scores])
            self.constants.copy_(ranks.mean_over_ranks(means) * self.memories.shape[1])
        self._normalised = True  # to wait for the device only once

    @torch.no_grad()
    def _remember(self, rows: Tensor, embedded: list[Tensor]) -> None:
        """Moves the memory of a batch's images, those of all processes, towards their embeddings."""
        rows, new = ranks.rows_of_all(rows), torch.stack([ranks.rows_of_all(each) for each in embedded])
        moved = F.normalize(self.momentum * self.memories[:, rows] + (1 - self.momentum) * new, dim=2)
        # Not in place: this step's gradients read the memory as it was.
        self.memories = self.memories.index_copy(1, rows, moved)

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """Those of both networks, and the products with both memories, forward and backward."""
        chosen = torch.cat([self.rows[batch["indices"]][:, None], self.draw(batch["labels"])], 1)
        embedded = self.memories[:, chosen[:, 0]].requires_grad_()

        def contrast() -> None:
            each = zip(embedded, self.memories, strict=True)
            torch.stack([similarities(*both, chosen).sum() for both in each]).sum().backward()

        return [*super().passes(model, batch), contrast]
