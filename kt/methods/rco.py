"""Route-constrained optimization."""

from __future__ import annotations

from typing import Any

from kt.errors import UserError
from kt.methods.base import METHODS
from kt.methods.l2 import FeatureL2
from kt.phase import Loop, Phase
from kt.transfer import TransferModel


@METHODS.register_module(name="rco")
class RouteConstrained(FeatureL2):
    """Jin et al., "Knowledge Distillation via Route Constrained Optimization", ICCV 2019: the teacher's own route.

    The targets come from a sequence of anchors, snapshots of the teacher's training, each for an equal share of the
    epochs; the last one is the teacher. Here the anchors are imitated in their maps, as the knowledge consistent
    distillation paper's comparison does, and the learning rate follows one schedule over all of them, so that the
    length is that of the other methods.

    Args: those of `l2`. The model is handed the earlier anchors beside `teacher`, as `anchor0`, `anchor1`, ...
    """

    def __init__(self, *args: object, **options: object):
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.anchor = "teacher"

    def route(self, model: TransferModel) -> list[str]:
        """The names of a model's anchors, in order.

        Raises:
            UserError: There are none but the teacher.
        """
        anchors = sorted((name for name in model.teachers if name.startswith("anchor")), key=lambda name: int(name[6:]))
        if not anchors:
            raise UserError(
                "method=rco: expected snapshots of the teacher's training; a teacher from a checkpoint has none: let "
                "it be trained (teacher.checkpoint=null teacher.pretrained=null)"
            )
        return [*anchors, "teacher"]

    def phases(self) -> list[Phase]:
        """One phase, whose target changes between epochs."""
        return [Phase("train", self.loss, before_epoch=self.choose_anchor)]

    def choose_anchor(self, model: TransferModel, loop: Loop) -> None:
        """The anchor of an epoch: anchors share the epochs equally."""
        route = self.route(model)
        self.anchor = route[loop.epoch * len(route) // loop.max_epochs]

    def target(self, model: TransferModel) -> Any:
        """The current anchor."""
        return model.teachers[self.anchor]
