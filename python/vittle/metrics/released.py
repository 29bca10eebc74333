"""Reads the released CLUB weights, a zip with a pickle in it, and runs nothing that the pickle names."""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vittle.errors import UserError

_PICKLE_BYTES = 1 << 16
"""More than the pickle of eight tensors has."""


class _Stored(NamedTuple):
    key: str
    shape: tuple[int, ...]


def read_club(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The fp32 tensors of these names that ``torch.save`` wrote.

    Raises:
        UserError: the file holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickle,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            folder = pickle.removesuffix("data.pkl")
            stored = _described(_member(archive, pickle, range(_PICKLE_BYTES)))
            if not isinstance(stored, dict) or stored.keys() != names:
                raise ValueError("its pickle is no state dict with a CLUB's eight names")
            order = f"{folder}byteorder"  # which torch 2.0 and earlier did not write
            if order in archive.namelist() and archive.getinfo(order).file_size != len("little"):
                raise ValueError("it is not little-endian")
            tensors = {}
            for name, (key, shape) in stored.items():
                size = 4 * math.prod(shape)
                data = bytearray(_member(archive, f"{folder}data/{key}", range(size, size + 1)))
                tensors[name] = torch.frombuffer(data, dtype=torch.float32).view(shape)
            return tensors
    except (zipfile.BadZipFile, EOFError, OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is no CLUB's weights in fp32 of torch.save's, or is damaged: {error}") from error


def _member(archive: zipfile.ZipFile, name: str, sizes: Collection[int]) -> bytes:
    """A file of an archive, if it is not compressed and has one of these sizes."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size not in sizes:
        raise ValueError(f"{name} has {info.file_size} bytes, or is compressed")
    return archive.read(info)


def _described(pickle: bytes) -> Any:
    """What a pickle of named tensors holds, in dictionaries; a tensor is its storage's key and its shape.

    Only torch.save's own opcodes are understood, and of calls only the two that make such a dictionary.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "STOP" | "BINPERSID":
                pass
            case "GLOBAL" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "NEWFALSE":
                stack.append(False)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                start = len(stack) - int(opcode.name[-1])
                stack[start:] = [tuple(stack[start:])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                start = marks.pop()
                stack[start:] = [tuple(stack[start:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "SETITEM" | "SETITEMS":
                start = marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2
                _put(stack[start - 1], stack[start:])
                del stack[start:]
            case "BUILD":
                stack.pop()
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_reduced(stack.pop(), arguments))
            case name:
                raise ValueError(f"its pickle has the opcode {name}")
    return stack.pop()


def _put(target: Any, pairs: Sequence[Any]) -> None:
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in pairs[::2]):
        raise ValueError("its pickle sets items of what is no dictionary by names")
    target.update(zip(pairs[::2], pairs[1::2], strict=True))


def _reduced(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case "collections OrderedDict", ():
            return {}
        case (
            "torch._utils _rebuild_tensor_v2",
            (("storage", "torch FloatStorage", str(key), str(), int(count)), 0, tuple(shape), tuple(stride), False, {}),
        ):
            fills = len(shape) <= 2 and all(isinstance(size, int) for size in shape) and math.prod(shape) == count
            if fills and stride == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))):
                return _Stored(key, shape)
            raise ValueError("a tensor of its is not contiguous, or shares its storage")
    called = function[:60] if isinstance(function, str) else "something"
    raise ValueError(f"its pickle calls {called}, with arguments that are not an fp32 tensor's")
