"""LLaVA's own training data: a JSON list of conversations and the folder that its image paths start from."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image
from torch.utils.data import Dataset

from vittle.errors import UserError

MARKER = "<image>"

Message = dict[str, Any]
"""`{"role": "user" or "assistant", "content": [{"type": "image"} or {"type": "text", "text": ...}, ...]}`"""


class Item(TypedDict):
    """One conversation for a chat template and a processor; images are RGB, in the order of the messages."""

    id: str | int
    messages: list[Message]
    images: list[Image.Image]


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation that `parse_record` has found valid.

    `turns` alternates human, gpt, human, ..., ends with gpt, and keeps its `<image>` markers; `images` holds
    the resolved file of each marker, in order.
    """

    id: str | int
    turns: tuple[str, ...]
    images: tuple[Path, ...]

    @property
    def messages(self) -> list[Message]:
        """The turns as Hugging Face chat messages, with image and text parts in the order of the turn."""
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": _parts(turn)} for i, turn in enumerate(self.turns)]


class LlavaDataset(Dataset[Item]):
    """The conversations of one LLaVA JSON file.

    All records are validated here, down to the existence of their image files; images are decoded on access.

    Raises:
        UserError: the file, the image folder or a record is not as it must be, or, on access, an image cannot
            be decoded. The message names the file and the record.
    """

    def __init__(self, path: str | os.PathLike[str], images: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        folder = Path(images).resolve()
        if not folder.is_dir():
            raise UserError(f"the image folder {images} is missing or not a folder")
        self._records = [self._parse(index, raw, folder) for index, raw in enumerate(_read(self.path))]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Item:
        record = self._records[index]
        try:
            images = [_decode(file) for file in record.images]
        except UserError as error:
            raise self._located(error, index, record.id) from error
        return {"id": record.id, "messages": record.messages, "images": images}

    def _parse(self, index: int, raw: object, folder: Path) -> Record:
        try:
            return parse_record(raw, folder)
        except UserError as error:
            raise self._located(error, index, raw.get("id") if isinstance(raw, dict) else None) from None

    def _located(self, error: UserError, index: int, id: object) -> UserError:
        return UserError(f"{self.path}: record {index} (id {_found(id)}): {error}")


def parse_record(raw: object, folder: Path) -> Record:
    """Validate one record of LLaVA's JSON against the resolved image folder.

    Raises:
        UserError: the record is malformed, its markers and images differ in number, or an image is missing or
            outside the folder. The message leaves the record's name to the caller.
    """
    if not isinstance(raw, dict):
        raise UserError(f"it is {_shown(raw)}; it must be an object with `id` and `conversations`")
    id = raw.get("id")
    if not isinstance(id, str | int):
        raise UserError(f"`id` is {_found(id)}; it must be a string or an integer")
    turns = _turns(raw.get("conversations"))
    names = _image_names(raw.get("image"))
    markers = sum(turn.count(MARKER) for turn in turns)
    if markers != len(names):
        raise UserError(
            f"it has {markers} {MARKER} marker(s) and {len(names)} image(s); each image must have one marker"
        )
    return Record(id, turns, tuple(_image_file(name, folder) for name in names))


def _turns(conversations: object) -> tuple[str, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise UserError(f"`conversations` is {_found(conversations)}; it must be a list of turns, not empty")
    turns = []
    for index, (turn, role) in enumerate(zip(conversations, cycle(("human", "gpt")), strict=False)):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise UserError(f"{where} is {_shown(turn)}; it must be an object with `from` and `value`")
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
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half a character at {error.start}; surrogates must come in pairs") from None
    return value


def _image_names(image: object) -> list[str]:
    listed = [] if image is None else image if isinstance(image, list) else [image]
    names = [name for name in listed if isinstance(name, str) and name]
    if len(names) != len(listed):
        raise UserError(f"`image` is {_shown(image)}; it must be a path or a list of paths")
    return names


def _image_file(name: str, folder: Path) -> Path:
    shown = _shown(name)
    if Path(name).is_absolute():
        raise UserError(f"image {shown} is an absolute path; it must be relative to the image folder")
    try:
        file = (folder / name).resolve()
        exists = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"image {shown} cannot be looked up ({error}); it must be a readable file") from None
    if not file.is_relative_to(folder):
        raise UserError(f"image {shown} leads to {file}; it must stay inside the image folder {folder}")
    if not exists:
        raise UserError(f"image {shown} is missing; it must be a file in the image folder {folder}")
    return file


def _parts(turn: str) -> list[dict[str, str]]:
    """The content parts of a turn, without the white space around them: templates write their own."""
    pieces = (piece.strip() for piece in re.split(f"({MARKER})", turn))
    return [{"type": "image"} if p == MARKER else {"type": "text", "text": p} for p in pieces if p]


def _decode(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types for a broken file
        raise UserError(f"image {file} cannot be decoded ({error}); it must be a whole image file") from error


def _read(path: Path) -> list[object]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON or is cut short ({error}); it must be a list of records") from None
    if not isinstance(raw, list):
        raise UserError(f"{path} holds {_shown(raw)}; it must hold a list of records")
    if not raw:
        raise UserError(f"{path} holds an empty list; it must hold at least one record")
    return raw


def _found(field: object) -> str:
    """A field's value as a message shows it."""
    return "missing or null" if field is None else _shown(field)


def _shown(value: object) -> str:
    """A JSON value as a message shows it: short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
