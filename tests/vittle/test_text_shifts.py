"""Text shifts: how much they change, what they leave alone, their determinism and their refusals."""

# ruff: noqa: RUF001 - the questions are in many scripts

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vittle.errors import UserError
from vittle.shifts.confusions import KEYBOARD, OCR
from vittle.shifts.protected import protected_spans
from vittle.shifts.text import SYNONYM_SHIFTS, TEXT_SEVERITIES, TEXT_SHIFTS, text_shift

CHARACTERS = ["keyboard", "ocr", "insert", "substitute", "swap", "delete"]
WORDS = ["rs", "rd", "ip"]

MARKERS = ["<image>", "<image 1>", "<image1>", "{image#1}", "{table#2}", "<ImageHere>", "<|image_pad|>"]
SUFFIXES = [
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
    " Please answer yes or no.",
    "\nPlease answer in English.",
    "\nAnswer with the letter only",
    "\nAnswer with the letter, e.g. A or B.\nDo not explain your answer.",
    "\nA. a red bus\nB. two dogs\nAnswer with the option's letter from the given choices directly.",
    "\nOptions:\n(A) a red bus\n(B) two dogs\n(C) both\nRespond with one letter!",
    "\n(A) a red bus (B) two dogs",
    "\nChoice list:['bus', 'dog']. Your answer is: ",
    "\nGive a short answer.\n<image>",
    "\nAnswer:",
]
QUESTION = "<image>\nWhat is the man  holding in his left hand,\tand what's near him?\nLook carefully: it is small."


def distinct_words(count: int, length: int = 8) -> list[str]:
    """Words of letters that look-alikes and keys have, neighbours in a word never alike."""
    rng = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choice("sbqg" if place % 2 else "ioze") for place in range(length))
        words[word] = None
    return list(words)


def differing(before: Iterable[str], after: Iterable[str]) -> int:
    return sum(one != other for one, other in zip(before, after, strict=True))


def is_within(part: str, whole: str) -> bool:
    """Whether `part` is `whole` with some characters left out."""
    characters = iter(whole)
    return all(character in characters for character in part)


def kept(text: str) -> list[str]:
    return [text[start:end] for start, end in protected_spans(text)]


def test_there_are_nine_and_two() -> None:
    assert list(TEXT_SHIFTS) == CHARACTERS + WORDS
    assert list(SYNONYM_SHIFTS) == ["sr", "ri"]
    assert list(TEXT_SEVERITIES) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("count", [1, 7, 20, 40])
@pytest.mark.parametrize(("kind", "least"), [(kind, 2 if kind == "ocr" else 1) for kind in CHARACTERS])
@pytest.mark.parametrize("length", [5, 8, 50])
def test_characters_change_as_often_as_published(kind: str, least: int, count: int, length: int) -> None:
    words = distinct_words(count, length)
    wanted = min(max(math.ceil(Fraction(3, 10) * length), least), 10)
    for severity in TEXT_SEVERITIES:
        shifted = text_shift(" ".join(words), kind, severity, seed=7).split(" ")
        assert differing(words, shifted) == min(max(math.ceil(Fraction(severity, 20) * count), 1), 10)
        for one, other in zip(words, shifted, strict=True):
            if one == other:
                continue
            if kind == "insert":
                assert len(other) - len(one) == wanted and is_within(one, other)
            elif kind == "delete":
                assert len(one) - len(other) == wanted and is_within(other, one)
            elif kind == "swap":
                assert differing(one, other) == 2 * wanted and Counter(one) == Counter(other)
            else:
                assert differing(one, other) == wanted


def test_ocr_mistakes_at_least_two_characters() -> None:
    assert all(differing("sol", text_shift("sol", "ocr", 1, seed=seed)) == 2 for seed in range(10))


def test_mistakes_are_those_of_the_tables() -> None:
    words = distinct_words(20)
    for kind, table in [("keyboard", KEYBOARD), ("ocr", OCR)]:
        shifted = text_shift(" ".join(words), kind, 7, seed=0).split(" ")
        pairs = [pair for one, other in zip(words, shifted, strict=True) for pair in zip(one, other, strict=True)]
        assert all(one == other or other in table[one] for one, other in pairs)


@pytest.mark.parametrize("table", [KEYBOARD, OCR])
def test_tables_are_symmetric(table: dict[str, str]) -> None:
    for key, values in table.items():
        assert values and key not in values and len(set(values)) == len(values)
        assert all(key in table[value] or key.swapcase() in table[value] for value in values)


def test_keys_touch_as_on_a_keyboard() -> None:
    assert {key: "".join(sorted(KEYBOARD[key])) for key in "qgmP1"} == {
        "q": "12aw", "g": "bfhtvy", "m": "jkn", "P": "0LO", "1": "2q",
    }  # fmt: skip


@pytest.mark.parametrize("kind", CHARACTERS)
def test_short_words_stay(kind: str) -> None:
    assert (text_shift("Is it big or not", kind, 7, seed=0) != "Is it big or not") == (kind == "ocr")


@pytest.mark.parametrize("count", [2, 19, 20, 61])
def test_rs_swaps_as_many_pairs_as_published(count: int) -> None:
    words = distinct_words(count)
    for severity in TEXT_SEVERITIES:
        shifted = text_shift(" ".join(words), "rs", severity, seed=3).split(" ")
        assert differing(words, shifted) == 2 * max(1, Fraction(severity, 20) * count // 1)
        assert Counter(shifted) == Counter(words)


def test_rs_finds_the_words_that_differ() -> None:
    for seed in range(20):
        assert text_shift("no no no, no yes", "rs", 1, seed=seed) != "no no no, no yes"
    assert text_shift("no no no, no", "rs", 7, seed=0) == "no no no, no"


def test_rd_deletes_the_published_share() -> None:
    words = distinct_words(40)
    for severity in TEXT_SEVERITIES:
        left = [text_shift(" ".join(words), "rd", severity, seed=seed).split(" ") for seed in range(150)]
        assert all(is_within(" ".join(some), " ".join(words)) and set(some) < set(words) for some in left)
        # One standard error of the mean is at most 0.25 words; at least one word goes, which 40 words make rare.
        floor = (1 - severity / 20) ** 40
        assert sum(40 - len(some) for some in left) / 150 == pytest.approx(2 * severity + floor, abs=0.8)


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("red bus", {"red", "bus"}),
        ("red,  bus!", {",  bus!", "red, !"}),
        ("red\nbus\n", {"\nbus\n", "red\n\n"}),
        ("one", {"one"}),
        ("(red bus)", {"(red)", "(bus)"}),
        ("red图 bus", {"red图", "图 bus", "red bus", "red", "图", "bus"}),
    ],
)
def test_rd_keeps_a_word_and_takes_one_space(text: str, results: set[str]) -> None:
    assert {text_shift(text, "rd", severity, seed=seed) for seed in range(20) for severity in (1, 7)} == results


def test_rd_leaves_no_space_at_a_line_that_begins_or_ends() -> None:
    text = "one two three four five"
    shifted = {text_shift(text, "rd", 7, seed=seed) for seed in range(100)}
    assert len(shifted) > 10
    assert all(each == " ".join(each.split()) for each in shifted)


def test_ip_inserts_as_many_marks_as_published() -> None:
    words = distinct_words(24)
    marks: Counter[str] = Counter()
    for severity in TEXT_SEVERITIES:
        counts = set()
        for seed in range(150):
            shifted = text_shift(" ".join(words), "ip", severity, seed=seed).split(" ")
            inserted = [each for each in shifted if each not in words]
            assert [each for each in shifted if each in words] == words
            assert not any(one in ".,!?;:" and other in ".,!?;:" for one, other in pairwise(shifted))
            counts.add(len(inserted))
            marks.update(inserted)
        assert counts == set(range(1, 24 * severity // 20 + 2))
    assert set(marks) == set(".,!?;:") and min(marks.values()) > 0.8 * max(marks.values())


@pytest.mark.parametrize("kind", TEXT_SHIFTS)
def test_severity_grows(kind: str) -> None:
    words = distinct_words(28)

    def strength(severity: int) -> int:
        """Words that came, went or moved."""
        shifted = [text_shift(" ".join(words), kind, severity, seed=seed).split(" ") for seed in range(200)]
        if kind == "rs":
            return sum(differing(words, each) for each in shifted)
        return sum(max(len(set(each) - set(words)), abs(len(each) - 28)) for each in shifted)

    strengths = [strength(severity) for severity in (1, 3, 5, 7)]
    assert strengths == sorted(set(strengths))


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_markers_and_suffixes_are_protected(marker: str, suffix: str) -> None:
    text = f"{marker} What is near {marker}, the bus?{suffix}"
    assert text.endswith(kept(text)[-1])
    assert "".join(kept(text)).count(marker) >= 2
    rest = text
    for part in kept(text):
        rest = rest.replace(part, "", 1)
    assert rest.split() == ["What", "is", "near", ",", "the", "bus?"]


@pytest.mark.parametrize(
    "text",
    [
        "Answer me this: what is on the table?",
        "Answer the question using a single word or phrase.",
        "Provide a one-sentence caption for the provided image.",
        "What is it? Give a short description of the dog.",
        "Look at the dog. Answer what it does.",
        "Can you answer in English? Is it true or false?",
        "A. Lincoln, who was he?",
        "A. Lincoln was one.\nC. Darwin was another.",
        "Answer with one word. What is it?",
    ],
)
def test_what_is_the_text_itself_is_not_protected(text: str) -> None:
    assert protected_spans(text) == []
    for kind in TEXT_SHIFTS:
        assert text_shift(text, kind, 4, seed=0) != text


@pytest.mark.parametrize("question", ["Τι είναι αυτό;", "ما هذا؟", "यह क्या है।", "图中有什么？", "이것은 무엇입니까?"])
def test_a_suffix_follows_a_question_in_any_script(question: str) -> None:
    assert kept(f"{question} Please answer in English.") == ["Please answer in English."]


@pytest.mark.parametrize(
    "text",
    [
        "What" + " " * 40_000,
        "(A) " * 10_000,
        "a" + "." * 40_000 + "x",
        "What is it? " + "only " * 40 + "x",
        "<image>" * 10_000,
        " " * 10_000 + "What? " + "Answer yes or no. " * 4_000,
    ],
    ids=["spaces", "options", "stops", "adverbs", "markers", "instructions"],
)
def test_time_is_linear_in_the_text(text: str) -> None:
    start = time.process_time()
    protected_spans(text)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Is it (A) a cat (A) a dog? (B) no\n(A) alone\n(B) alone (A) last",
            ["(A) a cat (A) a dog? (B) no", "(A) alone", "(B) alone (A) last"],
        ),
        ("Which? Choices: x (A) y (B) z", ["Choices: x (A) y (B) z"]),
        ("(A) x Options: y (B) z", ["(A) x Options: y (B) z"]),
        ("What is  Please  answer yes or no", ["Please  answer yes or no"]),
        ("Say please  Please   Answer yes or no", ["Answer yes or no"]),
        ("Who, e.g.. Answer yes or no.", ["Answer yes or no."]),
        ("Who, e.g. Only answer yes or no.", []),
        ("Who? ... Only just kindly answer yes or no", ["Only just kindly answer yes or no"]),
        ("Answer yes or no.\n<image> What is it? Answer yes or no.", ["<image>", "Answer yes or no."]),
    ],
)
def test_what_is_protected_where_stops_and_spaces_repeat(text: str, expected: list[str]) -> None:
    assert kept(text) == expected


def test_an_instruction_before_the_text_is_text() -> None:
    assert kept("Answer yes or no. Please answer in English.") == ["Please answer in English."]
    assert kept("<image>\nAnswer yes or no.") == ["<image>"]


def test_a_suffix_needs_no_full_stop_before_it() -> None:
    assert kept("What is in <image> Please answer in one word") == ["<image>", "Please answer in one word"]
    assert kept("What is it Answer with a single word.") == ["Answer with a single word."]


@pytest.mark.parametrize("kind", TEXT_SHIFTS)
@pytest.mark.parametrize(
    "text", ["", " \n", "<image>", "<image>\n{image#1} <|image_pad|>", "?!", "👩‍💻 ❤️", "A. cat\nB. dog"]
)
def test_without_words_nothing_changes(kind: str, text: str) -> None:
    assert text_shift(text, kind, 7, seed=0) == text


PIECES = [*MARKERS, *" \t\n.?<{_", "What", "colour", "is it", "don't", "图中", "क्यों", "cafe\u0301", "👩‍💻"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join)
draws = {
    "kind": st.sampled_from(list(TEXT_SHIFTS)),
    "severity": st.sampled_from(TEXT_SEVERITIES),
    "seed": st.integers(),
}


@settings(max_examples=400, deadline=None)
@given(before=texts, after=texts, marker=st.sampled_from(MARKERS), suffix=st.sampled_from(SUFFIXES), **draws)
def test_any_text_keeps_what_is_protected(
    before: str, after: str, marker: str, suffix: str, kind: str, severity: int, seed: int
) -> None:
    text = f"Why {before}{marker}{after}{suffix}"
    shifted = text_shift(text, kind, severity, seed=seed)
    assert shifted.endswith(suffix.lstrip(" "))
    markers = "|".join(map(re.escape, MARKERS))
    assert re.findall(markers, shifted) == re.findall(markers, text)
    at = 0
    for part in kept(text):
        at = shifted.index(part, at) + len(part)


@settings(max_examples=400, deadline=None)
@given(text=texts, **draws)
def test_any_text_keeps_what_is_not_changed(text: str, kind: str, severity: int, seed: int) -> None:
    shifted = text_shift(text, kind, severity, seed=seed)
    assert shifted == text_shift(text, kind, severity, seed=seed)
    shifted.encode()
    if kind in ("insert", "ip"):
        assert is_within(text, shifted)
    elif kind in ("delete", "rd"):
        assert is_within(shifted, text)
    elif kind in ("swap", "rs"):
        assert Counter(shifted) == Counter(text)
    if kind not in ("rd", "ip"):
        assert re.findall(r"\s+", shifted) == re.findall(r"\s+", text)
    assert shifted.count("\n") == text.count("\n")


@settings(max_examples=200, deadline=None)
@given(text=texts, **draws)
def test_what_can_change_does(text: str, kind: str, severity: int, seed: int) -> None:
    text = f"Why, {text} twice"
    assert text_shift(text, kind, severity, seed=seed) != text


@pytest.mark.parametrize("kind", ["insert", "substitute", "swap", "delete"])
def test_marks_stay_on_their_letters(kind: str) -> None:
    text = "ve\u0301ge\u0301ta\u0308ri\u0303en क्यों किसकी तस्वीर"
    on_letters = set(re.findall(r"[^\W\d_](?:[\u0300-\u036f\u0900-\u0903\u093a-\u094f])+", text))
    for seed in range(60):
        shifted = text_shift(text, kind, 7, seed=seed)
        assert set(re.findall(r".(?:[\u0300-\u036f\u0900-\u0903\u093a-\u094f])+", shifted)) <= on_letters


@pytest.mark.parametrize("text", ["图中的人在做什么", "이그림에서무엇을볼수있습니까", "привет", "καλημέρα", "مرحبا"])
def test_scripts_without_a_table(text: str) -> None:
    for kind in ("insert", "substitute", "swap", "delete"):
        assert text_shift(text, kind, 1, seed=0) != text
    for kind in ("keyboard", "ocr"):
        assert text_shift(text, kind, 7, seed=0) == text


def test_each_character_of_an_unspaced_script_is_a_word() -> None:
    text = "图中的人在做什么？"
    assert len(text_shift(text, "rd", 1, seed=1)) < len(text)
    assert Counter(text_shift(text, "rs", 7, seed=1)) == Counter(text)
    assert text_shift(text, "rs", 7, seed=1) != text


def test_every_argument_counts() -> None:
    results = [
        text_shift(QUESTION, "substitute", 4, seed=0),
        text_shift(QUESTION, "substitute", 4, seed=-1),
        text_shift(QUESTION, "substitute", 4, seed=2**80),
        text_shift(QUESTION, "substitute", 5, seed=0),
        text_shift(QUESTION, "insert", 4, seed=0),
    ]
    assert len(set(results)) == len(results)


ALL_SHIFTED = """
from vittle.shifts.text import TEXT_SEVERITIES, TEXT_SHIFTS, text_shift
results = [text_shift(question, kind, s, seed=11) for kind in TEXT_SHIFTS for s in TEXT_SEVERITIES]
"""


def all_shifted() -> list[str]:
    scope: dict[str, Any] = {"question": QUESTION}
    exec(ALL_SHIFTED, scope)
    return list(scope["results"])


def test_global_random_state_is_neither_read_nor_changed() -> None:
    random.seed(1)
    state = random.getstate()
    first = all_shifted()
    assert random.getstate() == state
    random.seed(2)
    assert all_shifted() == first


def test_processes_agree() -> None:
    script = f"question = {QUESTION!r}\n{ALL_SHIFTED}\nprint(ascii(results))"
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ascii(all_shifted())


@pytest.mark.parametrize(
    ("text", "kind", "severity", "message"),
    [
        ("x", "keybord", 1, "kind is 'keybord'; it must be a text shift such as keyboard"),
        ("x", "???", 1, "kind is '???'; it must be a text shift such as keyboard, ocr, insert, .*, ip, sr, ri"),
        ("x", "ocr", 0, "severity is 0; it must be an integer from 1 to 7"),
        ("x", "ocr", 8, "severity is 8; it must be an integer from 1 to 7"),
        ("x", "ocr", True, "severity is True; it must be an integer from 1 to 7"),
        ("x", "ocr", 2.0, r"severity is 2\.0; it must be an integer from 1 to 7"),
        ("x", "ocr", "3", "severity is '3'; it must be an integer from 1 to 7"),
        (b"x", "ocr", 1, "text is of type bytes; it must be a string"),
        (None, "ocr", 1, "text is of type NoneType; it must be a string"),
    ],
)
def test_refuses_what_there_is_not(text: str, kind: str, severity: int, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        text_shift(text, kind, severity, seed=0)
    assert "\n" not in str(caught.value)


SYNSETS = {
    "noun": [["picture", "image", "ikon"], ["dog", "domestic_dog", "Canis_familiaris"], ["bus", "motor-coach"], ["is"]],
    "verb": [["hold", "take_hold"]],
    "adj": [["large", "big", "size_9"]],
    "adv": [],
}
WORDNET_TEXT = "<image>\nDog, is the big picture of a dog large?\nAnswer yes or no."


def write_wordnet(folder: Path) -> None:
    """A WordNet database of `SYNSETS`, in the text format of wndb(5WN)."""
    folder.mkdir(parents=True)
    for (part, synsets), letter in zip(SYNSETS.items(), "nvar", strict=True):
        data, places = "  1 a tiny WordNet\n", dict[str, list[int]]()
        for names in synsets:
            for name in names:
                places.setdefault(name.lower(), []).append(len(data))
            listed = " ".join(f"{name} 0" for name in names)
            data += f"{len(data):08d} 00 {letter} {len(names):02x} {listed} 000{' 00' * (part == 'verb')} | a gloss  \n"
        index = "".join(
            f"{name} {letter} {len(at)} 0 {len(at)} 0 {' '.join(f'{offset:08d}' for offset in at)}  \n"
            for name, at in sorted(places.items())
        )
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)
        (folder / f"{part}.exc").write_text("")
    (folder / "index.sense").write_text("")
    (folder / "lexnames").write_text("00\tadj.all\t3\n")


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """NLTK with no corpus; the call gives it the tiny one."""
    nltk = pytest.importorskip("nltk", reason="the kinds on synonyms need NLTK")
    corpus = nltk.corpus.wordnet
    if hasattr(corpus, "_unload"):
        corpus._unload()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    yield lambda: write_wordnet(tmp_path / "corpora" / "wordnet")
    if hasattr(corpus, "_unload"):
        corpus._unload()


def test_sr_replaces_words_by_synonyms(wordnet: Callable[[], None]) -> None:
    wordnet()
    seen = set()
    for seed in range(60):
        shifted = text_shift(WORDNET_TEXT, "sr", 1, seed=seed)
        assert shifted == text_shift(WORDNET_TEXT, "sr", 1, seed=seed)
        seen.add(shifted.removeprefix("<image>\n").removesuffix("\nAnswer yes or no."))
    # Each word wherever it stands, with its capital; no function word, no name with a digit.
    assert seen == {
        "Domestic dog, is the big picture of a domestic dog large?",
        "Canis familiaris, is the big picture of a canis familiaris large?",
        "Dog, is the large picture of a dog large?",
        "Dog, is the big image of a dog large?",
        "Dog, is the big ikon of a dog large?",
        "Dog, is the big picture of a dog big?",
    }


def test_ri_inserts_synonyms(wordnet: Callable[[], None]) -> None:
    wordnet()
    synonyms = {"domestic dog", "canis familiaris", "large", "image", "ikon", "big"}
    seen = set()
    for seed in range(60):
        shifted = text_shift(WORDNET_TEXT, "ri", 1, seed=seed)
        inserted = [each for each in synonyms if WORDNET_TEXT in
                    {shifted[:i] + shifted[i:].removeprefix(f"{each} ") for i in range(len(shifted))}]  # fmt: skip
        assert inserted and shifted.endswith("\nAnswer yes or no.")
        seen |= set(inserted)
    assert seen == synonyms


@pytest.mark.parametrize("kind", SYNONYM_SHIFTS)
def test_synonyms_are_as_many_as_published(kind: str, wordnet: Callable[[], None]) -> None:
    wordnet()
    text = " ".join(["zzz"] * 35 + ["dog", "bus", "hold", "picture", "large"])
    for severity in TEXT_SEVERITIES:
        shifted = text_shift(text, kind, severity, seed=severity)
        if kind == "sr":
            names = r"(domestic dog|canis familiaris|dog) (motor coach|bus) (take hold|hold) (\S+) (\S+)"
            found = re.fullmatch(names, shifted.removeprefix("zzz " * 35))
            assert found and differing(text.split()[35:], found.groups()) == min(2 * severity, 5)
        else:
            names = "image|ikon|domestic dog|canis familiaris|motor coach|take hold|big"
            assert len(re.findall(rf"\b(?:{names})\b", shifted)) == 2 * severity
    assert text_shift("zzz the qqqq", kind, 7, seed=0) == "zzz the qqqq"


REMEDY = "run `pip install nltk` and `python -m nltk.downloader wordnet`"


@pytest.mark.parametrize("kind", SYNONYM_SHIFTS)
def test_synonyms_without_their_corpus(kind: str, wordnet: Callable[[], None]) -> None:
    with pytest.raises(UserError, match=re.escape(REMEDY)) as caught:
        text_shift("the dog", kind, 1, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SYNONYM_SHIFTS)
def test_synonyms_without_nltk(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.delitem(sys.modules, "nltk.corpus", raising=False)
    with pytest.raises(UserError, match=re.escape(REMEDY)):
        text_shift("the dog", kind, 1, seed=0)
