"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vittle import UserError
from vittle.files import save_json, whole, write_json


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def interrupted() -> None:
        with whole(path) as partial:
            partial.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_where_no_file_can_be_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(UserError, match=r"file.a\.json cannot be written: Not a directory"):
        save_json(tmp_path / "file" / "a.json", {})


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [math.nan, (1.5, -math.inf)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, [1.5, None]]}
