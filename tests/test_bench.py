"""The bench: what it times is what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments import bench, data_bench
from experiments.benched import image_batch, labels_of, make_model
from experiments.peer_bench import torchdistill_step
from kt.engine import Engine, measured_loop
from kt.errors import UserError
from kt.functional import soft_target
from kt.settings import Schedule, defaults
from plain_loop import PlainLoop

TINY = ["--teacher", "resnet8", "--student", "resnet8", "--steps", "1", "--warmup", "1", "--batch", "4"]
CPU = torch.device("cpu")


def precisions(function: object) -> set[torch.dtype]:
    """What convolutions give while something runs."""
    found: set[torch.dtype] = set()

    def note(module: nn.Module, given: object, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            found.add(output.dtype)

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        function()  # type: ignore[operator]
    finally:
        hook.remove()
    return found


FULL, HALF = {torch.float32}, {torch.bfloat16}


@pytest.mark.parametrize(
    ("way", "step", "student", "teacher"),
    [("fp32", FULL, FULL, FULL), ("teacher_bf16", FULL | HALF, FULL, HALF), ("bf16", HALF, HALF, HALF)],
)
def test_passes_compute_as_the_step_does(way: str, step: set, student: set, teacher: set, tmp_path: Path) -> None:
    arguments = bench.parse_arguments(["kd", *TINY])
    lane = bench.Lane("kd", {}, way, arguments, image_batch(4, CPU), tmp_path / way)
    found = [precisions(part) for part in lane.parts]
    lane.records.close()
    assert found == [step, student, teacher, set()]


def test_the_bench_tells_all_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torchdistill", "torchdistill.core", "torchdistill.core.distillation"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench.main(["kd", "none", *TINY, "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["methods"]
    ways = [(row["method"], row["way"]) for row in rows]
    assert ways == [("kd", "fp32"), ("kd", "teacher_bf16"), ("kd", "bf16"), ("none", "fp32"), ("none", "bf16")]
    for row in rows:
        assert row["unavoidable_ms"] == pytest.approx(sum(row["passes_ms"]) + row["update_ms"])
        assert row["ratio"] == pytest.approx(row["step_ms"] / row["unavoidable_ms"])
    said = capsys.readouterr().out
    assert all(way in said for _, way in ways)
    assert "torchdistill: not measured, it is not installed (pip install -e '.[bench]')" in said


def test_all_methods_are_those_that_the_networks_can_be_taught_by() -> None:
    pair = ("--student", "pspnet_mobilenet_v2", "--teacher", "pspnet_resnet101")
    small, dense = (bench.parse_arguments([*networks]).methods for networks in ((), pair))
    assert "ifvd" not in small and {"none", "kd", "crd", "l2t", "m2a2s", "stagewise"} < {*small}
    assert "ifvd" in dense and "crd" not in dense
    with pytest.raises(UserError, match="^method 'ifvd': expected one of "):
        bench.parse_arguments(["ifvd"])


def test_torchdistill_takes_the_same_step(tmp_path: Path) -> None:
    pytest.importorskip("torchdistill", reason="torchdistill is not installed (pip install -e '.[bench]')")
    arguments, batch = bench.parse_arguments(["kd", *TINY]), image_batch(4, CPU)
    theirs = torchdistill_step(arguments, batch)
    model = make_model("kd", arguments)
    engine = Engine({**defaults(Schedule), "lr": 0.05, "epochs": 1, "warmup_epochs": 0}, CPU, tmp_path)
    loop = measured_loop(model, model.method.phases()[-1], batch, engine)
    assert theirs is not None
    for _ in range(2):  # the second one tells whether the first update was the same
        assert theirs() == pytest.approx(loop.step(batch)["loss"].item(), rel=1e-4)


def test_loaders_and_scoring_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_bench, "LARGE", ("resnet8", "resnet8"))
    assert bench.main(["--data", *TINY, "--batches", "1", "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["data"]
    assert [(row["side"], row["read"]) for row in rows] == [
        (side, how) for side in (32, 224) for how in ("resident", "streamed")
    ]
    assert all(row[what] > 0 for row in rows for what in ("train", "test", "scoring", "step"))
    # Decoding a file takes longer than taking an array's rows.
    assert rows[0]["test"] > 2 * rows[1]["test"]


@pytest.mark.parametrize("negatives", [0, 3])
def test_the_plain_loop_learns_as_it_says(negatives: int) -> None:
    torch.manual_seed(0)
    arguments = bench.parse_arguments(["kd", *TINY])
    model = make_model("kd", arguments)
    images = np.random.default_rng(0).integers(0, 256, (120, 32, 32, 3), np.uint8)
    loop = PlainLoop(model.student.network, model.teacher.network, images, labels_of(120), negatives, 8, "cpu", 0)
    data = next(iter(loop.loader))
    logits, theirs = loop.student(data[0]), loop.teacher(data[0])
    supervised = nn.functional.cross_entropy(logits, data[1])
    if negatives:
        index, chosen = data[2:]
        assert (chosen[:, 0] == index).all() and (labels_of(120)[chosen[:, 1:]] != data[1].numpy()[:, None]).all()
        assert loop.loss(logits, data) > supervised
    else:
        expected = 0.1 * supervised + 0.9 * soft_target(logits, theirs, 4.0)
        torch.testing.assert_close(loop.loss(logits, data), expected)
    losses = [loop.step(data)[0] for _ in range(4)]
    assert losses[-1] < losses[0]
