"""Baselines that compare maps: FitNets, attention, neuron selectivity and factor transfer, activation boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.errors import UserError, nearest
from kt.functional import activation_boundary, attention_transfer, factor_transfer, hint, nst, soft_target
from kt.methods.base import METHODS, Method, Student, Teacher, pair_stages, teacher_levels
from kt.methods.blocks import match_size, pair_blocks
from kt.phase import CONSTANT, Batch, Phase, only, student_alone
from kt.stages import as_map
from kt.transfer import TransferModel

Stages = str | Sequence[int]


def choose_pairs(
    student: Student, teacher: Teacher, stages: Stages, key: str = "method.stages"
) -> list[tuple[int, int]]:
    """Pairs (student stage, teacher stage) whose maps are compared.

    Args:
        student: The student.
        teacher: The teacher.
        stages: `all` that have a teacher stage of the same stride, the `last` of them, `blocks` for the ends of the
            blocks (every stage but a stem), or the student's stages counted from 0.
        key: What error messages call it.

    Raises:
        UserError: It is none of these, or a stage has no teacher stage of the same stride.
    """
    pairs = pair_stages(student.stages, teacher.stages)
    named = {"all": pairs, "last": pairs[-1:], "blocks": pair_blocks(student.stages, teacher.stages)}
    if isinstance(stages, str):
        if stages not in named:
            raise UserError(f"{key}={stages}: expected {', '.join(named)} or numbers of stages{nearest(stages, named)}")
        return named[stages]
    found = dict(pairs)
    for index in stages:
        if index not in found:
            raise UserError(
                f"{key}={index}: expected one of {sorted(found)}, the student's stages that have a teacher stage of "
                "the same stride"
            )
    return [(index, found[index]) for index in sorted(set(stages))]


@METHODS.register_module(name="fitnet")
class FitNet(Method):
    """Romero et al., "FitNets: Hints for Thin Deep Nets", 2015: one stage's map regresses the teacher's, or several do.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum of the hints (mean squared errors).
        hint_layer: Index of the student's stage; None takes the middle one, -1 the last. Several, or a name of
            `choose_pairs`, give as many hints.
        regressor: `conv_bn_relu` (1x1 convolution, batch normalisation, ReLU) or `conv`.
    """

    dense = True
    compares_channels = True

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weight: float,
        hint_layer: int | Stages | None,
        regressor: str,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        if hint_layer is None:
            hint_layer = len(student.stages) // 2
        if hint_layer == -1:
            hint_layer = "last"
        chosen: Stages = [hint_layer] if isinstance(hint_layer, int) else hint_layer
        self.pairs = choose_pairs(student, teacher, chosen, "method.hint_layer")
        self.weight = weight
        self.regressors = nn.ModuleList()
        for i, j in self.pairs:
            ours, theirs = student.stages[i].channels, teacher.stages[j].channels
            layers: list[nn.Module] = [nn.Conv2d(ours, theirs, 1)]
            if regressor == "conv_bn_relu":
                layers += [nn.BatchNorm2d(theirs), nn.ReLU()]
            self.regressors.append(nn.Sequential(*layers))

    def teacher_depth(self, model: TransferModel) -> int:
        """Up to the last hint."""
        return max(theirs for _, theirs in self.pairs) + 1

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        levels = model.student.extract(batch["inputs"])
        output = model.student.task(levels, batch)
        targets = teacher_levels(model, batch, self.teacher_depth(model))
        hints = []
        for (i, j), regressor in zip(self.pairs, self.regressors, strict=True):
            target = as_map(targets[j])
            hints.append(hint(match_size(regressor(as_map(levels[i])), target), target))
        distance = torch.stack(hints).sum()
        logged = {"loss_task": output.loss, "loss_hint": distance, **output.scalars}
        return output.loss + self.weight * distance, logged


class MapTransfer(Method):
    """The task loss and a distance of maps, summed over pairs of stages; nothing beside the student is trained.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum.
        stages: Which stages are compared, see `choose_pairs`.
    """

    dense = True
    logged_as: ClassVar[str]

    def __init__(self, student: Student, teacher: Teacher | None, weight: float, stages: Stages):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weight = weight
        self.pairs = choose_pairs(student, teacher, stages)

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The distance of a student's map (n, c_s, h, w) from a teacher's (n, c_t, h', w'), a scalar."""
        raise NotImplementedError

    def teacher_depth(self, model: TransferModel) -> int:
        """Up to the last pair."""
        return max(theirs for _, theirs in self.pairs) + 1

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        levels = model.student.extract(batch["inputs"])
        output = model.student.task(levels, batch)
        targets = teacher_levels(model, batch, self.teacher_depth(model))
        distance = torch.stack([self.distance(as_map(levels[i]), as_map(targets[j])) for i, j in self.pairs]).sum()
        logged = {"loss_task": output.loss, self.logged_as: distance, **output.scalars}
        return output.loss + self.weight * distance, logged


@METHODS.register_module(name="at")
class AttentionTransfer(MapTransfer):
    """Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017: spatial attention maps of every stage.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum over stages.
        form: `mean` (as the released code computes it) or `sum` (the paper's norm).
        stages: Which stages are compared, see `choose_pairs`.
    """

    logged_as = "loss_attention"

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weight: float,
        form: str,
        stages: Stages,
    ):
        super().__init__(student, teacher, weight, stages)
        self.form = form

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Of attention maps."""
        return attention_transfer(ours, theirs, form=self.form)


@METHODS.register_module(name="nst")
class NeuronSelectivityTransfer(MapTransfer):
    """Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017.

    The squared maximum mean discrepancy of channel activations under a polynomial kernel, of every stage.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the sum over stages (50: RepDistiller's for CIFAR-100).
        stages: Which stages are compared, see `choose_pairs`.
    """

    logged_as = "loss_selectivity"

    def __init__(self, student: Student, teacher: Teacher | None, weight: float, stages: Stages):
        super().__init__(student, teacher, weight, stages)

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Of channel activations."""
        return nst(ours, theirs)


def _leaky_stack(channels: list[int], transposed: bool = False, normalised: bool = False) -> nn.Sequential:
    """3x3 convolutions between the given channel counts, each followed by an optional BN and a leaky ReLU."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers.append(kind(before, after, 3, padding=1))
        if normalised:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


@METHODS.register_module(name="ft")
class FactorTransfer(Method):
    """Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", 2018.

    A first phase trains the paraphraser, an autoencoder on the teacher's last map; then the student's translator
    imitates its factors.

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the factor distance.
        factor: Factor channels as a share of the teacher's channels.
        init_fraction: Length of the paraphraser's phase as a share of the schedule.
        paraphraser_lr: Learning rate of that phase.
        form: `repdistiller` (normalised mean-square maps) or `official` (normalised raw factors).
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        weight: float,
        factor: float,
        init_fraction: float,
        paraphraser_lr: float,
        form: str,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weight, self.form = weight, form
        self.init_fraction, self.paraphraser_lr = init_fraction, paraphraser_lr
        ours, theirs = student.stages[-1].channels, teacher.stages[-1].channels
        factors = max(1, int(theirs * factor))
        self.encoder = _leaky_stack([theirs, theirs, factors, factors])
        self.decoder = _leaky_stack([factors, factors, theirs, theirs], transposed=True)
        self.translator = _leaky_stack([ours, ours, factors, factors], normalised=True)

    def phases(self) -> list[Phase]:
        """Paraphraser, then student and translator."""
        return [
            Phase(
                "paraphraser",
                self.reconstruction,
                trains=only(self._autoencoder, lr=self.paraphraser_lr, **CONSTANT),
                fraction=self.init_fraction,
                evaluate=False,
            ),
            Phase("train", self.loss, trains=only(self._groups)),
        ]

    def _autoencoder(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*self.encoder.parameters(), *self.decoder.parameters()]}]

    def _groups(self, model: TransferModel) -> list[dict[str, Any]]:
        return [{"params": [*model.student.parameters(), *self.translator.parameters()]}]

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages, no head."""
        return len(model.teacher.stages)

    def reconstruction(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the autoencoder."""
        target = as_map(teacher_levels(model, batch)[-1])
        return hint(self.decoder(self.encoder(target)), target), {}

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        levels = model.student.extract(batch["inputs"])
        output = model.student.task(levels, batch)
        with torch.no_grad():
            target = self.encoder(as_map(teacher_levels(model, batch)[-1]))
        guess = match_size(self.translator(as_map(levels[-1])), target)
        distance = factor_transfer(guess, target, form=self.form)
        logged = {"loss_task": output.loss, "loss_factor": distance, **output.scalars}
        return output.loss + self.weight * distance, logged


@METHODS.register_module(name="ab")
class ActivationBoundary(Method):
    """Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI 2019.

    A first phase pulls the student's pre-activations to the teacher's side of zero, without a task loss; then the
    student trains by cross-entropy (or by soft targets alone, as the authors' code does).

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the boundary loss on top of the released code's scale (see `boundary`).
        margin: How far beyond zero.
        init_fraction: Length of the first phase as a share of the schedule.
        after: `task` or `kd`.
        temperature: Of the soft targets, if `after` is `kd`.
        stages: `all` or `last`.
    """

    compares_channels = True

    # The released CIFAR-100 code divides the sum over three stages by 1000 and multiplies it by 3.
    SCALE = 3 / 1000

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        weight: float,
        margin: float,
        init_fraction: float,
        after: str,
        temperature: float,
        stages: str,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        self.weight, self.margin, self.init_fraction = weight, margin, init_fraction
        self.after, self.temperature = after, temperature
        self.pairs = choose_pairs(student, teacher, stages)
        self.connectors = nn.ModuleList()
        for i, j in self.pairs:
            ours, theirs = student.stages[i].channels, teacher.stages[j].channels
            self.connectors.append(nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs)))

    def phases(self) -> list[Phase]:
        """Boundaries, then the task."""
        return [
            Phase(
                "boundaries",
                self.boundary,
                trains=only(self._body, **CONSTANT),
                fraction=self.init_fraction,
                evaluate=False,
            ),
            Phase("train", self.loss, trains=only(student_alone)),
        ]

    def _body(self, model: TransferModel) -> list[dict[str, Any]]:
        last = max(i for i, _ in self.pairs)
        body = [p for stage in model.student.stages[: last + 1] for p in stage.parameters()]
        return [{"params": [*body, *self.connectors.parameters()]}]

    def teacher_depth(self, model: TransferModel) -> int | None:
        """The main phase asks the teacher only for soft targets."""
        return None if self.after == "kd" else 0

    def boundary(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over stages, each half as heavy as the next deeper one."""
        ours, _ = model.student.extract_both(batch["inputs"], max(i for i, _ in self.pairs) + 1)
        with torch.no_grad():
            theirs, _ = model.teacher.extract_both(batch["inputs"], max(j for _, j in self.pairs) + 1)
        total = torch.zeros((), device=batch["inputs"].device)
        for number, ((i, j), connector) in enumerate(zip(self.pairs, self.connectors, strict=True), 1):
            target = as_map(theirs[j])
            guess = match_size(connector(as_map(ours[i])), target)
            total = total + 2.0 ** (number - len(self.pairs)) * activation_boundary(guess, target, self.margin)
        return self.weight * self.SCALE * total, {}

    def loss(self, model: TransferModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = model.student.task(model.student.extract(batch["inputs"]), batch)
        if self.after == "task":
            return output.loss, output.scalars
        with torch.no_grad():
            target = model.teacher(batch["inputs"])
        soft = soft_target(output.logits.float(), target.float(), self.temperature)
        return soft, {"loss_task": output.loss, "loss_soft": soft, **output.scalars}
