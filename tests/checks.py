"""What the table-driven tests of classification and of dense tasks share."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from kt.train import fit


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """A state dict to compare bit for bit."""
    return {key: value.detach().cpu().contiguous().numpy().tobytes() for key, value in state.items()}


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
