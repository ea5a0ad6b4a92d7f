"""What pages show: all results at a glance, a cell, a figure's data, and which numbers stand out."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch

from experiments.pages import Page, Pages
from kt.errors import UserError
from kt.evaluation.accuracy import evaluate_accuracy
from kt.evaluation.outcomes import Outcomes, keep_outcomes
from kt.files import write_sealed
from kt.store import folder_of, outcomes_file, write_status
from results import make_row, write_cell
from tables.cell_page import CONFUSED, confusions, write_cell_pages
from tables.collect import collect
from tables.figures import write_drawings
from tables.overview import write_overview
from tables.pages import CLASSES, PAGE, by_class
from tables.panels import CHARACTER, HEIGHT, LINE, TEXT, WIDTH, Level, Line, Panel, as_png, as_svg
from tables.plotting import Drawing
from tables.render import best_of, write_table
from tables.sweeps import write_sweep

NAME = "imagenet_compression"


def train_rows(loss: float = 2.0, steps: int = 4) -> list[dict[str, Any]]:
    common = {"kind": "train", "phase": "train", "lr": 0.1}
    rows = [{**common, "step": n, "epoch": n / 2, "loss": loss / n} for n in range(1, steps + 1)]
    return [*rows, *({"kind": "eval", "phase": "train", "step": n, "epoch": n, "top1": 10.0 * n} for n in (1, 2))]


# All results


def test_the_overview_says_how_everything_stands(tmp_path: Path) -> None:
    rows = [make_row(NAME, row_id) for row_id in ("baseline", "kd", "at", "ab")]
    rows.append(make_row(NAME, "ft", optional=True))  # not begun: not shown, not counted
    write_cell(tmp_path, "baseline-s0", {"top1": 60.0, "top5": 80.0})
    write_cell(tmp_path, "kd-s0", {"top1": 62.0, "top5": 82.0})
    for cell_id, status in (("at-s0", "failed"), ("ab-s0", "interrupted")):
        folder_of(tmp_path, cell_id).mkdir()
        write_status(folder_of(tmp_path, cell_id), {"status": status, "error": "why", "host": "here"})
    write_table(NAME, rows, tmp_path, "mini", "scenes")
    write_table(NAME, rows[:1], tmp_path, "paper", "imagenet", settings={"schedule.lr": ["0.5"]})
    point = {**make_row(NAME, "kd"), "printed": None, "axes": {"seed": "0"}, "cells": [{"id": "none", "seed": 0}]}
    write_sweep("sweep-1", [], [point], tmp_path)

    text = write_overview(tmp_path).read_text()
    cards = [
        re.sub(r"<title>.*?</title>|<[^>]+>", " ", card)
        for card in re.findall("<article.*?</article>", text, re.DOTALL)
    ]
    said = [" ".join(card.split()) for card in cards]
    assert len(said) == 3
    assert "scale mini" in said[0] and "2 of 4 done, 2 failed" in said[0] and "unknown" in said[0]
    assert "scale paper (schedule.lr=0.5)" in said[1] and "1 of 1 done" in said[1]
    assert said[2].startswith("sweep-1") and "1 missing" in said[2]
    assert "2 of 5 done, 2 failed, 1 missing" in " ".join(re.sub("<[^>]+>", " ", text).split())  # one is in two tables
    links = re.findall(r'<a href="([^"]+)"', text)
    assert len(links) == 3 and all((tmp_path / link).exists() for link in links)
    assert "cityscapes_teachers" in text and 'http-equiv="refresh"' not in text
    assert 'http-equiv="refresh"' in write_overview(tmp_path, running=[]).read_text()


def test_the_overview_survives_what_it_cannot_read(tmp_path: Path) -> None:
    foreign = '{"rows": [{"cells": 5}], "scale": "mini"}'
    for name, content in (("no_such_table", "{}"), (NAME, "{"), ("kcd_metrics", foreign), ("cityscapes_teachers", "")):
        (tmp_path / "tables" / name / "mini").mkdir(parents=True)
        (tmp_path / "tables" / name / "mini" / "rows.json").write_text(content)
        (tmp_path / "tables" / name / "mini" / "table.json").write_text('{"claims": 5, "metrics": 5}')
    write_sealed(tmp_path / "tables" / name / "mini" / "rows.json", {"rows": [], "scale": "mini"})
    text = write_overview(tmp_path).read_text()
    assert text.count("<article") == 1 and "no cells" in text


def test_a_run_keeps_its_pages_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, clock, rendered = [make_row(NAME, "kd")], [100.0], []

    def render() -> Path:
        clock[0] += 2.0  # so long does it take
        rendered.append(clock[0])
        return write_table(NAME, rows, tmp_path, "mini", "scenes")

    monkeypatch.setattr("experiments.pages.time.monotonic", lambda: clock[0])
    pages = Pages({NAME: Page(render, {"kd-s0"})}, str(tmp_path))
    assert len(rendered) == 1 and "1 missing" in (tmp_path / PAGE).read_text()
    pages.update(started=["kd-s0"])
    assert "1 running" in (tmp_path / PAGE).read_text()
    write_cell(tmp_path, "kd-s0", {"top1": 62.0, "top5": 82.0}, train_rows())
    pages.update(ended=["kd-s0"])
    assert len(rendered) == 1 and "1 of 1" in (tmp_path / PAGE).read_text()  # too soon for the table
    assert (folder_of(tmp_path, "kd-s0") / PAGE).exists()
    clock[0] += 41.0
    pages.update()
    assert len(rendered) == 1
    pages.update(ended=["kd-s0"])
    assert len(rendered) == 2

    def broken() -> Path:
        raise UserError("no space")

    pages.tables, pages.due = {NAME: Page(broken, {"kd-s0"})}, 0.0
    pages.update(ended=["kd-s0"])


# Cells


def write_done(root: Path, cell_id: str, needs: Mapping[str, str]) -> Path:
    config = {"student": {"network": {"name": "resnet20"}}, "teacher": {"network": {"name": "resnet56"}}, "seed": 3}
    config |= {"method": {"name": "kd", "temperature": 4.0}, "output_root": "somewhere"}
    kept = {"top1": 50.0, "classes": {"top1": {"cat": 100.0, "<dog>": 0.0}}}
    keep = {"label": np.array([0, 1]), "found": np.array([0, 0])}
    folder = write_cell(root, cell_id, {"top1": 50.0}, train_rows(), {"test": kept}, config=config, needs=needs)
    keep_outcomes(outcomes_file(folder), keep)
    return folder


def test_a_cell_has_a_page(tmp_path: Path) -> None:
    teacher = write_done(tmp_path, "teacher", {})
    folder = write_done(tmp_path, "student", {"teacher": "teacher", "file": "0123456789abcdef"})
    write_cell_pages(tmp_path, ["student", "not-begun"])
    text = (folder / PAGE).read_text()
    assert "resnet56 → resnet20" in text and "method.temperature=4.0" in text and "somewhere" not in text
    assert 'href="../teacher/index.html"' in text and (teacher / PAGE).exists()
    assert [float(share) for share in re.findall(r'<td style="--share: ([\d.]+)%">', text)] == [100, 0, 100, 0]
    assert "&lt;dog&gt;" in text and "<dog>" not in text
    assert {"Top-1 accuracy", "loss"} <= {*re.findall("<figcaption>(.*?)</figcaption>", text)}
    for link in re.findall(r' href="([^"]+)"', text):
        assert (folder / link).exists() or link == "../../index.html", link
    assert not folder_of(tmp_path, "not-begun").exists()


def test_a_cells_page_is_written_when_the_cell_has_changed(tmp_path: Path) -> None:
    folder = write_done(tmp_path, "student", {})
    write_cell_pages(tmp_path, ["student"])
    (folder / PAGE).write_text("kept")
    write_cell_pages(tmp_path, ["student"])
    assert (folder / PAGE).read_text() == "kept"
    (folder / "result.json").unlink()
    error = "out of <memory>"
    write_status(folder, {"status": "failed", "error": error, "host": "here"})
    write_cell_pages(tmp_path, ["student"])
    assert "Failed: out of &lt;memory&gt;" in (folder / PAGE).read_text()


@pytest.mark.parametrize("many", [False, True])
def test_what_is_taken_for_what(many: bool) -> None:
    rng = np.random.default_rng(0)
    names = [f"class {n}" for n in range(CONFUSED + 1 if many else 4)]
    label, found = rng.integers(len(names) - 1, size=(2, 400))  # the last class has no images
    told = confusions(label, found, names)
    if many:
        for true, other, count in told["pairs"]:
            a, b = names.index(true), names.index(other)
            assert a != b and count == sum((label == a) & (found == b))
        counts = [count for *_, count in told["pairs"]]
        assert counts == sorted(counts, reverse=True)
        return
    for a, shares in enumerate(told["matrix"][:-1]):
        assert shares == pytest.approx([100 * np.mean(found[label == a] == b) for b in range(4)])
    assert told["matrix"][-1] is None


@pytest.mark.parametrize("rows", [1, 2])
def test_of_very_many_classes_the_telling_ones_are_shown(rows: int) -> None:
    scores = [{f"c{n}": float(n % 50) for n in range(CLASSES + 20)}, {f"c{n}": 7.0 for n in range(CLASSES + 20)}]
    own = [{"classes": {"top1": each}, "label": "kd", "student": "s", "teacher": None} for each in scores[:rows]]
    (found,) = by_class(own)
    shown = [line["name"] for line in found["lines"]]
    assert len(shown) == CLASSES and f"The {CLASSES} of {CLASSES + 20}" in found["told"]
    worth = {name: -abs(score - 7.0) if rows > 1 else score for name, score in scores[0].items()}
    assert sorted(worth[name] for name in shown) == sorted(worth.values())[:CLASSES]


class Batches:
    """A test set of one batch."""

    def __init__(self, labels: list[int]):
        self.labels = labels

    def epoch(self, number: int) -> list[dict[str, torch.Tensor]]:
        labels = torch.tensor(self.labels)
        return [{"inputs": torch.zeros(len(labels)), "labels": labels, "indices": torch.arange(len(labels)).flip(0)}]


class Answers(torch.nn.Module):
    """Finds what it is told to."""

    def __init__(self, found: list[int]):
        super().__init__()
        self.found = found

    def forward(self, inputs: torch.Tensor, mode: str) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.found), 4).float()


def test_a_classifier_leaves_what_it_found_and_the_accuracy_of_each_class() -> None:
    outcomes = Outcomes()
    labels, found = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2]
    evaluate_accuracy(Answers(found), Batches(labels), 4, outcomes, ("a", "b", "c", "d"))
    assert outcomes.images["label"].tolist() == labels[::-1] and outcomes.images["found"].tolist() == found[::-1]
    assert outcomes.classes == {"top1": {"a": 50.0, "b": 100.0, "c": pytest.approx(200 / 3), "d": None}}


# Figures


class Label(NamedTuple):
    """A text in a picture, at a place on its base line."""

    text: str
    x: float
    y: float
    anchor: str


def labels_of(svg: str) -> list[Label]:
    found = []
    for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        places = [each.get("x"), each.get("y")]
        if places[0] is None:  # moved there
            places = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", each.get("transform", ""))[0]
        anchor = re.search(r"text-anchor: (\w+)", each.get("style", ""))
        found.append(Label(each.text or "", float(places[0]), float(places[1]), anchor[1] if anchor else "start"))
    return found


def panel(**changes: Any) -> Panel:
    x = np.arange(1.0, 101.0)
    line = Line("a, b", x, 1 / x, x[::20], 1 / x[::20], 0.01 * x[::20])
    return Panel(**{"id": "one", "title": "Loss", "lines": [line], "levels": [Level("top", 0.5, None)], **changes})


def test_a_figure_has_its_data_beside_it(tmp_path: Path) -> None:
    (tmp_path / "curves").mkdir()
    figure = {"id": "figure1", "plots": "a loss"}
    drawn = panel()
    (shown,) = write_drawings([Drawing(figure, "caption", [drawn])], tmp_path)
    (first,) = shown["panels"]
    assert first["files"] == {"png": "curves/figure1_one.png", "csv": "curves/figure1_one.csv"}
    read = list(csv.reader((tmp_path / first["files"]["csv"]).read_text().splitlines()))
    assert read[0] == ["line", "kind", "epoch", "Loss", "spread"]
    line = drawn.lines[0]
    points = [row for row in read if row[1] == "points"]
    assert [float(row[3]) for row in points] == pytest.approx(line.y.tolist(), rel=1e-5)
    means = [[float(value) for value in row[2:]] for row in read if row[:2] == ["a, b", "means"]]
    assert means == [pytest.approx([x, 1 / x, 0.01 * x], rel=1e-5) for x in line.means_x]
    assert read[-1] == ["top", "level", "", "0.5", ""]
    picture = tmp_path / first["files"]["png"]
    before = picture.stat().st_mtime_ns
    write_drawings([Drawing(figure, "another caption", [panel()])], tmp_path)
    assert picture.stat().st_mtime_ns == before  # the same data: not drawn again
    write_drawings([Drawing(figure, "caption", [panel(title="Other")])], tmp_path)
    assert picture.stat().st_mtime_ns > before
    write_drawings([], tmp_path)
    assert not [*(tmp_path / "curves").iterdir()]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("low", [1e-9, 0.03, 12.0, 5e6])
@pytest.mark.parametrize("times", [1.0, 1.01, 3.0, 1e3, 1e7])
def test_axes_have_ticks_whatever_the_range(log: bool, low: float, times: float) -> None:
    y = np.array([low, low * times, np.nan])
    svg = as_svg(panel(lines=[Line("a", y, y, y, y)], levels=[], log_y=log))
    upright = [label for label in labels_of(svg) if label.anchor == "end"]
    assert 2 <= len(upright) <= 25 and len({label.text for label in upright}) == len(upright)
    assert all(a.y - b.y > LINE - 4 for a, b in zip(upright, upright[1:], strict=False))
    assert all(label.x - CHARACTER * len(label.text) > 0 for label in upright)
    assert "nan" not in svg


@pytest.mark.parametrize("values", [(), (0.0, -1.0), (np.inf, 1.0), (1e308, 1e-300), (np.nan, np.nan)])
@pytest.mark.parametrize("log", [False, True])
def test_what_no_axis_can_show_is_drawn_without(log: bool, values: tuple[float, ...]) -> None:
    y = np.array(values)
    x = np.arange(float(len(y)))
    lines = [Line("猫 <b>", x, y, x, y, abs(y[::-1]))]
    drawn = panel(lines=lines, levels=[], log_y=log, borders=[(0.0, "all"), (0.0, "")])
    assert "&lt;b&gt;" in as_svg(drawn) and as_png(drawn).startswith(b"\x89PNG")


def test_pictures_are_the_same_whatever_a_matplotlibrc_says() -> None:
    drawn = panel()
    expected = as_svg(drawn), as_png(drawn)
    own = {"text.usetex": True, "savefig.bbox": "tight", "axes.facecolor": "black"}
    with matplotlib.rc_context(own):
        assert (as_svg(drawn), as_png(drawn)) == expected
        assert {key: matplotlib.rcParams[key] for key in own} == own


def test_names_of_phases_stand_in_lines_of_their_own() -> None:
    borders = [
        (0.0, "a long name"),
        (0.1, "another long name"),
        (0.2, "a third one"),
        (9.9, "the last one"),
        (10.0, ""),
    ]
    names = {label.text: label for label in labels_of(as_svg(panel(borders=borders)))}
    assert len({names[name].y for _, name in borders[:3]}) == 3
    assert names["the last one"].x + 5 * len("the last one") < WIDTH
    assert all(names[name].y > TEXT for _, name in borders[:-1])


def test_labels_that_would_run_into_one_another_are_left_out() -> None:
    values = np.array([0.001, 0.1, 0.12, 1.0, 100000.0])
    svg = as_svg(panel(lines=[Line("a", values, values, values, values)], ticks=[*values], levels=[]))
    below = sorted(
        (label.x, label.text) for label in labels_of(svg) if label.anchor == "middle" and label.y < HEIGHT - LINE
    )
    assert [text for _, text in below] == ["0.001", "0.1", "1", "100000"]
    assert below[-1][0] + CHARACTER * len("100000") / 2 < WIDTH


def test_several_pictures_stand_in_one_page() -> None:
    """None of them names what another one names too, and each says what its lines are."""
    both = "".join(as_svg(panel(id=name, title=name, levels=[Level("<b>", 0.5, 0.1)])) for name in "ab")
    names = re.findall(r' id="([^"]*)"', both)
    assert len(set(names)) == len(names) and {*re.findall(r'"#([^"]+)"', both)} <= {*names}
    assert both.count("<title>a, b</title>") == 2 and both.count("<title>&lt;b&gt;</title>") == 2
    assert "<style" not in both and both.count("var(--line-2)") >= 2


# Numbers


@pytest.mark.parametrize(
    ("scores", "better", "best"),
    [
        ({"a": 1.04, "b": 2.0, "c": 1.96}, "higher", {"b", "c"}),  # as they are shown
        ({"a": 1.0, "b": 2.0}, "lower", {"a"}),
        ({"a": 0.0, "b": 0.04}, "higher", set()),
        ({"a": 0.0, "b": 1.0}, "lower", {"a"}),
        ({"a": 100.0, "b": 100.0}, "lower", set()),
        ({"a": 1.0}, "higher", set()),
    ],
)
def test_the_best_is_better_than_others_and_than_nothing(scores: dict[str, float], better: str, best: set[str]) -> None:
    assert best_of(scores, {"better": better, "decimals": 1}) == best


def test_the_papers_number_stands_where_its_setting_does(tmp_path: Path) -> None:
    def row(value: str, **differs: Any) -> dict[str, Any]:
        common = {"dataset.name": ["scenes", "imagenet"]}
        return make_row(NAME, "kd", axes={"method.temperature": value}, differs={**common, **differs})

    rows = [
        make_row(NAME, "at", differs={"schedule.lr": [1, 2]}),
        row("4"),
        row("2", **{"method.temperature": [2, 4]}),
        row("8", **{"method.temperature": [8, 4]}),
    ]
    found = collect(NAME, rows, tmp_path, "mini")["rows"]
    assert [each["paper"]["top1"] is not None for each in found] == [True, True, False, False]
    neither = collect(NAME, rows[2:], tmp_path, "mini")["rows"]
    assert [each["paper"]["top1"] for each in neither] == [None, None]
