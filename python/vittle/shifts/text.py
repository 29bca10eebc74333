"""Text perturbations in seven severities, with the constants of MM_Robustness (Qiu et al., 2024).

The release redraws a word-level result, up to 100 times, until a sentence embedding finds it like the original
(cosine of 0.9). That needs a model to be downloaded and is not done here. Nor are case and punctuation lost, as they
are there: what a shift does not change stays as it is, byte by byte.
"""

from __future__ import annotations

import difflib
import random
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from vittle.errors import UserError
from vittle.shifts.confusions import KEYBOARD, OCR
from vittle.shifts.protected import protected_spans


class Piece(NamedTuple):
    """A word at characters [start, end) of a text, or what takes its place."""

    start: int
    end: int
    text: str


Rng = random.Random
Change = Callable[[list[str], int, Rng], None]  # changes, in place, so many characters of a word
Shift = Callable[[str, int, Rng], list[Piece]]  # of a text at a severity: what takes the place of what

TEXT_SEVERITIES = range(1, 8)

_ALPHABET = string.ascii_letters + string.digits + "!@#$%^&*()_+"
_PUNCTUATION = ".,!?;:"

# Patterns over `_classes`. Without spaces a whole clause is one run, and each character a word.
_RUN = "[wu][wum]*(?:'[wu][wum]*)*"
_WORD = "w[wm]*(?:'w[wm]*)*|um*"
_CHARACTER = ".m*"

# Scripts that put no space between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")

# WordNet knows these in no sense or in a wrong one.
_FUNCTION_WORDS = frozenset(
    "a an the this that these those i me my mine we us our you your he him his she her it its they them their "
    "who whom whose which what when where why how and or but nor if then than so as because while although "
    "of in on at by to from with without for into onto over under about between through during before after "
    "is am are was were be been being do does did has have had having can could will would shall should may might "
    "must not no yes there here some any each every both all more most other such only own same too very just".split()
)


def _class(character: str) -> str:
    """One of w (word), u (word of an unspaced script), m (mark on the character before), apostrophe and space."""
    if character.isalnum():
        return "u" if unicodedata.name(character, "").startswith(_UNSPACED) else "w"
    if unicodedata.category(character)[0] == "M" or character in "\u200c\u200d":
        return "m"
    return "'" if character in "'\u2019" else " "


def _classes(text: str) -> str:
    return "".join(map(_class, text))


def _pieces(text: str, pattern: str) -> list[Piece]:
    """What of `text` may change and has classes that match."""
    classes = _classes(text)
    for start, end in protected_spans(text):
        classes = classes[:start] + " " * (end - start) + classes[end:]
    return [Piece(*match.span(), text[slice(*match.span())]) for match in re.finditer(pattern, classes)]


def _count(numerator: int, denominator: int, least: int) -> int:
    """The quotient, rounded up, from `least` to 10: nlpaug's number of words or characters to change."""
    return min(max(-(-numerator // denominator), least), 10)


def _change_characters(
    text: str, severity: int, rng: Rng, *, change: Change, word_min: int = 4, change_min: int = 1
) -> list[Piece]:
    """Changes 3 in 10 characters of `severity` in 20 words; words shorter than `word_min` stay."""
    runs = _pieces(text, _RUN)
    count = _count(severity * len(runs), 20, 1)
    changed: list[Piece] = []
    for run in rng.sample(runs, len(runs)):
        characters = [run.text[slice(*match.span())] for match in re.finditer(_CHARACTER, _classes(run.text))]
        if len(changed) < count and len(characters) >= word_min:
            change(characters, _count(3 * len(characters), 10, change_min), rng)
            if (new := "".join(characters)) != run.text:
                changed.append(run._replace(text=new))
    return changed


def _mistake(characters: list[str], count: int, rng: Rng, *, table: Mapping[str, str]) -> None:
    places = [i for i, character in enumerate(characters) if character in table]
    for i in rng.sample(places, min(count, len(places))):
        characters[i] = rng.choice(table[characters[i]])


def _insert(characters: list[str], count: int, rng: Rng) -> None:
    for i in rng.sample(range(len(characters)), count):
        characters[i] = rng.choice(_ALPHABET) + characters[i]


def _substitute(characters: list[str], count: int, rng: Rng) -> None:
    for i in rng.sample(range(len(characters)), count):
        characters[i] = rng.choice(_ALPHABET.replace(characters[i], ""))


def _swap(characters: list[str], count: int, rng: Rng) -> None:
    """Swaps neighbours that differ, none of them twice."""
    places = [i for i, (one, other) in enumerate(pairwise(characters)) if one != other]
    moved = set[int]()
    for i in rng.sample(places, len(places)):
        if len(moved) < 2 * count and moved.isdisjoint((i, i + 1)):
            characters[i : i + 2] = characters[i + 1], characters[i]
            moved |= {i, i + 1}


def _delete(characters: list[str], count: int, rng: Rng) -> None:
    for i in rng.sample(range(len(characters)), count):
        characters[i] = ""


def _share(severity: int, words: list[Piece]) -> int:
    """EDA's number of changes: `severity` in 20 words, rounded down, at least one."""
    return max(1, severity * len(words) // 20)


def _swap_words(text: str, severity: int, rng: Rng) -> list[Piece]:
    """Swaps pairs of words that differ, no word twice; EDA may, and so undo a swap."""
    words = _pieces(text, _WORD)
    count = _share(severity, words)
    rng.shuffle(words)
    swapped: list[Piece] = []
    while words and len(swapped) < 2 * count:
        one = words.pop()
        if other := next((word for word in words if word.text != one.text), None):
            words.remove(other)
            swapped += [one._replace(text=other.text), other._replace(text=one.text)]
    return swapped


def _delete_words(text: str, severity: int, rng: Rng) -> list[Piece]:
    """Deletes each word with a probability of `severity` in 20; one goes at least, and one stays."""
    words = _pieces(text, _WORD)
    if len(words) < 2:
        return []
    gone = [word for word in words if rng.random() < severity / 20] or [rng.choice(words)]
    if len(gone) == len(words):
        gone.remove(rng.choice(gone))
    pieces: list[Piece] = []
    at, left = 0, " "  # of what stays before a word, the end and the last character
    for start, end, _ in gone:
        # The space before goes too, or the one after where none is before and no two words come to touch.
        is_spaced = start > at and text[start - 1] in " \t"
        start -= is_spaced
        left = text[start - 1] if start > at else left
        end += not is_spaced and text[end : end + 1] in (" ", "\t") and _class(left) == " "
        pieces.append(Piece(start, end, ""))
        at = end
    return pieces


def _insert_punctuation(text: str, severity: int, rng: Rng) -> list[Piece]:
    """Inserts a punctuation mark and a space before each of 1 to `severity` in 20 words, plus one."""
    words = _pieces(text, _WORD)
    count = rng.randint(1, severity * len(words) // 20 + 1)
    chosen = rng.sample(words, min(count, len(words)))
    return [Piece(word.start, word.start, f"{rng.choice(_PUNCTUATION)} ") for word in chosen]


def _replace_by_synonyms(text: str, severity: int, rng: Rng) -> list[Piece]:
    """Replaces words, each wherever it stands, by a synonym."""
    words = _pieces(text, _WORD)
    distinct = sorted({word.text.lower() for word in words})
    chosen: dict[str, str] = {}
    for word in rng.sample(distinct, len(distinct)):
        if len(chosen) < _share(severity, words) and (synonyms := _synonyms(word)):
            chosen[word] = rng.choice(synonyms)
    found = ((word, chosen.get(word.text.lower())) for word in words)
    return [word._replace(text=new.capitalize() if word.text[0].isupper() else new) for word, new in found if new]


def _insert_synonyms(text: str, severity: int, rng: Rng) -> list[Piece]:
    """Inserts synonyms of words of the text, each before a word anywhere."""
    words = _pieces(text, _WORD)
    known = [synonyms for word in words if (synonyms := _synonyms(word.text.lower()))]
    count = _share(severity, words) if known else 0
    drawn = [(rng.choice(words).start, rng.choice(rng.choice(known))) for _ in range(count)]
    return [Piece(start, start, f"{synonym} ") for start, synonym in drawn]


def _synonyms(word: str) -> list[str]:
    """WordNet's other names for any sense of a content word, in small letters."""
    try:
        from nltk.corpus import wordnet

        senses = wordnet.synsets(word) if word not in _FUNCTION_WORDS else []
    except (ImportError, LookupError):
        raise UserError(
            "synonyms need NLTK and WordNet; run `pip install nltk` and `python -m nltk.downloader wordnet`"
        ) from None
    names = {re.sub("[_-]", " ", name).lower() for sense in senses for name in sense.lemma_names()}
    return sorted(name for name in names - {word} if re.fullmatch("[a-z ]+", name))


# Those that need nothing but Python: of characters, then of words.
TEXT_SHIFTS: dict[str, Shift] = {
    "keyboard": partial(_change_characters, change=partial(_mistake, table=KEYBOARD)),
    "ocr": partial(_change_characters, change=partial(_mistake, table=OCR), word_min=1, change_min=2),
    "insert": partial(_change_characters, change=_insert),
    "substitute": partial(_change_characters, change=_substitute),
    "swap": partial(_change_characters, change=_swap),
    "delete": partial(_change_characters, change=_delete),
    "rs": _swap_words,
    "rd": _delete_words,
    "ip": _insert_punctuation,
}

# Those that need NLTK and its WordNet too.
SYNONYM_SHIFTS: dict[str, Shift] = {"sr": _replace_by_synonyms, "ri": _insert_synonyms}


def text_shift(text: str, kind: str, severity: int, *, seed: int) -> str:
    """`text` under `kind` of `TEXT_SHIFTS` or `SYNONYM_SHIFTS` at `severity` 1 to 7.

    Image markers, lettered options and the closing instruction on the answer's format stay (`protected_spans`).
    Where the rest has something that the kind can change, the result differs from `text`. It depends on the
    arguments alone.

    Scripts: characters of any script are swapped and deleted; what is inserted or put in place of another is ASCII,
    and `keyboard` and `ocr` know Latin letters and digits only. In a script without spaces, such as Chinese, `rs`, `rd`
    and `ip` take each character for a word.

    Raises:
        UserError: `text` is no string, or there is no such kind or severity, or NLTK or WordNet is missing.
    """
    if not isinstance(text, str):
        raise UserError(f"text is of type {type(text).__name__}; it must be a string")
    shifts = TEXT_SHIFTS | SYNONYM_SHIFTS
    if kind not in shifts:
        near = difflib.get_close_matches(str(kind), shifts) or shifts
        raise UserError(f"kind is {kind!r}; it must be a text shift such as {', '.join(near)}")
    if type(severity) is not int or severity not in TEXT_SEVERITIES:
        raise UserError(f"severity is {severity!r}; it must be an integer from 1 to 7")
    rng = random.Random(f"{seed} {kind} {severity} {text}".encode("utf-8", "surrogatepass"))
    return _edited(text, shifts[kind](text, severity, rng))


def _edited(text: str, pieces: Iterable[Piece]) -> str:
    result, at = "", 0
    for start, end, new in sorted(pieces, key=lambda piece: piece.start):
        result += text[at:start] + new
        at = end
    return result + text[at:]
