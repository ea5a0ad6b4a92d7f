"""A method, a network, a dataset and a paper of another package, found by its entry points.

| to add | touches |
|---|---|
| a method | one file that registers it, one class of settings (an entry) |
| a network | one builder, one `NetworkSpec` (an entry) |
| a dataset | one reader, one `DatasetSpec` with its stand-in and recipe (an entry) |
| a paper | one folder (an entry), its table files |
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from results import write_cell
from tables.folders import rendered_folders

ROOT = Path(__file__).resolve().parent.parent

FILES = {
    "outside/__init__.py": "",
    "outside/names.py": '''
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from pydantic import Field

from kt.data import DatasetSpec
from kt.models.names import NetworkSpec
from kt.needs import Need
from kt.settings import Dataset, Method

TINY = NetworkSpec("outside.networks:build_tiny", {"depth": 2})


class Bands(Dataset):
    """Bands that lie or stand."""

    period: Literal[2, 4, 8] = Field(4, description="pixels from band to band")


BANDS = DatasetSpec(
    {"classification": "outside.bands:read_bands"},
    keys=("train_size",),
    defaults={
        "task": "classification", "image_size": 16, "augmentation": "none", "train_size": 60, "stand_in": "scenes_small"
    },
    schedule={"epochs": 2, "batch_size": 10, "lr": 0.02, "milestones": [0.5]},
    settings=Bands,
)


class Search(Method):
    """The student alone beside its teacher, which leaves a file."""

    module: ClassVar[str] = "outside.methods"
    length: int = Field(1, description="of what it finds")


class Logits(Method):
    """The squared distance of logits, weighted by what a search has found."""

    module: ClassVar[str] = "outside.methods"
    weight: Annotated[float, Ge(0)] = Field(1.0, description="of the distance")

    @staticmethod
    def needs(config):
        return {"process": Need({**config, "method": {"name": "search", "length": 3}}, "process.pth")}
''',
    "outside/networks.py": """
from torch import nn

from kt.stages import Head, Piece, Stage, head_of, stages_of


class Tiny(nn.Module):
    def __init__(self, num_classes, channels, depth):
        super().__init__()
        layers, before = [], 3
        for _ in range(depth):
            layers.append(nn.Sequential(nn.Conv2d(before, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()))
            before = channels
        self.layers = nn.ModuleList(layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


def build_tiny(num_classes, width, depth):
    return Tiny(num_classes, round(32 * width), depth)


@stages_of.register
def _(network: Tiny) -> list[Stage]:
    return [Stage(f"layer{i}", 2 ** (i + 1), layer[0].out_channels, (layer,)) for i, layer in enumerate(network.layers)]


@head_of.register
def _(network: Tiny) -> Head:
    return Head((Piece(lambda x: x.mean((2, 3))),), (), network.fc)
""",
    "outside/methods.py": """
import torch

from kt.methods import METHODS, Method
from kt.phase import Phase


@METHODS.register_module(name="search")
class Search(Method):
    def __init__(self, student, teacher, length):
        super().__init__(student, teacher)
        self.length = length

    def phases(self):
        return [Phase("train", self.loss, before_epoch=self.keep)]

    def keep(self, model, loop):
        torch.save(torch.ones(self.length), loop.folder / "process.pth")

    def loss(self, model, batch):
        output = model.student.task(model.student.extract(batch["inputs"]), batch)
        return output.loss, output.scalars


@METHODS.register_module(name="logits")
class Logits(Method):
    def __init__(self, student, teacher, data, files, weight):
        super().__init__(student, teacher)
        self.weight = weight * torch.load(files["process"]).mean().item()
        self.register_buffer("seen", torch.zeros(data.largest_index + 1))

    def loss(self, model, batch):
        output = model.student.task(model.student.extract(batch["inputs"]), batch)
        with torch.no_grad():
            theirs = model.teacher.head(model.teacher.extract(batch["inputs"])[-1])
        self.seen[batch["indices"]] += 1
        distance = (output.logits - theirs).square().mean()
        return output.loss + self.weight * distance, {**output.scalars, "distance": distance.detach()}
""",
    "outside/bands.py": """
import numpy as np

from kt.data.images import Images, Labelled


def read_bands(dataset, root, cache):
    size, period = dataset["image_size"], dataset["period"]

    def draw(count):
        labels = np.arange(count) % 2
        images = np.zeros((count, size, size, 3), np.uint8)
        images[labels == 0, ::period] = images[labels == 1, :, ::period] = 255
        return Labelled(images, labels)

    return Images(draw(dataset["train_size"]), draw(20), ("lying", "standing"))
""",
    "outside-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
    "outside-1.0.dist-info/entry_points.txt": (
        "[kt.methods]\nlogits = outside.names:Logits\nsearch = outside.names:Search\n\n"
        "[kt.networks]\ntiny = outside.names:TINY\n\n"
        "[kt.datasets]\nbands = outside.names:BANDS\n\n"
        "[kt.papers]\nfar = outside.far\n"
    ),
    "outside/far/record.yaml": """
paper: {key: far, order: 9, title: From Far Away, authors: [Them], venue: null}
protocols:
  small: {applies_to: [table1], dataset: scenes, schedule: {unit: epochs, total: 1}, lr: 0.1, batch_size: 64}
tables:
  - id: table1
    name: far_table
    caption: Squared distances of logits
    dataset: scenes
    task: classification
    metrics: [{name: top1, unit: percent, better: higher, decimals: 2}]
    protocol: small
    rows:
      - {id: alone, row: Alone, role: baseline, method: none, teacher: null, student: tiny, values: {top1: 12.34}}
      - {id: taught, row: Taught, role: method, method: logits, teacher: tiny, student: tiny, values: {top1: 56.78}}
    notes: []
figures: []
claims: [{id: c1, claim: Both are scores, where: [table1], holds_in_paper: true, check: top-1 from 0 to 100}]
""",
    "outside/far/claims.py": """
from tables.judging import FAILS, HOLDS, Judges, rows_of

JUDGES = Judges()


@JUDGES.of("c1")
def scores(context):
    means = [rows_of(context, name)[0]["mean"]["top1"] for name in ("alone", "taught")]
    return HOLDS if all(0 <= mean <= 100 for mean in means) else FAILS, f"{len(means)} scores were looked at."
""",
    "outside/far/table/far_table.yaml": """
# @package _global_
defaults:
  - override /hydra/sweeper: table
  - override /teacher: tiny
  - override /student: tiny
hydra:
  mode: MULTIRUN
  sweeper:
    name: far_table
    rows:
      alone: {overrides: {method: none}}
      taught: {overrides: {method: logits, method.weight: 0.5}}
""",
}
SMALL = ("dataset.train_size=64", "dataset.test_size=20", "dataset.image_size=32", "schedule.epochs=1")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the outside one."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(site: Path, *arguments: str, module: str = "experiments.run") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_a_cell_of_an_outside_method_and_network(site: Path, tmp_path: Path) -> None:
    pair = ("teacher=tiny", "student=tiny", "wandb.mode=disabled", *SMALL)
    done = run(site, "method=logits", "method.weight=0.5", "dataset.subset=40", *pair, f"output_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.glob("cells/*/result.json")]
    (own,) = [result for result in results if result["config"]["method"]["name"] == "logits"]
    assert own["config"]["method"] == {"name": "logits", "weight": 0.5}
    (search,) = [result for result in results if result["config"]["method"] == {"name": "search", "length": 3}]
    assert own["needs"] == {"teacher": search["needs"]["teacher"], "process": search["id"]}
    folder = tmp_path / "cells" / own["id"]
    seen = torch.load(folder / "phases" / "0-train" / "checkpoint.pth")["model"]["method.seen"]
    assert seen.sum() == 40 and seen.max() == seen[-1] == 1 and len(seen) > 40  # images left out leave gaps
    assert own["config"]["student"]["network"]["name"] == "tiny"
    records = (tmp_path / "cells" / own["id"] / "metrics.jsonl").read_text()
    assert '"distance"' in records
    # Read back by somebody who has the package as well.
    code = f"import kt; print(kt.load_student({str(tmp_path / 'cells' / own['id'])!r}).fc.out_features)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    back = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert back.stdout.strip() == "10", back.stderr


REFUSED = [
    (("method=logits", "method.weight=-1"), "method.weight=-1: expected a number >= 0"),
    (("method=logits", "method.wieght=1"), "did you mean 'weight'?"),
    (("method=logitss",), "did you mean 'logits'?"),
    (("method=logits", "student=tinny"), "did you mean 'tiny'?"),
    (("dataset=bandss",), "did you mean 'bands'?"),
    (("dataset=bands", "++dataset.name=band"), "did you mean 'bands'?"),
    (
        ("dataset=bands", "dataset.task=keypoints"),
        "task=keypoints: for bands expected one of classification",
    ),
    (
        ("dataset=bands", "dataset.augmentation=flip"),
        "=flip: for classification expected one of none, crop_flip",
    ),
    (("dataset=bands", "evaluation=band"), "did you mean 'bands'?"),
    (("dataset=bands", "dataset.period=3"), "dataset.period=3: expected one of 2, 4, 8"),
    (("dataset=bands", "dataset.perod=2"), "dataset.perod: unknown key (did you mean 'period'?)"),
    (("dataset.period=2",), "dataset.period: unknown key; dataset has name, "),
    (("++teacher.dataset.name=bands",), "teacher.dataset.period: missing; expected one of 2, 4, 8"),
    (
        ("dataset=cifar100", "dataset@teacher.dataset=bands", "teacher.dataset.period=3"),
        "teacher.dataset.period=3: expected one of 2, 4, 8",
    ),
]


@pytest.fixture(scope="module")
def answers(site: Path) -> list[tuple[int, str]]:
    """Exit status and standard error of each command of `REFUSED`, which one process goes through."""
    code = """
import contextlib, io, json, sys
from experiments.run import main

for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = main(["teacher=tiny", "plan=true", *arguments])
    print(json.dumps([status, told.getvalue()]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    asked = json.dumps([arguments for arguments, _ in REFUSED])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda number: REFUSED[number][1])
def test_its_settings_are_checked_like_all_others(number: int, answers: list[tuple[int, str]]) -> None:
    status, told = answers[number]
    assert status == 2 and told.count("\n") == 1 and REFUSED[number][1] in told, told


def test_planning_imports_no_torch_for_it(site: Path) -> None:
    code = (
        "import sys; from experiments.run import main; "
        "status = main(['method=logits', 'teacher=tiny', 'student=tiny', 'dataset=bands', 'plan=true']); "
        "sys.exit('torch' in sys.modules or status)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_a_table_of_an_outside_paper(site: Path, tmp_path: Path) -> None:
    """Its rows teach the outside network by the outside method."""
    done = run(site, "+table=far_table", "wandb.mode=disabled", "workers=1", *SMALL, f"output_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    (folder,) = rendered_folders(tmp_path, "far_table", "mini")
    rows = {row["id"]: row for row in json.loads((folder / "table.json").read_text())["rows"]}
    assert {name: (row["method"], row["student"]) for name, row in rows.items()} == {
        "alone": ("none", "tiny"),
        "taught": ("logits", "tiny"),
    }
    page = (folder / "index.html").read_text()
    own = [f"{row['mean']['top1']:.2f}" for row in rows.values()]
    for words in ("From Far Away", "12.34", "56.78", *own, "Both are scores", "1 holds", "2 scores were looked at."):
        assert words in page, words
    again = run(site, "far_table", "--output-root", str(tmp_path), module="tables")
    assert again.returncode == 0 and "56.78" in again.stdout, again.stderr
    listed = run(site, module="tables")
    assert "far_table" in listed.stdout and "31 tables" in listed.stdout, listed.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            "record.yaml",
            "    caption: Squared distances of logits\n",
            "",
            "tables[0]: expected a key 'caption', it has id",
        ),
        ("record.yaml", "role: method", "role: metod", "role=metod: expected one of teacher, baseline, method"),
        ("record.yaml", "protocol: small", "protocol: smal", "protocol=smal: expected one of small"),
        ("record.yaml", "rows:", "rows: [", "record.yaml: while parsing"),
        ("record.yaml", "key: far", "key: near", "paper.key=near: expected one of far"),
        ("record.yaml", "name: far_table", "name: further_table", "far_table.yaml runs it, but no paper's record.yaml"),
        ("table/far_table.yaml", "method: logits", "method: logitss", "did you mean 'logits'?"),
    ],
)
def test_mistakes_in_a_paper_get_one_line(
    site: Path, tmp_path: Path, file: str, old: str, new: str, words: str
) -> None:
    shutil.copytree(site, tmp_path / "site")
    path = tmp_path / "site" / "outside" / "far" / file
    path.write_text(path.read_text().replace(old, new))
    done = run(tmp_path / "site", "+table=far_table", "plan=true")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


def test_an_entry_that_names_no_paper(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    path = tmp_path / "site" / "outside-1.0.dist-info" / "entry_points.txt"
    path.write_text(path.read_text().replace("outside.far", "outsid.far"))
    for arguments, module in ((["plan=true"], "experiments.run"), ([], "tables")):
        done = run(tmp_path / "site", *arguments, module=module)
        assert done.returncode == 2 and done.stderr == (
            "kt: error: kt.papers: far = outsid.far: expected an installed package that holds a record.yaml\n"
        )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "logits = outside.names:Logits",
            "logits = outside.nam:Logits",
            "cannot be loaded (ModuleNotFoundError: ",
        ),
        ("tiny = outside.names:TINY", "tiny = outside.names:TINI", "cannot be loaded (AttributeError: "),
        (
            "outside.names:Logits",
            "outside.methods:Logits",
            "expected a subclass of kt.settings.Method, whose `module` ",
        ),
        ("outside.names:Logits", "kt.settings:KD", "expected a subclass of kt.settings.Method, whose `module` "),
        ("outside.names:TINY", "outside.names:BANDS", ": expected a kt.models.names.NetworkSpec\n"),
        ("outside.names:BANDS", "outside.names:Bands", ": expected a kt.data.DatasetSpec\n"),
        ("logits = outside", "kd = outside", "of kt.methods: there is a kd already; expected a name of its own"),
    ],
)
def test_an_entry_that_cannot_be_used(site: Path, tmp_path: Path, old: str, new: str, words: str) -> None:
    shutil.copytree(site, tmp_path / "site")
    path = tmp_path / "site" / "outside-1.0.dist-info" / "entry_points.txt"
    path.write_text(path.read_text().replace(old, new))
    done = run(tmp_path / "site", "plan=true")
    line = done.stderr.splitlines(keepends=True)[-1]
    assert done.returncode == 2 and line.startswith("kt: error: entry point ") and words in line, done.stderr
    assert "Traceback" not in done.stderr


def test_results_of_a_package_that_is_gone_are_in_nobodys_way(site: Path, tmp_path: Path) -> None:
    config = {"method": {"name": "gone"}, "schedule": {"epochs": 1, "iterations": None}}
    write_cell(tmp_path, "0" * 16, {"top1": 1.0}, config=config)
    done = run(site, "plan=true", f"output_root={tmp_path}")
    assert done.returncode == 0, done.stderr


def test_a_cell_on_an_outside_dataset(site: Path, tmp_path: Path) -> None:
    common = ("wandb.mode=disabled", f"output_root={tmp_path}")
    done = run(site, "student=tiny", "dataset=bands", "evaluation=bands", *common)
    assert done.returncode == 0, done.stderr
    (scores,) = tmp_path.glob("cells/*/evaluations/bands.json")
    told = "evaluation=bands: top-1 accuracy 100.00, top-2 of 2 classes 100.00\nall of it:"
    assert f"\n{told} {scores}\n" in done.stdout
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("cells/*/result.json")]
    assert (result["num_classes"], result["train_size"], result["test_size"]) == (2, 60, 20)
    schedule = result["config"]["schedule"]
    assert (schedule["epochs"], schedule["batch_size"], schedule["weight_decay"]) == (2, 10, 5e-4)
    assert result["metrics"]["top1"] == 100.0


def test_its_stand_in_recipe_and_own_key(site: Path) -> None:
    code = """
from configs import composed, table
from experiments.meaning import identity, needed_cells, settle
from kt.data.names import content
rows = {name: {"label": name, "role": "baseline", "overrides": {"dataset": name}} for name in ("bands", "imagenet")}
for scale in ("mini", "fast"):
    made = table("stage_count", f"scale={scale}", "student=resnet20", rows=rows)
    print([(shown.config["dataset"]["name"], shown.config["dataset"]["image_size"]) for shown in made.shown])
chosen = composed("dataset=bands", "student=tiny", "scale=paper", "scale.fraction=0.5")
print(chosen["schedule"]["epochs"], chosen["dataset"]["stand_in"])
periods = ((), ("dataset.period=4",), ("dataset.period=2",))
own = [composed("dataset=bands", "student=tiny", *period) for period in periods]
print([content(config["dataset"])["period"] for config in own], len({identity(config) for config in own}))
taught = composed("dataset=bands", "student=tiny", "method=kd", "teacher=tiny", "+dataset@teacher.dataset=cifar100")
print("period" in taught["dataset"], "period" in needed_cells(settle(taught))["teacher"]["dataset"])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "[('scenes', 24), ('scenes', 48)]",
        "[('bands', 16), ('imagenet', 224)]",
        "1 scenes_small",
        "[4, 4, 2] 2",
        "True False",
    ], done.stderr
