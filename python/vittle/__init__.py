"""Tuning that makes multimodal LLMs robust: Vittle, L2T and VPG-C on Hugging Face models."""

from vittle.errors import UserError
from vittle.methods.bottleneck import (
    ALPHA_SCHEDULES,
    BottleneckConfig,
    attach_bottleneck,
    attachment_of,
    detach_bottleneck,
    load_bottleneck,
    save_bottleneck,
)
from vittle.methods.saving import from_released, to_released
from vittle.ranks import shard

__all__ = [
    "ALPHA_SCHEDULES",
    "BottleneckConfig",
    "UserError",
    "attach_bottleneck",
    "attachment_of",
    "detach_bottleneck",
    "from_released",
    "load_bottleneck",
    "save_bottleneck",
    "shard",
    "to_released",
]
