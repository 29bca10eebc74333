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
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from layers import EagerBottleneck, failure
from records import Entry, Results, entry, failed, machine, parser
from report import by_problem, table
from timing import Step, keep_freed_memory, peak_bytes, take_turns
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vittle
from vittle.methods.bottleneck import attachment_of
from vittle_kernels import FusedIB

CONTENDERS = ("plain", "eager", "fused")
TUNINGS = ("lora", "full")


@dataclass(frozen=True)
class Shape:
    """LLaVA-1.5-7B's, and a batch of the paper's; images are square."""

    layers: int = 32
    width: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32064
    vision_layers: int = 24
    vision_width: int = 1024
    image: int = 336
    patch: int = 14
    batch: int = 16
    text: int = 128
    checkpointed: bool = True
    """Whether full tuning keeps the decoder layers' inputs only, and computes the rest again."""

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch * (self.image_tokens + self.text)


SHAPES = {"7b": Shape(), "demo": Shape(8, 128, 256, 4, 75, 4, 128, 64, 16, 32, 15, False)}
"""LLaVA-1.5-7B, and the model of `vittle demo` with its batches."""

SMALL = Shape(4, 128, 256, 4, 500, 2, 64, 56, 14, 2, 12)
"""Does it run at all?"""


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A LLaVA of transformers' own class, made on its device; the vision tower is frozen."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers, num_attention_heads=max(1, shape.vision_width // 64),
            image_size=shape.image, patch_size=shape.patch,
        ),
        text_config=LlamaConfig(
            hidden_size=shape.width, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, vocab_size=shape.vocabulary, max_position_embeddings=4096,
        ),
        image_token_index=shape.vocabulary - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            parameter.requires_grad_(False)
    return model.train()


def make_batch(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """One image a sample, then a question and an answer of half the text each."""
    generator = torch.Generator(device).manual_seed(0)
    text = torch.randint(shape.vocabulary - 1, (shape.batch, shape.text), generator=generator, device=device)
    image = torch.full((shape.batch, shape.image_tokens), shape.vocabulary - 1, device=device)
    ids = torch.cat((image, text), 1)
    labels = ids.clone()
    labels[:, : -(shape.text // 2)] = -100
    pixels = torch.randn(shape.batch, 3, shape.image, shape.image, generator=generator, device=device).to(dtype)
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

    def __init__(self, shape: Shape, tuning: str, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.base = shape, build(shape, dtype, device)
        self.model = prepare(self.base, tuning, shape.checkpointed)
        self.batch: dict[str, Any] = make_batch(shape, dtype, device) | {"use_cache": False}
        with device:
            fused = FusedIB(shape.width)
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
        return 9 * self.shape.width**2 * self.shape.tokens / (counter.get_total_flops() / 2)

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
    shape: Shape, tuning: str, dtype: torch.dtype, device: torch.device, turns: int, facts: Entry
) -> list[Entry]:
    """The entries of one tuning."""
    name = str(dtype).removeprefix("torch.")
    problem = {
        "benchmark": "step", "tuning": tuning, "dtype": name, "rows": shape.tokens, "width": shape.width,
        "layers": shape.layers,
    }  # fmt: skip
    if why := failure("auto", 256, dtype, device):
        return [failed(problem, "fused", why, facts)]
    run = Tuning(shape, tuning, dtype, device)
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


def added_share(seconds: Sequence[float], plain: Sequence[float]) -> float:
    """What a contender adds to the plain step: the median of the turns' own, as both meet the same machine."""
    return statistics.median(each / other - 1 for each, other in zip(seconds, plain, strict=True))


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
    command.add_argument("--shape", choices=tuple(SHAPES), nargs="+", default=["7b"], help="of the model (7b)")
    command.add_argument("--layers", type=int, default=32, help="decoder layers of the 7b (32)")
    command.add_argument("--batch", type=int, default=16, help="samples of 576 + 128 tokens for the 7b (16)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model (bfloat16)")
    options = command.parse_args(arguments)
    device = torch.device(options.device)
    keep_freed_memory()
    facts = machine(device)
    results = Results(options.output / "step.json")
    shapes = SHAPES | {"7b": Shape(layers=options.layers, batch=options.batch, checkpointed=options.layers > 4)}
    for shape, tuning in product(options.shape, options.tuning):
        results.add(compare(shapes[shape], tuning, getattr(torch, options.dtype), device, options.turns, facts))
        results.save(facts)
    print(table(results, "A step of a LLaVA", ("forward_backward", "optimizer"), "peak_bytes", baseline="plain"))
    print(summary(results))
    return 1 if results.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
