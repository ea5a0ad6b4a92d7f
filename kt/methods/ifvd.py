"""IFVD: how a segmentor's features vary within each class of an image, and its soft labels, are a teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kt.dense import DenseModel
from kt.errors import UserError
from kt.features import Features
from kt.functional import intra_class_variation, pixel_soft_target
from kt.methods.base import METHODS, Method, Student, Teacher, build_method, student_update
from kt.methods.blocks import match_size, nearest_size
from kt.phase import Batch, Phase
from kt.transfer import TransferModel

if TYPE_CHECKING:
    from kt.data import DataSpec


def labels_of(batch: Batch, size: torch.Size) -> Tensor:
    """The class at each place of a map of some size, (n, h, w): that of the nearest pixel of the truth."""
    truth = torch.stack([sample.gt_sem_seg.data for sample in batch["data_samples"]])
    return nearest_size(truth.float(), size)[:, 0].long()


def _classes(network: Any, who: str) -> int:
    """How many classes a segmentor tells apart.

    Raises:
        UserError: It is no segmentor, or its decode head does not end in a convolution to class scores.
    """
    layer = network.pixel_classifier if isinstance(network, DenseModel) else None
    if layer is None:
        kind = type(network.network).__name__
        raise UserError(
            f"method=ifvd: {who} {kind} gives no class scores of pixels; expected a segmentor whose decode head ends "
            "in a convolution, for example pspnet_resnet101"
        )
    return layer.out_channels


@METHODS.register_module(name="ifvd")
class IntraClassVariation(Method):
    """Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020.

    Features are those that the decode head's last layer reads, behind its dropout as in the released code; maps of
    another size than the student's are resized. The paper's third term, an adversarial one, is left out.

    Around another method (`ifvd+reviewkd`) its terms are added to the task's loss of that method, which says how
    training goes; both read the same pass over each network.

    Args:
        student: A segmentor.
        teacher: Another one, for the same classes.
        weight: Weight of the intra-class feature variation.
        soft_weight: Weight of the soft labels.
        base: The method that this one is around: its `name` and options; None is none.
        data, files: For the base.

    Raises:
        UserError: One of the two is no segmentor, they have other classes, or the base has no place for further terms.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        weight: float,
        soft_weight: float,
        base: Mapping[str, Any] | None,
        data: DataSpec | None = None,
        files: Mapping[str, Path] | None = None,
    ):
        super().__init__(student, teacher)
        self.classes, theirs = _classes(student, "the student"), _classes(teacher, "the teacher")
        if self.classes != theirs:
            raise UserError(
                f"method=ifvd: the teacher knows {theirs} classes, the student {self.classes}; expected the same ones"
            )
        self.weights = {"soft": soft_weight, "variation": weight}
        self.base: Method | None = None
        if base is not None:
            settings = dict(base)
            name = settings.pop("name")
            self.base = build_method(name, student, teacher, data=data, files=files, **settings)
            if not self.base.takes_terms:
                raise UserError(f"method.base.name={name}: its loss is no sum that further terms can be added to")
            self.base.around = self.add_terms
            self.facts = self.base.facts

    def phases(self) -> list[Phase]:
        """Those of the base."""
        return super().phases() if self.base is None else self.base.phases()

    def terms(self, ours: Features, theirs: Features, batch: Batch) -> dict[str, Tensor]:
        """Soft labels and intra-class feature variation."""
        (features, logits), (their_features, their_logits) = (
            (each.features.float(), each.logits.float()) for each in (ours.pixels, theirs.pixels)
        )
        labels = labels_of(batch, features.shape[2:])
        with torch.autocast(features.device.type, enabled=False):  # means over many pixels
            target = match_size(their_features, features)
            return {
                "soft": pixel_soft_target(logits, match_size(their_logits, logits)),
                "variation": intra_class_variation(features, target, labels, self.classes),
            }

    def keeps(self) -> Mapping[str, Any]:
        """What the base keeps."""
        return {} if self.base is None else self.base.keeps()

    def passes(self, model: TransferModel, batch: Batch) -> list:
        """The plain student's and one over the whole teacher; those of the base, where there is one."""
        if self.base is not None:
            return self.base.passes(model, batch)

        def teach() -> None:
            _ = Features(model.teacher, batch["inputs"], graph=False).pixels

        return [lambda: student_update(model, batch), teach]
