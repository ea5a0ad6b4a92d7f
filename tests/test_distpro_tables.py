"""DistPro's tables: rows that share searches and teachers, claims that are judged from records, Figures 5 and 6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import rows_of, table
from experiments.meaning import identity, needs_of, settle
from results import make_row, write_cell
from tables.collect import collect
from tables.judging import Context
from tables.papers.distpro.claims import LENGTH
from tables.papers.distpro.figures import fast_distillation, searched_process
from tables.records import find_table

NAME, PAIR = "distpro_cifar100", "wrn_40_2_wrn_16_2"
STEPS = 400


def search(root: Path, peaks: tuple[float, ...], scatter: float = 0.0, steps: int = STEPS, name: str = "search") -> str:
    """A search whose three summed weights peak after these shares of its steps."""
    noise = np.random.default_rng(0).normal(size=(3, steps))
    at = np.arange(1, steps + 1) / steps
    weights = [0.3 - 0.2 * np.abs(at - peak) + scatter * each for peak, each in zip(peaks, noise, strict=True)]
    rows = [
        {"kind": "train", "phase": "train", "step": i + 1, "epoch": (i + 1) / 100, "lr": 0.1, "loss": 1.0}
        | {f"{kind}_t{level + 1}": float(each[i]) for kind in ("weight", "logit") for level, each in enumerate(weights)}
        for i in range(steps)
    ]
    write_cell(root, name, {"top1": 50.0}, rows, phases=[{"name": "train", "seconds": 40.0, "steps": steps}])
    return name


def replayed(
    root: Path, live: float = 27.0, pair: str = PAIR, needed: str = "search", **result: Any
) -> list[dict[str, Any]]:
    """Rows of a pair that replays the search, and of the same with equal weights."""
    found = []
    for kind, count, speed in (("distpro", live, 30.0), ("equal", 27.0, 20.0)):
        row = make_row(NAME, f"{kind}_{pair}")
        rows = [
            {"kind": "train", "phase": "train", "step": i + 1, "epoch": i + 1, "lr": 0.1, "loss": 1.0, "live": count}
            for i in range(4)
        ]
        needs = {"search": needed} if kind == "distpro" else {}
        kept = {"needs": needs, "pathways": 27, "images_per_second": speed}
        kept["phases"] = [{"name": "train", "seconds": 100.0, "steps": 4}]
        write_cell(root, row["cells"][0]["id"], {"top1": 60.0}, rows, **{**kept, **result})
        found.append(row)
    return found


def claim(root: Path, rows: list[dict[str, Any]], name: str, table: str = NAME) -> dict[str, Any]:
    return next(each for each in collect(table, rows, root, "mini", "scenes")["claims"] if each["id"] == name)


def scored(
    root: Path, name: str, scores: dict[str, float], epochs: dict[str, int] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """Rows of a table that score so, whatever its metric."""
    rows = [make_row(name, row_id, **changes) for row_id in scores]
    for row, (row_id, score) in zip(rows, scores.items(), strict=True):
        config = {"schedule": {"epochs": (epochs or {}).get(row_id)}, "dataset": {"name": "imagenet"}}
        facts = {"test_size": 50_000, "num_classes": 1000, "config": config}
        write_cell(root, row["cells"][0]["id"], dict.fromkeys(("top1", "top5", "miou", "rmse"), score), **facts)
    return rows


@pytest.mark.parametrize(
    ("peaks", "scatter", "verdict"),
    [
        ((0.2, 0.5, 0.8), 0.0, "holds"),
        ((0.2, 0.5, 0.8), 0.005, "holds"),
        ((0.8, 0.5, 0.2), 0.0, "fails"),
        ((0.2, 0.8, 0.5), 0.0, "fails"),
        ((0.2, 0.5, 0.8), 0.5, "unknown"),
    ],
)
def test_low_levels_come_first(peaks: tuple[float, ...], scatter: float, verdict: str, tmp_path: Path) -> None:
    search(tmp_path, peaks, scatter)
    found = claim(tmp_path, replayed(tmp_path), "c12")
    assert found["verdict"] == verdict, found
    if verdict == "holds" and not scatter:
        assert "20 %, 50 %, 80 %" in found["evidence"]


@pytest.mark.parametrize(
    ("others", "scatter", "verdict", "told"),
    [
        ((0.1, 0.4, 0.6), 0.0, "holds", "in 1 of the table's 1 other searches"),
        ((0.6, 0.4, 0.1), 0.0, "unknown", "in 0 of the table's 1 other searches"),
        ((0.6, 0.4, 0.1), 0.5, "holds", "of the search."),
    ],
)
def test_low_levels_come_first_in_every_search(
    others: tuple[float, ...], scatter: float, verdict: str, told: str, tmp_path: Path
) -> None:
    search(tmp_path, (0.2, 0.5, 0.8))
    search(tmp_path, others, scatter, name="another")
    rows = [*replayed(tmp_path), *replayed(tmp_path, pair="resnet56_resnet20", needed="another")]
    found = claim(tmp_path, rows, "c12")
    assert found["verdict"] == verdict and told in found["evidence"], found


@pytest.mark.parametrize("steps", [2, 7, 20, 50])
def test_what_scatters_in_a_short_search_has_no_peak(steps: int, tmp_path: Path) -> None:
    search(tmp_path, (0.2, 0.5, 0.8), scatter=0.5, steps=steps)
    assert claim(tmp_path, replayed(tmp_path), "c12")["verdict"] == "unknown"


def test_without_a_search_there_is_no_verdict(tmp_path: Path) -> None:
    rows = replayed(tmp_path)
    assert "Needs" in claim(tmp_path, rows, "c12")["evidence"] and "Needs" in claim(tmp_path, rows, "c16")["evidence"]
    assert searched_process(Context(find_table(NAME), rows, {}, tmp_path)) is None


def test_a_search_is_cheap_if_it_takes_less_than_the_training(tmp_path: Path) -> None:
    search(tmp_path, (0.2, 0.5, 0.8))
    assert "takes 0.40 of the time" in claim(tmp_path, replayed(tmp_path), "c16")["evidence"]
    short = [{"name": "train", "seconds": 30.0, "steps": 4}]
    assert claim(tmp_path, replayed(tmp_path, phases=short), "c16")["verdict"] == "fails"


@pytest.mark.parametrize(("live", "verdict", "share"), [(9.0, "holds", "67 %"), (27.0, "fails", "0 %")])
def test_clipping_saves(live: float, verdict: str, share: str, tmp_path: Path) -> None:
    found = claim(tmp_path, replayed(tmp_path, live), "c15")
    assert found["verdict"] == verdict and found["evidence"].startswith(f"{share} of the pathways' losses")
    assert "0.67 of the time that equal weights take" in found["evidence"]


def test_all_seeds_and_uses_of_a_pair_share_one_search_and_one_teacher() -> None:
    replays = [row_id for row_id in rows_of(NAME) if row_id.startswith(("distpro_", "alpha_t_"))]
    cells = [settle(job.config) for job in table(NAME, "seed=0,1", f"rows={','.join(replays)}").jobs.values()]
    searching = [cell for cell in cells if cell["method"].get("process") in ("search", "final")]
    needs = [needs_of(cell) for cell in searching]
    assert len(searching) == 24
    assert len({identity(need["search"].config) for need in needs}) == 6  # type: ignore[union-attr]
    assert len({identity(need["teacher"].config) for need in needs}) == 4  # type: ignore[union-attr]


def test_figure_6_shows_each_map(tmp_path: Path) -> None:
    search(tmp_path, (0.2, 0.5, 0.8))
    rows = collect(NAME, replayed(tmp_path), tmp_path, "mini", "scenes")["rows"]
    results = {rows[0]["cells"][0]["id"]: {"needs": {"search": "search"}}}
    drawn = searched_process(Context(find_table(NAME), rows, results, tmp_path))
    assert drawn is not None
    _, (panel, logits) = drawn
    assert [(level.y, len(logits.lines)) for level in logits.levels] == [(0.5, 3)]
    assert [line.label for line in panel.lines] == ["teacher's map 1", "teacher's map 2", "teacher's map 3"]
    peaks = [line.x[line.y.argmax()] / STEPS for line in panel.lines]
    np.testing.assert_allclose(peaks, (0.2, 0.5, 0.8), atol=0.01)


# Tables 2 to 4 and 7, Figure 5


def test_tables_of_imagenet_share_teachers_searches_and_rows() -> None:
    """Table 3 adds one search and two replays to Table 4, Table 2 three shorter replays; Table 7 has its own."""
    known: set[str] = set()
    added = {}
    both = [f"{who}_{of}" for who in ("distpro", "reviewkd") for of in ("mobilenet", "resnet18")]
    for name, rows in {
        "imagenet_distpro": [*both, "distpro_deit", "reviewkd_cosine_deit"],
        "distpro_transfer": [],
        "distpro_epochs": [*both, "distpro_deit", "reviewkd_deit"],
        "distpro_normalization": ["biased_softmax", "l1"],
    }.items():
        jobs = table(name, f"rows={','.join(rows) or 'null'}").jobs
        methods = [job.config["method"]["name"] for cell_id, job in jobs.items() if cell_id not in known]
        added[name] = [methods.count(each) for each in ("none", "distpro_search", "reviewkd", "distpro")]
        known |= jobs.keys()
    assert added == {
        "imagenet_distpro": [3, 3, 3, 3],
        "distpro_transfer": [0, 1, 0, 2],
        "distpro_epochs": [0, 0, 0, 3],
        "distpro_normalization": [1, 2, 0, 2],
    }


def test_all_lengths_replay_one_process() -> None:
    jobs = table("imagenet_distpro", "rows=distpro_mobilenet", f"{LENGTH}=1,2").jobs.values()
    assert sorted(job.config["method"]["name"] for job in jobs) == ["distpro", "distpro", "distpro_search", "none"]


@pytest.mark.parametrize("name", ["imagenet_distpro", "distpro_epochs"])
def test_rows_are_those_of_the_paper(name: str) -> None:
    for shown in table(name, "scale=paper").shown:
        printed, config = find_table(name).row(shown.row.id), shown.config
        if printed["role"] == "teacher":
            continue  # torchvision's or timm's as it is
        method, network = config["method"], config["student"]["network"]
        assert (network["name"], method["name"]) == (printed["student"], printed["method"])
        assert config["schedule"]["policy"] == printed.get("scheduler", config["schedule"]["policy"])
        assert config["schedule"]["epochs"] == printed["values"].get("epochs", config["schedule"]["epochs"])
        if method["name"] == "reviewkd":
            assert method["preactivation"] and not method["ramp"]
            own = {"mobilenet_v1": (8, 256)}.get(network["name"], (1, None))
            assert (method["weight"], method["width"]) == own


def test_searches_of_the_paper() -> None:
    """20 epochs of either set at the size of the networks, whose teachers are ImageNet's own."""
    found = table("distpro_transfer", "scale=paper").jobs.values()
    searches = [job.config for job in found if job.config["method"]["name"] == "distpro_search"]
    assert sorted((each["dataset"]["name"], each["student"]["network"]["name"]) for each in searches) == [
        ("cifar100", "mobilenet_v1"),
        ("tiny_imagenet", "mobilenet_v1"),
        ("tiny_imagenet", "resnet18"),
    ]
    for each in searches:
        settings = each["schedule"]
        assert (settings["epochs"], settings["batch_size"], settings["policy"]) == (20, 512, "cosine")
        assert each["dataset"]["image_size"] == 224 and each["teacher"]["dataset"]["name"] == "imagenet"


def lengths(root: Path, ours: tuple[float, ...], theirs: tuple[float, ...]) -> list[dict[str, Any]]:
    """Rows of Figure 5: 10, 20, ... epochs."""
    found = []
    for number, scores in enumerate(zip(ours, theirs, strict=True), 1):
        named = dict(zip(("distpro_mobilenet", "reviewkd_cosine_mobilenet"), scores, strict=True))
        found += scored(root, "imagenet_distpro", named, axes={LENGTH: str(10 * number)})
    return found


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((66.0, 71.0, 73.0), "holds"),
        ((64.0, 71.0, 78.0), "fails"),
        ((63.0, 71.0, 74.0), "unknown"),
        ((60.0, 68.0, 69.0), "fails"),
    ],
)
def test_shorter_trainings_gain_more(ours: tuple[float, ...], verdict: str, tmp_path: Path) -> None:
    rows = lengths(tmp_path, ours, (62.0, 70.0, 73.0))
    found = claim(tmp_path, rows, "c5", "imagenet_distpro")
    assert found["verdict"] == verdict, found
    assert "at 10 epochs" in found["evidence"] and "at 30" in found["evidence"]


def test_figure_5_says_when_it_is_as_good(tmp_path: Path) -> None:
    """Half way between 70 and 74 lies half way between 20 and 30 epochs."""
    rows = lengths(tmp_path, (66.0, 70.0, 74.0), (62.0, 70.0, 72.0))
    rows = collect("imagenet_distpro", rows, tmp_path, "mini", "scenes")["rows"]
    drawn = fast_distillation(Context(find_table("imagenet_distpro"), rows, {}, tmp_path))
    assert drawn is not None
    caption, (panel,) = drawn
    assert "mobilenet after 25 of 30 epochs" in caption
    assert [(line.label, [*line.x], [*line.y]) for line in panel.lines] == [  # type: ignore[union-attr]
        ("DistPro", [10, 20, 30], [66, 70, 74]),
        ("ReviewKD", [10, 20, 30], [62, 70, 72]),
    ]


@pytest.mark.parametrize(("epochs", "verdict"), [(50, "holds"), (100, "unknown")])
def test_as_good_in_fewer_epochs(epochs: int, verdict: str, tmp_path: Path) -> None:
    scores = {f"{who}_{of}": 72.0 for of in ("mobilenet", "resnet18", "deit") for who in ("distpro", "reviewkd")}
    length = {row_id: epochs if row_id.startswith("distpro") else 100 for row_id in scores}
    found = claim(tmp_path, scored(tmp_path, "distpro_epochs", scores, length), "c6", "distpro_epochs")
    assert found["verdict"] == verdict
    assert ("in 50 of 100 epochs" if epochs == 50 else "Needs fewer epochs") in found["evidence"]


@pytest.mark.parametrize(("name", "rows"), [("c7", ("cifar100", "tiny_imagenet")), ("c8", ("mobilenet", "resnet18"))])
def test_a_process_that_does_not_serve(name: str, rows: tuple[str, str], tmp_path: Path) -> None:
    first, second = (f"searched_{'on' if name == 'c7' else 'with'}_{each}" for each in rows)
    found = scored(tmp_path, "distpro_transfer", {first: 70.0, second: 72.0})
    assert claim(tmp_path, found, name, "distpro_transfer")["verdict"] == "fails"


CITYSCAPES = ("ifvd_distpro", "ifvd_reviewkd", "ifvd_equal", "ifvd", "baseline")
DEPTH = ("distpro", "reviewkd", "equal", "baseline", "kd")
NORMALISATION = ("biased_softmax", "biased_l1", "softmax", "l1", "sigmoid")
RESNET18 = tuple(f"{who}_resnet18" for who in ("teacher", "distpro", "reviewkd_cosine", "reviewkd", "ofd", "student"))


@pytest.mark.parametrize(
    ("name", "table_name", "ranks", "moved", "verdict"),
    [
        ("c9", "imagenet_distpro", RESNET18, (0, 0), "holds"),
        ("c9", "imagenet_distpro", RESNET18, (1, 4), "fails"),
        ("c9", "imagenet_distpro", RESNET18, (1, 5), "fails"),
        ("c9", "imagenet_distpro", RESNET18, (2, 5), "holds"),
        ("c10", "cityscapes_distpro", CITYSCAPES, (0, 0), "holds"),
        ("c10", "cityscapes_distpro", CITYSCAPES, (2, 3), "fails"),
        ("c11", "nyuv2_distpro", DEPTH, (3, 4), "holds"),
        ("c11", "nyuv2_distpro", DEPTH, (2, 3), "fails"),
        ("c14", "distpro_normalization", NORMALISATION, (1, 4), "holds"),
        ("c14", "distpro_normalization", NORMALISATION, (0, 3), "fails"),
    ],
)
def test_ranks_that_are_claimed(
    name: str, table_name: str, ranks: tuple[str, ...], moved: tuple[int, int], verdict: str, tmp_path: Path
) -> None:
    """And none but those: of ImageNet's rows only DistPro's, of normalisations only the best one's."""
    order = [*ranks]
    order.insert(moved[0], order.pop(moved[1]))
    sign = 1 if find_table(table_name).metrics[0]["better"] == "higher" else -1
    scores = {row_id: 60.0 - 2 * sign * rank for rank, row_id in enumerate(order)}
    if name == "c9":
        others = [row["id"] for row in find_table(table_name).rows if row["student"] != "resnet18"]
        scores |= {row_id: 60.0 if row_id.startswith("distpro") else 50.0 for row_id in others}
    found = claim(tmp_path, scored(tmp_path, table_name, scores), name, table_name)
    assert found["verdict"] == verdict, found
