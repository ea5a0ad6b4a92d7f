"""kt: knowledge transfer in vision. Stages and phases, five algorithms and their baselines, for mmengine models."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from torch import nn

__version__ = "0.1.0"


def load_student(folder: str | os.PathLike[str]) -> nn.Module:
    """The trained network of a finished cell: a plain one of torchvision, timm, mmdet or mmseg, in eval mode.

    Args:
        folder: The cell's folder, `<output_root>/cells/<id>`.

    Raises:
        UserError: The folder holds no trained student, or what it needs is not installed.
    """
    from kt.students import load_student  # late: importing kt is to cost nothing

    return load_student(folder)


class _Operators:
    """Finds `mmcv._ext`, mmcv's compiled operators, in `kt.operators` where mmcv was installed without them.

    Asked last of all finders, so that compiled operators are found before.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "mmcv._ext":
            return None
        from importlib.util import spec_from_file_location

        return spec_from_file_location(name, os.path.join(os.path.dirname(__file__), "operators.py"))


if _Operators not in sys.meta_path:
    sys.meta_path.append(_Operators)
