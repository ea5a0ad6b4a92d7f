"""Tables as a pure function of result files: contract, aggregation, verdicts and renderings."""

from __future__ import annotations

import csv
import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kt.errors import UserError
from tables.__main__ import main
from tables.claims import JUDGES
from tables.collect import collect
from tables.records import PAPERS, all_tables, find, load
from tables.render import write_table

TABLE = "imagenet_compression"
METHODS = ("none", "kd", "at", "ft", "ab", "hybrid_forward")


def table_rows(seeds: int = 1) -> list[dict[str, Any]]:
    rows = [
        {"id": "teacher", "method": "none", "role": "teacher", "teacher": "resnet50", "student": None, "paper_row": 0}
    ]
    for number, method in enumerate(METHODS, 1):
        role = "baseline" if method == "none" else "method"
        row = {"id": method, "method": method, "role": role, "teacher": "resnet50", "student": "mobilenet_v1"}
        rows.append({**row, "paper_row": number, "ours": method == "hybrid_forward"})
    for row in rows:
        row |= {"label": f"The {row['id']}", "axes": {}}
        row["cells"] = [{"id": f"{row['id']}{seed}", "seed": seed} for seed in range(seeds)]
    return rows


def finish(
    root: Path, cell: str, top1: float, curves: list[dict[str, float]] | None = None, size: int = 100_000
) -> None:
    folder = root / "cells" / cell
    folder.mkdir(parents=True, exist_ok=True)
    result = {"id": cell, "status": "done", "metrics": {"top1": top1, "top5": top1 + 10}, "test_size": size}
    (folder / "result.json").write_text(json.dumps({**result, "labels": {"top5": "top-2 of 10 classes"}}))
    lines = []
    for epoch, values in enumerate(curves or [], 1):
        for half in (0.5, 1.0):
            # Two steps an epoch, the mean of which is the curve.
            noisy = {key: value if key == "lr" else value + (half - 0.75) for key, value in values.items()}
            row = {"kind": "train", "phase": "train", "step": 0, "epoch": epoch - 1 + half, "images_per_second": 1.0}
            lines.append(json.dumps({**row, **noisy}))
        lines.append(
            json.dumps({"kind": "eval", "phase": "train", "step": 0, "epoch": epoch, "top1": 1.0, "top5": 2.0})
        )
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def curve(losses: list[float], hits: list[float], **more: list[float]) -> list[dict[str, float]]:
    rates = [0.1, 0.1, 0.01, 0.01]
    rows = [{"lr": lr, "loss": a, "accuracy": b} for lr, a, b in zip(rates, losses, hits, strict=True)]
    return [{**row, **{key: values[i] for key, values in more.items()}} for i, row in enumerate(rows)]


def whole_table(root: Path, **changes: list[float]) -> dict[str, Any]:
    """All rows done, with curves that agree with every claim unless `changes` say otherwise."""
    for number, row in enumerate(table_rows()):
        finish(root, row["cells"][0]["id"], 60.0 + 2 * number)
    finish(root, "none0", 62.0, curve([2.0, 1.5, 1.0, 0.9], [30, 40, 50, 55]))
    taught = {
        "losses": [6.0, 4.5, 3.0, 2.8],
        "hits": [25, 38, 55, 60],
        "l1": [1.8, 1.3, 0.8, 0.7],
        "l2": [1.9, 1.4, 1.2, 1.1],
        "l3": [2.1, 1.6, 1.0, 0.9],
        "accuracy1": [40, 50, 60, 65],
        "accuracy2": [35, 45, 55, 60],
    } | changes
    finish(root, "hybrid_forward0", 80.0, curve(**taught))
    return collect(TABLE, table_rows(), root, "mini", "scenes")


def verdicts(table: dict[str, Any]) -> dict[str, str]:
    return {claim["id"]: claim["verdict"] for claim in table["claims"]}


def test_claims_hold_on_curves_that_agree(tmp_path: Path) -> None:
    table = whole_table(tmp_path)
    found = verdicts(table)
    # Ranked by loss, path 1 (46 layers) < plain (28) < path 2 (32): not by depth.
    assert found == dict.fromkeys(("c1", "c2", "c3", "c4", "c5", "c6"), "holds")


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("c2", {"losses": [6.0, 1.4, 3.0, 2.8]}),
        ("c3", {"hits": [25, 38, 45, 50]}),
        ("c3", {"hits": [45, 48, 55, 60]}),
        ("c4", {"l2": [2.3, 1.7, 1.2, 1.1]}),
        ("c4", {"accuracy2": [20, 30, 55, 60]}),
        ("c5", {"l3": [2.1, 1.6, 1.0, 1.2]}),
        ("c6", {"l2": [1.9, 1.4, 1.0, 0.8]}),
    ],
)
def test_claims_fail_on_curves_that_contradict(claim: str, changes: Any, tmp_path: Path) -> None:
    assert verdicts(whole_table(tmp_path, **changes))[claim] == "fails"


def test_a_difference_within_the_spread_is_unknown(tmp_path: Path) -> None:
    whole_table(tmp_path)
    finish(tmp_path, "ab0", 79.9)
    claims = collect(TABLE, table_rows(), tmp_path, "mini", "scenes")["claims"]
    assert claims[0]["verdict"] == "unknown" and "within the spread" in claims[0]["evidence"]
    finish(tmp_path, "ab0", 81.0)
    assert collect(TABLE, table_rows(), tmp_path, "mini", "scenes")["claims"][0]["verdict"] == "fails"
    # Over seeds the spread is that of the seeds.
    rows = table_rows(seeds=2)
    for row in rows:
        for cell, value in zip(row["cells"], (70.0, 90.0), strict=True):
            finish(tmp_path, cell["id"], value + (row["id"] == "hybrid_forward"))
    assert verdicts(collect(TABLE, rows, tmp_path, "mini", "scenes"))["c1"] == "unknown"


def test_nothing_done_prints_no_number_as_ours(tmp_path: Path) -> None:
    folder = write_table(TABLE, table_rows(), tmp_path, "mini", "scenes")
    table = json.loads((folder / "table.json").read_text())
    assert all(row["mean"] is None and row["cells"][0]["status"] == "missing" for row in table["rows"])
    assert all(claim["verdict"] == "unknown" for claim in table["claims"])
    lines = list(csv.DictReader((folder / "table.csv").open()))
    assert {line["mean"] for line in lines} == {"X"} and lines[-2]["printed"] == "71.39"
    assert (folder / "table.md").read_text().count("| X |") == 14


def test_mean_and_deviation_over_seeds_and_failed_cells(tmp_path: Path) -> None:
    values = [61.0, 64.5, 62.3]
    rows = table_rows(seeds=4)
    for seed, value in enumerate(values):
        finish(tmp_path, f"kd{seed}", value)
    (tmp_path / "cells" / "kd3").mkdir()
    (tmp_path / "cells" / "kd3" / "status.json").write_text('{"status": "failed", "error": "boom"}')
    table = collect(TABLE, rows, tmp_path, "mini", "scenes")
    kd = next(row for row in table["rows"] if row["id"] == "kd")
    assert kd["mean"]["top1"] == pytest.approx(np.mean(values))
    assert kd["std"]["top1"] == pytest.approx(np.std(values, ddof=1))
    assert [cell["status"] for cell in kd["cells"]] == ["done", "done", "done", "failed"]
    folder = write_table(TABLE, rows, tmp_path, "mini", "scenes")
    assert "(1 X)" in (folder / "table.md").read_text()


def test_contract_of_table_json(tmp_path: Path) -> None:
    table = whole_table(tmp_path)
    assert {"table", "paper", "scale", "comparable", "metrics", "rows", "claims"} <= table.keys()
    assert [metric["name"] for metric in table["metrics"]] == ["top1", "top5"]
    assert table["metrics"][1]["label"] == "top-2 of 10 classes"
    for row in table["rows"]:
        wanted = {"id", "label", "role", "method", "teacher", "student", "ours", "paper", "mean", "std", "cells"}
        assert wanted <= row.keys()
    assert table["rows"][-1]["paper"] == {"top1": 71.39, "top5": 90.47} and table["rows"][-1]["ours"]


@pytest.mark.parametrize(
    ("scale", "dataset", "comparable"),
    [("paper", "imagenet", True), ("paper", "cifar100", False), ("fast", "imagenet", False), ("mini", "scenes", False)],
)
def test_only_the_papers_own_setting_is_comparable(scale: str, dataset: str, comparable: bool, tmp_path: Path) -> None:
    folder = write_table(TABLE, table_rows(), tmp_path, scale, dataset)
    assert json.loads((folder / "table.json").read_text())["comparable"] is comparable
    for name in ("table.md", "table.tex", "index.html"):
        assert ("NOT comparable" in (folder / name).read_text()) is not comparable


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    whole_table(tmp_path)
    folder = write_table(TABLE, table_rows(), tmp_path, "mini", "scenes")
    page = (folder / "index.html").read_text()
    links = _Links()
    links.feed(page)
    for link in links.found:
        assert link.startswith("#") or (folder / link).exists(), link
    assert page.count("<svg") == 2 and "Figure 5" in page and "Figure 6" in page
    assert page.count('class="verdict holds"') == 6


def test_command_lists_thirty_tables_and_renders_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output-root", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert all(printed.table["name"] in listed for printed in all_tables()) and len(all_tables()) == 30
    assert main([TABLE, "--output-root", str(tmp_path)]) == 2
    assert "not run yet" in capsys.readouterr().err
    whole_table(tmp_path)
    write_table(TABLE, table_rows(), tmp_path, "mini", "scenes")
    assert main([TABLE, "--output-root", str(tmp_path)]) == 0
    assert main(["imagenet_compresion", "--output-root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'imagenet_compression'" in error and error.count("\n") == 1


@pytest.mark.parametrize("paper", PAPERS)
def test_records_are_consistent(paper: str) -> None:
    record = load(paper)
    for table in record["tables"]:
        names = {metric["name"] for metric in table["metrics"]}
        assert all(set(row["values"]) <= names for row in table["rows"])
    known = {claim["id"] for claim in record["claims"]}
    assert {claim for key, claim in JUDGES if key == paper} <= known


def test_unknown_tables_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'kcd_metrics'"):
        find("kcd_metric")
