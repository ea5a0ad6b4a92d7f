"""Config files of mmdet and mmseg; the libraries' own ones go by name. Importing this module imports no torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from kt.errors import UserError, nearest
from kt.files import at_home


def read_config_file(name: str, key: str) -> Any:
    """The config of a file (mmengine's `Config`), which has a `model`.

    Args:
        name: The file, or one of those that mmdet and mmseg come with: `mmdet::retinanet/retinanet_r50_fpn_1x_coco.py`,
            or what is unique of that, as `retinanet_r50_fpn_1x_coco`.
        key: What an error calls it.

    Raises:
        UserError: It cannot be read or has no model.
    """
    from mmengine.config import Config

    path = at_home(name) if os.path.isfile(at_home(name)) else _stock(name, key)
    try:
        config = Config.fromfile(path)
    except (Exception, SystemExit) as error:  # a config is a program: anything may go wrong in it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}={name}: cannot be read as a config of mmdet or mmseg ({reason})") from None
    if "model" not in config:
        raise UserError(f"{key}={name}: expected a config with a `model`")
    return config


def _stock(name: str, key: str) -> Path:
    """The one config of the installed libraries that has this name."""
    library, _, file = name.rpartition("::")
    files = {
        f"{package}::{path.relative_to(folder).as_posix()}": path
        for package in ([library] if library else ["mmdet", "mmseg"])
        if package.isidentifier() and (spec := importlib.util.find_spec(package)) and spec.origin
        for folder in [Path(spec.origin).parent / ".mim" / "configs"]
        for path in folder.rglob("*.py")
    }
    wanted = file.removesuffix(".py") + ".py"
    found = sorted(each for each in files if each.partition("::")[2] == wanted or each.endswith(f"/{wanted}"))
    if not found:
        names = {path.name for path in files.values()}
        raise UserError(
            f"{key}={name}: there is no such file; expected a config of mmdet or mmseg{nearest(wanted, names)}"
        )
    if len(found) > 1:
        raise UserError(f"{key}={name}: expected one of {', '.join(found)}")
    return files[found[0]]
