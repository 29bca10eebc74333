"""Times the image shifts on a photograph of 336x336, each at all severities; saves ``shifts.json``.

    python benchmarks/bench_shifts.py [--turns 5] [--processes 2] [--output runs/bench]

Every process has one thread, as the workers of a DataLoader should. A kind's time is its processor's, which other load
hardly changes; images a second are all images, as many of each kind, over all time on the clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import textwrap
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import cv2
from PIL import Image
from records import machine, where
from sklearn.datasets import load_sample_image
from torch import device

from vittle.shifts.image import IMAGE_SHIFTS, SEVERITIES, image_shift

SIDE = 336  # LLaVA-v1.5's


class Seconds(NamedTuple):
    """For an image, on average."""

    clock: float
    processor: float


Measured = dict[str, Seconds]
"""By kind."""


def average(kind: str, image: Image.Image, turns: int) -> Seconds:
    """Every turn has its own seed and all severities."""
    begin = time.perf_counter(), time.process_time()
    for seed in range(turns):
        for severity in SEVERITIES:
            image_shift(image, kind, severity, seed=seed)
    images = turns * len(SEVERITIES)
    return Seconds((time.perf_counter() - begin[0]) / images, (time.process_time() - begin[1]) / images)


def work(image: Image.Image, turns: int, start: Barrier) -> Measured:
    """All kinds, after a turn of warm-up and once all processes are ready."""
    cv2.setNumThreads(1)
    for kind in IMAGE_SHIFTS:
        average(kind, image, 1)
    start.wait()
    return {kind: average(kind, image, turns) for kind in IMAGE_SHIFTS}


def measure(processes: int, image: Image.Image, turns: int) -> list[Measured]:
    """What each process measures while all of them work."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        return pool.starmap(work, [(image, turns, manager.Barrier(processes))] * processes, chunksize=1)


def rate(measured: Sequence[Measured]) -> float:
    """Images a second of all processes together."""
    return sum(len(each) / sum(seconds.clock for seconds in each.values()) for each in measured)


def main(arguments: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(description="Times the image shifts.")
    command.add_argument("--turns", type=int, default=5, help="seeds that each kind and severity is timed with (5)")
    command.add_argument("--processes", type=int, default=2, help="that work at once, after one alone (2)")
    command.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder to write to (runs/bench)")
    options = command.parse_args(arguments)
    image = Image.fromarray(load_sample_image("china.jpg")).resize((SIDE, SIDE))

    alone = measure(1, image, options.turns)
    together = measure(options.processes, image, options.turns)
    milliseconds = {kind: 1e3 * seconds.processor for kind, seconds in alone[0].items()}
    slowest = max(milliseconds, key=lambda kind: milliseconds[kind])
    rates = {1: rate(alone), options.processes: rate(together)}

    facts = machine(device("cpu"))
    print(*textwrap.wrap(f"Image shifts, {SIDE}x{SIDE} RGB, on {where(facts)}", 80), sep="\n")
    print(f"OpenCV {cv2.__version__}, commit {facts['commit']}\n")
    print(f"{'':<20}{'ms an image, one core':>24}{'images a second':>20}")
    for kind, each in milliseconds.items():
        print(f"{kind:<20}{each:>24.2f}{1e3 / each:>20.0f}")
    print()
    for count, images in rates.items():
        print(f"{f'all kinds, {count} process' + 'es' * (count > 1):<44}{images:>20.0f}")
    print(f"the slowest kind is {slowest}")

    results = {"machine": facts, "side": SIDE, "milliseconds": milliseconds, "images_per_second": rates}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "shifts.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
