"""A run's folder: checkpoints that are whole or not there at all, and the settings that they belong to.

A checkpoint is written under a hidden name and gets its own in one step, when all of it is there. A list of its files
and their sizes lies in it, so that one that was cut later, in copying or deleting, is known too.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vittle import ranks
from vittle.errors import UserError, shown
from vittle.files import write_json

RUN_FILE = "vittle_run.json"
"""The run's settings, in its output folder."""

MANIFEST = "vittle_checkpoint.json"
"""In a checkpoint: the run's settings, and its files with their sizes."""

SPLIT = "batch, accumulation, processes"
"""The setting that may differ when a run is resumed, on another number of GPUs."""

PARTIAL = ".partial"
"""In the output folder: what is being written."""

_GONE = ".gone-"
"""Before the name of a checkpoint that is being removed."""

_NAME = re.compile(r"checkpoint-(\d+)")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def begin(output: Path, settings: Mapping[str, Any], resume: bool) -> Path | None:
    """Makes the folder a run's, and says from which checkpoint the run goes on: None, from its beginning.

    Raises:
        UserError: the folder cannot be written; it holds something and is not to be resumed; or what it holds was
            not written by a run with these settings.
    """
    try:
        if output.exists() and not output.is_dir():
            raise UserError(f"output is {output}, a file; must be a folder")
        names = {path.name for path in output.iterdir()} if output.is_dir() else set()
        checkpoint = None
        if resume:
            checkpoint = _continue_from(output, settings)
        elif any(name != RUN_FILE and not name.startswith(".") for name in names):
            raise UserError(
                f"output {output} is not empty; name another folder, or resume the run it holds with --resume"
            )
        output.mkdir(parents=True, exist_ok=True)
        for leftover in (output / PARTIAL, *output.glob(f"{_GONE}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        write_json(output / RUN_FILE, settings)
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}") from error
    return checkpoint


def _continue_from(output: Path, settings: Mapping[str, Any]) -> Path | None:
    if not (output / RUN_FILE).is_file():
        raise UserError(f"output {output} holds no run of vittle train to resume; it has no {RUN_FILE}")
    _must_be_the_same(output / RUN_FILE, _read_json(output / RUN_FILE), settings)
    for checkpoint in reversed(in_order(output)):
        if flaw := _flaw(checkpoint):
            print(f"{checkpoint.name} is passed over: {flaw}")
            continue
        _must_be_the_same(checkpoint, _read_json(checkpoint / MANIFEST)["run"], settings)
        print(f"resuming from {checkpoint.name}")
        return checkpoint
    print(f"{output} holds no whole checkpoint; the run starts again")
    return None


def whole(output: Path) -> list[Path]:
    """The checkpoints that are whole, by their steps."""
    return [checkpoint for checkpoint in in_order(output) if _flaw(checkpoint) is None]


def in_order(output: Path) -> list[Path]:
    """The folders that are named as checkpoints, by their steps."""
    found = [(int(match[1]), path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _flaw(checkpoint: Path) -> str | None:
    """What a checkpoint lacks; None if it is whole."""
    try:
        manifest = _read_json(checkpoint / MANIFEST)
        files = dict(manifest["files"])
        dict(manifest["run"])
    except (UserError, LookupError, TypeError, ValueError):
        return f"it has no readable {MANIFEST}, so it is half-written or another program's"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def _must_be_the_same(where: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    there, here = dict(there), dict(here)
    if (was := there.pop(SPLIT, None)) != (now := here.pop(SPLIT, None)):
        print(f"the batch is split as {now} and was as {was}: the noise will not be the uninterrupted run's")
    differences = [
        f"{name} is {shown(here.get(name))} and was {shown(there.get(name))}"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if differences:
        raise UserError(f"{where} belongs to a run with other settings: {'; '.join(differences)}")


@contextmanager
def writing(output: Path, name: str) -> Iterator[Path]:
    """A hidden folder to write into; if that fails, the first rank removes what was written there.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    partial = output / PARTIAL
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        if ranks.is_first():
            partial.rmdir()
    except Exception as error:
        free = shutil.disk_usage(output).free
        if ranks.is_first():
            shutil.rmtree(partial, ignore_errors=True)
        reason = _reason(error, free)
        if reason is None:
            raise
        before = whole(output)
        kept = f"{before[-1].name} is whole: --resume goes on from it" if before else "no checkpoint was written before"
        raise UserError(f"{name} cannot be written to {output}: {reason}; {kept}") from error


def _reason(error: Exception, free: int) -> str | None:
    """Why writing failed, if for the disk's sake: libraries in Rust and C++ wrap the error that the system gave."""
    full = "No space left" in str(error) or (isinstance(error, OSError) and error.errno in _FULL_DISK)
    if full or (free < 1 << 20 and not isinstance(error, UserError)):
        return f"the disk is too full, {free / 1e6:.1f} MB were left"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return None


def finish(partial: Path, checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """What was written becomes the checkpoint."""
    files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
    write_json(partial / MANIFEST, {"run": settings, "files": files})
    if checkpoint.exists():  # one that was passed over
        _remove(checkpoint)
    partial.rename(checkpoint)


def move_into(folder: Path, output: Path) -> None:
    """Puts each file of a folder into the output, in the place of one that may be there."""
    for path in sorted(folder.iterdir()):
        path.replace(output / path.name)


def keep_newest(output: Path, count: int, best: str | None = None) -> None:
    """Removes whole checkpoints until there are so many: the best, and the newest."""
    checkpoints = whole(output)
    kept = checkpoints[-count:]
    if best is not None and Path(best).resolve() not in [each.resolve() for each in kept]:
        kept = [Path(best), *checkpoints[-max(1, count - 1) :]]
    names = {each.name for each in kept}
    for checkpoint in checkpoints:
        if checkpoint.name not in names:
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """At once, as far as others can see."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{_GONE}{checkpoint.name}")))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    return content
