"""The one exception that is meant for people rather than for a traceback."""

from __future__ import annotations

import json


class UserError(ValueError):
    """Something the user gave cannot be used; the message, one line, says what it is and what it must be.

    A DataLoader worker's error reaches the main process as a whole traceback that ends in the message; only
    the message is kept.
    """

    def __init__(self, message: str) -> None:
        label = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(" ".join(message.rpartition(label)[2].strip().splitlines()))


def shown(value: object) -> str:
    """A JSON value as a message shows it: short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def must_be_at_least(**values: tuple[int, int]) -> None:
    """Refuses arguments, (value, least) by their names, that are no integers or too small."""
    for name, (value, least) in values.items():
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r}; must be an integer of at least {least}")
