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
from kt.models.names import NETWORKS
from kt.settings import METHODS


@functools.cache
def load_outside() -> None:
    """Adds them to the lists, once; a name that kt has itself stays kt's."""
    known: dict[str, dict[str, Any]] = {"kt.networks": NETWORKS, "kt.datasets": DATASETS, "kt.methods": METHODS}
    for group, names in known.items():
        for point in entry_points(group=group):
            names.setdefault(point.name, point.load())
