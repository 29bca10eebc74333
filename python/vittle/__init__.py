"""Tuning that makes multimodal LLMs robust: Vittle, L2T and VPG-C on Hugging Face models."""

from vittle.errors import UserError
from vittle.methods.bottleneck import (
    BottleneckConfig,
    attach_bottleneck,
    detach_bottleneck,
    load_bottleneck,
    save_bottleneck,
)

__all__ = [
    "BottleneckConfig",
    "UserError",
    "attach_bottleneck",
    "detach_bottleneck",
    "load_bottleneck",
    "save_bottleneck",
]
