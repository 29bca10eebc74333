"""A language model behind an OpenAI-compatible HTTP endpoint: a judge, a translator."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vittle.errors import UserError

KEY = "OPENAI_API_KEY"
"""The environment variable that holds the key; it is nowhere printed or written."""

TRIES = 8
"""Of one request; the waits between them double from half a second, or are what the server asks for."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds: all waits together outlast a limit of requests a minute."""

AT_ONCE = 8
"""Requests under way."""

_PASSING = (408, 409, 429)
"""Statuses that may be others in a moment, as those from 500 on."""

_REFUSING = (400, 413, 422)
"""Statuses by which an endpoint turns down one text: too long, or against its rules."""

T = TypeVar("T")
R = TypeVar("R")
_END = object()


class RefusedError(UserError):
    """The endpoint turns down this text, not others."""


class Endpoint:
    """Chat completions, greedily; one object may serve many threads.

    Args:
        url: where `/chat/completions` is, such as `http://localhost:8000/v1`.
        model: its name there.
        timeout: seconds that one try may take.

    Raises:
        UserError: openai is not installed, or the key or the URL cannot be one.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 120) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError("openai is not installed: pip install 'vittle-kernels[judge]'") from error
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() and " " not in self._key)):
            raise UserError(f"{KEY} holds a space or a character that is no ASCII; must be the endpoint's key")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url is {url!r}; must be such as http://localhost:8000/v1")
        self.url, self.model = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), model
        self._openai = openai
        self._client = openai.OpenAI(base_url=url, api_key=self._key or "none", timeout=timeout, max_retries=0)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self.retries = 0
        """Over all requests so far."""

    def complete(self, system: str, user: str, *, max_tokens: int = 1024) -> str:
        """What the model answers at temperature 0.

        Raises:
            RefusedError: the endpoint turns this text down.
            UserError: it cannot be reached, or fails at every try, or was stopped; the message leaves out the key.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        for attempt in range(1, TRIES + 1):
            failure: Exception
            if self._stopped.is_set():
                raise UserError(f"endpoint {self.url} is not asked any more")
            try:
                return self._answer(messages, max_tokens)
            except self._openai.APIStatusError as error:
                what, failure = f"answered {error.status_code} at try {attempt}", error
                if error.status_code in _REFUSING:
                    raise RefusedError(self._told(what, error)) from None
                if error.status_code not in _PASSING and error.status_code < 500:
                    break
            except self._openai.APITimeoutError as error:
                what, failure = f"did not answer in time at try {attempt}", error
            except self._openai.APIConnectionError as error:
                what, failure = f"cannot be reached after {attempt} tries", error
            except (self._openai.APIResponseValidationError, _NonsenseError) as error:
                what, failure = f"sent no chat completion in {attempt} tries", error
            if attempt < TRIES:
                self._stopped.wait(_wait(failure, attempt))
                with self._lock:
                    self.retries += 1
        raise UserError(f"{self._told(what, failure)}; what is done is kept: run the same command to go on")

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """:func:`each`, where the work asks this endpoint: no request of it begins either once one has failed."""
        return each(work, items, self._stopped)

    def _answer(self, messages: Any, max_tokens: int) -> str:
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, temperature=0, max_tokens=max_tokens
            )
            message = response.parse().choices[0].message
            content = message.content
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _NonsenseError(str(error)) from error
        if content is None:
            raise RefusedError(self._told("gave no answer", _NonsenseError(message.refusal or "its content is null")))
        if not isinstance(content, str):
            raise _NonsenseError(f"its message's content is {content!r}")
        return content

    def _told(self, what: str, error: Exception) -> str:
        reason = " ".join(str(error).split())
        if self._key:
            reason = reason.replace(self._key, "***")
        return f"endpoint {self.url} {what} ({reason[:200]})"


def each(work: Callable[[T], R], items: Iterable[T], stopped: threading.Event) -> Iterator[tuple[T, R]]:
    """Items and what the work makes of them, several at once, in the order in which they end.

    Where one fails, or nobody waits for the rest, ``stopped`` is set and none begins any more; what ends after a
    failure still comes.

    Raises:
        Exception: of the work that failed first.
    """
    todo, lock = iter(list(items)), threading.Lock()
    ended = SimpleQueue[tuple[T, R | None, BaseException | None] | None]()

    def serve() -> None:
        while not stopped.is_set():
            with lock:
                item = next(todo, _END)
            if item is _END:
                break
            try:
                ended.put((item, work(item), None))  # type: ignore[arg-type]
            except BaseException as error:
                ended.put((item, None, error))  # type: ignore[arg-type]
        ended.put(None)

    for _ in range(AT_ONCE):
        threading.Thread(target=serve, daemon=True).start()  # who interrupts us does not wait for an answer
    serving, failure = AT_ONCE, None
    try:
        while serving:
            if (end := ended.get()) is None:
                serving -= 1
                continue
            item, result, error = end
            if error is None:
                yield item, result  # type: ignore[misc]
            else:
                failure = failure or error
                stopped.set()
    except BaseException:
        stopped.set()
        raise
    if failure is not None:
        raise failure


class _NonsenseError(Exception):
    """What came is no chat completion."""


def _wait(failure: Exception, attempt: int) -> float:
    """Seconds until the next try."""
    headers = getattr(getattr(failure, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return min(max(float(headers[name]) * unit, 0.0), LONGEST_WAIT)
        except (KeyError, ValueError):
            continue
    return min(FIRST_WAIT * 2.0 ** (attempt - 1), LONGEST_WAIT)
