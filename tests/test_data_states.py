"""A number is of the data that it was trained on: other data make another cell, absent ones train nothing."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import fake_training
from configs import composed, load, table
from experiments import meaning
from experiments.cell import run_cell
from experiments.launch import Report, SideBySide
from experiments.meaning import cell_id, identify, settle
from experiments.plan import Job, jobs_of, plan_lines
from experiments.progress import Display
from experiments.run import normalise
from experiments.table import Sweep
from kt.data import DatasetSpec, fingerprint
from kt.errors import UserError
from kt.settings import Dataset, defaults
from kt.store import folder_of, read_evaluation, read_result, read_status
from tables.collect import collect
from tables.render import spread_notes
from tables.sweeps import as_markdown, collect_sweep

# Kind of dataset -> its files, which change what the reader gives; the first is a label's.
FILES = {
    "imagefolder": ("own/train/cat/a.png", "own/train/dog/b.png", "own/val/cat/c.png", "own/val/dog/d.png"),
    "segfolder": ("own/labels/train/a.png", "own/images/train/a.png", "own/labels/val/b.png", "own/images/val/b.png"),
    "coco": ("own/annotations/instances_train.json", "own/annotations/instances_val.json", "own/train/a.png"),
    "cifar100": tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")),
}


@pytest.fixture(autouse=True)
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "REUSED", 0)
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def make(root: Path, name: str) -> Path:
    for file in FILES[name]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    return root


def config_of(tmp_path: Path, name: str, *more: str, data: str = "data") -> dict[str, Any]:
    keys = [f"dataset={name}", f"data_root={tmp_path / data}", f"output_root={tmp_path / 'out'}", *more]
    config = (
        composed(*keys, "student=resnet20")
        if name in ("imagefolder", "cifar100")
        else composed(*keys, "student=deeplabv2_resnet101" if name == "segfolder" else "student=fasterrcnn_resnet50")
    )
    if name != "cifar100":
        config["dataset"]["folder"] = "own"
    if name in ("segfolder", "coco"):
        config["dataset"] |= {"train_split": "train", "test_split": "val"}
    return config


def told(config: dict[str, Any]) -> tuple[str, ...]:
    return identify(settle(config)).told


@pytest.mark.parametrize("name", FILES)
def test_other_data_are_another_cell_and_the_first_data_the_first_one(tmp_path: Path, name: str) -> None:
    first, config = make(tmp_path / "data", name) / FILES[name][0], config_of(tmp_path, name)
    old = run_cell(config)["id"]
    first.write_bytes(first.read_bytes()[::-1])  # of the same size
    assert any("1 of" in line and "trained anew" in line for line in told(config))
    new = run_cell(config)["id"]
    assert new.startswith(f"{old}-") and len(new) == len(old) + 9 and not told(config)
    assert (folder_of(tmp_path / "out", new) / "calls").read_text() == "x"
    first.write_bytes(first.read_bytes()[::-1])
    assert run_cell(config)["id"] == old and (folder_of(tmp_path / "out", old) / "calls").read_text() == "x"


@pytest.mark.parametrize("name", ("imagefolder", "segfolder", "coco"))
def test_more_and_fewer_images_are_other_data(tmp_path: Path, name: str) -> None:
    image, config = make(tmp_path / "data", name) / FILES[name][-1], config_of(tmp_path, name)
    ids = [run_cell(config)["id"]]
    shutil.copy(image, image.with_name("z.png"))
    assert any("1 images more" in line for line in told(config))
    ids.append(run_cell(config)["id"])
    image.unlink()
    assert len({*ids, run_cell(config)["id"]}) == 3


def test_images_behind_a_link_are_told_apart_and_links_in_a_circle_end(tmp_path: Path) -> None:
    split, config = (make(tmp_path / "data", "coco") / FILES["coco"][-1]).parent, config_of(tmp_path, "coco")
    more = tmp_path / "more"
    more.mkdir()
    (split / "deep").symlink_to(more)
    (more / "round").symlink_to(split)
    old = run_cell(config)["id"]
    (more / "b.png").write_bytes(b"more")
    assert any("1 images more" in line for line in told(config)) and run_cell(config)["id"] != old


def test_where_the_data_lie_is_of_no_account(tmp_path: Path) -> None:
    make(tmp_path / "data", "imagefolder")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    old = run_cell(config_of(tmp_path, "imagefolder"))["id"]
    assert cell_id(config_of(tmp_path, "imagefolder", data="copy")) == old
    (tmp_path / "copy/own/val/dog/d.png").write_bytes(b"other")
    assert cell_id(config_of(tmp_path, "imagefolder", data="copy")) != old


def test_absent_data_show_the_newest_result_and_train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, config = make(tmp_path / "data", "cifar100") / FILES["cifar100"][0], config_of(tmp_path, "cifar100")
    run_cell(config)
    first.write_bytes(b"other")
    newest = run_cell(config)["id"]
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": "error"}))
    assert run_cell(config)["id"] == newest
    assert any("unverified" in line for line in told(config))


def test_a_run_never_goes_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, config = make(tmp_path / "data", "imagefolder") / FILES["imagefolder"][0], config_of(tmp_path, "imagefolder")
    monkeypatch.setenv("FAKE_TRAINING", json.dumps({"none": "interrupt"}))
    with pytest.raises(KeyboardInterrupt):
        run_cell(config)
    half = folder_of(tmp_path / "out", cell_id(config))
    (half / "checkpoint").write_text("of the first data")
    first.write_bytes(b"other")
    monkeypatch.delenv("FAKE_TRAINING")
    assert run_cell(config)["id"] != half.name and read_result(half) is None
    # Nobody knows the data of what is left there.
    first.write_bytes(FILES["imagefolder"][0].encode())
    assert cell_id(config) == half.name
    (half / "data.json").write_text("{")
    assert run_cell(config)["id"] == half.name and not (half / "checkpoint").exists()


def test_a_cell_is_of_the_data_of_what_it_needs(tmp_path: Path) -> None:
    make(tmp_path / "data", "cifar100"), make(tmp_path / "data", "imagefolder")
    config = config_of(tmp_path, "cifar100", "method=kd", "teacher=resnet56")
    config["teacher"]["dataset"] = config_of(tmp_path, "imagefolder")["dataset"]
    config["teacher"]["schedule"] = config["schedule"]
    old = run_cell(config)
    (tmp_path / "data" / FILES["imagefolder"][0]).write_bytes(b"other")
    new = run_cell(config)
    assert new["id"].startswith(f"{old['id']}-") and new["needs"]["teacher"].startswith(f"{old['needs']['teacher']}-")
    assert cell_id(config_of(tmp_path, "cifar100")).count("-") == 0
    shutil.rmtree(tmp_path / "data/own")
    config["seed"] += 1
    with pytest.raises(UserError, match="there are no data of imagefolder:own"):
        run_cell(config)


def test_a_table_is_of_one_state_of_the_data(tmp_path: Path) -> None:
    make(tmp_path / "data", "cifar100")
    common = [f"data_root={tmp_path / 'data'}", f"output_root={tmp_path / 'out'}", "dataset=cifar100"]

    def cells(made: Any) -> list[dict[str, Any]]:
        return [cell for shown in made.shown for cell in shown.entry()["cells"]]

    before = table("cifar100_kcd", *common)
    for job in list(before.jobs.values())[:3]:
        run_cell(job.config)
    (tmp_path / "data" / FILES["cifar100"][1]).write_bytes(b"other")
    after = table("cifar100_kcd", *common)
    done = {job.id for job in before.jobs.values() if read_result(folder_of(tmp_path / "out", job.id))}
    assert done and not done & after.jobs.keys() and not any("unverified" in cell for cell in cells(after))
    shutil.rmtree(tmp_path / "data")
    gone = table("cifar100_kcd", *common)
    assert done <= gone.jobs.keys() and any(cell.get("unverified") for cell in cells(gone))


def test_rows_of_two_states_of_data_that_are_gone_are_not_compared(tmp_path: Path) -> None:
    make(tmp_path / "data", "cifar100")
    keys = [f"data_root={tmp_path / 'data'}", f"output_root={tmp_path / 'out'}", "dataset=cifar100"]
    rows = ["rows=none_half,none_full"]

    def shown() -> dict[str, Any]:
        entries = [{**each.entry(), "differs": {}} for each in table("cifar100_kcd", *keys, *rows).shown]
        return collect("cifar100_kcd", entries, tmp_path / "out", "mini")

    first, second = table("cifar100_kcd", *keys, *rows).shown
    run_cell(first.config), run_cell(second.config)
    assert shown()["mixed"] == []
    (tmp_path / "data" / FILES["cifar100"][1]).write_bytes(b"other")
    run_cell(second.config)
    shutil.rmtree(tmp_path / "data")
    made = shown()
    assert made["mixed"] == ["cifar100 classification"] and "several states of cifar100" in " ".join(spread_notes(made))
    assert all(claim["verdict"] == "unknown" and "same state" in claim["evidence"] for claim in made["claims"])


def test_a_key_that_is_not_read_makes_no_other_cell(tmp_path: Path) -> None:
    make(tmp_path / "data", "imagefolder"), make(tmp_path / "data", "cifar100")
    for name in ("imagefolder", "cifar100"):
        config = config_of(tmp_path, name)
        done = run_cell(config)["id"]
        for key, value in (("train_split", "a"), ("test_split", "b"), ("domain", "clipart"), ("style", "synthetic")):
            assert cell_id({**config, "dataset": {**config["dataset"], key: value}}) == done, (name, key)
    assert cell_id({**config, "dataset": {**config["dataset"], "folder": "other"}}) == done


def test_files_that_a_key_of_one_s_own_names_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Folds(Dataset):
        """Images in several folds."""

        fold: int = 0

    spec = DatasetSpec({"classification": "a:b"}, images=("folds/{fold}/*",), settings=Folds)
    monkeypatch.setitem(fingerprint.DATASETS, "folds", spec)
    monkeypatch.setattr(fingerprint, "REUSED", 1e9)
    for fold in (1, 2):
        make_fold = tmp_path / f"folds/{fold}"
        make_fold.mkdir(parents=True)
        (make_fold / "a.png").write_bytes(bytes(fold))
    given = {**defaults(Dataset), "name": "folds", "task": "classification"}
    first, second = (fingerprint.state_of({**given, "fold": fold}, tmp_path, tmp_path / "c") for fold in (1, 2))
    assert first.key != second.key and first.summary != second.summary


def test_a_score_belongs_to_the_data_that_it_was_taken_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "data", "cifar100"), make(tmp_path / "data", "imagefolder")
    own = config_of(tmp_path, "imagefolder")["dataset"]
    monkeypatch.setattr(meaning, "evaluation_dataset", lambda config: own if config["evaluation"] else None)
    config = {**config_of(tmp_path, "cifar100"), "evaluation": "imagefolder"}
    folder = folder_of(tmp_path / "out", run_cell(config)["id"])
    scores = iter(({"top1": 2.0}, UserError("no"), {"top1": 3.0}))

    def score(*_: Any) -> Any:
        found = next(scores)
        if isinstance(found, UserError):
            raise found
        return found

    monkeypatch.setattr(sys.modules["experiments.build"], "evaluate_cell", score)
    run_cell(config)
    assert read_evaluation(folder, "imagefolder") == {"miou": 12.0}  # nothing has changed
    first = tmp_path / "data" / FILES["imagefolder"][0]
    for other, kept in ((b"other", {"top1": 2.0}), (b"another", None)):
        first.write_bytes(other)
        (line,) = told(config)
        assert line.startswith("dataset imagefolder:own in") and "1 of 4 images differ; students are scored" in line
        job = Job(folder.name, [], config, "", [], scored_on=identify(settle(config)).scored_on)
        assert job.read_status(str(tmp_path / "out"))["status"] == "unscored"
        with contextlib.suppress(UserError):
            run_cell(config)
        assert read_evaluation(folder, "imagefolder") == kept
    run_cell(config)
    assert (folder / "calls").read_text() == "x" and not identify(settle(config)).unverified
    shutil.rmtree(tmp_path / "data/own")
    run_cell(config)
    assert read_evaluation(folder, "imagefolder") == {"top1": 3.0} and "unverified" in told(config)[0]
    assert identify(settle(config)).unverified


@pytest.mark.parametrize("change", ["other", "absent"])
@pytest.mark.parametrize("what", ["train_cell", "evaluate_cell"])
def test_nothing_is_kept_of_data_that_change_while_they_are_read(
    what: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, config = make(tmp_path / "data", "imagefolder") / FILES["imagefolder"][0], config_of(tmp_path, "imagefolder")
    monkeypatch.setattr(meaning, "evaluation_dataset", lambda config: config["evaluation"] and config["dataset"])
    config["evaluation"] = "imagefolder"
    (tmp_path / "out").mkdir()  # where the files' names are kept
    monkeypatch.setattr(fingerprint, "REUSED", 1e9)  # what was seen before the training is not to be relied on
    build = sys.modules["experiments.build"]
    done = getattr(build, what)

    def disturbed(*given: Any) -> Any:
        first.write_bytes(b"other") if change == "other" else shutil.rmtree(tmp_path / "data")
        return done(*given)

    monkeypatch.setattr(build, what, disturbed)
    folder = folder_of(tmp_path / "out", cell_id(config))
    words = "1 of 4 images differ" if change == "other" else "is not there any more"
    with pytest.raises(UserError, match=rf"^dataset imagefolder:own in [^\n]*{words}, since [^\n]* not kept$"):
        run_cell(config)
    assert read_status(folder)["status"] == ("failed" if what == "train_cell" else "done")
    assert read_status(folder, "imagefolder")["status"] == "failed" and read_evaluation(folder, "imagefolder") is None
    assert (folder / "calls").exists() == (what == "evaluate_cell" or change == "absent")
    monkeypatch.setattr(build, what, done)
    if change == "absent":
        make(tmp_path / "data", "imagefolder")
    fingerprint.forget()
    found = run_cell(config)
    assert (found["id"] == folder.name) == (what == "train_cell" or change == "absent")


def planned(config: dict[str, Any]) -> str:
    """The plan of one cell and of what it needs."""
    return "\n".join(plan_lines(jobs_of(config), config["output_root"], 1)) + "\n"


def test_a_plan_says_what_has_changed(tmp_path: Path) -> None:
    first, config = make(tmp_path / "data", "cifar100") / FILES["cifar100"][0], config_of(tmp_path, "cifar100")
    run_cell(config)
    first.write_bytes(b"other")
    for shown in (planned(config), "\n".join(plan_lines(job_of(config), "", 1))):
        assert shown.count("1 of 3 label files differ; what needs it is trained anew\n") == 1


def test_a_plan_says_which_data_are_not_there(tmp_path: Path) -> None:
    config = config_of(tmp_path, "cifar100", "method=kd", "teacher=resnet56")
    printed = planned(config)
    line = f"dataset cifar100 in {tmp_path / 'data'}: is not there; needed to train\n"
    assert printed.count(line) == 1 and "2 cells, 0 done, 2 to train" in printed
    make(tmp_path / "data", "cifar100")
    assert "is not there" not in planned(config)


def test_a_table_says_that_data_have_changed_under_it(tmp_path: Path) -> None:
    first, config = make(tmp_path / "data", "cifar100") / FILES["cifar100"][0], config_of(tmp_path, "cifar100")
    run_cell(config)
    first.write_bytes(b"other")
    job = Job(cell_id(config), [], config, "kd", [], {"status": "missing"})
    first.write_bytes(b"another")
    run_cell(config)
    training = SideBySide(Report("t", {job.id: job}, str(tmp_path / "out"), Display(quiet=True)), 1)
    training._end(job, 0)
    assert job.status["error"] == "its data have changed since the command began: run it again"


def job_of(config: dict[str, Any]) -> dict[str, Job]:
    found = identify(settle(config))
    return {name: Job(name, [], config, name, [], {"status": "done"}, found.told) for name in ("a", "b")}


def test_a_sweep_marks_what_is_unverified(tmp_path: Path) -> None:
    make(tmp_path / "data", "cifar100")
    run_cell(config_of(tmp_path, "cifar100"))
    shutil.rmtree(tmp_path / "data")
    keys = (
        "dataset=cifar100",
        "student=resnet20,resnet32",
        f"data_root={tmp_path / 'data'}",
        f"output_root={tmp_path / 'out'}",
    )
    entries = [shown.entry() for shown in Sweep(normalise(keys), load).shown]
    assert [entry["cells"][0].get("unverified") for entry in entries] == [True, None]
    note = as_markdown(collect_sweep("s", ["student"], entries, tmp_path / "out"))
    assert "Unverified: the data of 1 cells are not there" in note
