"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vittle.errors import UserError

Json = Mapping[str, Any] | Sequence[Any]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside this one, to be written: at the end it takes this one's place, and with an error it goes."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """In UTF-8."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Json) -> None:
    """Numbers that JSON does not know become null."""
    write_text(path, _json(content))


def save_text(path: Path, text: str) -> None:
    """Where the user said.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def save_json(path: Path, content: Json) -> None:
    """As :func:`write_json`, where the user said.

    Raises:
        UserError: it cannot be written there.
    """
    save_text(path, _json(content))


def _json(content: Json) -> str:
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
