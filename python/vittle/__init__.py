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
from vittle.methods.vpgc import VPGCConfig, attach_vpgc, detach_vpgc, load_vpgc, save_vpgc
from vittle.ranks import shard

__all__ = [
    "ALPHA_SCHEDULES",
    "BottleneckConfig",
    "UserError",
    "VPGCConfig",
    "attach_bottleneck",
    "attach_vpgc",
    "attachment_of",
    "detach_bottleneck",
    "detach_vpgc",
    "from_released",
    "load_bottleneck",
    "load_vpgc",
    "save_bottleneck",
    "save_vpgc",
    "shard",
    "to_released",
]
