"""Reading checkpoints: kt's own, and those of mmdet, mmseg, torchvision and OpenPifPaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kt.errors import UserError


def load_weights(network: nn.Module, path: Path, key: str) -> None:
    """Loads a plain state dict strictly.

    Raises:
        UserError: The file is missing, is no state dict, or belongs to another network.
    """
    state = read_state(path, key)
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unexpected or shapes:
        if shapes:
            name = sorted(shapes)[0]
            detail = f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        else:
            detail = f"first missing key: {(missing or ['none'])[0]}, first unexpected: {(unexpected or ['none'])[0]}"
        raise UserError(
            f"{key}={str(path)!r}: the checkpoint belongs to another network ({len(missing)} keys missing, "
            f"{len(unexpected)} unexpected, {len(shapes)} of another shape; {detail})"
        )
    network.load_state_dict(state)


def read_state(path: Path, key: str) -> dict[str, Tensor]:
    """The state dict in a file, alone or as the `state_dict` (or `model`) of a checkpoint.

    Raises:
        UserError: The file is missing or holds no state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{key}={str(path)!r}: there is no such file") from None
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{key}={str(path)!r}: expected a state dict saved by torch.save ({first})") from None
    for part in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(part), dict):
            state = state[part]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{key}={str(path)!r}: expected a state dict, the file holds something else")
    return state


def load_backbone(backbone: nn.Module, path: Path, key: str) -> None:
    """Loads a backbone from a checkpoint of whatever network it is part of.

    Understood are kt's own files, those of mmdet, mmseg and torchvision, and OpenPifPaf's ResNets.

    Raises:
        UserError: The file is missing or does not hold all of the backbone.
    """
    state = read_state(path, key)
    own = backbone.state_dict()
    plain = getattr(backbone, "plain_names", {})
    best: tuple[int, str] = (-1, "")
    for found in (rename(state) for rename in RENAMINGS):
        for names in ({name: name for name in own}, {name: plain.get(name, name) for name in own}):
            fitting = {
                name: found[other]
                for name, other in names.items()
                if other in found and found[other].shape == own[name].shape
            }
            # Files older than this counter lack it.
            missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
            if not missing:
                backbone.load_state_dict({**own, **fitting})
                return
            best = max(best, (len(fitting), missing[0]))
    raise UserError(
        f"{key}={str(path)!r}: the checkpoint does not hold this backbone (at best {best[0]} of {len(own)} tensors "
        f"fit; first missing: {best[1]}); expected a file of kt, mmdet, mmseg, torchvision or OpenPifPaf"
    )


def _without(prefix: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Keeps the keys below a prefix, without it."""
    return lambda state: {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _openpifpaf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenPifPaf ResNet's keys as torchvision's: its stem is a sequence and its layers are blocks 2 to 5.

    Files of its first releases hold the whole body as one sequence.
    """
    stem = {"0": "conv1", "1": "bn1"}
    layers = {
        **{f"block{i + 1}": f"layer{i}" for i in range(1, 5)},
        **{f"net.{i + 3}": f"layer{i}" for i in range(1, 5)},
    }
    found = {}
    for name, value in state.items():
        rest = name.partition("base_net.")[2]
        for head in ("input_block.", "net."):
            number, _, leaf = rest.removeprefix(head).partition(".")
            if rest.startswith(head) and number in stem:
                found[f"{stem[number]}.{leaf}"] = value
        for head, layer in layers.items():
            if rest.startswith(f"{head}."):
                found[f"{layer}.{rest[len(head) + 1 :]}"] = value
    return found


RENAMINGS: tuple[Callable[[Mapping[str, Tensor]], dict[str, Tensor]], ...] = (
    dict,
    _without("backbone."),
    _without("module."),
    _without("module.backbone."),
    _openpifpaf,
)
