"""What of a prompt no shift may touch: its image markers and what it says of the answer's format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


# `<image>`, `<image 1>`, `<ImageHere>`, `<|image_pad|>` and any other tag; `{image#1}`, `{table#2}`.
_MARKER = re.compile(r"<[^\s<>][^<>\n]{0,40}>|\{\w+#\w+\}")

# A line such as `A. cat`, `(B) dog` or `C: bird`: an option where the text has such lines for A and for B.
_LETTERED = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+\S.*$", re.M)

# The rest of a line from `(A) cat (B) dog` or from `Options:` on; DEMON's `Choice list:` follows a word closely.
_LISTED = re.compile(r"^(?>(.*?)(?<!\S)\(A\) ).*?(?<!\S)\(B\) .*$", re.M)
_ANNOUNCED = re.compile(r"(?:(?<!\S)(?:Options|Choices|Answer choices)|Choice [Ll]ist):.*$", re.M)

# Up to the end of the line, or to a full stop or the like, in any script, before white space; ideographic ones
# need none. A Greek question ends in a semicolon, here before a Latin capital. "e.g." and "i.e." end nothing, and
# a sentence that a capital starts as below needs no end before it. Of a run of stops or of white space only the first
# two places are tried: the first may be in "e.g." or after "Please", and no other can match where these do not.
_SENTENCE = re.compile(
    r"\S.*?(?:(?<![ (]e\.g)(?<![ (]i\.e)(?<![.!?\u061f\u0964\u037e\u2026]{2})[.!?\u061f\u0964\u037e\u2026]+"
    r"[\"'\u201d\u2019)\]]*(?=\s|$)|;(?=\s+[A-Z])|[\u3002\uff01\uff1f]+"
    r"|(?<!Please)(?<!\s\s)(?=\s+(?:Please|Answer|Respond|Reply)\s)|$)",
    re.M,
)
_QUESTION = re.compile(r"[?\u061f\u037e\uff1f]")

_ASKING = r"^\W*(?:(?:please|just|\w+ly)[ ,]+)*"
_FORM = (
    r"(?:\b(?:yes|true)\b\W*(?:or|and|/)\W*(?:no|false)\b"
    r"|\b(?:\d+|single|one|two|three|few|fewer|short|brief|full|complete)[ -](?:word|phrase|sentence|answer|response)"
    r"|\b(?:letter|option|choice|number|integer|digit|decimal|json|format|language)s?\b"
    r"|\b(?:directly|briefly|concisely)\b|\b(?:only|alone)\W*$|\bin [^\W\d_]+\W*$)"
)
_FORMAT = re.compile(
    "|".join(
        [
            # Please answer yes or no. Answer the question using a single word or phrase. Please answer in English.
            rf"{_ASKING}(?:answer|respond|reply)\b.*{_FORM}",
            # Give a short answer. Choose the letter of the correct option. Your answer must be a number.
            rf"{_ASKING}(?:give|provide|write|return|output|state|use|choose|select|pick|keep|limit|your)\b"
            rf"(?=.*\b(?:answer|response|reply|option|choice)s?\b).*{_FORM}",
            # Do not explain your answer.
            rf"{_ASKING}(?:do not|don['\u2019]t)\b.*\b(?:explain|explanations?|reasoning|anything else)\b",
            # Your answer is:
            r"^\W*(?:(?:the|your|short|final) )*answer(?: is)?:\s*$",
        ]
    ),
    re.I,
)


def protected_spans(text: str) -> list[Span]:
    """The spans of `text` that every shift leaves as they are, in order and apart.

    These are image markers, lettered options, and the sentences at the end that only say which form the answer
    must have. Such a sentence asks for an answer and names a form; it is no question, and words stand before it:
    an instruction that starts the text is the text.
    """
    markers = [Span(*match.span()) for match in _MARKER.finditer(text)]
    options = list(_options(text))
    first_word = next((i for i, character in enumerate(_without(text, markers)) if character.isalnum()), len(text))
    prose = _without(text, [*markers, *options])
    suffix = []
    for sentence in reversed(list(_SENTENCE.finditer(prose))):
        if not _has_words(sentence[0]):
            continue
        is_format = _FORMAT.search(sentence[0]) and not _QUESTION.search(sentence[0])
        if not is_format or sentence.start() <= first_word:
            break
        suffix.append(Span(*sentence.span()))
    return _joined([*markers, *options, *suffix])


def _options(text: str) -> Iterator[Span]:
    lettered = list(_LETTERED.finditer(text))
    if {"A", "B"} <= {line[1] for line in lettered}:
        yield from (Span(*line.span()) for line in lettered)
    yield from (Span(line.end(1), line.end()) for line in _LISTED.finditer(text))
    yield from (Span(*match.span()) for match in _ANNOUNCED.finditer(text))


def _has_words(text: str) -> bool:
    return any(map(str.isalnum, text))


def _without(text: str, spans: Iterable[Span]) -> str:
    """`text` with spaces in place of `spans`."""
    characters = list(text)
    for start, end in spans:
        characters[start:end] = " " * (end - start)
    return "".join(characters)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """The same characters in spans that do not touch."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start <= joined[-1].end:
            joined[-1] = Span(joined[-1].start, max(span.end, joined[-1].end))
        else:
            joined.append(span)
    return joined
