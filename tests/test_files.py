"""Files that readers see whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kt import command, files
from kt.files import checksum, read_json, replacing, write_json, write_text


def test_an_error_in_between_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"top1": 1.0})
    with pytest.raises(TypeError, match="serializable"):
        write_json(path, {"top1": object()})
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert read_json(path) == {"top1": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_checksum_is_known_as_long_as_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, known = tmp_path / "weights", dict[str, Any]()
    path.write_bytes(b"first")
    first, other = (hashlib.sha256(content).hexdigest() for content in (b"first", b"other"))
    assert checksum(path, known) == first and not known  # it may change again within the same tick
    monkeypatch.setattr(files, "_RACY_NS", 0)
    assert checksum(path, known) == first
    path.write_bytes(b"other")
    assert checksum(path, known) == other
    known = json.loads(json.dumps(known))
    known[str(path)][-1] = "as it is known"
    assert checksum(path, known) == "as it is known" and checksum(path) == other
    known[str(path)] = "no such thing"
    assert checksum(path, known) == other


def test_what_is_no_object_reads_as_an_empty_one_and_no_file_as_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    for text in ("", '{"top1": 1', "[1, 2]"):
        (tmp_path / "damaged.json").write_text(text)
        assert read_json(tmp_path / "damaged.json") == {}


def test_a_terminal_that_lacks_letters(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for name in ("stdout", "__stdout__"):
        monkeypatch.setattr(sys, name, terminal)
    assert command.run(lambda: print("resnet50 → resnet18") or 0) == 0
    assert capfdbinary.readouterr().out == b"resnet50 ? resnet18\n"


def test_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_text(tmp_path / "table.md", name)
    assert (tmp_path / "table.md").read_bytes() == b"caf\xe9"
