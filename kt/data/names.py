"""The datasets that a config can name. This module imports no torch: composing and planning stay quick."""

from __future__ import annotations

import errno
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kt.errors import UserError, is_out_of_memory, nearest
from kt.settings import Dataset, DepthDataset, kinds, shown


@dataclass(frozen=True)
class DatasetSpec:
    """What a name stands for.

    Attributes:
        readers: Task -> `module:function`. Called with the dataset's config, `data_root` and the cache's folder (or
            None) it gives both splits: a `kt.data.images.Images` for classification, else a
            `kt.data.dense_source.Source`.
        keys: Keys of `kt.settings.Dataset` that decide its images beside `COMMON`; a reader is given these, and those
            that its own class of settings adds.
        defaults: Keys that make it a choice `dataset=<name>` where there is no such file in `conf/dataset`; those that
            are left out have the class's defaults. `stand_in` names the choice that replaces it.
        schedule: The same of its recipe, `kt.settings.Schedule` and `conf/schedule`; numbers of epochs, iterations
            and steps between scores are those of the full scale. With `defaults` (Hydra's) it changes another recipe.
        images, labels: The files it reads, the latter by task, as patterns of `Path.glob` below `data_root` in which
            `{folder}`, `{train_split}` and the like stand for the config's values (an empty folder for the dataset's
            name); see `kt.data.fingerprint`. An entry without any is taken to have always the same data.
        folder: What a `folder` of null stands for; None where it has to be given.
        published: Images of the training and of the test set as they are handed out, by domain where there are some
            (else under the empty name); what a rehearsal without the data goes by.
        classes: How many, where the choices leave that to the files; for the same use.
        code: Modules that draw it, of a dataset without files.
        embedded: Whether it is drawn for networks as slim as the scale says, which train best on a thread each, side
            by side.
        settings: The class of its keys; a subclass of `kt.settings.Dataset` may add some.
        sources: Where its settings come from: `dataset` and `schedule` for all, `schedule.lr` for one of them.
    """

    readers: Mapping[str, str]
    keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: str | None = None
    published: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    classes: int | None = None
    code: tuple[str, ...] = ()
    embedded: bool = False
    settings: type[Dataset] = Dataset
    sources: Mapping[str, str] = field(default_factory=dict)


SPLIT_SIZES = ("train_size", "test_size")  # of what is drawn
# Keys that decide the images of every dataset.
COMMON = ("name", "task", "num_classes", "image_size", "crop_size", "subset", "validation", "augmentation")
CLASSIFICATION = "classification"
# Files that are images, in every folder.
IMAGE_ENDS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# The pattern of all that is below a folder, but for what is hidden.
ANY = "**/*"

# Files that hold an image with its truth, of which so many may be read that none is read whole for the state.
PACKED_ENDS = (".h5",)

# Folders are listed for their names, which are classes.
_CLASS_FOLDERS = tuple(f"{{folder}}/{split}/{inner}" for split in ("train", "val") for inner in ("*", "*/*"))
CITY_IMAGES = "*/*_leftImg8bit.png"  # of a split
_CITIES = tuple(f"cityscapes/leftImg8bit/{split}/{CITY_IMAGES}" for split in ("train", "val"))


def _city_labels(*ends: str) -> tuple[str, ...]:
    return tuple(f"cityscapes/gtFine/{split}/*/*_gtFine_{end}.png" for split in ("train", "val") for end in ends)


_AT_224 = {"task": CLASSIFICATION, "image_size": 224, "augmentation": "imagenet"}
_WHAT_AND_WHERE = {"epochs": 200, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-4, "policy": "cosine"}
_OF_WHAT_AND_WHERE = dict.fromkeys(
    ("dataset", "schedule"), "Jang et al. 2019 (Learning what and where to transfer), released code"
)

_OF_DEPTH = dict.fromkeys(("dataset", "schedule"), "Ma and Karaman 2018 (Sparse-to-Dense), released code")
_DEPTH = {"task": "depth", "augmentation": "approach"}
_SPARSE_TO_DENSE = {
    **{"epochs": 15, "batch_size": 8, "lr": 0.01, "weight_decay": 1e-4},
    **{"policy": "step", "milestones": [1 / 3, 2 / 3]},
}

_SMALL_SCENES = {
    **{"task": CLASSIFICATION, "image_size": 48, "augmentation": "crop_flip"},
    **{"train_size": 360, "test_size": 600},
}
_SMALL_RECIPE = {"defaults": ["scenes", "_self_"], "epochs": 32, "batch_size": 32, "evaluate_every": 8}


def _small_scenes(reader: str) -> DatasetSpec:
    """Embedded images in the place of a dataset that has few of its own."""
    return DatasetSpec(
        {CLASSIFICATION: f"kt.data.scene_sets:{reader}"},
        ("style", "train_size", "test_size"),
        defaults=_SMALL_SCENES,
        schedule=_SMALL_RECIPE,
        code=("kt.data.scenes", "kt.data.scene_sets"),
        embedded=True,
    )


# With those of other packages, once `kt.outside` has looked for them. Variants of their choices are in `conf/dataset`.
DATASETS: dict[str, DatasetSpec] = {
    "scenes": DatasetSpec(
        {
            CLASSIFICATION: "kt.data.images:read_scenes",
            **dict.fromkeys(
                ("segmentation", "detection", "pedestrians", "keypoints"), "kt.data.dense_scenes:read_scenes"
            ),
        },
        ("style", "train_size", "test_size"),
        # Procedurally drawn street scenes, here as object crops to classify; at 48 pixels stride-32 networks still see
        # a map of 2x2.
        defaults={
            **{"task": CLASSIFICATION, "image_size": 48, "augmentation": "crop_flip"},
            **{"train_size": 3000, "test_size": 1000},
        },
        code=("kt.data.scenes", "kt.data.dense_scenes"),
        embedded=True,
    ),
    "scenes_kinds": _small_scenes("read_kinds"),
    "scenes_actions": _small_scenes("read_actions"),
    "scenes_places": _small_scenes("read_places"),
    "scenes_domains": DatasetSpec(
        {CLASSIFICATION: "kt.data.scene_sets:read_domains"},
        ("domain", "train_size", "test_size"),
        defaults={**_SMALL_SCENES, "train_size": 2000, "test_size": 1000, "domain": "painting"},
        schedule={"defaults": ["scenes", "_self_"], "epochs": 7},
        code=("kt.data.scenes", "kt.data.scene_sets"),
        embedded=True,
    ),
    "cifar100": DatasetSpec(
        {CLASSIFICATION: "kt.data.images:read_cifar100"},
        defaults={
            **{"task": CLASSIFICATION, "image_size": 32, "augmentation": "crop_flip"},
            **{"num_classes": 100, "stand_in": "scenes_small"},
        },
        sources={"dataset": "RepDistiller's released code (Tian, Krishnan, Isola 2020)"},
        labels={CLASSIFICATION: tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta"))},
        published={"": (50_000, 10_000)},
    ),
    "imagenet": DatasetSpec(
        {CLASSIFICATION: "kt.data.images:read_imagenet"},
        ("folder",),
        defaults={**_AT_224, "num_classes": 1000, "stand_in": "scenes"},
        sources={"dataset": "torchvision's reference trainings"},
        images=_CLASS_FOLDERS,
        folder="imagenet",
        published={"": (1_281_167, 50_000)},
    ),
    "imagefolder": DatasetSpec(
        {CLASSIFICATION: "kt.data.images:read_imagefolder"},
        ("folder",),
        defaults={**_AT_224, "folder": "images"},
        schedule={"defaults": ["imagenet"]},
        images=_CLASS_FOLDERS,
    ),
    "unlabelled": DatasetSpec(
        {CLASSIFICATION: "kt.data.images:read_unlabelled"},
        ("folder",),
        {**_AT_224, "stand_in": "scenes"},
        images=(f"{{folder}}/{ANY}",),
    ),
    "cub200": DatasetSpec(
        {CLASSIFICATION: "kt.data.image_lists:read_cub200"},
        defaults={**_AT_224, "num_classes": 200, "stand_in": "scenes_kinds"},
        schedule=_WHAT_AND_WHERE,
        sources=_OF_WHAT_AND_WHERE,
        images=("CUB_200_2011/images/*/*",),
        labels={
            CLASSIFICATION: tuple(
                f"CUB_200_2011/{name}.txt" for name in ("classes", "images", "image_class_labels", "train_test_split")
            )
        },
        published={"": (5994, 5794)},
    ),
    "stanford40": DatasetSpec(
        {CLASSIFICATION: "kt.data.image_lists:read_stanford40"},
        defaults={**_AT_224, "num_classes": 40, "stand_in": "scenes_actions"},
        schedule=_WHAT_AND_WHERE,
        sources=_OF_WHAT_AND_WHERE,
        images=("Stanford40/JPEGImages/*",),
        labels={CLASSIFICATION: tuple(f"Stanford40/ImageSplits/{name}.txt" for name in ("actions", "train", "test"))},
        published={"": (4000, 5532)},
    ),
    "mit67": DatasetSpec(
        {CLASSIFICATION: "kt.data.image_lists:read_mit67"},
        defaults={**_AT_224, "num_classes": 67, "stand_in": "scenes_places"},
        schedule=_WHAT_AND_WHERE,
        sources=_OF_WHAT_AND_WHERE,
        images=("mit67/Images/*/*",),
        labels={CLASSIFICATION: ("mit67/TrainImages.txt", "mit67/TestImages.txt")},
        published={"": (5360, 1340)},
    ),
    "domainnet": DatasetSpec(
        {CLASSIFICATION: "kt.data.image_lists:read_domainnet"},
        ("domain",),
        defaults={**_AT_224, "num_classes": 345, "domain": "painting", "stand_in": "scenes_domains"},
        schedule=_WHAT_AND_WHERE,
        sources=_OF_WHAT_AND_WHERE,
        images=("domainnet/{domain}/*/*",),
        labels={
            CLASSIFICATION: tuple(
                f"domainnet/{place}{{domain}}_{split}.txt"
                for place in ("", "splits/", "image_list/")
                for split in ("train", "test")
            )
        },
        published={
            **{"clipart": (33_525, 14_604), "infograph": (36_023, 15_582), "painting": (50_416, 21_850)},
            **{"quickdraw": (120_750, 51_750), "real": (120_906, 52_041), "sketch": (48_212, 20_916)},
        },
    ),
    "tiny_imagenet": DatasetSpec(
        {CLASSIFICATION: "kt.data.image_lists:read_tiny_imagenet"},
        defaults={
            **{"task": CLASSIFICATION, "image_size": 64, "augmentation": "crop_flip"},
            **{"num_classes": 200, "stand_in": "scenes_small"},
        },
        schedule={"epochs": 20, "batch_size": 512, "lr": 0.1, "weight_decay": 1e-4, "policy": "cosine"},
        sources={"dataset": "ours, unstated", "schedule": "ours, as DistPro's students are trained"},
        images=("tiny-imagenet-200/train/*", "tiny-imagenet-200/train/*/images/*", "tiny-imagenet-200/val/images/*"),
        labels={CLASSIFICATION: ("tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/val/val_annotations.txt")},
        published={"": (100_000, 10_000)},
    ),
    "cityscapes": DatasetSpec(
        dict.fromkeys(("segmentation", "detection"), "kt.data.cityscapes:read_cityscapes"),
        images=_CITIES,
        labels={
            "segmentation": _city_labels("labelTrainIds", "labelIds"),
            "detection": (*_city_labels("instanceIds"), "cityscapes/annotations/instances*.json"),
        },
        published={"": (2975, 500)},
    ),
    "gta5": DatasetSpec(
        {"segmentation": "kt.data.gta5:read_gta5"},
        defaults={
            **{"task": "segmentation", "image_size": [526, 957], "augmentation": "flip"},
            **{"num_classes": 19, "stand_in": "scenes_seg_synthetic"},
        },
        sources={
            "schedule": "ours, as the paper's students learn on Cityscapes",
            "dataset": "the dataset as its authors publish it",
            "dataset.image_size": "ours, half of the common 1052x1914",
            "dataset.augmentation": "ours, unstated",
        },
        schedule={"defaults": ["cityscapes_seg"]},
        images=("gta5/images/*.png",),
        labels={"segmentation": ("gta5/labels/*.png", "gta5/val.txt")},
        published={"": (24_466, 500)},  # of 24,966, see `kt.data.gta5.split_names`
    ),
    "citypersons": DatasetSpec(
        {"pedestrians": "kt.data.citypersons:read_citypersons"},
        # The recipe is unstated; the images are Cityscapes'.
        defaults={
            **{"task": "pedestrians", "image_size": [1024, 2048], "augmentation": "flip"},
            **{"num_classes": 1, "stand_in": "scenes_persons"},
        },
        sources={
            "dataset": "the dataset as its authors publish it",
            "dataset.augmentation": "ours, unstated",
        },
        schedule={"defaults": ["cityscapes_det"]},
        images=_CITIES,
        labels={"pedestrians": ("citypersons/annotations/anno_*.mat",)},
        published={"": (2975, 500)},
    ),
    "scenes_depth": DatasetSpec(
        {"depth": "kt.data.depth:read_scenes"},
        ("style", "train_size", "test_size"),
        defaults={
            **{"task": "depth", "image_size": [64, 128], "augmentation": "flip"},
            **{"train_size": 400, "test_size": 100},
        },
        # The decoder starts from scratch even where a backbone does not.
        schedule={"defaults": ["scenes_seg", "_self_"], "iterations": 300, "interval": 150, "lr": 0.004},
        code=("kt.data.scenes", "kt.data.depth"),
        embedded=True,
        settings=DepthDataset,
    ),
    "nyuv2": DatasetSpec(
        {"depth": "kt.data.depth:read_nyuv2"},
        defaults={**_DEPTH, "image_size": [228, 304], "stand_in": "scenes_depth"},
        schedule=_SPARSE_TO_DENSE,
        sources=_OF_DEPTH,
        images=("nyudepthv2/*/*/*.h5",),
        settings=DepthDataset,
        published={"": (47_584, 654)},
        classes=1,
    ),
    "depthfolder": DatasetSpec(
        {"depth": "kt.data.depth:read_depthfolder"},
        ("folder", "train_split", "test_split"),
        defaults={
            **{**_DEPTH, "image_size": [240, 320], "folder": "depth"},
            **{"train_split": "train", "test_split": "val"},
        },
        schedule=_SPARSE_TO_DENSE,
        sources=_OF_DEPTH,
        images=("{folder}/images/{train_split}/*", "{folder}/images/{test_split}/*"),
        labels={"depth": ("{folder}/depth/{train_split}/*.png", "{folder}/depth/{test_split}/*.png")},
        settings=DepthDataset,
    ),
    "coco": DatasetSpec(
        {"detection": "kt.data.dense_folders:read_coco"},
        ("folder", "train_split", "test_split"),
        defaults={
            **{"task": "detection", "image_size": [800, 1333], "augmentation": "flip", "stand_in": "scenes_det"},
            **{"folder": "coco", "train_split": "train2017", "test_split": "val2017"},
        },
        sources={"dataset": "mmdet's and Detectron's detectors on COCO"},
        images=(f"{{folder}}/{{train_split}}/{ANY}", f"{{folder}}/{{test_split}}/{ANY}"),
        labels={
            "detection": tuple(f"{{folder}}/annotations/instances_{{{part}_split}}.json" for part in ("train", "test"))
        },
        published={"": (118_287, 5000)},
        classes=80,
    ),
    "segfolder": DatasetSpec(
        {"segmentation": "kt.data.dense_folders:read_segfolder"},
        ("folder", "train_split", "test_split"),
        defaults={
            **{"task": "segmentation", "image_size": [512, 512], "augmentation": "flip"},
            **{"folder": "segmentation", "train_split": "train", "test_split": "val"},
        },
        schedule={"defaults": ["cityscapes_seg"]},
        images=("{folder}/images/{train_split}/*", "{folder}/images/{test_split}/*"),
        labels={
            "segmentation": (
                "{folder}/labels/{train_split}/*.png",
                "{folder}/labels/{test_split}/*.png",
                "{folder}/classes.json",
            )
        },
    ),
}


def augmentations(task: str) -> tuple[str, ...]:
    """What can be done to the training images of a task."""
    if task == CLASSIFICATION:
        return "none", "crop_flip", "imagenet"
    more = {"segmentation": ("scale_flip",), "depth": ("approach",)}
    return "none", "flip", *more.get(task, ())


def folder_of(dataset: Mapping[str, Any]) -> str | None:
    """The folder below `data_root` that a dataset's config means, in one spelling; None where it has to be given."""
    return str(PurePosixPath(dataset["folder"])) if dataset["folder"] else DATASETS[dataset["name"]].folder


def _decisive_keys(spec: DatasetSpec) -> tuple[str, ...]:
    return (*COMMON, *spec.keys, *(key for key in kinds(spec.settings) if key not in kinds(Dataset)))


def content(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a dataset's config that decide its images; the others are of no account for one of its name."""
    spec = DATASETS[dataset["name"]]
    found = {key: dataset[key] for key in _decisive_keys(spec)}
    if "folder" in found:
        found["folder"] = None if (folder := folder_of(dataset)) == spec.folder else folder
    return found


def idle(dataset: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a dataset's config that decide nothing of it, each with what they go with.

    `resident` is about memory, and only image files of classes leave a choice. Which dataset stands in for another one
    is told by the file of a choice alone.
    """
    spec = DATASETS[dataset["name"]]
    others = kinds(spec.settings).keys() - {*_decisive_keys(spec), "resident", "stand_in"}
    able = {key: [name for name, other in DATASETS.items() if key in other.keys] for key in others}
    found = {key: f"dataset={' or '.join(names)}, not {dataset['name']}" for key, names in able.items()}
    if dataset["task"] != CLASSIFICATION or spec.code or (spec.labels and not spec.images):
        found["resident"] = "image files of classes"
    return {**found, "stand_in": "the file of a dataset; choose another one by dataset="}


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is none of a dataset's: `.ipynb_checkpoints`, or the `._0.jpg` that macOS leaves."""
    return path.name.startswith(".")


def is_image(path: Path) -> bool:
    """Whether a file of that name is one of a dataset's images."""
    return path.suffix.lower() in IMAGE_ENDS and not is_hidden(path)


def unseen(path: str, form: str = ANY) -> str | None:
    """Why the state of a dataset would not tell an image that a list names; None if it does.

    Args:
        path: The image's, below the folder of the images.
        form: The pattern in `DatasetSpec.images`, from that folder on.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        return f"{path} is not below the folder of the images"
    if not path.lower().endswith(IMAGE_ENDS):
        return f"{path} does not end as an image does"
    if any(part.startswith(".") for part in PurePosixPath(path).parts):
        return f"{path} is hidden"
    if form != ANY and not PurePosixPath("/", path).match(f"/{form}"):
        return f"{path} is not of the form {form}"
    return None


def _check_choice(value: Any, choices: Iterable[str], key: str, whose: str = "") -> None:
    if value not in choices:
        raise UserError(f"{key}={shown(value)}: {whose}expected one of {', '.join(choices)}{nearest(value, choices)}")


def settings_of(dataset: Mapping[str, Any], key: str = "dataset") -> type[Dataset]:
    """The class of a dataset's config; that of all where it has no name.

    Args:
        dataset: The config, checked or not.
        key: What the error calls it.

    Raises:
        UserError: There is no dataset of that name.
    """
    if "name" not in dataset:
        return Dataset
    _check_choice(dataset["name"], [*DATASETS], f"{key}.name")
    return DATASETS[dataset["name"]].settings


def own_keys(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset's config without the keys that only others have, such as those of the dataset that it replaces."""
    return {key: value for key, value in dataset.items() if key in kinds(settings_of(dataset))}


def check_dataset(dataset: Mapping[str, Any], key: str = "dataset") -> None:
    """Refuses a task, augmentation or size that the dataset does not have, and a folder elsewhere.

    Args:
        dataset: A dataset's config, whose keys and their values are those of its `settings_of`.
        key: What the error calls it.

    Raises:
        UserError: Names the key, its value, the choices and the nearest one.
    """
    name, task = dataset["name"], dataset["task"]
    _check_choice(task, DATASETS[name].readers, f"{key}.task", f"for {name} ")
    _check_choice(dataset["augmentation"], augmentations(task), f"{key}.augmentation", f"for {task} ")
    folder = Path(dataset["folder"] or "")
    if folder.is_absolute() or ".." in folder.parts:
        raise UserError(f"{key}.folder={folder}: expected a folder below data_root; set data_root= to its parent")
    for part in ("train_split", "test_split"):
        split = PurePosixPath(given := dataset[part] or "train")
        if split.is_absolute() or ".." in split.parts or str(split) != given:
            raise UserError(
                f"{key}.{part}={given}: expected the name of a folder in the dataset's, such as {split.name}"
            )
    one = dataset["train_split"] is not None and dataset["train_split"] == dataset["test_split"]
    if one and not dataset["validation"]:  # which scores on what it holds out
        given = ", ".join(f"{key}.{part}={dataset[part]}" for part in ("train_split", "test_split"))
        cure = f"or a share of the one to hold out ({key}.validation)"
        raise UserError(f"{given}: expected two splits, one to train on and one to score on, {cure}")
    for part in SPLIT_SIZES:
        if DATASETS[dataset["name"]].code and dataset[part] is None:
            raise UserError(f"{key}.{part}=null: expected how many images to draw, for {dataset['name']}")
    known = dataset["train_size"] if DATASETS[name].code else dataset["subset"]
    if known is not None:
        check_share(known, dataset["subset"], dataset["validation"], key)
    size, crop, task = dataset["image_size"], dataset["crop_size"], dataset["task"]
    if task == CLASSIFICATION and not isinstance(size, int):
        raise UserError(f"{key}.image_size={size}: expected pixels a side, for {task}")
    if task != CLASSIFICATION and not _is_pair(size):
        raise UserError(f"{key}.image_size={size}: expected [height, width] in pixels, for {task}")
    if (samples := dataset.get("depth_samples", 0)) and samples > math.prod(size):
        raise UserError(f"{key}.depth_samples={samples}: expected at most the pixels of image_size={list(size)}")
    fits = task == "segmentation" and _is_pair(crop) and crop[0] <= size[0] and crop[1] <= size[1]
    if crop is not None and not fits:
        expected = f"[height, width] of at most image_size={list(size)}" if task == "segmentation" else "null"
        raise UserError(f"{key}.crop_size={crop}: expected {expected}, for {task}")


def check_share(size: int, subset: int | None, validation: float, key: str = "dataset") -> int:
    """How many training images are held out.

    Args:
        size: Images of the training set.
        subset: How many of them take part; None: all.
        validation: Share of these to hold out.
        key: What the error calls the dataset.

    Raises:
        UserError: There are fewer images, or none is left to train on.
    """
    if not size:
        raise UserError(f"{key}: there are no training images")
    if subset is not None and subset > size:
        raise UserError(f"{key}.subset={subset}: expected 1 to {size}, the number of training images")
    taken = size if subset is None else subset
    held = max(1, round(validation * taken)) if validation else 0
    if held >= taken:
        raise UserError(f"{key}.validation={validation}: of {taken} training images none would be left")
    return held


def _is_pair(size: Any) -> bool:
    return isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)


# Errors that somebody's files cause: missing, not to be read by us, of another kind, links in a circle.
_OF_FILES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def read_dataset(dataset: Mapping[str, Any], data_root: Path, cache_root: Path | None) -> Any:
    """What the reader of a checked dataset's config gives.

    Raises:
        UserError: Something is wrong with the files, or they have another number of classes than the config says.
    """
    name = dataset["name"]
    module, _, function = DATASETS[name].readers[dataset["task"]].partition(":")
    reader = getattr(importlib.import_module(module), function)
    try:
        source = reader(content(dataset), data_root, cache_root)
    except OSError as error:
        if error.errno not in _OF_FILES:
            raise  # of the machine: a full disk, a broken one
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (MemoryError, ValueError) as error:
        if not DATASETS[name].code or not is_out_of_memory(error):
            raise
        asked = ", ".join(f"dataset.{key}={dataset[key]}" for key in (*SPLIT_SIZES, "image_size"))
        raise UserError(f"{asked}: so many images do not fit into the memory ({error})") from None
    classes = len(source.class_names)
    if dataset["num_classes"] not in (None, classes):
        raise UserError(f"dataset.num_classes={dataset['num_classes']}: {name} has {classes} classes (leave it null)")
    return source
