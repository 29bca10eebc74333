"""The bottleneck in transformers' own LLaVA: where it acts, what it adds to the loss, what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from samples import Samples, collate
from tiny import IMAGE_TOKEN, LAYERS, WIDTH, drawn_seeds, make_batch, through_heads, tiny_llava
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import Trainer, TrainingArguments

from vittle import (
    BottleneckConfig,
    UserError,
    attach_bottleneck,
    attachment_of,
    detach_bottleneck,
)
from vittle.methods.attachment import host_of
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
    (seed,) = drawn_seeds(3, 1)
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
    for weight in (bottleneck.weight_in, bottleneck.weight_out):
        nn.init.normal_(weight)  # posteriors far enough from the prior for the KL to show
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
    assert attachment_of(model).config.layer == 3 and model.bottleneck.hidden_size == WIDTH


def _twice(model: nn.Module) -> None:
    attach_bottleneck(model)
    attach_bottleneck(model)


def _without_image_token(model: nn.Module) -> None:
    model.config.image_token_id = None
    attach_bottleneck(model)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "layer is 5; must be in [1, 4], the model's decoder layers",
            lambda m: attach_bottleneck(m, BottleneckConfig(layer=5)),
        ),
        ("layer is 0; must be in [1, 4]", lambda m: attach_bottleneck(m, BottleneckConfig(layer=0))),
        ("layer is '2'; must be in [1, 4]", lambda m: attach_bottleneck(m, BottleneckConfig(layer="2"))),
        ("text_layer is 9; must be in [1, 4]", lambda m: attach_bottleneck(m, BottleneckConfig(text_layer=9))),
        ("beta is -1; must not be negative", lambda m: attach_bottleneck(m, BottleneckConfig(beta=-1))),
        ("alpha is 2; must be in [0, 1]", lambda m: attach_bottleneck(m, BottleneckConfig(alpha=2))),
        (
            "prior is 'flat'; must be 'fixed' or 'learnable'",
            lambda m: attach_bottleneck(m, BottleneckConfig(prior="flat")),
        ),
        ("LlavaConfig has no image_token_id; set model.config.image_token_id", _without_image_token),
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


def test_a_mask_that_contradicts_the_ids_is_refused() -> None:
    model, batch = tiny_llava(), make_batch()
    attach_bottleneck(model)
    vision = batch["input_ids"] == IMAGE_TOKEN
    assert torch.equal(model(**batch, vision_mask=vision).logits, model(**batch).logits)
    vision[0, 0] = True
    with pytest.raises(UserError, match=r"vision_mask differs at 1 tokens; must be True where input_ids is \[9\]"):
        model(**batch, vision_mask=vision)


def test_the_decoder_alone_is_not_bypassed_silently() -> None:
    model, batch = tiny_llava(), make_batch()
    attach_bottleneck(model)
    with pytest.raises(UserError, match=r"the decoder ran outside LlavaForConditionalGeneration\.forward"):
        model.get_decoder()(batch["input_ids"])


def test_a_failed_pass_leaves_nothing_behind() -> None:
    model, batch = tiny_llava().train(), make_batch()
    attachment = attachment_of(model) if attach_bottleneck(model, BottleneckConfig(alpha=0.0)) else None
    expected = model(**batch).loss
    with pytest.raises((ValueError, RuntimeError)):
        model(**batch | {"pixel_values": torch.zeros(1, 3, 8, 8)})  # three images are missing
    assert attachment.tokens is None and attachment.kl == {}
    assert torch.equal(model(**batch).loss, expected)


def test_a_compiled_layer_follows_alpha_without_compiling_again() -> None:
    """torch.compile(fullgraph=True) of a decoder layer with its bottleneck."""
    model, batch = tiny_llava().train(), make_batch()
    bottleneck = attach_bottleneck(model, BottleneckConfig(alpha=0.0))
    decoder, states = model.get_decoder(), {}
    layer = decoder.layers[2]
    hook = layer.register_forward_pre_hook(lambda *call: states.update(args=call[1], kwargs=call[2]), with_kwargs=True)
    model(**batch, use_cache=False)
    hook.remove()
    attachment, host = attachment_of(model), host_of(model)
    assert host is not None
    attachment.tokens = attachment._read_batch(dict(batch))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs = {}
    for alpha in (0.0, 0.25, 0.5):
        bottleneck.set_alpha(alpha)
        for call in (compiled, layer):
            attachment.kl, host.states = {}, {}  # as the model's forward pass begins
            torch.manual_seed(1)
            outputs[alpha, call] = call(*states["args"], **states["kwargs"])
        torch.testing.assert_close(outputs[alpha, compiled], outputs[alpha, layer])
    assert not torch.equal(outputs[0.25, compiled], outputs[0.5, compiled])
    assert counter.frame_count == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_plain_accelerate_loop(accumulation: int) -> None:
    """model(**batch).loss is all that a loop needs to know; num_items_in_batch makes accumulation exact."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = tiny_llava().train()
    torch.manual_seed(1)
    attach_bottleneck(model, BottleneckConfig(alpha=0.0, beta=0.5))
    loader = torch.utils.data.DataLoader(Samples(), 8 // accumulation, collate_fn=collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    items = (Samples().batch["labels"][:, 1:] != -100).sum()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=items).loss
            accelerator.backward(loss * accumulation)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    reference = tiny_llava().train()
    torch.manual_seed(1)
    attach_bottleneck(reference, BottleneckConfig(alpha=0.0, beta=0.5))
    reference(**collate([Samples()[i] for i in range(8)])).loss.backward()
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_recorded_hidden_states_are_what_the_next_layer_reads() -> None:
    model, batch = tiny_llava(), make_batch()
    bottleneck = attach_bottleneck(model, BottleneckConfig(layer=2))
    nn.init.normal_(bottleneck.weight_out)
    seen: list[Tensor] = []
    hook = model.get_decoder().layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(**batch, output_hidden_states=True)
    hook.remove()
    assert len(output.hidden_states) == LAYERS + 1 and torch.equal(output.hidden_states[2], seen[0])


def test_trainer_keeps_the_instruction_mask(tmp_path: Path) -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True))
    trainer._set_signature_columns_if_needed()
    assert "instruction_mask" in trainer._signature_columns


def test_positional_arguments_are_as_good_as_named_ones() -> None:
    model, batch = tiny_llava().train(), make_batch()
    bottleneck = attach_bottleneck(model, BottleneckConfig(alpha=0.0))
    nn.init.normal_(bottleneck.weight_out)
    expected = model(**batch, num_items_in_batch=100).loss
    ids = batch.pop("input_ids")
    assert torch.equal(model(ids, **batch, num_items_in_batch=100).loss, expected)
    assert torch.equal(model.forward(model, ids, **batch, num_items_in_batch=100).loss, expected)


def test_training_without_labels_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    model, batch = tiny_llava().train(), make_batch()
    attach_bottleneck(model)
    batch.pop("labels")
    for _ in range(2):
        model(**batch)
    assert sum("trains without labels" in str(warning.message) for warning in recwarn) == 1


def test_one_forward_pass_at_a_time() -> None:
    model, batch = tiny_llava(), make_batch()
    attach_bottleneck(model)
    expected = model(**batch).logits
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: model(**batch))
    with pytest.raises(UserError, match="another forward pass of this LlavaForConditionalGeneration is under way"):
        model(**batch)
    hook.remove()
    assert torch.equal(model(**batch).logits, expected)


def test_tuples_get_the_kl_too() -> None:
    model, batch = tiny_llava().train(), make_batch()
    bottleneck = attach_bottleneck(model, BottleneckConfig(alpha=0.0))
    nn.init.normal_(bottleneck.weight_out)
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).loss)


def test_a_mask_stands_for_the_ids() -> None:
    model, batch = tiny_llava(), make_batch(images=(0, 0, 0))
    bottleneck = attach_bottleneck(model)
    nn.init.normal_(bottleneck.weight_out)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    vision = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    attended = {"attention_mask": batch["attention_mask"]}
    text = model(inputs_embeds=embeddings, vision_mask=vision, **attended).logits
    torch.testing.assert_close(text, model(batch["input_ids"], **attended).logits)
    vision[:, 3:7] = True
    assert not torch.allclose(model(inputs_embeds=embeddings, vision_mask=vision, **attended).logits, text)


@pytest.mark.parametrize("mask", [torch.ones(3, 17), torch.ones(3, 1, dtype=torch.bool)], ids=["float", "narrow"])
def test_a_bad_instruction_mask_is_named(mask: Tensor) -> None:
    model, batch = tiny_llava().train(), make_batch()
    attach_bottleneck(model)
    with pytest.raises(UserError, match=r"instruction_mask is torch.*; must be torch\.bool \(3, 17\), as labels are"):
        model(**batch | {"instruction_mask": mask})


def test_a_model_that_sees_without_a_vision_tower_has_a_vision_head() -> None:
    from transformers import FuyuConfig, FuyuForCausalLM

    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = FuyuConfig(**sizes, num_attention_heads=4, image_size=8, patch_size=4, image_token_id=50)
    bottleneck = attach_bottleneck(FuyuForCausalLM(config))
    assert bottleneck.vision


def test_a_forward_of_somebody_elses_is_given_back() -> None:
    model, batch = tiny_llava(), make_batch()
    calls: list[int] = []
    own = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counted
    attach_bottleneck(model)
    model(**batch)
    detach_bottleneck(model)
    assert model.forward is counted and calls == [1]
