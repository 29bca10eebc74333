"""JSON Lines and lists: JSON Lines are read with errors that name the line, and written so that a kill costs the last
line at most; lists are read with errors that name the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from vittle.errors import UserError, shown
from vittle.locks import lock

Record = dict[str, Any]


def read_lines(path: Path, *, may_be_cut: bool = False) -> Iterator[tuple[str, Record]]:
    """Each record after its place, such as `questions.jsonl, line 3`.

    Args:
        path: the file, in UTF-8.
        may_be_cut: whether a last line without its end, such as a killed writer leaves, is passed over.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not (may_be_cut and not line.endswith(b"\n")):
                    yield f"{path}, line {number}", _object(line, f"{path}, line {number}")
    except OSError as error:
        raise _unreadable(path, error) from error


def read_list(path: Path) -> Iterator[tuple[str, Record]]:
    """Each record of a JSON list after its place.

    Raises:
        UserError: the file cannot be read, or is no list of objects.
    """
    yield from records_of(read_json(path), path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def records_of(found: object, path: Path) -> Iterator[tuple[str, Record]]:
    """Each record of a list after its place in the file.

    Raises:
        UserError: it is no list of objects.
    """
    if not isinstance(found, list):
        raise UserError(f"{path} holds {shown(found)}; must be a list of records")
    for number, record in enumerate(found):
        place = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise UserError(f"{place} is {shown(record)}; must be an object")
        yield place, record


def integer_of(record: Mapping[str, Any], name: str, place: str) -> int:
    """A field that must hold an integer.

    Raises:
        UserError: it does not.
    """
    value = record.get(name)
    if type(value) is not int:
        found = "missing" if name not in record else shown(value)
        raise UserError(f"{place}: `{name}` is {found}; must be an integer")
    return value


def object_of(record: Mapping[str, Any], name: str, place: str) -> Record:
    """A field that must hold an object.

    Raises:
        UserError: it does not.
    """
    value = record.get(name)
    if not isinstance(value, dict):
        found = "missing" if name not in record else shown(value)
        raise UserError(f"{place}: `{name}` is {found}; must be an object")
    return value


def texts_of(record: Mapping[str, Any], name: str, place: str) -> list[str]:
    """A field that must hold a list of texts, at least one.

    Raises:
        UserError: it does not.
    """
    value = record.get(name)
    if not (isinstance(value, list) and value and all(isinstance(each, str) and each for each in value)):
        found = "missing" if name not in record else shown(value)
        raise UserError(f"{place}: `{name}` is {found}; must be a list of texts")
    return [whole_characters(each, f"{place}: `{name}`") for each in value]


def text_of(record: Mapping[str, Any], name: str, place: str) -> str:
    """A field that must hold text.

    Raises:
        UserError: it does not.
    """
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if name not in record else shown(value)
        raise UserError(f"{place}: `{name}` is {found}; must be text")
    return whole_characters(value, f"{place}: `{name}`")


def id_of(record: Mapping[str, Any], name: str, place: str) -> str:
    """A field that must hold a string or an integer.

    Raises:
        UserError: it does not.
    """
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "missing" if name not in record else shown(value)
        raise UserError(f"{place}: `{name}` is {found}; must be a string or an integer")
    return whole_characters(str(value), f"{place}: `{name}`")


def whole_characters(text: str, where: str) -> str:
    """The text, if it can be written.

    Raises:
        UserError: it has half of a surrogate pair, as JSON may.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half a character at {error.start}; surrogates must come in pairs") from None
    return text


class LineWriter:
    """Appends records to a file, many in one write; a half-written last line is cut off when it is opened.

    Raises:
        UserError: the file cannot be written, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("r+b" if self.path.exists() else "w+b")
        except OSError as error:
            raise self._failed(error) from error
        try:
            lock(self._file, self.path)
        except UserError:
            self._file.close()
            raise
        self.keep(self._file.read().count(b"\n"))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def keep(self, lines: int) -> None:
        """Cuts the file off after so many lines."""
        self._file.seek(0)
        for _ in range(lines):
            self._file.readline()
        self._file.truncate(self._file.tell())

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """All of them, on disk when this returns, or none."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        start = self._file.tell()
        try:
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {error.strerror}; what was written is whole")


def _object(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{place} is {shown(record)}; must be an object")
    return record


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
    return UserError(f"{path} cannot be read: {reason}")
