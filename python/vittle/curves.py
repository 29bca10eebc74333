"""The curves of a run: what its log says, over its steps, in one plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CURVES = "training.png"

_PANELS: tuple[tuple[str, dict[str, str], float], ...] = (
    ("loss", {"loss": "loss", "ce": "cross-entropy"}, 1),
    ("KL, nats a dimension", {"kl_vision": "vision", "kl_text": "text"}, 1),
    ("posterior's standard deviation", {"std_vision": "vision", "std_text": "text"}, 1),
    ("alpha", {"alpha": "alpha"}, 1),
    ("tokens a second", {"tokens_per_second": "tokens a second"}, 1),
    ("bottleneck's share of step time, %", {"bottleneck_share": "share"}, 100),
    ("second look's share of forward passes, %", {"second_look_share": "share"}, 100),
)
_COLORS = ("#c2410c", "#2f6f9f")


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """A panel for each thing that the log tells of; none that it does not."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    logs = [log for log in history if "loss" in log]
    panels = [panel for panel in _PANELS if any(name in log for name in panel[1] for log in logs)]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.9 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, names, scale) in zip(axes, panels, strict=False):
        for (name, label), color in zip(names.items(), _COLORS, strict=False):
            points = [(log["step"], scale * log[name]) for log in logs if name in log]
            if points:
                marker = "o" if len(points) < 3 else None
                axis.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.5, marker=marker)
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set_ylim(0, 1.1 * axis.dataLim.y1 or 1)  # a flat curve is not on the frame
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.supxlabel("optimizer's steps", fontsize=10)
    figure.savefig(path)
