"""Phases: what a method trains, with which loss, for how long. One phase is one mmengine Runner with the loop below."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from kt.errors import UserError
from kt.transfer import TransferModel

Batch = dict[str, Any]  # what a loader yields, prepared by the student
Loss = Callable[[TransferModel, Batch], tuple[Tensor, dict[str, Tensor]]]
Groups = Callable[[TransferModel], list[dict[str, Any]]]


def everything(model: TransferModel) -> list[dict[str, Any]]:
    """The default parameter group: the student and whatever the method trains beside it."""
    return [{"params": [*model.student.parameters(), *model.method.parameters()]}]


@dataclass
class Phase:
    """One stretch of training with one loss and one set of trained parameters.

    Attributes:
        name: Folder and log name; the phase that yields the result is called `train`.
        loss: `(model, batch) -> (loss, scalars to log)`; runs inside the (possibly data-parallel) forward.
        groups: Parameter groups for the optimizer (`params`, optionally `lr_factor`); nothing else gets a gradient.
        fraction: Length as a share of the schedule's epochs (at least one epoch).
        lr: Learning rate if it is not the schedule's.
        constant_lr: Keep the learning rate constant, as initialisation phases do.
        evaluate: Score the student on the test set at the schedule's interval.
        enter: Called with the model once, when the phase starts from scratch (not when it resumes).
        before_epoch: Called with the model and the loop before every epoch, also the first one after resuming; what it
            does may depend on the epoch, the loop's loader and the model's state, which a resumed run has alike.
    """

    name: str
    loss: Loss
    groups: Groups = everything
    fraction: float = 1.0
    lr: float | None = None
    constant_lr: bool = False
    evaluate: bool = True
    enter: Callable[[TransferModel], None] | None = None
    before_epoch: Callable[[TransferModel, PhaseLoop], None] | None = None

    def epochs(self, schedule: Mapping[str, Any]) -> int:
        """Number of epochs of this phase under a schedule."""
        if self.fraction == 1.0:
            return int(schedule["epochs"])
        return max(1, round(self.fraction * schedule["epochs"]))


def learning_rate_factor(schedule: Mapping[str, Any], step: int, total: int, steps_per_epoch: int) -> float:
    """The factor on the base learning rate at `step` (from 0) of `total`; pure, so a resumed run needs no state.

    Policies: `step` multiplies by gamma at each milestone (in epochs, or as a fraction of the total where below 1),
    `cosine` and `poly` (power 0.9) fall to zero, `constant` stays. A warm-up rises linearly over its epochs.
    """
    warmup = schedule["warmup_epochs"] * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    policy, progress = schedule["policy"], step / max(1, total)
    if policy == "constant":
        return 1.0
    if policy == "cosine":
        return float(0.5 * (1 + np.cos(np.pi * progress)))
    if policy == "poly":
        return (1 - progress) ** 0.9
    if policy == "step":
        borders = [m * total if m < 1 else m * steps_per_epoch for m in schedule["milestones"]]
        return schedule["gamma"] ** sum(step >= border for border in borders)
    raise UserError(f"schedule.policy={policy!r}: expected one of step, cosine, poly, constant")


def build_optimizer(schedule: Mapping[str, Any], groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """The schedule's optimizer; each group keeps its base learning rate in `base_lr`."""
    for group in groups:
        group["lr"] = group["base_lr"] = lr * group.pop("lr_factor", 1.0)
    kind, decay = schedule["optimizer"], schedule["weight_decay"]
    # Fused: with one kernel for each operation and parameter, AdamW takes a tenth of a slim network's step on a CPU.
    if kind == "sgd":
        nesterov = bool(schedule["nesterov"])
        return torch.optim.SGD(groups, lr, schedule["momentum"], weight_decay=decay, nesterov=nesterov, fused=True)
    if kind == "adam":
        return torch.optim.Adam(groups, lr, weight_decay=decay, fused=True)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr, weight_decay=decay, fused=True)
    raise UserError(f"schedule.optimizer={kind!r}: expected one of sgd, adam, adamw")


def open_groups(model: TransferModel, phase: Phase) -> list[dict[str, Any]]:
    """A phase's parameter groups, without what the student itself keeps frozen; they alone get gradients from now."""
    groups = phase.groups(model)
    trainable = {id(parameter) for name, parameter in model.named_parameters() if name in model.trainable}
    model.requires_grad_(False)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in trainable]
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return groups


def seed_everything(*parts: int) -> None:
    """Seeds Python, NumPy and torch from a tuple of integers such as (seed, phase, epoch, rank)."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def phase_folder(cell: Path, index: int, phase: Phase) -> Path:
    """Where a phase keeps its checkpoint and log."""
    return cell / "phases" / f"{index}-{phase.name}"


@dataclass
class Engine:
    """What all phases of a run share: settings, device and observers.

    Attributes:
        schedule: The schedule's settings (epochs, batch size, optimizer, learning rate, ...).
        device: Where the model and the batches live.
        folder: Phase folders are made in it.
        seed: Everything random in a phase follows from (seed, phase index, epoch, rank).
        precision: `fp32`, or `bf16` for autocast.
        hooks: Makes the observers of one phase (records, evaluation, progress, ...): `(phase index, phase) -> hooks`.
    """

    schedule: Mapping[str, Any]
    device: torch.device
    folder: Path
    seed: int = 0
    precision: str = "fp32"
    hooks: Callable[[int, Phase], list[Hook]] = field(default=lambda index, phase: [])

    def autocast(self) -> contextlib.AbstractContextManager:
        """The mixed-precision context of every forward pass."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


class PhaseLoop(BaseLoop):
    """Trains one phase: epochs over one loader, no device synchronisation between log points.

    Random states need no storage: every epoch starts by seeding from (seed, phase, epoch, rank), and loaders are pure
    functions of the epoch, so a run that resumes at an epoch's start is the uninterrupted run.
    """

    def __init__(self, runner: Runner, dataloader: Any, phase: Phase, index: int, engine: Engine):
        super().__init__(runner, dataloader)
        self.phase, self.phase_index, self.engine = phase, index, engine
        self.epoch = self.iter = 0
        self.max_epochs = phase.epochs(engine.schedule)
        self.max_iters = self.max_epochs * len(dataloader)

    def factor(self) -> float:
        """The current factor on the learning rate."""
        if self.phase.constant_lr:
            return 1.0
        return learning_rate_factor(self.engine.schedule, self.iter, self.max_iters, len(self.dataloader))

    def run(self) -> nn.Module:
        """Trains from the current epoch to the last one."""
        self.runner.call_hook("before_train")
        while self.epoch < self.max_epochs:
            self.run_epoch()
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """One pass over the loader."""
        if self.phase.before_epoch is not None:
            self.phase.before_epoch(getattr(self.runner.model, "module", self.runner.model), self)
        seed_everything(self.engine.seed, self.phase_index, self.epoch, rank_and_world()[0])
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for index, batch in enumerate(self.dataloader.epoch(self.epoch)):
            self.runner.call_hook("before_train_iter", batch_idx=index, data_batch=batch)
            outputs = self.step(batch)
            self.iter += 1
            self.runner.call_hook("after_train_iter", batch_idx=index, data_batch=batch, outputs=outputs)
        self.epoch += 1
        self.runner.call_hook("after_train_epoch")

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns device scalars that nobody has waited for."""
        optimizer = self.runner.optim_wrapper
        factor = self.factor()
        for group in optimizer.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        with optimizer.optim_context(self.runner.model), self.engine.autocast():
            loss, logged = self.runner.model(**batch, mode="loss")
        optimizer.update_params(loss)
        return {"loss": loss.detach(), **logged}


_run_numbers = itertools.count()


class PhaseRunner(Runner):
    """mmengine's Runner for one phase, without the environment report, config dump and per-step host copies."""

    def __init__(self, model: TransferModel, phase: Phase, index: int, loader: Any, engine: Engine):
        self.engine, self.phase, self.phase_index = engine, phase, index
        # mmengine keeps one logger and message hub per name and stamps names to the second.
        name = f"{phase.name}-{os.getpid()}-{next(_run_numbers)}"
        schedule = engine.schedule
        optimizer = build_optimizer(schedule, open_groups(model, phase), phase.lr or schedule["lr"])
        clip = schedule["clip_grad"]
        distributed = rank_and_world()[1] > 1
        super().__init__(
            model=model,
            work_dir=str(phase_folder(engine.folder, index, phase)),
            train_dataloader=loader,
            train_cfg={"type": "PhaseLoop"},
            optim_wrapper=OptimWrapper(
                optimizer,
                accumulative_counts=schedule["accumulate"],
                clip_grad=None if clip is None else {"max_norm": clip},
            ),
            default_hooks=dict.fromkeys(
                ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
            ),
            custom_hooks=engine.hooks(index, phase),
            launcher="pytorch" if distributed else "none",
            log_level="WARNING",
            experiment_name=name,
            randomness={"seed": engine.seed},
        )

    def build_train_loop(self, loop: Any) -> BaseLoop:
        """The phase's own loop, whatever the registry knows."""
        return PhaseLoop(self, self._train_dataloader, self.phase, self.phase_index, self.engine)

    def wrap_model(self, model_wrapper_cfg: Any, model: TransferModel) -> nn.Module:
        """Puts the model on the engine's device, and under DDP where there are several processes."""
        model.place(self.engine.device)
        if not self.distributed:
            return model
        devices = None if self.engine.device.type == "cpu" else [self.engine.device]
        # Running statistics stay each rank's own and are averaged at the end of an epoch (`kt.hooks.SyncBuffers`).
        return MMDistributedDataParallel(module=model, device_ids=devices, broadcast_buffers=False)

    def _log_env(self, env_cfg: Any) -> None:
        """Nothing: asking compilers for their versions takes longer than a short phase."""

    def dump_config(self) -> None:
        """Nothing: the resolved config lies in the cell's folder."""

    def setup_env(self, env_cfg: Any) -> None:
        """Only the time stamp: process groups and threads are set up by whoever starts the run."""
        self._timestamp = "log"

    def set_randomness(self, seed: int, **unused: Any) -> None:
        """Only the seed: the loop seeds every epoch."""
        self._seed, self._deterministic = seed, False


def run_phase(model: TransferModel, phase: Phase, index: int, loader: Any, engine: Engine) -> TransferModel:
    """Trains one phase and returns the plain (unwrapped) model."""
    model.phase = phase
    runner = PhaseRunner(model, phase, index, loader, engine)
    runner.train()
    return model


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of scalars in some parameters."""
    return sum(parameter.numel() for parameter in parameters)
