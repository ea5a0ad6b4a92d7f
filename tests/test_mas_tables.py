"""The tables of MAKD: which cells they are, a library's teacher without its data, and what the page shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from configs import composed, table
from experiments.cell import run_cell
from experiments.meaning import cell_id, identify, settle
from experiments.table import Table
from kt.data import fingerprint
from kt.data.fingerprint import combined
from kt.store import folder_of, read_result
from results import make_row, write_cell
from tables.collect import collect
from tables.judging import Context
from tables.papers.mas.figures import further
from tables.records import find_table


def cells_of(shown: Table) -> dict[str, list[str]]:
    """Row id -> its cells."""
    return {each.id: list(each.cells) for each in shown.shown}


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_one_source_network_teaches_three_targets(scale: str) -> None:
    shown = table("mas_limited", f"scale={scale}")
    cells = cells_of(shown)
    assert len(cells) == len({cell for each in cells.values() for cell in each}) == 30
    teachers = {}
    for each in shown.shown:
        (cell,) = each.cells
        teachers.setdefault(each.row.method, set()).update(shown.jobs[cell].needs)
    taught = {method: needs for method, needs in teachers.items() if method not in ("none", "finetune")}
    assert teachers["none"] == set()
    assert all(len(needs) == 1 and needs == taught["as"] for needs in taught.values())
    assert len(teachers["finetune"]) == 1 and teachers["finetune"] != taught["as"]
    datasets = {each.config["dataset"]["name"] for each in shown.shown}
    source = shown.jobs[next(iter(taught["as"]))].config
    if scale == "mini":
        assert (datasets, source["dataset"]["name"]) == ({"scenes_kinds", "scenes_actions", "scenes_places"}, "scenes")
    else:
        assert (datasets, source["dataset"]["name"]) == ({"cub200", "stanford40", "mit67"}, "imagenet")
        assert source["student"]["pretrained"] == "IMAGENET1K_V1" and source["schedule"]["epochs"] == 0
    shares = {e.config["method"]["source_share"] for e in shown.shown if e.row.method == "m2a2s"}
    assert shares == {0.1 if scale == "mini" else 0.01}


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_rows_without_a_source_are_one_cell_under_each(scale: str) -> None:
    shown = table("mas_domainnet", f"scale={scale}")
    cells = cells_of(shown)
    assert [*cells] == [line["id"] for line in find_table("mas_domainnet").rows]
    for method in ("scratch", "finetune"):
        assert len({cells[f"{method}_{source}"][0] for source in ("clipart", "real", "painting")}) == 1
    assert len({cell for each in cells.values() for cell in each}) == 2 + 3 * 4
    for each in shown.shown:
        if each.row.method == "m2a2s":
            assert each.config["method"]["source"]["domain"] == each.id.removeprefix("m2a2s_")
            assert each.config["dataset"]["domain"] == "painting"


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ImageNet weights that nobody has to fetch."""
    published = torchvision.models.resnet18().state_dict()
    kind = type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1)
    monkeypatch.setattr(kind, "get_state_dict", lambda self, *args, **kwargs: published)
    return published


def test_library_weights_teach_without_their_data(
    weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "REUSED", -1)  # look anew every time
    random = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "data/pets" / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/pets" / name / f"{number}.png")
    config = composed(
        *("method=as", "method.first_epochs=0", "teacher=resnet18", "student=resnet8", "dataset=imagefolder"),
        *("dataset.folder=pets", "dataset.image_size=32", "dataset@teacher.dataset=imagenet", "scale=paper"),
        *("schedule.epochs=1", "schedule.batch_size=4", "wandb.mode=disabled", "threads=1"),
        *(f"data_root={tmp_path / 'data'}", f"output_root={tmp_path / 'out'}"),
    )
    result = run_cell(config)
    assert 0 <= result["metrics"]["top1"] <= 100
    teacher = settle({**config, "cell": "teacher"})
    kept = read_result(folder_of(tmp_path / "out", result["needs"]["teacher"]))
    assert kept is not None and kept["metrics"] == {} and kept["id"] == cell_id(teacher)
    assert identify(teacher).told == (
        "there are no data of imagenet: the weights IMAGENET1K_V1 of resnet18 teach without a score",
    )
    settled = settle(config)
    assert not identify(settled).unverified and not identify(teacher).unverified
    before = cell_id(settled), combined(identify(settled).states)
    (tmp_path / "data/imagenet/train/n1").mkdir(parents=True)
    (tmp_path / "data/imagenet/train/n1/a.JPEG").write_bytes(b"an image")
    # The student stays what it is; the teacher can be scored now.
    assert (cell_id(settled), combined(identify(settled).states)) == before
    assert cell_id(teacher) != kept["id"]


def test_figures_of_what_is_learnt(tmp_path: Path) -> None:
    steps = 12
    records = []
    for step in range(1, steps + 1):
        row = {"kind": "train", "phase": "train", "step": step, "epoch": step / 4, "lr": 0.1, "loss": 1.0}
        if step > 4:  # the first epoch trains the student alone
            row |= {"loss_match": 1 / step, "loss_align": 2 / step, "unexplained": 0.5}
            row |= {"weight_layer1_layer2": 1 + step / 100, "weight_adapted_layer2": 1.0}
        records.append(row)
    rows = [make_row("mas_limited", row_id) for row_id in ("scratch_cub200", "m2as_cub200")]
    for row in rows:
        write_cell(tmp_path, row["cells"][0]["id"], {"top1": 50.0}, records if row["method"] == "m2as" else ())
    shown = collect("mas_limited", rows, tmp_path, "mini", "scenes_kinds")
    context = Context(find_table("mas_limited"), shown["rows"], {}, tmp_path)
    (drawing,) = further(context)
    assert [panel.id for panel in drawing.panels] == [
        f"m2as_cub200_{part}" for part in ("losses", "unexplained", "layer1", "adapted")
    ]
    (line,) = drawing.panels[2].lines  # type: ignore[union-attr]
    np.testing.assert_allclose(line.y, 1 + np.arange(5, 13) / 100)
    np.testing.assert_allclose(line.means_x, [1.5, 2.5])
    assert "At the end layer1 to layer2 counts most (1.12) and adapted to layer2 least (1)" in drawing.caption
