"""How a phase runs: one mmengine Runner with the loop below, its optimizers, and what makes a run repeatable."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kt import ranks
from kt.compiling import Compiler
from kt.data.loaders import Loader, endless
from kt.errors import UserError, nearest
from kt.pages import keep_pages
from kt.phase import BETAS, TRAIN, Batch, Phase, Trained, phase_folder
from kt.recomputing import recomputing
from kt.transfer import TransferModel


class OneValueError(UserError):
    """A normalisation sees one value of each channel.

    Attributes:
        layer: Its name in the model.
    """

    def __init__(self, layer: str, message: str):
        super().__init__(message)
        self.layer = layer


def _failed_norm(model: nn.Module, error: Exception) -> str:
    """The name of the normalisation that an error comes from."""
    failed = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and any(module is each for each in failed):
            return name
    return "a normalisation of a teacher"


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
    borders = [m * total if m < 1 else m * steps_per_epoch for m in schedule["milestones"]]
    return schedule["gamma"] ** sum(step >= border for border in borders)


def build_optimizer(
    schedule: Mapping[str, Any], groups: list[dict[str, Any]], betas: tuple[float, float] = BETAS
) -> torch.optim.Optimizer:
    """The schedule's optimizer; each group keeps its base learning rate in `base_lr`. Betas are of Adam and AdamW."""
    lr = schedule["lr"]
    for group in groups:
        group["lr"] = group["base_lr"] = lr * group.pop("lr_factor", 1.0)
    kind, decay = schedule["optimizer"], schedule["weight_decay"]
    # Fused: with one kernel for each operation and parameter, AdamW takes a tenth of a slim network's step on a CPU.
    if kind == "sgd":
        nesterov = bool(schedule["nesterov"])
        return torch.optim.SGD(groups, lr, schedule["momentum"], weight_decay=decay, nesterov=nesterov, fused=True)
    if kind == "adam":
        return torch.optim.Adam(groups, lr, betas, weight_decay=decay, fused=True)
    return torch.optim.AdamW(groups, lr, betas, weight_decay=decay, fused=True)


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Starts SGD's momentum at zero where a parameter has its first gradient: later than others, torch's kernel fails.

    The first step is the same: there the momentum becomes the gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def open_groups(model: TransferModel, phase: Phase) -> dict[str, list[dict[str, Any]]]:
    """The parameter groups of a phase's optimizers by name; they alone get gradients from now.

    What the student itself keeps frozen is left out.

    Raises:
        ValueError: Two optimizers train the same parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in model.trainable}
    owners: dict[int, str] = {}
    opened = {owner: trained.groups(model) for owner, trained in phase.trains.items()}
    model.requires_grad_(False)
    for owner, groups in opened.items():
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in names]
            for parameter in group["params"]:
                other = owners.setdefault(id(parameter), owner)
                if other != owner:
                    name = names[id(parameter)]
                    raise ValueError(f"phase '{phase.name}': {name} is trained by both '{other}' and '{owner}'")
                parameter.requires_grad_(True)
    return opened


def seed_everything(*parts: int) -> None:
    """Seeds Python, NumPy and torch from a tuple of integers such as (seed, phase, epoch, rank)."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass
class Engine:
    """What all phases of a run share: settings, device and observers.

    Attributes:
        schedule: The schedule's settings (epochs, batch size, optimizer, learning rate, ...).
        device: Where the model and the batches live.
        folder: The run's; phase folders are made in it.
        seed: Everything random in a phase follows from (seed, phase index, epoch, rank).
        precision: `fp32`, or `bf16` for autocast.
        activation_checkpointing: Whether backward passes run stages again instead of keeping what they computed inside.
        compile: Whether passes are compiled, or `auto`, see `kt.compiling.Compiler`.
        hooks: Makes the observers of one phase (records, evaluation, progress, ...): `(phase index, phase) -> hooks`.
    """

    schedule: Mapping[str, Any]
    device: torch.device
    folder: Path
    seed: int = 0
    precision: str = "fp32"
    activation_checkpointing: bool = False
    compile: bool | str = False
    hooks: Callable[[int, Phase], list[Hook]] = field(default=lambda index, phase: [])

    def autocast(self, cache: bool = True) -> contextlib.AbstractContextManager:
        """The mixed-precision context of every forward pass; without a cache it casts weights anew whenever used."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cache)
        return contextlib.nullcontext()


class Optimizer(OptimWrapper):
    """mmengine's wrapper, whose clipping does not wait for the device to tell a message hub the norm."""

    def _clip_grad(self) -> None:
        moved = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.clip_func(moved, **self.clip_grad_kwargs)


class MeanStatistics:
    """Running statistics over an update's passes: each starts from those before it, and the mean is what remains.

    So statistics move by one momentum step an update, however many passes it takes, and as where each pass is a process
    of its own (`kt.hooks.SyncBuffersHook` averages over processes). What no pass changes stays the same to the bit.

    Args:
        model: Whose normalisation layers are watched.
    """

    def __init__(self, model: nn.Module):
        layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        self.buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self.before = [buffer.clone() for buffer in self.buffers]
        self.changes = [torch.zeros_like(buffer) for buffer in self.buffers]

    @torch.no_grad()
    def end_pass(self) -> None:
        """Takes note of what a pass changed, and takes it back."""
        for buffer, before, change in zip(self.buffers, self.before, self.changes, strict=True):
            change += buffer - before
            buffer.copy_(before)

    @torch.no_grad()
    def end_update(self, passes: int) -> None:
        """Moves the statistics by the mean change; a counter of batches has one more."""
        for buffer, change in zip(self.buffers, self.changes, strict=True):
            buffer += change / passes if buffer.is_floating_point() else change // passes


class PhaseLoop(BaseLoop):
    """Trains one phase: epochs over one loader, no device synchronisation between log points.

    A step is one update: the mean over all passes of all processes (`kt.data.loaders`).

    Random states need no storage: every epoch starts by seeding from (seed, phase, epoch, rank), and loaders are pure
    functions of the epoch, so a run that resumes at an epoch's start is the uninterrupted run. Where an update has
    several chunks, each of them starts by seeding from (seed, phase, epoch, step, chunk), whichever process takes it.

    What a phase's own functions may use of it is documented in `kt.phase.Loop`.

    Attributes:
        optimizers: mmengine's wrapper of each optimizer, by name.
        passes, chunks: Batches of an update, on this process and on all.
        steps_per_epoch: Updates of an epoch.
        drawn: How many batches each further loader has given, by name.
        compiler: Of the passes of its steps.
    """

    def __init__(self, runner: Runner, loaders: Mapping[str, Loader], phase: Phase, index: int, engine: Engine):
        super().__init__(runner, loaders[TRAIN])
        self.model: TransferModel = getattr(runner.model, "module", runner.model)
        self.loaders, self.phase, self.phase_index, self.engine = loaders, phase, index, engine
        self.optimizers: Mapping[str, OptimWrapper] = dict(runner.optim_wrapper.items())
        self.schedules: Mapping[str, Mapping[str, Any]] = {
            name: {**engine.schedule, **each.schedule} for name, each in phase.trains.items()
        }
        self.passes = loaders[TRAIN].passes
        self.chunks = self.passes * ranks.world_size()
        self.steps_per_epoch = len(loaders[TRAIN]) // self.passes
        self.epoch = self.iter = 0
        self.max_iters = phase.steps(engine.schedule["epochs"] * self.steps_per_epoch)
        self.max_epochs = math.ceil(self.max_iters / self.steps_per_epoch)
        self.drawn = dict.fromkeys((name for name in loaders if name != TRAIN), 0)
        self._streams: dict[str, Iterator[Batch]] = {}
        self.compiler = Compiler(engine.compile, engine.device, phase.step is None)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.engine.folder

    @property
    def device(self) -> torch.device:
        """Where the model and the batches live."""
        return self.engine.device

    def autocast(self) -> contextlib.AbstractContextManager:
        """The mixed-precision context of every forward pass."""
        return self.engine.autocast()

    def learning_rates(self) -> dict[str, float]:
        """The highest learning rate of each optimizer by what it is logged as: `lr` the first, `lr_<name>` others."""
        highest = [max(group["lr"] for group in each.optimizer.param_groups) for each in self.optimizers.values()]
        return dict(zip(["lr", *(f"lr_{name}" for name in list(self.optimizers)[1:])], highest, strict=True))

    def run(self) -> nn.Module:
        """Trains from the current epoch to the last one."""
        self.runner.call_hook("before_train")
        while self.epoch < self.max_epochs:
            self.run_epoch()
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """One pass over the loader, or what is left of the phase."""
        # Opening a loader may draw from the global random state: it is opened in the epoch that reads it, as after
        # resuming.
        self._streams.clear()
        if self.phase.before_epoch is not None:
            self.phase.before_epoch(self.model, self)
        seed_everything(self.engine.seed, self.phase_index, self.epoch, ranks.rank())
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        batches = iter(self.dataloader.epoch(self.epoch))
        for index in range(min(self.steps_per_epoch, self.max_iters - self.iter)):
            self.advance(next(batches), index, itertools.islice(batches, self.passes - 1))
        self.epoch += 1
        self.runner.call_hook("after_train_epoch")

    def advance(self, batch: Batch, index: int = 0, rest: Iterable[Batch] = ()) -> None:
        """One step, observers included; `index` counts those of the epoch, `rest` are the batches of further passes."""
        self.runner.call_hook("before_train_iter", batch_idx=index, data_batch=batch)
        outputs = self.step(batch, rest)
        self.iter += 1
        self.runner.call_hook("after_train_iter", batch_idx=index, data_batch=batch, outputs=outputs)

    def step(self, batch: Batch, rest: Iterable[Batch] = ()) -> dict[str, Tensor]:
        """What the phase does with the batches of an update; returns device scalars that nobody has waited for.

        Raises:
            OneValueError: A pass has too few images to be normalised.
        """
        try:
            with self.compiler.step(self.max_iters - self.iter):
                return self._step(batch, rest)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel"):  # as torch says it
                raise
            layer = _failed_norm(self.model, error)
        given = f"schedule.batch_size={self.engine.schedule['batch_size']}"
        raise OneValueError(
            layer,
            f"{given}: {layer} sees one value of each channel in passes of {len(batch['inputs'])} images; expected "
            "more images a pass (schedule.batch_size, schedule.device_batch, dataset.subset), or larger ones "
            "(dataset.image_size)",
        )

    def _step(self, batch: Batch, rest: Iterable[Batch]) -> dict[str, Tensor]:
        for name, optimizer in self.optimizers.items():
            factor = learning_rate_factor(self.schedules[name], self.iter, self.max_iters, self.steps_per_epoch)
            for group in optimizer.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        if self.phase.step is not None:
            # Cached weights would be those before an update, and without a graph where first used without one.
            with self.engine.autocast(cache=False), recomputing(self.engine.activation_checkpointing):
                scalars = self.phase.step(self, self.model.student.prepare(self.numbered(batch)))
            return {name: torch.as_tensor(value, device=self.device).detach() for name, value in scalars.items()}
        statistics = MeanStatistics(self.model) if self.passes > 1 else None
        total: dict[str, Tensor] = {}
        for number, each in enumerate(itertools.chain([batch], rest)):
            for name, value in self.run_pass(number, each).items():
                total[name] = total[name] + value if name in total else value
            if statistics is not None:
                statistics.end_pass()
        if statistics is not None:
            statistics.end_update(self.passes)
            total = {name: value / self.passes for name, value in total.items()}
        (optimizer,) = self.optimizers.values()
        optimizer.step()
        optimizer.zero_grad()
        return total

    def run_pass(self, number: int, batch: Batch) -> dict[str, Tensor]:
        """Forward and backward of one of an update's passes, with its share of the gradient; gives what is logged."""
        if self.chunks > 1:
            chunk = number * ranks.world_size() + ranks.rank()
            seed_everything(self.engine.seed, self.phase_index, self.epoch, self.iter, chunk)
        # Processes exchange gradients once an update.
        model, last = self.runner.model, number == self.passes - 1
        waiting = contextlib.nullcontext() if last or model is self.model else model.no_sync()
        with waiting:
            with self.autocast(), recomputing(self.engine.activation_checkpointing):
                loss, logged = model(**self.numbered(batch), mode="loss")
            (loss / self.passes if self.passes > 1 else loss).backward()
        return {"loss": loss.detach(), **logged}

    def numbered(self, batch: Batch) -> Batch:
        """A batch that knows where in the phase it is."""
        return {**batch, "step": self.iter, "total": self.max_iters}

    def next(self, loader: str) -> Batch:
        """See `kt.phase.Loop.next`."""
        self._check("further loader", loader, self.drawn)
        if loader not in self._streams:
            self._streams[loader] = endless(self.loaders[loader], self.drawn[loader])
        self.drawn[loader] += 1
        return self.model.student.prepare(self.numbered(next(self._streams[loader])))

    def parameters(self, name: str) -> list[nn.Parameter]:
        """See `kt.phase.Loop.parameters`."""
        self._check("optimizer", name, self.optimizers)
        return [parameter for group in self.optimizers[name].optimizer.param_groups for parameter in group["params"]]

    def update(
        self, name: str, loss: Tensor | None = None, grads: Sequence[Tensor | None] | None = None, keep: bool = False
    ) -> None:
        """See `kt.phase.Loop.update`."""
        parameters = self.parameters(name)
        if (loss is None) == (grads is None):
            raise ValueError(f"update('{name}'): expected either a loss or gradients")
        with torch.autocast(self.device.type, enabled=False):
            if loss is not None:
                grads = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
            assert grads is not None
            if len(grads) != len(parameters):
                raise ValueError(f"update('{name}'): {len(grads)} gradients for {len(parameters)} parameters")
            for parameter, mean in zip(parameters, ranks.mean_gradients(grads, parameters), strict=True):
                # A copy: clipping works in place, and fused optimizers rely on a parameter's own memory layout.
                parameter.grad = None if mean is None else torch.empty_like(parameter).copy_(mean)
            start_momentum(self.optimizers[name].optimizer)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def _check(self, what: str, name: str, known: Iterable[str]) -> None:
        """Refuses a name that the phase does not have."""
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(
                f"phase '{self.phase.name}' has no {what} {name!r}; it has: {listed}{nearest(name, known)}"
            )


_run_numbers = itertools.count()


class PhaseRunner(Runner):
    """mmengine's Runner for one phase, without the environment report, config dump and per-step host copies."""

    def __init__(self, model: TransferModel, phase: Phase, index: int, loaders: Mapping[str, Loader], engine: Engine):
        self.engine, self.phase, self.phase_index, self.loaders = engine, phase, index, loaders
        # mmengine keeps one logger and message hub per name and stamps names to the second.
        name = f"{phase.name}-{os.getpid()}-{next(_run_numbers)}"
        model.phase = phase
        opened = open_groups(model, phase)
        optimizers = {name: self._optimizer(trained, opened[name]) for name, trained in phase.trains.items()}
        super().__init__(
            model=model,
            work_dir=str(phase_folder(engine.folder, index, phase)),
            train_dataloader=loaders[TRAIN],
            train_cfg={"type": "PhaseLoop"},
            optim_wrapper=OptimWrapperDict(**optimizers),
            default_hooks=dict.fromkeys(
                ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
            ),
            custom_hooks=engine.hooks(index, phase),
            launcher="pytorch" if ranks.world_size() > 1 else "none",
            log_level="WARNING",
            experiment_name=name,
            randomness={"seed": engine.seed},
        )

    def _optimizer(self, trained: Trained, groups: list[dict[str, Any]]) -> OptimWrapper:
        """One of the phase's optimizers, with its clipping."""
        schedule = {**self.engine.schedule, **trained.schedule}
        clip = schedule["clip_grad"]
        return Optimizer(
            build_optimizer(schedule, groups, trained.betas), clip_grad=None if clip is None else {"max_norm": clip}
        )

    def build_train_loop(self, loop: Any) -> PhaseLoop:
        """The phase's own loop, whatever the registry knows."""
        return PhaseLoop(self, self.loaders, self.phase, self.phase_index, self.engine)

    def wrap_model(self, model_wrapper_cfg: Any, model: TransferModel) -> nn.Module:
        """Puts the model on the engine's device; a phase with a loss goes under DDP where there are several processes.

        A step averages its gradients itself (`PhaseLoop.update`). Either way mmengine then sends the first process's
        weights and buffers to all.
        """
        if self.engine.device.type == "cpu":
            keep_pages()
        model.place(self.engine.device)
        if not self.distributed or self.phase.step is not None:
            return model
        devices = None if self.engine.device.type == "cpu" else [self.engine.device]
        # Running statistics stay each rank's own and are averaged at the end of an epoch (`kt.hooks.SyncBuffersHook`).
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


def run_phase(
    model: TransferModel, phase: Phase, index: int, loaders: Mapping[str, Loader], engine: Engine
) -> TransferModel:
    """Trains one phase on its loaders, `train` among them, and returns the plain (unwrapped) model."""
    PhaseRunner(model, phase, index, loaders, engine).train()
    return model


class OneBatch:
    """A loader that gives the same batch over and over, for whoever measures single steps."""

    def __init__(self, batch: Batch):
        self.batch, self.batch_size, self.passes = batch, len(batch["inputs"]), 1

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batch, once."""
        yield from [self.batch][first:]

    def plain(self, by_class: bool = False) -> OneBatch:
        """The same."""
        return self


def measured_loop(model: TransferModel, phase: Phase, batch: Batch, engine: Engine, index: int = 0) -> PhaseLoop:
    """A phase's loop before its first step, every loader of which gives the same batch: `loop.advance(batch)`."""
    loaders = dict.fromkeys((TRAIN, *phase.loaders), OneBatch(batch))
    runner = PhaseRunner(model, phase, index, loaders, engine)
    loop = runner._train_loop = runner.build_train_loop({})
    model.train()
    return loop
