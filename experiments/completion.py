"""Completion with TAB in bash: the groups, choices, keys and values of `python -m experiments.run`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from experiments.checking import known_keys, nested_settings
from experiments.groups import CONF, GROUPS, choices
from experiments.help import OPTIONS, rows_of
from experiments.schema import ANALYSES, Config, is_group
from kt.errors import UserError
from kt.settings import METHODS, Dataset, Method, Schedule, Settings, kinds, literals

MODULE = "experiments.run"
LAUNCHER = "hydra/launcher"
# Other commands of Python are completed as before: with files.
INSTALL = rf"""_kt_complete() {{
  local line=${{COMP_LINE:0:$COMP_POINT}} IFS=$'\n'
  [[ $line == *" -m {MODULE} "* ]] || return 0
  local word=${{line##* }}
  COMPREPLY=($(COMP_LINE=$line "${{COMP_WORDS[0]}}" -m {MODULE} -sc query=bash 2>/dev/null))
  # To bash a word begins behind its =.
  [[ $COMP_WORDBREAKS != *=* ]] || COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*=}}"}}"}}")
}}
complete -o nospace -o default -F _kt_complete python python3"""
UNINSTALL = "complete -r python python3; unset -f _kt_complete"


def complete(overrides: Sequence[str]) -> None:
    """`-sc`: prints what makes bash complete, or what completes the line that bash has in COMP_LINE.

    Raises:
        UserError: Something else is asked for.
    """
    asked = overrides[0] if len(overrides) == 1 else " ".join(overrides)
    if asked == "install=bash":
        print(INSTALL)
    elif asked == "uninstall=bash":
        print(UNINSTALL)
    elif asked == "query=bash":
        print("\n".join(candidates(os.environ.get("COMP_LINE", ""))))
    else:
        raise UserError(f"-sc {asked}: expected install=bash, uninstall=bash or query=bash")


def candidates(line: str) -> list[str]:
    """What the last word of a command line, up to the cursor, may become."""
    _, _, rest = line.partition(MODULE)
    given = rest.split()
    word = given.pop() if rest[-1:].strip() else ""
    if word.startswith("-"):
        return [option for option, _ in OPTIONS if option.startswith(word)]
    signs = word[: len(word) - len(word.lstrip("+"))]
    pairs = dict(each.lstrip("+").partition("=")[::2] for each in given)
    key, equals, value = word.lstrip("+").partition("=")
    if not equals:
        return [signs + each for each in _keys(key, pairs.get("method"))]
    # Of a list of values the last one is completed.
    before, comma, last = value.rpartition(",")
    return [f"{signs}{key}={before}{comma}{each}" for each in _values(key, pairs) if each.startswith(last)]


def _keys(begun: str, method: str | None) -> list[str]:
    """The groups and keys that begin so, up to their next dot."""
    known = [key for key in dict.fromkeys(known_keys(method)) if not key.startswith("table.")]  # the table's own
    inner = {key.rpartition(".")[0] for key in known}
    names = [f"{group}=" for group in (*GROUPS, LAUNCHER) if group != "network"]
    names += [f"{key}=" for key in known if key not in {*inner, *GROUPS}]
    found = []
    for name in names:
        if name.startswith(begun):
            head, dot, _ = name[len(begun) :].partition(".")
            found.append(begun + head + dot)
    return list(dict.fromkeys(found))


def _values(key: str, given: dict[str, str]) -> Iterable[str]:
    if key == LAUNCHER:
        return [path.stem for path in sorted((CONF / LAUNCHER).glob("*.yaml"))]
    if is_group(key):
        return choices(key.split("@")[0])
    if key == "rows":
        table = given.get("table", "")
        return [row_id for row_id, _ in rows_of(table)] if table in choices("table") else []
    if key == "role":
        return ["teacher", "baseline", "method"]
    if key == "evaluation":
        return [*choices("dataset"), *ANALYSES]
    return dict.fromkeys(each for kind in _kinds(key, given.get("method")) for each in _literals(kind))


def _literals(kind: Any) -> Iterator[str]:
    yield from ("true", "false") if bool in (kind, *get_args(kind)) else ()
    yield from literals(kind)
    yield from ("null",) if type(None) in get_args(kind) else ()


def _kinds(key: str, method: str | None) -> list[Any]:
    """The types of a dotted key; of a method's as each method has it, where none is chosen."""
    found: list[type[Settings]] = [Config]
    *groups, leaf = key.split(".")
    for group in groups:
        inner: list[type[Settings]] = []
        for schema in found:
            kind = nested_settings(kinds(schema)[group]) if group in kinds(schema) else None
            if kind is Method:
                inner += [METHODS[method]] if method in METHODS else METHODS.values()
            else:
                parts: dict[str, type[Settings]] = {"dataset": Dataset, "schedule": Schedule}
                inner.append(kind or parts.get(group, Settings))
        found = inner
    return [kinds(schema)[leaf] for schema in found if leaf in kinds(schema)]
