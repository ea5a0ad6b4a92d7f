"""TransferModel: a student, the method that teaches it, and teachers that nobody sees."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kt.errors import UserError
from kt.folding import fold_norms
from kt.phase import Phase
from kt.precision import compute_in

if TYPE_CHECKING:
    from kt.stages import Stage

TEACHER_NORMS = ("eval", "batch")


class _Hidden:
    """A holder that nn.Module does not look into, so what it holds stays out of state dicts, optimizers and DDP."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = dict(modules)


def freeze_teacher(teacher: nn.Module, norm: str = "eval") -> nn.Module:
    """Fixes a teacher for good: no gradients for it, eval mode, and buffers that never change.

    With `norm="batch"` its batch normalisation uses the statistics of the batch at hand (as some released distillation
    code does by leaving the teacher in train mode) and still records nothing.
    """
    if norm not in TEACHER_NORMS:
        raise ValueError(f"teacher norm is {norm!r}; expected one of {', '.join(TEACHER_NORMS)}")
    teacher.requires_grad_(False).eval()
    if norm == "batch":
        for module in teacher.modules():
            if isinstance(module, _BatchNorm):
                module.train()
                module.track_running_stats = False
    return teacher


@contextlib.contextmanager
def frozen_statistics(*roots: nn.Module) -> Iterator[None]:
    """Within, batch normalisation behaves as before but leaves its running statistics alone.

    A layer in train mode still normalises by the batch; one in eval mode (a detector's `norm_eval`) still by its
    running statistics.
    """
    layers = [m for root in roots for m in root.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextlib.contextmanager
def evaluating(*parts: nn.Module | Stage) -> Iterator[None]:
    """Within, networks or stages of them are in eval mode and record no graph; then each module is as it was."""
    modes = {module: module.training for part in parts for module in part.modules()}
    for module in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class TransferModel(BaseModel):
    """A student and the trained parts of a method as ordinary children, with teachers hidden beside them.

    The teachers are in no state dict, no optimizer and no DDP bucket, yet they follow every move of device, data type
    and memory format, stay frozen whatever `train()` is told, and are copied with the model.

    Args:
        student: The model that is taught; `state_dict()` of its plain network is what the export writes.
        method: The method (`kt.methods.Method`): its children are adapters and auxiliary networks.
        teachers: Teachers under names; the usual single one is called `teacher`.
        teacher_norm: `eval` or `batch`, see `freeze_teacher`.
        teacher_precision: `fp32` or `bf16`, see `kt.precision`.
    """

    phase: Phase | None = None
    student: Any
    method: Any

    def __init__(
        self,
        student: nn.Module,
        method: nn.Module,
        teachers: Mapping[str, nn.Module] | None = None,
        teacher_norm: str = "eval",
        teacher_precision: str = "fp32",
    ):
        super().__init__()
        self.student = student
        self.method = method
        self.teacher_norm = teacher_norm
        # What the student itself keeps frozen (a detector's first stages) no phase may thaw.
        self.trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        frozen = {name: freeze_teacher(teacher, teacher_norm) for name, teacher in (teachers or {}).items()}
        for teacher in frozen.values():
            compute_in(teacher, teacher_precision)
        self.__dict__["_hidden"] = _Hidden(frozen)
        method.__dict__["hidden"] = frozenset(frozen)

    @property
    def teachers(self) -> dict[str, nn.Module]:
        """The teachers by name."""
        return self.__dict__["_hidden"].modules

    @property
    def teacher(self) -> Any:
        """The one called `teacher`, or the only one."""
        if "teacher" in self.teachers:
            return self.teachers["teacher"]
        if len(self.teachers) != 1:
            raise UserError(f"teacher: the method asks for one; this model has {len(self.teachers)}")
        return next(iter(self.teachers.values()))

    def _apply(self, fn: Callable, recurse: bool = True) -> TransferModel:
        super()._apply(fn, recurse)
        for teacher in self.teachers.values():
            teacher._apply(fn, recurse)
        return self

    def place(self, device: torch.device | str) -> TransferModel:
        """Moves everything to a device, in the memory format that suits the student, and folds the teachers there."""
        self.to(device).to(memory_format=self.student.memory_format)
        for teacher in self.teachers.values():
            fold_norms(teacher)
        return self

    def init_weights(self) -> None:
        """Does nothing: networks come initialised or loaded, and nobody may draw their weights again."""

    def forward(self, inputs: Any, mode: str = "tensor", **rest: Any) -> Any:  # type: ignore[override]
        """Mode `loss` gives the current phase's `(loss, logged scalars)`; every other mode is the plain student's."""
        if mode != "loss":
            return self.student(inputs, mode=mode)
        if self.phase is None or self.phase.loss is None:
            raise RuntimeError("no phase with a loss entered: set TransferModel.phase (kt.engine.run_phase does)")
        loss, logged = self.phase.loss(self, self.student.prepare({"inputs": inputs, **rest}))
        return loss, {name: value.detach() for name, value in logged.items()}


def export_student(model: TransferModel) -> dict[str, Tensor]:
    """The plain student's state dict on the CPU, free of prefixes, teachers, adapters and memory formats."""
    plain = getattr(model.student, "network", model.student)
    return {key: value.detach().cpu().contiguous().clone() for key, value in plain.state_dict().items()}
