"""Every CUDA kernel once over small odd problems, for compute-sanitizer to watch; results are the tests' business.

    compute-sanitizer --tool memcheck python benchmarks/sanitized.py
    compute-sanitizer --tool memcheck python benchmarks/sanitized.py --planted   # must be found

Set ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``: a tensor is then an allocation, and a byte past it shows.
"""

from __future__ import annotations

import itertools
import sys

import torch

from vittle_kernels import fused_ib
from vittle_kernels.backends import native
from vittle_kernels.backends.problem import Problem

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 7), (5, 130), (33, 256), (70, 1024))
"""Tokens and columns: scalar and 16-byte accesses, whole and cut turns of a warp, one and several row blocks."""


def every_kernel(device: torch.device, backend: str) -> None:
    """Dtype pairs, sizes, strides of the posterior, a permutation, no prior, one prior, one for each of two groups."""
    for dtypes, (tokens, width), groups in itertools.product(itertools.product(FLOATS, FLOATS), SHAPES, (0, 1, 2)):
        hidden = torch.ones(tokens, width).to(device, dtypes[0]).requires_grad_()
        padded = torch.ones(tokens, 2 * width + 5).to(device, dtypes[1]).requires_grad_()
        prior = torch.ones(groups, 2 * width).to(device).requires_grad_() if groups else None
        offsets = torch.tensor([tokens // 2, tokens][-groups:], dtype=torch.int32).to(device) if groups else None
        rows = torch.arange(tokens - 1, -1, -1).to(device)
        for posterior in (padded[:, : 2 * width], padded[:, 5:], padded[:, 5:].contiguous()):
            out, kl = fused_ib(hidden, posterior, 0.5, prior=prior, rows=rows, offsets=offsets, seed=1, backend=backend)
            torch.autograd.backward((out, kl), (out.detach(), kl.detach()))


def planted(device: torch.device) -> None:
    """A result that is a row too short."""
    hidden, posterior = torch.ones(8, 256).to(device), torch.ones(8, 512).to(device)
    alpha, seed = torch.tensor(0.5).to(device), torch.tensor([1]).to(device)
    problem = Problem(posterior, alpha, None, None, None, seed, None)
    native.forward_into(problem, hidden, torch.empty_like(hidden[1:]), torch.empty_like(hidden[:, 0]))


if __name__ == "__main__":
    gpu = torch.device("cuda")
    planted(gpu) if "--planted" in sys.argv else every_kernel(gpu, "cuda")
    torch.cuda.synchronize()
