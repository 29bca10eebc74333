"""Run by test_ahead_of_time.py in a process of its own: compiles what the JIT would launch, with a driver that isn't.

Ahead of time all arguments have one type; the JIT makes a constant of an argument that is None or 1.
"""

from __future__ import annotations

import itertools

import torch
import triton
from support import FLOATS, make_inputs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vittle_kernels.backends import triton as backend
from vittle_kernels.backends.problem import Problem


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_both(
    tokens: int, width: int, groups: int, permuted: bool, bound: float | None = 2.3, **dtypes: object
) -> None:
    inputs = make_inputs(tokens, width, groups=groups, permuted=permuted, **dtypes)
    seed, alpha = torch.tensor([7]), torch.tensor(0.3)
    problem = Problem(inputs.posterior, alpha, inputs.prior, inputs.rows, inputs.offsets, seed, bound)
    backend.forward(problem, inputs.hidden)
    backend.backward(problem, inputs.grad_out, inputs.grad_kl, True)
    print(tokens, width, groups, permuted, dtypes or "")


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)
    for tokens, groups in itertools.product((1, 7), (0, 1, 3)):
        compile_both(tokens, 16, groups, permuted=groups == 1)
    for width in (1, 5, 130):
        compile_both(7, width, 3, permuted=True)
    compile_both(7, 16, 1, permuted=False, bound=None)
    for hidden, posterior in ((FLOATS[0], FLOATS[1]), (FLOATS[1], FLOATS[1]), (FLOATS[2], FLOATS[0])):
        compile_both(6, 72, 2, permuted=True, hidden_dtype=hidden, posterior_dtype=posterior)
