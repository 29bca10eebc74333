"""What a training log says besides the loss: alpha, CE, KL and posterior, tokens per second, what the methods cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from vittle.methods.attachment import attached
from vittle.methods.bottleneck import bottleneck_of
from vittle_kernels import FusedIB, FusedIBOutput

_SUMS = ("tokens", "ce", "kl_vision", "kl_text", "std_vision", "tokens_vision", "std_text", "tokens_text")
"""What is summed over a window and over all ranks."""

SHARE = "second_look_share"
"""Of the forward passes' time, in a log."""


class Interval:
    """A time that begins when it is made: by the host's clock, or by a GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.begin = self._now()
        self.end: Any = None

    def ends(self) -> None:
        """Now; on a GPU, when the work that is under way reaches this point."""
        self.end = self._now()

    def _now(self) -> Any:
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """How long it was; 0 if it has not ended."""
        if self.end is None:
            return 0.0
        if not self.is_gpu:
            return self.end - self.begin
        self.end.synchronize()
        return 1e-3 * self.begin.elapsed_time(self.end)


class Monitor(TrainerCallback):
    """Sums up a window of steps, from one log to the next.

    Args:
        device: of the training.
        model: with or without a bottleneck or a second look.
    """

    def __init__(self, device: torch.device, model: Any) -> None:
        self.device, self.attachment, self.second_look = device, bottleneck_of(model), attached(model, "vpgc")
        self.hooks: list[RemovableHandle] = []
        self.of_step: list[RemovableHandle] = []
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps: list[Interval] = []
        self.passes: list[Interval] = []
        self.forwards: list[Interval] = []
        self.looks: list[Interval] = []
        self.begin = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first window begins."""
        self._clear()
        if self.attachment is not None:
            module, self.attachment.measures_std = self.attachment.module, True
            self.hooks = [module.register_forward_pre_hook(self._enters), module.register_forward_hook(self._leaves)]
        if self.second_look is not None:
            look = self.second_look.module
            self.hooks += [look.register_forward_pre_hook(self._looks), look.register_forward_hook(self._looked)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the optimizer begins."""
        self.steps.append(Interval(self.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the optimizer ends."""
        self.steps[-1].ends()
        while self.of_step:
            self.of_step.pop().remove()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What comes between two windows is no training."""
        if not self.steps:
            self.begin = time.perf_counter()

    on_evaluate = on_save

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing is measured any more."""
        if self.attachment is not None:
            self.attachment.measures_std = False
        for hook in self.hooks:
            hook.remove()

    def add(self, batch: Mapping[str, Tensor], weight: float, copies: int) -> None:
        """Counts a batch that the model has just seen.

        Args:
            batch: with ``attention_mask`` or ``input_ids``; without them no tokens are counted.
            weight: of this batch's share in the global batch's CE and KL.
            copies: how many ranks have this batch.
        """
        values = {}
        if (tokens := batch.get("attention_mask", batch.get("input_ids"))) is not None:
            values["tokens"] = tokens.count_nonzero() if "attention_mask" in batch else torch.tensor(tokens.numel())
        if self.attachment is not None:
            values |= {name: each * weight for name, each in self.attachment.metrics.items()}
            for name, (total, count) in self.attachment.std.items():
                values |= {f"std_{name}": total, f"tokens_{name}": count}
        for name, value in values.items():
            value = value.to(self.device, torch.float64) / copies
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def window(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means of the window that ends here, which begins the next.

        Args:
            total: sums a tensor over all ranks.
        """
        wall, steps = time.perf_counter() - self.begin, len(self.steps)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        reduced = total(torch.stack([self.sums.get(name, zero) for name in _SUMS])).tolist()
        sums, values = dict(zip(_SUMS, reduced, strict=True)), {}
        if sums["tokens"]:
            values["tokens_per_second"] = round(sums["tokens"] / wall, 1)
        if self.attachment is not None and steps:
            values |= {name: round(sums[name] / steps, 4) for name in ("ce", "kl_vision", "kl_text")}
            for name in ("vision", "text"):
                if count := sums[f"tokens_{name}"]:
                    values[f"std_{name}"] = round(sums[f"std_{name}"] / count, 4)
            values["alpha"] = round(float(self.attachment.module.alpha), 4)
            in_steps, in_bottleneck = (sum(each.seconds for each in kind) for kind in (self.steps, self.passes))
            values["bottleneck_share"] = round(in_bottleneck / in_steps, 4)
        if self.looks:
            in_forwards, in_looks = (sum(each.seconds for each in kind) for kind in (self.forwards, self.looks))
            values[SHARE] = round(in_looks / in_forwards, 4)
        self._clear()
        return values

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a forward pass of a training step."""
        self.forwards.append(Interval(self.device))
        yield
        self.forwards[-1].ends()

    def _looks(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self.looks.append(Interval(self.device))

    def _looked(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            self.looks[-1].ends()

    def _enters(self, module: FusedIB, args: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self.passes.append(Interval(self.device))

    def _leaves(self, module: FusedIB, args: tuple[Tensor, ...], output: FusedIBOutput) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        self.passes[-1].ends()
        last = args[0] if args[0].requires_grad else module.weight_in  # what backward reaches last
        if last.requires_grad:
            backward: list[Interval] = []

            def begins(gradient: Tensor) -> None:
                backward.append(Interval(self.device))

            def ends(gradient: Tensor) -> None:
                if backward and backward[0].end is None:
                    backward[0].ends()
                    self.passes.append(backward[0])

            output.hidden_states.register_hook(begins)
            self.of_step.append(last.register_hook(ends))
