"""What the bottleneck adds to a training step of a LLaVA with random weights; prints a table.

    python benchmarks/bench_step.py [--shape 7b demo] [--tuning lora full] [--layers 32] [--batch 16] [--device cuda]

Plain tuning, the fused bottleneck and the eager one take turns on one model: forward + backward, and AdamW's step
apart. "lora" tunes PEFT's adapters on every linear layer of the language model and the heads; "full" tunes the whole
language model, with activation checkpointing where there is much of it. Beside the time stands what the heads'
multiply-adds predict: 9 D^2 for a token (3 D^2 forward, twice that backward), over all that plain tuning's forward and
backward pass do, as torch counts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from layers import EagerBottleneck, failure
from models import DEMO, LLAVA_7B, Shape, build
from records import Entry, Results, entry, failed, machine, parser
from report import by_problem, table
from timing import Step, added_share, keep_freed_memory, peak_bytes, take_turns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vittle
from vittle.methods.bottleneck import attachment_of
from vittle_kernels import FusedIB

CONTENDERS = ("plain", "eager", "fused")
TUNINGS = ("lora", "full")


@dataclass(frozen=True)
class Workload:
    """A model and its batch; as they stand, LLaVA-1.5-7B's with the paper's batch."""

    shape: Shape = LLAVA_7B
    batch: int = 16
    text: int = 128
    checkpointed: bool = True
    """Whether full tuning keeps the decoder layers' inputs only, and computes the rest again."""

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch * (self.shape.image_tokens + self.text)


DEMO_BATCH = Workload(DEMO, 32, 15, checkpointed=False)
"""`vittle demo`'s."""

SMALL = Workload(Shape(4, 128, 256, 4, 500, 2, 64, 256, 1, 56, 14), 2, 12)
"""Does it run at all?"""


def make_batch(work: Workload, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """One image a sample, then a question and an answer of half the text each."""
    shape, generator = work.shape, torch.Generator(device).manual_seed(0)
    text = torch.randint(shape.image_token, (work.batch, work.text), generator=generator, device=device)
    image = torch.full((work.batch, shape.image_tokens), shape.image_token, device=device)
    ids = torch.cat((image, text), 1)
    labels = ids.clone()
    labels[:, : -(work.text // 2)] = -100
    pixels = torch.randn(work.batch, 3, shape.image, shape.image, generator=generator, device=device).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def prepare(model: Any, tuning: str, checkpointed: bool) -> Any:
    """The model as it is tuned; what comes back is called with the batch."""
    if tuning == "full":
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    config = LoraConfig(r=128, lora_alpha=256, target_modules=targets)
    return get_peft_model(model, config, autocast_adapter_dtype=False)  # adapters in bf16, as the base


class Tuning:
    """One model under each of the contenders in turn, each with a bottleneck and an optimizer of its own."""

    def __init__(self, work: Workload, tuning: str, dtype: torch.dtype, device: torch.device) -> None:
        self.work, self.base = work, build(work.shape, dtype, device).train()
        for name, parameter in self.base.named_parameters():
            if "vision_tower" in name:
                parameter.requires_grad_(False)
        self.model = prepare(self.base, tuning, work.checkpointed)
        self.batch: dict[str, Any] = make_batch(work, dtype, device) | {"use_cache": False}
        with device:
            fused = FusedIB(work.shape.width)
        self.bottlenecks: dict[str, nn.Module | None] = {
            "plain": None, "eager": EagerBottleneck(fused, dtype), "fused": fused,
        }  # fmt: skip
        tuned = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(tuned, lr=1e-5)
        self.own = {n: torch.optim.AdamW(b.parameters(), lr=1e-5) for n, b in self.bottlenecks.items() if b is not None}

    def switch(self, name: str) -> None:
        """Makes the model that of a contender, without gradients."""
        if hasattr(self.base, "bottleneck"):
            vittle.detach_bottleneck(self.base)
        for model in (self.base, *filter(None, self.bottlenecks.values())):
            model.zero_grad()
        if (bottleneck := self.bottlenecks[name]) is not None:
            with next(bottleneck.parameters()).device:
                vittle.attach_bottleneck(self.base)
            self.base.bottleneck = attachment_of(self.base).module = bottleneck

    def forward_backward(self) -> None:
        self.model(**self.batch).loss.backward()

    def predicted_share(self) -> float:
        """What the heads' multiply-adds are of plain tuning's."""
        self.switch("plain")
        with FlopCounterMode(display=False) as counter:
            self.forward_backward()
        return 9 * self.work.shape.width**2 * self.work.tokens / (counter.get_total_flops() / 2)

    def optimize(self, name: str) -> None:
        self.optimizer.step()
        if name in self.own:
            self.own[name].step()

    def steps(self) -> dict[tuple[str, str], Step]:
        """In the order in which they are taken: an optimizer's step has the gradients of the pass before it."""
        steps = {}
        for name in CONTENDERS:
            steps[name, "forward_backward"] = Step(self.forward_backward, before=partial(self.switch, name))
            steps[name, "optimizer"] = Step(partial(self.optimize, name))
        return steps


def compare(
    work: Workload, tuning: str, dtype: torch.dtype, device: torch.device, turns: int, facts: Entry
) -> list[Entry]:
    """The entries of one tuning."""
    name = str(dtype).removeprefix("torch.")
    problem = {
        "benchmark": "step", "tuning": tuning, "dtype": name, "rows": work.tokens,
        "width": work.shape.width, "layers": work.shape.layers,
    }  # fmt: skip
    if why := failure("auto", 256, dtype, device):
        return [failed(problem, "fused", why, facts)]
    run = Tuning(work, tuning, dtype, device)
    predicted = run.predicted_share()
    steps = run.steps()
    for each in steps.values():  # AdamW's state is made in its first step, and counts in every contender's peak
        each.before()
        each.run()
    peaks = {key: peak_bytes(step, device) for key, step in steps.items()}
    times = take_turns(steps, device, turns, slow=math.inf)
    return [
        entry(
            problem, *key, seconds, facts, peak_bytes=peaks[key], predicted_share=predicted,
            added_share=added_share(seconds, times["plain", key[1]]),
        )
        for key, seconds in times.items()
    ]  # fmt: skip


def summary(results: Results) -> str:
    """For each tuning, what the bottlenecks add to forward + backward, and what is predicted."""
    lines = []
    for problem, contenders in by_problem(results.benchmarks).items():
        params = dict(problem)
        if params["benchmark"] == "step":
            infos = {name: contenders[name]["forward_backward"]["extra_info"] for name in CONTENDERS}
            added = {name: infos[name]["added_share"] for name in CONTENDERS[1:]}
            predicted = infos["plain"]["predicted_share"]
            parts = ", ".join(f"{name} adds {100 * share:.1f} %" for name, share in added.items())
            what = f"{params['tuning']}, {params['layers']} layers of {params['width']}"
            lines.append(f"{what}: by multiply-adds {100 * predicted:.1f} %")
            lines.append(f"    {parts}, {added['fused'] / predicted:.2f} times that")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where the layer fails its check."""
    command = parser("What the bottleneck adds to a training step of a LLaVA.", turns=15)
    command.add_argument("--tuning", choices=tuple(TUNINGS), nargs="+", default=list(TUNINGS), help="(lora full)")
    command.add_argument("--shape", choices=("7b", "demo"), nargs="+", default=["7b"], help="of the model (7b)")
    command.add_argument("--layers", type=int, default=32, help="decoder layers of the 7b (32)")
    command.add_argument("--batch", type=int, default=16, help="samples of 576 + 128 tokens for the 7b (16)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model (bfloat16)")
    options = command.parse_args(arguments)
    device = torch.device(options.device)
    keep_freed_memory()
    facts = machine(device)
    results = Results(options.output / "step.json")
    cut = replace(LLAVA_7B, layers=options.layers)
    works = {"7b": Workload(cut, options.batch, checkpointed=options.layers > 4), "demo": DEMO_BATCH}
    for shape, tuning in product(options.shape, options.tuning):
        results.add(compare(works[shape], tuning, getattr(torch, options.dtype), device, options.turns, facts))
        results.save(facts)
    print(table(results, "A step of a LLaVA", ("forward_backward", "optimizer"), "peak_bytes", baseline="plain"))
    print(summary(results))
    return 1 if results.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
