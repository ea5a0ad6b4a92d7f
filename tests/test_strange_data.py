"""Data as people bring them: what can be meant is read, all else is refused in one line that names the file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from kt.data import DATASETS, build_data, fingerprint, unlabelled
from kt.data.images import Labelled, check_split
from kt.errors import UserError
from kt.settings import defaults

MM = "mmdet and mmseg are not installed (bash install.sh full)"
Json = dict[str, Any]


def build(root: Path, settings: Json, **changes: Any) -> Any:
    whole = {"augmentation": "none", **settings, **changes}
    return build_data(whole, root, batch_size=2, seed=0, workers=0, cache_root=root / "cache")


def refusal(root: Path, settings: Json, *loaded: str) -> str:
    """Why data are refused when they are opened, or when these loaders of them are read."""
    with pytest.raises(UserError) as caught:
        data = build(root, settings)
        assert loaded, "nothing was refused"
        for name in loaded:
            list(getattr(data, name).epoch(0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_index(data: Any, key: str, part: str = "train") -> dict[int, Any]:
    """What batches have of each sample."""
    batches = getattr(data, part).epoch(0)
    return {int(i): x for batch in batches for i, x in zip(batch["indices"], batch[key], strict=True)}


def images_of(data: Any) -> dict[int, torch.Tensor]:
    return by_index(data, "inputs")


# ------------------------------------------------------------------------------------------------------------- pixels

DEEP = np.random.default_rng(0).integers(0, 1 << 16, (40, 40), np.uint16)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("end", ["png", "tif", "pgm"])
def test_of_16_bits_the_upper_8_count(resident: bool, end: str, tmp_path: Path) -> None:
    settings, found = layouts.imagefolder(tmp_path), []
    for values, name in ((DEEP, f"99.{end}"), ((DEEP >> 8).astype(np.uint8), "99.png")):
        path = tmp_path / "pets" / "train" / "cat" / name
        Image.fromarray(values).save(path)
        found.append(images_of(build(tmp_path, settings, resident=resident))[7])
        path.unlink()
    assert torch.equal(*found)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("values", [DEEP / np.float32(65535), DEEP.astype(np.int32)])
def test_pixels_of_no_known_range_are_refused(resident: bool, values: np.ndarray, tmp_path: Path) -> None:
    settings = {**layouts.imagefolder(tmp_path), "resident": resident}
    Image.fromarray(values).save(tmp_path / "pets" / "train" / "cat" / "9.tif")
    assert re.match(r".*cat/9.tif: its pixels are .*; expected 8 or 16 bits", refusal(tmp_path, settings, "train"))


CIFAR: list[tuple[Callable[[Json], Any], str]] = [
    (lambda c: c.update({b"data": c[b"data"] / 255}), r"/train: data are float64 \(20, 3072\); expected uint8"),
    (lambda c: c.update({b"data": c[b"data"].reshape(-1, 32, 32, 3)}), r"/train: data are uint8 \(20, 32, 32, 3\)"),
    (lambda c: c.update({b"data": c[b"data"].astype(int) + 1}), r"/train: data are int64 \(20, 3072\); expected uint8"),
    (lambda c: c[b"fine_labels"].pop(), r"/train: labels are int64 \(19,\) for 20 images; expected an integer for"),
    (lambda c: c[b"fine_labels"].append(0), r"/train: labels are int64 \(21,\) for 20 images"),
    (lambda c: c[b"fine_labels"].__setitem__(3, 20), r"/train: has the label 20; expected 0 to 19"),
    (lambda c: c[b"fine_labels"].__setitem__(3, -1), r"/train: has the label -1; expected 0 to 19"),
    (lambda c: c[b"fine_labels"].__setitem__(3, 0.5), r"/train: labels are float64"),
    (lambda c: c.update({b"data": None}), r"/train: data are object \(\)"),
]


@pytest.mark.parametrize(("spoil", "words"), CIFAR, ids=[words for _, words in CIFAR])
def test_arrays_that_are_no_images(spoil: Callable[[Json], Any], words: str, tmp_path: Path) -> None:
    settings = layouts.cifar100(tmp_path)
    path = tmp_path / "cifar-100-python" / "train"
    content = pickle.loads(path.read_bytes())
    spoil(content)
    path.write_bytes(pickle.dumps(content))
    assert re.search(words, refusal(tmp_path, settings))


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


HARM: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: Harm(path), "it names posix.mkdir, code"),
    (
        lambda path: {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [0], b"more": Harm(path)},
        "it names posix.mkdir",
    ),
    (lambda path: {b"data": np.array([Harm(path)], object)}, "an array of O8, which are no numbers"),
    (lambda path: {b"data": print}, r"it names \w+\.print"),
    (lambda path: [1], "has no attribute"),
]


@pytest.mark.parametrize("name", ["train", "meta"])
@pytest.mark.parametrize(("content", "words"), HARM, ids=[words for _, words in HARM])
def test_nothing_in_a_pickle_is_run(content: Callable[[Path], Any], words: str, name: str, tmp_path: Path) -> None:
    settings, trace = layouts.cifar100(tmp_path), tmp_path / "trace"
    for protocol in (0, 2, 5):
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(content(trace), protocol))
        told = refusal(tmp_path, settings)
        assert re.search(rf"/{name}: is no pickle of .*{words}", told) and "expected the official" in told
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("is_text", [True, False])
def test_pickles_of_every_protocol(is_text: bool, protocol: int, tmp_path: Path) -> None:
    settings, folder = layouts.cifar100(tmp_path), tmp_path / "cifar-100-python"
    wanted = build(tmp_path, settings)
    for name in ("train", "test", "meta"):
        content = pickle.loads((folder / name).read_bytes())
        if b"data" in content:
            content[b"data"] = np.asfortranarray(content[b"data"].astype(">i2"))
            content[b"fine_labels"] = list(np.array(content[b"fine_labels"]))
        if is_text:
            content = {key.decode(): value for key, value in content.items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    found = build(tmp_path, settings)
    assert found.spec == wanted.spec and all(map(torch.equal, images_of(found).values(), images_of(wanted).values()))
    assert by_index(found, "labels") == by_index(wanted, "labels")


def test_whole_numbers_of_any_type_are_pixels(tmp_path: Path) -> None:
    settings = layouts.cifar100(tmp_path)
    wanted, path = images_of(build(tmp_path, settings)), tmp_path / "cifar-100-python" / "train"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, b"data": content[b"data"].reshape(-1, 3, 32, 32).tolist()}))
    found = images_of(build(tmp_path, settings))
    assert all(torch.equal(found[index], image) for index, image in wanted.items())


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), [0, 1], r"ours: images are uint8 \(2, 3, 8, 8\); expected uint8 \(n,"),
        (np.zeros((2, 8, 8, 3), np.float32), [0, 1], r"ours: images are float32 \(2, 8, 8, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0], r"ours: labels are int64 \(1,\) for 2 images"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 2], r"ours: has the label 2; expected 0 to 1"),
        (None, [1, -1], r"ours: has the label -1; expected 0 to 1"),
    ],
)
def test_what_readers_give_is_checked(images: Any, labels: list[int], words: str) -> None:
    part = [(Path("x.png"), label) for label in labels] if images is None else Labelled(images, np.array(labels))
    with pytest.raises(UserError, match=f"^{words}"):
        check_split(part, 2, "ours")


@pytest.mark.parametrize("names", ["abcdefghijklmnopqrst", {str(i): i for i in range(20)}])
def test_names_of_classes_are_a_list(names: Any, tmp_path: Path) -> None:
    """Of a text each letter would be a class."""
    settings = layouts.cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}))
    assert "expected a list of names, it is a" in refusal(tmp_path, settings)


@pytest.mark.parametrize("size", [10**15, 10**18])
@pytest.mark.parametrize("name", ["scenes", "scenes_kinds"])
def test_more_images_than_memory(name: str, size: int, tmp_path: Path) -> None:
    settings = {**layouts.make(name, "classification", tmp_path), "train_size": size}
    assert re.search(rf"^dataset.train_size={size}, .*do not fit into the memory \(", refusal(tmp_path, settings))


def test_one_class_is_none_to_tell_apart(tmp_path: Path) -> None:
    settings = layouts.imagefolder(tmp_path, {"train": {"cat": 2}, "val": {"cat": 2}})
    assert "has one class, cat; expected several" in refusal(tmp_path, settings)


@pytest.mark.parametrize(
    ("name", "place"), [("imagefolder", "pets/train/cat/0.png"), ("cifar100", "cifar-100-python/meta")]
)
def test_a_pipe_is_no_file(name: str, place: str, tmp_path: Path) -> None:
    """Whoever opens one waits for a writer."""
    settings = layouts.make(name, "classification", tmp_path)
    (tmp_path / place).unlink()
    os.mkfifo(tmp_path / place)
    whole = {**defaults(DATASETS[name].settings), "augmentation": "none", **settings}
    with pytest.raises(UserError, match=rf"{place}: cannot be read \(is a pipe, no file\)"):
        fingerprint.state_of(whole, tmp_path, tmp_path / "cache")
    if name == "imagefolder":
        assert re.search(r"cat/0.png: cannot be read as an image \(is a pipe, no file\)", refusal(tmp_path, settings))


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_set_without_images_is_refused(part: str, tmp_path: Path) -> None:
    settings = layouts.cifar100(tmp_path)
    path = tmp_path / "cifar-100-python" / part
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, b"data": content[b"data"][:0], b"fine_labels": []}))
    words = {"train": "dataset: there are no training images", "test": "dataset.name=cifar100: has no test images"}
    assert words[part] in refusal(tmp_path, settings)


# -------------------------------------------------------------------------------------------------------------- files

FILES = {"imagefolder": "pets/train/cat/0.png", "segfolder": "street/images/train/0.jpg", "coco": "pets/train/0.jpg"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_whoever_reads_it(name: str, workers: int, tmp_path: Path) -> None:
    (task,) = DATASETS[name].readers
    if task != "classification":
        pytest.importorskip("mmdet", reason=MM)
    settings = {**layouts.make(name, task, tmp_path), "resident": False, "augmentation": "none"}
    path = tmp_path / FILES[name]
    Image.fromarray(DEEP.astype(np.uint8)).convert("RGB").resize((64, 32)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    data = build_data(settings, tmp_path, batch_size=2, seed=0, workers=workers)
    with pytest.raises(UserError) as caught:
        list(data.train.plain().epoch(0))
    assert re.fullmatch(rf"{path}: cannot be read as an image \([^\n]+\)", str(caught.value)), str(caught.value)


def bomb(path: Path, side: int = 100_000) -> None:
    """Writes the head of a PNG of far more pixels than there are bytes."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    made = [struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(made))


BOMBS = {
    "imagefolder": "pets/train/cat/0.png",
    "segfolder": "street/labels/train/1.png",
    "depthfolder": "rooms/depth/train/1.png",
    "gta5": "gta5/images/00001.png",
}


@pytest.mark.parametrize("resident", [None, False])
@pytest.mark.parametrize("name", BOMBS)
def test_an_image_that_would_fill_the_memory_is_refused(name: str, resident: bool | None, tmp_path: Path) -> None:
    (task,) = DATASETS[name].readers
    if task != "classification":
        pytest.importorskip("mmdet", reason=MM)
    settings = {**layouts.make(name, task, tmp_path), "resident": resident}
    bomb(tmp_path / BOMBS[name])
    told = refusal(tmp_path, {"augmentation": "none", **settings}, "train")
    assert str(tmp_path / BOMBS[name]) in told and ("decompression bomb" in told or "pixels" in told), told


@pytest.mark.parametrize(
    ("name", "place"),
    [("imagefolder", "pets/train/cat"), ("unlabelled", "web/b"), ("cityscapes", "cityscapes/leftImg8bit/train/ulm")],
)
def test_a_folder_that_may_not_be_read_is_named(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "unlabelled":
        for path in ("web/a/0.png", "web/b/1.png"):
            layouts.picture(tmp_path / path)
        settings: Json = {"name": name, "task": "classification", "folder": "web", "image_size": 24}
    else:
        task = next(iter(DATASETS[name].readers))
        if task != "classification":
            pytest.importorskip("mmdet", reason=MM)
        settings = layouts.make(name, task, tmp_path)
    scan = os.scandir

    def forbidden(path: Any) -> Any:
        if Path(path) == tmp_path / place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    whole = {**defaults(DATASETS[name].settings), "augmentation": "none", **settings}
    for look in (
        lambda: unlabelled(whole, 1.0, tmp_path, batch_size=2, seed=0),
        lambda: fingerprint.state_of(whole, tmp_path, tmp_path / "cache"),
    ):
        with pytest.raises(UserError, match=rf"^{tmp_path / place}: cannot be read \(Permission denied\)$"):
            look()


# -------------------------------------------------------------------------------------------------- maps and depth


def turn(path: Path, how: int = 6) -> None:
    """Gives an image file an EXIF tag by which it is to be turned."""
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = how
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=tag)


def label_of(root: Path, split: str = "train", number: int = 1, folder: str = "street/labels") -> Path:
    return root / folder / split / f"{number}.png"


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with Image.open(path) as image:
        values = np.asarray(image)
    Image.fromarray(np.ascontiguousarray(change(values))).save(path)


def halve(values: np.ndarray) -> np.ndarray:
    return values[::2, ::2]


def colour(values: np.ndarray) -> np.ndarray:
    return np.dstack([values] * 3)


MAPS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda r: turn(r / "street/images/train/0.jpg"), r"train/0.png: has 32 x 64 pixels; its image 0.jpg has 64 x 32"),
    (
        lambda r: Image.new("L", (64, 32)).save(label_of(r), "JPEG"),
        r"train/1.png: is a JPEG, which does not keep ids; expected a PNG",
    ),
    (
        lambda r: shutil.copy(r / "street/images/train/0.jpg", r / "street/images/train/0.jpeg"),
        r"train/0.png: would be the truth of 0.jpeg and of 0.jpg; expected one image",
    ),
    (lambda r: rewrite(label_of(r), np.transpose), r"train/1.png: has 64 x 32 pixels; its image 1.png has 32 x 64"),
    (lambda r: rewrite(label_of(r, "val"), halve), r"val/1.png: has 16 x 32 pixels; its image 1.png has 32 x 64"),
    (lambda r: rewrite(label_of(r, "val"), colour), r"val/1.png: has 3 channels; expected one"),
    (lambda r: rewrite(label_of(r), lambda x: x.astype(np.uint16) + 257), r"train/1.png: holds the id 512; expected"),
    (
        lambda r: [rewrite(path, lambda x: (x > 1).astype(np.uint8) * 255) for path in r.glob("street/labels/*/*")],
        r"labels/train: the label maps hold one id that counts, 0; expected two classes .*white has to become 1",
    ),
]


@pytest.mark.parametrize(("spoil", "words"), MAPS, ids=[words for _, words in MAPS])
def test_label_maps_that_are_none(spoil: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.segfolder(tmp_path)
    spoil(tmp_path)
    assert re.search(words, refusal(tmp_path, settings))


def test_ids_that_training_has_not_seen_are_named(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.segfolder(tmp_path)
    rewrite(label_of(tmp_path, "val"), lambda x: x * 0 + np.uint8(12))
    assert "val/1.png: holds the id 12; expected 0 to 11, 255" in refusal(tmp_path, settings, "test")


def test_black_and_white_masks_of_named_classes_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.segfolder(tmp_path, {"classes": ["background", "road"]})
    for path in tmp_path.glob("street/labels/*/*"):
        rewrite(path, lambda x: (x > 1).astype(np.uint8) * 255)
    assert "expected two classes or more" in refusal(tmp_path, settings)


def maps_of(data: Any) -> dict[int, torch.Tensor]:
    return {index: sample.gt_sem_seg.data for index, sample in by_index(data, "data_samples").items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda values: Image.fromarray(values.astype(np.uint16)),
        lambda values: Image.fromarray(values, "L").convert("P"),
    ],
    ids=["16 bit", "palette"],
)
def test_ids_in_other_kinds_of_files(change: Callable[[np.ndarray], Image.Image], tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.segfolder(tmp_path)
    wanted, path = maps_of(build(tmp_path, settings)), label_of(tmp_path)
    with Image.open(path) as image:
        values = np.asarray(image)
    change(values).save(path)
    found = maps_of(build(tmp_path, settings))
    assert all(torch.equal(found[index], ids) for index, ids in wanted.items())


@pytest.mark.parametrize("how", [3, 6])
def test_each_file_is_turned_by_its_own_tag(how: int, tmp_path: Path) -> None:
    """A sample with both tags is the one of both files turned by hand."""
    pytest.importorskip("mmdet", reason=MM)
    settings, found = {**layouts.segfolder(tmp_path), "image_size": [64, 32]}, []
    pair = (tmp_path / "street/images/train/1.png", label_of(tmp_path))
    for path in pair:
        turn(path, how)
    data = build(tmp_path, settings)
    found.append((images_of(data)[1], maps_of(data)[1]))
    for path in pair:
        rewrite(path, lambda x: np.rot90(x, {3: 2, 6: -1}[how]))
    data = build(tmp_path, settings)
    found.append((images_of(data)[1], maps_of(data)[1]))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_official_maps_are_as_large_as_their_images_and_of_their_ids(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.gta5(tmp_path)
    rewrite(tmp_path / "gta5/labels/00001.png", lambda x: x[:17])
    assert "labels/00001.png: has 17 x 34 pixels; its image has 34 x 34" in refusal(tmp_path, settings, "train", "test")
    settings = layouts.cityscapes(tmp_path)
    (path,) = tmp_path.glob("cityscapes/gtFine/train/ulm/*")
    rewrite(path, lambda x: x + 8)
    assert f"{path}: holds the id 19; expected 0 to 18, 255" in refusal(tmp_path, settings, "train")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: rewrite(label_of(root, "val", 1, "rooms/depth"), lambda x: x[::2]), r"val/1.png: has 12 x 32 pi"),
        (
            lambda root: turn(root / "rooms/images/val/0.jpg"),
            r"val/0.png: has 24 x 32 pixels; its image 0.jpg has 32 x",
        ),
    ],
)
def test_depth_is_as_large_as_its_image(spoil: Any, words: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.depthfolder(tmp_path)
    spoil(tmp_path)
    assert re.search(words, refusal(tmp_path, settings))


@pytest.mark.parametrize("how", [3, 6])
def test_depth_is_turned_by_its_own_tag(how: int, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings, found = layouts.depthfolder(tmp_path), []
    pair = (tmp_path / "rooms/images/train/1.png", label_of(tmp_path, folder="rooms/depth"))
    for change in (lambda path: turn(path, how), lambda path: rewrite(path, lambda x: np.rot90(x, {3: 2, 6: -1}[how]))):
        for path in pair:
            change(path)
        data = build(tmp_path, settings)
        found.append((images_of(data)[1], by_index(data, "data_samples")[1].gt_depth))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_depth_that_nobody_has_measured(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.depthfolder(tmp_path)
    for number in range(4):
        rewrite(label_of(tmp_path, number=number, folder="rooms/depth"), lambda x: x * 0)
    assert "rooms/depth/train: no pixel has a depth; expected millimetres" in refusal(tmp_path, settings)


def test_depth_that_is_no_distance(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.nyuv2(tmp_path)
    import h5py

    (path,) = tmp_path.glob("nyudepthv2/train/kitchen*/*")
    with h5py.File(path, "r+") as file:
        file["depth"][20, 30] = -1.0
    assert f"{path}: holds depth below 0 (-1.0)" in refusal(tmp_path, settings, "train")


def test_pedestrians_of_larger_images(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.citypersons(tmp_path)
    for path in tmp_path.glob("cityscapes/leftImg8bit/train/*/*.png"):
        rewrite(path, lambda x: x[::4, ::4])
    words = r"anno_train.mat: 4 of 6 pedestrians are outside images of 8 x 16 pixels, as \S*ulm"
    assert re.search(words, refusal(tmp_path, settings))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_of_few_bits_are_what_they_are(bits: int, tmp_path: Path) -> None:
    """Pillow's reader of PNGs makes the largest of 2 and 4 bits white; its writer has no such files."""
    read_ids = pytest.importorskip("kt.data.dense_source", reason=MM).read_ids
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4) % 2**bits
    lines = ["".join(f"{each:0{bits}b}" for each in line).ljust(16, "0") for line in ids]
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 4, 3, bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(
            b"".join(b"\0" + int(line, 2).to_bytes(2, "big")[: -(-4 * bits // 8)] for line in lines)
        ),
        b"IEND": b"",
    }
    chunks = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts.items())
    (tmp_path / "ids.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert read_ids(str(tmp_path / "ids.png")).tolist() == ids.tolist()


def test_label_maps_of_which_no_pixel_counts(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.segfolder(tmp_path)
    for path in tmp_path.glob("street/labels/val/*"):
        rewrite(path, lambda x: x * 0 + np.uint8(255))

    class Student(torch.nn.Module):
        def predict(self, batch: Any) -> Any:
            for sample in batch["data_samples"]:
                sample.pred_sem_seg = sample.gt_sem_seg
            return batch["data_samples"]

    with pytest.raises(UserError, match="^dataset: no pixel of the test images' label maps counts$"):
        build(tmp_path, settings).score(Student())


@pytest.mark.parametrize(
    "changes",
    [
        *({"classes": ["a"] * 12}, {"ignore_index": 254.5}, {"ignore_index": float("inf")}, {"ignore_index": None}),
        *({"classes": [*"abcdefghijk", None]}, {"classes": "abcdefghijkl"}, {"ignore_idx": 11}),
    ],
    ids=str,
)
def test_classes_that_are_none(changes: Json, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.segfolder(tmp_path, {"classes": [*"abcdefghijkl"], **changes})
    reason = r"classes.json: cannot be read \((two classes have one name, or|the classes are no list|it has the key)"
    assert re.search(reason, refusal(tmp_path, settings))


def test_dense_images_of_16_bits_and_of_no_known_range(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings, path, found = layouts.segfolder(tmp_path), tmp_path / "street/images/train/1.png", []
    deep = np.random.default_rng(0).integers(0, 1 << 16, (32, 64), np.uint16)
    for values in (deep, (deep >> 8).astype(np.uint8)):
        Image.fromarray(values).save(path)
        found.append(images_of(build(tmp_path, settings))[1])
    assert torch.equal(*found)
    path.unlink()
    Image.fromarray(deep / np.float32(65535)).save(path.with_suffix(".tif"))
    assert "1.tif: its pixels are floating point numbers" in refusal(tmp_path, settings, "train")


# --------------------------------------------------------------------------------------------------------------- COCO


def change_coco(root: Path, change: Callable[[Json], Any], split: str = "train") -> Json:
    settings = layouts.coco(root)
    path = root / "pets" / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(content).encode())
    return settings


def each(part: str, **values: Any) -> Callable[[Json], None]:
    """Changes a key of all rows of a part; None takes it away."""

    def change(content: Json) -> None:
        for row in content[part]:
            for key, made in values.items():
                row.pop(key) if made is None else row.update({key: made(row[key])})

    return change


def both(*changes: Callable[[Json], Any]) -> Callable[[Json], None]:
    def change(content: Json) -> None:
        for one in changes:
            one(content)

    return change


SAME: dict[str, Callable[[Json], Any]] = {
    "categories with texts as ids": both(each("categories", id=str), each("annotations", category_id=str)),
    "the same in one place only": each("categories", id=str),
    "whole numbers as floats": each("annotations", category_id=float, image_id=float),
    "images with texts as ids": both(each("images", id=str), each("annotations", image_id=str)),
    "annotations without ids": each("annotations", id=None),
    "sizes as floats": each("images", height=float, width=float),
    "a byte order mark": lambda content: b"\xef\xbb\xbf" + json.dumps(content).encode(),
    "categories in another order": lambda content: content["categories"].reverse(),
}


def boxes_of(data: Any) -> list[Any]:
    samples = [sample.gt_instances for sample in by_index(data, "data_samples", "test").values()]
    return [(sample.bboxes.tensor.tolist(), sample.labels.tolist()) for sample in samples]


@pytest.mark.parametrize("what", SAME)
def test_files_of_other_hands_that_mean_the_same(what: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    wanted = boxes_of(build(tmp_path, layouts.coco(tmp_path)))
    assert wanted[0] == ([[2, 3, 22, 15], [5, 3, 25, 15]], [0, 1])
    assert boxes_of(build(tmp_path, change_coco(tmp_path, SAME[what], "val"))) == wanted


def test_boxes_are_those_that_mmdet_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which leaves out what is smaller than a pixel or lies outside, as is told, or is marked so."""
    pytest.importorskip("mmdet", reason=MM)
    from mmdet.datasets import CocoDataset

    own = [([60, 3, 20, 12], {}), ([64, 3, 20, 12], {}), ([-5, -5, 5, 5], {}), ([-5, -5, 6.5, 7], {})]
    own += [([1, 2, 0.5, 9], {}), ([1, 2, 1, 9], {"area": 0}), ([1, 2, 3, 4], {"ignore": 1}), ([1, 2, 3, 4], {})]
    rows = [
        {"id": 50 + i, "image_id": 8, "category_id": 9, "bbox": box, "area": 5, "iscrowd": i == 7, **more}
        for i, (box, more) in enumerate(own)
    ]
    settings = change_coco(tmp_path, lambda content: content["annotations"].extend(rows))
    file, folder = tmp_path / "pets/annotations/instances_train.json", tmp_path / "pets/train"
    theirs = CocoDataset(
        ann_file=str(file), data_prefix={"img": str(folder)}, metainfo={"classes": ("cat", "dog")}, test_mode=True
    )
    ours = build(tmp_path, settings).train.dataset
    assert re.search(r"instances_train.json: 4 of 1\d boxes are left out", caplog.text)
    assert len(ours) == len(theirs) == 3 and len(ours.get_data_info(1)["instances"]) == 5
    for number in range(3):
        wanted = theirs.get_data_info(number)
        assert {key: ours.get_data_info(number)[key] for key in wanted if key != "seg_map_path"} == {
            key: value for key, value in wanted.items() if key != "seg_map_path"
        }


FAULTS: list[tuple[Callable[[Json], Any], str]] = [
    (lambda c: c.update(annotations=None), r"\(annotations is no list of objects\)"),
    (lambda c: c["images"].append(None), r"\(images is no list of objects\)"),
    (lambda c: b"[]", r"\(categories is no list of objects; images is .*; annotations is"),
    (lambda c: b"[" * 100_000, r"is not in COCO's form \("),
    (lambda c: c["annotations"][1]["bbox"].pop(), r"annotation id=1 bbox=\[3, 3, 20\], not x, y, width, height"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), r"id=1 bbox=\[1, 2, 3, nan\], not x, y"),
    (lambda c: c["annotations"][1].update(bbox=None), r"id=1 bbox=None, not x, y"),
    (lambda c: c["annotations"][1].pop("area"), r"id=1 area=None, not a number"),
    (lambda c: c["annotations"][1].update(category_id=5), r"id=1 image_id=8 category_id=5, not an image and a categ"),
    (lambda c: c["annotations"][1].update(image_id=77), r"id=1 image_id=77 category_id=9, not an image and a categ"),
    (lambda c: c["images"][1].update(id=7), r"image id=7 file_name='1.jpg', not an id of its own"),
    (lambda c: c["images"][1].update(file_name="0.jpg"), r"image id=8 file_name='0.jpg', not a file of its own"),
    (lambda c: c["annotations"][1].update(area=10**400), r"id=1 area=10+\.\.\.0+, not a number"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, 10**30]), r"id=1 bbox=\[1, 2, 3, 10+\], not x, y"),
    (lambda c: c["annotations"][1].update(bbox=[1, 2, 1e300, 9]), r"id=1 bbox=\[1, 2, 1e\+300, 9\], not x, y"),
    (lambda c: c["annotations"][1].update(iscrowd="0"), r"id=1 iscrowd='0', neither 0 nor 1"),
    (lambda c: c["annotations"][1].update(iscrowd=[0]), r"id=1 iscrowd=\[0\], neither 0 nor 1"),
    (lambda c: c["annotations"][1].update(ignore="false"), r"id=1 ignore='false', neither 0 nor 1"),
    (lambda c: c["images"][1].pop("id"), r"image id=None file_name='1.jpg', not an id of its own"),
    (lambda c: c["images"][1].pop("width"), r"id=8 file_name='1.jpg' height=32 width=None, not a name and a size"),
    (lambda c: c["images"][1].update(height=0), r"height=0 width=64, not a name and a size"),
    (lambda c: c["categories"][1].update(name="cat"), r"category id=9 name='cat', not an id and a name of its own"),
    (each("annotations", category_id=lambda _: 0), r"id=0 .*; .*id=1 .*; .*id=2 .* and 3 more\); expected"),
    (lambda c: c["annotations"].clear(), r"instances_{split}.json: holds no boxes that count"),
    (each("annotations", iscrowd=lambda _: 1), r"instances_{split}.json: holds no boxes that count"),
]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("change", "words"), FAULTS, ids=[words for _, words in FAULTS])
def test_files_that_are_not_in_cocos_form(change: Any, words: str, split: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    told = refusal(tmp_path, change_coco(tmp_path, change, split))
    assert f"instances_{split}.json: " in told and re.search(words.replace("{split}", split), told), told


def test_boxes_of_none_of_a_datasets_classes(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.cityscapes(tmp_path, "instanceIds")
    images = [{"id": 1, "file_name": "ulm/ulm_000000_000019_leftImg8bit.png", "height": 32, "width": 64}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 20, 12], "area": 240}]
    path = tmp_path / "cityscapes" / "annotations" / "instances_train.json"
    path.parent.mkdir()
    for name, is_known in (("Car", False), ("car", True)):
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": name}]}
        path.write_text(json.dumps(content))
        if is_known:
            build(tmp_path, settings)
        else:
            assert f"{path}: holds no boxes of person, rider, car" in refusal(tmp_path, settings)


def test_instances_are_turned_with_their_image(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.cityscapes(tmp_path, "instanceIds")
    for path in tmp_path.rglob("*ulm*.png"):
        turn(path, 3)
    boxes = by_index(build(tmp_path, settings), "data_samples")[1].gt_instances.bboxes.tensor
    assert boxes[0].tolist() == [48, 12, 56, 28]


def test_boxes_are_of_images_of_that_size(tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = change_coco(tmp_path, lambda c: c["images"][1].update(height=64, width=32))
    assert "1.jpg: has 32 x 64 pixels; its annotations are of 64 x 32 pixels" in refusal(tmp_path, settings, "train")


# ------------------------------------------------------------------------------------------------------------ folders


def hide(folder: Path) -> None:
    """What editors and other systems leave behind."""
    for name in (".ipynb_checkpoints/0.png", "._0.jpg", "._0.png", ".DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\26\7")


@pytest.mark.parametrize("name", ["imagefolder", "segfolder", "gta5", "tiny_imagenet"])
def test_hidden_files_and_folders_are_nobodys(name: str, tmp_path: Path) -> None:
    (task,) = DATASETS[name].readers
    if task != "classification":
        pytest.importorskip("mmdet", reason=MM)
    settings = {"folder": None, **DATASETS[name].defaults, "num_classes": None, **layouts.make(name, task, tmp_path)}

    def read() -> tuple[dict[int, torch.Tensor], Any]:
        fingerprint.forget()
        return images_of(build(tmp_path, settings)), fingerprint.state_of(settings, tmp_path, tmp_path).summary

    wanted, state = read()
    for folder in [path for path in (tmp_path).glob("*/**/") if path.parent != tmp_path]:
        hide(folder)
    found, after = read()
    assert found.keys() == wanted.keys() and all(torch.equal(found[index], wanted[index]) for index in wanted)
    assert after == state


def test_images_that_nobody_would_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = layouts.imagefolder(tmp_path)
    train = tmp_path / "pets" / "train"
    layouts.picture(train / "cat" / "more" / "deep" / "0.png")
    assert f"{train}/cat/more: its 1 images would not be read; expected" in refusal(tmp_path, settings)
    (train / "cat" / "more" / "deep" / "0.png").unlink()
    for split in ("train", "val"):
        (tmp_path / "pets" / split / "emu").mkdir()
    assert f"the class {train}/emu has no images" in refusal(tmp_path, settings)
    for place in (train / "emu", train):
        layouts.picture(place / "0.png")
        (place / "notes.gif").write_text("")
    build(tmp_path, settings)
    assert [record.getMessage() for record in caplog.records] == [
        f"{train}: 3 files are no images that are read, such as {train}/0.png",
        f"{tmp_path}/pets/val: no images of emu",
    ]


def test_what_is_passed_over_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mmdet", reason=MM)
    settings = layouts.segfolder(tmp_path)
    place = tmp_path / "street" / "images" / "train"
    (place / "0.npy").write_text("")
    layouts.picture(tmp_path / "street/labels/train/77.png")
    build(tmp_path, settings)
    assert [record.getMessage() for record in caplog.records] == [
        f"{place}: 1 files are no images that are read, such as {place}/0.npy",
        f"{tmp_path}/street/labels/train: 1 files belong to no image, such as {tmp_path}/street/labels/train/77.png",
    ]
    layouts.picture(place / "aachen" / "0.png")
    assert f"{place}/aachen: its 1 images would not be read" in refusal(tmp_path, settings)


def test_all_images_of_a_folder_but_hidden_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/0.png", "b/c/1.png"):
        layouts.picture(tmp_path / "web" / name)
    hide(tmp_path / "web" / "a")
    (tmp_path / "web" / "list.txt").write_text("")
    settings = {"name": "unlabelled", "task": "classification", "folder": "web", "image_size": 24}
    settings |= {"augmentation": "none"}
    loader = unlabelled(settings, 1.0, tmp_path, batch_size=2, seed=0, workers=0)
    assert sorted(int(i) for batch in loader.plain().epoch(0) for i in batch["indices"]) == [0, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/web: 1 files are no images that are read, such as {tmp_path}/web/list.txt"
    ]
