"""What a training log says besides the loss: alpha, CE, KL and posterior, tokens per second, the bottleneck's share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from vittle.methods.bottleneck import Attachment
from vittle_kernels import FusedIB, FusedIBOutput

Mark = Callable[[], float]
"""A moment: calling it gives seconds since an arbitrary one; on a GPU it waits for the work before it."""


class Clock:
    """Moments of a device: the host's clock, or a GPU's events."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        if self.is_gpu:
            self.start = self._event()

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self) -> Mark:
        """Now; on a GPU, when the work that is under way reaches this point."""
        if not self.is_gpu:
            now = time.perf_counter()
            return lambda: now
        event = self._event()

        def seconds() -> float:
            event.synchronize()
            return 1e-3 * self.start.elapsed_time(event)

        return seconds


class Monitor(TrainerCallback):
    """Sums up a window of steps, from one log to the next.

    Args:
        device: of the training.
        attachment: of the bottleneck; None without one.
    """

    def __init__(self, device: torch.device, attachment: Attachment | None) -> None:
        self.device, self.attachment, self.clock = device, attachment, Clock(device)
        self.hooks: list[RemovableHandle] = []
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps: list[tuple[Mark, Mark]] = []
        self.passes: list[tuple[Mark, Mark]] = []
        self.begin = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the optimizer begins."""
        self.began = self.clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the optimizer ends."""
        self.steps.append((self.began, self.clock.mark()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first window begins."""
        self._clear()
        if self.attachment is not None:
            module, self.attachment.measures_std = self.attachment.module, True
            self.hooks = [module.register_forward_pre_hook(self._enters), module.register_forward_hook(self._leaves)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing is measured any more."""
        if self.attachment is not None:
            self.attachment.measures_std = False
        for hook in self.hooks:
            hook.remove()

    def add(self, batch: Mapping[str, Tensor], weight: float) -> None:
        """Counts a batch that the model has just seen.

        Args:
            batch: with ``attention_mask``.
            weight: of this batch's share in the global batch's CE and KL.
        """
        values = {"tokens": batch["attention_mask"].sum()}
        if self.attachment is not None:
            metrics = self.attachment.metrics
            values |= {name: each * (1 if name.startswith("std") else weight) for name, each in metrics.items()}
            values["passes"] = torch.ones(())
        for name, value in values.items():
            value = value.to(self.device, torch.float64 if self.device.type == "cpu" else torch.float32)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def window(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means of the window that ends here, which begins the next.

        Args:
            total: sums a tensor over all ranks.
        """
        wall, steps = time.perf_counter() - self.begin, len(self.steps)
        names = sorted(self.sums)
        sums = dict(zip(names, total(torch.stack([self.sums[name] for name in names])).tolist(), strict=True))
        passes, values = sums.pop("passes", 0.0), {"tokens_per_second": round(sums.pop("tokens") / wall, 1)}
        for name, value in sums.items():
            values[name] = round(value / (passes if name.startswith("std") else steps), 4)
        if self.attachment is not None:
            values["alpha"] = round(float(self.attachment.module.alpha), 4)
            in_steps, in_bottleneck = _seconds(self.steps), _seconds(self.passes)
            values["bottleneck_share"] = round(in_bottleneck / in_steps, 4)
        self._clear()
        return values

    def _enters(self, module: FusedIB, args: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self.entered = self.clock.mark()
            last = args[0] if args[0].requires_grad else module.weight_in
            last.register_hook(self._backward_ends)

    def _leaves(self, module: FusedIB, args: tuple[Tensor, ...], output: FusedIBOutput) -> None:
        if module.training and torch.is_grad_enabled():
            self.passes.append((self.entered, self.clock.mark()))
            output.hidden_states.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        self.entered = self.clock.mark()

    def _backward_ends(self, gradient: Tensor) -> None:
        self.passes.append((self.entered, self.clock.mark()))


def _seconds(intervals: list[tuple[Mark, Mark]]) -> float:
    return sum(end() - begin() for begin, end in intervals)
