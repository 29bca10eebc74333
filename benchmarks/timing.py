"""Times steps that take turns, and counts the memory that they need."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")

SLOW = 0.5
"""A step that takes longer than this many seconds takes three turns only."""


class Step(NamedTuple):
    """What is timed, and what happens before it, untimed."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def stopwatch(device: torch.device) -> Callable[[Step], float]:
    """Times a step in seconds; on a GPU by events, from a flushed L2, the host well ahead of it."""
    if device.type == "cpu":

        def elapsed(step: Step) -> float:
            step.before()
            begin = time.perf_counter()
            step.run()
            return time.perf_counter() - begin

    else:
        flush = torch.empty(2**30, dtype=torch.uint8, device=device)

        def elapsed(step: Step) -> float:
            step.before()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(4):
                flush.zero_()
            begin.record()
            step.run()
            end.record()
            end.synchronize()
            return 1e-3 * begin.elapsed_time(end)

    return elapsed


def take_turns(steps: Mapping[Key, Step], device: torch.device, turns: int) -> dict[Key, list[float]]:
    """Each step's times in seconds, after two turns of warm-up: whatever else the machine does meets them all."""
    elapsed = stopwatch(device)
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for turn in range(turns + 2):
        for key, step in steps.items():
            if turn < 2 or len(times[key]) < 3 or max(times[key]) < SLOW:
                seconds = elapsed(step)
                if turn >= 2:
                    times[key].append(seconds)
    return times


def kept_bytes(forward: Callable[[], object]) -> int:
    """What a forward pass keeps for backward, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = forward()
    del results  # until here it kept the storages, and so their addresses, apart
    return sum(storages.values())


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The most that is allocated on a GPU while a step runs, what stood there before included; None on a CPU."""
    if device.type == "cpu":
        return None
    step.before()
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    return torch.cuda.max_memory_allocated(device)
