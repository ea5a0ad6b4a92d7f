"""Datasets whose images, classes and splits stand in lists: small folders in the layouts that are handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import LISTED, listed

from configs import composed
from kt.data import image_lists
from kt.data.fingerprint import state_of
from kt.data.images import image_data
from kt.data.names import DATASETS, read_dataset
from kt.errors import UserError
from kt.settings import Dataset, defaults

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

DOMAINS = {split: LISTED["domainnet"][f"domainnet/painting_{split}.txt"] for split in ("train", "test")}


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image_lists.CLEANED, "painting", (3, 1))


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**defaults(Dataset), **DATASETS[name].defaults, "name": name, "num_classes": None, **changes}


@pytest.mark.parametrize("name", LISTED)
def test_classes_images_and_splits_are_those_of_the_lists(tmp_path: Path, name: str) -> None:
    root, config = listed(tmp_path, name), config_of(name, image_size=16)
    read = read_dataset(config, root, None)
    parts = [[(path.name, label) for path, label in part] for part in (read.train, read.test)]
    assert (read.class_names, *parts) == FOUND[name]
    options: dict[str, Any] = {"batch_size": 3, "seed": 0, "device": "cpu", "device_batch": None}
    data = image_data(config, root, None, **options, rank=0, world=1, workers=0)
    (batch,) = data.train.epoch(0)
    assert batch["inputs"].shape == (3, 3, 16, 16) and (data.spec.train_size, data.spec.test_size) == (3, 1)


@pytest.mark.parametrize("name", ["cub200", "stanford40", "mit67", "domainnet"])
def test_the_recipe_is_the_released_one_of_jang_et_al(name: str) -> None:
    config = composed(f"dataset={name}", "student=resnet18")
    schedule, dataset = config["schedule"], config["dataset"]
    wanted = {"epochs": 200, "batch_size": 64, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False}
    wanted |= {"weight_decay": 1e-4, "policy": "cosine", "warmup_epochs": 0}
    assert {key: schedule[key] for key in wanted} == wanted
    assert (dataset["image_size"], dataset["augmentation"]) == (224, "imagenet")


@pytest.mark.parametrize("place", ["splits", "image_list"])
def test_lists_may_lie_beside_the_domains(tmp_path: Path, place: str) -> None:
    changes: dict[str, str | None] = {}
    for split in ("train", "test"):
        file = f"domainnet/painting_{split}.txt"
        changes |= {file: None, f"domainnet/{place}/painting_{split}.txt": LISTED["domainnet"][file]}
    read = read_dataset(config_of("domainnet"), listed(tmp_path, "domainnet", changes), None)
    assert read.class_names == FOUND["domainnet"][0]
    assert [label for _, label in read.train] == [1, 0, 0]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        *(
            (name, {file: None}, "there is no .*" + Path(file).name)
            for name in LISTED
            for file in LISTED[name]
            if ("boxes" not in file and "list" not in file and "/train/" not in file)
        ),
        *((name, {file: ""}, f"{Path(file).name} is empty") for name in LISTED for file in list(LISTED[name])[:2]),
        (
            "cub200",
            {"CUB_200_2011/train_test_split.txt": "1 0\n2 1\n4 1\n"},
            "train_test_split.txt has no line for image 3",
        ),
        (
            "cub200",
            {"CUB_200_2011/train_test_split.txt": "1 0\n2 1\n3 2\n4 1\n"},
            r"train_test_split.txt: image 3 has '2', neither 1 \(training\) nor 0",
        ),
        (
            "cub200",
            {"CUB_200_2011/image_class_labels.txt": "1 1\n2 1\n3 2\n4 2\n3 1\n"},
            "image_class_labels.txt has 2 lines for number 3",
        ),
        (
            "domainnet",
            {"domainnet/painting_train.txt": "painting/axe/b.jpg 0\n" * 4},
            "names 4 images, the cleaned list 3",
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
            {"domainnet/painting_train.txt": "painting/axe/b.jpg 0\n" * 2 + "painting/zebra/a.jpg 345"},
            "label '345'; expected 0 to 344",
        ),
        (
            "domainnet",
            {"domainnet/painting_test.txt": "painting/zebra/d.jpg 0\n"},
            "d.jpg is of 'axe', but lies in 'zebra'",
        ),
        (
            "domainnet",
            {"domainnet/painting_test.txt": "painting/zebra/d.jpg 3\n"},
            "images of the folder 'zebra' have several labels",
        ),
        ("domainnet", {"domainnet/painting_test.txt": "clipart/axe/b.jpg 0\n"}, r"not of the form painting/\*/\*"),
        (
            "cub200",
            {"CUB_200_2011/image_class_labels.txt": "1 1\n2 1\n3 1\n4 2\n"},
            "c.jpg is of '001.Albatross', but lies in '002.Auklet'",
        ),
        ("mit67", {"mit67/TestImages.txt": "bar/../a.jpg"}, "a.jpg is not below the folder of the images"),
        ("mit67", {"mit67/TestImages.txt": "bar/deep/a.jpg"}, r"not of the form Images/\*/\*"),
        *(
            (name, {test: LISTED[name][train]}, "is both a training and a test image")
            for name, train, test in (
                ("stanford40", "Stanford40/ImageSplits/train.txt", "Stanford40/ImageSplits/test.txt"),
                ("mit67", "mit67/TrainImages.txt", "mit67/TestImages.txt"),
                ("domainnet", "domainnet/painting_train.txt", "domainnet/painting_test.txt"),
            )
        ),
        ("stanford40", {"Stanford40/ImageSplits/test.txt": "applauding_002.jpg\n" * 2}, "applauding_002.jpg twice"),
        ("tiny_imagenet", {"tiny-imagenet-200/train/n02/images/n02_0.JPEG": None}, "no images in .*n02/images"),
    ],
)
def test_mistakes_are_one_line_with_the_layout(
    tmp_path: Path, name: str, changes: dict[str, str | None], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_dataset(config_of(name), listed(tmp_path, name, changes), None)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("data_root=") and "or use scale=mini" in message
    assert f"expected {Path(next(iter(LISTED[name]))).parts[0]}/{{" in message and "http" in message


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = listed(tmp_path, "mit67")
    (root / "mit67/Images/bar/b one.jpg").write_text("no image")
    options: dict[str, Any] = {"batch_size": 3, "seed": 0, "device": "cpu", "device_batch": None}
    with pytest.raises(UserError, match=r"b one\.jpg: cannot be read as an image"):
        image_data(config_of("mit67"), root, None, **options, rank=0, world=1, workers=0)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cub200", "5994 and 5794"),
        ("stanford40", "4000 and 5532"),
        ("mit67", "5360 and 1340"),
        ("tiny_imagenet", "100000 and 10000"),
    ],
)
def test_other_counts_than_those_handed_out_are_told(
    tmp_path: Path, name: str, counts: str, caplog: pytest.LogCaptureFixture
) -> None:
    read_dataset(config_of(name), listed(tmp_path, name), None)
    (line,) = caplog.messages
    assert "the lists name 3 training and 1 test images" in line and line.endswith(f"handed out are {counts}")


@pytest.mark.parametrize(("domain", "count"), [("clipart", 33525), ("painting", 50416), ("real", 120906)])
def test_cleaned_counts_are_those_that_the_paper_prints(
    tmp_path: Path, domain: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    lists = {f"domainnet/{domain}_{split}.txt": f"{domain}/axe/a.jpg 0" for split in ("train", "test")}
    with pytest.raises(UserError, match=f"{domain}_train.txt names 1 images, the cleaned list {count};"):
        read_dataset(config_of("domainnet", domain=domain), listed(tmp_path, "domainnet", dict(lists)), None)


def test_a_class_may_lack_training_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As t-shirts do in the cleaned list of paintings."""
    changes = {f"domainnet/painting_{split}.txt": text.replace(" 1", " 2") for split, text in DOMAINS.items()}
    read = read_dataset(config_of("domainnet"), listed(tmp_path, "domainnet", {**changes}), None)
    assert read.class_names == ("axe", "class 1", "zebra") and [label for _, label in read.train] == [2, 0, 0]
    assert caplog.messages == [f"{tmp_path / 'domainnet'}: no training images of class 1"]


@pytest.mark.parametrize(("domain", "said"), [(None, "null"), ("sketch", "sketch")])
def test_a_domain_without_a_cleaned_count_is_refused(tmp_path: Path, domain: str | None, said: str) -> None:
    with pytest.raises(UserError, match=f"dataset.domain={said}: expected one of clipart, painting, real"):
        read_dataset(config_of("domainnet", domain=domain), tmp_path, None)


def test_domains_are_datasets_of_their_own(tmp_path: Path) -> None:
    states = [state_of(config_of("domainnet", domain=domain), tmp_path, tmp_path) for domain in image_lists.CLEANED]
    assert len({state.key for state in states}) == 3
