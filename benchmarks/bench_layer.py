"""Times the whole layer, heads included, against the layer as people write it; prints a table.

    python benchmarks/bench_layer.py [--device cuda] [--rows 11264] [--width 4096] [--dtype bfloat16]

In training, with a fixed prior; 576 of 704 tokens are vision tokens, as in a LLaVA-1.5 with a question of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from contenders import ALPHA, BACKENDS, drawn_on_the_host
from layers import EagerBottleneck, failure
from records import Entry, Results, entry, failed, machine, parser
from report import table
from timing import Step, kept_bytes, peak_bytes, take_turns
from torch import Tensor, nn

from vittle_kernels import FusedIB, available_backends

VISION, TOKENS = 576, 704


def layers(width: int, dtype: torch.dtype, device: torch.device, compiled: bool) -> dict[str, nn.Module]:
    """Those that can run on the device, eager first."""
    with device:
        fused = FusedIB(width, alpha=ALPHA)
        found: dict[str, nn.Module] = {"eager": EagerBottleneck(fused, dtype)}
        if device.type == "cuda":
            found["eager, released"] = EagerBottleneck(fused, dtype, drawn_on_the_host)
        if compiled:
            found["torch.compile"] = torch.compile(EagerBottleneck(fused, dtype))
        reasons = available_backends()
        for backend in BACKENDS[device.type]:
            if reasons[backend] is None:
                found[f"FusedIB {backend}"] = FusedIB(width, alpha=ALPHA, backend=backend)
    return found


def compare(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, turns: int, facts: Entry, compiled: bool = True
) -> list[Entry]:
    """The entries of one problem."""
    problem = {
        "benchmark": "layer", "dtype": str(dtype).removeprefix("torch."), "rows": rows, "width": width,
        "prior": "fixed",
    }  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    hidden, grad = (torch.randn(rows, width, generator=generator, device=device).to(dtype) for _ in range(2))
    hidden.requires_grad_()
    vision = torch.arange(rows, device=device) % TOKENS < VISION
    steps: dict[tuple[str, str], Step] = {}
    kept: dict[str, int] = {}
    entries = []
    for name, layer in layers(width, dtype, device, compiled).items():
        if isinstance(layer, FusedIB) and (why := failure(layer.backend, 256, dtype, device)):
            entries.append(failed(problem, name, why, facts))
            continue
        run = partial(layer, hidden, vision)
        kept[name] = kept_bytes(run)
        steps[name, "forward"] = Step(_dropped(run))
        steps[name, "forward_backward"] = Step(partial(_forward_backward, run, [hidden, *layer.parameters()], grad))
    peaks = {key: peak_bytes(step, device) for key, step in steps.items()}
    return entries + [
        entry(problem, name, step, seconds, facts, kept_bytes=kept[name], peak_bytes=peaks[name, step])
        for (name, step), seconds in take_turns(steps, device, turns).items()
    ]


def _dropped(run: Callable[[], object]) -> Callable[[], None]:
    def forward() -> None:
        run()

    return forward


def _forward_backward(run: Callable[[], object], leaves: Sequence[Tensor], grad: Tensor) -> None:
    output = run()
    results = (output.hidden_states, output.kl_vision, output.kl_text)
    one = torch.ones_like(output.kl_vision)
    torch.autograd.grad(results, leaves, (grad, one, one), materialize_grads=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a layer fails its check."""
    command = parser("Times FusedIB, heads included, against the layer as people write it.", turns=9)
    command.add_argument("--rows", type=int, default=2 * TOKENS, help=f"tokens ({2 * TOKENS})")
    command.add_argument("--width", type=int, default=1024, help="columns (1024)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the states (float32)")
    options = command.parse_args(arguments)
    device = torch.device(options.device)
    facts = machine(device)
    results = Results(options.output / "layer.json")
    dtype = getattr(torch, options.dtype)
    results.add(compare(options.rows, options.width, dtype, device, options.turns, facts))
    results.save(facts)
    print(table(results, "FusedIB, heads included,"))
    return 1 if results.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
