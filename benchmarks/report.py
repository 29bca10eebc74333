"""What the benchmark says: the machine, a table of 80 columns and a plot."""

from __future__ import annotations

import os
import platform
import subprocess
import textwrap
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vittle_kernels import __version__
from vittle_kernels.backends import native, resolve_backend

MEASURES = {"forward": "forward", "forward_backward": "forward + backward", "kept_bytes": "kept for backward"}
OURS, OTHERS, INK = "#c8553d", "#b8bfcc", "#2b2d42"


@dataclass(frozen=True)
class Timing:
    """One step over all turns; ``speedup`` is eager's median over this one."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    turns: int
    speedup: float | None


@dataclass(frozen=True)
class Row:
    """One contender on one problem; a kernel that failed its check has no timing."""

    dtype: str
    prior: str
    contender: str
    failure: str | None
    kept_bytes: int | None
    forward: Timing | None
    forward_backward: Timing | None


def machine(device: torch.device) -> dict[str, Any]:
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
        "vittle_kernels": __version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return facts


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


def table(results: dict[str, Any]) -> str:
    """Medians with their p20 and p80; no ratio for a kernel that failed."""
    facts = results["machine"]
    unit, scale = _unit(results)
    lines = [
        _title(results),
        f"torch {facts['torch']}, commit {facts['commit']}",
        f"Median [p20 p80] of {results['turns']} turns in {unit}; x: eager's median over this one's.",
    ]
    problem = None
    for row in results["results"]:
        if problem != (problem := (row["dtype"], row["prior"])):
            posterior = _mib(_posterior_bytes(results, row))
            lines += ["", f"{row['dtype']}, {row['prior']} prior; the posterior itself is {posterior}"]
            lines.append(f"{'':<16}{'forward':<27}{'forward + backward':<27}{'kept':>9}")
        if row["failure"]:
            lines.append(textwrap.shorten(f"{row['contender']:<16}FAILED: {row['failure']}", 80, placeholder=" ..."))
            continue
        timings = "".join(_timing(row[step], scale) for step in ("forward", "forward_backward"))
        lines.append(f"{row['contender']:<16}{timings}{_mib(row['kept_bytes']):>9}".rstrip())
    lines += ["", f"backend 'auto' chooses {facts['auto']!r} here"]
    for name, reason in results["not_timed"].items():
        lines.append(textwrap.shorten(f"not timed: {name}, {reason}", 80, placeholder=" ..."))
    return "\n".join(lines)


def _title(results: dict[str, Any]) -> str:
    return f"fused_ib, {results['rows']} x {results['width']}, on {_where(results['machine'])}"


def _where(facts: dict[str, Any]) -> str:
    return facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']}"


def _unit(results: dict[str, Any]) -> tuple[str, float]:
    return ("us", 1e3) if results["machine"]["device"] == "cuda" else ("ms", 1.0)


def _posterior_bytes(results: dict[str, Any], row: dict[str, Any]) -> int:
    return int(results["rows"] * 2 * results["width"] * getattr(torch, row["dtype"]).itemsize)


def _timing(timing: dict[str, Any], scale: float) -> str:
    median, p20, p80 = (_digits(scale * timing[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
    speedup = f"{timing['speedup']:.1f}x" if timing["speedup"] else ""
    return f"{median:>5} {f'[{p20} {p80}]':<13}{speedup:>6}  "


def _digits(value: float) -> str:
    """Three digits in five columns."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 0.1 else f"{value:.3f}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def draw_scaling(results: dict[str, Any], along: dict[str, str], path: Path) -> None:
    """Nanoseconds an element against elements; says so where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    title = f"fused_ib {results['backend']}, fp32, on {_where(results['machine'])}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    for panel, (key, name) in zip(figure.subplots(1, 2, sharey=True), along.items(), strict=True):
        points = [point for point in results["results"] if point["along"] == key]
        elements = [point["elements"] for point in points]
        for step, style in (("forward", "-"), ("forward_backward", "--")):
            for who, colour in (("fused_ib", OURS), ("copy", OTHERS)):
                times = [point["nanoseconds"][f"{who} {step}"] for point in points]
                label = f"{'copy of the bytes of ' if who == 'copy' else ''}{MEASURES[step]}"
                panel.plot(elements, times, style, color=colour, marker="o", markersize=3, label=label)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_title(f"more {name}", loc="left", fontsize=10, color=INK)
        panel.set_xlabel("elements", fontsize=9)
        panel.grid(color="#e6e8ee", linewidth=0.8)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelsize=8.5, colors=INK)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("ns an element", fontsize=9)
    figure.savefig(path, dpi=160)


def draw(results: dict[str, Any], path: Path) -> None:
    """A group of bars for each problem, a panel for each measure; says so where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        print("no plot: matplotlib is not installed")
        return

    problems: dict[str, list[dict[str, Any]]] = {}
    for row in results["results"]:
        if not row["failure"]:
            problems.setdefault(f"{row['dtype']}, {row['prior']} prior", []).append(row)
    lines = sum(map(len, problems.values()))

    figure = Figure(figsize=(12, 1.6 + 0.28 * lines), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(_title(results), x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    note = "the vertical lines: a copy of the bytes that must move; the posterior itself"
    note = f"median of {results['turns']} turns, from p20 to p80; {note}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=INK)
    for panel, measure in zip(figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2)), MEASURES, strict=True):
        _draw_panel(panel, measure, problems, results)
    figure.savefig(path, dpi=160)


def _draw_panel(panel: Any, measure: str, problems: dict[str, list[dict[str, Any]]], results: dict[str, Any]) -> None:
    unit, scale = ("MiB", 2.0**-20) if measure == "kept_bytes" else _unit(results)
    y, names = 0.0, {}
    for problem, (*rows, copy) in problems.items():
        panel.text(0, y, problem, fontsize=9, fontweight="bold", color=INK, va="center")
        floor = _posterior_bytes(results, copy) if measure == "kept_bytes" else copy[measure]["median_ms"]
        panel.vlines(scale * floor, y + 0.5, y + len(rows) + 0.5, color=INK, linewidth=1.2)
        for row in rows:
            y += 1
            names[y] = row["contender"]
            if row[measure] is None:  # the kernel alone keeps nothing
                continue
            low, value, high, label = _bar(row[measure], scale)
            is_ours = row["contender"].startswith(("fused_ib", "kernel"))
            panel.barh(y, value, 0.72, color=OURS if is_ours else OTHERS)
            panel.hlines(y, low, high, color=INK, linewidth=0.8)
            panel.annotate(
                label, (high, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5,
                color=OURS if is_ours else INK, fontweight="bold" if is_ours else "normal",
            )  # fmt: skip
        y += 1.3
    panel.set_title(f"{MEASURES[measure]}, {unit}", loc="left", fontsize=10, color=INK)
    panel.set_yticks(list(names), list(names.values()))
    panel.set_ylim(y - 0.6, -0.7)
    panel.margins(x=0.25)
    panel.set_xlim(left=0)
    panel.tick_params(length=0, labelsize=8.5, colors=INK)
    panel.spines[:].set_visible(False)
    panel.grid(axis="x", color="#e6e8ee", linewidth=0.8)
    panel.set_axisbelow(True)


def _bar(measured: Any, scale: float) -> tuple[float, float, float, str]:
    """From where to where the whisker goes around the bar's end, and what stands beside it."""
    if isinstance(measured, int):
        return scale * measured, scale * measured, scale * measured, f"{scale * measured:.0f}"
    low, value, high = (scale * measured[name] for name in ("p20_ms", "median_ms", "p80_ms"))
    is_compared = measured["speedup"] not in (1, None)
    return low, value, high, _digits(value) + (f"   {measured['speedup']:.1f}x" if is_compared else "")
