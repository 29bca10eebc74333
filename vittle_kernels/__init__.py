"""Fused kernels for the visual instruction bottleneck: sample, interpolation and KL in one pass."""

from vittle_kernels.backends import available_backends
from vittle_kernels.functional import FusedIBFunction, fused_ib
from vittle_kernels.layer import FusedIB, FusedIBOutput

__version__ = "0.1.0"

__all__ = ["FusedIB", "FusedIBFunction", "FusedIBOutput", "available_backends", "fused_ib"]
