"""Datasets whose images, classes and splits stand in lists: small folders in the layouts that are handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kt.data import image_lists
from kt.data.fingerprint import state_of
from kt.data.images import image_data
from kt.data.names import DATASETS, read_dataset
from kt.errors import UserError
from kt.settings import Dataset, defaults

# Dataset -> its lists and images; of every text file the content, of every image its mode. Orders are odd on purpose.
FILES: dict[str, dict[str, str]] = {
    "cub200": {
        "CUB_200_2011/classes.txt": "1 001.Albatross\n2 002.Auklet\n",
        "CUB_200_2011/images.txt": "".join(
            f"{number} {path}.jpg\n"
            for number, path in enumerate(("001.Albatross/a", "001.Albatross/b", "002.Auklet/c", "002.Auklet/d"), 1)
        ),
        "CUB_200_2011/image_class_labels.txt": "4 2\n3 2\n2 1\n1 1\n",
        "CUB_200_2011/train_test_split.txt": "1 0\n2 1\n3 1\n4 1\n",
        "CUB_200_2011/images/001.Albatross/a.jpg": "RGB",
        "CUB_200_2011/images/001.Albatross/b.jpg": "L",
        "CUB_200_2011/images/002.Auklet/c.jpg": "RGB",
        "CUB_200_2011/images/002.Auklet/d.jpg": "RGB",
        "CUB_200_2011/images/002.Auklet/unlisted.jpg": "RGB",
    },
    "stanford40": {
        "Stanford40/ImageSplits/actions.txt": "action_name\tnumber_of_images\napplauding\t3\nfixing_a_bike\t2\n",
        "Stanford40/ImageSplits/train.txt": "fixing_a_bike_002.jpg\napplauding_001.jpg\napplauding_003.jpg\n",
        "Stanford40/ImageSplits/test.txt": "applauding_002.jpg\n",
        "Stanford40/JPEGImages/applauding_001.jpg": "RGB",
        "Stanford40/JPEGImages/applauding_002.jpg": "RGB",
        "Stanford40/JPEGImages/applauding_003.jpg": "CMYK",
        "Stanford40/JPEGImages/fixing_a_bike_002.jpg": "RGB",
    },
    "mit67": {
        "mit67/TrainImages.txt": "bar/b one.jpg\nairport_inside/a.jpg\r\nbar/c_gif.JPG\n",
        "mit67/TestImages.txt": "airport_inside/d.jpg\n",
        "mit67/Images/airport_inside/a.jpg": "RGB",
        "mit67/Images/airport_inside/d.jpg": "RGB",
        "mit67/Images/bar/b one.jpg": "RGBA",
        "mit67/Images/bar/c_gif.JPG": "P",
    },
    "domainnet": {
        "domainnet/painting_train.txt": "painting/zebra/a.jpg 1\npainting/axe/b.jpg 0\npainting/axe/c.png.TIF 0\n",
        "domainnet/painting_test.txt": "painting/zebra/d.jpg 1\n",
        "domainnet/painting/zebra/a.jpg": "RGB",
        "domainnet/painting/zebra/d.jpg": "RGB",
        "domainnet/painting/axe/b.jpg": "RGB",
        "domainnet/painting/axe/c.png.TIF": "L",
    },
    "tiny_imagenet": {
        "tiny-imagenet-200/wnids.txt": "n02\nn01",
        "tiny-imagenet-200/val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t62\t63\n",
        "tiny-imagenet-200/train/n02/images/n02_0.JPEG": "RGB",
        "tiny-imagenet-200/train/n02/n02_boxes.txt": "n02_0.JPEG\t0\t0\t62\t63\n",
        "tiny-imagenet-200/train/n01/images/n01_0.JPEG": "L",
        "tiny-imagenet-200/train/n01/images/n01_1.JPEG": "RGB",
        "tiny-imagenet-200/train/n01/images/list.txt": "no image\n",
        "tiny-imagenet-200/val/images/val_0.JPEG": "RGB",
    },
}
# Classes, and the names and labels of both splits.
FOUND: dict[str, tuple[tuple[str, ...], list[tuple[str, int]], list[tuple[str, int]]]] = {
    "cub200": (("001.Albatross", "002.Auklet"), [("b.jpg", 0), ("c.jpg", 1), ("d.jpg", 1)], [("a.jpg", 0)]),
    "stanford40": (
        ("applauding", "fixing_a_bike"),
        [("fixing_a_bike_002.jpg", 1), ("applauding_001.jpg", 0), ("applauding_003.jpg", 0)],
        [("applauding_002.jpg", 0)],
    ),
    "mit67": (("airport_inside", "bar"), [("b one.jpg", 1), ("a.jpg", 0), ("c_gif.JPG", 1)], [("d.jpg", 0)]),
    "domainnet": (("axe", "zebra"), [("a.jpg", 1), ("b.jpg", 0), ("c.png.TIF", 0)], [("d.jpg", 1)]),
    "tiny_imagenet": (("n01", "n02"), [("n01_0.JPEG", 0), ("n01_1.JPEG", 0), ("n02_0.JPEG", 1)], [("val_0.JPEG", 1)]),
}


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image_lists.CLEANED, "painting", 3)


def make(root: Path, name: str, changes: dict[str, str | None] | None = None) -> Path:
    """A dataset's folder, with other files than its own if given; None leaves one out."""
    for number, (file, content) in enumerate({**FILES[name], **(changes or {})}.items()):
        if content is None:
            continue
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".txt"):
            (root / file).write_bytes(content.encode())
        else:
            pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
            form = {"P": "GIF", "RGBA": "PNG"}.get(content, "JPEG")
            Image.fromarray(pixels).convert(content).save(root / file, form)
    return root


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**defaults(Dataset), **DATASETS[name].defaults, "name": name, "num_classes": None, **changes}


@pytest.mark.parametrize("name", FILES)
def test_classes_images_and_splits_are_those_of_the_lists(tmp_path: Path, name: str) -> None:
    root, config = make(tmp_path, name), config_of(name, image_size=16)
    read = read_dataset(config, root, None)
    parts = [[(path.name, label) for path, label in part] for part in (read.train, read.test)]
    assert (read.class_names, *parts) == FOUND[name]
    options: dict[str, Any] = {"batch_size": 3, "seed": 0, "device": "cpu", "device_batch": None}
    data = image_data(config, root, None, **options, rank=0, world=1, workers=0)
    (batch,) = data.train.epoch(0)
    assert batch["inputs"].shape == (3, 3, 16, 16) and (data.spec.train_size, data.spec.test_size) == (3, 1)


@pytest.mark.parametrize("place", ["splits", "image_list"])
def test_lists_may_lie_beside_the_domains(tmp_path: Path, place: str) -> None:
    changes: dict[str, str | None] = {}
    for split in ("train", "test"):
        file = f"domainnet/painting_{split}.txt"
        changes |= {file: None, f"domainnet/{place}/painting_{split}.txt": FILES["domainnet"][file]}
    read = read_dataset(config_of("domainnet"), make(tmp_path, "domainnet", changes), None)
    assert read.class_names == FOUND["domainnet"][0]
    assert [label for _, label in read.train] == [1, 0, 0]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        *(
            (name, {file: None}, "there is no .*" + Path(file).name)
            for name in FILES
            for file in FILES[name]
            if ("boxes" not in file and "list" not in file and "/train/" not in file)
        ),
        *((name, {file: ""}, f"{Path(file).name} is empty") for name in FILES for file in list(FILES[name])[:2]),
        (
            "cub200",
            {"CUB_200_2011/train_test_split.txt": "1 0\n2 1\n4 1\n"},
            "train_test_split.txt has no line for image 3",
        ),
        ("cub200", {"CUB_200_2011/images.txt": "1\n"}, "images.txt: line 1 has one column, not two"),
        (
            "cub200",
            {"CUB_200_2011/image_class_labels.txt": "1 1\n2 1\n3 2\n4 3\n"},
            "d.jpg is of '3', .* none of the 2 classes",
        ),
        ("cub200", {"CUB_200_2011/train_test_split.txt": "1 1\n2 1\n3 1\n4 1\n"}, "images.txt names no images"),
        ("stanford40", {"Stanford40/ImageSplits/train.txt": "flying_001.jpg"}, "flying_001.jpg is of 'flying'"),
        ("mit67", {"mit67/TestImages.txt": "bar/a.gif"}, r"bar/a\.gif does not end as an image does"),
        ("mit67", {"mit67/TestImages.txt": "attic/a.jpg"}, "attic/a.jpg is of 'attic'"),
        ("domainnet", {"domainnet/painting_train.txt": "painting/axe/b.jpg 0\n"}, "names 1 images, the cleaned list 3"),
        (
            "domainnet",
            {"domainnet/painting_train.txt": "painting/axe/b.jpg 0\n" * 2 + "painting/zebra/a.jpg 2"},
            "label '2', but 2 classes",
        ),
        ("tiny_imagenet", {"tiny-imagenet-200/train/n02/images/n02_0.JPEG": None}, "no images in .*n02/images"),
    ],
)
def test_mistakes_are_one_line_with_the_layout(
    tmp_path: Path, name: str, changes: dict[str, str | None], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_dataset(config_of(name), make(tmp_path, name, changes), None)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("data_root=") and "or use scale=mini" in message
    assert f"expected {Path(next(iter(FILES[name]))).parts[0]}/{{" in message and "http" in message


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = make(tmp_path, "mit67")
    (root / "mit67/Images/bar/b one.jpg").write_text("no image")
    options: dict[str, Any] = {"batch_size": 3, "seed": 0, "device": "cpu", "device_batch": None}
    with pytest.raises(UserError, match=r"b one\.jpg: cannot be read as an image"):
        image_data(config_of("mit67"), root, None, **options, rank=0, world=1, workers=0)


@pytest.mark.parametrize("domain", [None, "sketch"])
def test_a_domain_without_a_cleaned_count_is_refused(tmp_path: Path, domain: str | None) -> None:
    with pytest.raises(UserError, match=f"dataset.domain={domain}: expected one of clipart, painting, real"):
        read_dataset(config_of("domainnet", domain=domain), tmp_path, None)


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_read_tells_of_the_state_of_the_data(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt.data.fingerprint.REUSED", 0)
    root = make(tmp_path, name)
    before = state_of(config_of(name), root, tmp_path / "cache").summary
    for file in FILES[name]:
        content = (root / file).read_bytes()
        (root / file).write_bytes(content[::-1])
        after = state_of(config_of(name), root, tmp_path / "cache").summary
        assert (after != before) == (not file.endswith(("boxes.txt", "images/list.txt"))), file
        (root / file).write_bytes(content)
    assert state_of(config_of(name), root, tmp_path / "cache").summary == before


def test_domains_are_datasets_of_their_own(tmp_path: Path) -> None:
    states = [state_of(config_of("domainnet", domain=domain), tmp_path, tmp_path) for domain in image_lists.CLEANED]
    assert len({state.key for state in states}) == 3
