"""What the benchmarks say: tables of 80 columns and plots."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from records import Entry, Results, where

STEPS = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward", "optimizer": "AdamW"}
MEMORY = {"kept_bytes": "kept", "peak_bytes": "peak"}
FLOORS = ("kernel alone", "copy")
"""Not implementations, but what stands beneath one: they are not compared with eager."""

OURS, OTHERS, INK = "#c8553d", "#b8bfcc", "#2b2d42"

Problem = tuple[tuple[str, Any], ...]
Contenders = dict[str, dict[str, Entry]]
"""By contender, then by step; a failed one has the step "failure" only."""


def by_problem(entries: Iterable[Entry]) -> dict[Problem, Contenders]:
    """Timed and failed entries, in the order in which they come."""
    problems: dict[Problem, Contenders] = {}
    for each in entries:
        params = dict(each["params"])
        contender, step = params.pop("contender"), params.pop("step", "failure")
        problems.setdefault(tuple(params.items()), {}).setdefault(contender, {})[step] = each
    return problems


def speedup(contenders: Contenders, contender: str, step: str, baseline: str = "eager") -> float | None:
    """The baseline's median over this one's."""
    if contender in FLOORS or step not in contenders.get(baseline, {}):
        return None
    return median(contenders[baseline][step]) / median(contenders[contender][step])


def median(timed: Entry) -> float:
    """Seconds."""
    return timed["stats"]["median"]


def table(
    results: Results,
    title: str,
    steps: Sequence[str] = ("forward", "forward_backward"),
    memory: str = "kept_bytes",
    baseline: str = "eager",
) -> str:
    """Medians with their quartiles; no ratio for a kernel that failed."""
    facts = results.content["machine_info"]
    unit, scale = _unit(results.benchmarks)
    lines = [
        *textwrap.wrap(f"{title} on {where(facts)}", 80),
        f"torch {facts['torch']}, commit {facts['commit']}",
        f"Median [quartiles] in {unit}; x: {baseline}'s median over this one's.",
    ]
    for problem, contenders in by_problem((*results.failures, *results.benchmarks)).items():
        lines += ["", describe(problem)]
        lines.append(f"{'':<16}" + "".join(f"{STEPS[step]:<27}" for step in steps) + f"{MEMORY[memory]:>9}")
        for name, timed in contenders.items():
            if "failure" in timed:
                failure = f"{name:<16}FAILED: {timed['failure']['failure']}"
                lines.append(textwrap.shorten(failure, 80, placeholder=" ..."))
                continue
            columns = "".join(_timing(timed[step], speedup(contenders, name, step, baseline), scale) for step in steps)
            size = max((timed[step]["extra_info"].get(memory, 0) for step in steps), default=0)
            lines.append(f"{name:<16}{columns}{_mib(size) if size else '':>9}".rstrip())
    lines += ["", f"backend 'auto' chooses {facts['auto']!r} here"]
    for name, reason in results.content["not_timed"].items():
        lines.append(textwrap.shorten(f"not timed: {name}, {reason}", 80, placeholder=" ..."))
    return "\n".join(lines)


def describe(problem: Problem) -> str:
    """A problem's own line."""
    params = dict(problem)
    words = [params[name] for name in ("tuning", "dtype") if name in params]
    words.append(f"{params['rows']} x {params['width']}")
    if "layers" in params:
        words.append(f"{params['layers']} layers")
    if "prior" in params:
        words.append(f"{params['prior']} prior")
    if params["benchmark"] == "op":
        words[-1] += f"; the posterior itself is {_mib(_posterior_bytes(problem))}"
    return ", ".join(words)


def _unit(entries: Sequence[Entry]) -> tuple[str, float]:
    """Microseconds where the fastest takes less than a millisecond."""
    fastest = min((median(each) for each in entries), default=1.0)
    return ("us", 1e6) if fastest < 1e-4 else ("ms", 1e3)


def _posterior_bytes(problem: Problem) -> int:
    params = dict(problem)
    return int(params["rows"] * 2 * params["width"] * getattr(torch, params["dtype"]).itemsize)


def _timing(timed: Entry, ratio: float | None, scale: float) -> str:
    q1, middle, q3 = (_digits(scale * timed["stats"][name]) for name in ("q1", "median", "q3"))
    return f"{middle:>5} {f'[{q1} {q3}]':<13}{f'{ratio:.1f}x' if ratio else '':>6}  "


def _digits(value: float) -> str:
    """Three digits in five columns."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}" if value >= 0.1 else f"{value:.3f}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def draw(results: Results, title: str, path: Path) -> None:
    """A group of bars for each problem, a panel for each measure; says so where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        print("no plot: matplotlib is not installed")
        return

    problems = by_problem(results.benchmarks)
    lines = sum(map(len, problems.values()))

    figure = Figure(figsize=(12, 1.6 + 0.28 * lines), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    heading = f"{title} on {where(results.content['machine_info'])}"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    note = "the vertical lines: a copy of the bytes that must move; the posterior itself"
    note = f"medians, from quartile to quartile; {note}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=INK)
    measures = ("forward", "forward_backward", "kept_bytes")
    for panel, measure in zip(figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2)), measures, strict=True):
        _draw_panel(panel, measure, problems, _unit(results.benchmarks))
    figure.savefig(path, dpi=160)


def _draw_panel(panel: Any, measure: str, problems: dict[Problem, Contenders], timed_in: tuple[str, float]) -> None:
    unit, scale = ("MiB", 2.0**-20) if measure == "kept_bytes" else timed_in
    title = "kept for backward" if measure == "kept_bytes" else STEPS[measure]
    y, names = 0.0, {}
    for problem, contenders in problems.items():
        panel.text(0, y, describe(problem).partition(";")[0], fontsize=9, fontweight="bold", color=INK, va="center")
        above = {name: timed for name, timed in contenders.items() if name != "copy"}
        floor = _posterior_bytes(problem) if measure == "kept_bytes" else median(contenders["copy"][measure])
        panel.vlines(scale * floor, y + 0.5, y + len(above) + 0.5, color=INK, linewidth=1.2)
        for name, timed in above.items():
            y += 1
            names[y] = name
            if measure == "kept_bytes":
                if (kept := timed["forward"]["extra_info"].get(measure)) is None:  # the kernel alone keeps nothing
                    continue
                low = value = high = scale * kept
                label = f"{value:.0f}"
            else:
                low, value, high = (scale * timed[measure]["stats"][each] for each in ("q1", "median", "q3"))
                ratio = speedup(contenders, name, measure)
                label = _digits(value) + (f"   {ratio:.1f}x" if ratio and name != "eager" else "")
            is_ours = name.startswith(("fused_ib", "kernel"))
            panel.barh(y, value, 0.72, color=OURS if is_ours else OTHERS)
            panel.hlines(y, low, high, color=INK, linewidth=0.8)
            panel.annotate(
                label, (high, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5,
                color=OURS if is_ours else INK, fontweight="bold" if is_ours else "normal",
            )  # fmt: skip
        y += 1.3
    panel.set_title(f"{title}, {unit}", loc="left", fontsize=10, color=INK)
    panel.set_yticks(list(names), list(names.values()))
    panel.set_ylim(y - 0.6, -0.7)
    panel.margins(x=0.25)
    panel.set_xlim(left=0)
    panel.tick_params(length=0, labelsize=8.5, colors=INK)
    panel.spines[:].set_visible(False)
    panel.grid(axis="x", color="#e6e8ee", linewidth=0.8)
    panel.set_axisbelow(True)


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
    title = f"fused_ib {results['backend']}, fp32, on {where(results['machine'])}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    for panel, (key, name) in zip(figure.subplots(1, 2, sharey=True), along.items(), strict=True):
        points = [point for point in results["results"] if point["along"] == key]
        elements = [point["elements"] for point in points]
        for step, style in (("forward", "-"), ("forward_backward", "--")):
            for who, colour in (("fused_ib", OURS), ("copy", OTHERS)):
                times = [point["nanoseconds"][f"{who} {step}"] for point in points]
                label = f"{'copy of the bytes of ' if who == 'copy' else ''}{STEPS[step]}"
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
