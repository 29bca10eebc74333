"""Several processes that train one model: what each of them does alone, and what they must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from vittle.errors import UserError

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that talks and writes."""
    return not _is_several() or dist.get_rank() == 0


def label() -> str:
    """What a message says of where it comes from, if not from the first rank."""
    return "" if is_first() else f"rank {dist.get_rank()}: "


def agree(decide: Callable[[], T]) -> T:
    """What the first rank decides, on all of them; where it raises a UserError, the others end without a word."""
    if not _is_several():
        return decide()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1]) if is_first() else SystemExit(2)
    return outcome[0]


def noise_stream(model: nn.Module) -> int:
    """Which noise this process draws: the first rank of those that compute the same tokens together.

    Data-parallel ranks hold different tokens and draw different noise; the ranks of one tensor-parallel group hold
    the same tokens, and must draw the same. A group is one where parameters of the model are DTensors on a mesh with
    a dimension "tp", as transformers and accelerate name it.
    """
    if not _is_several():
        return 0
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            return min(dist.get_process_group_ranks(mesh.get_group("tp")))
    return dist.get_rank()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has the model's weights."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def tell_launcher(error: BaseException) -> None:
    """Hands an error to torchrun, which shows it as the reason why the other ranks were ended."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _is_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
