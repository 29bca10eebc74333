"""The roofline plot of a GPU's results: how near to its memory's rate the kernels come, and what would bound them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bench_fused_ib import MOVED
from records import Results, where
from report import INK, OTHERS, OURS, by_problem, median
from static_cost import GPUS

_MARKS = {"forward": "o", "backward": "s"}
_LOOKS = {
    "fused_ib cuda": {"color": OURS, "linewidth": 2}, "fused_ib triton": {"color": "#e0a458", "linewidth": 2},
    "triton, eps kept": {"color": "#5c7aa8"}, "torch.compile": {"color": "#7d8597"},
    "eager": {"color": OTHERS}, "eager, released": {"color": OTHERS, "linestyle": ":"},
}  # fmt: skip


def gigabytes(problem: dict[str, Any], step: str, seconds: float) -> float:
    """GB/s of the bytes that the fused op must move."""
    elements = problem["rows"] * problem["width"] * getattr(torch, problem["dtype"]).itemsize
    return MOVED[step] * elements / seconds / 1e9


def draw_roofline(results: Results, path: Path) -> None:
    """Left: rate over instructions a byte, beneath its roofs. Right: the share of the copy's rate, by tokens."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    problems = [
        (dict(problem), timed)
        for problem, timed in by_problem(results.benchmarks).items()
        if dict(problem)["benchmark"] == "op" and dict(problem)["prior"] == "fixed" and "copy" in timed
    ]
    chosen = [each for each in problems if each[0]["dtype"] == "bfloat16"] or problems
    if not chosen:
        print("no plot: there are no timings of the op yet")
        return
    width = min(problem["width"] for problem, _ in chosen)
    chosen = sorted((each for each in chosen if each[0]["width"] == width), key=lambda each: each[0]["rows"])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    facts = results.content["machine_info"]
    title = f"fused_ib, {chosen[0][0]['dtype']}, {width} columns, on {where(facts)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    left, right = figure.subplots(1, 2)
    _draw_roofs(left, *chosen[-1], results.content.get("static", {}).get("rows", []), facts)
    _draw_shares(right, chosen)
    for panel in (left, right):
        panel.grid(color="#e6e8ee", linewidth=0.8)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelsize=8.5, colors=INK)
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=160)


def _draw_roofs(panel: Any, problem: dict[str, Any], timed: Any, static: list[Any], facts: dict[str, Any]) -> None:
    itemsize = getattr(torch, problem["dtype"]).itemsize
    steps = [step for step in _MARKS if step in timed["copy"]]
    copy = max(gigabytes(problem, step, median(timed["copy"][step])) for step in steps)
    gpu = next((each for each in GPUS if each.name in facts.get("gpu", "")), None)
    intensities, roof = [1.0, 32.0], [copy, copy]
    if gpu is not None:
        issue = gpu.multiprocessors * gpu.gigahertz * gpu.lanes["issue"]  # 1e9 lane instructions a second
        intensities, roof = [1.0, issue / copy, 32.0], [copy, copy, issue / 32]
        panel.annotate("issue slots at peak clock", (20, issue / 20), (-6, 0), textcoords="offset points",
                       ha="right", va="top", fontsize=8.5, color=INK)  # fmt: skip
    panel.plot(intensities, roof, color=INK, linewidth=1.2)
    panel.annotate(f"copy, as measured: {copy:.0f} GB/s", (1.05, copy), (0, 4), textcoords="offset points",
                   fontsize=8.5, color=INK)  # fmt: skip
    for row in static:
        name = f"fused_ib {row['backend']}"
        fits = (row["dtype"], row["prior"]) == (problem["dtype"], "fixed") and row["kernel"] in steps
        if fits and name in timed:
            rate = gigabytes(problem, row["kernel"], median(timed[name][row["kernel"]]))
            x = row["instructions"] / (MOVED[row["kernel"]] * itemsize)
            label = f"{name}, {row['kernel']}: {100 * rate / copy:.0f} %"
            panel.plot([x], [rate], _MARKS[row["kernel"]], color=_LOOKS[name]["color"], label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    panel.set_title(f"GB/s over instructions a byte, {problem['rows']} tokens", loc="left", fontsize=10, color=INK)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8.5, loc="lower left")


def _draw_shares(panel: Any, chosen: list[tuple[dict[str, Any], Any]]) -> None:
    for name, look in _LOOKS.items():
        for step, mark in _MARKS.items():
            points = [
                (problem["rows"], 100 * median(timed["copy"][step]) / median(timed[name][step]))
                for problem, timed in chosen
                if name in timed and step in timed[name] and step in timed["copy"]
            ]
            if points:
                label = name if step == "forward" else None
                panel.plot(*zip(*points, strict=True), marker=mark, markersize=4, label=label, **look)
    panel.set_xscale("log", base=2)
    panel.set_ylim(0, 110)
    panel.set_xticks([problem["rows"] for problem, _ in chosen], [str(problem["rows"]) for problem, _ in chosen])
    panel.set_title(
        "% of the copy's rate, by tokens (circle forward, square backward)", loc="left", fontsize=10, color=INK
    )
    panel.legend(frameon=False, fontsize=8)
