"""Two hundred command lines and sixty files of data of a fixed seed, see `fuzz`; `tests/campaign.py` tries more."""

from __future__ import annotations

import sys
from pathlib import Path

import fuzz
import pytest

import fake_training


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_training.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    faults = [fault for seed in range(200) if (fault := fuzz.fault_of_line(seed, tmp_path / "out"))]
    assert not faults, "\n".join(faults)
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_data_files(tmp_path: Path) -> None:
    pytest.importorskip("mmdet")
    faults = [fault for seed in range(60) if (fault := fuzz.fault_of_file(seed, tmp_path))]
    assert not faults, "\n".join(faults)
