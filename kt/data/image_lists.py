"""Classification: datasets whose images, classes and splits stand in lists, in the layouts that are handed out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt.data.images import Images
from kt.data.names import IMAGE_ENDS
from kt.errors import UserError

# Training images of each domain in the cleaned lists, which the paper prints. The first release has others.
CLEANED = {"clipart": 33525, "painting": 50416, "real": 120906}


@dataclass(frozen=True)
class _Folder:
    """A dataset's folder below the root, with the layout that it should have.

    Attributes:
        root: Where it lies.
        layout: The layout, from the dataset's folder on.
        origin: Who hands it out.
    """

    root: Path
    layout: str
    origin: str

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
            text = (self.path / name).read_text("utf-8")
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

    def split(self, name: str, images: Iterable[tuple[str, str]], classes: Mapping[str, int]) -> list[tuple[Path, int]]:
        """Files and labels of a split.

        Args:
            name: Of the list that the images are from.
            images: Their paths below the folder, with their classes.
            classes: Class -> label.
        """
        found = []
        for path, of in images:
            if of not in classes:
                raise self.wrong(
                    f"{self.path / name}: {path} is of {of!r}, which is none of the {len(classes)} classes"
                )
            if not path.lower().endswith(IMAGE_ENDS):  # what the state of the data does not look at
                raise self.wrong(f"{self.path / name}: {path} does not end as an image does")
            if not (self.path / path).is_file():
                raise self.wrong(f"there is no {self.path / path}, which {name} names")
            found.append((self.path / path, classes[of]))
        if not found:
            raise self.wrong(f"{self.path / name} names no images")
        return found


def read_cub200(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Caltech-UCSD Birds 200-2011 (Wah et al. 2011): 5994 training and 5794 test images of 200 species."""
    lists = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    layout = f"CUB_200_2011/{{images/<class>/<image>.jpg,{','.join(lists)}}}"
    folder = _Folder(root, layout, "https://www.vision.caltech.edu/datasets/cub_200_2011")
    # Every list joins a number to something else.
    columns = [folder.pairs(name) for name in lists]
    names, paths, class_of, trains = map(dict, columns)
    for name, rows in zip(lists, columns, strict=True):
        counts = Counter(number for number, _ in rows)
        if twice := next((number for number, count in counts.items() if count > 1), None):
            raise folder.wrong(f"{folder.path / name} has {counts[twice]} lines for number {twice}")
    if odd := next((number for number in paths if trains.get(number, "0") not in ("0", "1")), None):
        raise folder.wrong(f"{folder.path / lists[3]}: image {odd} has {trains[odd]!r}, neither 1 (training) nor 0")
    for name, column in zip(lists[2:], (class_of, trains), strict=True):
        if lost := next((number for number in paths if number not in column), None):
            raise folder.wrong(f"{folder.path / name} has no line for image {lost}")
    classes = {number: label for label, number in enumerate(names)}
    parts = [
        folder.split("images.txt", ((f"images/{paths[i]}", class_of[i]) for i in paths if trains[i] == part), classes)
        for part in ("1", "0")
    ]
    return Images(parts[0], parts[1], tuple(names.values()))


def read_stanford40(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Stanford 40 Actions (Yao et al. 2011): 4000 training and 5532 test images; a file's name tells its action."""
    layout = "Stanford40/{JPEGImages/<action>_<number>.jpg,ImageSplits/{actions.txt,train.txt,test.txt}}"
    folder = _Folder(root, layout, "http://vision.stanford.edu/Datasets/40actions.html")
    # The first line is a heading.
    names = [name for name, _ in folder.pairs("ImageSplits/actions.txt")][1:]
    classes = {name: label for label, name in enumerate(names)}
    parts = []
    for name in ("ImageSplits/train.txt", "ImageSplits/test.txt"):
        images = ((f"JPEGImages/{line}", line.rpartition("_")[0]) for line in folder.lines(name))
        parts.append(folder.split(name, images, classes))
    return Images(parts[0], parts[1], tuple(names))


def read_mit67(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """MIT indoor scenes (Quattoni and Torralba 2009): 67 kinds of places, each of about 80 and 20 images."""
    layout = "mit67/{Images/<class>/<image>.jpg,TrainImages.txt,TestImages.txt}"
    folder = _Folder(root, layout, "https://web.mit.edu/torralba/www/indoor.html")
    lists = {name: folder.lines(name) for name in ("TrainImages.txt", "TestImages.txt")}
    names = sorted({line.partition("/")[0] for line in lists["TrainImages.txt"]})
    classes = {name: label for label, name in enumerate(names)}
    parts = [
        folder.split(name, ((f"Images/{line}", line.partition("/")[0]) for line in lines), classes)
        for name, lines in lists.items()
    ]
    return Images(parts[0], parts[1], tuple(names))


def read_domainnet(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """One domain of DomainNet (Peng et al. 2019): 345 classes, cleaned lists, which lie where a common loader has them.

    Raises:
        UserError: The lists are not the cleaned ones, or something is wrong with the files.
    """
    domain = dataset["domain"]
    if domain not in CLEANED:
        raise UserError(f"dataset.domain={domain}: expected one of {', '.join(CLEANED)}")
    layout = "domainnet/{<domain>/<class>/<image>,[splits/|image_list/]<domain>_{train,test}.txt}"
    folder = _Folder(root, layout, "https://ai.bu.edu/M3SDA, cleaned version")
    places = [
        place for place in ("", "splits/", "image_list/") if (folder.path / f"{place}{domain}_train.txt").is_file()
    ]
    lists = [f"{(places or [''])[0]}{domain}_{split}.txt" for split in ("train", "test")]
    train, test = (folder.pairs(name) for name in lists)
    if len(train) != CLEANED[domain]:
        raise folder.wrong(f"{folder.path / lists[0]} names {len(train)} images, the cleaned list {CLEANED[domain]}")
    names = {number: Path(path).parent.name for path, number in train}
    classes = {str(label): label for label in range(len(names))}
    if odd := min(names.keys() - classes, default=None):
        raise folder.wrong(f"{folder.path / lists[0]}: label {odd!r}, but {len(names)} classes, counted from 0")
    parts = [folder.split(name, images, classes) for name, images in zip(lists, (train, test), strict=True)]
    return Images(parts[0], parts[1], tuple(names[number] for number in classes))


def read_tiny_imagenet(dataset: Mapping[str, Any], root: Path, cache: Path | None) -> Images:
    """Tiny ImageNet (Stanford CS231n): 200 classes of 500 training and 50 validation images, 64 pixels a side."""
    layout = (
        "tiny-imagenet-200/{train/<class>/images/<image>.JPEG,val/{images/<image>.JPEG,val_annotations.txt},wnids.txt}"
    )
    folder = _Folder(root, layout, "http://cs231n.stanford.edu/tiny-imagenet-200.zip")
    names = sorted(folder.lines("wnids.txt"))
    classes = {name: label for label, name in enumerate(names)}
    trained = []
    for name in names:
        files = sorted((folder.path / "train" / name / "images").glob("*"))
        images = [(file, classes[name]) for file in files if file.suffix.lower() in IMAGE_ENDS]
        if not images:
            raise folder.wrong(f"there are no images in {folder.path / 'train' / name / 'images'}")
        trained += images
    tested = ((f"val/images/{name}", of) for name, of in folder.pairs("val/val_annotations.txt"))
    return Images(trained, folder.split("val/val_annotations.txt", tested, classes), tuple(names))
