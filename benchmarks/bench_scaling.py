"""Times ``fused_ib`` from 2^16 to 2^26 elements, by rows and by columns; saves ``scaling.json`` with a plot.

    python benchmarks/bench_scaling.py [--device cuda] [--backend cpu] [--output runs/bench]

A flat line is linear scaling. What a step allocates is part of its time, as in bench_fused_ib.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from bench_fused_ib import copy_steps, forward, forward_backward
from contenders import BACKENDS, failure, make_inputs, ours
from records import machine, parser
from report import draw_scaling
from timing import take_turns

ALONG = {"rows": "rows of 4096", "width": "columns of 1024 rows"}


def shape(along: str, elements: int) -> tuple[int, int]:
    """Rows and columns."""
    return (elements // 4096, 4096) if along == "rows" else (1024, elements // 1024)


def measure(along: str, elements: int, backend: str, device: torch.device, turns: int) -> dict[str, Any]:
    """Nanoseconds an element, medians."""
    rows, width = shape(along, elements)
    inputs = make_inputs(rows, width, torch.float32, False, device)
    if problem := failure(backend, inputs):
        raise SystemExit(f"fused_ib {backend} is wrong at {rows} x {width}, so it is not timed: {problem}")
    makers = (forward, forward_backward)
    steps = {("fused_ib", make.__name__): make(ours(backend), inputs) for make in makers}
    copies = dict(copy_steps(inputs))
    steps |= {("copy", make.__name__): copies[make.__name__] for make in makers}
    times = take_turns(steps, device, turns)
    nanoseconds = {f"{who} {step}": 1e9 * statistics.median(each) / elements for (who, step), each in times.items()}
    return {"along": along, "rows": rows, "width": width, "elements": elements, "nanoseconds": nanoseconds}


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser("Times fused_ib over problem sizes.", turns=9)
    command.add_argument("--backend", help="of fused_ib (cpu, or cuda)")
    command.add_argument("--powers", type=int, nargs=2, default=(16, 26), help="of two, elements from and to (16 26)")
    options = command.parse_args(arguments)
    device = torch.device(options.device)
    backend = options.backend or BACKENDS[options.device][-1]
    points = []
    print("ns an element: forward, forward + backward; copies of their bytes")
    for along in ALONG:
        for power in range(options.powers[0], options.powers[1] + 1):
            points.append(measure(along, 2**power, backend, device, options.turns))
            size = f"2^{power}, {points[-1]['rows']} x {points[-1]['width']}"
            print(f"{size:<22}" + "".join(f"{value:>8.2f}" for value in points[-1]["nanoseconds"].values()), flush=True)
    results = {"machine": machine(device), "backend": backend, "turns": options.turns, "results": points}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_scaling(results, ALONG, options.output / "scaling.png")
    print(f"saved to {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
