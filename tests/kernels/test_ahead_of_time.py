"""Every kernel compiles for the GPUs that the package names, with no GPU here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE_TRITON = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vittle_kernels.backends import triton as kernels

INTEGERS = {"rows": "*i64", "offsets": "*i32", "seed": "*i64"}
INTEGERS |= dict.fromkeys(("groups", "tokens", "width", "columns"), "i32")
STATE = {"hidden", "posterior", "out", "grad_out", "grad_hidden", "grad_posterior"}

def signature(kernel, constants, dtype):
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS:
            types[name] = INTEGERS[name]
        elif name in STATE:
            types[name] = dtype
        elif name == "bound":
            types[name] = "fp32"
        else:
            types[name] = "i64" if name.endswith(("inner", "stride")) else "*fp32"
    return types

for capability in (80, 90, 100):
    for dtype in ("*bf16", "*fp32"):
        for prior in (False, True):
            flags = {"HAS_ROWS": True, "HAS_PRIOR": prior, "BLOCK": 1024}
            for kernel, constants in (
                (kernels._forward_kernel, flags),
                (kernels._backward_kernel, flags | {"NEED_HIDDEN": True, "ROWS": 32}),
                (kernels._sum_partials_kernel, {"BLOCK": 128, "ROWS": 32}),
            ):
                source = ASTSource(kernel, signature(kernel, constants, dtype), constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels._LAUNCH)
                assert compiled.asm["cubin"].startswith(b"\\x7fELF")
                print(capability, dtype, prior, kernel.__name__)
"""


def test_triton_kernels() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE_TRITON], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 3 * 2 * 2 * 3


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
