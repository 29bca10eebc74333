"""What a model is asked, and how its answers are scored: one file a task."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from vittle.errors import UserError
from vittle.tasks.choice import Choice
from vittle.tasks.exact import DigitScenes, Exact
from vittle.tasks.mme import Mme
from vittle.tasks.open_qa import LlavaBench
from vittle.tasks.pope import Pope
from vittle.tasks.task import Sample, Task


def _demon(data: Path, images: Path) -> Task:
    from vittle.tasks.demon import Demon  # which needs what the other tasks do not

    return Demon(data)


TASKS: Mapping[str, Callable[[Path, Path], Task]] = {
    "pope": Pope,
    "pope-strict": lambda data, images: Pope(data, images, rule="strict"),
    "mme": lambda data, images: Mme(data),
    "choice": Choice,
    "demon": _demon,
    "llava-bench": LlavaBench,
    "exact": Exact,
}
"""The tasks that read files, by the names that ``vittle evaluate --task`` takes; `digits` makes its own."""


def load_task(name: str, data: str | None, images: str | None, scenes: Path) -> Task:
    """The task of that name.

    Args:
        name: of :data:`TASKS`, or `digits`.
        data: the benchmark's file or folder.
        images: folder that image paths start from; None: the data's own.
        scenes: folder for the digit scenes, where the task is those.

    Raises:
        UserError: there is no such task, or its files are not as they must be.
    """
    if name == "digits":
        if data is not None:
            raise UserError(f"data is {data!r}; must be left out for digits, which are made here")
        return DigitScenes(scenes)
    if name not in TASKS:
        near = difflib.get_close_matches(name, [*TASKS, "digits"]) or [*TASKS, "digits"]
        raise UserError(f"task is {name!r}; must be such as {', '.join(near)}")
    if data is None:
        raise UserError(f"task {name} needs --data, its file or folder")
    path = Path(data)
    if not path.exists():
        raise UserError(f"data is {data!r}, which does not exist; must be the file or folder of {name}")
    folder = Path(images) if images is not None else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UserError(f"images is {images!r}; must be the folder that image paths start from")
    return TASKS[name](path, folder)


__all__ = ["TASKS", "Sample", "Task", "load_task"]
