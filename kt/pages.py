"""Memory that a training on a CPU has freed stays the process's, for the next step needs it again."""

from __future__ import annotations

import ctypes
import functools
import sys

# Of glibc's malloc.h, and values: never give back the top of the heap, and take blocks up to the largest size that it
# allows from there.
_SETTINGS = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_THRESHOLD": (-3, 32 << 20)}


@functools.cache
def keep_pages() -> bool:
    """Tells the C library to keep freed memory; whether it could be told.

    A step frees all that its forward passes kept. By default the kernel gets that back and hands it out again at the
    next step, page by page and zeroed, which is a sixth of a step's time (KD, ResNet-56 to ResNet-20, batch 128). No
    number changes, and memory is at most what it was at its peak.

    Source: mallopt(3); other C libraries have no such call.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and all([library.mallopt(*each) == 1 for each in _SETTINGS.values()])
