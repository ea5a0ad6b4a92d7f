"""Which device a cell computes on. Imports torch only when asked, so that planning can."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from kt.errors import UserError
from kt.ranks import local_rank

if TYPE_CHECKING:
    import torch

# Of NVIDIA's driver, of AMD's, and of either below Windows.
GPU_PLACES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
CELLS_PER_GPU = 4  # at most; slim networks keep no GPU busy, and each process takes memory of its own

# Held until this process ends, so that cells side by side take different GPUs.
_held: tuple[int, FileLock] | None = None


def processor() -> str:
    """The processor's name."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def has_gpu() -> bool:
    """Whether this machine has a GPU that may be used, as far as that shows without torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return not hidden and any(Path(place).exists() for place in GPU_PLACES)


def own_memory(kind: str) -> int | None:
    """Bytes of this process as the kernel counts them, `VmRSS`, `VmHWM` or `VmData`; None where it does not say."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")):
            return 1024 * int(found[1])
    return None


def scheduled() -> tuple[float, float] | None:
    """Seconds that this process's threads have computed and that they have waited for a processor, where Linux tells.

    Source: https://docs.kernel.org/scheduler/sched-stats.html, "/proc/<pid>/schedstat".
    """
    with contextlib.suppress(OSError, ValueError):
        texts = [path.read_text(encoding="utf-8") for path in Path("/proc/self/task").glob("*/schedstat")]
        ran, waited = (sum(int(text.split()[place]) for text in texts) / 1e9 for place in (0, 1))
        return ran, waited
    return None


def share_waited(before: tuple[float, float] | None, now: tuple[float, float] | None) -> float:
    """The share of the time between two looks at `scheduled` that a process has waited for a processor."""
    if before is None or now is None:
        return 0.0
    ran, waited = (max(0.0, late - early) for early, late in zip(before, now, strict=True))
    return waited / (ran + waited) if ran + waited else 0.0


def free_gpu() -> int:
    """The GPU of this process: torchrun's, else the first one that no other cell on this machine holds.

    Where each holds one, cells share them evenly; where all are full, the first one takes the rest.
    """
    global _held
    own = local_rank()
    if own is not None:
        return own
    if _held is None:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        places = [(index, name.strip(), place) for place in range(CELLS_PER_GPU) for index, name in enumerate(names)]
        for index, name, place in places:
            lock = FileLock(Path(tempfile.gettempdir()) / f"kt-{os.getuid()}-gpu-{name}-{place}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _held = (index, lock)
            break
    return _held[0] if _held is not None else 0


def check_device(name: str) -> None:
    """Refuses what names no device to train on; whether it is there is another matter.

    Raises:
        UserError: Says what is expected.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"device={name!r}: expected auto, cpu, cuda or cuda:<index>")


def pick_device(name: str) -> torch.device:
    """The device that `device=` names; `auto` takes a free GPU where there is one.

    Raises:
        UserError: There is no such device.
    """
    import torch

    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={name!r}: there is no CUDA device here; expected auto or cpu")
    if name.startswith("cuda") and torch.cuda._is_in_bad_fork():  # where NVML cannot be asked for GPUs (kt's workers)
        raise UserError(f"device={name!r}: CUDA cannot be used by processes forked here; add hydra/launcher=gpus")
    if name == "cuda":
        device = torch.device("cuda", free_gpu())
        torch.cuda.set_device(device)
        return device
    device = torch.device(name)
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise UserError(f"device={name!r}: there are {count} CUDA devices here, counted from 0")
    return device
