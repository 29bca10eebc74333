"""Times steps that take turns, and counts the memory that they need."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")

SLOW = 0.5
"""A step that takes longer than this many seconds, with what goes before it, takes three turns only."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""

HEAD_START = 10_000_000
"""Clock cycles, about 5 ms, that a GPU sleeps before a step: the host is well ahead of it when it begins."""


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
        flush = torch.zeros(2**28, dtype=torch.uint8, device=device)

        def elapsed(step: Step) -> float:
            step.before()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.any()  # read, so that no line is left to be written back
            torch.cuda._sleep(HEAD_START)
            begin.record()
            step.run()
            end.record()
            end.synchronize()
            return 1e-3 * begin.elapsed_time(end)

    return elapsed


def take_turns(
    steps: Mapping[Key, Step], device: torch.device, turns: int, slow: float = SLOW
) -> dict[Key, list[float]]:
    """Each step's times in seconds, after two turns of warm-up: whatever else the machine does meets them all."""
    elapsed = stopwatch(device)
    times: dict[Key, list[float]] = {key: [] for key in steps}
    longest = dict.fromkeys(steps, 0.0)
    for turn in range(turns + 2):
        for key, step in steps.items():
            if longest[key] > slow and (turn == 1 or len(times[key]) == 3):
                continue
            begin = time.monotonic()
            seconds = elapsed(step)
            if turn >= 1:
                longest[key] = max(longest[key], time.monotonic() - begin)
            if turn >= 2:
                times[key].append(seconds)
    return times


def added_share(seconds: Sequence[float], plain: Sequence[float]) -> float:
    """What a contender adds to the plain step: the median of the turns' own, as both meet the same machine."""
    return statistics.median(each / other - 1 for each, other in zip(seconds, plain, strict=True))


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next step. It gives it back to the system or not by what happens to lie
    above it: 2,800 page faults in a step of the demo's model with the bottleneck, none without.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(setting, 1 << 30)


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
    for _ in range(2):  # the first time compiles
        step.before()
        torch.cuda.reset_peak_memory_stats(device)
        step.run()
    return torch.cuda.max_memory_allocated(device)
