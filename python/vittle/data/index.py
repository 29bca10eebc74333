"""A JSON list of any size, read record by record: where each one lies in the file, and what of it is worth keeping."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vittle.errors import UserError, shown

CHUNK = 1 << 22
"""Bytes read at a time: records are far shorter, and the list may be of gigabytes."""

_WHITE = " \t\n\r"
_DECODER = json.JSONDecoder()


class Found(NamedTuple):
    """A record of a list: bytes [offset, offset + size) of the file, and its value."""

    offset: int
    size: int
    value: object


@dataclass
class Index:
    """What is kept of each record in memory: 21 bytes."""

    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("i"))
    positions: array[int] = field(default_factory=lambda: array("i"))
    """In the file's list, which may hold skipped records between."""
    characters: array[int] = field(default_factory=lambda: array("i"))
    """Of its turns: how long it is, for batches of like lengths."""
    images: array[int] = field(default_factory=lambda: array("B"))
    """How many there are, 255 at most."""

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, found: Found, position: int, characters: int, images: int) -> None:
        """One record more."""
        self.offsets.append(found.offset)
        self.sizes.append(found.size)
        self.positions.append(position)
        self.characters.append(characters)
        self.images.append(min(images, 255))


def read_record(file: BinaryIO, offset: int, size: int) -> Any:
    """A record by its place."""
    file.seek(offset)
    return json.loads(file.read(size))


def scan(path: Path) -> Iterator[Found]:
    """The records of a JSON list, in order; no more than a few chunks of the file are in memory.

    Raises:
        UserError: the file cannot be read, or is no JSON list in UTF-8.
    """
    try:
        with path.open("rb") as file:
            yield from _Scanner(path, file).records()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


class _Scanner:
    """A window of the file as text, that moves over it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.is_whole = "", False
        self.at = 0  # the next character of the text
        mark = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(mark)
        self.byte = self.read = mark  # of the next character; of the next chunk

    def records(self) -> Iterator[Found]:
        """Every record, or the error that ends them."""
        if self._peek() != "[":
            value = self._value()
            self._end()
            raise UserError(f"{self.path} holds {shown(value)}; it must hold a list of records")
        self._move(self.at + 1)
        if self._peek() == "]":
            raise UserError(f"{self.path} holds an empty list; it must hold at least one record")
        while True:
            self._peek()
            offset = self.byte
            value = self._value()
            yield Found(offset, self.byte - offset, value)
            following = self._peek()
            if following not in (",", "]"):
                self._refuse("Expecting ',' delimiter")
            self._move(self.at + 1)
            if following == "]":
                return self._end()

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in _WHITE:
                end += 1
            self._move(end)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _value(self) -> object:
        """The value that starts here; more of the file is read until it is whole."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                following = self.text[end : end + 1]
                is_whole = self.text[end - 1] in '}]"' or (following and following not in ".eE+-0123456789")
                if is_whole or not self._more():
                    self._move(end)
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if not (is_cut and self._more()):
                    self._move(min(error.pos, len(self.text)))
                    self._refuse(error.msg)
            except RecursionError:
                self._refuse("nested too deep")

    def _end(self) -> None:
        if self._peek():
            self._refuse("Extra data")

    def _move(self, to: int) -> None:
        self.byte += len(self.text[self.at : to].encode())
        self.at = to

    def _more(self) -> bool:
        """Reads on and forgets what is behind; False at the end. A long record doubles what is read at a time."""
        if self.is_whole:
            return False
        self.text, self.at = self.text[self.at :], 0
        data = self.file.read(max(CHUNK, len(self.text)))
        self.is_whole = not data
        kept = len(self.decoder.getstate()[0])
        try:
            self.text += self.decoder.decode(data, final=self.is_whole)
        except UnicodeDecodeError as error:
            at = self.read - kept + error.start
            raise UserError(f"{self.path} is not UTF-8 ({error.reason} at byte {at}); save it as UTF-8") from None
        self.read += len(data)
        return True

    def _refuse(self, reason: str) -> None:
        raise UserError(
            f"{self.path} is not JSON or is cut short ({reason} at byte {self.byte}); it must be a list of records"
        ) from None
