"""Several processes that train one model: what each of them does alone, and what they must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from vittle.errors import UserError
from vittle_kernels import FusedIB

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


def first_then_all(build: Callable[[], T]) -> T:
    """What every rank builds, the first rank first: of a UserError that meets them all it alone tells."""
    built: list[T] = []
    agree(lambda: built.append(build()) if is_first() else None)
    return built[0] if built else build()


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


def share_weights(module: nn.Module, like: nn.Parameter) -> None:
    """Where DeepSpeed ZeRO-3 split the weights of a model as it was loaded, splits a new module's in the same way."""
    if not hasattr(like, "ds_id"):
        return
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    for parameter in module.parameters():
        parameter.data = parameter.data.to(like.dtype)
    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2 for a model with its bottleneck, in place: each layer, the bottleneck and the rest is one group.

    Both of the bottleneck's heads are spread over all ranks; by itself ``fully_shard`` would leave them to two.

    Args:
        model: attached already, not sharded yet.
        options: as ``torch.distributed.fsdp.fully_shard`` takes them: ``mesh``, ``mp_policy``, ...

    Returns:
        The model.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def by_columns(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.shape[1] % size == 0 else None

    mesh = options.get("mesh")
    size = dist.get_world_size() if mesh is None else mesh.size(-1)
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for stack in reversed(stacks):  # the inner ones, of experts, before the layers
        for layer in stack:
            fully_shard(layer, **options)
    for bottleneck in [module for module in model.modules() if isinstance(module, FusedIB)]:
        fully_shard(bottleneck, shard_placement_fn=by_columns, **options)
    fully_shard(model, **options)
    return model


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's state; where each rank holds a part of it, all ranks must come here."""
    parameters = list(module.parameters())
    if parameters and hasattr(parameters[0], "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in module.state_dict().items()
    }


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has the model's weights."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def tell_launcher(error: BaseException) -> None:
    """Hands an error to torchrun, which shows it as the reason why the other ranks were ended; a UserError bare."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        if isinstance(error, UserError):
            raise UserError(str(error)) from None
        raise error
    except BaseException as told:
        get_error_handler().record_exception(told)


def _is_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
