"""What the GPU kernels cost by their machine code, with no GPU: compiles them, counts, and bounds their speed.

    python benchmarks/static_cost.py [--arch 80 90 100] [--dtype bfloat16] [--json FILE]

The first table has what a thread's hot loop executes and accesses for an element (benchmarks/sass.py says how that is
counted; a learnable prior's bytes come from a cache). The second has, for each GPU, the time of an element on each of
its pipes over the time that memory needs, all at peak rates: above 100 %, a kernel cannot keep its memory busy.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sass import PIPES, Cost, read_costs

CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
CUDA_TYPES = {"bfloat16": "vittle::BFloat16", "float32": "float"}
TRITON_TYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
ARCHITECTURES = (80, 90, 100)
ELEMENTS = 8  # of a row, that a thread handles in a turn: csrc/cuda's kVector; Triton's block over its threads

MOVED = {"forward": 4, "backward": 6}
"""Forward reads h, mu, s and writes out; backward reads g, mu, s and writes dh, dmu, ds."""


@dataclass(frozen=True)
class Gpu:
    """From the data sheets: lanes a clock and multiprocessor of each pipe, boost clock, peak memory rate."""

    name: str
    arch: int
    multiprocessors: int
    gigahertz: float
    terabytes: float
    lanes: dict[str, int]


_LANES = {"issue": 128, "float": 128, "integer": 64, "logic": 64, "special": 16}
GPUS = (
    Gpu("A100", 80, 108, 1.41, 2.04, _LANES | {"float": 64}),
    Gpu("H100", 90, 132, 1.98, 3.35, _LANES),
    Gpu("H200", 90, 132, 1.98, 4.8, _LANES),
    Gpu("B200", 100, 148, 1.965, 8.0, _LANES),
)


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture; counts are for an element."""

    kernel: str
    backend: str
    arch: int
    dtype: str
    prior: str
    registers: int
    local_bytes: int
    local_accesses: int
    loads_in_flight: int
    widths: list[int]
    instructions: float
    bytes: float
    pipes: dict[str, float]


def _row(kernel: str, backend: str, arch: int, dtype: str, prior: bool, cost: Cost) -> Row:
    pipes = {name: cost.pipe(name) for name in PIPES}
    return Row(
        *(kernel, backend, arch, dtype, "learnable" if prior else "fixed"),
        *(cost.registers, cost.local_bytes, cost.local_accesses, cost.loads_in_flight, cost.widths),
        *(cost.instructions, cost.bytes, pipes),
    )


def cuda_rows(arch: int, dtype: str, folder: Path) -> Iterator[Row]:
    """The aligned kernels of csrc/cuda, as nvcc compiles them."""
    for kernel in ("forward", "backward"):
        cubin = folder / f"{kernel}-{arch}.cubin"
        if not cubin.exists():
            command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-o", cubin, CSRC / f"{kernel}.cu"]
            subprocess.run(command, check=True)
        pair = f"{CUDA_TYPES[dtype]}, {CUDA_TYPES[dtype]}"
        for name, cost in read_costs(cubin, ELEMENTS).items():
            if found := re.search(rf"::(\w+)_kernel<{pair}, (?:(true|false), )?true>", name):
                learned = found[1] == "backward_prior" or found[2] == "true"
                yield _row(kernel, "cuda", arch, dtype, learned, cost)


def triton_rows(arch: int, dtype: str, folder: Path) -> Iterator[Row]:
    """The Triton kernels, specialized as they are for aligned tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vittle_kernels.backends import triton as kernels

    types = {"rows": "*i64", "offsets": "*i32", "seed": "*i64", "bound": "fp32"}
    types |= dict.fromkeys(("groups", "tokens", "width", "columns"), "i32")
    types |= dict.fromkeys(
        ("hidden", "posterior", "out", "grad_out", "grad_hidden", "grad_posterior"), TRITON_TYPES[dtype]
    )

    def type_of(name: str) -> str:
        return types.get(name) or ("i64" if name.endswith(("inner", "stride")) else "*fp32")

    for prior in (False, True):
        flags = {"ONE_LEVEL": True, "HAS_ROWS": True, "HAS_PRIOR": prior, "BLOCK": 1024}
        for kernel, constants in (
            (kernels._forward_kernel, flags),
            (kernels._backward_kernel, flags | {"NEED_HIDDEN": True, "ROWS": kernels.ROWS_PER_BLOCK}),
            (kernels._sum_partials_kernel, {"BLOCK": 128, "ROWS": kernels.ROWS_PER_BLOCK}),
        ):
            signature = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
            multiples = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or "stride" in name]
            multiples.append(kernel.arg_names.index("width" if "width" in kernel.arg_names else "columns"))
            attributes = {(i,): [["tt.divisibility", 16]] for i in multiples}
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernels._LAUNCH)
            cubin = folder / f"triton-{arch}-{dtype}-{prior}-{kernel.__name__}.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            for cost in read_costs(cubin, ELEMENTS).values():
                yield _row(kernel.__name__.split("_")[1], "triton", arch, dtype, prior, cost)


def count(architectures: Sequence[int], dtypes: Sequence[str]) -> list[Row]:
    """Every kernel for every architecture; CUDA's where nvcc is."""
    sources = [triton_rows] + ([cuda_rows] if shutil.which("nvcc") else [])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        tasks = [
            pool.submit(lambda source=source, arch=arch: [r for d in dtypes for r in source(arch, d, Path(folder))])
            for source in reversed(sources)
            for arch in architectures
        ]
        rows = [row for task in tasks for row in task.result()]
    return sorted(rows, key=lambda r: (r.dtype, r.arch, r.kernel != "forward", r.prior, r.backend))


def shares(row: Row, gpu: Gpu) -> dict[str, float]:
    """The time that each pipe needs for an element over the time that memory needs for it."""
    memory = MOVED[row.kernel] * (2 if row.dtype == "bfloat16" else 4) / (gpu.terabytes * 1e12)
    counts = {"issue": row.instructions} | row.pipes
    rate = gpu.multiprocessors * gpu.gigahertz * 1e9
    return {name: counts[name] / (rate * lanes) / memory for name, lanes in gpu.lanes.items()}


def tables(rows: Sequence[Row]) -> str:
    """Both tables, in 80 columns."""
    form = "{:<37}{:>5}{:>6}{:>6}{:>8}{:>9}{:>8}"
    lines = [form.format("", "regi-", "local", "loads", "access", "instr. /", "bytes /")]
    lines.append(form.format("", "sters", "bytes", "ahead", "widths", "element", "element"))
    for row in rows:
        counts = f"{row.instructions:.1f}", f"{row.bytes:.1f}"
        widths = ",".join(map(str, row.widths))
        lines.append(form.format(_title(row), row.registers, row.local_bytes, row.loads_in_flight, widths, *counts))
    lines += ["", f"{'over the time of memory':<36}" + "".join(f"{name:>8}" for name in _LANES)]
    for gpu in GPUS:
        for row in rows:
            if row.arch == gpu.arch:
                percents = "".join(f"{100 * share:>7.0f}%" for share in shares(row, gpu).values())
                lines.append(f"{gpu.name + ' ' + _title(row, arch=False):<36}{percents}")
    return "\n".join(lines)


def _title(row: Row, arch: bool = True) -> str:
    short = {"bfloat16": "bf16", "float32": "fp32"}[row.dtype]
    where = f"sm_{row.arch} " if arch else ""
    return f"{where}{row.backend} {row.kernel} {short} {row.prior}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the GPU kernels cost by their machine code, with no GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities (80 90 100)")
    parser.add_argument(
        "--dtype", choices=CUDA_TYPES, nargs="+", default=["bfloat16"], help="of all tensors (bfloat16)"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    rows = count(options.arch, options.dtype)
    print(tables(rows))
    if not shutil.which("nvcc"):
        print("\nnot counted: the CUDA kernels, for want of nvcc")
    if options.json:
        records: list[dict[str, Any]] = [asdict(row) for row in rows]
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
