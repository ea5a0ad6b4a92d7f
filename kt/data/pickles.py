"""Pickles of arrays and plain values. A pickle is a program: of what it may call, only what builds these is there.

Even numpy's own types are not: a pickle may give them a state that lets any bytes pass for objects.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kt.errors import UserError


def as_text(value: str | bytes) -> str:
    """A word of a pickle, which Python 2 has left as bytes.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, str | bytes):
        raise TypeError(f"expected a text, it is a {type(value).__name__}")
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Kind:
    """In the place of `numpy.dtype`: numbers alone."""

    def __init__(self, code: str | bytes, *_: object):
        if not re.fullmatch("b1|[iu][1248]|f[248]", as_text(code)):
            raise pickle.UnpicklingError(f"an array of {as_text(code)}, which are no numbers")
        self.dtype = np.dtype(as_text(code))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order: Any = as_text(state[1])
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """In the place of `numpy.ndarray`, as which it counts for `numpy.asarray`."""

    def __init__(self, *_: object):
        self.values: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, in_columns, content = state
        self.values = _array(content, kind, shape, "F" if in_columns else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.values, dtype)


def _array(content: bytes, kind: _Kind, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"a text in {encoding}")
    return text.encode("latin1")


_KNOWN = {
    "_codecs.encode": _encode,  # how Python 3 writes bytes for Python 2
    "numpy.dtype": _Kind,
    "numpy.ndarray": _Array,
    **{
        f"numpy.{core}.{name}": found
        for core in ("core", "_core")
        for name, found in {
            "multiarray._reconstruct": _Array,
            "multiarray.scalar": lambda kind, content: _array(content, kind, (), "C")[()],
            "numeric._frombuffer": _array,
        }.items()
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (found := _KNOWN.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, code that is never run here")
        return found


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3; its values are plain or count as arrays for `numpy.asarray`.

    Raises:
        UserError: It is none, or holds anything else; nothing that it names has been run.
        OSError: The file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            content = _Unpickler(file, encoding="bytes").load()
            return {as_text(key): value for key, value in content.items()}
        except Exception as error:  # a damaged one may stumble over anything
            reason = " ".join((str(error) or type(error).__name__).split())
            raise UserError(f"{path}: is no pickle of a dictionary of arrays and plain values ({reason})") from None
