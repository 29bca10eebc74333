"""Times ``fused_ib`` against what people write; prints a table and saves it as ``results.json`` with a plot.

    python benchmarks/bench_fused_ib.py [--device cuda] [--rows 2048] [--width 4096] [--output runs/bench]

The contenders take turns, so that whatever else the machine does meets them all. A step is timed as a training loop
pays for it, with the allocation and the release of all that it returns; the gradients that come in are there already.
"kernel alone" writes to results that are there already, as the copy beneath it does: the same bytes, moved and no more.
A kernel that fails its check is not timed, and the exit code is 1. ``pytest-benchmark compare`` reads the file too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from contenders import Contender, Inputs, Op, contenders, failure, kernel_alone, make_inputs
from records import Entry, Results, entry, failed, machine, one_line, parser
from report import draw, table
from timing import Step, kept_bytes, peak_bytes, take_turns

MOVED = {"forward": 4, "backward": 6, "forward_backward": 4 + 6}
"""For each element of hidden, forward reads h, mu, s and writes out; backward reads g, mu, s and writes dh, dmu, ds."""


def forward(op: Op, inputs: Inputs) -> Step:
    """Builds the graph and drops it."""

    def run() -> None:
        op(inputs.hidden, inputs.posterior, inputs.prior)

    return Step(run)


def backward(op: Op, inputs: Inputs) -> Step:
    """The graph is there already. Gradients are returned, not accumulated: nobody pays for a ``.grad``."""
    graph: list[tuple[torch.Tensor, torch.Tensor]] = []
    grad_kl = {dtype: inputs.grad_kl.to(dtype) for dtype in (inputs.grad_kl.dtype, torch.float32)}

    def run() -> None:
        out, kl = graph.pop()
        torch.autograd.grad((out, kl), inputs.leaves, (inputs.grad_out, grad_kl[kl.dtype]))

    return Step(run, before=lambda: graph.append(op(inputs.hidden, inputs.posterior, inputs.prior)))


def forward_backward(op: Op, inputs: Inputs) -> Step:
    """One after the other."""
    step = backward(op, inputs)

    def run() -> None:
        step.before()
        step.run()

    return Step(run)


def steps_on(device: torch.device) -> list[Callable[[Op, Inputs], Step]]:
    """What is timed: on a GPU backward by itself too, whose time can be held against the copy's there."""
    return [forward, forward_backward] if device.type == "cpu" else [forward, backward, forward_backward]


def copy_steps(inputs: Inputs) -> Iterator[tuple[str, Step]]:
    """The floor: as many bytes as the fused op must move, between two buffers that are there already."""
    source = torch.empty(5 * inputs.hidden.numel(), dtype=inputs.hidden.dtype, device=inputs.hidden.device)
    source.normal_()  # zeros may be copied faster
    target = torch.zeros_like(source)
    for name in (make.__name__ for make in steps_on(inputs.hidden.device)):
        count = MOVED[name] // 2 * inputs.hidden.numel()  # a copy reads and writes
        yield name, Step(partial(target[:count].copy_, source[:count]))


def runs(entrant: Contender, inputs: Inputs) -> str | None:
    """None where a contender that is not ours can be called on a problem."""
    try:
        forward_backward(entrant.op, inputs).run()
    except Exception as error:  # of many kinds
        return one_line(error)
    return None


def compare(entrants: Sequence[Contender], inputs: Inputs, turns: int, facts: Entry) -> list[Entry]:
    """The entries of one problem."""
    rows, width = inputs.hidden.shape
    problem = {
        "benchmark": "op",
        "dtype": str(inputs.hidden.dtype).removeprefix("torch."),
        "rows": rows,
        "width": width,
        "prior": "fixed" if inputs.prior is None else "learnable",
    }
    device = inputs.hidden.device
    entrants = [each for each in entrants if each.takes_prior or inputs.prior is None]
    failures = {each.name: failure(each.backend, inputs) if each.backend else runs(each, inputs) for each in entrants}
    sound = [each for each in entrants if failures[each.name] is None]
    steps = {
        (each.name, make.__name__): make(each.op, inputs)
        for each in sound
        for make in steps_on(device)
        if not (each.draws_on_host and make is backward)  # eager's own, after seconds of drawing
    }
    kept = {each.name: kept_bytes(partial(each.op, *inputs[:3])) for each in sound}
    peaks = {key: peak_bytes(step, device) for key, step in steps.items()}
    if any(each.backend in ("cpu", "cuda") for each in sound):
        run_forward, run_backward = kernel_alone(inputs)
        alone = {"forward": run_forward, "backward": run_backward}
        alone["forward_backward"] = lambda: (run_forward(), run_backward())
        steps |= {("kernel alone", make.__name__): Step(alone[make.__name__]) for make in steps_on(device)}
    steps |= {("copy", name): step for name, step in copy_steps(inputs)}
    wrong = [failed(problem, name, why, facts) for name, why in failures.items() if why is not None]
    return wrong + [
        entry(problem, name, step, seconds, facts, kept_bytes=kept.get(name), peak_bytes=peaks.get((name, step)))
        for (name, step), seconds in take_turns(steps, device, turns).items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a kernel fails its check."""
    command = parser("Times fused_ib against what people write in PyTorch.", turns=15)
    command.add_argument("--rows", type=int, default=2048, help="tokens (2048)")
    command.add_argument("--width", type=int, default=4096, help="columns (4096)")
    command.add_argument("--smoke", action="store_true", help="tiny and without torch.compile: does it run at all?")
    options = command.parse_args(arguments)
    if options.smoke:
        options.rows, options.width, options.turns = 32, 256, 3

    device = torch.device(options.device)
    facts = machine(device)
    results = Results(options.output / "results.json")
    entrants, results.content["not_timed"] = contenders(device, compiled=not options.smoke)
    for dtype in (torch.float32, torch.bfloat16):
        for learnable in (False, True):
            inputs = make_inputs(options.rows, options.width, dtype, learnable, device)
            results.add(compare(entrants, inputs, options.turns, facts))
    results.save(facts)
    title = f"fused_ib, {options.rows} x {options.width}, {options.turns} turns,"
    print(table(results, title))
    draw(results, title, options.output / "results.png")
    print(f"saved to {options.output}{os.sep}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
