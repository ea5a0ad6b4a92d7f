"""Command lines and files of data as nobody should write them, made from a seed, and what has to become of each.

A mistake of the user is one line and status 2; nothing ends in a traceback, hangs, or passes without having had effect.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layouts
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import configs
from experiments.checking import known_keys
from experiments.run import main, normalise
from kt.data import build_data
from kt.data.names import IMAGE_ENDS, PACKED_ENDS
from kt.errors import UserError

SECONDS = 30  # that a case may take


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Within, what takes too long is stopped."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(error: BaseException) -> str:
    """An exception and where it came from."""
    places = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__}: {str(error)[:200]!r} at {' '.join(places[-4:])}"


# ------------------------------------------------------------------------------------------------------- command lines

SIGNS = "=+~@./:,'\"[](){}$\\ \t\n-#%*?!a1_é\udce9"
KEYS = sorted({*known_keys()} - {"plan", "rehearse", "settings"})
OWN = [
    key for key in KEYS if key.split(".")[0] in ("student", "dataset", "schedule", "scale", "wandb") or "." not in key
]
STRANGE = (
    *("{zz:1}", "[[1],{a:1}]", "[1,[2]]", "[]", "nan", "-inf", "-1", "0", "1.5", "1e400", "1e-9", "true", "null", "''"),
    *("x", "'x y'", "é", "'é'", "${nope}", "${oc.env:NOPE_}", "${seed}", "../..", "~nobody_/x", "x" * 300, "9" * 30),
    *("9" * 5000, "[" * 2000, "range(0,1000000000)", "interval(0,1)", "glob(*)", "choice(1,2)", "1,2", "'\\udce9'"),
)
NO_CHOICE = (
    "-1",
    "null",
    "nan",
    "[1,[2]]",
    "{a:1}",
    "1.5",
    "true",
    "../x",
    "x/../../y",
    "''",
    "zz",
    "[kd]",
    "glob(zz*)",
)
GROUPS = (
    *("student", "teacher", "dataset", "method", "schedule", "scale", "table", "+table", "+dataset@teacher.dataset"),
    *("schedule@teacher.schedule", "hydra/launcher", "hydra/sweeper", "hydra"),
)
NAMES = ("scale.name", "table.name", "dataset.folder", "dataset.train_split", "dataset.test_split")
NO_NAME = ("../x", "/x", "a/../../b", "..")
FLAGS = ("--foo", "--cfg=x", "-z", "--resolve=1", "--info=zz", "--package", "--cfg", "-1")
TABLE = ("+table=imagenet_compression", "rows=kd")
IN_TABLES = (
    *(
        "rows=zz",
        "rows={a:b}",
        "role=[[a]]",
        "method=[kd]",
        "teachers.zz.seed=1",
        "teachers.resnet50=1",
        "table.name=x",
    ),
    *("cell=student", "workers=[1]", "scale=mini,fast", "method.zz=1", "output_root=[1]", "seed=range(0,1000000)"),
    *("student=1,2", "dataset=null", "scale.name=../x", "schedule.epochs={a:1}", "seed=x", "+table=zz"),
)
RIGHT = (
    *(("seed=3",), ("schedule.lr=0.1",), ("schedule.epochs=2", "schedule.milestones=[1]"), ("dataset.subset=10",)),
    *(("student=resnet32",), ("method=kd", "teacher=resnet20"), ("scale=fast",), ("precision=bf16",), ("threads=1",)),
    *(("wandb.mode=disabled",), ("table.label='a b, c'",), ("dataset.validation=0.1",), ("student.network.width=0.5",)),
    *(("data_root='/d/é'",), ("device=cpu",), ("dataset=scenes_small",), ("data_root=~/x", "dataset=cifar100")),
)


def _mistyped(key: str, rng: random.Random) -> str:
    """A key with one sign too few or too many, which there is not."""
    while True:
        place = rng.randrange(len(key))
        found = key[:place] + rng.choice(("", key[place] * 2, rng.choice("xyz_"))) + key[place + 1 :]
        parents = {known[: len(found)] for known in KEYS}
        if found not in KEYS and found not in parents and found.strip(".") and found.split(".")[0] != "hydra":
            return found


def line(rng: random.Random) -> tuple[list[str], int | None]:
    """Arguments, and the status that they have to end with; None: 2, or 0 if the config then holds what they say."""
    kinds: dict[str, Callable[[], tuple[list[str], int | None]]] = {
        "signs": lambda: (["".join(rng.choices(SIGNS, k=rng.randint(0, 12)))], 2),
        "key": lambda: ([f"{_mistyped(rng.choice(KEYS), rng)}=1"], 2),
        "value": lambda: ([f"{rng.choice(rng.choice((KEYS, OWN)))}={rng.choice(STRANGE)}"], None),
        "choice": lambda: ([f"{rng.choice(GROUPS)}={rng.choice(NO_CHOICE)}"], 2),
        "name": lambda: ([f"{rng.choice(NAMES)}={rng.choice(NO_NAME)}"], 2),
        "flag": lambda: ([rng.choice(FLAGS)], 2),
        "table": lambda: ([*TABLE, rng.choice(IN_TABLES)], 2),
        "sweep": lambda: (["-m", f"{rng.choice(KEYS)}={rng.choice(STRANGE)},{{zz:1}}"], 2),
        "right": lambda: ([each for part in rng.sample(RIGHT, 2) for each in part], 0),
    }
    weights = (16, 15, 28, 18, 6, 4, 4, 3, 6)
    return kinds[rng.choices([*kinds], weights)[0]]()


def _lacks(arguments: list[str]) -> str | None:
    """Which of the values on a command line the config that comes of it does not have."""
    config = OmegaConf.create(configs.composed(*arguments))
    for override in OverridesParser.create().parse_overrides(normalise(arguments)):
        given, key = override.value(), override.key_or_group
        if str(override.input_line).startswith("++") and "${" not in str(given):
            found = OmegaConf.select(config, key)
            if found != given and str(found) != str(given).replace("~", str(Path.home())):
                return f"{key} is {found!r}"
    return None


def fault_of_line(seed: int, root: Path) -> str | None:
    """What is wrong with how a command line of that seed ends; None if nothing is."""
    arguments, wanted = line(random.Random(seed))
    out, err = io.StringIO(), io.StringIO()
    shown = f"line {seed} {[each[:80] for each in arguments]}"
    try:
        with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([f"output_root={root}", *arguments, "plan=true"])
    except (Exception, SystemExit) as error:
        return f"{shown}: {told(error)}"
    said = err.getvalue()
    if status != wanted and (wanted is not None or status not in (0, 2)):
        return f"{shown}: status {status}; {said[-200:]!r}"
    if status == 2 and not (said.startswith("kt: error: ") and said.endswith("\n") and len(said.splitlines()) == 1):
        return f"{shown}: no line but {said[-200:]!r}"
    if status == 0 and wanted is None and (lacking := _lacks(arguments)):
        return f"{shown}: passes, and {lacking}"
    return None


# ---------------------------------------------------------------------------------------------------------- data files

DATA = (
    *(("cifar100", "classification"), ("imagefolder", "classification"), ("segfolder", "segmentation")),
    *(("gta5", "segmentation"), ("cityscapes", "segmentation"), ("cityscapes", "detection"), ("coco", "detection")),
    *(("citypersons", "pedestrians"), ("depthfolder", "depth"), ("nyuv2", "depth"), ("cub200", "classification")),
    *(("stanford40", "classification"), ("mit67", "classification")),
    *(("tiny_imagenet", "classification"),),
)
NO_FILE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda content, rng: b"",
    "half": lambda content, rng: content[: len(content) // 2],
    "a page": lambda content, rng: b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "noise": lambda content, rng: b"\xff" + rng.randbytes(len(content)),
}


def flipped(content: bytes, rng: random.Random) -> bytes:
    """With some other bytes."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def changed(content: bytes, rng: random.Random) -> bytes:
    """JSON with another value somewhere, or without one."""
    whole = json.loads(content)
    node: Any = whole
    while True:
        key = rng.choice([*node]) if isinstance(node, dict) else rng.randrange(len(node))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
            node = node[key]
            continue
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice([None, "x", -1, 1e400, 10**30, [], {}, [None], {"a": 1}, 0.5, True, "../x", ""])
        return json.dumps(whole).encode()


_opened: list[set[str]] = []  # whom to tell


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened and isinstance(arguments[0], str):
        _opened[-1].add(arguments[0])


sys.addaudithook(_hear)


@contextlib.contextmanager
def opening() -> Iterator[set[str]]:
    """Within, what files are opened."""
    _opened.append(set())
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


def _read(settings: dict[str, Any], root: Path, cache: Path) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    data = build_data({"augmentation": "none", **settings}, root, batch_size=2, seed=0, workers=0, cache_root=cache)
    for loader in (data.train, data.test):
        for _ in loader.epoch(0):
            pass


def fault_of_file(seed: int, root: Path) -> str | None:
    """What is wrong with how a dataset with one file spoilt by that seed is read; None if nothing is."""
    rng = random.Random(seed)
    name, task = rng.choice(DATA)
    place = root / f"{name}-{task}"
    if not place.exists():
        settings = layouts.make(name, task, place)
        with opening() as opened:
            _read(settings, place, root / "cache")
        (place / "settings.json").write_text(json.dumps([settings, sorted(opened)]))
    settings, read = json.loads((place / "settings.json").read_text())
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.parent != place]
    path = rng.choice([each for each in files if "cache" not in each.parts])
    content, kind = path.read_bytes(), rng.choice([*NO_FILE, "flipped", "flipped", "changed", "folder", "gone"])
    sure = kind != "flipped" and not (path.suffix in (".txt", ".csv") and kind == "half")
    if kind == "changed":
        kind, sure = (kind, False) if path.suffix == ".json" else ("flipped", False)
    sure &= str(path) in read or path.suffix in PACKED_ENDS  # what no split reads is nobody's, and HDF5 opens by itself
    sure &= kind not in ("gone", "folder") or path.suffix.lower() not in (*IMAGE_ENDS, *PACKED_ENDS)
    shown = f"file {seed} {name} {task}: {path.relative_to(place)} {kind}"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes({**NO_FILE, "flipped": flipped, "changed": changed}[kind](content, rng))
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _read(settings, place, root / "cache")
        return f"{shown}: is read" if sure else None
    except UserError as error:
        if "\n" in str(error):
            return f"{shown}: not in one line: {str(error)[:200]!r}"
        return None if path.name in str(error) or not sure else f"{shown}: not named: {str(error)[:200]!r}"
    except Exception as error:
        return f"{shown}: {told(error)}"
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
