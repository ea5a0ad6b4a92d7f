"""Settings of all tests: one thread per process, and real datasets where their folder is named."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported anywhere, subprocesses of tests included.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import mmengine.dataset.base_dataset as base_dataset  # noqa: E402
import pytest  # noqa: E402

# A dataset of mmengine collects garbage when it is made: a quarter of a second in a process that knows all of torch,
# and tests make hundreds of tiny ones.
base_dataset.gc = types.SimpleNamespace(collect=lambda: None)  # type: ignore[assignment]
# What tests write need not outlive the machine.
os.fsync = lambda file: None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups what would else start the same two processes, or train the same setting, in each process of `-n`."""
    for item in items:
        fixtures, parameters = getattr(item, "fixturenames", ()), getattr(item, "callspec", None)
        if "processes" in fixtures:
            item.add_marker(pytest.mark.xdist_group("processes"))
        elif "trained" in fixtures and parameters is not None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{parameters.params['name']}"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real datasets, from the environment variable KT_DATA_ROOT."""
    folder = os.environ.get("KT_DATA_ROOT")
    if not folder:
        pytest.skip("KT_DATA_ROOT is not set: it names the folder that holds cifar-100-python/")
    return Path(folder)


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`checks.two_processes`, for all tests: to start them takes longer than most trainings."""
    from checks import two_processes

    yield from two_processes(tmp_path_factory.mktemp("processes"))


@pytest.fixture
def no_cell_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and sweeps whose cells get no pages, which would take longer to draw than their own."""
    for module in ("render", "sweeps"):
        monkeypatch.setattr(f"tables.{module}.write_cell_pages", lambda *_: None)
