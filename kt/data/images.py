"""Classification: datasets of images with one class each, resident on the device where they fit."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from kt.data import scenes
from kt.data.cache import Arrays, kept
from kt.data.loaders import Loader, ResidentLoader, StreamingLoader
from kt.data.names import read_dataset
from kt.data.spec import Data, DataSpec
from kt.errors import UserError
from kt.evaluation.accuracy import evaluate_accuracy
from kt.models.names import IMAGENET

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# Of 20,000 crops in each style; a test draws them again.
SCENES_MEAN, SCENES_STD = (0.440, 0.495, 0.540), (0.174, 0.200, 0.247)
# Decoded folders up to this many bytes stay in memory.
RESIDENT_LIMIT = 2 << 30
TEST_SEED_OFFSET = 1_000_000


@dataclass
class Labelled:
    """A whole split in memory: images (n, h, w, 3) uint8 and labels (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


Split = Labelled | list[tuple[Path, int]]


@dataclass
class Images:
    """Both splits of a dataset, in memory or as lists of (file, label), as a reader gives them.

    Attributes:
        train, test: The splits; labels are indices into `class_names`.
        class_names: Of all classes.
        mean, std: Of the channels of pixels from 0 to 1, with which images are normalised.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET.mean
    std: tuple[float, ...] = IMAGENET.std


class _Files(torch.utils.data.Dataset):
    """Image files with a transform; module-level so that loading processes can be spawned."""

    def __init__(self, files: list[tuple[Path, int]], size: int, augmentation: str):
        self.files, self.size = files, size
        self.transform = _transform(size, augmentation)

    def plain(self) -> _Files:
        """The same files without augmentation."""
        return _Files(self.files, self.size, "none")

    def labels(self) -> Tensor:
        """The class of every file, (n,)."""
        return torch.tensor([label for _, label in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.transform(_open(path)), label


def image_data(
    dataset: Mapping[str, Any],
    data_root: Path,
    cache_root: Path | None,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    device_batch: int | None,
    rank: int,
    world: int,
    workers: int,
) -> Data:
    """Loaders and top-k accuracy for a checked config of a dataset for classification; see `kt.data.build_data`."""
    source: Images = read_dataset(dataset, data_root, cache_root)
    labels = _labels(source.train)
    classes = len(source.class_names)
    if not len(_labels(source.test)):
        raise UserError(f"dataset.name={dataset['name']}: has no test images; it is of use as method.source only")
    chosen = _chosen(source.train, dataset, classes)
    held_out: NDArray[np.int64] = np.empty(0, np.int64)
    if dataset["validation"]:
        size = max(1, round(dataset["validation"] * len(chosen)))
        held_out = chosen[balanced_subset(labels[chosen], size, classes, last=True)]
        chosen = np.setdiff1d(chosen, held_out)
    size = dataset["image_size"]
    common: dict[str, Any] = {"batch_size": batch_size, "device_batch": device_batch, "seed": seed}
    common |= {"device": torch.device(device), "rank": rank, "world": world}
    resident = dataset["resident"]
    train = _loader(source.train, chosen, size, dataset["augmentation"], True, resident, workers, common)
    held = source.train if len(held_out) else source.test
    tested = held_out if len(held_out) else np.arange(len(_labels(source.test)))
    test = _loader(held, tested, size, "none", False, resident, workers, common)
    mark = _fingerprint(source, chosen, tested)
    numbers = (len(chosen), len(tested))
    facts = (dataset["name"], classes, size, source.mean, source.std, *numbers, mark, source.class_names)
    classes_of = np.full(chosen.max() + 1, -1)
    classes_of[chosen] = labels[chosen]
    spec = DataSpec(*facts, largest_index=int(chosen.max()), labels=classes_of)
    return Data(spec, train, test, functools.partial(evaluate_accuracy, loader=test, num_classes=classes))


def unlabelled_loader(
    dataset: Mapping[str, Any],
    share: float,
    data_root: Path,
    cache_root: Path | None,
    *,
    workers: int,
    device: torch.device | str,
    **common: Any,
) -> Loader:
    """A loader of a share of a dataset's training images; see `kt.data.unlabelled`."""
    source: Images = read_dataset(dataset, data_root, cache_root)
    chosen = _chosen(source.train, dataset, len(source.class_names))
    drawn = np.random.default_rng(0).permutation(len(chosen))[: max(1, round(share * len(chosen)))]
    common["device"] = torch.device(device)
    size, augmentation = dataset["image_size"], dataset["augmentation"]
    taken = np.sort(chosen[drawn])
    return _loader(source.train, taken, size, augmentation, True, dataset["resident"], workers, common)


def _chosen(part: Split, dataset: Mapping[str, Any], classes: int) -> NDArray[np.int64]:
    """The training images that take part where a dataset's config asks for a subset."""
    labels = _labels(part)
    if dataset["subset"] is None:
        return np.arange(len(labels))
    return balanced_subset(labels, dataset["subset"], classes)


def balanced_subset(labels: NDArray[np.int64], size: int, classes: int, last: bool = False) -> NDArray[np.int64]:
    """Indices, rising, of the first (or last) samples of every class in turn, `size` in all.

    Raises:
        UserError: There are fewer samples.
    """
    if not 0 < size <= len(labels):
        raise UserError(f"dataset.subset={size}: expected 1 to {len(labels)}, the number of training images")
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=classes)
    # The k-th sample of each class, class by class: rank within the class first, then the class.
    within = np.concatenate([np.arange(count)[::-1] if last else np.arange(count) for count in counts])
    return np.sort(order[np.lexsort((labels[order], within))[:size]])


def _labels(part: Split) -> NDArray[np.int64]:
    return part.labels if isinstance(part, Labelled) else np.array([label for _, label in part], np.int64)


def _loader(
    part: Split,
    chosen: NDArray[np.int64],
    size: int,
    augmentation: str,
    shuffle: bool,
    resident: bool | None,
    workers: int,
    common: dict[str, Any],
) -> Loader:
    if not isinstance(part, Labelled):
        if resident is None:
            resident = len(chosen) * size * size * 3 <= RESIDENT_LIMIT
        if not resident:
            dataset = _Files(part, size, augmentation)
            return StreamingLoader(dataset, torch.from_numpy(chosen), shuffle=shuffle, workers=workers, **common)
        files = [part[i] for i in chosen]
        pixels = np.stack([_square(_open(path), size) for path, _ in files])
        arrays = Labelled(pixels, np.array([label for _, label in files], np.int64))
    else:
        arrays = Labelled(part.images[chosen], part.labels[chosen])
    images, labels = torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels)
    indices = torch.from_numpy(chosen.astype(np.int64))
    return ResidentLoader(images, labels, augmentation=augmentation, shuffle=shuffle, indices=indices, **common)


def _transform(size: int, augmentation: str) -> v2.Transform:
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if augmentation == "imagenet":
        return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *to_float])
    shared = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    if augmentation == "crop_flip":
        shared += [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    return v2.Compose([*shared, *to_float])


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The largest centred square at `size` pixels a side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


def _fingerprint(source: Images, chosen: NDArray[np.int64], tested: NDArray[np.int64]) -> str:
    """A short hash of labels, which samples take part, and some pixels (or file names and sizes)."""
    mark = hashlib.sha256()
    for part in (source.train, source.test):
        mark.update(_labels(part).tobytes())
        if isinstance(part, Labelled):
            mark.update(part.images[:: max(1, len(part.images) // 256)].tobytes())
        else:
            for path, _ in part[:: max(1, len(part) // 256)]:
                mark.update(f"{path.name}:{path.stat().st_size}".encode())
    mark.update(chosen.tobytes() + tested.tobytes())
    return mark.hexdigest()[:12]


def read_scenes(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Crops of single objects out of embedded scenes."""
    style = scenes.check_style(dataset["style"])
    size = dataset["image_size"]
    train, test = (
        _drawn(dataset[f"{split}_size"], size, offset, style, cache)
        for split, offset in (("train", 0), ("test", TEST_SEED_OFFSET))
    )
    return Images(train, test, scenes.CLASSES, SCENES_MEAN, SCENES_STD)


def _drawn(count: int, size: int, seed: int, style: str, cache: Path | None) -> Labelled:
    """Embedded crops, kept in the cache under a name that changes with the code that draws them."""
    code = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:8]
    path = cache and cache / f"scenes-{style}-{size}-{seed}-{count}-{code}.npz"

    def draw() -> Arrays:
        images, labels = scenes.classification_arrays(count, size, seed, style)
        return {"images": images, "labels": labels}

    return Labelled(**kept(path, draw))


CIFAR_LAYOUT = (
    "expected the official cifar-100-python/ folder with the files train, test and meta "
    "(https://www.cs.toronto.edu/~kriz/cifar.html); set data_root= to the folder that holds it, or use scale=mini"
)


def read_cifar100(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """The official pickles."""
    folder = root / "cifar-100-python"
    if dataset["image_size"] != 32:
        raise UserError(f"dataset.image_size={dataset['image_size']}: CIFAR-100 images are 32 pixels wide")
    records = {}
    for name in ("train", "test", "meta"):
        try:
            with open(folder / name, "rb") as file:
                records[name] = pickle.load(file, encoding="bytes")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"data_root={str(root)!r}: there is no {folder / name}; {CIFAR_LAYOUT}") from None
        except (pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{folder / name}: is no pickle ({error}); {CIFAR_LAYOUT}") from None
    try:
        parts = []
        for name in ("train", "test"):
            images = np.asarray(records[name][b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            parts.append(Labelled(np.ascontiguousarray(images), np.asarray(records[name][b"fine_labels"], np.int64)))
        names = tuple(value.decode() for value in records["meta"][b"fine_label_names"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: the pickles lack {error}; {CIFAR_LAYOUT}") from None
    return Images(parts[0], parts[1], names, CIFAR100_MEAN, CIFAR100_STD)


def read_imagenet(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """ILSVRC 2012, as a folder of images."""
    return _folders(root / (dataset["folder"] or "imagenet"), "https://www.image-net.org, ILSVRC 2012")


def read_imagefolder(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """A folder of one's own images."""
    if not dataset["folder"]:
        raise UserError("dataset.folder=null: expected the folder below data_root that holds train/ and val/")
    return _folders(root / dataset["folder"], "your own images")


def read_unlabelled(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """All images of a folder and of the folders in it, for a method that asks for no labels."""
    if not dataset["folder"]:
        raise UserError("method.source.folder=null: expected the folder of images below data_root")
    folder = root / dataset["folder"]
    files = sorted(path for path in folder.glob("**/*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise UserError(f"method.source.folder={dataset['folder']}: there are no images in {folder}")
    return Images([(path, 0) for path in files], [], ("unlabelled",))


def _folders(folder: Path, origin: str) -> Images:
    layout = f"expected {folder}/{{train,val}}/<class>/<image> ({origin}), or use scale=mini"
    parts, names = [], {}
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise UserError(f"dataset.folder: there is no folder {folder / split}; {layout}")
        names[split] = sorted(entry.name for entry in (folder / split).iterdir() if entry.is_dir())
        if split == "val" and names["val"] != names["train"]:
            odd = sorted(set(names["val"]) ^ set(names["train"]))
            raise UserError(
                f"dataset.folder: {folder} has other classes in train and val, for example {odd[0]!r}; {layout}"
            )
        files = [
            (path, label)
            for label, name in enumerate(names[split])
            for path in sorted((folder / split / name).iterdir())
            if path.suffix.lower() in IMG_EXTENSIONS
        ]
        if not files:
            raise UserError(f"dataset.folder: {folder / split} holds no images; {layout}")
        parts.append(files)
    return Images(parts[0], parts[1], tuple(names["train"]))
