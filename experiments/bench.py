"""`python -m experiments.bench`: what each method's training step costs over the passes that no method could avoid.

For every method the median time of a whole training step (as `kt.engine.PhaseLoop` runs it, hooks included) is divided
by the sum of the medians of its unavoidable passes: the student's forward, backward and update, the teacher's forward
as deep as the method reads it, and whatever further passes define the method (`Method.passes`). Step and passes are
timed in turn, in one process, on the same batch. With a detector or segmentor as the student, the images are embedded
scenes, and the peak memory of each method is measured in a process of its own beside the plain student's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from experiments.build import peak_memory
from experiments.groups import dataset_choice
from experiments.phase_bench import bench_phases
from kt import command
from kt.classifier import Classifier
from kt.data import DATASETS, DataSpec, build_data
from kt.dense import DenseModel
from kt.engine import Engine, measured_loop
from kt.errors import Parser, UserError, nearest
from kt.files import at_home, write_json
from kt.hooks import RecordHook
from kt.methods import build_method, find_method
from kt.models import build_network
from kt.models.names import DENSE_NETWORKS, NETWORKS
from kt.settings import METHODS, Schedule, defaults, kinds
from kt.stages import IMAGENET
from kt.store import Records, records_file
from kt.transfer import TransferModel

CLASSES, SIZE = 100, 32
DENSE_CLASSES = {"detection": 8, "segmentation": 13, "keypoints": 7, "depth": 1}
DENSE_SIZE = (128, 256)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make_model(name: str, arguments: argparse.Namespace, **options: Any) -> TransferModel:
    """The method on freshly drawn networks (speed does not depend on weights)."""
    if arguments.student in DENSE_NETWORKS:
        return make_dense_model(name, arguments, **options)
    kind = find_method(name)
    settings = {"num_classes": CLASSES, "image_size": SIZE, "small_stem": arguments.small_stem}
    student_name = arguments.teacher if kind.starts_from_teacher else arguments.student
    torch.manual_seed(0)
    student = Classifier(build_network(student_name, **settings))
    teacher = Classifier(build_network(arguments.teacher, **settings)) if METHODS[name].needs_teacher else None
    if "first_epochs" in kinds(METHODS[name]):
        options["first_epochs"] = 0  # what is timed is the step that comes after them
    labels = labels_of(max(arguments.images, arguments.batch))
    facts = DataSpec("images", CLASSES, SIZE, *IMAGENET, len(labels), 0, (), labels=labels)
    method = build_method(name, student, teacher, data=facts, **options)
    return TransferModel(student, method, {"teacher": teacher} if teacher else None)


def make_dense_model(name: str, arguments: argparse.Namespace, **options: Any) -> TransferModel:
    """The same for a detector or segmentor."""
    from experiments.build import build_dense_model

    def make(network: str) -> DenseModel:
        settings = {"name": network, "width": arguments.width, "config": None, "options": None}
        return build_dense_model(settings, DENSE_CLASSES[DENSE_NETWORKS[network].task], DENSE_SIZE, IMAGENET)[0]

    torch.manual_seed(0)
    student = make(arguments.student)
    teacher = make(arguments.teacher) if METHODS[name].needs_teacher else None
    method = build_method(name, student, teacher, **options)
    return TransferModel(student, method, {"teacher": teacher} if teacher else None)


def dense_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Embedded scenes for the student's task."""
    task = DENSE_NETWORKS[arguments.student].task
    able = next(name for name, spec in DATASETS.items() if spec.embedded and task in spec.readers)
    dataset = {**dataset_choice(able), "task": task, "image_size": list(DENSE_SIZE)}
    dataset |= {"train_size": arguments.batch, "test_size": 1, "augmentation": "none"}
    data = build_data(dataset, ".", batch_size=arguments.batch, seed=0)
    return next(data.train.epoch(0))


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


def bench_method(
    label: str, name: str, options: dict[str, Any], arguments: argparse.Namespace, batch: dict[str, Any]
) -> dict[str, Any]:
    """Medians in milliseconds of a method's step and of its unavoidable passes."""
    device = torch.device(arguments.device)
    model = make_model(name, arguments, **options)
    with tempfile.TemporaryDirectory() as folder:
        records = Records(records_file(Path(folder)))
        engine = Engine(
            {**defaults(Schedule), "lr": arguments.lr, "epochs": arguments.warmup + arguments.steps},
            device,
            Path(folder),
            activation_checkpointing=arguments.activation_checkpointing,
            hooks=lambda index, phase: [RecordHook(records)],
        )
        loop = measured_loop(model, model.method.phases()[-1], batch, engine)
        loop.runner.call_hook("before_train_epoch")
        # Passes work on a copy: same weights, same layout, and gradients that nobody mixes up.
        twin = copy.deepcopy(model)
        trained = [parameter for parameter in twin.student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, arguments.lr, 0.9, weight_decay=5e-4, fused=True)
        prepared = twin.student.prepare(loop.numbered(copy.deepcopy(batch)))
        passes = twin.method.passes(twin, prepared)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        times: list[list[float]] = [[] for _ in range(len(passes) + 2)]
        for round_number in range(arguments.warmup + arguments.steps):
            prepared["step"] = loop.iter  # passes may depend on where in the training they are
            taken = [timed(function, device) for function in (partial(loop.advance, batch), *passes, update)]
            if round_number >= arguments.warmup:
                for values, value in zip(times, taken, strict=True):
                    values.append(value)
        records.close()
    medians = [statistics.median(values) * 1e3 for values in times]
    unavoidable = sum(medians[1:])
    return {
        "method": label,
        "step_ms": medians[0],
        "passes_ms": medians[1:-1],
        "update_ms": medians[-1],
        "unavoidable_ms": unavoidable,
        "ratio": medians[0] / unavoidable,
        "images_per_second": arguments.batch / medians[0] * 1e3,
    }


def bench_torchdistill(arguments: argparse.Namespace, batch: dict[str, Any]) -> dict[str, Any] | None:
    """The same KD step as torchdistill's training box and example script run it, timed in turn with ours.

    Returns None where torchdistill is not installed.
    """
    try:
        from torchdistill.core.distillation import DistillationBox
    except ImportError:
        return None
    device = torch.device(arguments.device)
    ours = make_model("kd", arguments)
    networks = [copy.deepcopy(part.network).to(device) for part in (ours.teacher, ours.student)]
    target = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    # Its alpha weights the cross-entropy, ours the soft targets.
    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"requires_grad": True, "forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {**target, "temperature": 4.0, "alpha": 0.1, "reduction": "batchmean"},
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    box = DistillationBox(*networks, {}, config, device, [], False, 1)
    networks[0].eval()
    networks[1].train()
    # The box holds the bare networks, which see normalised images.
    images = ours.student.normalise(batch["inputs"].cpu()).contiguous().to(device)

    def theirs() -> None:
        loss = box.forward_process(images, batch["labels"], None)
        box.post_forward_process(loss)
        loss.item()

    with tempfile.TemporaryDirectory() as folder:
        loop = measured_loop(ours, ours.method.phases()[-1], batch, Engine(defaults(Schedule), device, Path(folder)))
        pairs = []
        for _ in range(arguments.warmup + arguments.steps):
            pairs.append((timed(lambda: loop.step(batch), device), timed(theirs, device)))
    mine, other = (statistics.median(values) * 1e3 for values in zip(*pairs[arguments.warmup :], strict=True))
    return {"kt_ms": mine, "torchdistill_ms": other, "ratio": mine / other}


def labels_of(images: int) -> NDArray[np.int64]:
    """The classes of so many images."""
    return np.arange(images) % CLASSES


def image_batch(size: int, device: torch.device) -> dict[str, Any]:
    """Random images to classify."""
    images = torch.rand(size, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return {
        "inputs": images.to(device).contiguous(memory_format=torch.channels_last),
        "labels": torch.from_numpy(labels_of(size)).to(device),
        "indices": torch.arange(size, device=device),
    }


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer >= 1")
    return int(text)


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
    parser.add_argument("--process", type=at_home, help="process.pth that DistPro replays, with and without its clip")
    parser.add_argument("--steps", type=_count, default=20, help="timed steps of each method")
    parser.add_argument("--warmup", type=_count, default=3)
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=at_home, help="also write the numbers to this file")
    arguments = parser.parse_args(argv)
    dense = arguments.student in DENSE_NETWORKS
    for who in ("student", "teacher"):
        networks, name = [*(DENSE_NETWORKS if dense else NETWORKS)], getattr(arguments, who)
        if name not in networks:
            beside = f" beside {arguments.student}" if who == "teacher" else ""
            raise UserError(f"--{who}={name}: no network that can be timed{beside}{nearest(name, networks)}")
    arguments.batch = arguments.batch or (4 if dense else 128)
    arguments.lr = 1e-4 if dense else 0.05
    task = DENSE_NETWORKS[arguments.student].task if dense else "classification"
    known = sorted(name for name, kind in METHODS.items() if "+" not in name and kind.teaches(task))
    for name in arguments.methods:
        if name not in known:
            raise UserError(f"method {name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
    arguments.methods = arguments.methods or known
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the bench and prints a table."""
    arguments = parse_arguments(argv)
    dense = arguments.student in DENSE_NETWORKS
    device = torch.device(arguments.device)
    batch = dense_batch(arguments) if dense else image_batch(arguments.batch, device)
    if arguments.phases:
        found = bench_phases(arguments, batch, make_model, timed)
        if arguments.json:
            write_json(arguments.json, {"threads": torch.get_num_threads(), "torch": torch.__version__, **found})
        return 0
    results = [bench_method(label, *case, arguments, batch) for label, case in cases(arguments).items()]
    if dense:
        for row in results:
            row["peak_memory"] = peak_memory_of(row["method"], arguments)
    compared = "kd" in arguments.methods and not dense
    reference = bench_torchdistill(arguments, batch) if compared else None
    height, width = DENSE_SIZE if dense else (SIZE, SIZE)
    title = f"{arguments.teacher} -> {arguments.student}, {height}x{width}, batch {arguments.batch}, {device}"
    title += ", activation checkpointing" if arguments.activation_checkpointing else ""
    table = Table(title=title)
    columns = ["method", "step ms", "unavoidable ms", "passes ms", "ratio", "images/s"]
    for column in [*columns, "peak MiB"] if dense else columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in results:
        passes = " + ".join(f"{value:.0f}" for value in (*row["passes_ms"], row["update_ms"]))
        cells = [f"{row[key]:.1f}" for key in ("step_ms", "unavoidable_ms")]
        cells += [passes, f"{row['ratio']:.3f}", f"{row['images_per_second']:.0f}"]
        cells += [f"{row['peak_memory'] / 2**20:.0f}"] if dense else []
        table.add_row(row["method"], *cells)
    console = Console(width=max(100, Console().width))  # a narrow terminal, or none, would cut the names
    console.print(table)
    if reference is None and compared:
        console.print("KD beside torchdistill: not measured (pip install torchdistill, then run this again)")
    elif reference is not None:
        console.print(
            f"KD step: kt {reference['kt_ms']:.1f} ms, torchdistill {reference['torchdistill_ms']:.1f} ms, "
            f"kt/torchdistill {reference['ratio']:.2f}"
        )
    if arguments.json:
        setting = {"title": title, "threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(arguments.json, {**setting, "methods": results, "torchdistill": reference})
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
