"""Two real processes over gloo train as one does: DDP through Trainer, FSDP2, tensor parallelism; and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from processes import ENVIRONMENT, ROOT, call, split, together, torchrun, tune
from tiny import tiny_llava
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import vittle
from vittle.data import ModalityLengthSampler
from vittle.demo.checkpoint import make_model, make_processor, save
from vittle.demo.scenes import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo's LLaVA, untrained, and 40 of its records with images and 16 without."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    processor = make_processor()
    save(make_model(processor), processor, folder / "model")
    file = write_dataset(folder, split="train", count=56, seed=0)
    records = json.loads(file.read_text())
    for record in records[40:]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "").strip()
    file.write_text(json.dumps(records))
    return {"model": str(folder / "model"), "data": str(file), "images": str(folder / "images")}


def losses(outcome: dict[str, Any], name: str = "loss") -> list[float]:
    return [log[name] for log in outcome["logs"]]


def test_without_noise_the_curves_are_one(data: dict[str, str], tmp_path: Path) -> None:
    runs = {}
    for name, processes, batch, accumulation in (("one", 1, 8, 1), ("two", 2, 4, 1), ("four", 2, 2, 2)):
        runs[name] = call(
            tune, processes, tmp_path, noise=False, **data, output=str(tmp_path / name), batch_size=batch,
            gradient_accumulation=accumulation, max_steps=7, learning_rate=1e-3, save_steps=0,
            bottleneck={"prior": "learnable", "beta": 1.0},
        )[0]  # fmt: skip
    assert len({round(each) for each in losses(runs["one"])}) > 1  # it learns
    for name in ("two", "four"):
        for each in ("loss", "grad_norm"):
            torch.testing.assert_close(losses(runs[name], each), losses(runs["one"], each), rtol=2e-5, atol=0)
        for each in ("ce", "kl_vision", "kl_text", "std_vision", "std_text"):  # rounded to four digits
            found = [[log.get(each) for log in run["logs"]] for run in (runs[name], runs["one"])]
            assert [value is None for value in found[0]] == [value is None for value in found[1]]
            torch.testing.assert_close(*([value or 0.0 for value in run] for run in found), rtol=0, atol=1.01e-4)


@pytest.mark.slow
def test_with_noise_the_ranks_draw_their_own(data: dict[str, str], tmp_path: Path) -> None:
    settings = data | {"max_steps": 7, "learning_rate": 1e-3, "save_steps": 0, "bottleneck": {"alpha": 0.9}}

    def run(name: str, processes: int, draws: int = 0) -> list[dict[str, Any]]:
        output = str(tmp_path / name)
        return call(tune, processes, tmp_path, draws=draws, output=output, batch_size=8 // processes, **settings)

    two, again = run("two", 2)[0], run("again", 2)[0]
    assert losses(two) == losses(again) and two["seeds"] == again["seeds"]
    ranks = [set(seeds) for seeds in two["seeds"]]
    assert [len(each) for each in ranks] == [7, 7] and not ranks[0] & ranks[1]
    one = run("one", 1, draws=6)
    for name in ("loss", "kl_vision", "kl_text"):
        spread = [mean(losses(each, name)) for each in one]
        assert abs(mean(losses(two, name)) - mean(spread)) < 5 * stdev(spread)


@pytest.mark.slow
def test_tensor_parallel_ranks_share_their_noise(tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path)
    alone = call(together, 1, tmp_path, folder=str(tmp_path))["ranks"][0]
    both = call(together, 2, tmp_path, folder=str(tmp_path))["ranks"]
    assert [each["stream"] for each in both] == [0, 0]
    for each in both:
        assert each["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert each["gradient"] == pytest.approx(alone["gradient"], rel=1e-4)


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    shared = {"folder": str(tmp_path)}
    alone = call(split, 1, tmp_path, steps=7, load=False, **shared)
    two = call(split, 2, tmp_path, steps=4, load=False, **shared)
    assert two["sharded"] and two["groups"] == 4 + 2 + 1 + 1  # decoder's layers, vision tower's, bottleneck, the rest
    for local in two["local"]:  # every rank has its part of both heads
        assert local["weight_out"] == [2, 32, 32] and local["prior"] == [2, 32]
    assert two["losses"] == pytest.approx(alone["losses"][:4], rel=1e-5) and two["losses"][-1] < two["losses"][0]
    for processes in (1, 4):  # the shards of two
        again = call(split, processes, tmp_path, steps=3, load=True, **shared)
        assert again["losses"] == pytest.approx(alone["losses"][4:], rel=1e-5)
        assert again["sums"] == pytest.approx(alone["sums"], rel=1e-4) and again["alpha"] == 0.25
    model = tiny_llava()
    vittle.load_bottleneck(model, tmp_path / "bottleneck")
    sums = {name: float(value.detach().double().abs().sum()) for name, value in model.bottleneck.named_parameters()}
    assert sums == pytest.approx(two["sums"], rel=1e-4)


def test_shard_takes_stacks_within_stacks(tmp_path: Path) -> None:
    """As of experts within layers."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(expert(x) for expert in self.experts)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model = Model()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        vittle.shard(model)
        model(torch.ones(1, 8)).sum().backward()
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def test_a_sharded_model_takes_no_bottleneck_and_keeps_its_own(tmp_path: Path) -> None:
    plain, attached = tiny_llava(), tiny_llava()
    vittle.attach_bottleneck(attached)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        vittle.shard(plain)
        vittle.shard(attached)
        with pytest.raises(vittle.UserError, match="is sharded already; attach a bottleneck before fully_shard"):
            vittle.attach_bottleneck(plain)
        with pytest.raises(vittle.UserError, match="is sharded; it keeps its bottleneck"):
            vittle.detach_bottleneck(attached)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("count", [(0, 3), (3, 0), (5, 9), (16, 8), (1, 100)])
def test_batches_are_filled_with_their_own_modality(count: tuple[int, int]) -> None:
    images = [1] * count[0] + [0] * count[1]
    sampler = ModalityLengthSampler(list(range(len(images))), images, 8, seed=0, fill=True)
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % 8 == 0 and set(order) == set(range(len(images)))
    assert len(order) - len(images) < 16
    for start in range(0, len(order), 8):
        assert len({images[i] for i in order[start : start + 8]}) == 1


@pytest.mark.parametrize("look", [None, 2])
@pytest.mark.parametrize("layer", [1, 3])
def test_fsdp_finds_every_layer_by_its_class(layer: int, look: int | None) -> None:
    model = tiny_llava()
    if look is not None:
        vittle.attach_vpgc(model, vittle.VPGCConfig(layer=look))
    vittle.attach_bottleneck(model, vittle.BottleneckConfig(layer=layer))
    config = yaml.safe_load((ROOT / "docs" / "recipes" / "launch" / "fsdp2.yaml").read_text())["fsdp_config"]
    names = config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=config["fsdp_auto_wrap_policy"], transformer_cls_names_to_wrap=names
    )
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert policy is not None and all(policy(each) for each in model.get_decoder().layers)
    vittle.detach_bottleneck(model)
    if look is not None:
        vittle.detach_vpgc(model)
    assert {type(each) for each in model.get_decoder().layers} == {LlamaDecoderLayer}


def command(data: dict[str, str], output: Path, *more: str) -> list[str]:
    return [
        "-m", "vittle", "train", "--model", data["model"], "--data", data["data"], "--images", data["images"],
        "--output", str(output), "--batch-size", "4", "--workers", "0", "--learning-rate", "1e-3", *more,
    ]  # fmt: skip


def test_a_refusal_is_one_line_of_the_first_rank(data: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("something of the user's")
    outcome = torchrun(2, *command(data, tmp_path, "--max-steps", "2"))
    assert outcome.returncode != 0
    told = [line for line in outcome.stderr.splitlines() if line.startswith("vittle: ")]
    assert told == [
        f"vittle: output {tmp_path} is not empty; name another folder, or resume the run it holds with --resume"
    ]


def test_what_meets_all_ranks_is_told_once(data: dict[str, str], tmp_path: Path) -> None:
    outcome = torchrun(2, *command(data | {"model": "no/such/folder"}, tmp_path / "run", "--max-steps", "2"))
    assert outcome.returncode != 0 and not (tmp_path / "run").exists()
    told = [line for line in outcome.stderr.splitlines() if line.startswith("vittle: ")]
    assert len(told) == 1 and told[0].startswith("vittle: model is 'no/such/folder'; must be a folder or Hub id")


def test_an_error_of_one_rank_ends_all(data: dict[str, str], tmp_path: Path) -> None:
    records = json.loads(Path(data["data"]).read_text())[:8]
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for record in records:
        (tmp_path / record["image"]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / record["image"]).write_bytes((Path(data["images"]) / record["image"]).read_bytes())
    records[5]["image"] = "broken.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    mine = data | {"data": str(tmp_path / "data.json"), "images": str(tmp_path)}
    begin = time.monotonic()
    outcome = torchrun(2, *command(mine, tmp_path / "run", "--max-steps", "2"))
    assert outcome.returncode != 0 and time.monotonic() - begin < 60
    told = [
        line for line in outcome.stderr.splitlines() if "vittle: " in line and "broken.png cannot be decoded" in line
    ]
    assert len(told) >= 1 and "record 5 (id " in told[0]
    cause = outcome.stderr.partition("Root Cause")[2]  # as torchrun shows it, without our code's frames
    assert "broken.png cannot be decoded" in cause and "train.py" not in cause


def test_a_rank_that_dies_ends_the_others(data: dict[str, str], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(data, tmp_path / "run", "--max-steps", "100000", "--save-steps", "0", "--log-steps", "1")
    process = subprocess.Popen(
        [*launcher, *arguments],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "tokens/s" in line:  # they are training
            break
    os.kill(rank_of(process.pid, 1), signal.SIGKILL)
    begin = time.monotonic()
    rest = process.stdout.read()
    assert process.wait(timeout=60) != 0 and time.monotonic() - begin < 60
    assert "Signal 9 (SIGKILL)" in rest and "rank      : 1" in rest


def rank_of(launcher: int, rank: int) -> int:
    """The process that is this rank, among the launcher's children."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            is_child = f"PPid:\t{launcher}\n" in status.read_text()
            if is_child and f"\0RANK={rank}\0" in (status.parent / "environ").read_text():
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank} below process {launcher}")
