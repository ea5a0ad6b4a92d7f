"""Knowledge transfer from a plain config of mmdet or mmseg: `custom_imports = dict(imports=["kt.mm"])`.

The libraries' own runners, loaders, hooks and schedules train `type="KnowledgeTransfer"` in the place of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor

from kt.dense import DenseModel
from kt.errors import UserError
from kt.files import at_home
from kt.methods import build_method
from kt.models.checkpoints import load_weights
from kt.models.configs import read_config_file
from kt.models.dense import build_dense, without_pretrained
from kt.recomputing import recomputing
from kt.transfer import TransferModel


@MODELS.register_module()
class KnowledgeTransfer(BaseModel):
    """A detector or segmentor under one of the project's methods.

    In a checkpoint the student's keys begin with `student.network.`; `init_cfg=dict(type="Pretrained",
    checkpoint=..., prefix="student.network.")` loads them into the plain model.

    Args:
        student: The student's model, as its own config has it.
        method: `type` names the method (`hybrid_forward`, `fitnet`, ...); the rest are its options.
        teacher: `config`, a file of mmdet or mmseg or the name of one that comes with them, or `model`, such a file's
            model; and `checkpoint`, a file of its weights or where to download one.
        activation_checkpointing: Less memory for longer steps, to the same numbers (`kt.recomputing`).

    Raises:
        UserError: The method needs a teacher, the teacher has no checkpoint, or the method trains in several phases or
            makes its updates itself.
    """

    def __init__(
        self,
        student: Mapping[str, Any],
        method: Mapping[str, Any],
        teacher: Mapping[str, Any] | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        options = dict(method)
        taught, frozen = DenseModel(build_dense(dict(student), "student")), _read_teacher(teacher) if teacher else None
        built = build_method(options.pop("type"), taught, frozen, **options)
        phases = built.phases()
        if len(phases) > 1 or phases[0].loss is None:
            names = ", ".join(phase.name for phase in phases)
            what = f"trains in the phases {names}" if len(phases) > 1 else "makes its updates itself"
            raise UserError(f"method={method['type']}: {what}; use `python -m experiments.run`")
        self.transfer = TransferModel(taught, built, {"teacher": frozen} if frozen is not None else None)
        self.transfer.phase = phases[0]

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """That of the student and of the method's own parts; no teacher is in it."""
        return self.transfer.state_dict(*arguments, **keywords)

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Takes what `state_dict` gives."""
        return self.transfer.load_state_dict(state_dict, *arguments, **keywords)

    def init_weights(self) -> None:
        """Does nothing: the student came initialised as its config says, the teacher with its weights."""

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        """Mode `loss` gives the method's loss and what it logs; every other mode is the plain student's."""
        if mode != "loss":
            return self.transfer.student(inputs, data_samples, mode=mode)
        # Where in the training it is, for methods whose loss changes over it.
        hub = MessageHub.get_current_instance()
        numbered = {"step": hub.get_info("iter", 0), "total": hub.get_info("max_iters", 1)}
        with recomputing(self.activation_checkpointing):
            loss, logged = self.transfer(inputs, mode="loss", data_samples=data_samples, **numbered)
        # mmengine adds up everything that has `loss` in its name.
        terms: dict[str, Tensor] = {f"kt/{name.replace('loss_', '')}": value for name, value in logged.items()}
        return {"loss": loss, **terms}

    def val_step(self, data: Any) -> list:
        """The plain student's predictions."""
        return self.transfer.student.predict(data)

    test_step = val_step


def _read_teacher(teacher: Mapping[str, Any]) -> Any:
    """A teacher with its weights, strictly loaded."""
    if not teacher.get("checkpoint"):
        raise UserError("teacher.checkpoint: expected the file of the teacher's weights; it would stay random")
    model = teacher.get("model") or read_config_file(teacher["config"], "teacher.config").model
    network = build_dense(without_pretrained(model), "teacher.model")
    load_weights(network, _local(str(teacher["checkpoint"])), "teacher.checkpoint")
    return DenseModel(network)


def _local(checkpoint: str) -> Path:
    """A file of weights, downloaded (once) if it is an address."""
    if not checkpoint.startswith(("http://", "https://")):
        return at_home(checkpoint)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(checkpoint).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(checkpoint, str(path), progress=False)
        except OSError as error:
            raise UserError(f"teacher.checkpoint={checkpoint}: cannot be downloaded ({error})") from None
    return path
