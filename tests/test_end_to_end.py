"""Real cells through the command line: killed and resumed to the same bits, and a table from nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.build import peak_memory
from tables.folders import rendered_folders

ROOT = Path(__file__).parents[1]
SMALL = ("dataset.train_size=320", "dataset.test_size=50", "dataset.image_size=32", "schedule.batch_size=32")
PAIR = ("teacher=resnet20", "student=resnet8", "wandb.mode=disabled", *SMALL)


def start(*overrides: str, output_root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.run", *overrides, f"output_root={output_root}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*overrides: str, output_root: Path) -> str:
    process = start(*overrides, output_root=output_root)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def students(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: torch.load(path) for path in (root / "cells").glob("*/student.pth")}


def steps(root: Path) -> dict[str, list[dict]]:
    found = {}
    for path in (root / "cells").glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return found


def test_a_killed_cell_resumes_to_the_same_bits(tmp_path: Path) -> None:
    settings = (*PAIR, "method=hybrid_forward", "method.balance=dynamic", "schedule.epochs=6")
    finish(*settings, output_root=tmp_path / "whole")
    process = start(*settings, output_root=tmp_path / "killed")
    # Kill it in the student's third epoch or later: the teacher has no l1.
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        texts = [path.read_text() for path in (tmp_path / "killed").glob("cells/*/metrics.jsonl")]
        if any('"l1"' in text and text.count('"kind": "eval"') >= 2 for text in texts):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    finish(*settings, "activation_checkpointing=true", output_root=tmp_path / "killed")
    whole, killed = students(tmp_path / "whole"), students(tmp_path / "killed")
    assert whole.keys() == killed.keys() and len(whole) == 2
    for name, state in whole.items():
        assert all(torch.equal(state[key], killed[name][key]) for key in state)
    assert steps(tmp_path / "whole") == steps(tmp_path / "killed")


def test_a_table_from_nothing_and_a_second_time(tmp_path: Path) -> None:
    command = ("+table=imagenet_compression", "rows=teacher,baseline,hybrid_forward", "schedule.epochs=2", *PAIR)
    output = finish(*command, output_root=tmp_path)
    assert "index.html" in output
    (folder,) = rendered_folders(tmp_path, "imagenet_compression", "mini")
    table = json.loads((folder / "table.json").read_text())
    assert [row["id"] for row in table["rows"]] == ["teacher", "baseline", "hybrid_forward"]
    assert all(cell["status"] == "done" for row in table["rows"] for cell in row["cells"])
    assert table["comparable"] is False and {claim["id"] for claim in table["claims"]} >= {"c1", "c2", "c6"}
    for row in table["rows"]:
        result = json.loads((tmp_path / "cells" / row["cells"][0]["id"] / "result.json").read_text())
        wanted = (
            "id status metrics config needs data seconds images_per_second peak_memory versions commit hardware threads"
        )
        assert set(wanted.split()) | {"wandb_id"} <= result.keys()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/student.pth")}
    began = time.monotonic()
    finish(*command, output_root=tmp_path)
    assert time.monotonic() - began < 10
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/student.pth")} == before


def test_cells_side_by_side_end_with_the_bits_of_one_after_the_other(tmp_path: Path) -> None:
    command = ("+table=imagenet_compression", "rows=baseline,kd,at", "schedule.epochs=1", *PAIR)
    finish(*command, "workers=2", output_root=tmp_path / "two")
    finish(*command, "hydra/launcher=basic", output_root=tmp_path / "one")
    one, two = students(tmp_path / "one"), students(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 4
    for name, state in one.items():
        assert all(torch.equal(state[key], two[name][key]) for key in state)
    assert steps(tmp_path / "one") == steps(tmp_path / "two")


def test_peak_memory_is_the_processs_own() -> None:
    """Not that of the larger process which started it."""
    ballast = torch.ones(2**29, dtype=torch.uint8)
    code = "import torch; from experiments.build import peak_memory; print(peak_memory(torch.device('cpu')))"
    started = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    own = peak_memory(torch.device("cpu"))
    assert own > len(ballast)
    assert int(started.stdout.split()[-1]) < own - len(ballast) / 2
