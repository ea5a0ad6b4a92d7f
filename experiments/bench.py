"""`python -m experiments.bench`: what each method's training step costs over the passes that no method could avoid.

For every method the median time of a whole training step (as `kt.engine.PhaseLoop` runs it, hooks included) is divided
by the sum of the medians of its unavoidable passes: the student's forward, backward and update, the teacher's forward
as deep as the method reads it, and whatever further passes define the method (`Method.passes`). Step and passes are
timed in turn, in one process, on the same batch, in every way in which networks may compute, KD also beside the step of
torchdistill. With a detector or segmentor as the student, the images are embedded scenes, and the peak memory of each
method is measured in a process of its own beside the plain student's.

`--phases` times the phases of stage by stage instead (`experiments.phase_bench`), `--data` loaders and scoring
(`experiments.data_bench`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.benched import CLOCKS, DENSE_SIZE, SIZE, dense_batch, image_batch, make_model, timed
from experiments.build import peak_memory
from experiments.data_bench import bench_data
from experiments.peer_bench import EXTRA, PEER, torchdistill_step
from experiments.phase_bench import bench_phases
from kt import command
from kt.engine import Engine, measured_loop
from kt.errors import Parser, UserError, nearest
from kt.files import at_home, write_json
from kt.hooks import RecordHook
from kt.models.names import DENSE_NETWORKS, NETWORKS
from kt.phase import Batch
from kt.settings import METHODS, Schedule, defaults, kinds
from kt.store import Records, records_file

# How networks compute, as options of the engine and of the model.
WAYS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "fp32": ({}, {}),
    "teacher_bf16": ({}, {"teacher_precision": "bf16"}),
    "bf16": ({"precision": "bf16"}, {}),
    "compiled": ({"compile": True}, {}),
    "bf16_compiled": ({"precision": "bf16", "compile": True}, {}),
}


def peak_memory_of(name: str, arguments: argparse.Namespace) -> int:
    """Peak memory in bytes of two training steps, in a process of its own (of the GPU where it computes on one)."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_measure_memory, args=(name, arguments, answers))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"measuring the memory of {name} ended with {process.exitcode}")
    return int(answers.get())


def _measure_memory(name: str, arguments: argparse.Namespace, answers: Any) -> None:
    device = torch.device(arguments.device)
    model = make_model(name, arguments)
    batch = dense_batch(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # Without momentum an optimizer holds nothing: the memory is that of the passes.
        settings = {**defaults(Schedule), "lr": arguments.lr, "momentum": 0.0}
        engine = Engine(settings, device, Path(folder), activation_checkpointing=arguments.activation_checkpointing)
        loop = measured_loop(model, model.method.phases()[-1], batch, engine)
        for _ in range(2):
            loop.step(batch)
    answers.put(peak_memory(device))


def cases(arguments: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is timed: label -> method and options. Without a process to replay, all pathways weigh alike."""
    found: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in arguments.methods}
    for name in arguments.methods:
        if "process" not in kinds(METHODS[name]):
            continue
        found[name] = (name, {"process": "equal"})
        if arguments.process:
            replayed = {"files": {"search": arguments.process}}
            found |= {name: (name, replayed), f"{name} clip=null": (name, {**replayed, "clip": None})}
    return found


class Lane:
    """A method that computes in one way on networks of its own.

    Attributes:
        parts: Its step, the unavoidable passes, and the update of the parameters, to be timed in turn.
        times: Of each part, in seconds.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], way: str, arguments: argparse.Namespace, batch: Batch, folder: Path
    ):
        computing, teaching = WAYS[way]
        model = make_model(name, arguments, **teaching, **options)
        folder.mkdir()
        self.records = Records(records_file(folder))
        self.engine = Engine(
            {**defaults(Schedule), "lr": arguments.lr, "epochs": arguments.warmup + arguments.steps},
            torch.device(arguments.device),
            folder,
            activation_checkpointing=arguments.activation_checkpointing,
            hooks=lambda index, phase: [RecordHook(self.records)],
            **computing,
        )
        phase = model.method.phases()[-1]
        self.cached = phase.step is None
        self.loop = measured_loop(model, phase, batch, self.engine)
        self.loop.runner.call_hook("before_train_epoch")
        # Passes work on a copy: same weights, same layout, and gradients that nobody mixes up.
        twin = copy.deepcopy(model)
        trained = [parameter for parameter in twin.student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, arguments.lr, 0.9, weight_decay=5e-4, fused=True)
        self.prepared = twin.student.prepare(self.loop.numbered(copy.deepcopy(batch)))
        with self.engine.autocast(self.cached):
            passes = twin.method.passes(twin, self.prepared)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        self.parts = [partial(self.loop.advance, batch), *(partial(self._cast, each) for each in passes), update]
        self.times: list[list[float]] = [[] for _ in self.parts]

    def _cast(self, function: Callable[[], Any]) -> None:
        """A pass in the precision of the step, and compiled where it is; the step sees to its own."""
        with self.loop.compiler.step(1), self.engine.autocast(self.cached):
            function()

    def round(self, time: Callable[[Callable[[], Any]], float]) -> None:
        """Times every part once."""
        self.prepared["step"] = self.loop.iter  # passes may depend on where in the training they are
        for part, values in zip(self.parts, self.times, strict=True):
            values.append(time(part))


def bench_method(
    label: str, name: str, options: Mapping[str, Any], arguments: argparse.Namespace, batch: Batch
) -> list[dict[str, Any]]:
    """Medians in milliseconds of a method's step and of its unavoidable passes, in every way that is asked for.

    What is timed takes turns, so that whatever else the machine does meets all alike. KD has torchdistill's step among
    them, where that is installed.
    """
    time = partial(timed, device=torch.device(arguments.device), clock=CLOCKS[arguments.clock])
    ways = [way for way in arguments.ways if METHODS[name].needs_teacher or not WAYS[way][1]]
    peer = torchdistill_step(arguments, batch) if name == PEER and not arguments.dense else None
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        lanes = {way: Lane(name, options, way, arguments, batch, Path(folder, way)) for way in ways}
        for _ in range(arguments.warmup + arguments.steps):
            for lane in lanes.values():
                lane.round(time)
            if peer is not None:
                theirs.append(time(peer))
        for lane in lanes.values():
            lane.records.close()
    rows = []
    for way, lane in lanes.items():
        step, *passes = (median(values, arguments) for values in lane.times)
        row = {"method": label, "way": way, "step_ms": step, "passes_ms": passes[:-1], "update_ms": passes[-1]}
        row |= {"unavoidable_ms": sum(passes), "ratio": step / sum(passes)}
        row |= {"images_per_second": arguments.batch / step * 1e3}
        if theirs:
            row |= {"torchdistill_ms": median(theirs, arguments)}
            row |= {"over_torchdistill": step / row["torchdistill_ms"]}
        rows.append(row)
    return rows


def median(values: list[float], arguments: argparse.Namespace) -> float:
    """Of seconds, those of the warm-up aside, in milliseconds."""
    return statistics.median(values[arguments.warmup :]) * 1e3


def show(results: list[dict[str, Any]], arguments: argparse.Namespace, title: str, console: Console) -> None:
    """Prints a line for each method, and what torchdistill takes beside KD."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for way in arguments.ways:
        for column in (f"{way} ms", "passes ms", "ratio"):
            table.add_column(column, justify="right")
    if arguments.dense:
        table.add_column("peak MiB", justify="right")
    for label in dict.fromkeys(row["method"] for row in results):
        own = {row["way"]: row for row in results if row["method"] == label}
        cells: list[str] = []
        for way in arguments.ways:
            row = own.get(way, {})
            numbers = ("step_ms", ".1f"), ("unavoidable_ms", ".1f"), ("ratio", ".3f")
            cells += [format(row[key], form) if row else "" for key, form in numbers]
        if arguments.dense:
            cells.append(f"{own[arguments.ways[0]]['peak_memory'] / 2**20:.0f}")
        table.add_row(label, *cells)
    console.print(table)
    beside = [row for row in results if "torchdistill_ms" in row]
    if beside:
        table = Table(title=f"KD's step beside that of torchdistill {importlib.metadata.version('torchdistill')}")
        for column in ("kt", "ms", "torchdistill ms", "kt/torchdistill"):
            table.add_column(column, justify="left" if column == "kt" else "right")
        for row in beside:
            figures = f"{row['step_ms']:.1f}", f"{row['torchdistill_ms']:.1f}", f"{row['over_torchdistill']:.3f}"
            table.add_row(row["way"], *figures)
        console.print(table)
    elif PEER in arguments.methods and not arguments.dense:
        console.print(f"KD beside torchdistill: not measured, it is not installed ({EXTRA})", markup=False)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 0")
    return int(text)


def _ways(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in WAYS:
            raise argparse.ArgumentTypeError(f"{name!r}: expected some of {','.join(WAYS)}{nearest(name, WAYS)}")
    return [way for way in WAYS if way in names]


def _width(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number > 0")


def _device(text: str) -> str:
    try:
        torch.empty(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: no such device here ({str(error).splitlines()[0]})") from None
    return text


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings.

    Raises:
        UserError: There is no such method, or it teaches no detectors.
    """
    parser = Parser(prog="python -m experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", help="methods to time (default: all)")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--batch", type=_count, help="images a step (default: 128, or 4 of a detector or segmentor)")
    parser.add_argument("--images", type=_count, default=50_000, help="of the training set that crd remembers")
    parser.add_argument("--width", type=_width, default=1.0, help="width of detectors and segmentors")
    parser.add_argument("--small-stem", action="store_true", help="ResNets with the stem for images of 32x32")
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="in the steps; the passes beside them keep everything"
    )
    parser.add_argument("--phases", action="store_true", help="stage by stage: all phases over end-to-end mimicking")
    parser.add_argument("--data", action="store_true", help="images per second of loaders and of scoring instead")
    parser.add_argument("--batches", type=_count, default=4, help="timed of each loader, with --data")
    parser.add_argument("--workers", type=_whole, default=0, help="processes that read files, with --data")
    parser.add_argument("--process", type=at_home, help="process.pth that DistPro replays, with and without its clip")
    parser.add_argument("--steps", type=_count, default=20, help="timed steps of each method")
    parser.add_argument("--warmup", type=_count, default=3)
    parser.add_argument(
        "--ways",
        type=_ways,
        default=[way for way, (computing, _) in WAYS.items() if "compile" not in computing],
        help=f"how networks compute, some of {','.join(WAYS)} (default: all that need not be compiled)",
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own seconds, on a busy machine (one thread)"
    )
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=at_home, help="also write the numbers to this file")
    arguments = parser.parse_args(argv)
    arguments.dense = dense = arguments.student in DENSE_NETWORKS
    for who in ("student", "teacher"):
        networks, name = [*(DENSE_NETWORKS if dense else NETWORKS)], getattr(arguments, who)
        if name not in networks:
            beside = f" beside {arguments.student}" if who == "teacher" else ""
            raise UserError(f"--{who}={name}: no network that can be timed{beside}{nearest(name, networks)}")
    arguments.batch = arguments.batch or (4 if dense else 128)
    arguments.lr = 1e-4 if dense else 0.05
    task = DENSE_NETWORKS[arguments.student].task if dense else "classification"
    fitting = {name for name, kind in METHODS.items() if kind.teaches(task) and kind.only_for in (None, task)}
    known = sorted(name for name in fitting if "+" not in name)
    for name in arguments.methods:
        if name not in known:
            raise UserError(f"method {name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
    arguments.methods = arguments.methods or known
    if arguments.clock == "cpu" and (arguments.device != "cpu" or torch.get_num_threads() > 1 or arguments.workers):
        raise UserError("--clock=cpu: sees one thread of this process alone; expected --device=cpu, OMP_NUM_THREADS=1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the bench and prints a table."""
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    height, width = DENSE_SIZE if arguments.dense else (SIZE, SIZE)
    title = f"{arguments.teacher} -> {arguments.student}, {height}x{width}, batch {arguments.batch}, {device}"
    title += ", activation checkpointing" if arguments.activation_checkpointing else ""
    console = Console(width=max(132, Console().width))  # a narrow terminal, or none, would cut the names
    found: dict[str, Any] = {"title": title, "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"clock": arguments.clock, "load": os.getloadavg()[0]}
    if arguments.data:
        found |= {"data": bench_data(arguments, console)}
    else:
        batch = dense_batch(arguments) if arguments.dense else image_batch(arguments.batch, device)
        if arguments.phases:
            found |= bench_phases(arguments, batch)
        else:
            cased = cases(arguments).items()
            rows = found["methods"] = [row for one, case in cased for row in bench_method(one, *case, arguments, batch)]
            for row in rows if arguments.dense else ():
                if row["way"] == arguments.ways[0]:
                    row["peak_memory"] = peak_memory_of(row["method"], arguments)
            show(rows, arguments, title, console)
    if arguments.json:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
