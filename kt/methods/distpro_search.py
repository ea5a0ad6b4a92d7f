"""DistPro's search: a training in which the pathways' weights learn too, and which leaves how they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kt.data.loaders import split
from kt.features import Features
from kt.functional import pathway_weights
from kt.hypergradient import derivatives_ahead
from kt.methods.base import METHODS, Student, Teacher, student_update, task_alone
from kt.methods.distpro import Pathways
from kt.needs import PROCESS
from kt.phase import CONSTANT, MAIN, TRAIN, Batch, Loop, Phase, Trained
from kt.transfer import TransferModel

if TYPE_CHECKING:
    from kt.data import Data, DataSpec
    from kt.data.loaders import Loader

LOGITS = "logits"  # the optimizer of the pathways' logits
VALIDATION = "validation"  # the loader of the images that they learn on
BETAS = (0.5, 0.999)  # of their Adam, as released; momentum of the schedule's own length would lag behind


@METHODS.register_module(name="distpro_search")
class DistProSearch(Pathways):
    """Deng et al., "DistPro: Searching A Fast Knowledge Distillation Process via Meta Optimization", ECCV 2022.

    Search (Algorithm 1, eqs. 4 and 5). Each step first moves the logits by the derivative of the label loss that other
    images have after the student's update, which takes two perturbed passes (`kt.hypergradient`), and then makes the
    update with the new weights. The weights' own gradient of the training loss, which would drive all of them to zero,
    is never taken.

    The train pass is run once: its graph gives the look-ahead's gradient and, with the new weights, the update's. One
    pass over the teacher serves everything. No pathway is ever dropped here, or its logit would learn no more.

    Open in the paper and settings here: the hypergradient's step to both sides is that of DARTS, the logits' optimizer
    is the released code's, with the paper's step size, and every iteration draws a fresh validation batch. The
    look-ahead is a step of SGD whatever the schedule's optimizer.

    Args: those of `Pathways`, and
        normalisation: From logits to weights, see `kt.functional.pathway_weights`.
        alpha_lr: Step size of the logits.
        validation: Share of the training images that they learn on, and the student does not.
        hypergradient: `difference` or `jvp`, see `kt.hypergradient.directional`.
        data: What the process file says of the data.
    """

    takes_terms = True

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        normalisation: str,
        alpha_lr: float,
        validation: float,
        hypergradient: str,
        data: DataSpec | None = None,
        **shared: Any,
    ):
        super().__init__(student, teacher, **shared)
        assert teacher is not None
        self.normalisation, self.alpha_lr = normalisation, alpha_lr
        self.validation, self.how = validation, hypergradient
        self.logits = nn.Parameter(torch.ones(len(self.pathways)))
        self._past, self._recent = torch.empty(0, len(self.pathways)), list[Tensor]()
        pair = {
            who: {"network": type(network.network).__name__, "channels": [level.channels for level in levels]}
            for who, network, levels in (("teacher", teacher, self.theirs), ("student", student, self.ours))
        }
        known = None if data is None else {"name": data.name, "classes": data.num_classes, "images": data.train_size}
        self.facts["process"] = {"normalisation": normalisation, "pair": pair, "data": known}

    # What is searched

    def get_extra_state(self) -> Tensor:
        """The logits of all steps so far, (steps, pathways), on the CPU."""
        if self._recent:
            self._past = torch.cat([self._past, torch.stack(self._recent).float().cpu()])
            self._recent.clear()
        return self._past

    def set_extra_state(self, state: Tensor) -> None:
        """Puts the recorded process back."""
        self._past = state
        self._recent.clear()

    def keeps(self) -> Mapping[str, Any]:
        """The process: logits and weights of every step, float32, and where they are from."""
        logits = self.get_extra_state()
        names = [str(pathway) for pathway in self.pathways]
        recorded = {"logits": logits, "weights": pathway_weights(logits, self.normalisation), "pathways": names}
        return {PROCESS: {**recorded, **self.facts["process"]}}  # type: ignore[dict-item]

    # The search

    def phases(self) -> list[Phase]:
        """One phase on two parts of the training set."""
        changes = {"optimizer": "adam", "lr": self.alpha_lr, "weight_decay": 0.0, "clip_grad": None}
        trains = {MAIN: Trained(self._networks), LOGITS: Trained(self._logits, {**changes, **CONSTANT}, BETAS)}
        loaders = {TRAIN: partial(self._part, 0), VALIDATION: partial(self._part, 1)}
        return [Phase("train", step=self.step, trains=trains, loaders=loaders, before_epoch=self._count)]

    def _networks(self, model: TransferModel) -> list[dict[str, Any]]:
        # The student comes first: `step` reads its gradients off.
        return [{"params": [*model.student.parameters()]}, {"params": [*self.transforms.parameters()]}]

    def _logits(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [self.logits]}]

    def _part(self, number: int, data: Data) -> Loader:
        return split(data.train, self.validation)[number]

    def _count(self, model: TransferModel, loop: Loop) -> None:
        """Notes what a figure over epochs needs."""
        self.facts["process"]["steps_per_epoch"] = len(loop.loaders[TRAIN])  # type: ignore[index]

    def step(self, loop: Loop, batch: Batch) -> dict[str, Tensor]:
        """The logits' update, and then the student's and the transforms'."""
        model, optimizer = loop.model, loop.optimizers[MAIN].optimizer
        own = optimizer.param_groups[0]["params"]
        ours, theirs = self.features(model, batch)
        targets = self.targets(theirs, self.everything)
        distances = self.all_distances(ours, targets)
        output = ours.task(batch)
        supervised, further = self.around(output.loss, ours, theirs, batch)
        before = supervised + self.factor * (self.weigh().detach() * distances).sum()
        with torch.autocast(loop.device.type, enabled=False):
            gradients = torch.autograd.grad(before, own, retain_graph=True)
        slope, validation = self.hypergradient(model, batch, targets, loop.next(VALIDATION), optimizer, gradients)
        loop.update(LOGITS, grads=[slope])
        weights = self.weigh().detach()
        self._recent.append(self.logits.detach().clone())
        distillation = (weights * distances).sum()
        loss = supervised + self.factor * distillation
        loop.update(MAIN, loss)
        logged = {"loss": loss, "loss_task": output.loss, "loss_pathways": distillation, "loss_validation": validation}
        reached = sorted({pathway.theirs for pathway in self.pathways})
        levels = {f"weight_t{level + 1}": self._level(weights, level).sum() for level in reached}
        levels |= {f"logit_t{level + 1}": self._level(self.logits.detach(), level).mean() for level in reached}
        return {**logged, **further, **levels, **output.scalars}

    def all_distances(self, ours: Features, targets: Mapping[int, Tensor]) -> Tensor:
        """The distances along all pathways, (pathways,)."""
        return torch.stack(self.distances(self.maps(ours, self.everything), targets, self.everything))

    def weigh(self) -> Tensor:
        """The pathways' weights, (pathways,)."""
        return pathway_weights(self.logits, self.normalisation)

    def _level(self, values: Tensor, level: int) -> Tensor:
        """The part of the pathways' values of those to one level of the teacher, which lie together."""
        numbers = [number for number, pathway in enumerate(self.pathways) if pathway.theirs == level]
        return values[numbers[0] : numbers[-1] + 1]

    def hypergradient(
        self,
        model: TransferModel,
        batch: Batch,
        targets: Mapping[int, Tensor],
        held_out: Batch,
        optimizer: torch.optim.Optimizer,
        gradients: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The derivative in the logits of the label loss on held-out images after an update, and that loss.

        Args:
            model: The model.
            batch: What the update is made on.
            targets: The teacher's maps for it, by level.
            held_out: The other images.
            optimizer: The student's, of whose first group it is.
            gradients: Of the training loss, for each of these parameters.
        """
        student, rate = model.student, optimizer.param_groups[0]["lr"]

        def distances() -> Tensor:
            return self.all_distances(Features(student, batch["inputs"]), targets)

        along, outer = derivatives_ahead(
            student, optimizer, gradients, lambda: task_alone(model, held_out)[0], distances, [self], self.how
        )
        weights = self.weigh()
        (slope,) = torch.autograd.grad(weights, self.logits, -rate * self.factor * along.to(weights))
        return slope, outer

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """One over the teacher; the train pass, twice backward; the look-ahead's; two perturbed ones without a head."""
        everything = self.everything
        targets = self.targets(Features(model.teacher, batch["inputs"], graph=False), everything)
        own, rest = list(model.student.parameters()), list(self.transforms.parameters())

        def train() -> None:
            ours = Features(model.student, batch["inputs"])
            distances = self.all_distances(ours, targets).sum()
            loss = ours.task(batch).loss + distances
            torch.autograd.grad(loss, own, retain_graph=True)
            torch.autograd.grad(loss, [*own, *rest])

        def perturbed() -> None:
            with torch.no_grad():
                self.all_distances(Features(model.student, batch["inputs"], graph=False), targets)

        def teach() -> None:
            self.targets(Features(model.teacher, batch["inputs"], graph=False), everything)

        return [teach, train, lambda: student_update(model, batch), perturbed, perturbed]
