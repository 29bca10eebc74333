"""The demo's report: one table for the terminal, one plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"color": "#a8adb8", "linewidth": 3.5, "markersize": 7},  # still seen where the other covers it
    "bottleneck": {"color": "#c2410c", "linewidth": 1.5, "markersize": 4},
    "instruct": {"color": "#2f6f9f", "linewidth": 1.5, "markersize": 4},
    "both": {"color": "#6b4c9a", "linewidth": 1.5, "markersize": 4},
}


def table(report: dict[str, Any]) -> str:
    """What came out, in at most 80 columns."""
    accuracy, kl = report["accuracy"], report["kl"]
    methods = list(kl)
    first = accuracy[methods[0]]

    def row(name: str, values: list[str]) -> str:
        return f"{name:<34}" + "".join(f"{value:>{46 // max(3, len(methods))}}" for value in values)

    def percent(*path: str) -> list[str]:
        values = []
        for method in methods:
            value: Any = accuracy[method]
            for key in path:
                value = value[key]
            values.append(f"{100 * value:.1f} %")
        return values

    def number(key: str, form: str, scale: float = 1) -> list[str]:
        return [format(report[key][method] / scale, form) for method in methods]

    def divergence(modality: str) -> list[str]:
        return ["-" if kl[method] is None else f"{kl[method][modality]:.4f}" for method in methods]

    lines = [row("", methods), row("accuracy, clean", percent("clean"))]
    lines += [row(f"    {kind}", percent("by_question", kind)) for kind in first["by_question"]]
    lines.append(row("accuracy, shifted", percent("shifted")))
    for kind, severities in first["by_shift"].items():
        lines += [row(f"    {kind}, severity {each}", percent("by_shift", kind, each)) for each in severities]
    lines += [
        row("KL vision, nats a dimension", divergence("vision")),
        row("KL text, nats a dimension", divergence("text")),
        row("training steps a second", number("steps_per_second", ".2f")),
        row("kept for backward, MiB", number("bytes_for_backward", ".1f", 2**20)),
        "",
        f"{report['settings']['questions']} held-out questions; always guessing the commonest answer: "
        f"{100 * accuracy['guessing']:.1f} %",
        f"seed {report['seed']}, {report['seconds']:.0f} s",
    ]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Accuracy against severity, a panel for each shift; severity 0 is clean."""
    from matplotlib.figure import Figure

    accuracy = report["accuracy"]
    methods = list(report["kl"])
    kinds = list(accuracy[methods[0]]["by_shift"])
    figure = Figure(figsize=(3.1 * len(kinds), 3.4), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(kinds), sharey=True)
    for panel, kind in zip(panels, kinds, strict=True):
        for method in methods:
            shifted = accuracy[method]["by_shift"][kind]
            severities = [0, *map(int, shifted)]
            values = [100 * accuracy[method]["clean"], *(100 * value for value in shifted.values())]
            panel.plot(severities, values, marker="o", label=method, **_LOOKS[method])
        panel.axhline(100 * accuracy["guessing"], color="black", linewidth=0.8, linestyle=":", label="guessing")
        panel.set_title(kind.replace("_", " "), fontsize=10)
        panel.set_xticks(severities)
        panel.set_xlabel("severity")
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    questions, seed = report["settings"]["questions"], report["seed"]
    figure.suptitle(f"Held-out digit scenes under image corruptions ({questions} questions, seed {seed})", fontsize=11)
    figure.savefig(path)
