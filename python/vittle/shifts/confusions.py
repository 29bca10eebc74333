"""Which characters are taken for which: by a finger on a QWERTY keyboard, by an optical character reader."""

from __future__ import annotations

from collections import defaultdict

# Each row with how far it is set in, in keys.
_ROWS = (("1234567890", 0.0), ("qwertyuiop", 0.5), ("asdfghjkl", 0.75), ("zxcvbnm", 1.25))

# Characters that share a printed shape.
_LOOKALIKES = "0oOD OQ 1lIi 2zZ 3E 4A 5sS 6bG 7T 8B 9gq ce ft hn uv vy CG EF MN PR UV VY".split()


def _neighbours() -> dict[str, str]:
    """Every key with those that touch it; a letter keeps its case."""
    places = {key: (y, x + inset) for y, (row, inset) in enumerate(_ROWS) for x, key in enumerate(row)}
    table: dict[str, str] = {}
    for key, (y, x) in places.items():
        near = "".join(k for k, (v, u) in places.items() if k != key and abs(y - v) <= 1 and abs(x - u) <= 1)
        table |= {key.upper(): near.upper(), key: near}  # in this order, for digits
    return table


def _confusions() -> dict[str, str]:
    table: defaultdict[str, str] = defaultdict(str)
    for group in _LOOKALIKES:
        for character in group:
            table[character] += group.replace(character, "")
    return dict(table)


KEYBOARD = _neighbours()
OCR = _confusions()
