"""Trained students as plain networks, read from the folders of their cells."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from kt.errors import UserError, needs_mm
from kt.models import NETWORKS, build_network
from kt.models.checkpoints import load_weights
from kt.outside import load_outside
from kt.store import STUDENT, check


def load_student(folder: str | os.PathLike[str]) -> nn.Module:
    """See `kt.load_student`."""
    described = Path(folder) / "student.json"
    check(Path(folder), "student.json", "student_config.py", STUDENT)
    try:
        record: dict[str, Any] = json.loads(described.read_text())
        network, shape = record["network"], {key: record[key] for key in ("num_classes", "image_size")}
        options = {key: network[key] for key in ("name", "width", "small_stem")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"{described}: expected the description of a trained student ({reason})") from None
    student: nn.Module
    load_outside()
    if network["name"] in NETWORKS:
        student = build_network(**options, **shape)
    else:
        needs_mm(f"{folder}: {network['name']}")
        from mmengine.config import Config

        from kt.models.dense import build_dense

        student = build_dense(Config.fromfile(Path(folder) / "student_config.py").model.to_dict(), str(folder))
    load_weights(student, Path(folder) / STUDENT, "student")
    return student.eval()
