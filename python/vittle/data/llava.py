"""LLaVA's own training data: a JSON list of conversations and the folder that its image paths start from."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, Literal, NotRequired, TypedDict

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vittle.data.index import Index, read_record, scan
from vittle.data.lines import whole_characters
from vittle.errors import UserError, shown
from vittle.pictures import rgb

MARKER = "<image>"

Message = dict[str, Any]
"""`{"role": "user" or "assistant", "content": [{"type": "image"} or {"type": "text", "text": ...}, ...]}`"""


class Item(TypedDict):
    """One conversation for a chat template and a processor; images are RGB, in the order of the messages."""

    id: str | int
    messages: list[Message]
    images: list[Image.Image]
    place: NotRequired[str]
    """The file and the record's place in it, for messages."""


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that `parse_record` has found valid.

    `turns` alternates human, gpt, human, ..., ends with gpt, and keeps its `<image>` markers; `images` holds
    the resolved file of each marker, in order.
    """

    id: str | int
    turns: tuple[str, ...]
    images: tuple[Path, ...]
    kind: str = ""
    """Of the question, where the record says it, as the digit scenes do."""

    @property
    def messages(self) -> list[Message]:
        """The turns as Hugging Face chat messages, with image and text parts in the order of the turn."""
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": parts(turn)} for i, turn in enumerate(self.turns)]


class LlavaDataset(Dataset[Item]):
    """The conversations of one LLaVA JSON file, which may be of any size: in memory is where each one lies.

    All records are validated here, down to the existence of their image files; records are read and images decoded
    on access, in whatever process.

    Args:
        path: the JSON list.
        images: the folder that image paths start from.
        on_bad: "stop" at the first bad record; or "skip" it, its message going to ``bad``. A record whose image turns
            out to be broken on access gives way to the one after it then, and says so on standard error.
        unique_ids: whether an id that stands twice makes a bad record. The released files repeat ids.
        progress: whether a bar shows while the file is read.

    Raises:
        UserError: the file, the image folder or a record is not as it must be, or, on access, an image cannot
            be decoded. The message names the file and the record.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str],
        *,
        on_bad: Literal["stop", "skip"] = "stop",
        unique_ids: bool = True,
        progress: bool = False,
    ) -> None:
        self.path, self.on_bad = Path(path), on_bad
        self._folder = Path(images).resolve()
        if not self._folder.is_dir():
            raise UserError(f"the image folder {images} is missing or not a folder")
        self.bad: list[str] = []
        self.broken = torch.zeros((), dtype=torch.int64).share_memory_()
        """How often a record gave way for a broken image, in whatever process."""
        self._index = self._build(unique_ids, progress)
        if not len(self._index):
            raise UserError(f"{self.path} has no good record; the first of {len(self.bad)} bad ones: {self.bad[0]}")
        self._file: tuple[int, BinaryIO] | None = None

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for position in self._candidates(index % len(self)):
            record = self.record(position)
            try:
                images = [decode(file) for file in record.images]
            except UserError as error:
                located = self._located(error, self._index.positions[position], record.id)
                if self.on_bad == "stop":
                    raise located from error
                self.broken += 1
                print(f"skipped: {located}", file=sys.stderr, flush=True)
                continue
            place = f"{self.path}: record {self._index.positions[position]} (id {_found(record.id)})"
            return {"id": record.id, "messages": record.messages, "images": images, "place": place}
        raise UserError(f"{self.path} has no record whose images can be decoded")

    def _candidates(self, index: int) -> Iterator[int]:
        """The record and those that may stand in for it: others with images first, so that a batch of images is one."""
        yield index
        following = [*range(index + 1, len(self)), *range(index)]
        yield from (position for position in following if self.image_counts[position])
        yield from (position for position in following if not self.image_counts[position])

    def record(self, index: int) -> Record:
        """A record without its images decoded."""
        return parse_record(self._raw(index), self._folder)

    @property
    def lengths(self) -> Sequence[int]:
        """The characters of each record's turns: how long it is, roughly."""
        return self._index.characters

    @property
    def image_counts(self) -> Sequence[int]:
        """How many images each record has, 255 at most."""
        return self._index.images

    def instructions(self) -> Iterator[str]:
        """The texts of all instructions, in order, images left out."""
        for index in range(len(self)):
            for turn in _turns(self._raw(index)["conversations"])[::2]:  # its images need no second look
                yield from (part["text"] for part in parts(turn) if part["type"] == "text")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def _raw(self, index: int) -> Any:
        return read_record(self._opened(), self._index.offsets[index], self._index.sizes[index])

    def _opened(self) -> BinaryIO:
        """The file, opened once in each process: a worker must not share its parent's place in it."""
        if self._file is None or self._file[0] != os.getpid():
            self._file = os.getpid(), self.path.open("rb")
        return self._file[1]

    def _build(self, unique_ids: bool, progress: bool) -> Index:
        index, first = Index(), dict[int, int]()
        total = self.path.stat().st_size if self.path.exists() else 0
        with tqdm(total=total, unit="B", unit_scale=True, desc="reading data", disable=not progress) as bar:
            for position, found in enumerate(scan(self.path)):
                bar.update(found.offset + found.size - bar.n)
                try:
                    record = parse_record(found.value, self._folder)
                    earlier = first.setdefault(hash(record.id), position) if unique_ids else position
                    if earlier != position:
                        raise UserError(
                            f"record {earlier} has this id too; ids must differ, unless you allow repeated ids"
                        )
                except UserError as error:
                    raw = found.value
                    located = self._located(error, position, raw.get("id") if isinstance(raw, dict) else None)
                    if self.on_bad == "stop":
                        raise located from None
                    self.bad.append(str(located))
                    continue
                index.add(found, position, sum(map(len, record.turns)), len(record.images))
        return index

    def _located(self, error: UserError, index: int, id: object) -> UserError:
        return UserError(f"{self.path}: record {index} (id {_found(id)}): {error}")


def parse_record(raw: object, folder: Path) -> Record:
    """Validate one record of LLaVA's JSON against the resolved image folder.

    Raises:
        UserError: the record is malformed, its markers and images differ in number, or an image is missing or
            outside the folder. The message leaves the record's name to the caller.
    """
    if not isinstance(raw, dict):
        raise UserError(f"it is {shown(raw)}; it must be an object with `id` and `conversations`")
    id = raw.get("id")
    if not isinstance(id, str | int):
        raise UserError(f"`id` is {_found(id)}; it must be a string or an integer")
    turns = _turns(raw.get("conversations"))
    names = image_names(raw.get("image"))
    markers = sum(turn.count(MARKER) for turn in turns)
    if markers != len(names):
        raise UserError(
            f"it has {markers} {MARKER} marker(s) and {len(names)} image(s); each image must have one marker"
        )
    return Record(id, turns, tuple(image_file(name, folder) for name in names), str(raw.get("kind") or ""))


def _turns(conversations: object) -> tuple[str, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise UserError(f"`conversations` is {_found(conversations)}; it must be a list of turns, not empty")
    turns = []
    for index, (turn, role) in enumerate(zip(conversations, cycle(("human", "gpt")), strict=False)):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise UserError(f"{where} is {shown(turn)}; it must be an object with `from` and `value`")
        speaker = turn.get("from")
        if speaker != role:
            raise UserError(f'{where}.from is {_found(speaker)}; it must be "{role}": turns alternate, human first')
        text = _text(turn.get("value"), f"{where}.value")
        if role == "gpt" and MARKER in text:
            raise UserError(f"{where}.value is an answer with an {MARKER} marker; only a human turn may have one")
        turns.append(text)
    if len(turns) % 2:
        raise UserError(f'the last turn, conversations[{len(turns) - 1}], is from "human"; it must be from "gpt"')
    return tuple(turns)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {_found(value)}; it must be a string")
    if not value.strip():
        raise UserError(f"{where} is empty; it must hold text")
    return whole_characters(value, where)


def image_names(image: object) -> list[str]:
    listed = [] if image is None else image if isinstance(image, list) else [image]
    names = [name for name in listed if isinstance(name, str) and name]
    if len(names) != len(listed):
        raise UserError(f"`image` is {shown(image)}; it must be a path or a list of paths")
    return names


def image_file(name: str, folder: Path) -> Path:
    named = shown(name)
    if Path(name).is_absolute():
        raise UserError(f"image {named} is an absolute path; it must be relative to the image folder")
    try:
        file = (folder / name).resolve()
        exists = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"image {named} cannot be looked up ({error}); it must be a readable file") from None
    if not file.is_relative_to(folder):
        raise UserError(f"image {named} leads to {file}; it must stay inside the image folder {folder}")
    if not exists:
        raise UserError(f"image {named} is missing; it must be a file in the image folder {folder}")
    return file


def parts(turn: str) -> list[dict[str, str]]:
    """The content parts of a turn, without the white space around them: templates write their own."""
    pieces = (piece.strip() for piece in re.split(f"({MARKER})", turn))
    return [{"type": "image"} if p == MARKER else {"type": "text", "text": p} for p in pieces if p]


def decode(file: Path) -> Image.Image:
    """An image file's picture in 8-bit RGB.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            return rgb(image)
    except Exception as error:  # Pillow's decoders raise many types for a broken file
        raise UserError(f"image {file} cannot be decoded ({error}); it must be a whole image file") from error


def _found(field: object) -> str:
    """A field's value as a message shows it."""
    return "missing or null" if field is None else shown(field)
