"""Methods, networks and datasets of other installed packages, found by their entry points; imports no torch.

An entry point of the group `kt.methods` names a class of settings (`kt.settings.Method`, whose `module` registers the
method), one of `kt.networks` a `kt.models.names.NetworkSpec` (whose `family` is `module:function`), one of
`kt.datasets` a `kt.data.DatasetSpec` (whose `readers` are `module:function`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from kt.data.names import DATASETS, DatasetSpec
from kt.errors import UserError
from kt.models.names import NETWORKS, NetworkSpec
from kt.settings import METHODS, Method


def _is_method(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Method) and found.module is not None


# Group -> the list that it adds to, whether something may be added, and what is expected.
_GROUPS: dict[str, tuple[dict[str, Any], Callable[[Any], bool], str]] = {
    "kt.networks": (NETWORKS, lambda found: isinstance(found, NetworkSpec), "a kt.models.names.NetworkSpec"),
    "kt.datasets": (DATASETS, lambda found: isinstance(found, DatasetSpec), "a kt.data.DatasetSpec"),
    "kt.methods": (METHODS, _is_method, "a subclass of kt.settings.Method, whose `module` registers the method"),
}


@functools.cache
def load_outside() -> None:
    """Adds them to the lists, once.

    Raises:
        UserError: An entry cannot be loaded, is nothing that can be added, or its name is taken; names the entry.
    """
    for group, (names, fits, expected) in _GROUPS.items():
        for point in entry_points(group=group):
            entry = f"entry point {point.name} = {point.value} of {group}"
            if point.name in names:
                raise UserError(f"{entry}: there is a {point.name} already; expected a name of its own")
            try:
                found = point.load()
            except Exception as error:  # a package is a program: anything may go wrong in it
                reason = " ".join(str(error).split()) or "no message"
                raise UserError(f"{entry}: cannot be loaded ({type(error).__name__}: {reason})") from None
            if not fits(found):
                raise UserError(f"{entry}: expected {expected}")
            names[point.name] = found
