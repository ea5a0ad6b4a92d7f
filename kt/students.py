"""Trained students, built as `student.json` beside their weights says, whoever reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kt.classifier import Classifier
from kt.errors import UserError, needs_mm
from kt.files import at_home
from kt.models import NETWORKS, build_network
from kt.models.checkpoints import load_weights
from kt.models.names import CONFIG_NETWORK
from kt.needs import SNAPSHOTS, WEIGHTS
from kt.outside import load_outside
from kt.store import DESCRIPTION, check

if TYPE_CHECKING:
    from kt.dense import DenseModel


def _folder_of(weights: Path) -> Path:
    """The folder that describes a file of weights: of a snapshot the one above."""
    return weights.parent.parent if weights.parent.name == SNAPSHOTS else weights.parent


def read_description(weights: Path) -> dict[str, Any]:
    """What is described beside a file of weights: `network`, `num_classes`, `image_size`, `mean`, `std`.

    Raises:
        UserError: There is no description, or it is damaged.
    """
    described = _folder_of(weights) / DESCRIPTION
    try:
        record: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
        found = {key: record[key] for key in ("network", "num_classes", "image_size", "mean", "std")}
        found["network"] = {key: record["network"][key] for key in ("name", "width", "small_stem")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"{described}: expected the description of a trained student ({reason})") from None
    return found


def _read(weights: Path, key: str) -> tuple[nn.Module, dict[str, Any]]:
    """The plain network of a file of weights, and its description."""
    folder = _folder_of(weights)
    check(folder, DESCRIPTION, "student_config.py", weights.relative_to(folder).as_posix())
    record = read_description(weights)
    network, shape = record["network"], {key: record[key] for key in ("num_classes", "image_size")}
    load_outside()
    built: nn.Module
    if network["name"] in NETWORKS:
        built = build_network(**network, **shape)
    else:
        needs_mm(f"{folder}: {network['name']}")
        from kt.models.dense import build_dense, dense_config, read_config

        if network["name"] == CONFIG_NETWORK:
            model = read_config(str(folder / "student_config.py"), None, record["num_classes"])
        else:  # without running the file beside it
            normalisation = (record["mean"], record["std"])
            model = dense_config(network["name"], **shape, width=network["width"], normalisation=normalisation)
        built = build_dense(model, str(folder))
    load_weights(built, weights, key)
    return built, record


def load_student(folder: str | os.PathLike[str]) -> nn.Module:
    """See `kt.load_student`."""
    return _read(at_home(folder) / WEIGHTS, "student")[0].eval()


def load_model(weights: Path, key: str, expected: Mapping[str, Any] | None = None) -> Classifier | DenseModel:
    """A trained student with the normalisation that it was trained with.

    Args:
        weights: Its weights, or a snapshot of them beside which its description lies.
        key: What an error calls the file.
        expected: The network that it is said to be, as the description has it: `name`, `width` and `small_stem`.

    Raises:
        UserError: There is no description beside it, the weights are not those of the network described, or that is not
            the one expected.
    """
    network, record = _read(weights, key)
    found = record["network"]
    if expected is not None and any(found[part] != expected[part] for part in ("name", "width", "small_stem")):
        said = f"{found['name']} of width {found['width']}; expected {expected['name']} of width {expected['width']}"
        raise UserError(f"{key}={str(weights)!r}: the checkpoint belongs to another network ({said})")
    if record["network"]["name"] in NETWORKS:
        return Classifier(network, (record["mean"], record["std"]))
    from kt.dense import DenseModel

    return DenseModel(network)
