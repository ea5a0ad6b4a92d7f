"""Whether the cells of a run can be mirrored online: asked once, so that not every cell waits for a network in vain."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from experiments.plan import Job
from experiments.progress import Display

PATIENCE = 60.0  # seconds; W&B itself gives up after about a dozen


def fault() -> str | None:
    """Why Weights & Biases cannot be had online; None if it can.

    It is asked in a process of its own: what it leaves running would be inherited by those that train.
    """
    command = [sys.executable, "-c", "import wandb; wandb.login(verify=True)"]
    try:
        asked = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = asked.stderr.strip().splitlines() or ["it does not say why"]
    return lines[-1].rstrip(".") if asked.returncode else None


def go_offline(jobs: Sequence[Job], display: Display) -> None:
    """Makes jobs whose cells would be mirrored online keep their runs here instead, if they cannot be."""
    online = [job for job in jobs if job.config["wandb"]["mode"] == "online"]
    if not online or (why := fault()) is None:
        return
    display.warn(f"wandb.mode=online: {why}; runs are kept offline, `wandb sync` uploads them")
    for job in online:
        job.config["wandb"]["mode"] = "offline"
        job.overrides.append("++wandb.mode=offline")
