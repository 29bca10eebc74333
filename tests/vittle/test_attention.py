"""A model's attention maps against what transformers itself returns of its attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_vpgc import stirred
from transformers import LlavaForConditionalGeneration

import vittle
from vittle.demo import ALIGNED
from vittle.demo.checkpoint import make_model, make_processor
from vittle.demo.edits import picture, write_scene_pairs
from vittle.demo.scenes import sample_scene
from vittle.discriminative import attention_of, read_pairs
from vittle.errors import UserError
from vittle.models import load_model, load_processor

PICTURES = [picture("", sample_scene(np.random.default_rng(seed), "train"), "train").image for seed in range(3)]


@pytest.fixture
def processor() -> Any:
    return make_processor()


def llava(processor: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return make_model(processor).eval()


def test_of_the_language_model(processor: Any) -> None:
    model = llava(processor)
    maps = attention_of(model, processor, "Describe the scene.")(PICTURES)
    text = "USER: <image>\nDescribe the scene. ASSISTANT:"
    inputs = processor(text=[text] * 3, images=[[each] for each in PICTURES], return_tensors="pt")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(**inputs, output_attentions=True).attentions)  # (layers, B, heads, T, T)
    image = (inputs["input_ids"][0] == processor.image_token_id).nonzero().flatten()
    expected = weights[:, :, :, image[-1] + 1 :][..., image].mean((0, 2, 3)).view(3, 4, 4)
    assert maps.shape == (3, 4, 4) and maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected.numpy(), rtol=1e-5)


def test_is_found_in_any_state(processor: Any) -> None:
    """Whatever is attached or wrapped; the model is left as it was."""
    model = llava(processor)
    maps = attention_of(model, processor)(PICTURES)
    assert model.config.text_config._attn_implementation == "sdpa" and model.config._attn_implementation == "sdpa"
    vittle.attach_bottleneck(model, vittle.BottleneckConfig(alpha=0.0))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    np.testing.assert_allclose(attention_of(adapted, processor)(PICTURES), maps, rtol=1e-5)
    stirred(adapted)
    assert not np.allclose(attention_of(adapted, processor)(PICTURES), maps, rtol=1e-3)  # the images' tokens changed
    assert not any(module._forward_hooks for module in model.get_decoder().modules())


@pytest.mark.parametrize("kind", ["Blip2", "InstructBlip"])
def test_of_the_queries(kind: str) -> None:
    """By the weights' own formula, layer by layer."""
    from test_vpgc import blip

    processor = make_processor()
    model = blip(kind, vision={"image_size": 64, "patch_size": 16}, text={"vocab_size": len(processor.tokenizer)})
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.normal_()  # patches differ, and queries tell them apart
        for name, weight in model.qformer.named_parameters():
            if "crossattention.attention.query" in name or "crossattention.attention.key" in name:
                weight.normal_()
    maps = attention_of(model, processor)(PICTURES)
    pixels = processor.image_processor(PICTURES, return_tensors="pt")["pixel_values"]
    expected, hooks = [], []
    for layer in model.qformer.encoder.layer:
        if layer.has_cross_attention:
            inner = layer.crossattention.attention

            def enters(module: Any, args: Any, kwargs: Any) -> None:
                states, x = kwargs.get("hidden_states", args[0] if args else None), kwargs["encoder_hidden_states"]
                heads = module.num_attention_heads
                q, k = (
                    each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (module.query(states), module.key(x))
                )
                expected.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean((1, 2)))

            hooks.append(inner.register_forward_pre_hook(enters, with_kwargs=True))
    with torch.no_grad():
        features = model.vision_model(pixels).last_hidden_state
        text = {"input_ids": None} if kind == "InstructBlip" else {}
        model.qformer(query_embeds=model.query_tokens.expand(3, -1, -1), encoder_hidden_states=features, **text)
    assert len(expected) == len(hooks) == 1
    np.testing.assert_allclose(maps, expected[0][:, 1:].view(3, 4, 4).numpy(), rtol=1e-5)
    assert maps.std() > 0.1 * maps.mean()


def test_pairs_of_what_a_model_ignores(tmp_path: Path) -> None:
    """The demo's own model chooses; the map and its score lie in the pair's record."""
    attend = attention_of(load_model(str(ALIGNED)).eval(), load_processor(str(ALIGNED)), "Describe the scene.")
    data = write_scene_pairs(tmp_path, split="train", count=6, seed=0, attend=attend)
    pairs = [pair.load() for pair in read_pairs(data)]
    assert len(pairs) > 6 and all(pair.attention is not None and pair.significance is not None for pair in pairs)


def test_a_picture_that_is_no_square_of_patches(processor: Any) -> None:
    model = llava(processor)
    model.config.vision_feature_select_strategy = "full"
    processor.vision_feature_select_strategy = "full"
    with pytest.raises(UserError, match="sees 17 patches of a picture; must be a square of them"):
        attention_of(model, processor)(PICTURES)
