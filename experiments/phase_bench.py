"""`python -m experiments.bench --phases`: what all phases of stage by stage cost over one end-to-end mimicking run.

A step of every phase of K = 1 to all stages is timed as `kt.engine.PhaseLoop` runs it, in turn, in one process, on the
same batch. A phase's cost is its step's; K phases are as long as one training each (`phase_length: full`) or together
(`split`), and the head's phase is as long as one training.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.benched import CLOCKS, make_model, timed
from kt.cost import few_images
from kt.engine import Engine, measured_loop
from kt.phase import Batch
from kt.settings import Schedule, defaults
from kt.transfer import TransferModel
from tables.papers.stage_by_stage.claims import total_cost


def phase_steps(model: TransferModel, batch: Batch, engine: Engine) -> dict[str, Callable[[], Any]]:
    """Phase -> one training step of it, on a copy of the model."""
    steps: dict[str, Callable[[], Any]] = {}
    for index in range(len(model.method.phases())):  # type: ignore[operator]
        twin = copy.deepcopy(model)
        phase = twin.method.phases()[index]
        steps[phase.name] = partial(measured_loop(twin, phase, batch, engine, index).advance, batch)
    return steps


def sums(costs: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Costs of all phases together, in those of one end-to-end mimicking run with its head's phase.

    Args:
        costs: Phase -> cost of a step, for K = 1, 2, ...

    Returns:
        For each K: `full` and `split`, and `features_full` and `features_split` without the heads' phases.
    """
    single = costs[0]

    def ratio(each: Mapping[str, float], length: str, head: float) -> float:
        features = [name for name in each if name != "train"]
        return total_cost(each, features, length, head) / total_cost(single, ["stage1"], "full", head)

    kinds = [(prefix, head, length) for prefix, head in (("", 1.0), ("features_", 0.0)) for length in ("full", "split")]
    return [{prefix + length: ratio(each, length, head) for prefix, head, length in kinds} for each in costs]


def bench_phases(arguments: argparse.Namespace, batch: Batch) -> dict[str, Any]:
    """Times and operations of all phases; prints them and returns them.

    Args:
        arguments: The bench's.
        batch: As a loader yields it.
    """
    device = torch.device(arguments.device)
    models = [make_model("stagewise", arguments, stages=1)]
    count = len(make_model("stagewise", arguments).method.blocks)  # type: ignore[arg-type]
    models += [make_model("stagewise", arguments, stages=stages) for stages in range(2, count + 1)]
    flops = [model.method.flops(model.to(device), few_images(batch)) for model in models]  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine({**defaults(Schedule), "lr": arguments.lr}, device, Path(folder))
        steps = [phase_steps(model, batch, engine) for model in models]
        times: dict[tuple[int, str], list[float]] = {}
        for number in range(arguments.warmup + arguments.steps):
            for stages, own in enumerate(steps, 1):
                for name, step in own.items():
                    taken = timed(step, device, CLOCKS[arguments.clock])
                    if number >= arguments.warmup:
                        times.setdefault((stages, name), []).append(taken)
    medians = [
        {name: 1e3 * statistics.median(times[stages, name]) for name in own} for stages, own in enumerate(steps, 1)
    ]
    counted = [{name: each[name] for name in own} for each, own in zip(flops, steps, strict=True)]
    spent, operations = sums(medians), sums(counted)
    table = Table(
        title=f"stage by stage, {arguments.teacher} -> {arguments.student}, batch {arguments.batch}, {device}"
    )
    for column in ("K", "step ms of each phase and the head", "full: time", "FLOPs", "split: time", "FLOPs"):
        table.add_column(column, justify="left" if column.startswith("step") else "right")
    for stages, (median, time, work) in enumerate(zip(medians, spent, operations, strict=True), 1):
        cells = [f"{each[length]:.2f}" for length in ("full", "split") for each in (time, work)]
        table.add_row(str(stages), " + ".join(f"{value:.0f}" for value in median.values()), *cells)
    console = Console()
    console.print(table)
    console.print("full, split: all phases and the head over end-to-end mimicking (K = 1) and its head.")
    alone = " and ".join(f"{spent[-1][f'features_{length}']:.2f} ({length})" for length in ("full", "split"))
    console.print(f"Without the heads' phases, K = {len(models)} takes {alone} times the time of K = 1.")
    return {"step_ms": medians, "flops_per_image": counted, "time": spent, "operations": operations}
