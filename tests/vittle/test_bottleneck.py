"""The bottleneck in transformers' own LLaVA: where it acts, what it adds to the loss, what it leaves alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import Samples, collate
from tiny import IMAGE_TOKEN, LAYERS, WIDTH, drawn_seed, make_batch, through_heads, tiny_llava
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import Trainer, TrainingArguments

from vittle import (
    BottleneckConfig,
    UserError,
    attach_bottleneck,
    detach_bottleneck,
    load_bottleneck,
    save_bottleneck,
)
from vittle.methods.bottleneck import ALPHA_SCHEDULES


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "instruction_mask"}


@pytest.mark.parametrize("left_padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_alpha_zero_is_the_plain_model_exactly(training: bool, left_padding: bool) -> None:
    model, batch = tiny_llava().train(training), make_batch(left_padding=left_padding)
    logits = model(**plain(batch)).logits
    attach_bottleneck(model, BottleneckConfig(alpha=0.0))
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("layer", [1, 3, LAYERS])
@pytest.mark.parametrize("prior", ["fixed", "learnable"])
def test_every_token_after_the_layer_passes_its_own_head(layer: int, prior: str) -> None:
    model, batch = tiny_llava().train(), make_batch()
    seen: dict[str, Tensor] = {}
    decoder = model.get_decoder()
    after = decoder.layers[layer] if layer < LAYERS else decoder.norm
    after.register_forward_pre_hook(lambda module, args: seen.setdefault("next", args[0].detach()))
    model(**plain(batch))
    plain_state = seen.pop("next")  # what the next layer reads without a bottleneck

    bottleneck = attach_bottleneck(model, BottleneckConfig(layer=layer, prior=prior, alpha=0.5, beta=0.2))
    for parameter in bottleneck.parameters():
        nn.init.normal_(parameter, std=0.3)
    seed = drawn_seed(3)
    output = model(**batch)
    vision = batch["input_ids"] == IMAGE_TOKEN
    expected, kl = through_heads(bottleneck, plain_state, vision, seed)
    torch.testing.assert_close(seen["next"], expected.detach(), rtol=1e-4, atol=1e-5)

    if prior == "fixed":  # the KL's weights: sample means, samples by their number of predicted tokens
        predicted = (batch["labels"][:, 1:] != -100).sum(1)
        text = batch["instruction_mask"]
        total = sum(
            predicted[i] / predicted.sum() * kl[i][mask[i]].mean()
            for mask in (vision, text)
            for i in range(3)
            if mask[i].any()
        )
        logits = output.logits[:, :-1].flatten(0, 1)
        ce = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(output.loss, ce + 0.2 * total, rtol=1e-4, atol=1e-5)


def test_evaluation_loss_is_ce_alone() -> None:
    model, batch = tiny_llava(), make_batch()
    attach_bottleneck(model)
    output = model(**batch)
    logits = output.logits[:, :-1].flatten(0, 1)
    ce = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, ce)


def test_without_an_instruction_mask_the_unlabelled_text_counts() -> None:
    model, batch = tiny_llava().train(), make_batch()
    bottleneck = attach_bottleneck(model, BottleneckConfig(alpha=0.0))
    nn.init.normal_(bottleneck.weight_in)  # posteriors far enough from the prior for the KL to show
    unlabelled = (batch["labels"] == -100) & batch["attention_mask"].bool() & (batch["input_ids"] != IMAGE_TOKEN)
    torch.testing.assert_close(model(**plain(batch)).loss, model(**batch | {"instruction_mask": unlabelled}).loss)
    assert not torch.equal(model(**plain(batch)).loss, model(**batch).loss)


def keep_products() -> Any:
    """Selective checkpointing: matrix products are kept, everything else is computed again."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "context_fn": keep_products}],
    ids=["full", "reentrant", "selective"],
)
@pytest.mark.parametrize("preserve", [False, True])
def test_gradient_checkpointing_changes_nothing(options: dict[str, Any], preserve: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, batch = tiny_llava().train(), make_batch()
        torch.manual_seed(1)
        bottleneck = attach_bottleneck(model)
        if checkpointing:
            model.gradient_checkpointing_enable(options | {"preserve_rng_state": preserve})
        calls: list[int] = []
        bottleneck.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(2)
        model(**batch).loss.backward()
        assert calls == [1]
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def _one_step(tmp_path: Path, accumulation: int) -> dict[str, Tensor]:
    """One optimizer step of transformers' own Trainer on one global batch of eight, by SGD without clipping."""
    model = tiny_llava()
    torch.manual_seed(1)
    # alpha 0 keeps the noise, which each forward pass draws anew, out of the states; the KL has none.
    attach_bottleneck(model, BottleneckConfig(alpha=0.0, beta=0.5, prior="learnable"))
    nn.init.normal_(model.bottleneck.prior, std=0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / str(accumulation)), per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation, max_steps=1, learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0.0, optim="sgd", remove_unused_columns=False, use_cpu=True, report_to="none",
        save_strategy="no", seed=0, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Samples(), data_collator=collate).train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def test_one_global_batch_gives_one_gradient_however_it_is_cut(tmp_path: Path) -> None:
    whole = _one_step(tmp_path, 1)
    assert all(whole[f"bottleneck.{name}"].any() for name in ("weight_in", "weight_out", "prior"))
    for accumulation in (2, 4):
        for name, gradient in _one_step(tmp_path, accumulation).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_generation_with_a_cache_matches_generation_without() -> None:
    model = tiny_llava()
    bottleneck = attach_bottleneck(model)
    for parameter in bottleneck.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = make_batch(left_padding=True)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**prompt, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
    attached = model(**prompt).logits
    detach_bottleneck(model)
    assert not torch.equal(attached, model(**prompt).logits)


def test_detach_restores_the_model() -> None:
    model, untouched = tiny_llava(), tiny_llava()
    names, batch = list(model.state_dict()), make_batch()
    attach_bottleneck(model)
    attached = copy.deepcopy(model)
    assert type(model.get_decoder().layers[2]).__name__ == "LlamaDecoderLayer"
    detach_bottleneck(model)
    assert list(model.state_dict()) == names
    assert [type(layer) for layer in model.get_decoder().layers] == [
        type(layer) for layer in untouched.get_decoder().layers
    ]
    assert torch.equal(model(**plain(batch)).logits, untouched(**plain(batch)).logits)
    attach_bottleneck(model, BottleneckConfig(layer=1))
    attached.bottleneck.set_alpha(0.0)  # a copy has a bottleneck of its own
    assert torch.equal(attached(**batch).logits, untouched(**plain(batch)).logits)


def test_save_and_load(tmp_path: Path) -> None:
    model, batch = tiny_llava(), make_batch()
    attach_bottleneck(model, BottleneckConfig(layer=2, prior="learnable", alpha=0.25, beta=0.3))
    model.bottleneck.set_alpha(0.125)
    save_bottleneck(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bottleneck.safetensors",
        "bottleneck_config.json",
    ]
    other = tiny_llava()
    loaded = load_bottleneck(other, tmp_path)
    assert loaded.alpha == 0.125 and json.loads((tmp_path / "bottleneck_config.json").read_text())["layer"] == 2
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_load_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model = tiny_llava()
    with pytest.raises(UserError, match=r"bottleneck_config.json does not exist"):
        load_bottleneck(model, tmp_path)
    attach_bottleneck(model)
    save_bottleneck(model, tmp_path)
    detach_bottleneck(model)
    settings = json.loads((tmp_path / "bottleneck_config.json").read_text())
    (tmp_path / "bottleneck_config.json").write_text(json.dumps(settings | {"format": 2}))
    with pytest.raises(UserError, match="has format 2; this version reads format 1"):
        load_bottleneck(model, tmp_path)
    (tmp_path / "bottleneck_config.json").write_text(json.dumps(settings))
    whole = (tmp_path / "bottleneck.safetensors").read_bytes()
    (tmp_path / "bottleneck.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"bottleneck\.safetensors is damaged"):
        load_bottleneck(model, tmp_path)
    assert not hasattr(model, "bottleneck")


@pytest.mark.parametrize(
    "t_and_alpha",
    [
        (0, 0.003346),
        (0.1, 0.008993),
        (0.25, 0.037929),
        (0.5, 0.25),
        (0.75, 0.462071),
        (0.9, 0.491007),
        (1, 0.496654),
    ],
)
def test_sigmoid_schedule_has_the_released_codes_values(t_and_alpha: tuple[float, float]) -> None:
    t, alpha = t_and_alpha
    assert ALPHA_SCHEDULES["sigmoid"](0.5, t) == pytest.approx(alpha, abs=1e-6)


def test_cosine_schedule() -> None:
    assert [round(ALPHA_SCHEDULES["cosine"](0.5, t), 6) for t in (0, 0.25, 0.5, 1)] == [
        0,
        0.073223,
        0.25,
        0.5,
    ]


def test_three_quarters_of_the_depth_by_default() -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    assert model._attachment.config.layer == 3 and model.bottleneck.hidden_size == WIDTH


def _twice(model: nn.Module) -> None:
    attach_bottleneck(model)
    attach_bottleneck(model)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "layer is 5; must be in [1, 4], the model's decoder layers",
            lambda m: attach_bottleneck(m, BottleneckConfig(layer=5)),
        ),
        ("layer is 0; must be in [1, 4]", lambda m: attach_bottleneck(m, BottleneckConfig(layer=0))),
        ("beta is -1; must not be negative", lambda m: attach_bottleneck(m, BottleneckConfig(beta=-1))),
        ("LlavaForConditionalGeneration has a bottleneck already", _twice),
        ("LlavaForConditionalGeneration has no bottleneck", detach_bottleneck),
        ("Linear has no stack of decoder layers", lambda m: attach_bottleneck(nn.Linear(2, 2))),
        ("CLIPVisionModel has no stack of decoder layers", lambda m: attach_bottleneck(m.model.vision_tower)),
    ],
)
def test_bad_attachments(message: str, call: Any) -> None:
    with pytest.raises(UserError) as raised:
        call(tiny_llava())
    assert str(raised.value).startswith(message)


def test_embeddings_without_ids_need_a_mask() -> None:
    model, batch = tiny_llava(), make_batch()
    attach_bottleneck(model)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(UserError, match="pass vision_mask"):
        model(inputs_embeds=embeddings)
    model(inputs_embeds=embeddings, vision_mask=batch["input_ids"] == IMAGE_TOKEN)
