"""Records from LLaVA's JSON, and what is said about bad ones."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vittle.data.llava import LlavaDataset, Record, decode, parse_record
from vittle.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with a red palette image and a noisy JPEG, and an image outside of it."""
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    Image.new("RGB", (4, 2), "red").convert("P").save(images / "a" / "red.png")
    Image.effect_noise((64, 64), 90).save(images / "noise.jpg")
    Image.new("RGB", (1, 1)).save(tmp_path / "outside.png")
    return images


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def save(folder: Path, records: Any) -> Path:
    path = folder.parent / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def image() -> dict[str, str]:
    return {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_reads_records_in_order(folder: Path) -> None:
    first = {
        "id": "x",
        "image": "a/red.png",
        "conversations": turns("<image>\nwhat?", "red", "sure?", " yes \n"),
    }
    second = {"id": 7, "conversations": turns("hi", "hello")}
    third = {
        "id": "two",
        "image": ["noise.jpg", "a/red.png"],
        "conversations": turns("compare <image> with\n<image>", "noise"),
    }
    dataset = LlavaDataset(save(folder, [first, second, third]), folder)

    assert len(dataset) == 3
    assert [item["id"] for item in dataset] == ["x", 7, "two"]
    assert dataset[0]["messages"] == [
        {"role": "user", "content": [image(), text("what?")]},
        {"role": "assistant", "content": [text("red")]},
        {"role": "user", "content": [text("sure?")]},
        {"role": "assistant", "content": [text("yes")]},
    ]
    assert dataset[1]["images"] == [] and dataset[1]["place"] == f"{dataset.path}: record 1 (id 7)"
    assert dataset[2]["messages"][0]["content"] == [text("compare"), image(), text("with"), image()]
    assert [picture.size for picture in dataset[2]["images"]] == [(64, 64), (4, 2)]


def test_images_come_as_rgb(folder: Path) -> None:
    record = {"id": 0, "image": "a/red.png", "conversations": turns("<image>", "red")}
    (picture,) = LlavaDataset(save(folder, [record]), folder)[0]["images"]
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (255, 0, 0)


def test_images_are_decoded_on_access_only(folder: Path) -> None:
    record = {"id": 0, "image": "noise.jpg", "conversations": turns("<image>", "noise")}
    dataset = LlavaDataset(save(folder, [record]), folder)
    Image.new("RGB", (3, 3)).save(folder / "noise.jpg")
    assert dataset[0]["images"][0].size == (3, 3)


def test_one_raw_record_gives_one_record(folder: Path) -> None:
    raw = {"id": 1, "image": "a/../noise.jpg", "conversations": turns("<image> ?", "!")}
    assert parse_record(raw, folder) == Record(1, ("<image> ?", "!"), (folder / "noise.jpg",))


def test_a_byte_order_mark_is_accepted(folder: Path) -> None:
    path = save(folder, [])
    path.write_text(json.dumps([{"id": 0, "conversations": turns("q", "é")}]), encoding="utf-8-sig")
    assert LlavaDataset(path, folder)[0]["messages"][1]["content"] == [text("é")]


def record(**changes: Any) -> dict[str, Any]:
    """A valid record but for the changes; a change to None leaves the key out."""
    raw = {"id": "r", "conversations": turns("q", "a"), **changes}
    return {key: value for key, value in raw.items() if value is not None}


TURN_0 = "conversations[0]"
BAD_RECORDS = {
    "null": (None, "it is null; it must be an object with `id` and `conversations`"),
    "not an object": ("hi", 'it is "hi"; it must be an object with `id` and `conversations`'),
    "no id": (record(id=None), "`id` is missing or null; it must be a string or an integer"),
    "id of another type": (record(id=1.5), "`id` is 1.5; it must be a string or an integer"),
    "no conversations": (
        record(conversations=None),
        "`conversations` is missing or null; it must be a list of turns, not empty",
    ),
    "conversations of another type": (
        record(conversations={"from": "human"}),
        '`conversations` is {"from": "human"}; it must be a list of turns, not empty',
    ),
    "no turns": (record(conversations=[]), "`conversations` is []; it must be a list of turns, not empty"),
    "a turn of another type": (
        record(conversations=["q" * 80]),
        f'{TURN_0} is "{"q" * 56}...; it must be an object with `from` and `value`',
    ),
    "no from": (
        record(conversations=[{"value": "q"}]),
        f'{TURN_0}.from is missing or null; it must be "human": turns alternate, human first',
    ),
    "from of another type": (
        record(conversations=[{"from": 3, "value": "q"}]),
        f'{TURN_0}.from is 3; it must be "human": turns alternate, human first',
    ),
    "first turn not human": (
        record(conversations=[{"from": "gpt", "value": "a"}]),
        f'{TURN_0}.from is "gpt"; it must be "human": turns alternate, human first',
    ),
    "roles out of order": (
        record(conversations=[*turns("q", "a"), {"from": "gpt", "value": "b"}]),
        'conversations[2].from is "gpt"; it must be "human": turns alternate, human first',
    ),
    "an unknown role": (
        record(conversations=[*turns("q"), {"from": "assistant", "value": "a"}]),
        'conversations[1].from is "assistant"; it must be "gpt": turns alternate, human first',
    ),
    "last turn not gpt": (
        record(conversations=turns("q", "a", "q")),
        'the last turn, conversations[2], is from "human"; it must be from "gpt"',
    ),
    "no value": (
        record(conversations=[{"from": "human"}]),
        f"{TURN_0}.value is missing or null; it must be a string",
    ),
    "value of another type": (
        record(conversations=[{"from": "human", "value": ["q"]}]),
        f'{TURN_0}.value is ["q"]; it must be a string',
    ),
    "an empty answer": (
        record(conversations=turns("q", " \n")),
        "conversations[1].value is empty; it must hold text",
    ),
    "an empty question": (
        record(conversations=turns("", "a")),
        f"{TURN_0}.value is empty; it must hold text",
    ),
    "half a surrogate pair": (
        record(conversations=turns("q", "smile \ud83d")),
        "conversations[1].value has half a character at 6; surrogates must come in pairs",
    ),
    "more markers than images": (
        record(image="noise.jpg", conversations=turns("<image><image>", "a")),
        "it has 2 <image> marker(s) and 1 image(s); each image must have one marker",
    ),
    "markers and no image": (
        record(conversations=turns("<image>", "a")),
        "it has 1 <image> marker(s) and 0 image(s); each image must have one marker",
    ),
    "fewer markers than images": (
        record(image=["noise.jpg", "a/red.png"], conversations=turns("<image>", "a")),
        "it has 1 <image> marker(s) and 2 image(s); each image must have one marker",
    ),
    "a marker in an answer": (
        record(image="noise.jpg", conversations=turns("q", "<image>")),
        "conversations[1].value is an answer with an <image> marker; only a human turn may have one",
    ),
    "image of another type": (record(image=5), "`image` is 5; it must be a path or a list of paths"),
    "a list with another type": (
        record(image=["noise.jpg", 5]),
        '`image` is ["noise.jpg", 5]; it must be a path or a list of paths',
    ),
    "an empty image path": (record(image=""), '`image` is ""; it must be a path or a list of paths'),
    "a missing image": (
        record(image="b.jpg", conversations=turns("<image>", "a")),
        'image "b.jpg" is missing; it must be a file in the image folder {folder}',
    ),
    "a folder as image": (
        record(image="a", conversations=turns("<image>", "a")),
        'image "a" is missing; it must be a file in the image folder {folder}',
    ),
    "an absolute path": (
        record(image="/noise.jpg", conversations=turns("<image>", "a")),
        'image "/noise.jpg" is an absolute path; it must be relative to the image folder',
    ),
    "a path that climbs out": (
        record(image="a/../../outside.png", conversations=turns("<image>", "a")),
        'image "a/../../outside.png" leads to {parent}/outside.png; it must stay inside the image folder {folder}',
    ),
    "a path that cannot be": (
        record(image="a\0b", conversations=turns("<image>", "a")),
        r'image "a\u0000b" cannot be looked up (embedded null byte); it must be a readable file',
    ),
}


@pytest.mark.parametrize(("raw", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_refused_by_name(folder: Path, raw: Any, message: str) -> None:
    path = save(folder, [record(id="fine"), raw])
    with pytest.raises(UserError) as refusal:
        LlavaDataset(path, folder)
    id = json.dumps(raw["id"]) if isinstance(raw, dict) and "id" in raw else "missing or null"
    message = message.replace("{folder}", str(folder)).replace("{parent}", str(folder.parent))
    assert str(refusal.value) == f"{path}: record 1 (id {id}): {message}"


@pytest.mark.parametrize("link", ["file", "folder", "loop"])
def test_a_symbolic_link_must_not_lead_out_of_the_folder(folder: Path, link: str) -> None:
    (folder / "file").symlink_to(folder.parent / "outside.png")
    (folder / "folder").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    name = {"file": "file", "folder": "folder/outside.png", "loop": "loop"}[link]
    path = save(folder, [record(image=name, conversations=turns("<image>", "a"))])
    with pytest.raises(UserError, match="is missing|cannot be looked up" if link == "loop" else "must stay inside"):
        LlavaDataset(path, folder)


def test_a_symbolic_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    (folder / "same.png").symlink_to("a/red.png")
    path = save(folder, [record(image="same.png", conversations=turns("<image>", "a"))])
    assert LlavaDataset(path, folder.parent / "link")[0]["images"][0].size == (4, 2)


BAD_FILES = {
    "not UTF-8": (b'["\xff"]', "is not UTF-8 (invalid start byte at byte 2); save it as UTF-8"),
    "cut short": (
        b'[{"id": 1',
        "is not JSON or is cut short (Expecting ',' delimiter at byte 9); ",
    ),
    "one record a line": (b"{}\n{}", "is not JSON or is cut short (Extra data at byte 3); "),
    "nested without end": (b"[" * 100_000, "is not JSON or is cut short ("),
    "empty": (
        b"",
        "is not JSON or is cut short (Expecting value at byte 0); it must be a list",
    ),
    "not a list": (b'{"id": 1}', 'holds {"id": 1}; it must hold a list of records'),
    "null": (b"null", "holds null; it must hold a list of records"),
    "an empty list": (b"[]", "holds an empty list; it must hold at least one record"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused(folder: Path, content: bytes, message: str) -> None:
    path = folder.parent / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        LlavaDataset(path, folder)
    assert str(refusal.value).startswith(f"{path} {message}")
    assert "\n" not in str(refusal.value)


def test_a_missing_file_or_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file or directory"):
        LlavaDataset(folder / "none.json", folder)
    with pytest.raises(UserError, match="the image folder none is missing or not a folder"):
        LlavaDataset(save(folder, [record()]), "none")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "image file is truncated"), (b"text", "cannot identify image file")]
)
def test_a_broken_image_is_named_on_access(folder: Path, content: bytes | None, reason: str) -> None:
    file = folder / "noise.jpg"
    file.write_bytes(content or file.read_bytes()[:-2000])
    path = save(folder, [record(), record(id="x", image="noise.jpg", conversations=turns("<image>", "a"))])
    dataset = LlavaDataset(path, folder)
    with pytest.raises(UserError) as refusal:
        dataset[1]
    assert str(refusal.value).startswith(f'{path}: record 1 (id "x"): image {file} cannot be decoded ({reason}')


def test_an_error_in_a_worker_stays_one_line(folder: Path) -> None:
    (folder / "noise.jpg").write_bytes(b"text")
    path = save(folder, [record(image="noise.jpg", conversations=turns("<image>", "a"))])
    with pytest.raises(UserError) as refusal:
        list(DataLoader(LlavaDataset(path, folder), num_workers=1))
    assert str(refusal.value).startswith(f'{path}: record 0 (id "r"): image {folder / "noise.jpg"} cannot be')
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("I;16", 257 * 77, "png", (77, 77, 77)),
        ("I;16", 257 * 77, "tif", (77, 77, 77)),
        ("I", 77, "tif", (77, 77, 77)),
        ("F", 0.2, "tif", (51, 51, 51)),
        ("1", 1, "png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), "png", (10, 20, 30)),
        ("LA", (77, 0), "png", (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
    ],
)
def test_any_mode_is_decoded_as_the_shifts_read_it(
    mode: str, value: Any, suffix: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    file = tmp_path / f"image.{suffix}"
    Image.new(mode, (3, 2), value).save(file)
    decoded = decode(file)
    assert (decoded.mode, decoded.size, decoded.getpixel((1, 1))) == ("RGB", (3, 2), expected)


def test_a_palettes_transparency_is_dropped_without_a_warning(tmp_path: Path) -> None:
    palette = Image.new("RGB", (3, 3), (10, 20, 30)).quantize(2)
    palette.save(tmp_path / "image.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "image.png").getpixel((1, 1)) == palette.convert("RGB").getpixel((1, 1))
