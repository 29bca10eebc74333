"""Every kernel compiles for the GPUs that the package names, with no GPU here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

INSTRUCTIONS = {
    ("cuda", "forward", "fixed"): 34,
    ("cuda", "backward", "fixed"): 38,
    ("cuda", "forward", "learnable"): 42,
    ("triton", "forward", "fixed"): 55,
    ("triton", "backward", "fixed"): 65,
}
"""At most, for an element on sm_90 in bf16."""


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel compiled for every architecture, in a process where Triton does not interpret."""
    pytest.importorskip("triton")
    output = tmp_path_factory.mktemp("costs") / "costs.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCHMARKS / "static_cost.py", "--dtype", "bfloat16", "float32", "--json", output]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert max(map(len, result.stdout.splitlines())) <= 80
    return json.loads(output.read_text())


def test_every_kernel_compiles_for_every_architecture(costs: list[dict[str, Any]]) -> None:
    backends = {"triton"} | ({"cuda"} if shutil.which("nvcc") else set())
    kernels = [tuple(row[key] for key in ("backend", "kernel", "arch", "dtype", "prior")) for row in costs]
    expected = product(
        backends, ("forward", "backward"), (80, 90, 100), ("bfloat16", "float32"), ("fixed", "learnable")
    )
    assert sorted(kernels) == sorted(expected)


def test_nothing_spills(costs: list[dict[str, Any]]) -> None:
    assert not any(row["local_bytes"] or row["local_accesses"] for row in costs)


def test_accesses_are_wide_and_early(costs: list[dict[str, Any]]) -> None:
    """16 bytes each, three loads under way before one is waited for; the sum over rows also reads what a row has."""
    for row in costs:
        if row["kernel"] == "forward" or (row["backend"], row["prior"]) == ("cuda", "fixed"):
            assert row["widths"] == [16] and row["loads_in_flight"] >= 3, row
        else:
            assert max(row["widths"]) == 16 and min(row["widths"]) >= 4, row


def test_instructions_an_element(costs: list[dict[str, Any]]) -> None:
    counted = {
        key: row["instructions"]
        for row in costs
        if (row["arch"], row["dtype"]) == (90, "bfloat16")
        and (key := (row["backend"], row["kernel"], row["prior"])) in INSTRUCTIONS
    }
    assert len(counted) == (5 if shutil.which("nvcc") else 2)
    assert {key: count for key, count in counted.items() if count > INSTRUCTIONS[key]} == {}


def test_import_touches_no_gpu_and_compiles_nothing() -> None:
    code = """
import sys, torch
import vittle_kernels
assert not torch.cuda.is_initialized()
assert "transformers" not in sys.modules and "vittle" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_import_needs_neither_triton_nor_the_library() -> None:
    code = """
import sys
sys.modules["triton"] = None
sys.modules["vittle_kernels._native"] = None
import torch
from vittle_kernels import available_backends, fused_ib
reasons = available_backends()
assert "triton is not installed" in reasons["triton"], reasons
assert "the C++ library is not built" in reasons["cpu"] and "the C++ library is not built" in reasons["cuda"]
out, kl = fused_ib(torch.zeros(2, 4), torch.zeros(2, 8), 0.5)
assert out.shape == (2, 4)
try:
    fused_ib(torch.zeros(2, 4), torch.zeros(2, 8), 0.5, backend="cpu")
except RuntimeError as error:
    assert "backend 'cpu' cannot serve tensors on cpu: the C++ library is not built" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_diagnosis() -> None:
    result = subprocess.run([sys.executable, "-m", "vittle_kernels"], capture_output=True, text=True, check=True)
    for word in ("torch", "triton", "CPU instructions", "CUDA kernels", "eager   available"):
        assert word in result.stdout


def test_what_the_jit_would_launch_compiles(tmp_path: Path) -> None:
    """On a GPU Triton specialises a kernel to its arguments: one token, one group, no offsets, a width of 1."""
    pytest.importorskip("triton")
    program = Path(__file__).with_name("jit_specialised.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(program.parent)}
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.splitlines()) == 13
