"""Tables from synthetic result folders: numbers, verdicts, renderings, command line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kt.errors import UserError
from kt.files import read_sealed
from kt.store import records_file, write_status
from results import make_row, write_cell
from tables import papers
from tables.__main__ import run
from tables.collect import banner, collect
from tables.curves import Curve, _read_curve, downsample, first_decay, read_curve
from tables.records import TableRecord, all_tables, find_table, load_paper
from tables.render import escape_latex, write_table

pytestmark = pytest.mark.usefixtures("no_cell_pages")

ROOT = Path(__file__).resolve().parent.parent
NAME = "imagenet_compression"
ROWS = ("teacher", "baseline", "kd", "at", "ft", "ab", "hybrid_forward")
TOP1 = {"teacher": 86.0, "baseline": 70.0, "kd": 72.0, "at": 71.0, "ft": 70.5, "ab": 70.25, "hybrid_forward": 75.0}
EPOCHS, STEPS, DECAY = 4, 10, 2  # the learning rate falls after epoch 2

Json = dict[str, Any]
# (epoch from 1) -> values; a little noise is added to all but `lr`
Shape = Callable[[int], Mapping[str, float]]


def plain_shape(epoch: int) -> Mapping[str, float]:
    """A student without teacher."""
    return {"loss": 2.0 / epoch, "accuracy": 40.0 + 5 * epoch}


def hybrid_shape(**changes: Callable[[int], float]) -> Shape:
    """Hybrid forward as the paper describes it, or with changes."""
    late = DECAY + 1
    values: dict[str, Callable[[int], float]] = {
        "l1": lambda epoch: 1.5 / epoch if epoch < late else 0.9,
        "l2": lambda epoch: 1.6 / epoch if epoch < late else 0.3,
        "l3": lambda epoch: 2.0 / epoch if epoch < late else 0.6,
        "accuracy1": lambda epoch: 45.0 + 5 * epoch,
        "accuracy2": lambda epoch: 44.0 + 5 * epoch,
        "accuracy": lambda epoch: 37.0 + 5 * epoch if epoch < late else 43.0 + 5 * epoch,
        **changes,
    }
    return lambda epoch: {name: value(epoch) for name, value in values.items()}


def curve_of(shape: Shape, seed: int = 0, decay: bool = True, noise: float = 0.01) -> list[Json]:
    """A cell's records."""
    rng = np.random.default_rng(seed)
    lines: list[Json] = [{"kind": "train", "phase": "paraphraser", "step": 1, "epoch": 1.0, "lr": 9.0, "loss": 99.0}]
    for step in range(1, EPOCHS * STEPS + 1):
        epoch = (step - 1) // STEPS + 1
        values = {name: value + float(rng.normal(0, noise)) for name, value in shape(epoch).items()}
        lr = 0.1 if epoch <= DECAY or not decay else 0.01
        line = {"kind": "train", "phase": "train", "step": step, "epoch": step / STEPS, "lr": lr, **values}
        lines.append({"loss": line.get("l1", 0.0), **line})
        if step % STEPS == 0:
            lines.append({"kind": "eval", "phase": "train", "step": step, "epoch": epoch, "top1": 1.0, "top5": 2.0})
    return lines


def make_run(
    root: Path,
    seeds: Sequence[int] = (0, 1, 2),
    top1: Mapping[str, float] | None = None,
    hybrid: Shape | None = None,
    spread: float = 0.1,
    decay: bool = True,
    **extra: Any,
) -> list[Json]:
    """A whole table, done; seeds are `spread` apart."""
    values = {**TOP1, **(top1 or {})}
    rows = [make_row(NAME, row_id, seeds) for row_id in ROWS]
    for row in rows:
        for cell in row["cells"]:
            metrics = {"top1": values[row["id"]] + spread * cell["seed"], "top5": values[row["id"]] + 10}
            shape = (hybrid or hybrid_shape()) if row["id"] == "hybrid_forward" else plain_shape
            write_cell(root, cell["id"], metrics, curve_of(shape, cell["seed"], decay), **extra)
    return rows


def verdicts(root: Path, rows: Sequence[Json]) -> dict[str, tuple[str, str]]:
    """Claim -> verdict and evidence."""
    table = collect(NAME, rows, root, "mini", "scenes")
    return {claim["id"]: (claim["verdict"], claim["evidence"]) for claim in table["claims"]}


# Records


def test_thirty_tables_with_unique_names() -> None:
    names = [record.name for record in all_tables()]
    assert len(names) == len(set(names)) == 30
    listed = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \|", (papers.FOLDER / "README.md").read_text(), re.MULTILINE)
    assert [(r.name, r.paper, r.table["id"]) for r in all_tables()] == [
        entry for entry in listed if entry[0] != "table"
    ]


@pytest.mark.parametrize("record", all_tables(), ids=lambda record: record.name)
def test_record_schema(record: Any) -> None:
    names = {metric["name"] for metric in record.metrics}
    for metric in record.metrics:
        assert metric["better"] in ("higher", "lower")
        assert isinstance(metric["decimals"], int)
    assert record.rows
    assert len({row["id"] for row in record.rows}) == len(record.rows)
    for row in record.rows:
        assert re.fullmatch(r"\w+", row["id"])
        assert row["role"] in ("teacher", "baseline", "method", "unknown")
        assert row["teacher"] or row["student"]
        assert set(row["values"]) <= names
        assert row["values"]
        for value in row["values"].values():
            values = value if isinstance(value, list) else [value]
            assert len(values) in (1, 2)
            assert all(isinstance(each, int | float) for each in values)
    for protocol in record.protocols:
        assert protocol["reported"] in ("last", "best", "median") or "reported" in protocol["unstated"]
    assert all(isinstance(note, str) for note in record.table["notes"])


def test_which_epoch_a_paper_reports_is_checked() -> None:
    record = find_table("imagenet_compression")
    assert record.reported == "best"
    document = {**record.document, "protocols": {"imagenet_mobilenetv1": {"reported": "medain"}}}
    with pytest.raises(UserError, match="reported: medain: expected null or one of .*did you mean 'median'"):
        _ = TableRecord(document, record.table).reported


def test_the_best_epoch_stands_beside_the_last(tmp_path: Path) -> None:
    for seed, best in enumerate((63.0, 61.0)):
        write_cell(tmp_path, f"kd-s{seed}", {"top1": 60.0, "top5": 80.0}, best={"top1": best, "top5": 80.0})
    write_cell(tmp_path, "at-s0", {"top1": 61.0, "top5": 80.0})  # an older result, without it
    rows = [make_row("imagenet_compression", "kd", (0, 1)), make_row("imagenet_compression", "at")]
    folder = write_table("imagenet_compression", rows, tmp_path, "mini", "scenes")
    first, second = json.loads((folder / "table.json").read_text())["rows"]
    assert first["mean"]["top1"] == 60 and first["best"] == {"top1": 62, "top5": 80}
    assert second["best"] == {"top1": None, "top5": None}
    for file in ("table.md", "index.html"):
        text = (folder / file).read_text()
        assert text.count("(62.00)") == 1 and "in brackets the best epoch's" in text.replace("&#39;", "'")
        assert "(80.00)" not in text and "The paper reports the best of its epochs." in text


@pytest.mark.parametrize("name", ["cifar100_stagewise", "stage_count"])
def test_what_to_expect_of_a_table_stands_on_its_page(name: str, tmp_path: Path) -> None:
    folder = write_table(name, [make_row(name, "student")], tmp_path, "mini", "scenes")
    for file in ("table.md", "index.html"):
        assert "With the 3x3 stem expect" in (folder / file).read_text()


@pytest.mark.parametrize("key", papers.known())
def test_claims_and_figures_are_whole(key: str) -> None:
    """An unquoted comma in a flow mapping would cut a sentence and make a key of its rest."""
    paper = load_paper(key)
    assert paper["paper"]["key"] == key
    for claim in paper["claims"]:
        assert set(claim) <= {"id", "claim", "where", "holds_in_paper", "check", "numbers"}
    for figure in paper["figures"]:
        assert set(figure) <= {"id", "name", "kind", "plots", "numbers", "supports", "notes"}
        assert set(figure["supports"]) <= {claim["id"] for claim in paper["claims"]}


def judges_of(paper: str) -> Mapping[str, Any]:
    part = papers.part(paper, "claims")
    return part.JUDGES if part else {}


def test_every_claim_belongs_to_a_table_and_gets_a_verdict(tmp_path: Path) -> None:
    judged = set()
    for record in all_tables():
        for claim in collect(record.name, [], tmp_path, "mini", "scenes")["claims"]:
            assert claim["verdict"] == "unknown"
            assert claim["evidence"].endswith(".")
            assert claim["evidence"] == "No judge yet." or claim["id"] in judges_of(record.paper)
            judged.add((record.paper, claim["id"]))
    assert judged == {(key, claim["id"]) for key in papers.known() for claim in load_paper(key)["claims"]}
    ready = {"hybrid_forward": 14, "stage_by_stage": 12, "kcd": 14}
    for paper, count in ready.items():
        assert set(judges_of(paper)) == {f"c{number}" for number in range(1, count + 1)}


MINE = """
paper: {key: mine, order: 1, title: Mine, authors: [Me], venue: null}
protocols:
  small: {applies_to: [table1], dataset: CIFAR-100, schedule: {unit: epochs, total: 1}, lr: 0.1, batch_size: 64}
tables:
  - id: table1
    name: my_table
    caption: A table of mine
    dataset: CIFAR-100
    task: classification
    metrics: [{name: top1, unit: percent, better: higher, decimals: 2}]
    protocol: small
    rows: [{id: alone, row: Alone, role: baseline, method: none, teacher: null, student: resnet8, values: {top1: 60.0}}]
    notes: []
figures: []
claims:
  - {id: c1, claim: It is above half, where: [table1], holds_in_paper: true, check: top-1 above 50}
  - {id: c2, claim: It is fast, where: [table1], holds_in_paper: true, check: null}
"""
MY_CLAIMS = """
from tables.judging import FAILS, HOLDS, Judges, rows_of

JUDGES = Judges()


@JUDGES.of("c1")
def above_half(context):
    (row,) = rows_of(context, "alone")
    return HOLDS if row["mean"]["top1"] > 50 else FAILS, "by its top-1."
"""


def test_a_paper_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "record.yaml").write_text(MINE)
    (tmp_path / "mine" / "claims.py").write_text(MY_CLAIMS)
    monkeypatch.setattr(papers, "FOLDER", tmp_path)
    monkeypatch.setattr(papers, "__path__", [str(tmp_path)])
    papers.known.cache_clear()
    try:
        write_cell(tmp_path, "alone-s0", {"top1": 70.0})
        folder = write_table("my_table", [make_row("my_table", "alone")], tmp_path, "mini", "scenes")
        assert [record.name for record in all_tables.__wrapped__()] == ["my_table"]
    finally:
        papers.known.cache_clear()
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"][0]["paper"] == {"top1": 60.0}
    found = {claim["id"]: (claim["verdict"], claim["evidence"]) for claim in table["claims"]}
    assert found == {"c1": ("holds", "By its top-1."), "c2": ("unknown", "No judge yet.")}


def test_unknown_table_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'imagenet_compression'"):
        find_table("imagenet_compresion")


# Numbers


def test_table_json_has_the_contract(tmp_path: Path) -> None:
    rows = make_run(tmp_path, labels={"top5": "top-2 of 12 classes"})
    folder = write_table(NAME, rows, tmp_path, "mini", "scenes")
    assert folder == tmp_path / "tables" / NAME / "mini"
    table = json.loads((folder / "table.json").read_text())
    assert {"table", "paper", "scale", "comparable", "metrics", "rows", "claims"} <= table.keys()
    assert (table["table"], table["paper"], table["scale"], table["comparable"]) == (
        NAME,
        "hybrid_forward",
        "mini",
        False,
    )
    assert [metric["name"] for metric in table["metrics"]] == ["top1", "top5"]
    assert [metric["label"] for metric in table["metrics"]] == ["top-1 accuracy", "top-2 of 12 classes"]
    assert all({"name", "unit", "better", "decimals"} <= metric.keys() for metric in table["metrics"])
    kept = {"id", "label", "role", "method", "teacher", "student", "ours", "paper", "mean", "std", "cells"}
    assert all(kept <= row.keys() for row in table["rows"])
    assert table["rows"][6]["paper"] == {"top1": 71.39, "top5": 90.47}
    assert [row["ours"] for row in table["rows"]] == [False] * 6 + [True]
    for cell in table["rows"][1]["cells"]:
        assert {"id", "seed", "status", "metrics"} <= cell.keys()
    assert [claim["id"] for claim in table["claims"]] == ["c1", "c2", "c3", "c4", "c5", "c6"]
    assert all({"id", "claim", "verdict", "evidence"} <= claim.keys() for claim in table["claims"])


def test_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    values = np.array([[61.25, 80.5], [63.5, 82.0], [59.0, 83.25]])
    for seed, (top1, top5) in enumerate(values):
        write_cell(tmp_path, f"kd-s{seed}", {"top1": top1, "top5": top5})
    row = collect(NAME, [make_row(NAME, "kd", (0, 1, 2))], tmp_path, "mini")["rows"][0]
    np.testing.assert_allclose(list(row["mean"].values()), values.mean(axis=0))
    np.testing.assert_allclose(list(row["std"].values()), values.std(axis=0, ddof=1))
    assert [cell["metrics"]["top1"] for cell in row["cells"]] == [61.25, 63.5, 59.0]
    one = collect(NAME, [make_row(NAME, "kd")], tmp_path, "mini")["rows"][0]
    assert one["mean"] == {"top1": 61.25, "top5": 80.5}
    assert one["std"] is None


def test_states_of_cells(tmp_path: Path) -> None:
    status = {"error": None, "host": "elsewhere", "pid": 1, "started": 0.0, "finished": None, "seconds": 0.0}
    for seed, state in enumerate(("failed", "interrupted")):
        folder = write_cell(tmp_path, f"kd-s{seed}", None)
        write_status(folder, {**status, "status": state, "error": "the loss is NaN"})
    running = write_cell(tmp_path, "kd-s2", None)
    write_status(running, {**status, "status": "running"})
    write_cell(tmp_path, "kd-s4", {"top1": float("nan"), "top5": 5.0})
    half = write_cell(tmp_path, "kd-s5", None)
    (half / "result.json").write_text('{"id": "kd-')
    row = collect(NAME, [make_row(NAME, "kd", range(6))], tmp_path, "mini")["rows"][0]
    assert [cell["status"] for cell in row["cells"]] == ["failed", "failed", "missing", "missing", "done", "missing"]
    assert row["cells"][0]["error"] == "the loss is NaN"
    assert row["mean"] == {"top1": None, "top5": 5.0}
    json.dumps(row, allow_nan=False)


def test_row_that_only_cites(tmp_path: Path) -> None:
    folder = write_table(NAME, [make_row(NAME, "kd", ())], tmp_path, "paper", "imagenet")
    row = json.loads((folder / "table.json").read_text())["rows"][0]
    assert (row["cells"], row["mean"], row["std"]) == ([], None, None)
    line = next(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert (line["top1_mean"], line["top1_paper"]) == ("", "68.58")
    assert "only the paper's number is cited" in (folder / "table.md").read_text()


def test_axes_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = []
    for number, value in enumerate(("dynamic", "0.1")):
        rows.append(make_row(NAME, "hybrid_forward", axes={"method.balance": value}))
        write_cell(tmp_path, rows[-1]["cells"][0]["id"], {"top1": 70.0 + number, "top5": 90.0})
    folder = write_table(NAME, rows, tmp_path, "mini", "scenes")
    lines = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [(line["method.balance"], line["top1_mean"]) for line in lines] == [("dynamic", "70.0"), ("0.1", "71.0")]
    text = (folder / "table.md").read_text()
    assert "**71.00**" in text
    assert "**70.00**" not in text


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ({}, ": all settings are the table's own at scale=paper."),
        ({"schedule.lr": [0.3, 0.1]}, ": scale=fast, schedule.lr=0.3 instead of 0.1."),
        ({f"method.key{i}": [i, None] for i in range(6)}, "method.key3=3 instead of null, and 2 more settings"),
    ],
)
def test_every_rendering_says_what_differs(tmp_path: Path, differs: Json, words: str) -> None:
    first, second = make_run(tmp_path, (0,))[:2]
    rows = [{**first, "differs": differs}, {**second, "differs": {}}]
    folder = write_table(NAME, rows, tmp_path, "fast", "imagenet")
    table = json.loads((folder / "table.json").read_text())
    assert table["comparable"] is (not differs)
    sentence = f"These numbers are {'not ' if differs else ''}comparable with the paper"
    assert sentence in table["banner"] and words in table["banner"]
    for file in ("table.md", "table.tex", "index.html", "table.json"):
        text = (folder / file).read_text().replace(r"\_", "_")
        assert sentence in text, file
        assert all(key in text and f"in {first['id']}" in text or file == "table.json" for key in differs), file
    lines = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [line["differs"] for line in lines] == [" ".join(differs), ""]
    assert {line["comparable"] for line in lines} == {str(not differs)}


def test_a_banner_begins_with_what_most_rows_differ_in() -> None:
    rows = [{"key": f"a{number}", "ours": "1", "paper": "2", "rows": ["teacher"]} for number in range(4)]
    told = banner(
        find_table(NAME), [*rows, {"key": "b", "ours": "1", "paper": "2", "rows": ["kd", "at"]}], True, "mini"
    )
    assert "scale=mini, b=1 instead of 2, a0=1 instead of 2" in told and "a3" not in told


@pytest.mark.parametrize(
    ("differs", "settings", "title"),
    [
        ({}, {}, "Compression of ResNet-50 into MobileNet-v1 on ImageNet (model gap only)"),
        ({"schedule.lr": [1, 0.1]}, {"schedule.lr": ["1"]}, "on ImageNet (model gap only) (schedule.lr=1)"),
        ({"dataset.name": ["scenes", "imagenet"]}, {}, "Table 1 with resnet50 → mobilenet_v1 on scenes"),
        (
            {"student.network.name": ["resnet18", "mobilenet_v1"]},
            {"student": ["resnet18"], "method.balance": ["dynamic", "1"]},
            "on scenes (student=resnet18, method.balance=dynamic,1)",
        ),
    ],
)
def test_a_title_names_what_was_used(tmp_path: Path, differs: Json, settings: Json, title: str) -> None:
    row = make_row(NAME, "kd", differs=differs)
    folder = write_table(NAME, [row], tmp_path, "mini", "scenes", settings=settings)
    assert re.fullmatch("mini" if not settings else "mini-[0-9a-f]{8}", folder.name)
    (heading,) = re.findall("<h1>(.*)</h1>", (folder / "index.html").read_text())
    assert heading.replace("‑", "-").endswith(title) and ("ImageNet" in heading) == ("ImageNet" in title)
    markdown = (folder / "table.md").read_text().splitlines()
    assert markdown[0] == f"# {NAME}" + (f" ({title.rpartition(' (')[2]}" if settings else "")
    assert json.loads((folder / "table.json").read_text())["settings"] == settings


def test_without_results_nothing_is_comparable(tmp_path: Path) -> None:
    banner = collect(NAME, [make_row(NAME, "kd")], tmp_path, "paper")["banner"]
    assert "not comparable" in banner and "no results yet" in banner


def test_images_of_a_normalisation_count_only_where_the_paper_states_its_gpus(tmp_path: Path) -> None:
    row = make_row(NAME, "baseline", differs={"schedule.device_batch": [32, None]})
    write_cell(tmp_path, row["cells"][0]["id"], {"top1": 1.0, "top5": 2.0})
    table = json.loads((write_table(NAME, [row], tmp_path, "paper", "imagenet") / "table.json").read_text())
    assert table["comparable"] and table["differs"] == [] and table["device_batch"] == ["32"]
    assert "of 32 images (device_batch)" in (tmp_path / "tables" / NAME / "paper" / "table.md").read_text()


def test_a_recipe_that_no_paper_prints_is_said_to_be_ours(tmp_path: Path) -> None:
    for name, words in (
        ("stage_count", "does not print its optimizer, learning rate, length of training"),
        (NAME, None),
    ):
        row = make_row(name, find_table(name).rows[0]["id"])
        write_cell(tmp_path, row["cells"][0]["id"], {"top1": 1.0})
        banner = collect(name, [row], tmp_path, "paper")["banner"]
        assert words is None or words in banner


def test_rows_that_are_not_printed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row kdd: table imagenet_compression prints no such row .*'kd'"):
        collect(NAME, [make_row(NAME, "kd", printed="kdd")], tmp_path, "mini")
    row = make_row(NAME, "kd")
    del row["printed"]
    with pytest.raises(UserError, match="run the table again"):
        collect(NAME, [row], tmp_path, "mini")


# Claims


def test_all_claims_hold(tmp_path: Path) -> None:
    found = verdicts(tmp_path, make_run(tmp_path))
    assert {verdict for verdict, _ in found.values()} == {"holds"}, found
    assert "5 of 5 comparisons hold; the closest: HYBRID_FORWARD - KD +3.00 ± " in found["c1"][1]
    assert "4 of 4 epochs" in found["c2"][1]
    assert "epoch 2" in found["c3"][1]
    assert "Over the 2 epochs" in found["c4"][1]
    assert re.search(r"L1 0\.9\d\d, L2 0\.[23]\d\d, L3 0\.[56]\d\d", found["c5"][1])
    assert "L1 46, L2 32, L3 28" in found["c6"][1]


@pytest.mark.parametrize(
    ("claim", "changes", "verdict"),
    [
        ("c2", {"l3": lambda epoch: 0.1, "l1": lambda epoch: 0.1, "l2": lambda epoch: 0.1}, "fails"),
        ("c3", {"accuracy": lambda epoch: 37.0 + 5 * epoch}, "fails"),  # stays behind
        ("c3", {"accuracy": lambda epoch: 43.0 + 5 * epoch}, "fails"),  # is ahead from the start
        ("c3", {"accuracy": lambda epoch: 37.0 + 5 * epoch if epoch < 3 else 40.0 + 5 * epoch}, "unknown"),
        ("c4", {"l1": lambda epoch: 2.5 / epoch}, "fails"),
        ("c4", {"accuracy2": lambda epoch: 30.0}, "fails"),
        ("c4", {"l1": lambda epoch: 2.0 / epoch}, "unknown"),
        ("c5", {"l1": lambda epoch: 0.2}, "fails"),
        ("c5", {"l1": lambda epoch: 0.6}, "unknown"),
        ("c6", {"l1": lambda epoch: 0.1, "l2": lambda epoch: 0.3, "l3": lambda epoch: 0.6}, "fails"),
        ("c6", {"l1": lambda epoch: 0.6, "l2": lambda epoch: 0.6, "l3": lambda epoch: 0.6}, "unknown"),
    ],
)
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_verdicts_on_curves(
    tmp_path: Path, claim: str, changes: Mapping[str, Callable[[int], float]], verdict: str, seeds: tuple[int, ...]
) -> None:
    rows = make_run(tmp_path, seeds, hybrid=hybrid_shape(**changes))
    if verdict == "unknown":
        # Means that differ by less than their noise: mirror the noise around zero.
        for row, shape in ((rows[1], plain_shape), (rows[6], hybrid_shape(**changes))):
            for cell in row["cells"]:
                write_cell(tmp_path, cell["id"], None, curve_of(shape, cell["seed"], noise=0.0))
    found, evidence = verdicts(tmp_path, rows)[claim]
    assert found == verdict, evidence


def test_missing_cells_leave_claims_unknown_and_are_named(tmp_path: Path) -> None:
    rows = make_run(tmp_path)
    (tmp_path / "cells" / "at-s1" / "result.json").unlink()
    found = verdicts(tmp_path, rows)
    assert found["c1"] == ("unknown", "Needs AT (seed 1 missing).")
    assert found["c2"][0] == "holds"
    found = verdicts(tmp_path, [row for row in rows if row["id"] not in ("ft", "baseline")])
    assert found["c1"][0] == found["c2"][0] == found["c3"][0] == "unknown"
    assert found["c1"][1] == f"Needs the rows baseline and ft: +table={NAME} rows=baseline,ft."
    assert "baseline" in found["c2"][1]
    assert found["c5"][0] == "holds"
    (tmp_path / "cells" / "hybrid_forward-s0" / "result.json").unlink()
    found = verdicts(tmp_path, rows)
    assert all(
        verdict == "unknown" and "HYBRID_FORWARD (seed 0 missing)" in evidence for verdict, evidence in found.values()
    )


def test_no_decay_in_the_run(tmp_path: Path) -> None:
    found = verdicts(tmp_path, make_run(tmp_path, decay=False))
    assert found["c3"][0] == found["c4"][0] == "unknown"
    assert "never drops" in found["c3"][1]
    assert found["c2"][0] == "holds"


def test_depths_come_from_the_result_or_the_papers_networks(tmp_path: Path) -> None:
    shape = hybrid_shape(l1=lambda epoch: 0.1, l2=lambda epoch: 0.3, l3=lambda epoch: 0.6)
    rows = make_run(tmp_path, hybrid=shape)
    assert verdicts(tmp_path, rows)["c6"][0] == "fails"
    rows[6]["teacher"] = "resnet56"
    assert verdicts(tmp_path, rows)["c6"] == ("unknown", "Needs the path depths of resnet56 and mobilenet_v1.")
    make_run(tmp_path, hybrid=shape, path_depths=[20, 30, 40])
    assert verdicts(tmp_path, rows)["c6"][0] == "holds"


def test_verdict_that_depends_on_an_axis_is_unknown(tmp_path: Path) -> None:
    rows = make_run(tmp_path, test_size=1000)
    low = make_row(NAME, "hybrid_forward", (0, 1, 2), {"method.balance": "0.1"})
    for cell in low["cells"]:
        scores = {"top1": 60.0 + 0.1 * cell["seed"], "top5": 80.0}
        write_cell(tmp_path, cell["id"], scores, curve_of(hybrid_shape(), cell["seed"]))
    found = verdicts(tmp_path, [*rows, low])
    assert found["c1"][0] == "unknown"
    assert "HYBRID_FORWARD[method.balance=0.1]: points of top-1 accuracy: 0 of 5 comparisons hold" in found["c1"][1]
    assert found["c5"][0] == "holds"


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        ([0.02, 0.06, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001], 5),  # after a warm-up
        ([0.1, 0.1, 0.1], None),
        (list(0.05 * (1 + np.cos(np.pi * np.arange(1, 50) / 50))), None),
    ],
)
def test_first_decay(lr: list[float], expected: int | None) -> None:
    steps = np.arange(1, len(lr) + 1)
    assert first_decay(Curve(steps, steps / 10, np.array(lr), {})) == expected


def test_long_records_are_kept_as_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = records_file(write_cell(tmp_path, "kd-s0", None, curve_of(plain_shape)))
    kept = path.with_name("metrics.jsonl.npz")
    plain = read_curve(path)
    assert plain is not None
    assert not kept.exists()
    assert len(plain.step) == EPOCHS * STEPS
    monkeypatch.setattr("tables.curves.LONG_RECORD", 0)

    def again() -> Curve:
        _read_curve.cache_clear()
        found = read_curve(path)
        assert found is not None
        return found

    for _ in range(2):
        np.testing.assert_array_equal(again().values["loss"], plain.values["loss"])
        assert kept.exists()
    path.write_text(path.read_text().split("\n", 3)[1] + "\n")  # a shorter record makes the kept one stale
    assert len(again().step) == 1
    kept.write_bytes(b"damaged")
    assert len(again().step) == 1


def test_downsampling_keeps_means() -> None:
    x, y = downsample(np.arange(12000.0), np.sin(np.arange(12000.0)), 500)
    assert len(x) == len(y) == 500
    np.testing.assert_allclose(y[3], np.sin(np.arange(72, 96)).mean())


# Renderings


def test_a_table_without_results_prints_no_number_as_ours(tmp_path: Path) -> None:
    folder = write_table(NAME, [make_row(NAME, row_id, (0, 1)) for row_id in ROWS], tmp_path, "mini", "scenes")
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [cells[0][2].split(": ")[1], cells[0][3], cells[0][4].split(": ")[1]] == ["ours", "paper", "ours"]
    assert [(line[2], line[4]) for line in cells[2:]] == [("X", "X")] * 7
    assert [line[3].strip("*") for line in cells[2:]] == ["76.16", "68.87", "68.58", "69.56", "69.88", "68.89", "71.39"]
    for line in csv.DictReader((folder / "table.csv").read_text().splitlines()):
        assert (line["top1_mean"], line["top5_mean"], line["top1_std"]) == ("X", "X", "")
    body = [line.split(" & ") for line in (folder / "table.tex").read_text().splitlines() if line.count(" & ") == 5]
    assert [line[2] for line in body[1:]] == ["X"] * 7
    page = Page((folder / "index.html").read_text())
    assert [row[2] for row in page.rows] == ["X"] * 7
    assert not list((folder / "curves").iterdir())


def test_csv_and_markdown_agree_with_the_results(tmp_path: Path) -> None:
    rows = make_run(tmp_path)
    (tmp_path / "cells" / "ab-s2" / "result.json").unlink()
    folder = write_table(NAME, rows, tmp_path, "mini", "scenes")
    lines = {line["id"]: line for line in csv.DictReader(io.StringIO((folder / "table.csv").read_text()))}
    assert list(lines) == list(ROWS)
    for row_id, line in lines.items():
        seeds = np.arange(2 if row_id == "ab" else 3)
        values = TOP1[row_id] + 0.1 * seeds
        assert float(line["top1_mean"]) == pytest.approx(values.mean())
        assert float(line["top1_std"]) == pytest.approx(values.std(ddof=1))
        assert (line["seeds"], line["done"]) == ("3", str(len(seeds)))
    text = (folder / "table.md").read_text()
    assert "**75.10 ± 0.10**" in text
    assert "70.30 ± 0.07 (2 of 3 seeds)" in text
    assert "**86.10" not in text  # the teacher is not the best student
    assert "- **unknown** c1" in text


class Page(HTMLParser):
    """A page's links, table rows, pictures and unbalanced tags."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.pictures = 0
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.pictures += tag in ("svg", "img")
        if tag != "use":
            self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag == "tr" and "tbody" in self.open:
            self.rows.append([])
        elif tag == "td" or (tag == "th" and "tbody" in self.open):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "image"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "tbody" in self.open and {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data.strip() and " ".join(data.split())


def test_page_is_whole_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_run(tmp_path / "out")
    rows[2]["label"] = "<script>alert('&')</script>"
    monkeypatch.chdir(tmp_path)  # relative output roots are the rule
    folder = write_table(NAME, rows, "out", "mini", "scenes", "python -m experiments.run '<x>'")
    text = (folder / "index.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert page.rows[2][0] == "<script>alert('&')</script>resnet50 → mobilenet_v1"
    assert page.rows[6][2:6] == ["75.10± 0.10", "71.39", "85.00± 0.00", "90.47"]
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)
    cells = [link for link in page.links if "cells/" in link]
    assert len(cells) == 21
    for link in page.links:
        assert not re.match(r"[a-z]+:|//|/", link), link
        assert (folder / link).exists(), link
    assert page.pictures == 4 + 3 * 2  # the paper's, and of seven rows the teacher's and those of six students
    assert all("NaN" not in part and "nan," not in part for part in re.findall(r'd="([^"]*)"', text))
    names = {path.stem for path in (folder / "curves").glob("*.png")}
    assert {path.stem for path in (folder / "curves").glob("*.csv")} == names
    figures = {f"figure{n}_{kind}" for n in (5, 6) for kind in ("accuracy", "loss")}
    assert names == figures | {f"training_{kind}_{n}" for n in (1, 2) for kind in ("accuracy", "loss", "score")}
    assert all((folder / "curves" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n") for name in names)
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]


def test_curves_go_when_their_results_go(tmp_path: Path) -> None:
    rows = make_run(tmp_path)
    folder = write_table(NAME, rows, tmp_path, "mini", "scenes")
    assert len(list((folder / "curves").glob("figure*.png"))) == 4
    write_table(NAME, rows[:2], tmp_path, "mini", "scenes")
    assert not list((folder / "curves").glob("figure*"))


def test_what_users_write_is_shown_as_it_is(tmp_path: Path) -> None:
    """A label in every rendering: no markup of it takes effect, no spreadsheet computes it, no formula is drawn."""
    label = "=1+1 *b* _i_ a_b `c` <img src=x> [t](u) | $\\frac{$ \nnext"
    rows = make_run(tmp_path)
    rows[2]["label"] = label
    folder = write_table(NAME, rows, tmp_path, "mini", "scenes")
    text = (folder / "table.md").read_text()
    assert r"| =1+1 \*b\* \_i\_ a_b \`c\` \<img src=x> \[t\](u) \| $\\frac{$ next " in text
    assert len({line.count(" | ") for line in text.splitlines() if line.startswith("| ")}) == 1
    read = csv.reader(io.StringIO((folder / "table.csv").read_text()))
    assert f"'{label}" in [row[1] for row in read]
    for begins in "=+-@":
        assert not re.search(rf"(^|,)\"?{re.escape(begins)}[^\d]", (folder / "table.csv").read_text(), re.MULTILINE)
    assert r"=1+1 {*}b{*} \_i\_ a\_b `c` \textless{}img" in (folder / "table.tex").read_text()
    assert "<img src=x>" not in (folder / "index.html").read_text()


def test_latex_is_escaped_and_balanced(tmp_path: Path) -> None:
    assert escape_latex(r"a_b & 50% {x} M^2 \n ~ #1 $") == (
        r"a\_b \& 50\% \{x\} M\textasciicircum{}2 \textbackslash{}n \textasciitilde{} \#1 \$"
    )
    rows = make_run(tmp_path)
    rows[2]["label"] = "KD_{50%} & more"
    text = (write_table(NAME, rows, tmp_path, "mini", "scenes") / "table.tex").read_text()
    body = text[text.index(r"\begin{table}") :]
    assert not re.search(r"(?<!\\)[%#]|[^\x00-\x7f]", body)
    for line in body[body.index(r"\midrule") : body.index(r"\bottomrule")].splitlines()[1:-1]:
        assert len(re.findall(r"(?<!\\)&", line)) == 5
        plain = re.sub(r"\\[{}]", "", line)
        assert plain.count("{") == plain.count("}")
    assert r"\textbf{75.10 $\pm$ 0.10}" in body


def test_printed_spreads(tmp_path: Path) -> None:
    row = make_row(NAME, "kd", (), printed="student_wrn_40_2_wrn_16_2")
    text = (write_table("distpro_cifar100", [row], tmp_path, "paper", "cifar100") / "table.md").read_text()
    assert "73.26 ± 0.05" in text
    assert "variance of 5 runs" in text
    row = make_row(NAME, "kd", (), printed="ifvd")
    text = (write_table("cityscapes_distpro", [row], tmp_path, "paper", "cityscapes") / "table.md").read_text()
    assert "68.31 ± 0.00264" in text


def test_the_command_of_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/experiments/run.py", f"+table={NAME}", "seed=0,1", "a=b c"])
    folder = write_table(NAME, [make_row(NAME, "kd")], tmp_path, "mini", "scenes")
    command = f"python -m experiments.run +table={NAME} seed=0,1 'a=b c'"
    assert json.loads((folder / "rows.json").read_text())["command"] == command


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "tables").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="expected a folder to write to"):
        write_table(NAME, [make_row(NAME, "kd")], tmp_path, "mini", "scenes")


# Command line


def test_listing_names_all_tables_and_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_run(tmp_path)
    (tmp_path / "cells" / "kd-s0" / "result.json").unlink()
    write_table(NAME, rows, tmp_path, "mini", "scenes")
    assert run(["--output-root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for record in all_tables():
        line = next(line for line in lines if line.split()[:1] == [record.name])
        runnable = (ROOT / "conf" / "table" / f"{record.name}.yaml").exists()
        assert ("not runnable yet" in line) is not runnable
    line = next(line for line in lines if line.startswith(NAME))
    assert "20/21 done" in line
    assert line.count("not run") == 2


def test_render_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_run(tmp_path, (0,))
    command = "python -m experiments.run +table=imagenet_compression"
    folder = write_table(NAME, rows, tmp_path, "mini", "scenes", command)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    stored = {"rows": rows, "scale": "mini", "dataset": "scenes", "command": command, "settings": {}}
    assert read_sealed(folder / "rows.json") == stored
    other = write_table(NAME, rows, tmp_path, "mini", "scenes", command, {"schedule.lr": ["0.5"]})
    for each in (folder, other):
        (each / "index.html").unlink()
    assert run([NAME, "--scale", "mini", "--output-root", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert "schedule.lr=0.5" in (other / "index.html").read_text()
    assert "**75.00**" in capsys.readouterr().out
    (tmp_path / "cells" / "kd-s0" / "result.json").unlink()
    assert run([NAME, "--output-root", str(tmp_path)]) == 3
    for content in ("{", before["rows.json"].decode().replace('"kd-s0"', "5")):
        (folder / "rows.json").write_text(content)
        with pytest.raises(UserError, match="rows.json: expected it as it was written"):
            run([NAME, "--output-root", str(tmp_path)])


@pytest.mark.parametrize(
    ("files", "said"), [({"distpro_normalization": ROOT}, "not run at scale=mini"), ({}, "not runnable yet")]
)
def test_table_that_was_never_run(
    files: dict[str, Path],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tables.__main__.table_files", lambda: files)
    assert run(["distpro_normalization", "--output-root", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert said in out
    assert re.search(r"\| sigmoid\(alpha\) \(proposed\) +\| wrn_28_4 → wrn_16_4 \| +X \| +78\.80", out)
    assert not list(tmp_path.iterdir())


def python_m_tables(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tables", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["imagenet_compresion"], "did you mean 'imagenet_compression'?"),
        ([NAME, "--scale", "papper"], "did you mean 'paper'?"),
        ([NAME, "--output-root", "no/such/folder"], "--output-root=no/such/folder: expected a folder"),
        (["--colour"], "--colour"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], words: str) -> None:
    done = python_m_tables(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("kt: error: ") and words in done.stderr


def test_rendering_needs_no_torch(tmp_path: Path) -> None:
    rows = make_run(tmp_path, (0,))
    write_table(NAME, rows, tmp_path, "mini", "scenes")
    code = (
        "import sys; from tables.__main__ import run; "
        f"assert run([{NAME!r}, '--output-root', {str(tmp_path)!r}]) == 0; "
        "assert not {'torch', 'mmengine', 'hydra', 'pandas', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
