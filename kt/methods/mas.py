"""Multiple auxiliary subspaces: teachers of another task, whose features auxiliary networks fit to the student's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from kt.classifier import Classifier
from kt.data.loaders import Loader
from kt.data.spec import Data
from kt.errors import UserError
from kt.features import Features
from kt.functional import image_errors, pair_weights, subspace_loss
from kt.hypergradient import derivatives_ahead
from kt.methods.base import METHODS, Method, student_update, task_alone
from kt.methods.blocks import choose_pairs, match_size
from kt.phase import CONSTANT, MAIN, Batch, Loop, Phase, Trained, student_alone
from kt.settings import AS, SOURCE
from kt.stages import as_map
from kt.transfer import TransferModel, frozen_statistics

AUXILIARY, META = "auxiliary", "meta"  # names of optimizers beside the main one
SQUEEZE = 16  # channels over those between the two layers of squeeze and excitation


class AuxiliaryNetworks(nn.Module):
    """What stands for the target layers' maps, made of the source layers' maps.

    Args:
        kind: `fc` or `se`, of the network that the last source layer's map goes through (G_A).
        last: Channels of that map.
        direct: Channels of the source layers that are taken as they are as well.
        ours: Channels of the target layers.
        interpolated: Whether every map gets a 1x1 convolution and a bilinear interpolation (G_N) to each target layer;
            else what G_A gives is the only thing compared.
    """

    def __init__(self, kind: str, last: int, direct: Sequence[int], ours: Sequence[int], interpolated: bool):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(last, ours[-1], 1)]
        if kind == "se":
            layers.insert(0, SqueezeExcitation(last, max(1, last // SQUEEZE)))
        self.adapter = nn.Sequential(*layers)
        self.direct = len(direct)
        self.projections = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, wanted, 1) for wanted in ours)
            for channels in ((*direct, ours[-1]) if interpolated else ())
        )

    def forward(self, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each direct source layer, and last for G_A, what stands for every target map: maps of their shapes.

        Args:
            theirs: The source layers' maps (n, c, h, w).
            ours: The target layers' maps, for their sizes.
        """
        adapted = self.adapter(theirs[-1])
        if not self.projections:
            return [[adapted]]
        inputs = [*theirs[: self.direct], adapted]
        return [
            [_projected(convolution, x, target) for convolution, target in zip(row, ours, strict=True)]  # type: ignore[call-overload]
            for x, row in zip(inputs, self.projections, strict=True)
        ]


def _projected(convolution: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """A map through a 1x1 convolution at the target's size; the two commute, so it convolves the smaller map."""
    enlarged = target[0, 0].numel() > x[0, 0].numel()
    return match_size(convolution(x), target) if enlarged else convolution(match_size(x, target))


class Subspaces(Method):
    """Chen et al., "MAKD: Multiple Auxiliary Knowledge Distillation", what all of its methods do.

    The teacher (G_S) has learnt another task. After some epochs of the task's loss alone (step 1), every iteration is a
    round: auxiliary networks learn to make the student's features out of the teacher's (step 2), then the student
    learns from the task and from what they make now (step 3). Neither side moves in the other's step, so one pass over
    the student and one over the teacher serve both.

    Settings of ours, since the paper leaves them open: the length of step 1, how often step 2 repeats, its optimizer
    and the weight of the matching loss. Read so: a round is one iteration on one batch, and step 3 freezes all that
    step 2 trains (it names G_A alone).

    Args:
        student: The student.
        teacher: The teacher.
        weight: Weight of the matching loss.
        reduction: `mean` or `sum` of squared differences over the elements of an image.
        first_epochs: Length of step 1.
        aux_updates: Updates of the auxiliary networks in a round.
        aux_lr: Learning rate of their Adam.
        auxiliary: `fc` or `se`.
    """

    networks: nn.ModuleList  # a set of auxiliary networks for each kind of images they learn on
    shares: tuple[float, ...] = (1.0,)  # of each set in the matching loss; a second one learns on source images
    meta: nn.ModuleList | None  # gives the weights of pairs of layers
    meta_schedule: dict[str, float]
    meta_interval: int
    names: dict[str, tuple[int, int]]  # pairs of layers by the name of their weight

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        weight: float,
        reduction: str,
        first_epochs: int,
        aux_updates: int,
        aux_lr: float,
        auxiliary: str,
    ):
        super().__init__(student, teacher)
        self.weight, self.reduction, self.first_epochs = weight, reduction, first_epochs
        self.aux_updates, self.aux_lr, self.auxiliary = aux_updates, aux_lr, auxiliary
        self.meta = None

    def connect(self, last: int, direct: Sequence[int], ours: Sequence[int], interpolated: bool) -> None:
        """Makes the auxiliary networks, see `AuxiliaryNetworks`."""
        made = (AuxiliaryNetworks(self.auxiliary, last, direct, ours, interpolated) for _ in self.shares)
        self.networks = nn.ModuleList(made)

    def sources(self, theirs: Features) -> list[Tensor]:
        """The teacher's layers that take part, as maps (n, c, h, w); the last one goes through G_A."""
        raise NotImplementedError

    def targets(self, ours: Features) -> list[Tensor]:
        """The student's layers that take part, as maps (n, c, h, w)."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        """One phase, step 1 included, so that the whole training follows the schedule of any other method."""
        constant = {"optimizer": "adam", "clip_grad": None, **CONSTANT}
        own = {**constant, "lr": self.aux_lr, "weight_decay": 0.0}
        trains = {
            MAIN: Trained(student_alone),
            AUXILIARY: Trained(lambda model: [{"params": [*model.method.networks.parameters()]}], own),
        }
        if self.meta is not None:
            own = {**constant, **self.meta_schedule}
            trains[META] = Trained(lambda model: [{"params": [*model.method.meta.parameters()]}], own)
        loaders = {SOURCE: source_images} if len(self.shares) > 1 else {}
        return [Phase("train", step=self.step, trains=trains, loaders=loaders, before_epoch=self.check_length)]

    def check_length(self, model: TransferModel, loop: Loop) -> None:
        """Refuses a training that ends before the first round."""
        AS.check({"first_epochs": self.first_epochs}, loop.max_epochs)

    def step(self, loop: Loop, batch: Batch) -> dict[str, Tensor]:
        """Step 1, or a round of steps 2 and 3."""
        model = loop.model
        ours, theirs = self.features(model, batch)
        output = ours.task(batch)
        if loop.epoch < self.first_epochs:
            loop.update(MAIN, output.loss)
            return {"loss": output.loss, "loss_task": output.loss, **output.scalars}
        sources, targets = self.sources(theirs), self.targets(ours)
        examples = [(sources, [target.detach() for target in targets])]
        if len(self.shares) > 1:
            examples.append(self.source_examples(model, loop.next(SOURCE)))
        for _ in range(self.aux_updates):
            alignment = self.alignment(examples)
            loop.update(AUXILIARY, torch.stack(alignment).sum())
        with torch.no_grad():
            mapped = [networks(sources, targets) for networks in self.networks]
        errors, weights = self.errors(mapped, targets), self.weigh(sources)
        match = subspace_loss(errors, None if weights is None else weights.detach())
        loss = output.loss + self.weight * match
        logged = {"loss": loss, "loss_task": output.loss, "loss_match": match, **output.scalars}
        logged |= dict(zip(("loss_align", "loss_align_source"), alignment, strict=False))
        logged["unexplained"] = unexplained(mapped[0], targets)
        if weights is not None:
            logged |= {name: weights[pair].mean() for name, pair in self.names.items()}
        if weights is None or batch["step"] % self.meta_interval:
            loop.update(MAIN, loss)
            return logged
        gradients = torch.autograd.grad(loss, loop.parameters(MAIN), allow_unused=True)
        # The loss's own gradient would move all weight to the pairs that match already: weights follow what the match
        # of a pair does to the task alone.
        loop.update(META, subspace_loss(self.response(loop, batch, mapped, gradients), weights))
        loop.update(MAIN, grads=gradients)
        return logged

    def source_examples(self, model: TransferModel, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The layers of both networks for source images, which leave running statistics alone."""
        with torch.no_grad(), frozen_statistics(model.student):
            ours, theirs = self.features(model, batch)
            return self.sources(theirs), self.targets(ours)

    def alignment(self, examples: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[Tensor]:
        """The loss of each set of auxiliary networks on its own images' source and target maps."""
        return [
            subspace_loss(self.compared(networks(sources, targets), targets))
            for networks, (sources, targets) in zip(self.networks, examples, strict=True)
        ]

    def compared(self, mapped: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> Tensor:
        """The errors of what stands for the target maps, by source layer, target layer and image (p, q, n)."""
        rows = [[image_errors(x, y, self.reduction) for x, y in zip(row, targets, strict=True)] for row in mapped]
        return torch.stack([torch.stack(row) for row in rows])

    def errors(self, mapped: Sequence[Sequence[Sequence[Tensor]]], targets: Sequence[Tensor]) -> Tensor:
        """The same of all sets of auxiliary networks together."""
        return sum(share * self.compared(each, targets) for share, each in zip(self.shares, mapped, strict=True))  # type: ignore[return-value]

    def weigh(self, sources: Sequence[Tensor]) -> Tensor | None:
        """The weights of the errors, in their shape; None where all are one."""
        if self.meta is None:
            return None
        # Beside its direct pairs, the last layer has those of what G_A makes of it.
        inputs = [*sources, sources[-1]][-len(self.meta) :]
        logits = [layer(source.mean((2, 3))) for layer, source in zip(self.meta, inputs, strict=True)]
        return pair_weights(torch.stack(logits)).transpose(1, 2)

    def response(
        self, loop: Loop, batch: Batch, mapped: Sequence[Sequence[Sequence[Tensor]]], gradients: Sequence[Tensor | None]
    ) -> Tensor:
        """What the weight of each error does to the task's loss after this update, to first order: (p, q, n).

        The update is taken for one of SGD, whatever the schedule's optimizer is.
        """
        model, optimizer = loop.model, loop.optimizers[MAIN].optimizer

        def losses() -> Tensor:
            return self.errors(mapped, self.targets(Features(model.student, batch["inputs"])))

        found, _ = derivatives_ahead(model.student, optimizer, gradients, lambda: task_alone(model, batch)[0], losses)
        return -optimizer.param_groups[0]["lr"] * self.weight * found

    def teacher_depth(self, model: TransferModel) -> int:
        """All stages, no head."""
        return len(model.teacher.stages)

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """Beside those of both networks: the auxiliary ones', the look-ahead's and those over source images."""
        with torch.no_grad():
            ours, theirs = self.features(model, batch)
            sources, targets = self.sources(theirs), self.targets(ours)
        examples = [(sources, targets)] * len(self.shares)

        def align() -> None:
            torch.stack(self.alignment(examples)).sum().backward()

        def match() -> None:
            moving = [target.clone().requires_grad_() for target in targets]
            with torch.no_grad():
                mapped = [networks(sources, targets) for networks in self.networks]
            subspace_loss(self.errors(mapped, moving)).backward()

        def forward() -> None:
            with torch.no_grad():
                model.student.extract(batch["inputs"])

        found = [*super().passes(model, batch), *[align] * self.aux_updates, match]
        if self.meta is not None:
            found += [lambda: student_update(model, batch), forward, forward]
        if len(self.shares) > 1:
            found.append(lambda: self.source_examples(model, batch))
        return found


@torch.no_grad()
def unexplained(mapped: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> Tensor:
    """The squared error of what stands for target maps over the maps' own variance, mean over all pairs.

    At one the auxiliary networks know nothing of the image: a constant would do as well.
    """
    variances = [y.float().var((0, 2, 3), unbiased=False).mean().clamp(min=1e-12) for y in targets]
    shares = [
        F.mse_loss(x.float(), y.float()) / variance
        for row in mapped
        for x, y, variance in zip(row, targets, variances, strict=True)
    ]
    return torch.stack(shares).mean()


def source_images(data: Data) -> Loader:
    """The loader of source images that lies beside a dataset.

    Raises:
        UserError: There is none.
    """
    if SOURCE not in data.further:
        raise UserError(
            "method=m2a2s: needs unlabelled source images; name them by dataset@method.source=<choice>, or from Python "
            "by data.further['source'] = kt.data.unlabelled(...)"
        )
    return data.further[SOURCE]


@METHODS.register_module(name="as")
class AuxiliarySubspace(Subspaces):
    """AS: one auxiliary network on the penultimate features, see `Subspaces`."""

    def __init__(self, student: Classifier, teacher: Classifier | None, **shared: Any):
        super().__init__(student, teacher, **shared)
        assert teacher is not None
        theirs, ours = (network.head.classifier.in_features for network in (teacher, student))
        self.connect(theirs, [], [ours], interpolated=False)

    def sources(self, theirs: Features) -> list[Tensor]:
        """The penultimate feature."""
        return [theirs.pooled[:, :, None, None]]

    def targets(self, ours: Features) -> list[Tensor]:
        """The penultimate feature."""
        return [ours.pooled[:, :, None, None]]


@METHODS.register_module(name="mas")
class MultipleSubspaces(Subspaces):
    """MAS: one auxiliary network, at each position of the last map, and from it to every layer of the student.

    How much each pair of layers counts, a meta network says from the teacher's pooled map, as in "Learning What and
    Where to Transfer" (Jang et al. 2019). It learns from what the match of a pair does to the task's loss one step
    ahead, which takes two perturbed passes (`kt.hypergradient`) where L2T unrolls whole steps.

    Args: those of `as`, and
        stages: Which layers take part, see `choose_pairs`.
        pair_weights: `meta`, or `uniform` where all count alike.
        meta_lr: Learning rate of the meta network's Adam.
        meta_weight_decay: Its weight decay.
        meta_interval: Updates of the student for each of its own.
    """

    direct: ClassVar[bool] = False  # whether every layer of the teacher is matched as it is, too

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier | None,
        stages: str | Sequence[int],
        pair_weights: str,
        meta_lr: float,
        meta_weight_decay: float,
        meta_interval: int,
        **shared: Any,
    ):
        super().__init__(student, teacher, **shared)
        assert teacher is not None
        pairs = choose_pairs(student, teacher, stages)
        self.ours, theirs = sorted({i for i, _ in pairs}), sorted({j for _, j in pairs})
        self.theirs = theirs if self.direct else theirs[-1:]
        targets, sources = [student.stages[i] for i in self.ours], [teacher.stages[j] for j in self.theirs]
        channels, last = [stage.channels for stage in sources], sources[-1].channels
        direct = channels if self.direct else []
        self.connect(last, direct, [stage.channels for stage in targets], interpolated=True)
        rows = [*(stage.name for stage in sources if self.direct), "adapted"]
        self.names = {
            f"weight_{row}_{target.name}": (p, q) for p, row in enumerate(rows) for q, target in enumerate(targets)
        }
        if pair_weights == "meta":
            self.meta_interval = meta_interval
            self.meta_schedule = {"lr": meta_lr, "weight_decay": meta_weight_decay}
            self.meta = nn.ModuleList(nn.Linear(each, len(targets)) for each in (*direct, last))
            for parameter in self.meta.parameters():
                nn.init.zeros_(parameter)  # before anything is known, all pairs count alike

    def sources(self, theirs: Features) -> list[Tensor]:
        """The outputs of the teacher's stages that take part."""
        return [as_map(theirs.level(index)) for index in self.theirs]

    def targets(self, ours: Features) -> list[Tensor]:
        """The outputs of the student's stages that take part."""
        return [as_map(ours.level(index)) for index in self.ours]


@METHODS.register_module(name="m2as")
class MultipleToMultipleSubspaces(MultipleSubspaces):
    """M2AS: MAS, and beside it from every layer of the teacher to every layer of the student. Args: those of `mas`."""

    direct = True


@METHODS.register_module(name="m2a2s")
class MultipleAuxiliaryNetworks(MultipleToMultipleSubspaces):
    """M2A2S: M2AS with a second set of auxiliary networks, which learns on source images, without labels.

    Both sets teach on the target images. How the second one enters the matching loss the paper does not say; here the
    errors are averaged.

    Args: those of `m2as`, and
        source_weight: Share of the second set in the matching loss.
    """

    def __init__(self, student: Classifier, teacher: Classifier | None, source_weight: float, **shared: Any):
        self.shares = (1 - source_weight, source_weight)
        super().__init__(student, teacher, **shared)
