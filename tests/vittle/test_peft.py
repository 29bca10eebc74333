"""The bottleneck beside PEFT's own adapters: trainable, saved, loaded, merged; and inside Trainer's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from samples import Samples, collate
from tiny import make_batch, tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from vittle import (
    BottleneckConfig,
    UserError,
    attach_bottleneck,
    attachment_of,
    detach_bottleneck,
    load_bottleneck,
    save_bottleneck,
)

TARGETS: dict[str, Any] = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "causal": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
}


def tuned(order: str, **options: Any) -> Any:
    """A LLaVA with adapters and a bottleneck, one put in before the other."""
    model = tiny_llava()
    torch.manual_seed(1)
    if order == "before":
        attach_bottleneck(model, BottleneckConfig(alpha=0.4))
    peft_model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options))
    if order == "after":
        attach_bottleneck(peft_model, BottleneckConfig(alpha=0.4))
    return peft_model


@pytest.fixture(params=["before", "after"])
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("targets", TARGETS)
def test_the_heads_stay_trainable_and_get_no_adapters(order: str, targets: str) -> None:
    model, batch = tuned(order, **TARGETS[targets]).train(), make_batch()
    for weight in (model.get_base_model().bottleneck.weight_in, model.get_base_model().bottleneck.weight_out):
        torch.nn.init.normal_(weight)  # a KL that shows
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name, _ in model.named_parameters() if ".bottleneck." in name}
    assert len(heads) == 4 and heads < trainable
    assert all("lora_" in name for name in trainable - heads)
    output = model(**batch)
    metrics = attachment_of(model).metrics
    torch.testing.assert_close(output.loss, metrics["ce"] + 0.1 * (metrics["kl_vision"] + metrics["kl_text"]))
    assert metrics["kl_vision"] > 0.01 and metrics["kl_text"] > 0.01
    output.loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name in trainable and "vision" not in name)


def test_a_frozen_head_stays_frozen() -> None:
    model = tiny_llava()
    attach_bottleneck(model).bias_in.requires_grad_(False)
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    bottleneck = peft_model.get_base_model().bottleneck
    assert not bottleneck.bias_in.requires_grad and bottleneck.weight_in.requires_grad


def logits(model: Any) -> Tensor:
    return model.eval()(**make_batch()).logits


def test_one_folder_for_adapters_and_bottleneck(order: str, tmp_path: Path) -> None:
    model = tuned(order, target_modules="all-linear")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "bottleneck.safetensors", "bottleneck_config.json",
    }  # fmt: skip

    bottleneck_last = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    load_bottleneck(bottleneck_last, tmp_path)
    torch.testing.assert_close(logits(bottleneck_last), expected)

    base = tiny_llava()
    load_bottleneck(base, tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), expected)

    base = tiny_llava()
    attach_bottleneck(base)  # with weights of its own, which the folder's replace
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


def test_merging_keeps_the_bottleneck(order: str, tmp_path: Path) -> None:
    model = tuned(order, target_modules="all-linear")
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlavaForConditionalGeneration
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    other = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    load_bottleneck(other, tmp_path)
    torch.testing.assert_close(logits(other), expected)
    detach_bottleneck(merged)
    assert not torch.allclose(logits(merged), expected)


def test_detach_inside_peft(order: str) -> None:
    model = tuned(order, target_modules="all-linear")
    attached = logits(model)
    detach_bottleneck(model)
    assert not torch.equal(logits(model), attached)
    assert not any("bottleneck" in name for name, _ in model.named_parameters())


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, remove_unused_columns=False,
        use_cpu=True, report_to="none", save_strategy="steps", save_steps=2, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_stock_trainer_resumes_the_bottleneck(kind: str, tmp_path: Path) -> None:
    """With adapters, stopped after two of four steps and resumed, it ends where an uninterrupted run does, bit for bit.

    In full tuning it is the bottleneck alone that can be told: transformers 5.23's Trainer writes a LLaVA by its
    published names and does not find them again; vittle's own does (test_train.py).
    """

    def trainer(folder: str) -> Trainer:
        model: Any = tiny_llava() if kind == "full" else tuned("before", target_modules="all-linear")
        torch.manual_seed(1)
        if kind == "full":
            attach_bottleneck(model, BottleneckConfig(alpha=0.4))
        options = arguments(tmp_path / folder, max_steps=4)
        return Trainer(model=model, args=options, train_dataset=Samples(), data_collator=collate)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    with torch.no_grad():
        for parameter in attachment_of(resumed.model).module.parameters():
            parameter.zero_()
    if kind == "lora":
        resumed.train(resume_from_checkpoint=str(checkpoint))
        trained = dict(whole.model.named_parameters())
        for name, parameter in resumed.model.named_parameters():
            assert torch.equal(parameter, trained[name]), name
    else:
        resumed._load_from_checkpoint(str(checkpoint))

    other = tiny_llava() if kind == "full" else PeftModel.from_pretrained(tiny_llava(), checkpoint)
    saved = load_bottleneck(other, checkpoint)
    assert saved.alpha == pytest.approx(0.4)
    now = attachment_of(resumed.model).module
    assert torch.equal(saved.weight_in, now.weight_in) == (kind == "full")  # with adapters, two steps on
    assert json.loads((checkpoint / "bottleneck_config.json").read_text())["alpha"] == 0.4


def test_save_pretrained_replaces_an_older_file(tmp_path: Path) -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    save_bottleneck(model, tmp_path)
    with torch.no_grad():
        model.bottleneck.weight_in.mul_(2)
    model.save_pretrained(tmp_path)
    other = tiny_llava()
    assert torch.equal(load_bottleneck(other, tmp_path).weight_in, model.bottleneck.weight_in)


def test_shards(tmp_path: Path) -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    other = tiny_llava()
    assert torch.equal(load_bottleneck(other, tmp_path).weight_out, model.bottleneck.weight_out)


def test_a_base_in_four_bits(order: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llava().save_pretrained(tmp_path / "model")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model", quantization_config=four_bits)
    if order == "before":
        attach_bottleneck(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    if order == "after":
        attach_bottleneck(model)
    model.train()(**make_batch()).loss.backward()
    bottleneck = model.get_base_model().bottleneck
    assert type(base.get_decoder().layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    assert all(p.dtype == torch.float32 and p.grad.any() for p in bottleneck.parameters())
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "bottleneck.safetensors").exists()


def test_a_second_adapter_leaves_the_heads_trainable(order: str) -> None:
    model = tuned(order, target_modules="all-linear")
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    assert all(parameter.requires_grad for parameter in model.get_base_model().bottleneck.parameters())


def test_adapters_of_transformers_own(tmp_path: Path) -> None:
    """model.add_adapter, without a PeftModel."""
    model = tiny_llava()
    bottleneck = attach_bottleneck(model, BottleneckConfig(alpha=0.4))
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert all(parameter.requires_grad for parameter in bottleneck.parameters())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    other = tiny_llava()
    other.load_adapter(str(tmp_path))
    load_bottleneck(other, tmp_path)
    torch.testing.assert_close(logits(other), expected)
    assert all(parameter.requires_grad for parameter in other.bottleneck.parameters())


def test_arguments_by_name_and_chosen_tensors(tmp_path: Path) -> None:
    model = tuned("before", target_modules="all-linear")
    changed = {name: 2 * tensor if ".bottleneck." in name else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(save_directory=tmp_path, state_dict=changed)
    loaded = load_bottleneck(tiny_llava(), tmp_path)
    assert torch.equal(loaded.weight_in, 2 * model.get_base_model().bottleneck.weight_in)
    model.load_adapter(model_id=tmp_path, adapter_name="again")
    assert torch.equal(loaded.weight_in, model.get_base_model().bottleneck.weight_in)


def test_a_bottleneck_of_another_layer_is_not_loaded(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llava(), LoraConfig(target_modules="all-linear"))
    attach_bottleneck(model, BottleneckConfig(layer=1))
    model.save_pretrained(tmp_path)
    base = tiny_llava()
    attach_bottleneck(base)
    with pytest.raises(UserError, match=r"bottleneck_config.json has layer 1; the model's bottleneck has 3"):
        PeftModel.from_pretrained(base, tmp_path)


def test_what_save_pretrained_leaves_out_is_not_lost(tmp_path: Path) -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    save_bottleneck(model, tmp_path)
    without = {name: t for name, t in model.state_dict().items() if not name.startswith("bottleneck.")}
    model.save_pretrained(tmp_path, state_dict=without)
    assert torch.equal(load_bottleneck(tiny_llava(), tmp_path).weight_in, model.bottleneck.weight_in)
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert torch.equal(load_bottleneck(tiny_llava(), tmp_path / "variant").weight_in, model.bottleneck.weight_in)
    model.save_pretrained(tmp_path / "nobody", False)
    assert not (tmp_path / "nobody").exists() or not list((tmp_path / "nobody").glob("bottleneck*"))
