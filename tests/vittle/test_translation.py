"""Translations of prompts: the file, how it is filled and resumed, and what is sent."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest

from vittle.errors import UserError
from vittle.shifts.protected import protected_spans
from vittle.shifts.translation import Translations, translate

LINES = [
    {"id": 7, "language": "German", "text": "Was ist das?"},
    {"id": "b", "language": "German", "text": "Wo?"},
    {"id": 7, "language": "Korean", "text": "이것은 무엇입니까?"},
]
PROMPTS = {
    "a": "<image>\nWhat is it?\nAnswer the question using a single word or phrase.",
    "b": "Is {image#1} like {image#2}?\n\nA. a cat\nB. a dog\nAnswer with the option's letter.",
    "c": "  Two lines:\nwhere is it?  ",
}


class Model:
    """Answers in capitals, between white space, and remembers what it was sent; it dies after some answers."""

    def __init__(self, lives: int = 100) -> None:
        self.lives = lives
        self.sent: list[str] = []
        self.systems: set[str] = set()

    def __call__(self, system: str, user: str) -> str:
        if len(self.sent) == self.lives:
            raise KeyboardInterrupt
        self.sent.append(user)
        self.systems.add(system)
        return f" {user.upper()}\n"


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vittle.endpoint.AT_ONCE", 1)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_reads_a_file(tmp_path: Path) -> None:
    translations = Translations.read(write(tmp_path / "t.jsonl", *LINES))
    assert translations.languages == ["German", "Korean"]
    assert translations.text(7, "German") == translations.text("7", "German") == "Was ist das?"
    assert translations.text("b", "German") == "Wo?"
    assert translations.text(7, "Korean") == "이것은 무엇입니까?"
    assert translations.has("b", "German") and not translations.has("b", "Korean")


def test_reads_what_editors_write(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b'{"id": 1, "language": "German", "text": "Wo?"}\r\n\r\n{"id": 2, "language": "German", "text": "Wer?"}'
    )
    assert Translations.read(path).text(2, "German") == "Wer?"


@pytest.mark.parametrize(("id", "language"), [("c", "German"), ("b", "Korean"), ("b", "german")])
def test_names_a_missing_pair(id: str, language: str, tmp_path: Path) -> None:
    translations = Translations.read(write(tmp_path / "t.jsonl", *LINES))
    with pytest.raises(UserError, match=rf't\.jsonl has no text for id "{id}" in language "{language}"'):
        translations.text(id, language)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": 1, "language": "../../x", "text": "y"}',
            r': `language` is "\.\./\.\./x"; it must be a name of at most 40 letters, digits and ` -_\(\)\.`',
        ),
        ('{"id": 7, "language"', " is not JSON: .*"),
        ("[1]", r" is \[1\]; must be an object"),
        ('{"language": "German", "text": "x"}', ": `id` is missing; must be a string or an integer"),
        ('{"id": true, "language": "German", "text": "x"}', ": `id` is true; must be a string or an integer"),
        ('{"id": 1, "text": "x"}', ": `language` is missing; must be text"),
        ('{"id": 1, "language": 2, "text": "x"}', ": `language` is 2; must be text"),
        ('{"id": 1, "language": "German"}', ": `text` is missing; must be text"),
        ('{"id": 1, "language": "German", "text": " "}', ': `text` is " "; must be text'),
        (
            '{"id": "7", "language": "German", "text": "x"}',
            ': `id` "7" has `language` "German" a second time; keep one',
        ),
    ],
)
def test_names_the_bad_line_and_field(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *LINES)
    path.write_text(path.read_text("utf-8") + line + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"t\.jsonl, line 4{message}") as caught:
        Translations.read(path)
    assert "\n" not in str(caught.value)


def test_refuses_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read: No such file"):
        Translations.read(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"id": 1, "language": "German", "text": "schön"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 1 is not UTF-8"):
        Translations.read(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        translate(PROMPTS, "German", Model(), tmp_path)


@pytest.mark.usefixtures("one_by_one")
def test_sends_what_is_not_protected(tmp_path: Path) -> None:
    model = Model()
    translations = translate(PROMPTS, "German", model, tmp_path / "t.jsonl")
    assert model.sent == ["What is it?", "Is", "like", "Two lines:\nwhere is it?"]
    (system,) = model.systems
    assert "translator" in system and "German" in system and "translation alone" in system
    assert {id: translations.text(id, "German") for id in PROMPTS} == {
        "a": "<image>\nWHAT IS IT?\nAnswer the question using a single word or phrase.",
        "b": "IS {image#1} LIKE {image#2}?\n\nA. a cat\nB. a dog\nAnswer with the option's letter.",
        "c": "  TWO LINES:\nWHERE IS IT?  ",
    }


def test_what_is_protected_comes_back(tmp_path: Path) -> None:
    translations = translate(PROMPTS, "Greek", lambda system, user: "Τι;", tmp_path / "t.jsonl")  # noqa: RUF001
    for id, prompt in PROMPTS.items():
        text = translations.text(id, "Greek")
        for start, end in protected_spans(prompt):
            _, found, text = text.partition(prompt[start:end])
            assert found


def test_a_prompt_without_words_is_not_sent(tmp_path: Path) -> None:
    model = Model()
    assert translate({1: "<image>\n?"}, "German", model, tmp_path / "t.jsonl").text(1, "German") == "<image>\n?"
    assert model.sent == []


def test_adds_what_the_file_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *LINES)
    before = path.read_bytes()
    model = Model()
    translations = translate({"b": "Where?", "c": "Who?"}, "German", model, path)
    assert model.sent == ["Who?"]
    assert path.read_bytes() == before + b'{"id": "c", "language": "German", "text": "WHO?"}\n'
    assert translations.text("b", "German") == "Wo?"
    translate({"b": "Where?"}, "Korean", model, path)
    assert model.sent == ["Who?", "Where?"]


@pytest.mark.usefixtures("one_by_one")
def test_each_line_is_written_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    seen = []

    def complete(system: str, user: str) -> str:
        deadline = time.monotonic() + 10
        while path.read_bytes().count(b"\n") < len(seen) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(path.read_bytes().count(b"\n"))
        return "Wo?"

    translate({1: "one", 2: "two", 3: "three"}, "German", complete, path)
    assert seen == [0, 1, 2]


@pytest.mark.usefixtures("one_by_one")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    translate(PROMPTS, "German", Model(), whole)
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        translate(PROMPTS, "German", Model(lives=2), path)  # dies within the second prompt
    assert path.read_bytes() == whole.read_bytes().splitlines(keepends=True)[0]
    model = Model()
    translate(PROMPTS, "German", model, path)
    assert model.sent == ["Is", "like", "Two lines:\nwhere is it?"]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("one_by_one")
def test_a_run_goes_on_from_any_byte(tmp_path: Path) -> None:
    prompts = {1: "Wo?", 2: "schön", 3: "図"}
    whole = translate(prompts, "German", Model(), tmp_path / "whole.jsonl").path.read_bytes()
    path = tmp_path / "t.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        model = Model()
        translate(prompts, "German", model, path)
        assert path.read_bytes() == whole
        # A line that lacks no more than its end of line is not asked for again.
        kept = whole[: size + 1].count(b"\n")
        assert len(model.sent) == 3 - kept


def test_a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "a", "language": "German", "text": "Wo?"}')
    model = Model()
    translations = translate({"a": "Where?", "b": "Who?"}, "German", model, path)
    assert (translations.text("a", "German"), model.sent) == ("Wo?", ["Who?"])


def test_a_bad_last_line_that_is_whole_is_not_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *LINES)
    path.write_bytes(path.read_bytes() + b'{"id": 9, "text": "x"}')
    with pytest.raises(UserError, match=r"line 4: `language` is missing"):
        translate(PROMPTS, "German", Model(), path)
    assert b'{"id": 9, "text": "x"}' in path.read_bytes()


@pytest.mark.parametrize("answer", ["", " \n", None])
def test_refuses_an_empty_answer(answer: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(UserError, match=r'the German text of id "[abc]" is .*; it must be text'):
        translate(PROMPTS, "German", lambda system, user: answer, path)
    assert path.read_bytes() == b""


BAD_NAMES = ["..", ".", "a/b", "a\\b", "German+frost", "a:b", "a\nb", "a\0b", "*", "x" * 41]


@pytest.mark.parametrize("language", BAD_NAMES)
def test_a_language_names_files(language: str, tmp_path: Path) -> None:
    message = "it must be a name of at most 40 letters, digits and ` -_().`"
    path = write(tmp_path / "t.jsonl", {"id": 1, "language": language, "text": "x"})
    with pytest.raises(UserError, match=rf"t\.jsonl, line 1: `language` is .*; {re.escape(message)}$"):
        Translations.read(path)
    model = Model()
    with pytest.raises(UserError, match=rf"^the language is .*; {re.escape(message)}$"):
        translate(PROMPTS, language, model, tmp_path / "new.jsonl")
    assert not model.sent and not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("language", ["Chinese (Simplified)", "pt-BR", "हिन्दी", "Ελληνικά", "St. Lucian_2", "²"])
def test_plain_names_of_languages(language: str, tmp_path: Path) -> None:
    assert translate({1: "Wo?"}, language, Model(), tmp_path / "t.jsonl").languages == [language]


def test_eight_requests_are_under_way(tmp_path: Path) -> None:
    """None is answered until eight have come; each is written as it comes, whatever the order."""
    together, seen = threading.Barrier(8), list[int]()

    def complete(system: str, user: str) -> str:
        together.wait(10)
        if int(user) % 8 == 0:  # the first of each eight waits for the others
            for _ in range(100):
                if (lines := (tmp_path / "t.jsonl").read_bytes().count(b"\n")) >= int(user) + 7:
                    break
                time.sleep(0.05)
            seen.append(lines)
        return f"Nr. {user}"

    prompts = {number: str(number) for number in range(16)}
    translations = translate(prompts, "German", complete, tmp_path / "t.jsonl")
    assert {number: translations.text(number, "German") for number in prompts} == {i: f"Nr. {i}" for i in prompts}
    assert seen == [7, 15]


def test_a_failure_stops_what_has_not_begun_and_keeps_what_ends(tmp_path: Path) -> None:
    sent, path = [], tmp_path / "t.jsonl"

    def complete(system: str, user: str) -> str:
        sent.append(user)
        if user == "3":
            raise UserError("endpoint down")
        time.sleep(0.3)
        return f"Nr. {user}"

    prompts = {str(number): str(number) for number in range(60)}
    with pytest.raises(UserError, match="endpoint down"):
        translate(prompts, "German", complete, path)
    kept = {json.loads(line)["id"] for line in path.read_text().splitlines()}
    assert kept == set(sent) - {"3"} and 7 <= len(kept) < 20
    model = Model()
    translate(prompts, "German", model, path)
    assert set(model.sent) == set(prompts) - kept


def test_a_bar_tells_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    translate({1: "Wo?", 2: "Wer?"}, "A language with a long name, of 40 chars"[:40].replace(",", ""), Model(),
              tmp_path / "t.jsonl")  # fmt: skip
    shown = capsys.readouterr().err
    assert "A language with a long n" in shown and "0/2" in shown
    assert max(map(len, re.split(r"[\r\n]", shown))) <= 80


def test_an_added_marker_is_asked_about_once_more(tmp_path: Path) -> None:
    answers = iter(["<image> Was?", "Was?"])
    path = tmp_path / "t.jsonl"
    translations = translate({"a": "<image>\nWhat?"}, "German", lambda system, user: next(answers), path)
    assert translations.text("a", "German") == "<image>\nWas?"
    with pytest.raises(UserError) as caught:
        translate({"b": "<image>\nWho?"}, "German", lambda system, user: "<image> Wer?", path)
    told = 'the German text of id "b" has 2 <image> marker(s) at both tries; must have 1, as the prompt'
    assert str(caught.value) == told
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize(("prompts", "language", "message"), [
    ({"a": " "}, "German", 'the prompt of id "a" is " "; it must be'),
    ({"a": "x"}, "", 'the language is ""; it must be'),
])  # fmt: skip
def test_refuses_empty_arguments(prompts: dict[str, str], language: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        translate(prompts, language, Model(), tmp_path / "t.jsonl")
