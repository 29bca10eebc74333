"""The bottleneck in the model families that people use: small random models of transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, VIDEO, Family
from tiny import drawn_seeds, through_heads
from torch import Tensor, nn

from vittle import BottleneckConfig, attach_bottleneck, detach_bottleneck, load_bottleneck, save_bottleneck
from vittle.methods.bottleneck import attachment_of, token_weights

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def disturb(bottleneck: nn.Module) -> None:
    for parameter in bottleneck.parameters():
        nn.init.normal_(parameter, std=0.3)


def reads(layer: nn.Module, into: dict[str, Tensor], name: str) -> Any:
    """Keeps what a layer is handed."""

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        into[name] = (args[0] if args else kwargs["hidden_states"]).detach()

    return layer.register_forward_pre_hook(keep, with_kwargs=True)


@pytest.mark.parametrize("left_padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_alpha_zero_is_the_plain_model_exactly(family: Family, training: bool, left_padding: bool) -> None:
    model, batch = family.model().train(training), family.batch(left_padding)
    plain = model(**batch)
    bottleneck = attach_bottleneck(model, BottleneckConfig(alpha=0.0))
    disturb(bottleneck)
    output = model(**batch)
    assert torch.equal(output.logits, plain.logits)
    if training:
        assert output.loss > plain.loss
        output.loss.backward()
        assert all(parameter.grad.any() for parameter in bottleneck.parameters())
    else:
        assert torch.equal(output.loss, plain.loss)


@pytest.mark.parametrize("left_padding", [False, True])
@pytest.mark.parametrize("text_layer", [None, 3])
def test_every_token_passes_its_own_head(family: Family, text_layer: int | None, left_padding: bool) -> None:
    if text_layer and not family.image:
        pytest.skip("one modality")
    model, batch = family.model().train(), family.batch(left_padding)
    layers, seen = model.get_decoder().layers, {}
    hooks = [reads(layers[2], seen, "plain")]
    model(**batch)
    hooks[0].remove()
    bottleneck = attach_bottleneck(model, BottleneckConfig(layer=2, text_layer=text_layer))
    disturb(bottleneck)
    reads(layers[2], seen, "vision")
    reads(layers[3], seen, "text")
    layers[2].register_forward_hook(lambda module, args, output: seen.update(third=unwrapped(output).detach()))
    seeds = drawn_seeds(3, 2)
    output = model(**batch)
    vision = (batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)
    assert vision.any() == bool(family.image)
    expected, kl = through_heads(bottleneck, seen["plain"], vision, seeds[0])
    text_kl = kl
    if text_layer is not None:
        assert torch.equal(seen["vision"][~vision], seen["plain"][~vision])
        expected = torch.where(vision.unsqueeze(-1), expected, seen["plain"])
        after_third, text_kl = through_heads(bottleneck, seen["third"], vision, seeds[1])
        after_third = torch.where(vision.unsqueeze(-1), seen["third"], after_third)
        torch.testing.assert_close(seen["text"], after_third.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["vision"], expected.detach(), rtol=1e-4, atol=1e-4)

    unlabelled = (batch["labels"] == -100) & batch["attention_mask"].bool() & ~vision
    weights = token_weights(batch["labels"], vision, unlabelled, None)
    kl_vision, kl_text = (kl * weights)[vision].sum(), (text_kl * weights)[unlabelled].sum()
    metrics = attachment_of(model).metrics
    torch.testing.assert_close(metrics["kl_vision"], kl_vision.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["kl_text"], kl_text.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, metrics["ce"] + 0.1 * (metrics["kl_vision"] + metrics["kl_text"]))
    assert metrics["kl_text"] > 0.01


def unwrapped(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_tokens_of_videos_are_vision_tokens() -> None:
    model = next(family for family in FAMILIES if family.name == "Qwen2.5-VL").model()
    attach_bottleneck(model)
    ids = torch.tensor([[3, IMAGE, 4, VIDEO, VIDEO]])
    assert attachment_of(model).vision({"input_ids": ids}).tolist() == [[False, True, False, True, True]]


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "beam search": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("how", GENERATION)
def test_generation_with_a_cache_matches_generation_without(family: Family, how: str) -> None:
    model = family.model()
    disturb(attach_bottleneck(model))
    prompt = {name: value for name, value in family.batch(left_padding=True).items() if name != "labels"}
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**prompt, **options, **GENERATION[how])
    without = {name: value for name, value in GENERATION[how].items() if name != "cache_implementation"}
    assert torch.equal(cached, model.generate(**prompt, **options, **without, use_cache=False))
    attached = model(**prompt).logits
    detach_bottleneck(model)
    assert not torch.equal(attached, model(**prompt).logits)


def test_save_and_load(family: Family, tmp_path: Path) -> None:
    model, batch = family.model(), family.batch()
    disturb(attach_bottleneck(model, BottleneckConfig(layer=1, prior="learnable")))
    save_bottleneck(model, tmp_path / "whole")
    save_bottleneck(model, tmp_path / "half", inference_only=True)
    expected = model(**batch).logits
    for folder in ("whole", "half"):
        other = family.model()
        load_bottleneck(other, tmp_path / folder).eval()
        assert torch.equal(other(**batch).logits, expected)
    sizes = [(tmp_path / folder / "bottleneck.safetensors").stat().st_size for folder in ("whole", "half")]
    assert 0.6 < sizes[1] / sizes[0] < 0.8


def models_table() -> str:
    """docs/models.md has it."""
    lines = ["| family | class | decoder layers | image token |", "| --- | --- | --- | --- |"]
    for each in FAMILIES:
        model = each.model()
        token = "`config.image_token_id`" if each.image else "none: the text head alone"
        if getattr(model.config, "video_token_id", None) is not None:
            token += ", `config.video_token_id`"
        lines.append(f"| {each.name} | `{type(model).__name__}` | `{type(model.get_decoder()).__name__}` | {token} |")
    return "\n".join(lines)


def test_the_docs_list_these_models() -> None:
    assert models_table() in (DOCS / "models.md").read_text(encoding="utf-8"), (
        f"docs/models.md must say\n{models_table()}"
    )
