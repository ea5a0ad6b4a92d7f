"""What may import what, read from every file: floors between the packages, no circles, tests that stand alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

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


IMPORTS = {name: set(_imports(ast.parse(path.read_text()))) for name, path in MODULES.items()}


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


def test_no_test_imports_another() -> None:
    tests = sorted((ROOT / "tests").glob("*.py"))
    names = {path.stem for path in tests if path.stem.startswith("test_")}
    found = {path.stem: names.intersection(_imports(ast.parse(path.read_text()))) for path in tests}
    assert {name: imports for name, imports in found.items() if imports} == {}
