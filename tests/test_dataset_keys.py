"""What decides a dataset's images is in its id: every key of its config, and every file that its reader opens."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch

from configs import composed
from experiments.checking import validate
from experiments.meaning import semantics
from kt.data import build_data, fingerprint, image_lists
from kt.data.names import CLASSIFICATION, DATASETS, IMAGE_ENDS, augmentations
from kt.errors import UserError
from kt.settings import defaults, kinds

# Without labels there are no scores: such a folder is a method's, see the tests of auxiliary subspaces.
CASES = [(name, task) for name, spec in DATASETS.items() for task in spec.readers if name != "unlabelled"]
TASKS = sorted({task for _, task in CASES})
# Other values of every key.
OTHERS: dict[str, list[Any]] = {
    "name": [*DATASETS],
    "task": TASKS,
    "num_classes": [3],
    "image_size": [40, [40, 80], [40], [40, 80, 3]],
    "crop_size": [[16, 16], [400, 400], [16]],
    "subset": [2, 1000],
    "validation": [0.5],
    "augmentation": sorted({each for task in TASKS for each in augmentations(task)}),
    "style": ["synthetic"],
    "train_size": [4],
    "test_size": [3],
    "domain": ["clipart"],
    "folder": ["elsewhere", "/elsewhere"],
    "train_split": ["val", "../train", "train/"],
    "test_split": ["train"],
    "resident": [True, False],
    "stand_in": ["scenes_small"],
    "depth_samples": [0, 3],
}
# Keys of whose other values there may be no data.
ABSENT = ("name", "task", "domain", "folder", "train_split", "test_split")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_lists, "CLEANED", dict.fromkeys(image_lists.CLEANED, (3, 1)))


def make(name: str, task: str, root: Path) -> dict[str, Any]:
    if task != CLASSIFICATION:
        pytest.importorskip("mmdet", reason="dense tasks need mmdet and mmseg (the extra `mm`)")
    settings = DATASETS[name].settings
    return {**defaults(settings), "augmentation": "none", "num_classes": None, **layouts.make(name, task, root)}


def build(dataset: dict[str, Any], root: Path) -> Any:
    return build_data(dataset, root, batch_size=2, seed=0, workers=0, cache_root=root.parent / "drawn")


def digest(dataset: dict[str, Any], root: Path) -> str:
    """All images of an epoch and of the test set, with their truth."""
    data = build(dataset, root)
    return hashlib.sha256(b"".join(contents([*data.train.epoch(0), *data.test.epoch(0)]))).hexdigest()


def contents(value: Any) -> Iterator[bytes]:
    """All that is in a batch."""
    value = getattr(value, "tensor", value)  # of boxes
    if isinstance(value, torch.Tensor):
        yield value.numpy().tobytes()
    elif isinstance(value, dict) or hasattr(value, "all_items"):
        for key, inner in sorted(value.items() if isinstance(value, dict) else value.all_items()):
            yield key.encode()
            yield from contents(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from contents(inner)
    else:
        yield repr(value).encode()


def test_every_key_has_other_values() -> None:
    assert OTHERS.keys() == {key for spec in DATASETS.values() for key in kinds(spec.settings)}


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_key_decides_the_id_or_no_pixel_or_is_refused(name: str, task: str, tmp_path: Path) -> None:
    dataset = make(name, task, tmp_path)
    config = composed(f"data_root={tmp_path}")
    wanted = digest(dataset, tmp_path)
    for key, values in OTHERS.items():
        for value in values if key in dataset else ():
            changed = {**dataset, key: value}
            try:
                validate({**config, "dataset": changed})
                if semantics({**config, "dataset": changed}) == semantics({**config, "dataset": dataset}):
                    assert digest(changed, tmp_path) == wanted, f"dataset.{key}={value}"
                elif key not in ABSENT:
                    next(build(changed, tmp_path).train.epoch(0))
            except UserError as error:
                # Another name or task may lack what others have.
                named = "dataset." if key in ("name", "task") else f"dataset.{key}="
                assert named in str(error) and "\n" not in str(error), (key, value)


# Files, and folders of classes, that a reader takes where there are any.
LISTS = {
    ("imagefolder", CLASSIFICATION): ("pets/train/ant", "pets/val/ant"),
    ("imagenet", CLASSIFICATION): ("imagenet/train/ant", "imagenet/val/ant"),
    ("gta5", "segmentation"): ("gta5/val.txt",),
    ("segfolder", "segmentation"): ("street/classes.json",),
    ("cityscapes", "detection"): ("cityscapes/annotations/instancesonly_filtered_gtFine_train.json",),
}
_opened: list[str] | None = None


def _watch(event: str, given: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(given[0]))


sys.addaudithook(_watch)


def opened_by_reading(dataset: dict[str, Any], root: Path) -> list[Path]:
    """The files that an epoch and a test of a dataset open."""
    global _opened
    _opened = []
    try:
        data = build(dataset, root)
        for _ in (*data.train.epoch(0), *data.test.epoch(0)):
            pass
        # HDF5 opens files where Python does not see it.
        found = {Path(name) for name in _opened} | set(root.rglob("*.h5"))
    finally:
        _opened = None
    return sorted(path for path in found if root in path.parents and path.is_file())


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, task in CASES if not DATASETS[name].code])
def test_a_file_decides_the_state(name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "REUSED", 0)
    root = tmp_path / "data"
    dataset = make(name, task, root)

    def state() -> str | None:
        return fingerprint.combined([fingerprint.state_of(dataset, root, tmp_path / "cache")])

    whole, files = state(), opened_by_reading(dataset, root)
    assert whole is not None and len(files) > 1
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[::-1])
        assert state() != whole, f"{path}, relabelled"
        path.unlink()
        assert state() != whole, f"{path}, deleted"
        path.write_bytes(content)
        if path.suffix in IMAGE_ENDS:
            more = path.with_name(f"z{path.name}")
            more.write_bytes(content)
            assert state() != whole, f"{more}, added"
            more.unlink()
        assert state() == whole
    for also in LISTS.get((name, task), ()):
        path = root / also
        path.parent.mkdir(exist_ok=True)
        if path.suffix:
            path.write_text("{}")
        else:
            path.mkdir()
        assert state() != whole, f"{also}, added"
        whole = state()


@pytest.mark.parametrize(
    ("name", "spelt"),
    [("imagefolder", ["own", "own/", "./own", "own//."]), ("imagenet", [None, "imagenet", "./imagenet/"])],
)
def test_a_folder_is_one_however_it_is_spelt(name: str, spelt: list[str | None], tmp_path: Path) -> None:
    layouts.imagefolder(tmp_path, folder=spelt[0] or name)
    config = composed(f"dataset={name}", f"data_root={tmp_path}")
    datasets = [{**config["dataset"], "folder": folder, "image_size": 24, "num_classes": None} for folder in spelt]
    assert len({str(semantics({**config, "dataset": dataset})) for dataset in datasets}) == 1
    assert len({fingerprint.state_of(dataset, tmp_path, tmp_path / "cache").key for dataset in datasets}) == 1
    assert len({digest(dataset, tmp_path) for dataset in datasets}) == 1
