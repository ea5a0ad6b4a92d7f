"""Pictures of the first test images: how they are drawn and kept, and what of them stands on a table's page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kt.evaluation.pictures import (
    CITYSCAPES,
    LEAST_SCORE,
    SIDE,
    UNKNOWN,
    Boxes,
    Picture,
    Sheet,
    colours,
    of_boxes,
    of_depth,
    of_labels,
    read_sheet,
    write_sheet,
)
from kt.store import folder_of, inspect, pictures_file, write_result
from results import make_row, write_cell
from tables.pictures import MOST
from tables.render import write_table

pytestmark = pytest.mark.usefixtures("no_cell_pages")

NAMES = ["road", "tram", "car"]


def plain(value: int, size: tuple[int, int] = (20, 33)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def test_classes_have_the_colours_of_cityscapes_and_others_their_own() -> None:
    cityscapes = pytest.importorskip("mmseg.datasets").CityscapesDataset.METAINFO
    assert [CITYSCAPES[name] for name in cityscapes["classes"]] == [tuple(each) for each in cityscapes["palette"]]
    many = colours([*CITYSCAPES, *map(str, range(300))])
    assert len(np.unique(many, axis=0)) == len(many) and many.any(axis=1).all()
    voc = pytest.importorskip("mmseg.datasets").PascalVOCDataset.METAINFO["palette"]
    assert colours(list("abcdefgh")).tolist() == voc[1:9]


def test_labels_keep_their_places_and_an_odd_size() -> None:
    truth = np.zeros((7, 11), np.int64)
    truth[2:4, 3:], truth[6] = 1, 255
    found = np.full_like(truth, 2)
    picture = of_labels(0, plain(9, (14, 22)), truth, found, NAMES)
    assert picture.image.shape == picture.truth.shape == picture.found.shape == (round(SIDE * 7 / 11), SIDE, 3)
    assert (picture.image == 9).all() and (picture.found == colours(NAMES)[2]).all()
    rows, columns = ((np.arange(7) + 0.5) * SIDE / 11).astype(int), ((np.arange(11) + 0.5) * SIDE / 11).astype(int)
    expected = np.vstack([colours(NAMES), np.zeros((253, 3), np.uint8)])[truth]
    assert np.array_equal(picture.truth[np.ix_(rows, columns)], expected)
    assert of_labels(0, plain(9), truth.T, found.T, NAMES).truth.shape == (SIDE, round(SIDE * 7 / 11), 3)


def test_depth_has_one_scale_and_grey_where_there_is_none() -> None:
    truth = np.array([[0, 2, 3], [4, 5, 6]], np.float32)
    found = np.array([[4, 6, np.inf], [-1, np.nan, 2]], np.float32)
    picture = of_depth(0, plain(0), truth, found)
    assert picture.note == "2 to 6 m"
    at = np.ix_([40, 160], [50, 160, 270])
    right, ours = picture.truth[at], picture.found[at]
    for there, same in (((0, 0), (1, 0)), ((0, 1), (1, 2)), ((0, 2), (1, 2)), ((1, 2), (0, 1))):
        assert ours[there].tolist() == right[same].tolist()
    assert right[0, 0].tolist() == ours[1, 0].tolist() == ours[1, 1].tolist() == list(UNKNOWN)
    assert (np.diff(right[[0, 0, 1, 1, 1], [1, 2, 0, 1, 2]].astype(int).sum(axis=1)) > 0).all()
    assert of_depth(0, plain(0), 0 * truth, found).note == ""


def test_boxes_stand_where_they_are_and_only_certain_ones() -> None:
    """On an image that the network has seen at half its size."""
    corners = np.array([[10.0, 20, 50, 40], [60, 20, 90, 45], [20, 42, 22, 48]])
    truth = Boxes(corners, np.array([1, -1, 2]))
    found = Boxes(corners[::-1], np.array([2, 0, 1]), np.array([0.9, LEAST_SCORE, LEAST_SCORE - 0.01]))
    picture = of_boxes(0, plain(77, (25, 50)), (50, 100), truth, found, NAMES)
    assert picture.image.shape == (160, 320, 3) and (picture.image == 77).all()
    assert picture.truth[100, [32, 160, 31, 33, 100]].tolist() == [
        *[colours(NAMES)[1].tolist()] * 2, *[[255] * 3] * 2, [77] * 3,
    ]  # fmt: skip
    assert picture.truth[100, 192].tolist() == list(UNKNOWN) and picture.found[100, 192].tolist() == [128, 64, 128]
    assert (picture.found[:, :60] == 77).all() and picture.found[140, 64].tolist() == [0, 0, 142]
    assert (picture.truth[:60, 180:] == 77).all()  # no name for what does not count
    of_one_class = Boxes(corners, np.zeros(3, int))
    alone = of_boxes(0, plain(77), (50, 100), of_one_class, of_one_class._replace(scores=np.ones(3)), NAMES[:1])
    assert (alone.truth[50:62, 40:150] == 77).all() and (alone.found[50:62, 34:52] != 77).any()
    empty = Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    assert (of_boxes(0, plain(77), (20, 33), empty, empty, NAMES).found == 77).all()
    wild = np.array([[9.0, 9, 5, 12], [np.nan, 1, 5, 5], [0, 0, np.inf, np.inf], [1, -1e38, 2, 1e38]])
    said = of_boxes(0, plain(77), (20, 33), empty, Boxes(wild[:2], np.zeros(2, int), np.ones(2)), NAMES).found
    assert (said == 77).all()
    of_boxes(0, plain(77), (20, 33), empty, Boxes(wild, np.zeros(4, int), np.array([1, 1, 1, np.nan])), NAMES)


def test_a_sheet_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = [(20, 33, 3), (320, 7, 3), (1, 1, 3)]
    drawn = [[rng.integers(256, size=shape, dtype=np.uint8) for _ in range(3)] for shape in shapes]
    sheet = Sheet([Picture(i, *parts, f"note {i}") for i, parts in enumerate(drawn)], "what it shows", NAMES)
    path = tmp_path / "test.png"
    assert read_sheet(path) is None
    write_sheet(path, sheet)
    kept = read_sheet(path)
    assert kept is not None and (kept.key, list(kept.names)) == (sheet.key, NAMES)
    for ours, theirs in zip(kept.pictures, sheet.pictures, strict=True):
        assert (ours.index, ours.note) == (theirs.index, theirs.note)
        assert all(np.array_equal(getattr(ours, part), getattr(theirs, part)) for part in ("image", "truth", "found"))
    Image.open(path).convert("L").save(tmp_path / "other.png")
    path.write_bytes(path.read_bytes()[:300])
    assert read_sheet(path) is None and read_sheet(tmp_path / "other.png") is None


def test_a_cell_answers_for_its_pictures_if_it_has_any(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    for name in ("student.pth", "student.json", "metrics.jsonl", "evaluations/test.json"):
        (tmp_path / name).touch()
    assert "evaluations/test.png" not in write_result(tmp_path, {})["files"]
    pictures_file(tmp_path).write_bytes(b"pictures")
    assert inspect(tmp_path)[1] is None
    assert "evaluations/test.png" in write_result(tmp_path, {})["files"]
    pictures_file(tmp_path).write_bytes(b"other ones")
    assert inspect(tmp_path) == (None, "evaluations/test.png is damaged")


# Pages


def keep(root: Path, cell_id: str, found: int, image: int = 0) -> None:
    """A cell's pictures of two images, whose found parts have the brightness `found` and that plus one."""
    parts = [(plain(image + i), plain(100 + i), plain(found + i)) for i in range(2)]
    path = pictures_file(folder_of(root, cell_id))
    path.parent.mkdir(exist_ok=True)
    write_sheet(path, Sheet([Picture(i, *each, f"note {i}") for i, each in enumerate(parts)], "the key.", NAMES))


def cells_of(root: Path, *row_ids: str, seeds: tuple[int, ...] = (0,), **result: Any) -> list[dict[str, Any]]:
    """Rows of DistPro's segmentation with finished cells."""
    rows = [make_row("cityscapes_distpro", row_id, seeds) for row_id in row_ids]
    for row in rows:
        for cell in row["cells"]:
            scores = {"miou": 30.0, "classes": {"iou": {"road": 90.0 + cell["seed"], "bus": None, "a<b": 0.0}}}
            write_cell(root, cell["id"], {"miou": 30.0}, evaluations={"test": scores}, needs={}, **result)
    return rows


def page_of(root: Path, rows: list[dict[str, Any]]) -> str:
    folder = write_table("cityscapes_distpro", rows, root, "mini", "scenes")
    return (folder / "index.html").read_text()


def shown_on(page: str) -> list[tuple[str, str, int]]:
    """Alternative text, caption and brightness of a page's pictures."""
    pattern = r'<figure><img src="data:image/\w+;base64,([^"]+)" alt="([^"]*)"><figcaption>(.*?)</figcaption>'
    found = []
    for content, text, caption in re.findall(pattern, page):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
        assert pixels.shape == (20, 33, 3) and (pixels == pixels[0, 0]).all()
        found.append((text, re.sub("<.*?>", "", caption), int(pixels[0, 0, 0])))
    return found


def test_a_page_shows_truth_teacher_untaught_and_taught_side_by_side(tmp_path: Path) -> None:
    rows = cells_of(tmp_path, "ifvd_distpro", "ifvd", "baseline", "ifvd_equal", "ifvd_reviewkd", seeds=(1, 2))
    teacher = {"student": {"network": {"name": "pspnet_resnet101"}}}
    write_cell(tmp_path, "teacher", {"miou": 50.0}, config=teacher)
    write_cell(tmp_path, "ifvd-s1", {"miou": 30.0}, needs={"teacher": "teacher"})
    for cell_id, found in (("teacher", 10), ("ifvd_distpro-s1", 20), ("ifvd_distpro-s2", 30), ("baseline-s1", 40)):
        keep(tmp_path, cell_id, found)
    keep(tmp_path, "ifvd-s1", 50)
    keep(tmp_path, "ifvd_reviewkd-s1", 60, image=7)  # tested on other images
    page = page_of(tmp_path, [rows[4], *rows[:4]])
    columns = [
        ("image", 0),
        ("truth", 100),
        ("teacher pspnet_resnet101", 10),
        ("BASELINE mobilenet_v2", 40),
        ("IFVD_DISTPRO mobilenet_v2", 20),
        ("IFVD mobilenet_v2", 50),
    ]
    expected = [
        (f"Image {i + 1}, note {i}: {caption.partition(' ')[0]}", caption, value + i)
        for i in range(2)
        for caption, value in columns
    ]
    assert shown_on(page) == expected
    assert "The first 2 images" in page and "left out: IFVD_REVIEWKD." in page and "the key." in page
    assert "#804080" in page and "http" not in "".join(re.findall(r'src="(.{4})', page))


def test_the_images_are_those_of_the_taught_students(tmp_path: Path) -> None:
    rows = cells_of(tmp_path, "baseline", "ifvd")
    keep(tmp_path, "baseline-s0", 40, image=7)  # tested on other images
    keep(tmp_path, "ifvd-s0", 50)
    page = page_of(tmp_path, rows)
    assert [caption for _, caption, _ in shown_on(page)][:3] == ["image", "truth", "IFVD mobilenet_v2"]
    assert "left out: BASELINE." in page


def test_of_many_rows_the_papers_own_method_is_shown(tmp_path: Path) -> None:
    rows = cells_of(tmp_path, "baseline", "ifvd", "ifvd_distpro")
    rows += [make_row("cityscapes_distpro", "ifvd", (0,), {"a": str(i)}, ours=False) for i in range(MOST - 2)]
    for row_id in ("baseline", "ifvd", "ifvd_distpro"):
        keep(tmp_path, f"{row_id}-s0", 20)
    page = page_of(tmp_path, rows)
    assert {caption for _, caption, _ in shown_on(page)} == {
        "image",
        "truth",
        "BASELINE mobilenet_v2",
        "IFVD_DISTPRO mobilenet_v2",
    }
    assert "the paper’s own method." in page
    assert "IFVD mobilenet_v2" in str(shown_on(page_of(tmp_path, rows[:-1])))


def test_classes_have_their_scores_and_a_page_without_pictures_has_no_place_for_them(tmp_path: Path) -> None:
    rows = cells_of(tmp_path, "baseline", "ifvd", seeds=(0, 1))
    write_cell(tmp_path, "ifvd_equal-s0", {"miou": 30.0}, needs={})  # of before there were any
    page = page_of(tmp_path, [*rows, make_row("cityscapes_distpro", "ifvd_equal")])
    assert "<h2>Pictures" not in page and "IoU (%) of each class" in page
    table = page[page.index("IoU (%) of each class") :]
    assert re.findall(r'<th scope="col">(\w+)<small>', table) == ["BASELINE", "IFVD"]
    lines = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table)
    assert [(name, re.findall(r"<td[^>]*>(.*?)</td>", cells)) for name, cells in lines] == [
        ("road", ["90.5", "90.5"]),
        ("bus", ["–", "–"]),
        ("a&lt;b", ["0.0", "0.0"]),
    ]
    written = json.loads((tmp_path / "tables" / "cityscapes_distpro" / "mini" / "table.json").read_text())["rows"]
    iou = {"iou": {"road": 90.5, "bus": None, "a<b": 0.0}}
    assert [row["classes"] for row in written] == [iou, iou, {}]
    alone = page_of(tmp_path, [make_row("cityscapes_distpro", "ifvd_equal")])
    assert "of each class" not in alone and "<h2>Pictures" not in alone
