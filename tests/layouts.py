"""Small datasets in the official layouts, made by hand; each gives the config that names it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from kt.data.names import DATASETS


def picture(path: Path, values: np.ndarray | None = None, seed: int = 0, size: tuple[int, int] = (32, 64)) -> Path:
    """An image file: random colours, or the given ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


PETS = {"train": {"cat": 7, "dog": 6}, "val": {"cat": 2, "dog": 3}}
# (height, width) and mode of images, in turn.
ODD = (((40, 60), "RGB"), ((61, 33), "L"), ((50, 50), "RGBA"), ((24, 90), "P"), ((35, 35), "1"))


def imagefolder(root: Path, splits: dict[str, dict[str, int]] = PETS, folder: str = "pets") -> dict[str, Any]:
    for split, classes in splits.items():
        for name, count in classes.items():
            place = root / folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                size, mode = ODD[i % len(ODD)]
                pixels = np.random.default_rng((i, *name.encode())).integers(0, 256, (*size, 4), np.uint8)
                image = Image.fromarray(pixels, "RGBA")
                (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(place / f"{i}.png")
    return {"name": "imagefolder", "task": "classification", "folder": folder, "image_size": 24}


def imagenet(root: Path) -> dict[str, Any]:
    return {**imagefolder(root, folder="imagenet"), "name": "imagenet", "folder": None}


def cifar100(root: Path) -> dict[str, Any]:
    folder, rng = root / "cifar-100-python", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train", 20), ("test", 10)):
        content = {b"data": rng.integers(0, 256, (count, 3072), np.uint8), b"fine_labels": list(range(count))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [f"{i}".encode() for i in range(20)]}))
    return {"name": "cifar100", "task": "classification", "image_size": 32}


def segfolder(root: Path, classes: dict[str, Any] | None = None) -> dict[str, Any]:
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            ids = np.random.default_rng(i).integers(0, 4, (32, 64)).astype(np.uint8)
            ids[:4] = 255
            ids[ids == 3] = 11
            picture(root / "street" / "images" / split / f"{i}.{'png' if i % 2 else 'jpg'}", seed=i)
            picture(root / "street" / "labels" / split / f"{i}.png", ids)
    if classes:
        (root / "street" / "classes.json").write_text(json.dumps(classes))
    return {
        "name": "segfolder",
        "task": "segmentation",
        "folder": "street",
        "train_split": "train",
        "test_split": "val",
        "image_size": [16, 32],
    }


def gta5(root: Path, count: int = 6) -> dict[str, Any]:
    ids = np.tile(np.arange(34, dtype=np.uint8), (34, 1))
    for i in range(count):
        picture(root / "gta5" / "images" / f"{i:05d}.png", seed=i, size=(34, 34))
        path = root / "gta5" / "labels" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(ids, "P")
        image.putpalette(list(np.random.default_rng(i).integers(0, 256, 768)))
        image.save(path)
    return {"name": "gta5", "task": "segmentation", "image_size": [34, 34], "augmentation": "none"}


def cityscapes(root: Path, truth: str | None = "labelTrainIds", val: str | None = None) -> dict[str, Any]:
    """With that ground truth, in `val` perhaps another, or none."""
    settings = {"name": "cityscapes", "task": "detection" if truth == "instanceIds" else "segmentation"}
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "munster")):
        stem = f"{city}_000000_000019"
        picture(root / "cityscapes" / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        held = val if val and split == "val" else truth
        if held is None:
            continue
        ids = np.zeros((32, 64), np.uint16)
        if held == "instanceIds":
            ids[4:20, 8:16], ids[10:14, 30:60], ids[0:3, 0:3], ids[25:30, 2:9] = 24001, 26000, 11, 25
        else:
            ids[4:20, 8:16] = 11 if held == "labelTrainIds" else 24
        place = root / "cityscapes" / "gtFine" / split / city
        picture(place / f"{stem}_gtFine_{held}.png", ids if held == "instanceIds" else ids.astype(np.uint8))
    return {**settings, "image_size": [32, 64]}


def citypersons(root: Path) -> dict[str, Any]:
    cityscapes(root, None)
    for split, cities in (("train", ["aachen", "ulm"]), ("val", ["munster"])):
        cells = np.empty((1, len(cities)), object)
        for i, city in enumerate(cities):
            # class, x, y, w, h, instance, visible x, y, w, h; heights refer to images 1024 high, so here to 32
            rows = [[1, 5, 2, 4, 10, 24001, 5, 2, 4, 10], [1, 20, 2, 4, 10, 24002, 20, 2, 4, 4]]
            rows += [
                [1, 30, 2, 1, 1, 24003, 30, 2, 1, 1],
                [0, 40, 1, 20, 20, 0, 40, 1, 20, 20],
                [2, 1, 1, 3, 9, 25001, 1, 1, 3, 9],
            ]
            record = np.empty((1, 1), [("cityname", object), ("im_name", object), ("bbs", object)])
            record[0, 0] = (city, f"{city}_000000_000019_leftImg8bit.png", np.array(rows, np.int32))
            cells[0, i] = record
        path = root / "citypersons" / "annotations" / f"anno_{split}.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, {f"anno_{split}_aligned": cells})
    return {"name": "citypersons", "task": "pedestrians", "image_size": [32, 64], "augmentation": "none"}


def coco(root: Path, classes: tuple[str, ...] = ("cat", "dog"), **box: Any) -> dict[str, Any]:
    for split in ("train", "val"):
        images = [{"id": 7 + i, "file_name": f"{i}.jpg", "height": 32, "width": 64} for i in range(3)]
        for i in range(3):
            picture(root / "pets" / split / f"{i}.jpg", seed=i)
        boxes = [
            {
                "id": i,
                "image_id": 7 + i % 3,
                "category_id": 9 if i % 2 else 4,
                "bbox": [2 + i, 3, 20, 12],
                "area": 240,
                "iscrowd": i // 5,
            }
            for i in range(6)
        ]
        boxes[0].update(box)
        categories = [{"id": 4 + 5 * i, "name": name} for i, name in enumerate(classes)]
        path = root / "pets" / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    settings = {"name": "coco", "task": "detection", "folder": "pets", "image_size": [64, 64]}
    return {**settings, "train_split": "train", "test_split": "val", "augmentation": "none"}


def plain_depth(height: int, width: int, seed: int) -> np.ndarray:
    """Depth in millimetres, up to other distances with every seed, with pixels that have none."""
    depth = np.random.default_rng(seed).integers(500, 3000 + 2000 * seed, (height, width), np.uint16)
    depth[:4] = 0
    return depth


def depthfolder(root: Path) -> dict[str, Any]:
    for split, count in (("train", 4), ("val", 3)):
        for i in range(count):
            picture(root / "rooms" / "images" / split / f"{i}.{'png' if i % 2 else 'jpg'}", seed=i, size=(24, 32))
            picture(root / "rooms" / "depth" / split / f"{i}.png", plain_depth(24, 32, i))
    settings = {"name": "depthfolder", "task": "depth", "folder": "rooms", "image_size": [24, 32]}
    return {**settings, "train_split": "train", "test_split": "val", "augmentation": "none"}


def nyuv2(root: Path) -> dict[str, Any]:
    h5py = pytest.importorskip("h5py", reason="the files of nyuv2 are HDF5")
    for i, place in enumerate(("train/kitchen_0001", "train/study_0002", "val/official")):
        path = root / "nyudepthv2" / place / f"{i:05d}.h5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            file["rgb"] = np.random.default_rng(i).integers(0, 256, (3, 48, 64), np.uint8)
            file["depth"] = plain_depth(48, 64, i).astype(np.float32) / 1000
    return {"name": "nyuv2", "task": "depth", "image_size": [24, 32], "augmentation": "none"}


# Dataset -> its lists and images; of every text file the content, of every image its mode. Orders are odd on purpose.
LISTED: dict[str, dict[str, str]] = {
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


def listed(root: Path, name: str, changes: dict[str, str | None] | None = None) -> Path:
    """A dataset's folder, with other files than its own if given; None leaves one out."""
    for number, (file, content) in enumerate({**LISTED[name], **(changes or {})}.items()):
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


def scenes(task: str) -> dict[str, Any]:
    size = 24 if task == "classification" else [48, 96]
    found = {"name": "scenes", "task": task, "image_size": size, "augmentation": "none"}
    return {**found, "train_size": 20, "test_size": 6}


def make(name: str, task: str, root: Path) -> dict[str, Any]:
    """A small dataset of a name for a task."""
    if DATASETS[name].embedded:
        return {**DATASETS[name].defaults, **scenes(task), "name": name, "test_size": 20}
    if name in LISTED:
        listed(root, name)
        return {**DATASETS[name].defaults, "name": name, "image_size": 16, "num_classes": None, "augmentation": "none"}
    if name == "cityscapes":
        return cityscapes(root, "instanceIds" if task == "detection" else "labelIds")
    found: dict[str, Any] = globals()[name](root)
    return found


def real(data_root: Path, folder: str) -> Path:
    """The folder of real datasets if it has that one."""
    if not (data_root / folder).is_dir():
        pytest.skip(f"KT_DATA_ROOT has no {folder}/")
    return data_root
