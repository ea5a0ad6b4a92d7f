"""What only a machine with a GPU shows: `python -m pytest tests/gpu.py`, minutes; skipped where there is none.

`python -m pytest tests/gpu.py -k speed -s` prints how fast it is: steps over the sum of their passes, ours beside a
plain loop with its own loader, and cells side by side on one card.

KT_GPU_TESTS=cpu runs all of it on the CPU, which shows that the tests themselves are in order (so few steps that what
they say of speed means nothing).
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dense_settings
import method_settings
from checks import Interrupt, bits, rows, step_each_phase
from experiments import bench
from experiments.benched import labels_of, make_model
from kt.data.loaders import ResidentLoader, endless
from kt.engine import Engine, measured_loop
from kt.hypergradient import directional
from kt.settings import METHODS, Schedule, defaults
from kt.train import fit
from plain_loop import PlainLoop, steps_per_second

DEVICE = os.environ.get("KT_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("default"),  # what libraries say of other machines fails nothing
]
DENSE = [name for name in dense_settings.SETTINGS if " ifvd" in name] + ["depth kd"]
DETECTORS = ["faster r-cnn hybrid_forward", "retinanet hybrid_forward"]
# What is timed: the bench's arguments and loading processes, and cells with the keys of their trainings.
if DEVICE == "cuda":
    TIMED, WORKERS = "--steps 100 --warmup 20", 8
    CELLS, TRAINING = 8, "teacher=resnet56 student=resnet20 schedule.epochs=20 teacher.schedule.epochs=1"
else:
    TIMED, WORKERS = "--steps 1 --warmup 1 --batch 8 --images 200 --teacher resnet8 --student resnet8", 0
    CELLS, TRAINING = (
        2,
        "teacher=resnet8 student=resnet8 schedule.iterations=2 dataset.train_size=96 dataset.test_size=8",
    )


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def data() -> Any:
    return method_settings.make_data(device=DEVICE)


@pytest.fixture(scope="module")
def batch(data: Any) -> dict[str, Any]:
    return next(data.train.epoch(0))


def check_steps(model: Any, batch: dict[str, Any], folder: Path, precision: str) -> dict[str, Tensor]:
    """Takes a step of each phase and asserts that all is finite, the student moved and no teacher did."""
    start = bits(model.student.state_dict())
    teachers = {name: bits(each.state_dict()) for name, each in model.teachers.items()}
    left = step_each_phase(model, batch, folder, DEVICE, precision=precision)
    assert {key for key, each in left.items() if not each.isfinite().all()} == set()
    assert bits(model.student.state_dict()) != start
    assert {name: bits(each.state_dict()) for name, each in model.teachers.items()} == teachers
    assert {each.device.type for each in model.state_dict().values() if isinstance(each, Tensor)} == {DEVICE}
    return left


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", method_settings.SETTINGS)
def test_one_step_of_every_method(name: str, precision: str, batch: dict[str, Any], tmp_path: Path) -> None:
    check_steps(method_settings.make_model(name, 10), batch, tmp_path, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DENSE)
def test_one_step_of_dense_networks(name: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="mmdet and mmseg are not installed (bash install.sh full)")
    batch = next(dense_settings.make_data(dense_settings.SETTINGS[name].task).train.epoch(0))
    check_steps(dense_settings.make_model(name), batch, tmp_path, precision)


@pytest.mark.parametrize("name", DETECTORS)
def test_two_steps_of_a_detector_with_our_operators(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="mmdet and mmseg are not installed (bash install.sh full)")
    import mmcv._ext

    if not str(mmcv._ext.__file__).endswith(".py"):
        pytest.skip("mmcv's own operators are installed")
    batch = next(dense_settings.make_data(dense_settings.SETTINGS[name].task).train.epoch(0))
    model = dense_settings.make_model(name)
    for _ in range(2):
        check_steps(model, batch, tmp_path, "fp32")


@pytest.mark.parametrize("name", ["kd", "hybrid_forward", "l2t", "m2as"])
def test_one_step_is_that_of_the_cpu(name: str, batch: dict[str, Any], tmp_path: Path) -> None:
    model = method_settings.make_model(name, 10)
    found = step_each_phase(copy.deepcopy(model), batch, tmp_path, DEVICE)
    expected = step_each_phase(model, {key: each.cpu() for key, each in batch.items()}, tmp_path)
    for key, value in expected.items():
        if "scalars" in key:
            torch.testing.assert_close(found[key].cpu(), value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["hybrid_forward", "l2t", "m2as", "distpro_search"])
def test_activation_checkpointing_is_exact(name: str, batch: dict[str, Any], tmp_path: Path) -> None:
    """Backward passes have a thread of their own there."""
    model = method_settings.make_model(name, 10)
    kept, recomputed = (
        step_each_phase(copy.deepcopy(model), batch, tmp_path, DEVICE, activation_checkpointing=on)
        for on in (False, True)
    )
    for key, value in kept.items():
        torch.testing.assert_close(recomputed[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_crd_draws_there_and_waits_for_nothing(batch: dict[str, Any], tmp_path: Path) -> None:
    method = method_settings.make_model("crd", 10).method.to(DEVICE)
    labels, known = batch["labels"], torch.from_numpy(method_settings.facts().labels).to(DEVICE)
    mode = torch.cuda.get_sync_debug_mode() if DEVICE == "cuda" else None
    if mode is not None:
        torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = method.draw(labels)
    finally:
        if mode is not None:
            torch.cuda.set_sync_debug_mode(mode)
    assert drawn.device.type == DEVICE and drawn.shape == (len(labels), method.negatives)
    images = torch.empty_like(known)
    images[method.rows] = torch.arange(len(known), device=DEVICE)  # the image of each row
    assert not (known[images[drawn]] == labels[:, None]).any()


@pytest.mark.parametrize("how", ["difference", "jvp"])
def test_no_derivative_is_taken_under_autocast(how: str, batch: dict[str, Any], tmp_path: Path) -> None:
    weight = torch.ones(2, 2, device=DEVICE)
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(ValueError, match="directional: expected full precision"),
    ):
        directional(lambda values: (values[0] @ values[0]).sum(), [weight], [weight], how)
    # A search leaves autocast by itself.
    model = method_settings.make_model("distpro_search", 10, hypergradient=how)
    check_steps(model, batch, tmp_path, "bf16")


def test_resumes_to_the_same_numbers(data: Any, tmp_path: Path) -> None:
    def train(name: str, *stops: Interrupt) -> None:
        fit(
            method_settings.make_model("kd", 10),
            data,
            tmp_path / name,
            method_settings.SCHEDULE,
            device=DEVICE,
            extra_hooks=stops,
        )

    train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", Interrupt(len(data.train) + 2))
    train("stopped")
    whole, stopped = (torch.load(tmp_path / name / "student.pth") for name in ("whole", "stopped"))
    for key, value in whole.items():
        torch.testing.assert_close(stopped[key], value, rtol=1e-3, atol=1e-4, msg=key)
    losses = [[row["loss"] for row in rows(tmp_path / name) if row["kind"] == "train"] for name in ("whole", "stopped")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def timing(*methods: str) -> Namespace:
    return bench.parse_arguments([*methods, "--device", DEVICE, *TIMED.split()])


def test_speed_of_steps_over_their_passes() -> None:
    """As a table; a step's time is in milliseconds."""
    methods = ["kd", "hybrid_forward", "crd", "reviewkd", "distpro_search"]
    assert bench.main([*methods, "--device", DEVICE, *TIMED.split()]) == 0


@pytest.mark.parametrize("name", ["kd", "crd"])
def test_speed_beside_a_plain_loop(name: str, tmp_path: Path) -> None:
    """Those two methods that RepDistiller has as well, each loop with its own loader."""
    arguments = timing(name)
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, 32, 32, 3), np.uint8)
    labels, device, each = labels_of(arguments.images), torch.device(DEVICE), arguments.batch
    model = make_model(name, arguments)
    networks = (copy.deepcopy(part.network) for part in (model.student, model.teacher))
    negatives = min(defaults(METHODS[name]).get("negatives", 0), arguments.images // 2)
    plain = PlainLoop(*networks, images, labels, negatives, each, DEVICE, WORKERS)
    common = {"augmentation": "crop_flip", "shuffle": True, "seed": 0, "device": device}
    loader = ResidentLoader(torch.from_numpy(images), torch.from_numpy(labels), batch_size=each, **common)
    batches = endless(loader)
    engine = Engine(defaults(Schedule), device, tmp_path)
    loop = measured_loop(model, model.method.phases()[-1], next(batches), engine)
    ours = steps_per_second(batches, loop.advance, arguments.steps, arguments.warmup)
    theirs = plain.rate(arguments.steps, arguments.warmup)
    print(f"\n{name}, {arguments.teacher} -> {arguments.student}, batch {each}: {ours:.2f} steps/s, plain {theirs:.2f}")
    assert ours > 0 and theirs > 0


def test_speed_of_cells_side_by_side(tmp_path: Path) -> None:
    """The same cells on one card, all at once and one after the other; their teacher is trained before."""

    def train(root: Path, seeds: range, workers: int) -> float:
        keys = f"method=kd dataset=scenes_small {TRAINING} device={DEVICE} wandb.mode=disabled workers={workers}"
        keys += f" seed={','.join(map(str, seeds))} output_root={root}"
        start = time.perf_counter()
        command = [sys.executable, "-m", "experiments.run", "-m", *keys.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stdout + done.stderr
        return time.perf_counter() - start

    train(tmp_path / "teacher", range(CELLS, CELLS + 1), 1)
    for name in ("together", "in_turn"):
        shutil.copytree(tmp_path / "teacher", tmp_path / name)
    together, in_turn = (
        train(tmp_path / name, range(CELLS), workers) for name, workers in (("together", CELLS), ("in_turn", 1))
    )
    print(f"\n{CELLS} cells: {together:.0f} s at once, {in_turn:.0f} s one after the other")
