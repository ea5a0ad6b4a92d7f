"""Files that readers see whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt.files import read_json, replacing, write_json


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


def test_what_is_no_object_reads_as_an_empty_one_and_no_file_as_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    for text in ("", '{"top1": 1', "[1, 2]"):
        (tmp_path / "damaged.json").write_text(text)
        assert read_json(tmp_path / "damaged.json") == {}
