"""Reading checkpoints: kt's own, and those of mmdet, mmseg, timm, torchvision and OpenPifPaf. No file's code is run."""

from __future__ import annotations

import contextlib
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kt.errors import UserError

logger = logging.getLogger(__name__)

# Where weights lie in a file, in the order of preference.
PARTS = ("state_dict", "model")
SUSPICIOUS = ("os", "posix", "nt", "sys", "subprocess", "shutil", "runpy", "importlib")
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")
# What others wrap a network in: DataParallel and EMA, torch.compile, Lightning and so on, kt, mmrazor.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "student.network.", "architecture.")


def load_weights(network: nn.Module, path: Path, key: str) -> None:
    """Loads a whole network strictly, but for counters of batches, which older files lack.

    Args:
        network: The network.
        path: The file, see `read_state`; its names may stand below any of `PREFIXES`, also several.
        key: What an error calls the file.

    Raises:
        UserError: The file is missing, is no checkpoint, or belongs to another network.
    """
    own = network.state_dict()
    state = max(_below_prefixes(read_state(path, key), PREFIXES), key=lambda found: len(own.keys() & found.keys()))
    state = {name: value for name, value in own.items() if _is_counter(name)} | state
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unexpected or shapes:
        if shapes:
            detail = _shapes(shapes[0], state[shapes[0]], own[shapes[0]])
        else:
            detail = f"first missing key: {(missing or ['none'])[0]}, first unexpected: {(unexpected or ['none'])[0]}"
        raise UserError(
            f"{key}={str(path)!r}: the checkpoint belongs to another network ({len(missing)} keys missing, "
            f"{len(unexpected)} unexpected, {len(shapes)} of another shape; {detail})"
        )
    network.load_state_dict(state)


def load_backbone(backbone: nn.Module, path: Path, key: str) -> None:
    """Loads a backbone from a checkpoint of whatever network it is part of.

    Understood are kt's own files, those of mmdet, mmseg, timm and torchvision, and OpenPifPaf's ResNets.

    Raises:
        UserError: The file is missing or does not hold all of the backbone.
    """
    state = read_state(path, key)
    own = backbone.state_dict()
    plain = getattr(backbone, "plain_names", {})
    best: tuple[int, str] = (-1, "")
    for found in (*_below_prefixes(state, (*PREFIXES, "backbone.")), _openpifpaf(state)):
        for names in ({name: name for name in own}, {name: plain.get(name, name) for name in own}):
            held = {name: found[other] for name, other in names.items() if other in found}
            fitting = {name: value for name, value in held.items() if value.shape == own[name].shape}
            missing = [name for name in own if name not in fitting and not _is_counter(name)]
            if not missing:
                backbone.load_state_dict({**own, **fitting})
                return
            first = missing[0]
            what = _shapes(first, held[first], own[first]) if first in held else f"first missing: {first}"
            best = max(best, (len(fitting), what))
    raise UserError(
        f"{key}={str(path)!r}: the checkpoint does not hold this backbone (at best {best[0]} of {len(own)} tensors "
        f"fit; {best[1]}); expected a file of kt, mmdet, mmseg, timm, torchvision or OpenPifPaf"
    )


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _shapes(name: str, found: Tensor, own: Tensor) -> str:
    return f"{name} is {tuple(found.shape)} in the file and {tuple(own.shape)} in the network"


# Files


def read_state(path: Path, key: str) -> dict[str, Tensor]:
    """The state dict in a file, alone or as a part of a checkpoint; averaged weights (EMA) before others.

    Raises:
        UserError: The file is missing or holds no state dict.
    """
    state = read_file(path, key)
    if isinstance(state, dict):
        state = _averaged(state, path)
    for part in PARTS:
        if isinstance(state, dict) and isinstance(state.get(part), dict):
            state = state[part]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{key}={str(path)!r}: expected a state dict, the file holds something else")
    return state


def _averaged(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The part of a checkpoint with averaged weights, or all of it if it has none; says so."""
    part = next((name for name in AVERAGED if content.get(name) and isinstance(content[name], dict)), None)
    if part is None:
        return content
    meta = content.get("meta")
    if part == "ema_state_dict" and isinstance(meta, dict) and "mmengine_version" in meta:
        part = "state_dict"  # mmengine's EMAHook swaps the two when it saves
    logger.warning("%s: the averaged weights (EMA) are taken, `%s`", path, part)
    return content[part]


def read_file(path: Path, key: str) -> Any:
    """What `torch.save` or safetensors has written to a file, on the CPU. Nothing that a pickle names is run.

    Raises:
        UserError: The file is missing, is no such file, or has other objects in it than tensors, plain containers and
            `STAND_INS`.
    """
    named = f"{key}={str(path)!r}"
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise UserError(f"{named}: " + ("there is no such file" if missing else f"{error.strerror}")) from None
    try:
        if head[8:10] == b'{"':  # behind the length of safetensors' header
            return load_file(path)
        with _standing_in():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that torch has not written may make it stumble over anything
        if what := _no_checkpoint(path, head):
            raise UserError(f"{named}: expected a checkpoint; this is {what}") from None
        if name := refused_code(error):
            raise UserError(f"{named}: {_conversion(path, name)}") from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        told = "" if "weights_only" in reason else f" ({reason})"  # torch would have the file's code run
        raise UserError(f"{named}: expected a file of torch.save or safetensors{told}") from None


def _no_checkpoint(path: Path, head: bytes) -> str | None:
    """What a file is by its first bytes, if that explains why it cannot be read."""
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return "a web page (HTML); download the file itself"
    if head.lstrip().startswith(b"{"):
        return "a JSON file; of a checkpoint in several files it may be the index, join them first"
    if head.startswith(b"PK"):
        held = _names_in(path)
        if any(name.endswith("/constants.pkl") for name in held):
            return "a TorchScript archive; save the state_dict() of what torch.jit.load gives"
        if not any(name.endswith("/data.pkl") for name in held):
            return "a zip archive that torch.save has not written, or a damaged one"
    return None


def _names_in(path: Path) -> list[str]:
    """The files in a zip archive; none if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    # It may stumble over anything: a name that is no UTF-8, a version that does not exist, a size beyond the end.
    except Exception:
        return []


def refused_code(error: Exception) -> str | None:
    """What torch refused to run in a file, by the error that it raised; None if it stumbled over something else."""
    found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    return found[1].removeprefix("builtins.") if found else None  # which torch 2.4 names and later ones do not


def _conversion(path: Path, name: str) -> str:
    """Why a file with objects of Python in it is refused, and how whoever trusts it gets at its weights."""
    held = f"the file holds {name}, code that is never run here"
    if name.split(".")[0] in SUSPICIOUS or "." not in name:  # torch names builtins without their module
        return f"{held} and that no network consists of: the file may be meant to do harm"
    return (
        f"{held}; if you trust the file, convert it where that is "
        f"installed: import torch; found = torch.load({str(path)!r}, weights_only=False); "
        "part = found.get('state_dict', found.get('model')) if isinstance(found, dict) else found; "
        f"torch.save(getattr(part, 'state_dict', lambda: part)(), {str(path.with_suffix('.weights.pth'))!r})"
    )


# What may stand beside weights


class _StandIn:
    """Takes the place of an object of another library or of Python, and keeps nothing of it."""

    empty: type = object

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls) if cls.empty is object else cls.empty()

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str, empty: type = object) -> type:
    """A stand-in for what pickles call `name`; one for a container becomes the plain container that is filled then."""
    module, _, last = name.rpartition(".")
    return type(last, (_StandIn,), {"__module__": module, "empty": empty})


STAND_INS = [
    *(
        _stand_in(name)
        for name in (
            "_codecs.encode",  # of bytes, which torch 2.4 does not know
            "argparse.Namespace",
            "builtins.dict",  # of a defaultdict
            "builtins.float",
            "builtins.frozenset",
            "builtins.getattr",  # of a HistoryBuffer's methods
            "builtins.int",
            "builtins.list",
            "builtins.range",
            "builtins.slice",
            *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
            "mmengine.logging.history_buffer.HistoryBuffer",
            "numpy.dtype",
            "numpy.ndarray",
            *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
            *(f"pathlib.{place}{name}Path" for place in ("", "_local.") for name in ("Posix", "Windows")),
            "torch.torch_version.TorchVersion",
            "types.SimpleNamespace",
            "uuid.UUID",
        )
    ),
    _stand_in("collections.defaultdict", dict),
    _stand_in("collections.deque", list),
]


@contextlib.contextmanager
def _standing_in() -> Iterator[None]:
    """Lets torch read files with `STAND_INS` in them, in the place of whatever else is allowed in this process."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(STAND_INS)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


# Names


def _below_prefixes(state: Mapping[str, Tensor], known: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """The keys below every prefix made of known ones, without it: all keys first, then those below shorter ones."""
    prefixes = [""]
    for prefix in prefixes:  # grows meanwhile
        longer = (prefix + name for name in known)
        prefixes += [each for each in longer if each not in prefixes and any(key.startswith(each) for key in state)]
    return [
        {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)} for prefix in prefixes
    ]


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
