"""All that only a GPU can show, in stages of minutes that merge into one file: ``make gpu-check STAGE=...``.

    python benchmarks/gpu_check.py build|test|sanitize|op|layer|step|plot [--minutes 8] [--output benchmarks/results]

It runs with the interpreter's own packages and no network. A stage ends before its minutes do; run again, it goes on
where it stopped. The file is ``OUTPUT/<gpu>.json``, in pytest-benchmark's format; the plot lies beside it. Exit status:
0 all done, 1 a check failed or a kernel is wrong, 3 run the stage again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_fused_ib
import bench_layer
import bench_step
import torch
from contenders import contenders, make_inputs
from records import Entry, Results, machine
from report import table
from roofline import draw_roofline
from static_cost import count

ROOT = Path(__file__).parents[1]
INCOMPLETE = 3
TOKENS, WIDTHS = (2048, 8192, 16384, 65536), (4096, 5120)
"""2k to 64k tokens at the widths of 7B and 13B models."""


@dataclass
class Check:
    """One run of ``make gpu-check``: where, until when, and what it is at."""

    results: Results
    facts: Entry
    device: torch.device
    deadline: float
    smoke: bool

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Item:
    """The smallest piece of a stage, which is run as a whole and saved."""

    name: str
    is_done: bool
    run: Callable[[], None]


def run_stage(items: Sequence[Item], check: Check) -> int:
    """Runs what is not done yet, while there is time."""
    for number, item in enumerate(items, 1):
        place = f"[{number}/{len(items)}] {item.name}"
        if item.is_done:
            print(f"{place}: done before")
            continue
        if check.seconds_left <= 0:
            print(f"{place}: no time left; run the stage again to go on")
            return INCOMPLETE
        print(place, flush=True)
        begin = time.monotonic()
        try:
            item.run()
        except subprocess.TimeoutExpired:
            print(f"{place}: cut off; run the stage again, with more --minutes if it is cut off again")
            return INCOMPLETE
        except torch.OutOfMemoryError as error:
            reason = " ".join(str(error).split())
            check.results.content["checks"][item.name] = {"passed": False, "detail": reason, "machine": check.facts}
        check.results.save(check.facts)
        print(f"{place}: {time.monotonic() - begin:.0f} s", flush=True)
    return 0


def command_item(stage: str, name: str, command: Sequence[str], check: Check, **options: Any) -> Item:
    """A command that must succeed; its outcome is kept under "checks"."""
    key = f"{stage}: {name}"
    old = check.results.content["checks"].get(key)
    is_done = old is not None and old["passed"] and old["machine"]["commit"] == check.facts["commit"]
    return Item(name, is_done, partial(_run_command, key, command, check, **options))


def _run_command(
    key: str,
    command: Sequence[str],
    check: Check,
    expected: Callable[[subprocess.CompletedProcess[str]], bool] = lambda result: result.returncode == 0,
    detail: Callable[[str], str] = lambda text: text.strip().rpartition("\n")[2],
    environment: dict[str, str] | None = None,
) -> None:
    begin = time.monotonic()
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | (environment or {}), timeout=max(1.0, check.seconds_left),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    passed = expected(result)
    check.results.content["checks"][key] = {
        "passed": passed, "detail": detail(result.stdout), "seconds": time.monotonic() - begin,
        "machine": check.facts,
    }  # fmt: skip
    print(result.stdout[-2000:] if not passed else detail(result.stdout))


def build(check: Check) -> list[Item]:
    """Builds the extension with the compiler and packages that are there, and counts its machine code."""
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    loads = "from vittle_kernels import available_backends as a; r = a(); print(r); assert not r['cuda'], r['cuda']"
    arch = int(check.facts.get("compute_capability", "9.0").replace(".", ""))

    def static() -> None:
        rows = [asdict(row) for row in count([arch], ["bfloat16", "float32"])]
        check.results.content["static"] = {"commit": check.facts["commit"], "rows": rows}

    counted = check.results.content.get("static", {}).get("commit") == check.facts["commit"] is not None
    return [
        command_item("build", "install", install, check),
        command_item("build", "the CUDA kernels load", [sys.executable, "-c", loads], check),
        Item("machine code", counted, static),
    ]


def test(check: Check) -> list[Item]:
    """Every test file of the kernels, the GPU's own among them, and those of the methods."""
    items = []
    for path in sorted((*ROOT.glob("tests/kernels/test_*.py"), *ROOT.glob("tests/vittle/test_*.py"))):
        name = str(path.relative_to(ROOT))
        report = Path(tempfile.gettempdir()) / f"gpu-check-{path.stem}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junit-xml={report}", name]
        items.append(command_item("test", name, command, check, detail=partial(_counts, report)))
    return items


def _counts(report: Path, output: str) -> str:
    if not report.exists():
        return output.strip().rpartition("\n")[2]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    report.unlink()
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")} if suite else {}
    return ", ".join(f"{value} {name}" for name, value in counts.items())


def sanitize(check: Check) -> list[Item]:
    """compute-sanitizer over the CUDA kernels; first it must find a planted fault."""
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not installed; the CUDA toolkit has it")
    program = [sys.executable, "benchmarks/sanitized.py"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def command(tool: str) -> list[str]:
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]

    def found(result: subprocess.CompletedProcess[str]) -> bool:
        return result.returncode == 9 and "Invalid __global__ write" in result.stdout

    planted = [*command("memcheck"), "--planted"]
    return [
        command_item("sanitize", "a planted fault is found", planted, check, expected=found, environment=environment),
        *(command_item("sanitize", tool, command(tool), check, environment=environment)
          for tool in ("memcheck", "racecheck", "initcheck")),
    ]  # fmt: skip


def op(check: Check) -> list[Item]:
    """forward, backward and both, by every contender."""
    entrants, check.results.content["not_timed"] = contenders(check.device, compiled=not check.smoke)
    grid = [(*each, False) for each in itertools.product(*_grid(check))]
    learnable = [(*each[:3], True) for each in grid if each[1] == 16384 or check.smoke]

    def run(dtype: torch.dtype, rows: int, width: int, prior: bool) -> None:
        torch._dynamo.reset()  # it compiles for one shape, and for eight of them at most
        inputs = make_inputs(rows, width, dtype, prior, check.device)
        check.results.add(bench_fused_ib.compare(entrants, inputs, 3 if check.smoke else 15, check.facts))

    return [_measured("op", each, check, partial(run, *each)) for each in (*grid, *learnable)]


def layer(check: Check) -> list[Item]:
    """The whole layer, heads included."""

    def run(dtype: torch.dtype, rows: int, width: int, prior: bool) -> None:
        torch._dynamo.reset()
        turns = 2 if check.smoke else 9
        check.results.add(
            bench_layer.compare(rows, width, dtype, check.device, turns, check.facts, compiled=not check.smoke)
        )

    grid = [(*each, False) for each in itertools.product(*_grid(check))]
    return [_measured("layer", each, check, partial(run, *each)) for each in grid]


def _grid(check: Check) -> tuple[Sequence[torch.dtype], Sequence[int], Sequence[int]]:
    tokens, widths = ((64,), (256,)) if check.smoke else (TOKENS, WIDTHS)
    return (torch.bfloat16, torch.float32), tokens, widths


def _measured(benchmark: str, of: tuple[torch.dtype, int, int, bool], check: Check, run: Callable[[], None]) -> Item:
    dtype, rows, width, prior = of
    problem = {
        "benchmark": benchmark, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "width": width,
        "prior": "learnable" if prior else "fixed",
    }  # fmt: skip
    name = " ".join(str(value) for value in problem.values())
    return Item(name, check.results.has(problem, check.facts["commit"]), run)


def step(check: Check) -> list[Item]:
    """Forward + backward and the optimizer's step of a LLaVA-1.5-7B-shaped model."""
    shape = bench_step.SMALL if check.smoke else bench_step.Shape()
    dtype, turns = (torch.float32, 2) if check.smoke else (torch.bfloat16, 7)

    def run(tuning: str) -> None:
        check.results.add(bench_step.compare(shape, tuning, dtype, check.device, turns, check.facts))

    def done(tuning: str) -> bool:
        problem = {"benchmark": "step", "tuning": tuning, "layers": shape.layers}
        return check.results.has(problem, check.facts["commit"])

    return [Item(tuning, done(tuning), partial(run, tuning)) for tuning in bench_step.TUNINGS]


STAGES: dict[str, Callable[[Check], list[Item]]] = {
    "build": build, "test": test, "sanitize": sanitize, "op": op, "layer": layer, "step": step, "plot": lambda check: []
}  # fmt: skip


def tables(results: Results, stage: str) -> Iterator[str]:
    """What a stage measured."""
    timed = Results(results.path)
    timed.content |= results.content
    for kind in ("benchmarks", "failures"):
        timed.content[kind] = [each for each in results.content[kind] if each["params"]["benchmark"] == stage]
    if not timed.benchmarks and not timed.failures:
        return
    if stage == "step":
        yield table(timed, "A step of a LLaVA", ("forward_backward", "optimizer"), "peak_bytes", baseline="plain")
        yield bench_step.summary(timed)
    else:
        yield table(timed, "fused_ib" if stage == "op" else "FusedIB, heads included,")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="All that only a GPU can show, in stages that merge into one file.")
    parser.add_argument("stage", choices=tuple(STAGES), help="build first; plot draws again what there is")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun (8)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="(benchmarks/results)")
    parser.add_argument("--commit", help="of this copy, where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU too: does it run at all?")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        parser.error("there is no CUDA device (--smoke runs on the CPU)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine(device, options.commit)
    slug = re.sub(r"[^a-z0-9]+", "-", facts.get("gpu", "cpu").lower()).strip("-")
    results = Results.load(options.output / f"{slug}.json")
    check = Check(results, facts, device, time.monotonic() + 60 * options.minutes, options.smoke)
    status = run_stage(STAGES[options.stage](check), check)
    for text in tables(results, options.stage):
        print(f"\n{text}")
    if options.stage in ("op", "plot"):
        draw_roofline(results, results.path.with_suffix(".png"))
    failed = [name for name, each in results.content["checks"].items() if not each["passed"]]
    for name in failed:
        print(f"FAILED {name}: {results.content['checks'][name]['detail']}")
    return 1 if failed or results.failures else status


if __name__ == "__main__":
    raise SystemExit(main())
