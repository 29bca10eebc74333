"""What a model ignores, the pairs made of it, and their folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from vittle.cli import main
from vittle.data import Collator, LlavaDataset
from vittle.demo import ALIGNED
from vittle.demo.edits import write_scene_pairs
from vittle.discriminative import (
    KINDS,
    Edited,
    Kind,
    Object,
    Pair,
    Picture,
    make_edits,
    make_pairs,
    read_pairs,
    significance,
    to_llava,
    write_pairs,
)
from vittle.discriminative.pairs import PROMPT
from vittle.errors import UserError
from vittle.pictures import rgb

WIDTH, HEIGHT = 12, 8


def masks(*rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(rows, dtype=bool)


class TestSignificance:
    def test_of_a_map_of_the_masks_size_is_the_mean(self) -> None:
        attention = np.array([[1.0, 2.0], [4.0, 9.0]])
        found = significance(attention, masks([[1, 1], [0, 0]], [[0, 1], [0, 1]], [[1, 1], [1, 1]]))
        assert found.dtype == np.float64
        assert found.tolist() == [1.5, 5.5, 4.0]

    def test_of_a_coarser_map_is_interpolated(self) -> None:
        """A row (0, 1) at four pixels is (0, 1/4, 3/4, 1); pixels beyond the outer centres keep the outer values."""
        single = masks([[1, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 1]], [[0, 1, 1, 1]])
        assert significance(np.array([[0, 1]]), single) == pytest.approx([0, 0.25, 0.75, 1, 2 / 3])
        pixel = np.zeros((1, 4, 4), dtype=bool)
        pixel[0, 1, 2] = True
        assert significance(np.array([[0.0, 1.0], [2.0, 3.0]]), pixel) == pytest.approx([0.75 + 2 * 0.25])

    def test_of_a_finer_map_weighs_all_of_it(self) -> None:
        """Four columns (0, 0, 8, 8) for two pixels: a triangle over three columns, 3 + 3 + 1 parts of seven."""
        found = significance(np.array([[0.0, 0.0, 8.0, 8.0]] * 4), masks([[1, 0], [1, 0]], [[0, 1], [0, 1]]))
        assert found == pytest.approx([8 / 7, 48 / 7])

    def test_lies_as_the_picture_does(self) -> None:
        """Rows are rows: a map that is high at the bottom, masks of a wide picture."""
        wide = np.zeros((2, 2, 6), dtype=bool)
        wide[0, 0], wide[1, 1] = True, True
        top, bottom = significance(np.array([[1.0], [5.0]]), wide)
        assert (top, bottom) == (1, 5)

    @pytest.mark.parametrize(
        ("attention", "mask", "message"),
        [
            (np.zeros(4), np.ones((1, 2, 2), bool), "attention of shape (4,) must be a map (h, w) of finite numbers"),
            (np.zeros((0, 2)), np.ones((1, 2, 2), bool), "attention of shape (0, 2) must be a map"),
            (np.array([[np.nan]]), np.ones((1, 2, 2), bool), "attention of shape (1, 1) must be a map"),
            (np.zeros((2, 2)), np.ones((2, 2), bool), "masks of shape (2, 2), bool must be bool (n, H, W), none of"),
            (np.zeros((2, 2)), np.ones((1, 2, 2)), "masks of shape (1, 2, 2), float64 must be bool (n, H, W)"),
            (np.zeros((2, 2)), masks([[1]], [[0]]), "masks of shape (2, 1, 1), bool must be bool (n, H, W), none of"),
        ],
    )
    def test_refuses(self, attention: np.ndarray, mask: np.ndarray, message: str) -> None:
        with pytest.raises(UserError) as refusal:
            significance(attention, mask)
        assert str(refusal.value).startswith(message)


def halves(*kinds: tuple[Kind, ...], id: str = "p", caption: str | None = None) -> Picture:
    """A black picture whose objects are upright stripes, one for each tuple of kinds."""
    stripes = []
    for index, each in enumerate(kinds):
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask[:, index * WIDTH // len(kinds) : (index + 1) * WIDTH // len(kinds)] = True
        stripes.append(Object(f"stripe {index}", mask, each))
    return Picture(id, Image.new("RGB", (WIDTH, HEIGHT)), tuple(stripes), caption)


def paint(picture: Picture, chosen: int, kind: Kind, rng: np.random.Generator) -> Edited | None:
    edited = picture.image.copy()
    edited.paste((200, 10 * chosen, 0), mask=Image.fromarray(picture.objects[chosen].mask))
    return Edited(edited)


def tell(picture: Picture, chosen: int, kind: Kind, edited: Edited) -> str:
    return f"{kind}: {picture.objects[chosen].name} is red now."


def rising(images: Sequence[Image.Image]) -> np.ndarray:
    """Attention that grows to the right."""
    return np.tile(np.arange(6.0), (len(images), 2, 1))


class TestPipeline:
    def test_edits_the_most_ignored_first_and_each_once(self, tmp_path: Path) -> None:
        pictures = [halves(KINDS, KINDS, KINDS, id=f"p{n}") for n in range(5)]
        pairs = read_pairs(make_pairs(tmp_path, pictures, paint, tell, attend=rising))
        assert [pair.id for pair in pairs] == [f"p{n}-{k}" for n in range(5) for k in range(2)]
        assert [pair.object for pair in pairs] == ["stripe 0", "stripe 1"] * 5
        assert [pair.significance for pair in pairs] == pytest.approx([0.5625, 2.5] * 5)
        for pair in pairs:
            loaded = pair.load()
            difference = (np.asarray(loaded.image) != np.asarray(loaded.edited)).any(axis=-1)
            assert (difference == loaded.mask).all()
            assert pair.difference == f"{pair.kind}: {pair.object} is red now."

    def test_refuses_maps_of_other_pictures(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="attend gave 2 maps of 1 pictures; must give one of each"):
            make_pairs(tmp_path, [halves()], paint, tell, attend=lambda images: np.ones((2, 2, 2)))
        assert not (tmp_path / "pairs.json").exists()

    def test_gives_each_picture_its_own_map(self, tmp_path: Path) -> None:
        seen: list[int] = []

        def attend(images: Sequence[Image.Image]) -> np.ndarray:
            start = sum(seen)
            seen.append(len(images))
            return np.stack([np.roll(np.arange(3.0)[None], start + n, axis=1) for n in range(len(images))])

        pictures = (halves(KINDS, KINDS, KINDS, id=str(n)) for n in range(7))
        pairs = read_pairs(make_pairs(tmp_path, pictures, paint, tell, attend=attend, edits=1, batch_size=3))
        assert seen == [3, 3, 1]
        assert [pair.object for pair in pairs] == [f"stripe {n % 3}" for n in range(7)]

    def test_without_attention_chooses_by_chance(self, tmp_path: Path) -> None:
        pictures = [halves(KINDS, KINDS, KINDS, id=str(n)) for n in range(90)]
        pairs = read_pairs(make_pairs(tmp_path, pictures, paint, tell, edits=1))
        assert {pair.significance for pair in pairs} == {None} == {pair.attention for pair in pairs}
        chosen = Counter(pair.object for pair in pairs)
        assert len(chosen) == 3 and min(chosen.values()) > 18

    def test_makes_only_what_an_object_admits(self, tmp_path: Path) -> None:
        """The background is the most ignored, and only added on; of the rest all kinds come as often."""
        pictures = [halves(("add",), KINDS[:3], KINDS[:3], id=str(n)) for n in range(200)]
        pairs = read_pairs(make_pairs(tmp_path, pictures, paint, tell, attend=rising, edits=1))
        assert all((pair.kind == "add") == (pair.object == "stripe 0") for pair in pairs)
        assert {pair.object for pair in pairs} == {"stripe 0", "stripe 1"}
        kinds = Counter(pair.kind for pair in pairs)
        assert set(kinds) == set(KINDS) and min(kinds.values()) > 32

    def test_tries_the_next_object_where_an_edit_fails(self) -> None:
        tried: list[tuple[int, str]] = []

        def picky(picture: Picture, chosen: int, kind: Kind, rng: np.random.Generator) -> Edited | None:
            tried.append((chosen, kind))
            return paint(picture, chosen, kind, rng) if (chosen, kind) == (2, "delete") else None

        picture = halves(("delete",), ("delete",), ("delete",))
        found = list(make_edits(picture, [1, 0, 2], picky, 2, np.random.default_rng(0)))
        assert [(chosen, kind) for chosen, kind, _ in found] == [(2, "delete")]
        assert tried == [(1, "delete"), (0, "delete"), (2, "delete"), (1, "delete"), (0, "delete")]

    def test_what_a_picture_gets_depends_on_seed_and_place_alone(self, tmp_path: Path) -> None:
        pictures = [halves(KINDS, KINDS, KINDS, id=str(n)) for n in range(12)]
        runs = {"a": (12, 0, 64), "b": (12, 0, 5), "short": (6, 0, 64), "other": (12, 1, 64)}
        made = {
            name: read_pairs(make_pairs(tmp_path / name, pictures[:n], paint, tell, seed=seed, batch_size=size))
            for name, (n, seed, size) in runs.items()
        }
        told = {name: [pair.told for pair in pairs] for name, pairs in made.items()}
        assert told["a"] == told["b"] != told["other"]
        assert told["short"] == told["a"][:12]

    def test_passes_over_a_picture_without_objects(self, tmp_path: Path) -> None:
        pairs = read_pairs(make_pairs(tmp_path, [halves(), halves(KINDS, id="q")], paint, tell, attend=rising))
        assert [pair.id for pair in pairs] == ["q-0"]


def pair(id: str = "a", **changes: Any) -> Pair:
    rng = np.random.default_rng(1)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[2:5, 3:9] = True
    pictures = [Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(2)]
    fields: dict[str, Any] = {
        "kind": "swap", "object": "Käse", "difference": "Now it is cheese.", "image": pictures[0],
        "edited": pictures[1], "mask": mask,
    }  # fmt: skip
    return Pair(id=id, **fields | changes)


class TestFolder:
    def test_gives_back_what_was_written(self, tmp_path: Path) -> None:
        attention = np.array([[0.0, 51.0], [102.0, 255.0]])
        full = pair("../b c", caption="A dog.", significance=0.25, attention=attention)
        found = [each.load() for each in read_pairs(write_pairs(tmp_path, [pair("a"), full]))]
        for written, read in zip([pair("a"), full], found, strict=True):
            assert read.told == written.told
            for name in ("image", "edited", "mask"):
                assert (np.asarray(getattr(read, name)) == np.asarray(getattr(written, name))).all()
        assert found[0].attention is None and found[1].attention == pytest.approx(attention / 255)
        assert {file.suffix for file in tmp_path.iterdir()} == {"", ".json"}

    def test_keeps_an_original_once(self, tmp_path: Path) -> None:
        first, other = pair("a"), pair("b")
        again = pair("c", image=first.image)
        a, c, b = read_pairs(write_pairs(tmp_path, [first, again, other]))
        assert a.image == c.image != b.image
        assert len(list((tmp_path / "images").iterdir())) == 2 + 3 * 2

    def test_keeps_the_pairs_that_are_there(self, tmp_path: Path) -> None:
        write_pairs(tmp_path, [pair()])
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        with pytest.raises(UserError, match=r"pairs\.json exists; name another folder, or remove it first"):
            write_pairs(tmp_path, [pair("other")])
        with pytest.raises(UserError, match=r"output is .*pairs\.json, the pairs themselves; must be another file"):
            to_llava(tmp_path / "pairs.json", tmp_path / "images" / ".." / "pairs.json", captions_per_pair=0)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            (lambda: [pair(), pair()], 'pair "a" stands twice; ids must differ'),
            (lambda: [pair(difference=" ")], 'pair "a": `difference` is " "; must be text'),
            (lambda: [pair(caption="<image>")], "`caption` has an <image> marker; must be words alone"),
            (lambda: [pair(kind="paint")], '`kind` is "paint"; must be an edit such as'),
            (lambda: [pair(mask=np.zeros((8, 12), bool))], "`mask` is bool, nowhere True; must be bool"),
            (lambda: [pair(mask=np.ones((8, 12), np.uint8))], "`mask` is uint8, somewhere True; must be bool"),
            (list, "there is no pair for "),
        ],
    )
    def test_writes_nothing_that_it_would_not_read(self, pairs: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            write_pairs(tmp_path, pairs())
        assert not (tmp_path / "pairs.json").exists()

    def test_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        path = write_pairs(tmp_path, [pair()])
        with pytest.raises(UserError, match=r"folder .*pairs\.json cannot be written: "):
            write_pairs(path, [pair()])
        with pytest.raises(UserError, match=r"nowhere.out\.json cannot be written: No such file"):
            to_llava(path, tmp_path / "nowhere" / "out.json", captions_per_pair=0)

    @pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "F"])
    def test_pictures_of_any_mode_become_rgb(self, mode: str, tmp_path: Path) -> None:
        pictures = {name: Image.new(mode, (12, 8)) for name in ("image", "edited")}
        (found,) = read_pairs(write_pairs(tmp_path, [pair(significance=np.float64(0.5), **pictures)]))
        black = rgb(pictures["image"])
        assert found.load().image == found.load().edited == black and found.significance == 0.5

    def test_shows_no_pairs_until_all_are_written(self, tmp_path: Path) -> None:
        def broken() -> Iterator[Pair]:
            yield pair()
            raise OSError("the disk is full")

        with pytest.raises(OSError, match="disk"):
            write_pairs(tmp_path, broken())
        assert not list(tmp_path.glob("*.*"))

    def test_refuses_a_pair_of_two_sizes(self) -> None:
        for name, value in (("edited", Image.new("RGB", (3, 4))), ("mask", np.ones((4, 3), bool))):
            with pytest.raises(UserError) as refusal:
                pair("a", **{name: value})
            assert str(refusal.value) == f'pair "a": `{name}` is of size (3, 4); must be of its image\'s, (12, 8)'


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder as a person might make it: other names, a JPEG, a mask in grey, an id that is a number."""
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    for name in ("dog.jpg", "cat.png"):
        Image.effect_noise((20, 10), 60).convert("RGB").save(folder / name)
    mask = Image.new("L", (20, 10))
    mask.paste(255, (5, 2, 9, 6))
    mask.save(folder / "masks" / "dog.png")
    Image.new("L", (20, 10)).save(folder / "masks" / "black.png")
    Image.new("L", (10, 20), 255).save(folder / "masks" / "turned.png")
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (20, 10)).save(tmp_path / "outside.png")
    return folder


def record(**changes: Any) -> dict[str, Any]:
    """A valid record but for the changes; a change to None leaves the field out."""
    raw = {
        "id": 7, "image": "dog.jpg", "edited": "cat.png", "mask": "masks/dog.png", "kind": "modify", "object": "dog",
        "difference": "The dog is a cat now.", **changes,
    }  # fmt: skip
    return {name: value for name, value in raw.items() if value is not None}


def save(folder: Path, records: Any) -> Path:
    (folder / "pairs.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "pairs.json"


def test_reads_a_folder_made_by_hand(photos: Path) -> None:
    full = record(id="x", caption="A dog.", significance=1, attention="masks/turned.png")
    plain, other = read_pairs(save(photos, [record(), full]))
    assert plain.id == "7" and plain.caption is None and plain.image == (photos / "dog.jpg").resolve()
    found = plain.load()
    assert found.mask.sum() == 16 and found.mask[2:6, 5:9].all()
    assert other.significance == 1 and other.load().attention is not None


MISSING = [
    (record(**{name: None}), f"`{name}` is missing; must be text")
    for name in ("image", "edited", "mask", "kind", "object", "difference")
]
BAD_RECORDS = [
    *MISSING,
    (record(id=None), "`id` is missing; must be a string or an integer"),
    (record(kind="modfy"), '`kind` is "modfy"; must be an edit such as modify'),
    (record(kind="blur"), '`kind` is "blur"; must be an edit such as modify, swap, delete, add'),
    (record(difference="see <image>"), "`difference` has an <image> marker; must be words alone"),
    (record(caption="<image>"), "`caption` has an <image> marker; must be words alone"),
    (record(caption=""), '`caption` is ""; must be text'),
    (record(significance="high"), '`significance` is "high"; must be a number'),
    (record(significance=True), "`significance` is true; must be a number"),
    (record(significance=float("nan")), "`significance` is NaN; must be a number"),
    (record(mask="masks/turned.png"), "`mask` is of size (10, 20); must be of its image's, (20, 10)"),
    (record(edited="masks/turned.png"), "`edited` is of size (10, 20); must be of its image's, (20, 10)"),
    (record(image="none.png"), 'image "none.png" is missing; it must be'),
    (record(edited="none.png"), 'image "none.png" is missing; it must be'),
    (record(mask="none.png"), 'image "none.png" is missing; it must be'),
    (record(attention="none.png"), 'image "none.png" is missing; it must be'),
    (record(image="../outside.png"), 'image "../outside.png" leads to '),
    (record(mask="../outside.png"), 'image "../outside.png" leads to '),
    (record(attention="../outside.png"), 'image "../outside.png" leads to '),
    (record(edited="/outside.png"), 'image "/outside.png" is an absolute path'),
    (record(edited="text.png"), "image {folder}/text.png cannot be read (cannot identify image file"),
    (record(id="fine"), 'id "fine" stands twice; ids must differ'),
]


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS, ids=[message[:40] for _, message in BAD_RECORDS])
def test_a_bad_record_is_refused_by_its_place(photos: Path, bad: Any, message: str) -> None:
    path = save(photos, [record(id="fine"), bad])
    with pytest.raises(UserError) as refusal:
        read_pairs(path)
    message = message.replace("{folder}", str(photos.resolve()))
    found = str(refusal.value)
    assert found.startswith(f"{path}, record 1: {message}") and "\n" not in found


def test_a_file_without_pairs_and_a_mask_without_an_object_are_refused(photos: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.json holds no pair"):
        read_pairs(save(photos, []))
    (black,) = read_pairs(save(photos, [record(mask="masks/black.png")]))
    with pytest.raises(UserError, match=r"black\.png has no white pixel; a mask must be white inside the object"):
        black.load()


class TestLlava:
    def test_is_pairs_then_captions_eight_to_three(self, tmp_path: Path) -> None:
        first = pair("0", caption="one")
        pairs = [first, pair("1", image=first.image, caption="one"), pair("2", caption="two"), pair("3")]
        data = write_pairs(tmp_path, [*pairs, *(pair(f"x{n}") for n in range(2))])
        dataset = LlavaDataset(to_llava(data, tmp_path / "llava.json"), tmp_path)
        records = [dataset.record(index) for index in range(len(dataset))]
        assert [each.id for each in records[:6]] == ["pair-0", "pair-1", "pair-2", "pair-3", "pair-x0", "pair-x1"]
        for each, stored in zip(records[:6], read_pairs(data), strict=True):
            assert each.turns == (f"<image>\n<image>\n{PROMPT}", stored.difference)
            assert each.images == (stored.image, stored.edited)
        captions = [(each.turns, each.images) for each in records[6:]]
        assert len(captions) == 6 * 64 / 24
        stored = {each.id: each.image for each in read_pairs(data)}
        assert Counter(captions) == {
            (("<image>\nDescribe the image.", "one"), (stored["0"],)): 8,
            (("<image>\nDescribe the image.", "two"), (stored["2"],)): 8,
        }

    def test_repeats_all_captions_alike_and_follows_its_seed(self, tmp_path: Path) -> None:
        data = write_pairs(tmp_path, [pair(str(n), caption=f"{n}") for n in range(7)])

        def captions(seed: int, ratio: float = 1.5) -> list[str]:
            path = to_llava(data, tmp_path / "llava.json", captions_per_pair=ratio, seed=seed, caption_prompt="Say.")
            records = json.loads(path.read_text())
            assert {each["conversations"][0]["value"] for each in records[7:]} <= {"<image>\nSay."}
            return [each["conversations"][1]["value"] for each in records[7:]]

        assert captions(0) == captions(0) != captions(1)
        assert len(captions(0)) == 10 and set(Counter(captions(0)).values()) == {1, 2}
        assert captions(0, ratio=0) == []

    def test_refuses_captions_where_there_are_none(self, photos: Path, tmp_path: Path) -> None:
        data = save(photos, [record()])
        with pytest.raises(UserError, match=r"has no caption; must have some, or captions_per_pair must be 0"):
            to_llava(data, tmp_path / "llava.json")
        assert not (tmp_path / "llava.json").exists()
        for ratio in (-1, float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"captions_per_pair is {ratio}; must be 0 or more"):
                to_llava(data, tmp_path / "llava.json", captions_per_pair=ratio)

    def test_goes_with_captions_into_one_batch(self, tmp_path: Path) -> None:
        data = write_scene_pairs(tmp_path, split="train", count=2, seed=0)
        dataset = LlavaDataset(to_llava(data, tmp_path / "llava.json"), tmp_path)
        batch = Collator(AutoProcessor.from_pretrained(ALIGNED))([dataset[0], dataset[len(dataset) - 1]])
        assert batch["pixel_values"].shape[0] == 3

    def test_trains(self, tmp_path: Path) -> None:
        data = write_scene_pairs(tmp_path, split="train", count=3, seed=0)
        to_llava(data, tmp_path / "llava.json")
        words = f"train --model {ALIGNED} --data {tmp_path}/llava.json --images {tmp_path} --output {tmp_path}/run"
        assert main([*f"{words} --no-grouping --max-steps 2 --workers 0 --batch-size 4".split()]) == 0
