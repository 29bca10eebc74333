"""An LLM that scores a model's answer against a reference answer, as LLaVA-Bench does: two numbers on the first line.

A judge favours the answer that it reads first; so each pair is judged in both orders and the scores are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vittle.endpoint import RefusedError

SYSTEM = "You are a careful assistant who rates the quality of answers, fairly and to the point."

PROMPT = """\
An assistant was asked a question about an image. You do not see the image; this is what it shows:

[Image]
{context}

[Question]
{question}

[Answer of Assistant 1]
{first}

[Answer of Assistant 2]
{second}

Rate how helpful, relevant, accurate and detailed each answer is, with an overall score from 1 to 10 each; the higher \
the better. On the first line write two numbers only, the scores of Assistant 1 and of Assistant 2, with a space \
between them. Then explain your scores; the order in which the answers stand must not matter."""

AGAIN = "\n\nBegin with the line of two numbers, such as `7 8`, and nothing else on it."
"""After the prompt, where a reply had no such line: greedily asked the same, a judge replies the same."""

ATTEMPTS = 3
"""That a judge has to give two scores before the question counts as not judged."""

_SCORES = re.compile(r"[^\w+-]*(\d+(?:\.\d+)?)(?:\s*/\s*10)?[\s,;]+(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*")


@dataclass(frozen=True)
class Verdict:
    """The scores of a model's and a reference answer, means of both orders; None where the judge gave none."""

    model: float | None
    reference: float | None
    failures: int = 0
    """Replies without two scores."""
    reply: str = ""
    """Of the judge, reference first; or the last one that could not be read; or why the endpoint turned it down."""


def judge(question: str, context: str, reference: str, answer: str, complete: Callable[[str, str], str]) -> Verdict:
    """The verdict on a model's answer to a question about what the context describes.

    `complete` gives an LLM's reply to a system and a user prompt.
    """
    failures, replies, model, expected = 0, list[str](), 0.0, 0.0
    for is_swapped in (False, True):
        first, second = (answer, reference) if is_swapped else (reference, answer)
        prompt = PROMPT.format(context=context, question=question, first=first, second=second)
        for attempt in range(ATTEMPTS):
            try:
                reply = complete(SYSTEM, prompt + AGAIN * (attempt > 0))
            except RefusedError as error:
                return Verdict(None, None, failures + 1, str(error))
            if scores := parse(reply):
                break
            failures += 1
        else:
            return Verdict(None, None, failures, reply)
        of_reference, of_model = reversed(scores) if is_swapped else scores
        model, expected = model + of_model / 2, expected + of_reference / 2
        replies.append(reply)
    return Verdict(model, expected, failures, replies[0])


def parse(reply: str) -> tuple[float, float] | None:
    """The two scores, each from 1 to 10, that are all of a reply's first line; None: there are none."""
    lines = reply.strip().splitlines()
    match = _SCORES.fullmatch(lines[0].strip()) if lines else None
    scores = (float(match[1]), float(match[2])) if match else None
    return scores if scores and all(1 <= score <= 10 for score in scores) else None
