"""Every command and the loop of docs/training.md, in real processes; ZeRO's where DeepSpeed is there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from processes import ENVIRONMENT, torchrun
from test_docs import BLOCK, MODEL, ROOT

from vittle.demo.scenes import write_dataset

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the demo's model is not there: make demo-checkpoint")

FILES = sorted((ROOT / "docs" / "recipes" / "launch").glob("*.yaml"))
SMALL = ["--max-steps", "2", "--workers", "0", "--batch-size", "4", "--save-steps", "1", "--log-steps", "1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the page's names are the demo's model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(MODEL)
    write_dataset(tmp_path, split="train", count=24, seed=0).rename("llava_v1_5_mix665k.json")
    return tmp_path


def blocks() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    text = text.replace("llava-hf/llava-1.5-7b-hf", "./model").replace("docs/recipes", f"{ROOT}/docs/recipes")
    return BLOCK.findall(text.replace("nproc-per-node 8", "nproc-per-node 2"))


def commands(program: str) -> list[list[str]]:
    lines = (line for kind, text in blocks() if kind == "bash" for line in text.strip().splitlines())
    return [words for line in lines if (words := shlex.split(line))[0] == program]


def ran(words: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words], env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_one_process_and_ddp_and_resuming(here: Path) -> None:
    first, again = commands("vittle")
    assert "2 steps in" in ran([*first, *SMALL])
    shutil.rmtree(here / "runs" / "one" / "checkpoint-2")
    assert "resuming from checkpoint-1" in ran([*again, *SMALL])
    (launch,) = commands("torchrun")
    assert "2 steps in" in ran(["torch.distributed.run", "--standalone", *launch[1:], *SMALL])
    assert json.loads((here / "runs" / "ddp" / "vittle_run.json").read_text())["global_batch"] == 8


def test_the_loop(here: Path) -> None:
    (loop,) = [text for kind, text in blocks() if kind == "python"]
    (here / "loop.py").write_text(loop.replace("init_process_group()", 'init_process_group("gloo")'))
    done = torchrun(2, "loop.py")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (here / "runs" / "sharded" / "bottleneck.safetensors").exists()


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_accelerate_reads_the_file(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    words = "MULTI_GPU FSDP DEEPSPEED DEEPSPEED".split()
    assert (
        str(config.distributed_type.value) == dict(zip("ddp fsdp2 zero2 zero3".split(), words, strict=True))[file.stem]
    )


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_trains_as_ddp_does(here: Path) -> None:
    losses = {}
    (launch,) = commands("torchrun")
    ran(["torch.distributed.run", "--standalone", *launch[1:], *SMALL, "--layer", "6"])
    losses["ddp"] = logged(here / "runs" / "ddp")
    for words in commands("accelerate"):
        stage = Path(words[-1]).name
        if not stage.startswith("zero"):
            continue
        words[1:2] = ["launch", "--num_processes", "2", "--mixed_precision", "no"]
        module = ["accelerate.commands.accelerate_cli", *words[1:], *SMALL, "--layer", "6", "--repeated-ids"]
        ran(module, DS_ACCELERATOR="cpu")
        losses[stage] = logged(here / "runs" / stage)
        shutil.rmtree(here / "runs" / stage / "checkpoint-2")
        assert "resuming from checkpoint-1" in ran([*module, "--resume"], DS_ACCELERATOR="cpu")
        assert logged(here / "runs" / stage) == losses[stage]
    assert losses.keys() == {"ddp", "zero2", "zero3"}
    for each in losses.values():
        assert each == pytest.approx(losses["ddp"], rel=1e-5)


def logged(output: Path) -> list[float]:
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history]
