"""A language model behind an OpenAI-compatible HTTP endpoint: a judge, a translator."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from vittle.errors import UserError

KEY = "OPENAI_API_KEY"
"""The environment variable that holds the key; it is nowhere printed or written."""

TRIES = 6
"""Of one request; the waits between them double from half a second to 8 seconds, or are what the server asks for."""

FIRST_WAIT = 0.5
"""Seconds."""

_PASSING = (408, 409, 429)
"""Statuses that may be others in a moment, as those from 500 on."""


class Endpoint:
    """Chat completions, greedily; one object may serve many threads.

    Args:
        url: where `/chat/completions` is, such as `http://localhost:8000/v1`.
        model: its name there.
        timeout: seconds that one try may take.
    """

    def __init__(self, url: str, model: str, *, timeout: float = 120) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError("openai is not installed: pip install 'vittle-kernels[judge]'") from error
        self.url, self.model = url, model
        self._key = os.environ.get(KEY, "none")
        self._openai = openai
        self._client = openai.OpenAI(base_url=url, api_key=self._key, timeout=timeout, max_retries=TRIES - 1)
        self._lock = threading.Lock()
        self.retries = 0
        """Over all requests so far."""

    def complete(self, system: str, user: str, *, max_tokens: int = 1024) -> str:
        """What the model answers at temperature 0.

        Raises:
            UserError: the endpoint refuses, cannot be reached, or fails at every try; the message leaves out the key.
        """
        messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        for attempt in range(TRIES):
            response = self._request(messages, max_tokens)
            try:
                return _content(response.parse())
            except (
                self._openai.APIResponseValidationError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
            ) as error:
                nonsense = error
            if attempt < TRIES - 1:
                time.sleep(min(FIRST_WAIT * 2**attempt, 8))
                with self._lock:
                    self.retries += 1
        raise self._failed(f"sent no chat completion in {TRIES} tries", nonsense)

    def _request(self, messages: Any, max_tokens: int) -> Any:
        """One response; openai's client tries again where it is refused or gets no answer."""
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, temperature=0, max_tokens=max_tokens
            )
        except self._openai.APIStatusError as error:
            tries = TRIES if error.status_code in _PASSING or error.status_code >= 500 else 1
            raise self._failed(f"answered {error.status_code} at try {tries}", error) from None
        except self._openai.APITimeoutError as error:
            raise self._failed(f"did not answer in time at try {TRIES}", error) from None
        except self._openai.APIConnectionError as error:
            raise self._failed(f"cannot be reached after {TRIES} tries", error) from None
        with self._lock:
            self.retries += response.retries_taken
        return response

    def _failed(self, what: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200].replace(self._key, "***")
        return UserError(f"endpoint {self.url} {what} ({reason}); what is done is kept: run the same command to go on")


def _content(completion: Any) -> str:
    content = completion.choices[0].message.content
    if not isinstance(content, str):
        raise ValueError(f"its message's content is {content!r}")
    return content
