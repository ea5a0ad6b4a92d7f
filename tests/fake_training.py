"""A stand-in for the training and the renderer, for tests of everything around them; needs no torch.

The variable `FAKE_TRAINING` holds JSON: method name (or `teacher`) -> what its cells do instead of training:
`error`, `mistake` (of the user), `mistake in the data`, `exit`, `kill` (their own process), `interrupt` or seconds to
sleep; `evaluation` -> `error` or `mistake`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

from kt.errors import UserError
from kt.files import write_sealed
from kt.store import pictures_file
from tables.folders import ROWS, table_folder


def train_cell(config: dict[str, Any], folder: Path, needs: dict[str, Path], progress: Any = None) -> dict[str, Any]:
    """Counts its calls and leaves a student."""
    with open(folder / "calls", "a") as file:
        file.write("x")
    for path in needs.values():
        assert path.exists(), path
    name = "teacher" if config["table"]["role"] == "teacher" else config["method"]["name"]
    does = json.loads(os.environ.get("FAKE_TRAINING", "{}")).get(name)
    if isinstance(does, int | float):
        time.sleep(does)
    elif does == "error":
        raise RuntimeError("the loss is not finite\nsecond line")
    elif does == "mistake":
        raise UserError("data_root=nowhere: expected a dataset there, or use scale=mini")
    elif does == "mistake in the data":
        raise UserError("dataset.folder=null: expected a folder")
    elif does == "exit":
        sys.exit(7)
    elif does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif does == "interrupt":
        raise KeyboardInterrupt
    if progress is not None:
        progress.start(10, folder.name)
        progress.advance(10, "train")
        progress.stop()
    print("a third party prints")
    (folder / "evaluations").mkdir(exist_ok=True)
    for left in ("student.pth", "student.json", "metrics.jsonl", "evaluations/test.json"):
        (folder / left).write_text(folder.name)
    return {"metrics": {"top1": 50.0, "top5": 90.0}, "labels": {"top5": "top-2 of 4 classes"}, "train_size": 10}


def evaluate_cell(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """The score of a trained student on another dataset."""
    assert (folder / "student.pth").exists()
    does = json.loads(os.environ.get("FAKE_TRAINING", "{}")).get("evaluation")
    if does == "mistake":
        raise UserError("data_root=nowhere: expected a dataset there, or use scale=mini")
    if does == "error":
        raise RuntimeError("no such layer")
    pictures_file(folder, config["evaluation"]).write_text(folder.name)
    return {"miou": 12.0}


def write_table(
    name: str, rows: list[dict[str, Any]], output_root: str, scale: str, dataset: str, settings: Any = None
) -> Path:
    """Leaves what it was given."""
    folder = table_folder(output_root, name, scale, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / ROWS, {"rows": rows, "scale": scale, "dataset": dataset, "settings": settings})
    (folder / "table.md").write_text("| the table |\n")
    return folder


def write_sweep(name: str, keys: list[str], points: list[dict[str, Any]], output_root: str) -> Path:
    """Leaves what it was given."""
    folder = Path(output_root) / "sweeps" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.json").write_text(json.dumps({"keys": keys, "points": points}))
    (folder / "table.md").write_text("| the sweep |\n")
    return folder


def mirror_table(folder: Path, output_root: str, settings: dict[str, Any], cell_ids: list[str]) -> None:
    """Leaves what it was given."""
    (folder / "mirrored.json").write_text(json.dumps({"mode": settings["mode"], "cells": cell_ids}))


# Workers import the last one for real trainings, which takes half a second.
NAMES = ("experiments.build", "tables.render", "tables.sweeps", "tables.mirror", "wandb")


def modules() -> dict[str, types.ModuleType]:
    """The modules that it replaces."""
    made = {name: types.ModuleType(name) for name in NAMES}
    made["experiments.build"].train_cell = train_cell  # type: ignore[attr-defined]
    made["experiments.build"].evaluate_cell = evaluate_cell  # type: ignore[attr-defined]
    made["tables.render"].write_table = write_table  # type: ignore[attr-defined]
    made["tables.mirror"].mirror_table = mirror_table  # type: ignore[attr-defined]
    made["tables.sweeps"].write_sweep = write_sweep  # type: ignore[attr-defined]
    return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the stand-ins, in this process and, through `sitecustomize`, in every worker that a launcher starts."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in NAMES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return modules()[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Puts the stand-ins before the real modules."""
    sys.meta_path.insert(0, _Finder())


def write_site(folder: Path) -> None:
    """Makes a folder whose `sitecustomize` installs the stand-ins in every process that has it on its path."""
    folder.mkdir()
    tests = str(Path(__file__).parent)
    text = f"import sys\nsys.path.append({tests!r})\nimport fake_training\nfake_training.install()\n"
    (folder / "sitecustomize.py").write_text(text)


def start(tmp_path: Path, *arguments: str, **does: Any) -> subprocess.Popen[str]:
    """A command in a process of its own, whose workers see the stand-ins in `<tmp_path>/site` too.

    Args:
        tmp_path: Results go to `out` in it.
        arguments: Of `python -m experiments.run`.
        does: What the cells of each method do, see above.
    """
    root = Path(__file__).resolve().parent.parent
    found = os.pathsep.join([str(tmp_path / "site"), str(root)])
    environment = {**os.environ, "PYTHONPATH": found, "FAKE_TRAINING": json.dumps(does), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments, f"output_root={tmp_path / 'out'}"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
