"""The CUDA C++ kernels on CUDA tensors, on the device and stream that torch has current."""

from __future__ import annotations

import torch

from vittle_kernels.backends import native
from vittle_kernels.backends.native import backward, forward

__all__ = ["backward", "forward", "why_unavailable"]

_served: set[int] = set()
"""Devices that were found to work: every call of the op asks."""


def why_unavailable(device: torch.device | None) -> str | None:
    """None where the CUDA kernels can serve tensors on the device (None: on some device of this machine)."""
    if device is not None and device.type != "cuda":
        return "it runs on CUDA tensors only"
    if (reason := native.why_not_built()) is not None:
        return reason
    library = native.library()
    if library.cuda_architectures is None:
        return "built without CUDA (no nvcc, or VITTLE_CUDA=0): install the CUDA toolkit, then this package again"
    index = -1 if device is None or device.index is None else device.index
    if index not in _served:
        if reason := library.why_cuda_unavailable(index):
            return f"built for {library.cuda_architectures} with CUDA {library.cuda_version}, but: {reason}"
        _served.add(index)
    return None
