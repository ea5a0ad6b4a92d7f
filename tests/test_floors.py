"""What may import what, read from every file: floors between the packages, no circles, tests that stand alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kt.data.names import DATASETS
from kt.models.names import DENSE_NETWORKS, NETWORKS
from kt.settings import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kt", "tables", "experiments")
# Package -> those that it must not import: results can be read, and students used, without what is above.
FLOORS = {"kt": ("tables", "experiments"), "tables": ("experiments",)}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, at its top, in its functions and for its annotations alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
IMPORTS = {name: set(_imports(tree)) for name, tree in TREES.items()}


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules that lead to each other (Tarjan's components of more than one)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_modules: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        open_modules.append(name)
        for other in edges[name] & edges.keys():
            if other not in index:
                visit(other)
            if other in open_modules:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == index[name]:
            start = open_modules.index(name)
            if len(open_modules) - start > 1:
                found.append(set(open_modules[start:]))
            del open_modules[start:]

    for name in edges:
        if name not in index:
            visit(name)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b", "torch"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [{"b", "c"}]


@pytest.mark.parametrize("package", FLOORS)
def test_floors(package: str) -> None:
    above = {
        f"{name} imports {other}"
        for name, imports in IMPORTS.items()
        for other in imports
        if name.partition(".")[0] == package and other.partition(".")[0] in FLOORS[package]
    }
    assert not above


def test_no_circles() -> None:
    assert circles(IMPORTS) == []


# Where a name is written, beside the lists: with what it stands for.
HOMES = {"kt.methods": METHODS, "kt.data": DATASETS, "kt.models": {**NETWORKS, **DENSE_NETWORKS}}
LISTS = ("kt.settings",)
# Words that mean something else as well, what a bench compares with, and what configs begin with.
ELSEWHERE = {
    "none": set(MODULES),
    "l2": {"kt.consistency", "kt.functional", "experiments.checking"},
    "imagenet": {"kt.models.names", "tables.stated", "experiments.data_bench"},
    "imagefolder": {"experiments.data_bench"},
    "scenes": {"experiments.schema"},
    "kd": {"experiments.peer_bench", "experiments.data_bench"},
    "stagewise": {"experiments.phase_bench"},
    "resnet18": {"experiments.data_bench"},
    "resnet20": {"experiments.bench"},
    "resnet34": {"experiments.data_bench"},
    "resnet56": {"experiments.bench"},
}


@pytest.mark.parametrize("home", HOMES)
def test_a_name_is_written_where_it_is_added_and_nowhere_else(home: str) -> None:
    """So that one that is added touches nothing else: nowhere does a name decide what is done."""
    written = {
        (node.value, name)
        for name, path in MODULES.items()
        if not name.startswith((home, "tables.papers")) and name not in LISTS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in HOMES[home]
    }
    assert {(name, module) for name, module in written if module not in ELSEWHERE.get(name, ())} == set()


def test_no_test_imports_another() -> None:
    tests = sorted((ROOT / "tests").glob("*.py"))
    names = {path.stem for path in tests if path.stem.startswith("test_")}
    found = {path.stem: names.intersection(_imports(ast.parse(path.read_text()))) for path in tests}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_text_is_utf8_whatever_the_locale() -> None:
    """Who opens a file of text says so."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            opens = called == "open" and isinstance(node.func, ast.Name)
            opens &= not any(isinstance(each, ast.Constant) and "b" in str(each.value) for each in node.args[1:2])
            if opens or (called in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)):
                said = any(each.arg == "encoding" for each in node.keywords)
                assert said, f"{name}:{node.lineno} leaves the encoding to the locale"
