"""One process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vittle.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(file: IO[Any], what: Path) -> None:
    """Keeps a file, until it is closed or its process ends, from all others who ask for it so.

    Raises:
        UserError: another has it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {what}; let it end first") from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """For as long as one process changes a folder.

    Raises:
        UserError: another changes it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"output {folder} cannot be written: {error.strerror}") from error
    with file:
        lock(file, folder)
        yield
