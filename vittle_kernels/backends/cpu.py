"""The C++ kernels on CPU tensors, with AVX-512, AVX2 or baseline instructions chosen at run time."""

from __future__ import annotations

import torch

from vittle_kernels.backends import native
from vittle_kernels.backends.native import backward, forward

__all__ = ["backward", "forward", "why_unavailable"]


def why_unavailable(device: torch.device | None) -> str | None:
    """None where the C++ kernels can serve tensors on the device (None: on a device of their own)."""
    if device is not None and device.type != "cpu":
        return "it runs on CPU tensors only"
    return native.why_not_built()
