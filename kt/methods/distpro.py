"""DistPro: distillation along many pathways, by weights that follow a process over the whole training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kt.classifier import Classifier
from kt.errors import UserError
from kt.features import Features, Level, pair_levels
from kt.functional import hierarchical_context, interpolate_process
from kt.methods.base import METHODS, Method, Student, Teacher
from kt.methods.blocks import SMALL_IMAGE_STRIDE, nearest_size
from kt.models.checkpoints import read_file
from kt.models.cifar import initialise
from kt.phase import MAIN, Batch, Loop, Phase
from kt.transfer import TransferModel

WIDEST = 512  # channels between the layers of a transform
PER_PATHWAY = "pathways"  # the factor that is the number of pathways


class Attention(nn.Module):
    """A map times a map of one channel that is made of it by a 1x1 convolution, without a sigmoid."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) of a map (n, c, h, w)."""
        return x * self.conv(x)


def _normed(before: int, after: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(after)]


class Transform(nn.Module):
    """What brings a student's map to the channels and the size (nearest neighbours) of a teacher's.

    Args:
        kind: `conv1` is a 1x1 convolution; `conv2` a 1x1, attention and, at the teacher's size, a 3x3 convolution;
            `conv3` has two of the latter; `complex` a 3x3, attention, a 3x3 and, at the teacher's size, another 3x3,
            with ReLUs between them. Each convolution is followed by batch normalisation.
        ours: The student's channels.
        theirs: The teacher's.

    Source: DistPro's released code; the paper's figure of them is lost.
    """

    def __init__(self, kind: str, ours: int, theirs: int):
        super().__init__()
        inner = min(WIDEST, ours, theirs)
        before, after = {
            "conv1": lambda: (_normed(ours, theirs, 1), []),
            "conv2": lambda: ([*_normed(ours, inner, 1), Attention(inner)], _normed(inner, theirs, 3)),
            "conv3": lambda: (
                [*_normed(ours, inner, 1), Attention(inner)],
                [*_normed(inner, inner, 3), *_normed(inner, theirs, 3)],
            ),
            "complex": lambda: (
                [*_normed(ours, inner, 3), nn.ReLU(), Attention(inner), *_normed(inner, inner, 3), nn.ReLU()],
                _normed(inner, theirs, 3),
            ),
        }[kind]()
        self.before, self.after = nn.Sequential(*before), nn.Sequential(*after)
        initialise(self)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """A map (n, c_t, *size) of a student's map (n, c_s, h, w)."""
        return self.after(nearest_size(self.before(x), size))


def _exact(x: Tensor) -> Tensor:
    """In at least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Pathway:
    """A way from a student's level to a teacher's, both counted from 0."""

    theirs: int
    ours: int
    transform: str

    def __str__(self) -> str:
        return f"t{self.theirs + 1}-s{self.ours + 1}-{self.transform}"


def connected(connections: str | Sequence[Sequence[int]], theirs: int, ours: int) -> list[tuple[int, int]]:
    """Pairs (teacher's level, student's level), counted from 0 and sorted.

    Args:
        connections: See `Pathways`.
        theirs, ours: How many levels there are.

    Raises:
        UserError: There is no pair, or one names a level that there is not.
    """
    if isinstance(connections, str):
        return [(i, j) for i in range(theirs) for j in range(i if connections == "rising" else 0, ours)]
    for pair in connections or [[]]:
        if len(pair) != 2 or not (1 <= pair[0] <= theirs and 1 <= pair[1] <= ours):
            raise UserError(
                f"method.connections={list(pair)}: expected pairs [teacher's map, student's map] of 1 to {theirs} and "
                f"1 to {ours}"
            )
    return sorted({(i - 1, j - 1) for i, j in connections})


class Pathways(Method):
    """Distances of transformed student maps from teacher maps, before their last ReLU, along many pathways.

    Args:
        student: The student.
        teacher: The teacher.
        transforms: Kinds, each for every pair of levels; None: by the size of images that the networks are for.
        connections: `all` pairs of levels, or `rising`: to no deeper level of the teacher than the student's; pairs
            [teacher's, student's] of levels counted from 1; or None.
        pooled: Whether the penultimate features are a level, or None.
        factor: On the weighted sum of distances: a number, or `pathways` for their number.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        transforms: Sequence[str] | None,
        connections: str | Sequence[Sequence[int]] | None,
        pooled: bool | None,
        factor: str | float,
    ):
        super().__init__(student, teacher)
        assert teacher is not None
        small = student.stages[-1].stride <= SMALL_IMAGE_STRIDE
        large = isinstance(student, Classifier) and not small
        kinds = transforms or (("conv1", "conv2", "conv3") if small else ("complex",))
        self.ours: list[Level]
        self.theirs: list[Level]
        self.ours, self.theirs = pair_levels(student, teacher, large if pooled is None else pooled)
        if connections is None:
            connections = "rising" if large else "all"
        chosen = connected(connections, len(self.theirs), len(self.ours))
        self.pathways = [Pathway(i, j, kind) for i, j in chosen for kind in kinds]
        self.transforms = nn.ModuleList(
            Transform(each.transform, self.ours[each.ours].channels, self.theirs[each.theirs].channels)
            for each in self.pathways
        )
        self.factor = len(self.pathways) if factor == PER_PATHWAY else float(factor)
        self.facts["pathways"] = len(self.pathways)

    def maps(self, ours: Features, live: Sequence[int]) -> dict[int, Tensor]:
        """The student's maps at the ends of some pathways, by level: (n, c, h, w) in full precision.

        To be asked for before any outputs, so that one run of a stage gives both.
        """
        levels = sorted({self.pathways[number].ours for number in live})
        return {level: _exact(ours.at(self.ours[level])) for level in levels}

    def targets(self, theirs: Features, live: Sequence[int]) -> dict[int, Tensor]:
        """The teacher's, the same way."""
        levels = sorted({self.pathways[number].theirs for number in live})
        return {level: _exact(theirs.at(self.theirs[level])) for level in levels}

    def distances(self, ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor], live: Sequence[int]) -> list[Tensor]:
        """The distance along each of some pathways, scalars; transforms of others are not called.

        Args:
            ours: The student's maps by level, see `maps`.
            theirs: The teacher's.
            live: Numbers of pathways.
        """
        found = []
        for number in live:
            pathway, target = self.pathways[number], theirs[self.pathways[number].theirs]
            guess = self.transforms[number](ours[pathway.ours], target.shape[2:])
            found.append(hierarchical_context(guess, target))
        return found

    @property
    def everything(self) -> range:
        """The numbers of all pathways."""
        return range(len(self.pathways))


def read_process(path: Path) -> dict[str, Any]:
    """What a search leaves: `logits` and `weights` (steps, pathways), `pathways` (their names) and where it is from.

    Raises:
        UserError: There is no such file, or it is none.
    """
    found = read_file(path, "method.file")
    if not isinstance(found, dict) or not {"logits", "weights", "pathways"} <= found.keys():
        raise UserError(f"method.file={path}: expected a process as distpro_search leaves it; this is something else")
    return found


@METHODS.register_module(name="distpro")
class DistPro(Pathways):
    """Deng et al., "DistPro: Searching A Fast Knowledge Distillation Process via Meta Optimization", ECCV 2022.

    Retraining: the recorded weights, stretched to the length of this training, weight the pathways' distances.

    Open in the paper: the released code multiplies the sum by the number of pathways (`factor`), which the paper's
    eq. 2 does not; the logit below which a pathway is not computed is taken as that of the search at that moment.

    Args: those of `Pathways`, and
        process: `search`, `final` (the last weights of the search throughout) or `equal` (all alike, never dropped).
        clip: Logits up to it drop their pathway; None: none does.
        files: The searched process, as `search`; `equal` needs none.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        process: str,
        clip: float | None,
        files: Mapping[str, Path] | None = None,
        **shared: Any,
    ):
        super().__init__(student, teacher, **shared)
        self.weights = {"pathways": self.factor}
        count = len(self.pathways)
        self._stretched: tuple[int, Tensor, Tensor] | None = None
        if process == "equal":
            self.logits, self.recorded, self.clip = torch.zeros(1, count), torch.full((1, count), 1 / count), None
            return
        if "search" not in (files or {}):
            raise UserError(
                f"method.process={process}: needs a searched process; name its file (method.file, or from Python "
                "files={'search': path}), or choose equal"
            )
        assert files is not None
        self.clip, path = clip, files["search"]
        found = read_process(path)
        wanted = [str(pathway) for pathway in self.pathways]
        if found["pathways"] != wanted:
            others = [name for name in found["pathways"] if name not in wanted]
            hint = f", among them {others[0]}" if others else ""
            raise UserError(
                f"method.file={path}: a process of {len(found['pathways'])} pathways{hint}; "
                f"expected the {count} of this pair, {wanted[0]} to {wanted[-1]}"
            )
        first = -1 if process == "final" else 0
        self.logits, self.recorded = found["logits"][first:], found["weights"][first:]

    def phases(self) -> list[Phase]:
        """One phase, whose step leaves alone what is dropped: under DDP every parameter would need a gradient."""
        return [Phase("train", step=self.step)]

    def step(self, loop: Loop, batch: Batch) -> dict[str, Tensor | float]:
        """One update by the task's loss and the pathways that are live at this step."""
        loss, logged = self.loss(loop.model, batch)
        loop.update(MAIN, loss)
        return {"loss": loss, **logged, "live": float(len(self.row(batch)[0]))}

    def row(self, batch: Batch) -> tuple[list[int], list[float]]:
        """The live pathways and their weights at a batch's step, on the host, so that nobody waits for a device."""
        step, total = batch["step"], batch["total"]
        if self._stretched is None or self._stretched[0] != total:
            logits, weights = (interpolate_process(each, total) for each in (self.logits, self.recorded))
            live = torch.ones_like(logits, dtype=torch.bool) if self.clip is None else logits > self.clip
            self._stretched = (total, live, weights)
        _, live, weights = self._stretched
        numbers = live[step].nonzero().flatten().tolist()
        return numbers, weights[step, numbers].tolist()

    def compare(self, ours: Features, theirs: Features, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss and the weighted distances."""
        live, _ = self.row(batch)
        self.maps(ours, live), self.targets(theirs, live)
        return super().compare(ours, theirs, batch)

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """The weighted sum of the live pathways' distances."""
        live, weights = self.row(batch)
        distances = self.distances(self.maps(ours, live), self.targets(theirs, live), live)
        total = torch.zeros((), device=batch["inputs"].device)
        for weight, distance in zip(weights, distances, strict=True):
            total = total + weight * distance
        return {"pathways": total}

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The student's with the live pathways' transforms, and the teacher's as deep as these reach."""
        known = Features(model.teacher, batch["inputs"], graph=False)
        self.targets(known, self.everything)

        def learn() -> None:
            self.compare(Features(model.student, batch["inputs"]), known, batch)[0].backward()

        def teach() -> None:
            self.targets(Features(model.teacher, batch["inputs"], graph=False), self.row(batch)[0])

        return [learn, teach]
