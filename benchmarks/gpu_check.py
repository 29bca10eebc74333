"""All that only a GPU can show, in stages of minutes that merge into one file: ``make gpu-check STAGE=...``.

    python benchmarks/gpu_check.py build|test|sanitize|op|layer|step|plot [--minutes 7] [--output benchmarks/results]

It runs with the interpreter's own packages and no network. A stage ends before its minutes do; run again, it goes on
where it stopped. The file is ``OUTPUT/<gpu>.json``, in pytest-benchmark's format; the plot and the log of the commands
lie beside it. Exit status: 0 all done, 1 a check failed or a kernel is wrong, 3 run the stage again.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_fused_ib
import bench_layer
import bench_step
import torch
from contenders import contenders, make_inputs
from records import Entry, Results, machine, one_line
from report import table
from roofline import draw_roofline
from static_cost import count

from vittle_kernels import available_backends

ROOT = Path(__file__).parents[1]
INCOMPLETE = 3
NOTHING_SELECTED = 5
"""pytest's exit status."""

GOAL = 16384
TOKENS, WIDTHS = (GOAL, 2048, 8192, 65536), (4096, 5120)
"""2k to 64k tokens at the widths of 7B and 13B models; the goals are set at the first."""

MOST_HOST_NOISE = GOAL * 4096
"""Elements whose noise a host draws in about a second, as the released code does."""


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
        checks = check.results.content["checks"]
        checks.pop(item.name, None)
        try:
            item.run()
        except subprocess.TimeoutExpired:
            print(f"{place}: cut off; run the stage again, with more --minutes if it is cut off again")
            return INCOMPLETE
        except Exception as error:  # out of memory, a kernel that does not compile, ...: the next item may do
            traceback.print_exc()
            checks[item.name] = {"passed": False, "detail": one_line(error), "machine": check.facts}
        gc.collect()  # a model stays in cycles
        torch.cuda.empty_cache()
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
    expected: Callable[[int, str], bool] = lambda status, output: status == 0,
    detail: Callable[[str], str] = lambda text: text.strip().rpartition("\n")[2],
    environment: dict[str, str] | None = None,
) -> None:
    begin = time.monotonic()
    log = check.results.path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        file.write(f"\n== {key}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(max(1.0, check.seconds_left))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        file.seek(start)
        output = file.read()
    passed, text = expected(process.returncode, output), detail(output)
    check.results.content["checks"][key] = {
        "passed": passed, "detail": text, "seconds": time.monotonic() - begin, "machine": check.facts,
    }  # fmt: skip
    print(text if passed else output[-6000:])


def build(check: Check) -> list[Item]:
    """Builds the extension with the compiler and packages that are there, and counts its machine code."""
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    loads = "from vittle_kernels import available_backends as a; r = a(); print(r); assert not r['cuda'], r['cuda']"
    arch = int(check.facts.get("compute_capability", "9.0").replace(".", ""))

    def static() -> None:
        rows = [asdict(row) for row in count([arch], ["bfloat16", "float32"])]
        check.results.content["static"] = {"commit": check.facts["commit"], "rows": rows}

    is_counted = check.results.content.get("static", {}).get("commit") == check.facts["commit"]
    install_item = command_item("build", "install", install, check)
    return [
        replace(install_item, is_done=available_backends()["cuda"] is None),  # the file may come from another machine
        command_item("build", "the CUDA kernels load", [sys.executable, "-c", loads], check),
        Item("machine code", is_counted, static),
    ]


def test(check: Check) -> list[Item]:
    """The tests of the kernels that a GPU runs, its own first; then those of the methods, on the CPU."""
    names = [f"tests/kernels/test_{name}.py" for name in ("gpu", "op", "noise", "approx", "autograd", "layer")]
    names += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/vittle/test_*.py"))]
    items = []
    for name in names:
        report = Path(tempfile.gettempdir()) / f"gpu-check-{Path(name).stem}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", f"--junit-xml={report}", name]
        environment = {"HF_HUB_OFFLINE": "1"}
        if "vittle" in name:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        options: dict[str, Any] = {"detail": partial(_counts, report), "environment": environment}
        options["expected"] = lambda status, output: status in (0, NOTHING_SELECTED)
        items.append(command_item("test", name, command, check, **options))
    return items


def _counts(report: Path, output: str) -> str:
    if not report.exists():
        return output.strip().rpartition("\n")[2]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    report.unlink()
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    return ", ".join(f"{value} {name}" for name, value in counts.items())


def sanitize(check: Check) -> list[Item]:
    """compute-sanitizer over the CUDA kernels; first it must find a planted fault."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        raise SystemExit("compute-sanitizer is not installed; the CUDA toolkit has it")
    program = [sys.executable, "benchmarks/sanitized.py"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def command(name: str) -> list[str]:
        options = ["--tool", name, "--error-exitcode", "9", "--target-processes", "application-only"]
        if name == "memcheck":  # torch probes the driver for functions that it may lack
            options += ["--report-api-errors", "no"]
        return [tool, *options, *program]

    def found(status: int, output: str) -> bool:
        return status != 0 and "Invalid __global__ write" in output

    planted = [*command("memcheck"), "--planted"]
    return [
        command_item("sanitize", "a planted fault is found", planted, check, expected=found, environment=environment),
        *(command_item("sanitize", name, command(name), check, environment=environment)
          for name in ("memcheck", "racecheck")),
    ]  # fmt: skip


def op(check: Check) -> list[Item]:
    """forward, backward and both, by every contender; the widths and sizes that matter most come first."""
    entrants, check.results.content["not_timed"] = contenders(check.device, compiled=not check.smoke)

    def run(dtype: torch.dtype, rows: int, width: int, prior: bool) -> None:
        torch._dynamo.reset()  # it compiles for one shape, and for eight of them at most
        inputs = make_inputs(rows, width, dtype, prior, check.device)
        here = [each for each in entrants if not each.draws_on_host or rows * width <= MOST_HOST_NOISE]
        check.results.add(bench_fused_ib.compare(here, inputs, 3 if check.smoke else 15, check.facts))

    problems = [each for each in _grid(check) for each in ((*each, False), (*each, True))]
    problems = [each for each in problems if not each[3] or each[1] == GOAL or check.smoke]
    return [_measured("op", each, check, partial(run, *each)) for each in problems]


def layer(check: Check) -> list[Item]:
    """The whole layer, heads included; torch.compile, which takes its time, at one size."""

    def run(dtype: torch.dtype, rows: int, width: int, prior: bool) -> None:
        torch._dynamo.reset()
        turns, compiled = (2, False) if check.smoke else (9, rows == GOAL)
        check.results.add(bench_layer.compare(rows, width, dtype, check.device, turns, check.facts, compiled))

    return [_measured("layer", (*each, False), check, partial(run, *each, False)) for each in _grid(check)]


def _grid(check: Check) -> list[tuple[torch.dtype, int, int]]:
    """Half precision before fp32, 4096 columns before 5120."""
    widths, tokens = ((256,), (64,)) if check.smoke else (WIDTHS, TOKENS)
    return [(dtype, rows, width) for dtype in (torch.bfloat16, torch.float32) for width in widths for rows in tokens]


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
    work = bench_step.SMALL if check.smoke else bench_step.Workload()
    dtype, turns = (torch.float32, 2) if check.smoke else (torch.bfloat16, 15)

    def run(tuning: str) -> None:
        check.results.add(bench_step.compare(work, tuning, dtype, check.device, turns, check.facts))

    def done(tuning: str) -> bool:
        problem = {"benchmark": "step", "tuning": tuning, "layers": work.shape.layers}
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
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing new is begun (7)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="(benchmarks/results)")
    parser.add_argument("--commit", help="of this copy, where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU too: does it run at all?")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        parser.error("there is no CUDA device (--smoke runs on the CPU)")
    needs_kernels = options.stage in ("sanitize", "op", "layer", "step") and not options.smoke
    if needs_kernels and (reason := available_backends()["cuda"]):
        parser.error(f"the CUDA kernels are not there ({reason}); run the stage build first")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine(device, options.commit)
    if facts["commit"] is None:
        parser.error("git does not know this copy's commit; name it with --commit")
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
    return status or (1 if failed or results.failures else 0)


if __name__ == "__main__":
    raise SystemExit(main())
