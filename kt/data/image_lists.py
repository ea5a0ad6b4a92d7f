"""Classification: datasets whose images, classes and splits stand in lists, in the layouts that are handed out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kt.data.images import Images
from kt.data.names import is_image, unseen
from kt.errors import UserError
from kt.files import find
from kt.settings import shown

logger = logging.getLogger(__name__)

# Training and test images of each domain in the cleaned lists, the former as the MAS paper prints them. The first
# release has others.
CLEANED = {"clipart": (33525, 14604), "painting": (50416, 21850), "real": (120906, 52041)}
DOMAINNET_CLASSES = 345


# Paths of images below the folder, with their classes.
Listed = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Folder:
    """A dataset's folder below the root, with the layout that it should have.

    Attributes:
        root: Where it lies.
        layout: The layout, from the dataset's folder on.
        origin: Who hands it out.
        counts: How many training and test images it has.
    """

    root: Path
    layout: str
    origin: str
    counts: tuple[int, int]

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.root / self.layout.partition("/")[0]

    def wrong(self, what: str) -> UserError:
        """What is wrong, with the layout expected."""
        hint = "set data_root= to the folder that holds it, or use scale=mini"
        return UserError(f"data_root={str(self.root)!r}: {what}; expected {self.layout} ({self.origin}); {hint}")

    def lines(self, name: str) -> list[str]:
        """The lines of a list."""
        try:
            text = (self.path / name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = "there is no" if isinstance(error, FileNotFoundError | NotADirectoryError) else "cannot read"
            raise self.wrong(f"{reason} {self.path / name}") from None
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise self.wrong(f"{self.path / name} is empty")
        return found

    def pairs(self, name: str) -> list[tuple[str, str]]:
        """The first two columns of a list."""
        rows = [line.split() for line in self.lines(name)]
        short = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
        if short:
            raise self.wrong(f"{self.path / name}: line {short} has one column, not two")
        return [(row[0], row[1]) for row in rows]

    def split(self, name: str, images: Listed, names: Mapping[str, str], form: str) -> list[tuple[Path, int]]:
        """Files and labels of a split; see `read`."""
        label = {of: number for number, of in enumerate(names)}
        found: dict[Path, int] = {}
        for path, of in images:
            if of not in label:
                raise self.wrong(f"{self.path / name}: {path} is of {of!r}, which is none of the {len(names)} classes")
            if fault := unseen(path, form):
                raise self.wrong(f"{self.path / name}: {fault}")
            file = self.path / path
            if not file.is_file():
                raise self.wrong(f"there is no {file}, which {name} names")
            if file in found:
                raise self.wrong(f"{self.path / name} names {path} twice")
            found[file] = label[of]
        if not found:
            raise self.wrong(f"{self.path / name} names no images")
        return list(found.items())

    def read(self, lists: Sequence[tuple[str, Listed]], names: Mapping[str, str], forms: Sequence[str]) -> Images:
        """Both splits; tells where their sizes are not those handed out.

        Args:
            lists: Of training and of test images: the list's name, and their paths below the folder with their classes.
            names: What the lists call a class -> its name, in the order of the labels.
            forms: Of the paths, see `kt.data.names.unseen`.

        Raises:
            UserError: The lists and the files do not go together.
        """
        train, test = (self.split(name, images, names, form) for (name, images), form in zip(lists, forms, strict=True))
        if both := dict(train).keys() & dict(test).keys():
            raise self.wrong(f"{min(both)} is both a training and a test image")
        if (sizes := (len(train), len(test))) != self.counts:
            words = "%s: the lists name %d training and %d test images; handed out are %d and %d"
            logger.warning(words, self.path, *sizes, *self.counts)
        learnt = {label for _, label in train}
        if none := [name for label, name in enumerate(names.values()) if label not in learnt]:
            logger.warning("%s: no training images of %s", self.path, ", ".join(none))
        return Images(train, test, tuple(names.values()))

    def check_folders(self, lists: Sequence[tuple[str, Listed]], names: Mapping[str, str]) -> None:
        """Refuses an image whose class is not the one that its folder is named after; arguments as for `read`."""
        for name, images in lists:
            for path, of in images:
                if of in names and names[of] != (folder := PurePosixPath(path).parent.name):
                    raise self.wrong(f"{self.path / name}: {path} is of {names[of]!r}, but lies in {folder!r}")


def read_cub200(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Caltech-UCSD Birds 200-2011 (Wah et al. 2011): 5994 training and 5794 test images of 200 species."""
    files = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    layout = f"CUB_200_2011/{{images/<class>/<image>.jpg,{','.join(files)}}}"
    folder = _Folder(root, layout, "https://www.vision.caltech.edu/datasets/cub_200_2011", (5994, 5794))
    # Every list joins a number to something else.
    columns = [folder.pairs(name) for name in files]
    names, paths, class_of, trains = map(dict, columns)
    for name, rows in zip(files, columns, strict=True):
        counts = Counter(number for number, _ in rows)
        if twice := next((number for number, count in counts.items() if count > 1), None):
            raise folder.wrong(f"{folder.path / name} has {counts[twice]} lines for number {twice}")
    if odd := next((number for number in paths if trains.get(number, "0") not in ("0", "1")), None):
        raise folder.wrong(f"{folder.path / files[3]}: image {odd} has {trains[odd]!r}, neither 1 (training) nor 0")
    for name, column in zip(files[2:], (class_of, trains), strict=True):
        if lost := next((number for number in paths if number not in column), None):
            raise folder.wrong(f"{folder.path / name} has no line for image {lost}")
    lists = [
        ("images.txt", [(f"images/{paths[i]}", class_of[i]) for i in paths if trains[i] == part]) for part in ("1", "0")
    ]
    folder.check_folders(lists, names)
    return folder.read(lists, names, ["images/*/*"] * 2)


def read_stanford40(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Stanford 40 Actions (Yao et al. 2011): 4000 training and 5532 test images; a file's name tells its action."""
    layout = "Stanford40/{JPEGImages/<action>_<number>.jpg,ImageSplits/{actions.txt,train.txt,test.txt}}"
    folder = _Folder(root, layout, "http://vision.stanford.edu/Datasets/40actions.html", (4000, 5532))
    # The first line is a heading.
    names = [name for name, _ in folder.pairs("ImageSplits/actions.txt")][1:]
    lists = [
        (name, [(f"JPEGImages/{line}", line.rpartition("_")[0]) for line in folder.lines(name)])
        for name in ("ImageSplits/train.txt", "ImageSplits/test.txt")
    ]
    return folder.read(lists, dict(zip(names, names, strict=True)), ["JPEGImages/*"] * 2)


def read_mit67(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """MIT indoor scenes (Quattoni and Torralba 2009): 67 kinds of places, each of about 80 and 20 images."""
    layout = "mit67/{Images/<class>/<image>.jpg,TrainImages.txt,TestImages.txt}"
    folder = _Folder(root, layout, "https://web.mit.edu/torralba/www/indoor.html", (5360, 1340))
    lists = [
        (name, [(f"Images/{line}", line.partition("/")[0]) for line in folder.lines(name)])
        for name in ("TrainImages.txt", "TestImages.txt")
    ]
    names = sorted({of for _, of in lists[0][1]})
    return folder.read(lists, dict(zip(names, names, strict=True)), ["Images/*/*"] * 2)


def read_domainnet(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """One domain of DomainNet (Peng et al. 2019): 345 classes, cleaned lists, which lie where a common loader has them.

    Raises:
        UserError: The lists are not the cleaned ones, or something is wrong with the files.
    """
    domain = dataset["domain"]
    if domain not in CLEANED:
        raise UserError(f"dataset.domain={shown(domain)}: expected one of {', '.join(CLEANED)}")
    layout = "domainnet/{<domain>/<class>/<image>,[splits/|image_list/]<domain>_{train,test}.txt}"
    folder = _Folder(root, layout, "https://ai.bu.edu/M3SDA, cleaned version", CLEANED[domain])
    places = [
        place for place in ("", "splits/", "image_list/") if (folder.path / f"{place}{domain}_train.txt").is_file()
    ]
    place = (places or [""])[0]
    lists = [(name, folder.pairs(name)) for name in (f"{place}{domain}_{split}.txt" for split in ("train", "test"))]
    (name, train), (_, test) = lists
    if len(train) != CLEANED[domain][0]:
        raise folder.wrong(f"{folder.path / name} names {len(train)} images, the cleaned list {CLEANED[domain][0]}")
    # A class may have no training images: the cleaned list of paintings lacks t-shirts.
    found = {number: PurePosixPath(path).parent.name for path, number in (*test, *train)}
    labels = [str(label) for label in range(DOMAINNET_CLASSES)]
    if odd := min(found.keys() - labels, default=None):
        raise folder.wrong(f"{folder.path / name}: label {odd!r}; expected 0 to {labels[-1]}")
    folder.check_folders(lists, found)
    names = {label: found.get(label, f"class {label}") for label in labels[: 1 + max(map(int, found))]}
    if twice := next((of for of, count in Counter(names.values()).items() if count > 1), None):
        raise folder.wrong(f"{folder.path / name}: images of the folder {twice!r} have several labels")
    return folder.read(lists, names, [f"{domain}/*/*"] * 2)


def read_tiny_imagenet(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Tiny ImageNet (Stanford CS231n): 200 classes of 500 training and 50 validation images, 64 pixels a side."""
    layout = (
        "tiny-imagenet-200/{train/<class>/images/<image>.JPEG,val/{images/<image>.JPEG,val_annotations.txt},wnids.txt}"
    )
    folder = _Folder(root, layout, "http://cs231n.stanford.edu/tiny-imagenet-200.zip", (100_000, 10_000))
    names = sorted(folder.lines("wnids.txt"))
    trained = []
    for name in names:
        place = f"train/{name}/images"
        files = sorted(path.name for path in find(folder.path / place, "*") if is_image(path))
        if not files:
            raise folder.wrong(f"there are no images in {folder.path / place}")
        trained += [(f"{place}/{file}", name) for file in files]
    tested = [(f"val/images/{name}", of) for name, of in folder.pairs("val/val_annotations.txt")]
    lists = [("wnids.txt", trained), ("val/val_annotations.txt", tested)]
    return folder.read(lists, dict(zip(names, names, strict=True)), ["train/*/images/*", "val/images/*"])
