"""Starts real processes that train together over gloo, and what each of them runs.

    torchrun --nproc-per-node 2 tests/vittle/processes.py NAME OPTIONS.json

calls the function NAME below with the options, and writes what it returns on the first rank beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
}


def torchrun(processes: int, *command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """A command, in so many processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, *command], env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def call(function: Callable[..., Any], processes: int, scratch: Path, **options: Any) -> Any:
    """A function of this file in so many processes; what it returns on the first."""
    file = scratch / f"{function.__name__}.json"
    file.write_text(json.dumps(options))
    outcome = torchrun(processes, __file__, function.__name__, str(file))
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-6000:]
    return json.loads(file.with_suffix(".out").read_text())


def tune(noise: bool = True, draws: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """``vittle train``, with so many draws of the noise one after the other (0: the run's own): its logs and the
    noise's seeds. Without noise z = mu, on the eager backend.
    """
    import torch
    from transformers import TrainerCallback

    import vittle.train
    import vittle_kernels.layer as layer
    from vittle import BottleneckConfig

    seeds: list[int] = []
    fused = layer.fused_ib

    def recorded(*args: Any, seed: Any, backend: str, **kwargs: Any) -> Any:
        seeds.append(int(seed))
        return fused(*args, seed=seed, backend=backend if noise else "eager", **kwargs)

    layer.fused_ib = recorded
    if not noise:
        _no_noise()

    class Draw(TrainerCallback):
        def __init__(self, number: int) -> None:
            self.number = number

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.manual_seed(self.number)

    bottleneck, output = BottleneckConfig(**settings.pop("bottleneck", {})), settings.pop("output")
    outcomes = []
    for number in range(draws or 1):
        config = vittle.train.TrainConfig(
            output=f"{output}/{number}", bottleneck=bottleneck, alpha_schedule="constant", workers=0, log_steps=1,
            **settings,
        )  # fmt: skip
        seeds.clear()
        result = vittle.train.train(config, [Draw(number)] if draws else [])
        logs = [log for log in result.history if "loss" in log]
        outcomes.append({"logs": logs, "seeds": everywhere(list(seeds))})
    return outcomes


def everywhere(value: Any) -> list[Any]:
    """Every rank's."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _no_noise() -> None:
    import torch

    from vittle_kernels.backends import eager

    eager.normals = lambda seed, rows, columns: torch.zeros(rows.numel(), columns)


def split(folder: str, steps: int, load: bool) -> dict[str, Any]:
    """FSDP2 around a tiny LLaVA with its bottleneck, without noise: the losses of the global batch, and its weights.

    It goes on from the shards that the folder holds, or writes them and ``save_bottleneck``'s files there.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from tiny import make_batch, tiny_llava
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    import vittle

    _no_noise()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny_llava(seed=rank)  # the first rank's weights are everybody's, below
    torch.manual_seed(0)
    bottleneck = vittle.attach_bottleneck(model, vittle.BottleneckConfig(layer=3, prior="learnable"), backend="eager")
    reference = tiny_llava(seed=0)
    model.load_state_dict(reference.state_dict(), strict=False)
    model.model.vision_tower.requires_grad_(False)
    vittle.shard(model)
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    groups = sum(isinstance(module, FSDPModule) for module in model.modules())
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    if load:
        states = get_state_dict(model, optimizer)
        dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/shards")
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    else:
        bottleneck.set_alpha(0.25)
    batch = make_batch((14, 17, 11, 13), (1, 2, 1, 1))
    items = int((batch["labels"][:, 1:] != -100).sum())
    rows, pictures = torch.arange(4).tensor_split(world)[rank], torch.tensor([0, 1, 1, 2, 3])
    mine = {name: value[rows] for name, value in batch.items() if name != "pixel_values"}
    mine["pixel_values"] = batch["pixel_values"][torch.isin(pictures, rows)]
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**mine, num_items_in_batch=items).loss
        (loss * world).backward()  # FSDP takes the mean over ranks
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole))
    if not load:
        states = get_state_dict(model, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/shards")
        vittle.save_bottleneck(model, f"{folder}/bottleneck")
    outcome = {"losses": losses, "alpha": float(bottleneck.alpha), "sharded": all(sharded), "groups": groups}
    outcome["sums"] = {
        name: float(value.detach().full_tensor().double().abs().sum()) for name, value in bottleneck.named_parameters()
    }
    outcome["local"] = everywhere({name: list(value.to_local().shape) for name, value in bottleneck.named_parameters()})
    dist.destroy_process_group()
    return outcome


def together(folder: str) -> dict[str, Any]:
    """Tensor parallelism of transformers' own around a bottleneck: each rank's loss, noise and gradient."""
    import torch
    import torch.distributed as dist
    from tiny import make_batch
    from transformers import LlavaForConditionalGeneration

    import vittle
    from vittle import ranks

    dist.init_process_group("gloo")
    plan = {} if dist.get_world_size() == 1 else {"tp_plan": "auto"}
    model = LlavaForConditionalGeneration.from_pretrained(folder, **plan).train()
    torch.manual_seed(0)
    bottleneck = vittle.attach_bottleneck(model)
    torch.manual_seed(7)
    loss = model(**make_batch()).loss
    loss.backward()
    gradient = float(bottleneck.weight_out.grad.double().abs().sum())
    outcome = everywhere({"loss": float(loss), "gradient": gradient, "stream": ranks.noise_stream(model)})
    dist.destroy_process_group()
    return {"ranks": outcome}


if __name__ == "__main__":
    name, options = sys.argv[1], Path(sys.argv[2])
    outcome = globals()[name](**json.loads(options.read_text()))
    if os.environ.get("RANK", "0") == "0":
        options.with_suffix(".out").write_text(json.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an exit in good order
