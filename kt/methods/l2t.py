"""L2T-ww: which channels of which layers to match is learned by looking back at steps that matched them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.features import Features
from kt.functional import weighted_matching
from kt.hypergradient import unroll, with_values
from kt.methods.base import METHODS, Method
from kt.methods.blocks import match_size, without_stem
from kt.phase import CONSTANT, MAIN, Batch, Loop, Phase, Trained
from kt.stages import as_map
from kt.transfer import TransferModel, frozen_statistics

META = "meta"


@METHODS.register_module(name="l2t")
class LearningWhatAndWhere(Method):
    """Jang, Lee, Hwang and Shin, "Learning What and Where to Transfer", ICML 2019.

    Every student stage is regressed onto every teacher stage. Two meta-networks read the teacher's pooled map: one
    weighs its channels for each student stage (what), the other the pairs of stages (where).

    A step is one update by the task's and the matching loss. Then, on the same batch, steps of SGD with momentum are
    recorded from there, some on the matching loss alone and one on the task's. The gradient of the task's loss behind
    them, through all of them, trains the meta-networks; the student stays where its update has left it. The matching
    loss itself never trains them: it would drive every weight to zero.

    Under several processes each of them looks back at steps on its own images; their meta-gradients are averaged.

    Args:
        student: The student.
        teacher: The teacher, of any classes.
        weight: Weight of the matching loss.
        inner_steps: How many recorded steps match alone.
        meta_lr: Learning rate of the meta-networks.
        meta_weight_decay: Their weight decay.
        meta_interval: Updates of the student for each of theirs.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        weight: float,
        inner_steps: int,
        meta_lr: float,
        meta_weight_decay: float,
        meta_interval: int,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weights = {"match": weight}
        self.inner_steps, self.meta_interval = inner_steps, meta_interval
        self.meta_lr, self.meta_weight_decay = meta_lr, meta_weight_decay
        self.ours, self.theirs = without_stem(student.stages), without_stem(teacher.stages)
        self.widths = [teacher.stages[index].channels for index in self.theirs]
        # Of each student stage one for all teacher stages, whose channels lie one behind the other.
        self.regressors = nn.ModuleList(
            nn.Conv2d(student.stages[index].channels, sum(self.widths), 1) for index in self.ours
        )
        # Of each teacher stage one for all student stages.
        self.what = nn.ModuleList(nn.Linear(width, len(self.ours) * width) for width in self.widths)
        self.where = nn.ModuleList(nn.Linear(width, len(self.ours)) for width in self.widths)
        for parameter in self.what.parameters():
            nn.init.zeros_(parameter)
        for layer in self.where:
            nn.init.ones_(layer.bias)  # type: ignore[arg-type]

    def phases(self) -> list[Phase]:
        """One, with an optimizer of its own for the meta-networks."""
        meta = {"optimizer": "adam", "lr": self.meta_lr, "weight_decay": self.meta_weight_decay, "clip_grad": None}
        trains = {MAIN: Trained(self._taught), META: Trained(self._meta, {**meta, **CONSTANT})}
        return [Phase("train", step=self.step, trains=trains)]

    def _taught(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*model.student.parameters(), *self.regressors.parameters()]}]

    def _meta(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*self.what.parameters(), *self.where.parameters()]}]

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages, no head."""
        return len(model.teacher.stages)

    def weigh(self, targets: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What the meta-networks make of the teacher's maps.

        Returns:
            For each teacher stage the weights of its channels, (n, student stages, c), which sum to 1, and of its
            pairs, (n, student stages), from 0 to 6.
        """
        found = []
        for target, what, where in zip(targets, self.what, self.where, strict=True):
            pooled = target.mean((2, 3))
            channels = what(pooled).unflatten(1, (len(self.ours), -1)).softmax(2)
            found.append((channels, nn.functional.relu6(where(pooled))))
        return found

    def match(self, ours: Features, targets: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The matching loss, a sum over all pairs.

        Args:
            ours: The student's features.
            targets: The teacher's maps.
            weights: See `weigh`.
        """
        losses = []
        for number, (index, regressor) in enumerate(zip(self.ours, self.regressors, strict=True)):
            guesses = regressor(as_map(ours.level(index))).split(self.widths, 1)
            for guess, target, (channels, pairs) in zip(guesses, targets, weights, strict=True):
                resized = match_size(target, guess)
                losses.append(weighted_matching(guess, resized, channels[:, number], pairs[:, number]))
        return torch.stack(losses).sum()

    def step(self, loop: Loop, batch: Batch) -> dict[str, Tensor]:
        """One update of the student, then, when it is their turn, one of the meta-networks."""
        ours, theirs = self.features(loop.model, batch)
        output = ours.task(batch)
        precision = next(self.where.parameters()).dtype
        targets = [as_map(theirs.level(index)).to(precision) for index in self.theirs]
        with torch.autocast(loop.device.type, enabled=False):
            weights = self.weigh(targets)
        constant = [(channels.detach(), pairs.detach()) for channels, pairs in weights]
        match = self.match(ours, targets, constant)
        loss = output.loss + self.weighted({"match": match})
        loop.update(MAIN, loss)
        if batch["step"] % self.meta_interval == 0:
            loop.update(META, grads=self.meta_gradient(loop, batch, targets, weights))
        return {"loss": loss, "loss_task": output.loss, "loss_match": match, **output.scalars}

    def meta_gradient(
        self, loop: Loop, batch: Batch, targets: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]
    ) -> Sequence[Tensor]:
        """Gradients of the task's loss behind recorded steps, in the order of the meta-networks' parameters.

        Neither the student nor its optimizer, running statistics or random numbers notice.

        Args:
            loop: The loop, behind the student's update.
            batch: The batch of that update.
            targets: The teacher's maps.
            weights: See `weigh`, with the meta-networks' graph.
        """
        model, parameters = loop.model, loop.parameters(MAIN)

        def features() -> Features:
            return Features(model.student, batch["inputs"])

        def matching(values: Sequence[Tensor]) -> Tensor:
            match = with_values(model, parameters, values, lambda: self.match(features(), targets, weights))
            return self.weighted({"match": match})

        def task(values: Sequence[Tensor]) -> Tensor:
            return with_values(model, parameters, values, lambda: features().task(batch).loss)

        drawing = torch.random.fork_rng([loop.device] if loop.device.type == "cuda" else [])
        with drawing, frozen_statistics(model.student), torch.autocast(loop.device.type, enabled=False):
            steps = [*[matching] * self.inner_steps, task]
            optimizer = loop.optimizers[MAIN].optimizer
            values = unroll(steps, optimizer, loop.schedules[MAIN]["momentum"])
            return torch.autograd.grad(task(values), loop.parameters(META))

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The student's update and the teacher's maps, and recorded steps of the plain student, there and back."""
        parameters = [parameter for parameter in model.student.parameters() if parameter.requires_grad]

        def task(values: Sequence[Tensor]) -> Tensor:
            output = with_values(
                model, parameters, values, lambda: Features(model.student, batch["inputs"]).task(batch)
            )
            return output.loss

        def look_back() -> None:
            optimizer = torch.optim.SGD(parameters, 0.05, 0.9)
            values = unroll([task] * (self.inner_steps + 1), optimizer, 0.9)
            torch.autograd.grad(task(values), parameters)

        return [*super().passes(model, batch), look_back]
