"""Methods and networks of other installed packages, found by their entry points; imports no torch.

An entry point of the group `kt.methods` names a class of settings (`kt.settings.Method`, whose `module` registers the
method), one of `kt.networks` a `kt.models.names.NetworkSpec` (whose `family` is `module:function`).
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from kt.models.names import NETWORKS
from kt.settings import METHODS


@functools.cache
def load_outside() -> None:
    """Adds them to the lists, once; a name that kt has itself stays kt's."""
    for point in entry_points(group="kt.networks"):
        NETWORKS.setdefault(point.name, point.load())
    for point in entry_points(group="kt.methods"):
        METHODS.setdefault(point.name, point.load())
