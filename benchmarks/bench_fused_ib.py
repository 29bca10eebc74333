"""Times ``fused_ib`` against what people write; prints a table and saves it as ``results.json`` with a plot.

    python benchmarks/bench_fused_ib.py [--device cuda] [--rows 2048] [--width 4096] [--output runs/bench]

The contenders take turns, so that whatever else the machine does meets them all. A step is timed as a training loop
pays for it, with the allocation and the release of all that it returns; the gradients that come in are there already.
"kernel alone" writes to results that are there already, as the copy beneath it does: the same bytes, moved and no more.
A kernel that fails its check is not timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from contenders import Contender, Inputs, Op, contenders, failure, kernel_alone, make_inputs
from report import Row, Timing, draw, machine, table
from torch import Tensor

Step = Callable[[], object]

MOVED = {"forward": 4, "forward_backward": 4 + 6}
"""For each element of hidden, forward reads h, mu, s and writes out; backward reads g, mu, s and writes dh, dmu, ds."""


def forward(op: Op, inputs: Inputs) -> None:
    """Builds the graph and drops it."""
    op(inputs.hidden, inputs.posterior, inputs.prior)


def forward_backward(op: Op, inputs: Inputs) -> None:
    """Gradients are returned, not accumulated: nobody pays for a ``.grad``."""
    out, kl = op(inputs.hidden, inputs.posterior, inputs.prior)
    torch.autograd.grad((out, kl), inputs.leaves, (inputs.grad_out, inputs.grad_kl.to(kl.dtype)))


def kept_bytes(op: Op, inputs: Inputs) -> int:
    """What the forward pass keeps for backward, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = op(inputs.hidden, inputs.posterior, inputs.prior)
    del results  # until here it kept the storages, and so their addresses, apart
    return sum(storages.values())


def copy_steps(inputs: Inputs) -> Iterator[tuple[str, Step]]:
    """The floor: as many bytes as the fused op must move, between two buffers that are there already."""
    source = torch.zeros(5 * inputs.hidden.numel(), dtype=inputs.hidden.dtype, device=inputs.hidden.device)
    target = torch.zeros_like(source)
    for name, elements in MOVED.items():
        count = elements // 2 * inputs.hidden.numel()  # a copy reads and writes
        yield name, partial(target[:count].copy_, source[:count])


def stopwatch(device: torch.device) -> Callable[[Step], float]:
    """Times a step in milliseconds; on a GPU by events, from a flushed L2, the host well ahead of it."""
    if device.type == "cpu":

        def elapsed(step: Step) -> float:
            begin = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - begin)

    else:
        flush = torch.empty(2**30, dtype=torch.uint8, device=device)

        def elapsed(step: Step) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(4):
                flush.zero_()
            begin.record()
            step()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

    return elapsed


def take_turns(
    steps: dict[tuple[str, str], Step], device: torch.device, turns: int
) -> dict[tuple[str, str], list[float]]:
    """Each step's times in milliseconds, after two turns of warm-up."""
    elapsed = stopwatch(device)
    rounds = [{key: elapsed(step) for key, step in steps.items()} for _ in range(turns + 2)]
    return {key: [times[key] for times in rounds[2:]] for key in steps}


def compare(entrants: Sequence[Contender], inputs: Inputs, turns: int) -> list[Row]:
    """The rows of one problem."""
    failures = {each.name: failure(each.backend, inputs) if each.backend else None for each in entrants}
    sound = [each for each in entrants if failures[each.name] is None]
    steps: dict[tuple[str, str], Step] = {
        (each.name, step.__name__): partial(step, each.op, inputs)
        for each in sound
        for step in (forward, forward_backward)
    }
    floors = ["copy"]
    if any(each.backend in ("cpu", "cuda") for each in sound):
        floors = ["kernel alone", "copy"]
        run_forward, run_backward = kernel_alone(inputs)
        steps["kernel alone", "forward"] = run_forward
        steps["kernel alone", "forward_backward"] = lambda: (run_forward(), run_backward())
    steps |= {("copy", name): step for name, step in copy_steps(inputs)}
    times = take_turns(steps, inputs.hidden.device, turns)

    def timing(name: str, step: str) -> Timing | None:
        if (name, step) not in times:
            return None
        p20, _, _, p80 = statistics.quantiles(times[name, step], n=5, method="inclusive")
        median, eager = statistics.median(times[name, step]), statistics.median(times["eager", step])
        return Timing(median, p20, p80, turns, None if name in floors else eager / median)

    kept = {each.name: kept_bytes(each.op, inputs) for each in sound}
    return [
        Row(
            dtype=str(inputs.hidden.dtype).removeprefix("torch."),
            prior="fixed" if inputs.prior is None else "learnable",
            contender=name,
            failure=failures.get(name),
            kept_bytes=kept.get(name),
            forward=timing(name, "forward"),
            forward_backward=timing(name, "forward_backward"),
        )
        for name in (*failures, *floors)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a kernel fails its check."""
    parser = argparse.ArgumentParser(description="Times fused_ib against what people write in PyTorch.")
    parser.add_argument("--rows", type=int, default=2048, help="tokens (2048)")
    parser.add_argument("--width", type=int, default=4096, help="columns (4096)")
    parser.add_argument("--turns", type=int, default=15, help="times that each contender is timed (15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder to write to (runs/bench)")
    parser.add_argument("--smoke", action="store_true", help="tiny and without torch.compile: does it run at all?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rows, options.width, options.turns = 32, 256, 3

    device = torch.device(options.device)
    results = {"machine": machine(device), "rows": options.rows, "width": options.width, "turns": options.turns}
    rows: list[Row] = []
    entrants, results["not_timed"] = contenders(device, compiled=not options.smoke)
    for dtype in (torch.float32, torch.bfloat16):
        for learnable in (False, True):
            rows += compare(entrants, make_inputs(options.rows, options.width, dtype, learnable, device), options.turns)
    results["results"] = [asdict(row) for row in rows]

    print(table(results))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.output / "results.png")
    print(f"saved to {options.output}{os.sep}")
    return 1 if any(row.failure for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
