"""Memory that a training on a CPU has freed stays the process's, for the next step needs it again."""

from __future__ import annotations

import ctypes
import functools
import sys

# Of glibc's malloc.h, and values to try in turn: never give back the top of the heap, and take blocks of a gigabyte
# from there too, which older versions allow up to 32 MiB only.
_SETTINGS = {"M_TRIM_THRESHOLD": (-1, (-1,)), "M_MMAP_THRESHOLD": (-3, (1 << 30, 32 << 20))}


@functools.cache
def keep_pages() -> bool:
    """Tells the C library to keep freed memory; whether it could be told.

    A step frees all that its forward passes kept. By default the kernel gets that back and hands it out again at the
    next step, page by page and zeroed, which is a sixth of a step's time (KD, ResNet-56 to ResNet-20, batch 128) and
    half of it for large images (MobileNetV2, 48 images of 224 pixels). No number changes; what is kept in pieces that
    do not fit again makes the peak up to a quarter higher.

    Source: mallopt(3); other C libraries have no such call.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return all([any(library.mallopt(key, value) == 1 for value in values) for key, values in _SETTINGS.values()])
