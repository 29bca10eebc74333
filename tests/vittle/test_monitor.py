"""What the log of BottleneckTrainer says: right numbers, however the model is tuned and whatever a batch carries."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import data, small  # noqa: F401
from tiny import WIDTH, make_batch, tiny_llava
from torch import Tensor
from transformers import TrainingArguments

import vittle
from vittle.checkpoints import PARTIAL, in_order
from vittle.curves import draw
from vittle.train import TrainConfig, train
from vittle.trainer import BottleneckTrainer
from vittle_kernels import FusedIB
from vittle_kernels.functional import LOGVAR_BOUND


class Repeated(torch.utils.data.Dataset[Any]):
    """One batch of the tiny LLaVA's, sample by sample."""

    def __init__(self, count: int, without: tuple[str, ...] = ()) -> None:
        batch = make_batch((14, 14, 14), (1, 1, 1))
        self.samples = [
            {name: value[i] for name, value in batch.items() if name not in without} for i in range(3)
        ] * count

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


def tuned(model: Any, folder: Path, without: tuple[str, ...] = (), **options: Any) -> BottleneckTrainer:
    defaults: dict[str, Any] = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "seed": 1}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=3, use_cpu=True, remove_unused_columns=False, report_to="none",
        **defaults | options,
    )  # fmt: skip
    samples = Repeated(8, without)
    trainer = BottleneckTrainer(model=model, args=arguments, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    return trainer


def run(*args: Any, **options: Any) -> list[dict[str, Any]]:
    return [log for log in tuned(*args, **options).state.log_history if "loss" in log]


def test_posterior_and_tokens(tmp_path: Path) -> None:
    """The standard deviation is that of heads whose log-variances are known."""
    model = tiny_llava()
    bottleneck = vittle.attach_bottleneck(model)
    with torch.no_grad():
        bottleneck.bias_out[0, WIDTH:] = 1.0
        bottleneck.bias_out[1, WIDTH:] = -9.0  # beyond its bound
        bottleneck.weight_out.zero_()
    begin = time.perf_counter()
    logs = run(model, tmp_path, learning_rate=0.0)
    seconds = time.perf_counter() - begin
    for log in logs:
        assert log["std_vision"] == pytest.approx(math.exp(0.5), abs=1e-4)
        assert log["std_text"] == pytest.approx(math.exp(-LOGVAR_BOUND / 2), abs=1e-4)
        assert log["loss"] == pytest.approx(log["ce"] + 0.1 * (log["kl_vision"] + log["kl_text"]), abs=2e-4)
        assert 0 < log["bottleneck_share"] < 1
    assert sum(2 * 3 * 14 / log["tokens_per_second"] for log in logs) < seconds
    assert (
        not vittle.attachment_of(model).measures_std
        and not bottleneck._forward_hooks
        and not bottleneck._forward_pre_hooks
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("tuning", ["full", "frozen", "head only"])
def test_the_share_of_time(tmp_path: Path, tuning: str, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bottleneck's heads made to take most of the step, forward and backward."""
    model = tiny_llava()
    bottleneck = vittle.attach_bottleneck(model)
    if tuning != "full":
        model.requires_grad_(False)
        (model.lm_head if tuning == "head only" else bottleneck).requires_grad_(True)
    logs = run(model, tmp_path, gradient_accumulation_steps=accumulation)
    assert all(0 < log["bottleneck_share"] < 0.9 for log in logs)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(0.25)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            time.sleep(0.25)
            return gradient

    own = FusedIB._heads
    monkeypatch.setattr(FusedIB, "_heads", lambda self, *args: Slow.apply(own(self, *args)))
    slow = run(model, tmp_path, gradient_accumulation_steps=accumulation)
    shares = [log["bottleneck_share"] for log in slow]
    assert max(shares) < 1 and max(shares) > 0.6  # of a step that a busy machine did not stretch
    assert not bottleneck.weight_in._backward_hooks


def test_batches_without_a_mask_and_without_labels(tmp_path: Path) -> None:
    model = tiny_llava()
    vittle.attach_bottleneck(model)
    logs = run(model, tmp_path, without=("attention_mask", "instruction_mask"))
    assert all(log["tokens_per_second"] > 0 for log in logs)
    with pytest.warns(UserWarning, match="trains without labels"):
        logs = run(model, tmp_path, label_smoothing_factor=0.1)  # Trainer keeps the labels
    assert all("std_vision" not in log and log["alpha"] == 0.5 for log in logs)
    assert all("alpha" not in log and "tokens_per_second" in log for log in run(tiny_llava(), tmp_path))


def test_the_terminal_and_the_plot(
    small: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = TrainConfig(
        str(small), str(data), str(data.parent / "images"), str(tmp_path / "run"),
        batch_size=4, max_steps=4, log_steps=2, save_steps=0, workers=0,
    )  # fmt: skip
    result = train(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split() == "step loss CE KL vision KL text std v std t alpha share tokens/s".split()
    assert [line.split()[0] for line in lines[1:3]] == ["2", "4"] and max(map(len, lines)) <= 80
    picture = (tmp_path / "run" / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    draw(result.history[:1], tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != picture
    draw([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llava()
    bottleneck = vittle.attach_bottleneck(model)
    trainer = tuned(
        model, tmp_path / "run", learning_rate=0.5, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    best = losses.index(min(losses)) + 1
    assert best < 4 and "eval_loss" in capsys.readouterr().out
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    assert [each.name for each in in_order(tmp_path / "run")] == [f"checkpoint-{best}", "checkpoint-4"]
    stored = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    assert torch.equal(bottleneck.weight_in, stored["bottleneck.weight_in"])
    assert not (tmp_path / "run" / PARTIAL).exists()
    assert PARTIAL not in (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text()
