"""Classification: datasets of images with one class each, resident on the device where they fit."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms import v2

from kt.data import scenes
from kt.data.cache import Arrays, drawn
from kt.data.loaders import Loader, ResidentLoader, StreamingLoader
from kt.data.names import ANY, check_share, folder_of, is_hidden, is_image, read_dataset
from kt.data.pickles import as_text, read_pickle
from kt.data.spec import Data, DataSpec
from kt.errors import UserError
from kt.evaluation.accuracy import evaluate_accuracy
from kt.files import find
from kt.models.names import IMAGENET

logger = logging.getLogger(__name__)

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# Of 20,000 crops in each style; a test draws them again.
SCENES_MEAN, SCENES_STD = (0.440, 0.495, 0.540), (0.174, 0.200, 0.247)
# Of image files what decodes to at most so many bytes stays in memory.
RESIDENT_LIMIT = 2 << 30
TEST_SEED_OFFSET = 1_000_000


# From count, size, seed and style to images and labels, as `kt.data.scenes.classification_arrays`.
Drawing = Callable[[int, int, int, str], tuple[NDArray[np.uint8], NDArray[np.int64]]]


@dataclass
class Labelled:
    """A whole split in memory: images (n, h, w, 3) uint8 and labels (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


Split = Labelled | Sequence[tuple[Path, int]]


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
    """Image files as squares, uint8 (size, size, 3); module-level so that loading processes can be spawned.

    Plain, an image's shorter side becomes 256 / 224 of the size and the centre is taken, as papers test on ImageNet.

    Args:
        paths: The files.
        size: Side of a square.
        is_random: Whether it is a random part of the image, mirrored at random, as papers train on ImageNet.
    """

    def __init__(self, paths: Sequence[Path], size: int, is_random: bool):
        self.paths, self.size, self.is_random = paths, size, is_random
        self.kept: dict[int, NDArray[np.uint8]] = {}
        steps = (
            (v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip())
            if is_random
            else (v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size))
        )
        self.transform = v2.Compose(steps)

    def plain(self) -> _Files:
        """The same files with nothing random."""
        other = _Files(self.paths, self.size, False)
        other.kept = self.kept
        return other

    def keep(self, indices: NDArray[np.int64]) -> None:
        """Decodes some of them now and never again."""
        self.kept = {int(index): np.asarray(_open(self.paths[index])) for index in indices}

    def room(self, indices: NDArray[np.int64], most: float = math.inf) -> int:
        """Bytes that keeping some of them takes; what is found to be more than `most` is not counted to its end."""
        if not self.is_random:
            return len(indices) * self.size**2 * 3
        taken = 0
        for index in indices:  # only headers are read, and not more than what fits
            with opened(self.paths[index]) as image:
                taken += image.width * image.height * 3
            if taken > most:
                break
        return taken

    def __getitem__(self, index: int) -> Tensor:
        image = Image.fromarray(self.kept[index]) if index in self.kept else _open(self.paths[index])
        return torch.from_numpy(np.array(self.transform(image)))


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
    source = _read(dataset, data_root, cache_root)
    labels, test_labels = _labels(source.train), _labels(source.test)
    classes = len(source.class_names)
    if not len(test_labels):
        raise UserError(
            f"dataset.name={dataset['name']}: has no test images; without any it is of use as method.source only"
        )
    if classes < 2:
        raise UserError(f"dataset.name={dataset['name']}: has one class, {source.class_names[0]}; expected several")
    held = check_share(len(labels), dataset["subset"], dataset["validation"])
    chosen = _chosen(labels, dataset, classes)
    held_out: NDArray[np.int64] = np.empty(0, np.int64)
    if held:
        held_out = chosen[balanced_subset(labels[chosen], held, classes, last=True)]
        chosen = np.setdiff1d(chosen, held_out)
    size = dataset["image_size"]
    common: dict[str, Any] = {"batch_size": batch_size, "device_batch": device_batch, "seed": seed}
    common |= {"device": torch.device(device), "rank": rank, "world": world}
    resident = dataset["resident"]
    train = _loader(source.train, labels, chosen, size, dataset["augmentation"], True, resident, workers, common)
    scored = (source.train, labels) if held else (source.test, test_labels)
    tested = held_out if held else np.arange(len(test_labels))
    test = _loader(*scored, tested, size, "none", False, resident, workers, common)
    numbers = (len(chosen), len(tested))
    facts = (dataset["name"], classes, size, source.mean, source.std, *numbers, source.class_names)
    classes_of = np.full(chosen.max() + 1, -1)
    classes_of[chosen] = labels[chosen]
    spec = DataSpec(*facts, largest_index=int(chosen.max()), labels=classes_of)
    names = list(source.class_names)
    score = functools.partial(evaluate_accuracy, loader=test, num_classes=classes, class_names=names)
    return Data(spec, train, test, score)


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
    source = _read(dataset, data_root, cache_root)
    labels = _labels(source.train)
    check_share(len(labels), dataset["subset"], 0.0, "method.source")
    chosen = _chosen(labels, dataset, len(source.class_names))
    count = round(share * len(chosen))
    if count < 2:  # batch normalisation needs two
        raise UserError(
            f"method.source_share={share}: takes {count} of {len(chosen)} images; expected a share of two or more"
        )
    drawn = np.random.default_rng(0).permutation(len(chosen))[:count]
    common["device"] = torch.device(device)
    size, augmentation = dataset["image_size"], dataset["augmentation"]
    taken = np.sort(chosen[drawn])
    return _loader(source.train, labels, taken, size, augmentation, True, dataset["resident"], workers, common)


def check_split(part: Split, classes: int, whose: object) -> None:
    """Refuses pixels and labels that cannot be what they are taken for.

    Args:
        part: A split as a reader gives it.
        classes: Number of classes.
        whose: What the error calls it.

    Raises:
        UserError: Says what they are and what is expected.
    """
    if isinstance(part, Labelled):
        images, labels = np.asarray(part.images), np.asarray(part.labels)
        if images.dtype != np.uint8 or images.shape[3:] != (3,):
            raise UserError(f"{whose}: images are {images.dtype} {images.shape}; expected uint8 (n, height, width, 3)")
        if labels.shape != images.shape[:1] or (len(labels) and labels.dtype.kind not in "iu"):
            kind = f"{labels.dtype} {labels.shape} for {len(images)} images"
            raise UserError(f"{whose}: labels are {kind}; expected an integer for each")
    else:
        labels = np.array([label for _, label in part])
    strange = labels[(labels < 0) | (labels >= classes)]
    if len(strange):
        raise UserError(f"{whose}: has the label {strange[0]}; expected 0 to {classes - 1}, one of the classes")


def _read(dataset: Mapping[str, Any], data_root: Path, cache_root: Path | None) -> Images:
    """What the reader of a dataset gives, checked."""
    source: Images = read_dataset(dataset, data_root, cache_root)
    for name, part in (("training", source.train), ("test", source.test)):
        check_split(part, len(source.class_names), f"dataset.name={dataset['name']}: {name} set")
    return source


def _chosen(labels: NDArray[np.int64], dataset: Mapping[str, Any], classes: int) -> NDArray[np.int64]:
    """The training images that take part where a dataset's config asks for a subset."""
    if dataset["subset"] is None:
        return np.arange(len(labels))
    return balanced_subset(labels, dataset["subset"], classes)


def balanced_subset(labels: NDArray[np.int64], size: int, classes: int, last: bool = False) -> NDArray[np.int64]:
    """Indices, rising, of the first (or last) samples of every class in turn, `size` in all, of at least as many."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=classes)
    # The k-th sample of each class, class by class: rank within the class first, then the class.
    within = np.concatenate([np.arange(count)[::-1] if last else np.arange(count) for count in counts])
    return np.sort(order[np.lexsort((labels[order], within))[:size]])


def _labels(part: Split) -> NDArray[np.int64]:
    return np.array(part.labels if isinstance(part, Labelled) else [label for _, label in part], np.int64)


def _loader(
    part: Split,
    labels: NDArray[np.int64],
    chosen: NDArray[np.int64],
    size: int,
    augmentation: str,
    shuffle: bool,
    resident: bool | None,
    workers: int,
    common: dict[str, Any],
) -> Loader:
    """The chosen images of a split; whether those of files are kept in memory changes no pixel of them."""
    own, indices = torch.from_numpy(labels[chosen]), torch.from_numpy(chosen.astype(np.int64))
    common = {**common, "labels": own, "indices": indices, "augmentation": augmentation, "shuffle": shuffle}
    if isinstance(part, Labelled):
        return ResidentLoader(torch.from_numpy(part.images[chosen]), size=size, **common)
    files = _Files([path for path, _ in part], size, is_random=augmentation == "imagenet")
    if resident is None:
        resident = files.room(chosen, RESIDENT_LIMIT) <= RESIDENT_LIMIT
    if resident and not files.is_random:
        images = torch.empty((len(chosen), size, size, 3), dtype=torch.uint8)
        for place, index in enumerate(chosen):  # one by one: a list of all would take as much room again
            images[place] = files[int(index)]
        return ResidentLoader(images, **common)
    if resident:
        files.keep(chosen)
    if files.is_random:
        common["augmentation"] = "none"  # of what they give
    return StreamingLoader(files, workers=workers, **common)


def kept_bytes(loader: Loader, resident: bool | None) -> int:
    """Bytes of decoded images that a loader would keep under a dataset's `resident`, where it keeps none now.

    Args:
        loader: Of a dataset for classification; one that keeps its images has them in memory already.
        resident: As the dataset's config has it.
    """
    files, most = getattr(loader, "dataset", None), math.inf if resident else RESIDENT_LIMIT
    if not isinstance(loader, StreamingLoader) or not isinstance(files, _Files) or resident is False:
        return 0
    room = files.room(loader.indices.numpy(), most)
    return room if room <= most else 0


@dataclass
class Listed:
    """What is in a folder, in the order of names and without what is hidden: images, other files, and folders."""

    images: list[Path]
    others: list[Path]
    folders: list[Path]


def listed(folder: Path) -> Listed:
    """What is in a folder."""
    found = Listed([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.is_dir():
                part = found.folders
            else:
                part = found.images if is_image(path) else found.others
            if not is_hidden(path):
                part.append(path)
    return found


def check_folders(folders: Iterable[Path], expected: str) -> None:
    """Refuses folders that hold images which nobody would read.

    Raises:
        UserError: Names the first and how many images it holds.
    """
    for folder in folders:
        deeper = sum(is_image(path) for path in find(folder, ANY))
        if deeper:
            raise UserError(f"{folder}: its {deeper} images would not be read; expected {expected}")


def tell_unread(folder: Path, files: Sequence[Path], why: str = "are no images that are read") -> None:
    """Says how many files of a dataset are passed over."""
    if files:
        logger.warning("%s: %d files %s, such as %s", folder, len(files), why, files[0])


def is_deep(image: Image.Image, path: Path | str) -> bool:
    """Whether the numbers of an image of one channel have 16 bits, of which the upper 8 count, as they do of colours.

    Raises:
        UserError: They have 32, and nobody knows their range.
    """
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not deep and image.mode in ("I", "F"):
        kind = "floating point numbers" if image.mode == "F" else "integers of 32 bits"
        raise UserError(f"{path}: its pixels are {kind}, whose range is not known; expected 8 or 16 bits a channel")
    return deep


def orientation(image: Image.Image) -> int:
    """How an image is still to be turned to be seen, by its EXIF tag (1: not at all); of a file, its head is read."""
    if "exif" not in image.info:
        return 1  # or Pillow would look for it behind the pixels
    try:
        tag: Any = image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, ValueError, SyntaxError, struct.error):  # a damaged tag turns nothing
        return 1
    return tag if tag in range(1, 9) else 1


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[Image.Image]:
    """An image file, for what reads it within.

    Raises:
        UserError: It is damaged, or none.
    """
    try:
        if Path(path).is_fifo():  # which would be waited for
            raise OSError("is a pipe, no file")
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    # Pillow's readers raise all of these on damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None


def _open(path: Path) -> Image.Image:
    with opened(path) as image:
        if is_deep(image, path):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


def read_scenes(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Crops of single objects out of embedded scenes."""
    style = scenes.check_style(dataset["style"])
    return draw_splits(dataset, scenes.classification_arrays, scenes.CLASSES, style, 0, cache, [scenes.__file__])


def draw_splits(
    dataset: Mapping[str, Any],
    draw: Drawing,
    names: tuple[str, ...],
    style: str,
    seed: int,
    cache: Path | None,
    code: Iterable[str],
) -> Images:
    """Both splits of an embedded dataset, which the cache keeps; `code` as for `kt.data.cache.drawn`."""

    def split(part: str, seed: int) -> Labelled:
        count, size = dataset[f"{part}_size"], dataset["image_size"]

        def arrays() -> Arrays:
            images, labels = draw(count, size, seed, style)
            return {"images": images, "labels": labels}

        return Labelled(**drawn(cache, f"{dataset['name']}-{style}-{size}-{seed}-{count}", code, arrays))

    return Images(split("train", seed), split("test", seed + TEST_SEED_OFFSET), names, SCENES_MEAN, SCENES_STD)


CIFAR_LAYOUT = (
    "expected the official cifar-100-python/ folder with the files train, test and meta "
    "(https://www.cs.toronto.edu/~kriz/cifar.html); set data_root= to the folder that holds it, or use scale=mini"
)


def read_cifar100(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """The official pickles; images of 32 pixels a side, which the loaders enlarge to `image_size`."""
    folder = root / "cifar-100-python"
    records = {}
    for name in ("train", "test", "meta"):
        try:
            records[name] = read_pickle(folder / name)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            reason = f"there is no {folder / name}" if missing else f"{folder / name}: {error.strerror}"
            raise UserError(f"data_root={str(root)!r}: {reason}; {CIFAR_LAYOUT}") from None
        except UserError as error:
            raise UserError(f"{error}; {CIFAR_LAYOUT}") from None
    try:
        arrays = {
            name: [np.asarray(records[name][key]) for key in ("data", "fine_labels")] for name in ("train", "test")
        }
        if not isinstance(told := records["meta"]["fine_label_names"], list | tuple):
            raise TypeError(f"expected a list of names, it is a {type(told).__name__}")
        names = tuple(as_text(value) for value in told)
    except KeyError as error:
        raise UserError(f"{folder}: the pickles lack {error}; {CIFAR_LAYOUT}") from None
    except (ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the pickles hold no images, labels and names ({reason}); {CIFAR_LAYOUT}") from None
    parts = []
    for name, (images, labels) in arrays.items():
        whole = images.dtype.kind in "iu" and 0 <= images.min(initial=0) <= images.max(initial=0) <= 255
        if not whole or images.shape[1:] not in ((3072,), (3, 32, 32)):
            kind = f"{images.dtype} {images.shape}"
            raise UserError(f"{folder / name}: data are {kind}; expected uint8 (n, 3072), red, green, blue in turn")
        pixels = np.asarray(images, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append(Labelled(np.ascontiguousarray(pixels), labels))
        check_split(parts[-1], len(names), folder / name)
    return Images(parts[0], parts[1], names, CIFAR100_MEAN, CIFAR100_STD)


def read_imagenet(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """ILSVRC 2012, as a folder of images."""
    return _folders(root / str(folder_of(dataset)), "https://www.image-net.org, ILSVRC 2012")


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
    found = sorted(find(folder, ANY))
    files = [path for path in found if is_image(path)]
    if not files:
        raise UserError(f"method.source.folder={dataset['folder']}: there are no images in {folder}")
    tell_unread(folder, [path for path in found if not is_image(path) and path.is_file()])
    return Images([(path, 0) for path in files], [], ("unlabelled",))


def _folders(folder: Path, origin: str) -> Images:
    layout = f"expected {folder}/{{train,val}}/<class>/<image> ({origin}), or use scale=mini"
    parts: list[Split] = []
    names: dict[str, list[str]] = {}
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise UserError(f"dataset.folder: there is no folder {folder / split}; {layout}")
        whole = listed(folder / split)
        names[split] = [place.name for place in whole.folders]
        if split == "val" and names["val"] != names["train"]:
            odd = sorted(set(names["val"]) ^ set(names["train"]))
            raise UserError(
                f"dataset.folder: {folder} has other classes in train and val, for example {odd[0]!r}; {layout}"
            )
        classes = [listed(place) for place in whole.folders]
        check_folders((inner for each in classes for inner in each.folders), layout.removeprefix("expected "))
        files = [(path, label) for label, each in enumerate(classes) for path in each.images]
        if not files:
            raise UserError(f"dataset.folder: {folder / split} holds no images; {layout}")
        none = [place for place, each in zip(whole.folders, classes, strict=True) if not each.images]
        if none and split == "train":
            raise UserError(f"dataset.folder: the class {none[0]} has no images; {layout}")
        if none:
            logger.warning("%s: no images of %s", folder / split, ", ".join(place.name for place in none))
        tell_unread(folder / split, [*whole.images, *(path for each in (whole, *classes) for path in each.others)])
        parts.append(files)
    return Images(parts[0], parts[1], tuple(names["train"]))
