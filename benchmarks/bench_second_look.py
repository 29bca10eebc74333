"""What VPG-C's second look adds to reading a prompt with several images, and to each token after it; prints a table.

    python benchmarks/bench_second_look.py [--shape demo demo-qformer 7b-qformer] [--images 4] [--device cuda]

Models of random weights, plain and with a fresh second look in turns, generate greedily; a turn times the prompt
(prefill) and the median of the tokens after it (decode). Beside the prompt's time stands what the second look's
multiply-adds predict: theirs over the plain prompt's, as torch counts both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import transformers as hf
from models import DEMO, Shape, build
from records import Entry, Results, entry, machine, parser
from report import by_problem
from timing import added_share, keep_freed_memory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vittle

CONTENDERS = ("plain", "second look")
STEPS = ("prefill", "decode")
TEXT = 64
"""Tokens of a prompt's text."""
GENERATED = 33
"""Tokens; the first comes with the prompt."""


SHAPES = {
    "demo": DEMO,
    "demo-qformer": replace(DEMO, queries=16, query_layers=4, query_width=128),
    "7b-qformer": Shape(4, 4096, 11008, 32, 32001, 4, 1408, 6144, 16, 224, 14, 32, 4, 768),
}
"""The model of `vittle demo`, one as wide with a Q-Former, and Vicuna-7B behind BLIP-2's parts, of 4 layers each."""


def make_prompt(shape: Shape, images: int, device: torch.device) -> dict[str, Tensor]:
    """One sample: its images between stretches of text."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, shape.image_token, (TEXT,), generator=generator).chunk(images + 1)
    image = torch.full((shape.image_tokens,), shape.image_token)
    ids = torch.cat([part for each in words[:-1] for part in (each, image)] + [words[-1]]).unsqueeze(0)
    pixels = torch.randn(images, 3, shape.image, shape.image, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Clock(hf.StoppingCriteria):
    """Tells the time after each token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(model: Any, prompt: dict[str, Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds for the prompt and for each token after it."""
    clock = Clock(device)
    settings = {"do_sample": False, "min_new_tokens": GENERATED, "max_new_tokens": GENERATED, "pad_token_id": 0}
    clock(prompt["input_ids"], None)
    with torch.inference_mode():
        model.generate(**prompt, **settings, stopping_criteria=[clock])
    prefill, *decode = (after - before for before, after in pairwise(clock.times))
    return prefill, statistics.median(decode)


def predicted_share(model: Any, prompt: dict[str, Tensor]) -> float:
    """The second look's multiply-adds over the plain prompt's."""
    flops = []
    for look in (False, True):
        if look:
            vittle.attach_vpgc(model)
        with FlopCounterMode(display=False) as counter:
            model(**prompt)
        flops.append(counter.get_total_flops())
    vittle.detach_vpgc(model)
    return flops[1] / flops[0] - 1


def compare(name: str, images: int, dtype: torch.dtype, device: torch.device, turns: int, facts: Entry) -> list[Entry]:
    """The entries of one shape."""
    shape = SHAPES[name]
    model, prompt = build(shape, dtype, device).eval().requires_grad_(False), make_prompt(shape, images, device)
    prompt["pixel_values"] = prompt["pixel_values"].to(dtype)
    problem = {
        "benchmark": "second_look", "shape": name, "dtype": str(dtype).removeprefix("torch."), "images": images,
        "width": shape.width, "layers": shape.layers,
    }  # fmt: skip
    share = predicted_share(model, prompt)
    times: dict[tuple[str, str], list[float]] = {(each, step): [] for each in CONTENDERS for step in STEPS}
    for turn in range(turns + 2):  # two of warm-up
        for contender in CONTENDERS[:: 1 if turn % 2 else -1]:
            if contender != "plain":
                with device:
                    vittle.attach_vpgc(model)
            for step, seconds in zip(STEPS, generate(model, prompt, device), strict=True):
                times[contender, step] += [seconds] * (turn >= 2)
            if contender != "plain":
                vittle.detach_vpgc(model)
    return [
        entry(
            problem, *key, seconds, facts, predicted_share=share if key[1] == "prefill" else 0.0,
            added_share=added_share(seconds, times["plain", key[1]]),
        )
        for key, seconds in times.items()
    ]  # fmt: skip


def summary(results: Results) -> str:
    """For each shape what the second look adds, and what is predicted."""
    lines = [f"{'ms':26}{'plain':>9}{'with':>9}{'adds':>9}{'predicted':>11}{'of predicted':>14}"]
    for problem, contenders in by_problem(results.benchmarks).items():
        params = dict(problem)
        if params["benchmark"] != "second_look":
            continue
        for step in STEPS:
            plain, look = (contenders[name][step] for name in CONTENDERS)
            added, share = (look["extra_info"][name] for name in ("added_share", "predicted_share"))
            medians = (1e3 * each["stats"]["median"] for each in (plain, look))
            cells = "".join(f"{each:9.2f}" for each in medians)
            whole = f"{(1 + added) / (1 + share):13.3f}x"
            lines.append(f"{params['shape'] + ', ' + step:26}{cells}{added:9.1%}{share:11.1%}{whole}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser("What VPG-C's second look adds to generation.", turns=31)
    command.add_argument("--shape", choices=tuple(SHAPES), nargs="+", default=list(SHAPES), help="of the model (all)")
    command.add_argument("--images", type=int, default=4, help="of the prompt (4)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (float32)")
    options = command.parse_args(arguments)
    device = torch.device(options.device)
    keep_freed_memory()
    facts = machine(device)
    results = Results(options.output / "second_look.json")
    for name in options.shape:
        results.add(compare(name, options.images, getattr(torch, options.dtype), device, options.turns, facts))
        results.save(facts)
    print(summary(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
