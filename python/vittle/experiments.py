"""What a study of several runs needs, whatever it studies: its folder, its machine, and what is more than chance."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import torch

from vittle.data.lines import read_json
from vittle.errors import UserError, shown
from vittle.files import write_json

Test = TypeVar("Test", bound=Hashable)


def same_scale(path: Path, scale: Any) -> None:
    """The runs of a folder are of one scale, a dataclass; seeds, two at least, may be added.

    Raises:
        UserError: there is one seed, the folder's runs are of another scale, or its file is damaged.
    """
    if scale.seeds < 2:
        raise UserError(f"seeds is {scale.seeds}; must be at least 2, for a spread")
    content = {name: value for name, value in asdict(scale).items() if not name.endswith("seeds")}
    if path.exists() and (earlier := read_json(path)) != json.loads(json.dumps(content)):
        raise UserError(f"{path.parent} holds a study of another scale, {shown(earlier)}; name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def slug(name: str) -> str:
    """A name as a folder has it."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split())


def paired_gain(here: Sequence[float], there: Sequence[float]) -> tuple[float, float, float]:
    """The mean gain of runs over those of the same seeds, its deviation, and the p of a paired t-test; nan where all
    gains are one.
    """
    from scipy.stats import ttest_rel

    differences = [one - other for one, other in zip(here, there, strict=True)]
    same = len(set(differences)) == 1
    return mean(differences), stdev(differences), float("nan") if same else float(ttest_rel(here, there).pvalue)


def beyond_chance(ps: Mapping[Test, float], level: float = 0.05) -> set[Test]:
    """The tests that are so together, by Holm's rule."""
    by_p = sorted((math.inf if math.isnan(p) else p, place, test) for place, (test, p) in enumerate(ps.items()))
    sure: set[Test] = set()
    for smaller, (p, _, test) in enumerate(by_p):
        if p >= level / (len(by_p) - smaller):
            break
        sure.add(test)
    return sure


def machine() -> dict[str, str]:
    """What runs were made with."""
    here = Path(__file__).parent
    asked = partial(subprocess.run, capture_output=True, text=True, cwd=here, check=False)
    commit = asked(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or "unknown"
    changed = bool(asked(["git", "status", "--porcelain", "--", str(here)]).stdout.strip())
    models = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "commit": commit + (" with changes" if changed else ""),
        "cpu": f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}",
        "torch": torch.__version__,
    }


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
