"""What the command says of itself: what one can do, and every group, choice and key with its meaning.

Meanings are where the things themselves are: in the settings' classes (`kt.settings`, `experiments.schema`), in the
first comment of a file of `conf`, in the entries of `kt.data.names` and `kt.models.names`.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import kt
from experiments.checking import nested_settings
from experiments.groups import CONF, GROUPS, choices, dataset_choice
from experiments.schema import ANALYSES, Config
from kt.data.names import DATASETS
from kt.models.names import DENSE_NETWORKS, NETWORKS
from kt.settings import METHODS, Dataset, Method, Schedule, Settings, describe, kinds, literals, shown
from tables.papers import table_files

Pairs = Sequence[tuple[str, str]]  # what stands on the left of a list, and what it means

RUN = "python -m experiments.run"
OVERVIEW: Pairs = (
    (f"{RUN} +table=<table>", "train a table of a paper, judge its claims and draw it; minutes on embedded data"),
    (f"{RUN} +table=<table> plan=true", "what that would train, what is done already and how long the rest may take"),
    (f"{RUN} method=kd teacher=resnet56 student=resnet20", "one student, after the teacher that it needs"),
    (f"{RUN} method=kd teacher=resnet56 schedule.iterations=50", "the same, short"),
    (f"{RUN} -m method=kd,at teacher=resnet56", "a sweep over all values that are listed"),
    (f"{RUN} --help", "all groups, choices and keys; --help method=kd or +table=<table> tells of one choice"),
    (f'eval "$({RUN} -sc install=bash)"', "completes groups, choices, keys and values with TAB in this shell"),
    ("python -m tables", "all tables and how far they are; python -m tables <table> shows one"),
    ("python -m experiments.cells", "what has been trained: list, show, compare, prune"),
    ("python -m experiments.bench", "the step time of every method"),
)
OPTIONS: Pairs = (
    ("-m", "train every combination of the values that are listed, as a sweep"),
    ("--cfg job", "show the composed config and train nothing"),
    ("--help", "this; with choices (--help method=kd dataset=cifar100) what they are, and their keys"),
    ("--version", "of kt, and of what it runs on"),
    ("-sc install=bash", "print what makes TAB complete; -sc uninstall=bash takes it back"),
    ("--hydra-help", "of the rest, which is Hydra's"),
)
PACKAGES = ("torch", "torchvision", "timm", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")
LEFT = 28  # columns of a terminal for what is explained


def version() -> str:
    """Of kt, and of what it runs on."""
    found = {name: _version(name) for name in PACKAGES}
    return f"kt {kt.__version__} ({', '.join(f'{name} {each}' for name, each in found.items() if each)})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines(pairs: Pairs, indent: str = "  ") -> Iterator[str]:
    """A list of things and their meanings, each in one line, which folds on a terminal."""
    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else sys.maxsize
    left = min(max((len(name) for name, _ in pairs), default=0), LEFT)
    hang = indent + " " * (left + 2)
    for name, meaning in pairs:
        first = f"{indent}{name:{left}}"
        if len(name) > left and width < sys.maxsize:
            yield first
            first = indent + " " * left
        fold = textwrap.TextWrapper(width, initial_indent=f"{first}  ", subsequent_indent=hang, break_on_hyphens=False)
        yield (fold.wrap(meaning) or [first])[0].rstrip()
        yield from fold.wrap(meaning)[1:]


def words(names: Sequence[str], indent: str = "  ") -> str:
    """Names one after the other."""
    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else sys.maxsize
    fold = {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
    return textwrap.fill(", ".join(names), width, **fold)  # type: ignore[arg-type]


# Choices


def _comment(path: Path) -> str:
    """The first sentence of a file's first comment."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if text.startswith("@package"):
            continue
        if not line.startswith("#") or not text or text.startswith("Source"):
            break
        found.append(text)
    return re.split(r"(?<=\.)\s(?=[A-Z])", " ".join(found), maxsplit=1)[0].rstrip(".")


def _as_others(path: Path) -> str:
    """What the file of a choice that is a variant says of itself: what it begins with."""
    bases = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []) if path.exists() else []
    return f"as {', '.join(str(base) for base in bases if base != '_self_')}" if bases else ""


def _of_dataset(choice: str) -> str:
    config = dataset_choice(choice)
    spec = DATASETS[config["name"]]
    size = config["image_size"]
    told = [config["task"], f"{size if isinstance(size, int) else 'x'.join(map(str, size))} pixels"]
    classes = config["num_classes"] or spec.classes or 0
    told += [f"{classes} classes"] if classes > 1 else []
    if config.get("train_size"):
        told.append(f"{config['train_size']} drawn for training")
    elif "" in spec.published:
        told.append(f"{spec.published[''][0]} for training")
    told += [f"in its place at mini: {config['stand_in']}"] if config["stand_in"] else []
    return ", ".join(told)


def meaning(group: str, choice: str) -> str:
    """What a choice of a config group is, in one line; empty where nothing says."""
    path = Path(table_files()[choice] if group == "table" else CONF / group / f"{choice}.yaml")
    comment = _comment(path) if path.exists() else ""
    if group == "dataset":
        return "; ".join(filter(None, [_of_dataset(choice), comment]))
    if comment:
        return comment
    if group == "method" and choice in METHODS:
        told = (METHODS[choice].__doc__ or "").strip().partition("\n")[0].rstrip(".")
        return told + (f": {choice.partition('+')[2]}" if "+" in choice else "")
    if group == "schedule":
        return f"the recipe of dataset={choice}" if choice in choices("dataset") else _as_others(path)
    if choice in NETWORKS:
        return "for classification"
    return f"for {DENSE_NETWORKS[choice].task}" if choice in DENSE_NETWORKS else ""


def _networks() -> Iterator[str]:
    """The networks by what they are for."""
    tasks: dict[str, list[str]] = {}
    for name in choices("network"):
        tasks.setdefault(meaning("student", name), []).append(name)
    for task, names in tasks.items():
        yield f"  {task}:"
        yield words(names, "    ")


# Keys


def keys_of(schema: type[Settings], prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`key=value` and meaning of every key of a class, those of inner groups included.

    Args:
        schema: The class.
        prefix: Before its keys, with a dot at its end.
        values: Key -> value; where one is missing, the default counts.
    """
    for key, field in schema.model_fields.items():
        inner, value = nested_settings(kinds(schema)[key]), values.get(key, field.get_default())
        if inner is not None and not issubclass(inner, Dataset | Schedule | Method):
            own = value if isinstance(value, Mapping) else value.model_dump() if isinstance(value, Settings) else {}
            yield from keys_of(inner, f"{prefix}{key}.", own)
        else:
            given = "" if isinstance(value, Mapping) or field.is_required() and key not in values else shown(value)
            yield f"{prefix}{key}={given}", _meaning_of_key(schema, key)


def _meaning_of_key(schema: type[Settings], key: str) -> str:
    told, kind = schema.model_fields[key].description or "", kinds(schema)[key]
    named = [value for value in literals(kind) if value != "null"]
    if not told:
        return describe(kind)
    return told if all(value in told for value in named) else f"({' | '.join(named)}) {told}"


def _own_keys(schema: type[Method]) -> Iterator[str]:
    """The keys of a class of methods, without those that it has of another one."""
    parent = next((each for each in schema.__mro__[1:] if each in METHODS.values()), Method)
    found = [pair for pair in keys_of(schema, "method.", {}) if re.split("[.=]", pair[0])[1] not in kinds(parent)]
    of = next((name for name, each in METHODS.items() if each is parent), None)
    if found or of:
        yield f"  {', '.join(name for name, each in METHODS.items() if each is schema)}"
        yield from lines(found, "    ")
        yield from [f"    and those of {of}"] if of else []


def _keys(values: Mapping[str, Any]) -> Iterator[str]:
    """All keys with their meanings."""
    groups = {key: kind for key, kind in kinds(Config).items() if nested_settings(kind)}
    yield "\nKEYS, with their values in this config"
    yield from lines([pair for pair in keys_of(Config, "", values) if pair[0].partition("=")[0] not in groups])
    for key in ("dataset", "schedule"):
        yield f"\nKEYS of {key}"
        schema = nested_settings(groups[key])
        assert schema is not None
        yield from lines([*keys_of(schema, f"{key}.", values[key])])
    for schema in dict.fromkeys(spec.settings for spec in DATASETS.values() if spec.settings is not Dataset):
        names = [name for name, spec in DATASETS.items() if spec.settings is schema]
        yield f"\n  of {', '.join(names)} beside these"
        yield from lines([pair for pair in keys_of(schema, "dataset.", {}) if _leaf(pair[0]) not in kinds(Dataset)])
    yield "\nKEYS of methods, with their defaults"
    for schema in dict.fromkeys(METHODS.values()):
        yield from _own_keys(schema)


def _leaf(pair: str) -> str:
    return pair.partition("=")[0].rpartition(".")[2]


def overview() -> Iterator[str]:
    """What one can do, for a command that asks for nothing."""
    yield f"kt {kt.__version__}: knowledge transfer in vision\n"
    for command, what in OVERVIEW:
        yield command
        yield from lines([("", what)], "    ")
    yield "\nTables:"
    yield words(choices("table"))


def help_of(values: Mapping[str, Any], chosen: Mapping[str, str]) -> Iterator[str]:
    """What `--help` prints.

    Args:
        values: The composed config.
        chosen: Config group -> choice on the command line; where there are some, they alone are told of.
    """
    if chosen:
        for group, choice in chosen.items():
            yield from _choice(group, choice, values)
        return
    yield f"{RUN} [options] <group>=<choice> <key>=<value> ...\n"
    yield "OPTIONS"
    yield from lines(OPTIONS)
    for group in GROUPS:
        if group in ("teacher", "student", "network"):
            continue
        yield f"\n{'+' if group == 'table' else ''}{group}=<choice>"
        yield from lines([(choice, meaning(group, choice)) for choice in choices(group)])
    yield "\nteacher=<choice>, student=<choice> (teacher=none: there is none)"
    yield from _networks()
    yield "\nhydra/launcher=<choice>"
    yield from lines([(path.stem, _comment(path)) for path in sorted((CONF / "hydra/launcher").glob("*.yaml"))])
    yield "\nevaluation=<choice>: one of dataset=, or an analysis"
    yield words(list(ANALYSES))
    yield from _keys(values)


def _choice(group: str, choice: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What a choice is, and its keys with their values."""
    yield from lines([(f"{group}={choice}", meaning(group, choice))], "")
    if group == "table":
        yield "\nROWS, as rows= takes them"
        yield from lines(rows_of(choice))
    elif group == "method" and choice in METHODS:
        yield from lines([*keys_of(METHODS[choice], "method.", values["method"])])
    elif group in ("teacher", "student", "dataset", "schedule", "scale"):
        own = DATASETS[values["dataset"]["name"]].settings if group == "dataset" else None
        schema = own or nested_settings(kinds(Config)[group])
        assert schema is not None
        yield from lines([*keys_of(schema, f"{group}.", values[group])])
    yield ""


def rows_of(table: str) -> list[tuple[str, str]]:
    """The ids of a table's rows, each with its label."""
    from tables.records import find_table

    printed = {row["id"]: row["row"] for row in find_table(table).rows}
    own = yaml.safe_load(Path(table_files()[table]).read_text(encoding="utf-8"))["hydra"]["sweeper"]["rows"]
    return [(row_id, str((row or {}).get("label") or printed.get(row_id, ""))) for row_id, row in own.items()]
