"""Methods, networks and datasets of other installed packages, found by their entry points; imports no torch.

An entry point of the group `kt.methods` names a class of settings (`kt.settings.Method`, whose `module` registers the
method), one of `kt.networks` a `kt.models.names.NetworkSpec` (whose `family` is `module:function`), one of
`kt.datasets` a `kt.data.DatasetSpec` (whose `readers` are `module:function`).
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

from kt.data.names import DATASETS
from kt.errors import UserError
from kt.models.names import NETWORKS
from kt.settings import METHODS


@functools.cache
def load_outside() -> None:
    """Adds them to the lists, once.

    Raises:
        UserError: An entry cannot be loaded, or its name is taken; names the entry.
    """
    known: dict[str, dict[str, Any]] = {"kt.networks": NETWORKS, "kt.datasets": DATASETS, "kt.methods": METHODS}
    for group, names in known.items():
        for point in entry_points(group=group):
            entry = f"entry point {point.name} = {point.value} of {group}"
            if point.name in names:
                raise UserError(f"{entry}: there is a {point.name} already; expected a name of its own")
            try:
                names[point.name] = point.load()
            except Exception as error:  # a package is a program: anything may go wrong in it
                reason = " ".join(str(error).split()) or "no message"
                raise UserError(f"{entry}: cannot be loaded ({type(error).__name__}: {reason})") from None
