"""Measurements as entries of pytest-benchmark's JSON, so that ``pytest-benchmark compare`` reads our files.

A file's "benchmarks" are timed entries, one for a contender's step on a problem; "failures" are contenders that were
wrong and so were not timed. Every entry says on what machine, with what versions and at what commit it was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.stats import Stats

from vittle_kernels import __version__
from vittle_kernels.backends import native, resolve_backend

Entry = dict[str, Any]


def entry(
    problem: Mapping[str, Any], contender: str, step: str, seconds: Sequence[float], facts: Entry, **extra: Any
) -> Entry:
    """A contender's times of one step of a problem; ``extra`` are further measurements, None left out."""
    stats = Stats()
    for each in seconds:
        stats.update(each)
    params = {**problem, "contender": contender, "step": step}
    title = "-".join(str(value) for value in problem.values())
    return {
        "group": f"{title}-{step}",
        "name": f"{contender}[{title}-{step}]",
        "fullname": f"{title}-{step}::{contender}",
        "params": params,
        "param": title,
        "extra_info": {**{name: value for name, value in extra.items() if value is not None}, "machine": facts},
        "options": {},
        "stats": stats.as_dict() | {"iterations": 1},
    }


def failed(problem: Mapping[str, Any], contender: str, failure: str, facts: Entry) -> Entry:
    """A contender that was wrong."""
    return {"params": {**problem, "contender": contender}, "failure": failure, "extra_info": {"machine": facts}}


def parser(description: str, turns: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--turns", type=int, default=turns, help=f"times that each step is timed ({turns})")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder to write to (runs/bench)")
    return options


def one_line(error: Exception) -> str:
    """What went wrong, as an entry's failure."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class Results:
    """A file of measurements, written whole or not at all; a new measurement replaces the old one of its kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"benchmarks": [], "failures": [], "not_timed": {}, "checks": {}}

    @classmethod
    def load(cls, path: Path) -> Results:
        """What the file holds; nothing where there is none."""
        results = cls(path)
        if path.exists():
            try:
                results.content |= json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise SystemExit(f"{path} is damaged ({error}); move it away") from error
        return results

    @property
    def benchmarks(self) -> list[Entry]:
        return self.content["benchmarks"]

    @property
    def failures(self) -> list[Entry]:
        return self.content["failures"]

    def add(self, entries: Iterable[Entry]) -> None:
        """Adds timed and failed entries."""
        for each in entries:
            params = each["params"]
            for kind in ("benchmarks", "failures"):
                self.content[kind] = [old for old in self.content[kind] if not _covers(params, old["params"])]
            self.content["benchmarks" if "stats" in each else "failures"].append(each)

    def has(self, problem: Mapping[str, Any], commit: str | None) -> bool:
        """Whether a problem was measured at a commit, by every contender that is there."""
        return any(
            problem.items() <= each["params"].items() and each["extra_info"]["machine"]["commit"] == commit
            for each in (*self.benchmarks, *self.failures)
        )

    def save(self, facts: Entry) -> None:
        """Writes the file."""
        self.content |= {
            "machine_info": facts,
            "commit_info": {"id": facts["commit"], "project": "vittle-kernels"},
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": version("pytest-benchmark"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.tmp")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def _covers(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether a new measurement is of the same thing as an old one; a failure covers every step."""
    return all(old.get(name, value) == value for name, value in new.items())


def machine(device: torch.device, commit: str | None = None) -> Entry:
    """Hardware, versions and commit: what the numbers are true of."""
    library = native.library()
    facts = {
        "device": device.type,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "auto": resolve_backend("auto", device.type, device.index, False),
        "instruction_set": library.instruction_set() if library else None,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "vittle_kernels": __version__,
        "commit": commit or _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return facts


def where(facts: Entry) -> str:
    """The machine in a few words."""
    return facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with "-dirty" where the tree differs from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
