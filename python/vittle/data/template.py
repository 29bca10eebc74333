"""Which characters of a rendered chat are an instruction, a response, or the template's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from vittle.data.llava import Message
from vittle.errors import UserError

# A text's number between private-use characters, which a template neither writes nor trims, and which come
# out escaped where a template prints the list of parts instead of its texts.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")


_REMEDY = "set the processor's chat_template to one that only appends what it is given"


class Kind(IntEnum):
    """What a character or a token of a training text is."""

    TEMPLATE = 0
    INSTRUCTION = 1
    RESPONSE = 2
    IMAGE = 3
    TASK_TEMPLATE = 4


class Span(NamedTuple):
    """Characters [start, end) of a text; the kind is INSTRUCTION or RESPONSE."""

    start: int
    end: int
    kind: Kind


class Rendering(NamedTuple):
    """A conversation as text, with its spans in order; all other characters are the template's."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """The chat template of a processor, or else of its tokenizer, that tells its own text from the turns'.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._source: Any = processor if processor.chat_template else tokenizer
        if not self._source.chat_template:
            raise UserError(f"{type(processor).__name__} has no chat template; set its `chat_template`")
        self._eos: str | None = tokenizer.eos_token
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special, key=len, reverse=True)
        self._end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first))})")

    def render(self, messages: Sequence[Message]) -> Rendering:
        """Render a conversation and find its instructions and responses.

        A response runs from the answer to the end of the special token that the template writes after it.
        Where it writes none, the tokenizer's eos token follows the answer in place of the template's spaces,
        as in LLaVA's own training text: `USER: question ASSISTANT: answer</s>USER: ...`.

        Raises:
            UserError: the template refuses the conversation, rewrites earlier turns when another one follows,
                or leaves out, repeats or alters a text.
        """
        masked, texts = _mask(messages)
        rendered = ""
        numbers: list[int] = []
        pieces: list[tuple[str, Kind]] = []
        for count in range(1, len(masked) + 1):
            before, rendered = rendered, self._apply(masked[:count])
            if not rendered.startswith(before):
                raise UserError(f"the chat template rewrites earlier turns once turn {count} follows; {_REMEDY}")
            head, *rest = _STAND_IN.split(rendered.removeprefix(before))
            pieces.append((head, Kind.TEMPLATE))
            for number, literal in zip(map(int, rest[::2]), rest[1::2], strict=True):
                text, kind = texts[number]
                ending, tail = self._split_ending(literal) if kind == Kind.RESPONSE else ("", literal)
                pieces += [(text + ending, kind), (tail, Kind.TEMPLATE)]
                numbers.append(number)

        if sorted(numbers) != list(range(len(texts))):
            raise UserError(f"the chat template does not write each text of the conversation once; {_REMEDY}")
        if _STAND_IN.sub(lambda match: texts[int(match[1])][0], rendered) != self._apply(messages):
            raise UserError(f"the chat template alters the texts of the conversation; {_REMEDY}")
        return _join(pieces)

    def _apply(self, messages: Sequence[Message]) -> str:
        try:
            return str(self._source.apply_chat_template(list(messages), tokenize=False))
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from error

    def _split_ending(self, literal: str) -> tuple[str, str]:
        """Part what follows an answer into the end of the response and the template's own text."""
        if match := self._end_of_turn.match(literal):
            return match[0], literal[match.end() :]
        if self._eos is None:
            raise UserError("neither the chat template nor the tokenizer has a token that ends an answer")
        return self._eos, literal.lstrip(" ")


def _mask(messages: Sequence[Message]) -> tuple[list[Message], list[tuple[str, Kind]]]:
    """The messages with a stand-in for each text, and the texts with their kinds."""
    masked: list[Message] = []
    texts: list[tuple[str, Kind]] = []
    for message in messages:
        kind = Kind.RESPONSE if message["role"] == "assistant" else Kind.INSTRUCTION
        content = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({**part, "text": f"\ue000{len(texts)}\ue001"})
                texts.append((part["text"], kind))
            else:
                content.append(part)
        masked.append({**message, "content": content})
    return masked, texts


def _join(pieces: Sequence[tuple[str, Kind]]) -> Rendering:
    ends = accumulate(len(text) for text, _ in pieces)
    spans = (Span(end - len(text), end, kind) for (text, kind), end in zip(pieces, ends, strict=True))
    return Rendering("".join(text for text, _ in pieces), tuple(s for s in spans if s.kind != Kind.TEMPLATE))
