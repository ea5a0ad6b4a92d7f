"""What the table-driven tests of classification and of dense tasks share."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor

from kt.engine import Engine, measured_loop, seed_everything
from kt.settings import Schedule, defaults
from kt.train import fit
from kt.transfer import TransferModel


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """A state dict to compare bit for bit."""
    return {key: value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes() for key, value in state.items()}


def flat(value: Any) -> dict[str, Tensor]:
    """The tensors of nested mappings, by their keys in a row."""
    if isinstance(value, Tensor):
        return {"": value}
    items = value.items() if isinstance(value, Mapping) else ()
    return {f"{key} {rest}".rstrip(): each for key, one in items for rest, each in flat(one).items()}


@contextlib.contextmanager
def keeping() -> Iterator[dict[int, int]]:
    """Within, the bytes that are kept for a pass backward, by where they lie; parameters are among them."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def step_each_phase(
    model: TransferModel, batch: dict[str, Any], folder: Path, device: torch.device | str = "cpu", **options: Any
) -> dict[str, Tensor]:
    """Takes one step of each phase of a model's method; what it leaves, by names that begin with the phase's.

    These are the scalars, all weights and buffers, the random state and what the optimizers keep: momentum tells the
    gradients.

    Args:
        model: The model, which is changed.
        batch: Of every loader and step.
        folder: Where phases may leave something.
        device: Where to compute.
        options: Of the engine.
    """
    left: dict[str, Tensor] = {}
    for number, phase in enumerate(model.method.phases()):
        engine = Engine({**defaults(Schedule), "lr": 0.02, "epochs": 2}, torch.device(device), folder, **options)
        loop = measured_loop(model, phase, batch, engine, number)
        if phase.before_epoch is not None:
            phase.before_epoch(model, loop)
        loop.epoch = 1  # what a method puts off has begun
        seed_everything(number)
        found: dict[str, Any] = {"scalars": loop.step(copy.deepcopy(batch)), "random": torch.get_rng_state()}
        found |= {name: each.optimizer.state_dict()["state"] for name, each in loop.optimizers.items()}
        found["model"] = {key: each.clone() for key, each in model.state_dict().items() if isinstance(each, Tensor)}
        left |= {f"{phase.name} {key}": each for key, each in flat(found).items()}
    return left


def digest(state: dict[str, torch.Tensor]) -> str:
    """A state dict as one short text."""
    return hashlib.sha256(b"".join(bits(state).values())).hexdigest()


def rows(folder: Path) -> list[dict[str, Any]]:
    """A run's records."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(folder: Path) -> list[dict[str, Any]]:
    """A run's records without what differs from run to run."""
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows(folder)]


class Interrupt(Hook):
    """Stops a run like Ctrl-C at the n-th step since it was made."""

    priority = "VERY_LOW"

    def __init__(self, steps: int):
        self.left = steps

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def _rank(rank: int, folder: str, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    while (task := tasks.get()) is not None:
        module, name = task
        try:
            model, data, schedule = importlib.import_module(module).make_cell(name, rank, 2)
            start = digest(model.student.state_dict())
            metrics = fit(model, data, Path(folder, module, name), schedule)
            answers.put((rank, start, digest(model.state_dict()), metrics, ""))
        except Exception as error:  # the parent reports it
            answers.put((rank, "", "", {}, repr(error)))
            break
    torch.distributed.destroy_process_group()


# The folder of a cell, and of both processes: rank, digests of the student before and of the model after, metrics,
# and what went wrong.
Shared = tuple[Path, list[Any]]


def two_processes(folder: Path) -> Iterator[Callable[[str, str], Shared]]:
    """Two gloo processes that train whatever setting of a module they are told; to be used as a fixture.

    A module gives `make_cell(name, rank, world) -> (model, data, schedule)`.
    """
    context = multiprocessing.get_context("spawn")
    tasks, answers = [context.Queue(), context.Queue()], context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, str(folder), tasks[rank], answers), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()

    def train(module: str, name: str) -> Shared:
        assert all(process.is_alive() for process in processes), "an earlier error has ended a process"
        for queue in tasks:
            queue.put((module, name))
        return folder / module / name, sorted(answers.get(timeout=180) for _ in range(2))

    yield train
    for queue in tasks:
        queue.put(None)
    for process in processes:
        process.join(timeout=20)
        process.kill()
