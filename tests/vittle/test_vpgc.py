"""The second look against its formulas, on transformers' own LLaVA, BLIP-2 and InstructBLIP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import IMAGE_TOKEN, IMAGE_TOKENS, LAYERS, VOCABULARY, WIDTH, make_batch, tiny_llava
from torch import Tensor

import vittle
from vittle import BottleneckConfig, UserError, VPGCConfig
from vittle.methods.vpgc import second_look_of, where_to_look

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
QFORMER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "encoder_hidden_size": 16, "vocab_size": 60}  # fmt: skip


def blip(kind: str = "Blip2", language: Any = None, **sizes: Any) -> Any:
    """A random BLIP-2 or InstructBLIP; an image is four tokens, as the small LLaVA's."""
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(
        vision_config=VISION | sizes.get("vision", {}), qformer_config=QFORMER | sizes.get("qformer", {}),
        text_config=(language or hf.LlamaConfig(**TEXT | sizes.get("text", {}))).to_dict(),
        num_query_tokens=sizes.get("queries", IMAGE_TOKENS), image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    torch.nn.init.normal_(model.query_tokens)
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "LLaVA": tiny_llava,
    "BLIP-2": blip,
    "BLIP-2 with OPT": lambda: blip(language=hf.OPTConfig(
        hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCABULARY,
        word_embed_proj_dim=WIDTH, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "InstructBLIP": lambda: blip("InstructBlip"),
}  # fmt: skip


def batch_for(model: Any, **settings: Any) -> dict[str, Tensor]:
    batch = make_batch(**settings)
    if "InstructBlip" in type(model).__name__ and "pixel_values" in batch:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(5, 50, (len(batch["pixel_values"]), 6), generator=generator)
        batch |= {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    return batch


def stirred(model: Any, std: float = 0.3, **settings: Any) -> Any:
    """A second look with weights that are seen."""
    module = vittle.attach_vpgc(model, **settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def states_after(model: Any, layer: int, batch: dict[str, Tensor]) -> Tensor:
    """What the next layer reads, (B, T, D)."""
    from vittle.methods.attachment import decoder_layers

    found: list[Tensor] = []
    layers, _ = decoder_layers(model)
    hook = layers[layer].register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return found[0]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.mark.parametrize("left", [False, True])
def test_a_fresh_one_changes_no_logit(model: Any, left: bool) -> None:
    batch = batch_for(model, left_padding=left)
    with torch.no_grad():
        before = model(**{name: each for name, each in batch.items() if name != "instruction_mask"})
        vittle.attach_vpgc(model)
        after = model(**batch)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


@pytest.mark.parametrize("left", [False, True])
def test_the_formulas(model: Any, left: bool) -> None:
    """Sample by sample and image by image, by the equations; one pass of the Q-Former for all."""
    batch = batch_for(model, left_padding=left)
    del batch["instruction_mask"], batch["labels"]
    plain = states_after(model, 2, batch)
    calls: list[int] = []
    if hasattr(model, "qformer"):
        model.qformer.register_forward_hook(lambda *call: calls.append(1))
        with torch.no_grad():
            features = model.vision_model(batch["pixel_values"]).last_hidden_state
    else:
        tower = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
        features = tower.hidden_states[-2][:, 1:]
    module = stirred(model)
    looked = states_after(model, 2, batch)
    assert len(calls) == 2 * hasattr(model, "qformer")
    expected, image = plain.clone(), 0
    with torch.no_grad():
        for row, ids in enumerate(batch["input_ids"]):
            attended = batch["attention_mask"][row].bool()
            last = int(torch.nonzero(attended & (ids != IMAGE_TOKEN))[-1])
            h = plain[row, last]
            for place in torch.nonzero(ids == IMAGE_TOKEN).flatten().view(-1, IMAGE_TOKENS):
                x = features[image : image + 1]
                if hasattr(model, "qformer"):
                    g = module.guidance_weight @ h + module.guidance_bias
                    text = {"input_ids": None} if "Instruct" in type(model).__name__ else {}
                    seen = model.qformer(query_embeds=module.queries + g, encoder_hidden_states=x, **text)[0][0]
                    added = seen @ module.output_weight.T + module.output_bias
                else:
                    added = (module.guidance_weight @ h) * (x[0] @ module.features_weight.T)
                expected[row, place] += added
                image += 1
    assert image == 3
    torch.testing.assert_close(looked, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(looked[2], plain[2])  # has no image


GREEDY: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": 1000,
    "suppress_tokens": [IMAGE_TOKEN],
}


def prompts(model: Any) -> dict[str, Tensor]:
    batch = batch_for(model, left_padding=True)
    return {name: each for name, each in batch.items() if name not in ("labels", "instruction_mask")}


def logits_of(model: Any, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    """Of each generated token, (tokens, rows, V)."""
    settings = GREEDY | {"return_dict_in_generate": True, "output_logits": True} | settings
    return torch.stack(model.generate(**batch, **settings).logits)


def token_by_token(model: Any, batch: dict[str, Tensor], expected: Tensor) -> Tensor:
    """The logits that ``forward`` gives where each token is the likeliest that was expected."""
    decoder = model.language_model if hasattr(model, "query_tokens") else model  # BLIP-2's forward wants images
    attended, logits = batch["attention_mask"], []
    with torch.no_grad():
        output = model(**batch, use_cache=True)
        past = getattr(output, "language_model_outputs", output).past_key_values
        for step in expected:
            logits.append(output.logits[:, -1])
            token = step.index_fill(1, torch.tensor([IMAGE_TOKEN]), -torch.inf).argmax(1, keepdim=True)
            attended = torch.nn.functional.pad(attended, (0, 1), value=1)
            output = decoder(input_ids=token, attention_mask=attended, past_key_values=past)
    return torch.stack(logits)


@pytest.mark.parametrize("both", [False, True])
def test_generation(model: Any, both: bool) -> None:
    """By a cache of any kind, without one, or token by token through forward: the same logits; one look a prompt."""
    batch = prompts(model)
    plain = logits_of(model, batch)
    if both:
        torch.manual_seed(1)
        bottleneck = vittle.attach_bottleneck(model, BottleneckConfig(layer=3, alpha=0.9))
        torch.nn.init.normal_(bottleneck.weight_out)
    looks: list[int] = []
    stirred(model).register_forward_hook(lambda *call: looks.append(1))
    cached = logits_of(model, batch)
    assert len(looks) == 1
    assert ((cached[0] - plain[0]).abs().amax(1) > 1e-3).tolist() == [True, True, both]  # the third has no image
    if not (both and hasattr(model, "query_tokens")):  # whose decoder cannot run outside with a bottleneck in it
        torch.testing.assert_close(token_by_token(model, batch, cached), cached, rtol=1e-4, atol=1e-5)
    for settings in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        torch.testing.assert_close(logits_of(model, batch, **settings), cached, rtol=1e-4, atol=1e-5)
    beams = model.generate(**batch, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=3, use_cache=False))
    repeated = {name: each[:1] for name, each in batch.items()}  # one image: transformers 5.17 mixes up several
    samples = logits_of(model, repeated, num_beams=2, num_return_sequences=2)
    torch.testing.assert_close(samples[0, :2], cached[0, :1].expand(2, -1), rtol=1e-4, atol=1e-5)


def test_speculation_looks_once() -> None:
    """Candidates that are more tokens than the prompt are no prompt."""
    model = blip()
    batch = {
        "input_ids": torch.tensor([[1] + [IMAGE_TOKEN] * 4 + [5, 6, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 8, 8),
    }
    stirred(model)
    expected = logits_of(model, batch, max_new_tokens=12)
    found = logits_of(model, batch, max_new_tokens=12, prompt_lookup_num_tokens=20)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_in_pieces_is_refused(model: Any) -> None:
    stirred(model)
    with pytest.raises(UserError, match="prefill_chunk_size is set; must be None"):
        model.generate(**prompts(model), **GREEDY, prefill_chunk_size=4)
    assert second_look_of(model).prompt is None and logits_of(model, prompts(model)).isfinite().all()


def test_generation_without_ids() -> None:
    """As plain models: from nothing; from embeddings, among which BLIP-2 finds its images, and LLaVA cannot."""
    for model in (tiny_llava(), blip()):
        text = {"input_ids": torch.tensor([[1, 5, 6]])} | ({"pixel_values": None} if hasattr(model, "qformer") else {})
        if not hasattr(model, "qformer"):
            plain = model.generate(**text, **GREEDY), model.generate(**GREEDY, bos_token_id=1)
            stirred(model)
            assert torch.equal(model.generate(**text, **GREEDY), plain[0])
            assert torch.equal(model.generate(**GREEDY, bos_token_id=1), plain[1])
            with pytest.raises(UserError, match="the model got inputs_embeds and no input_ids; pass vision_mask"):
                model.generate(inputs_embeds=model.get_input_embeddings()(text["input_ids"]), **GREEDY)
            continue
        stirred(model)
        batch = prompts(model)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        rest = {name: each for name, each in batch.items() if name != "input_ids"}
        found = logits_of(model, rest | {"inputs_embeds": embeds})
        torch.testing.assert_close(found, logits_of(model, batch), rtol=1e-4, atol=1e-5)


def test_images_alone_are_looked_at_too() -> None:
    model = blip()
    module = stirred(model)
    pixels = batch_for(model)["pixel_values"]
    alone = model.generate(pixel_values=pixels, max_new_tokens=4, do_sample=False)
    ids = torch.tensor([[IMAGE_TOKEN] * IMAGE_TOKENS + [1]] * 3)
    assert torch.equal(alone, model.generate(pixels, ids, max_new_tokens=4, do_sample=False))
    looked = alone, model.vpgc
    vittle.detach_vpgc(model)
    assert looked[1] is module and not torch.equal(looked[0], model.generate(pixel_values=pixels, max_new_tokens=4))


def test_the_published_number_of_parameters() -> None:
    """Vicuna-7B, ViT-g and BLIP-2's Q-Former: 6.3M, 0.09 %."""
    sizes = {
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "vocab_size": 32000},
        "vision": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16},
        "qformer": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                    "encoder_hidden_size": 1408},
        "queries": 32,
    }  # fmt: skip
    with (
        init_empty_weights()
    ):  # torch.device("meta") is without effect after some torch.compile, and 27 GB would be made
        model = blip(**sizes)
    vittle.attach_vpgc(model)
    assert {each.device.type for each in model.parameters()} == {"meta"}
    trained = {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    assert sum(trained.values()) == 3_146_496 + 3_149_824 + 24_576 == 6_320_896
    assert all(name.startswith("vpgc.") for name in trained)
    assert second_look_of(model).config.layer == 16


def guided(*arguments: Any) -> list[list[int]]:
    """The columns that guide each sample's image tokens."""
    where = where_to_look(*arguments)
    return [row[vision].tolist() for row, vision in zip(where.guidance, where.vision, strict=True)]


def test_where() -> None:
    vision = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    attended = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    assert guided(vision, attended) == [[4, 4], [5, 5], [-1, -1]]
    labels = torch.tensor([[-100, -100, -100, -100, 7, -100], [-100, -100, -100, -100, 8, 9], [-100] * 6])
    assert guided(vision, attended, labels) == [[3, 3], [1, 1], [-1, -1]]
    assert guided(vision, attended, torch.where(attended, 5, -100)) == [[0, 0], [1, 1], [-1, -1]]  # all is labelled
    instruction = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0], [0] * 6]).bool()
    assert guided(vision, attended, labels, instruction) == [[4, 4], [4, 4], [-1, -1]]


def test_an_image_of_a_later_turn_is_guided_by_its_own_question() -> None:
    """Image, question, answer; image, question, answer."""
    vision = torch.tensor([[1, 0, 0, 1, 0, 0]]).bool()
    labels = torch.tensor([[-100, -100, 7, -100, -100, 8]])
    attended = torch.ones_like(vision)
    assert guided(vision, attended, labels) == [[1, 4]]
    where = where_to_look(vision, attended, torch.where(vision, -100, 5), torch.tensor([[0, 1, 0, 0, 1, 0]]).bool())
    assert where.hears_of().tolist() == [[-1, 1, 1, 1, 4, 4]]


def test_no_answer_is_heard_of_through_the_images() -> None:
    """In training logits before the response do not depend on it; nor do those of an earlier answer on a later one."""
    model = tiny_llava()
    stirred(model)
    batch = make_batch()
    other = {name: each.clone() for name, each in batch.items()}
    first = batch["labels"] != -100
    changed = first & (first.cumsum(1) == first.sum(1, keepdim=True))
    other["input_ids"][changed] = 5
    with torch.no_grad():
        one, two = model(**batch).logits, model(**other).logits
    before = changed.long().cumsum(1) == 0
    assert torch.equal(one[before], two[before]) and not torch.equal(one, two)


def test_instructions_with_labels_do_not_see_what_they_ask() -> None:
    """L2T: their cross-entropy is that without a second look, the response's that with one."""
    model, batch = tiny_llava(), make_batch()
    labels, instruction = batch["labels"], batch["instruction_mask"]
    both = torch.where(instruction, batch["input_ids"], labels)
    alone = batch | {"labels": torch.where(instruction, both, -100)}
    items = {"num_items_in_batch": (both[:, 1:] != -100).sum()}
    with torch.no_grad():
        of_instruction = model(**{k: v for k, v in alone.items() if k != "instruction_mask"}, **items).loss
        stirred(model)
        of_response = model(**batch, **items).loss
        loss = model(**batch | {"labels": both}).loss
        with_items = model(**batch | {"labels": both}, **items).loss
    torch.testing.assert_close(loss, of_instruction + of_response)
    assert torch.equal(loss, with_items)


@pytest.mark.parametrize("first", ["vpgc", "bottleneck"])
def test_beside_a_bottleneck(first: str) -> None:
    model, batch = tiny_llava(), make_batch()
    with torch.no_grad():
        before = model(**{name: each for name, each in batch.items() if name != "instruction_mask"}).logits
    torch.manual_seed(2)
    attach = {
        "vpgc": lambda: stirred(model, freeze=False),
        "bottleneck": lambda: vittle.attach_bottleneck(model, BottleneckConfig(layer=2, alpha=0.0)),
    }
    names = [first, *({*attach} - {first})]
    for name in names:
        attach[name]()
    with torch.no_grad():
        both = model(**batch).logits
        vittle.detach_bottleneck(model)
        assert torch.equal(model(**batch).logits, both)  # alpha 0 changes nothing, in whichever order
    vittle.detach_vpgc(model)
    with torch.no_grad():
        assert torch.equal(model(**{k: v for k, v in batch.items() if k != "instruction_mask"}).logits, before)
    assert not {"forward", "generate", "save_pretrained", "_vittle"} & model.__dict__.keys()
    assert type(model.get_decoder().layers[0]) is hf.models.llama.modeling_llama.LlamaDecoderLayer


def test_the_kl_is_one_however_many_passes() -> None:
    """With labels on instructions a step is two passes; KL and metrics are those of one."""
    model, batch = tiny_llava().train(), make_batch()
    vittle.attach_bottleneck(model, BottleneckConfig(alpha=0.0, beta=1.0))
    attachment = vittle.attachment_of(model)
    batch["labels"] = torch.where(batch["instruction_mask"], batch["input_ids"], batch["labels"])
    model(**batch)
    alone = dict(attachment.metrics)
    vittle.attach_vpgc(model, freeze=False)  # fresh: changes no state
    loss = model(**batch).loss
    for name, value in alone.items():
        torch.testing.assert_close(attachment.metrics[name], value)
    torch.testing.assert_close(loss, sum(alone.values()))


def test_gradients_reach_all_of_it() -> None:
    """At first the last factor's alone; then all of them, and nothing else's."""
    for model in (tiny_llava(), blip()):
        module = vittle.attach_vpgc(model.train())
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        batch = make_batch()
        moved = []
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            moved.append({name for name, each in module.named_parameters() if bool((each.grad != 0).any())})
            optimizer.step()
        assert moved[0] < moved[1] == {name for name, _ in module.named_parameters()}
        assert all(each.grad is None for name, each in model.named_parameters() if not name.startswith("vpgc."))


@pytest.mark.parametrize("kind", ["LLaVA", "BLIP-2"])
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, batch = MODELS[kind](), make_batch()
    stirred(model)
    vittle.attach_bottleneck(model)
    with torch.no_grad():
        expected = model(**batch).logits
    vittle.save_vpgc(model, tmp_path / "own")
    model.save_pretrained(tmp_path / "model")
    assert {"vpgc_config.json", "bottleneck_config.json"} <= {path.name for path in (tmp_path / "model").iterdir()}
    for folder in ("own", "model"):
        again = MODELS[kind]()
        vittle.load_vpgc(again, tmp_path / folder)
        vittle.load_bottleneck(again, tmp_path / "model")
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, expected)
    loaded, own = type(model).from_pretrained(tmp_path / "model").state_dict(), model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in loaded.items())
    with pytest.raises(UserError, match=r"has form '(linear|qformer)'; the model needs"):
        vittle.load_vpgc(MODELS["BLIP-2" if kind == "LLaVA" else "LLaVA"](), tmp_path / "own")
    with pytest.raises(UserError, match="does not exist; must be a file that save_vpgc wrote"):
        vittle.load_vpgc(MODELS[kind](), tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "queries": t["queries"].long()}, r"has queries of torch.int64; must be floating point"),
        (lambda t: {**t, "queries": t["queries"][:, 1:]}, r"has queries of shape \(1, .*; must be \(1, "),
        (
            lambda t: {**t, "more": t["queries"] + 1},
            r"has more of shape .*; must be left out, by the model and vpgc",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    model = MODELS["BLIP-2"]()
    vittle.attach_vpgc(model)
    vittle.save_vpgc(model, tmp_path)
    path = tmp_path / "vpgc.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(UserError, match=rf"the second look in {tmp_path} {message}"):
        vittle.load_vpgc(MODELS["BLIP-2"](), tmp_path)


def test_stays_trainable_beside_adapters(tmp_path: Path) -> None:
    model = tiny_llava()
    module = stirred(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    assert all(each.requires_grad for each in module.parameters())
    adapted.save_pretrained(tmp_path)
    again = tiny_llava()
    vittle.load_vpgc(again, tmp_path)
    assert all(torch.equal(each, module.state_dict()[name]) for name, each in again.vpgc.state_dict().items())


def _partly_on_meta() -> Any:
    model = tiny_llava()
    model.get_decoder().layers.to("meta")
    return model


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("layer is 4; must be in \\[1, 3\\]", lambda: vittle.attach_vpgc(tiny_llava(), VPGCConfig(layer=4))),
        ("layer is 0; must be in", lambda: vittle.attach_vpgc(tiny_llava(), VPGCConfig(layer=0))),
        (
            "LlamaForCausalLM has neither a Q-Former nor a projector",
            lambda: vittle.attach_vpgc(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))),
        ),
        (
            "has a second look already",
            lambda: [vittle.attach_vpgc(model) for model in [tiny_llava()] * 2],
        ),
        (
            "the model.s weights are offloaded; attach a second look before",
            lambda: vittle.attach_vpgc(_partly_on_meta()),
        ),
        (
            "LlavaNextForConditionalGeneration cuts an image into tiles",
            lambda: vittle.attach_vpgc(hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(
                vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=9))),
        ),
        (
            "has 1 decoder layer; must have two",
            lambda: vittle.attach_vpgc(blip(text={"num_hidden_layers": 1})),
        ),
        ("LlavaForConditionalGeneration has no second look", lambda: vittle.detach_vpgc(tiny_llava())),
        (
            "has an encoder-decoder language model; must have a causal one",
            lambda: vittle.attach_vpgc(blip(language=hf.T5Config(
                d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCABULARY))),
        ),
    ],
)  # fmt: skip
def test_refuses(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_more_images_than_markers() -> None:
    """BLIP-2 itself leaves out images that have no marker; a fresh second look says so."""
    model, batch = blip(), make_batch()
    vittle.attach_vpgc(model)
    batch["pixel_values"] = torch.cat([batch["pixel_values"], batch["pixel_values"][:1]])
    with pytest.raises(
        UserError, match="there are 4 images of 4 tokens each; the samples have \\[4, 8, 0\\] image tokens"
    ):
        model(**batch)
    assert second_look_of(model).where is None


def test_a_batch_that_cannot_be_told_apart_is_refused() -> None:
    """In training, without labels: the guidance would hear of the answer."""
    model, batch = tiny_llava().train(), make_batch()
    vittle.attach_vpgc(model)
    labels = batch.pop("labels")
    with pytest.raises(UserError, match="trains without labels, so the second look cannot tell a prompt from"):
        model(**batch)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    with pytest.raises(UserError, match=r"instruction_mask is torch.bool \(3, 2\); must be torch.bool"):
        model(**batch | {"labels": labels, "instruction_mask": batch["instruction_mask"][:, :2]})
    mixed = make_batch((14, 14), (1, 1))
    mixed["input_ids"][0, 1:] = mixed["input_ids"][0, 1:].where(mixed["input_ids"][0, 1:] != IMAGE_TOKEN, 5)
    mixed["input_ids"][0, 1:3] = IMAGE_TOKEN
    mixed["input_ids"][1, -6:] = IMAGE_TOKEN
    mixed["input_ids"][1, :-6] = 5
    with pytest.raises((UserError, ValueError), match=r"samples have \[2, 6\] image tokens"):
        model(**mixed)


def test_a_batch_without_images_trains() -> None:
    """Alone and frozen, as a tuple too: the second look's gradient is nothing."""
    for model in (tiny_llava().train(),):
        module = stirred(model)
        batch = make_batch((9, 12), (0, 0))
        for settings in ({}, {"return_dict": False}):
            module.zero_grad()
            output = model(**batch, **settings)
            (output[0] if settings else output.loss).backward()
            assert all(each.grad is not None and not each.grad.any() for each in module.parameters())


def test_a_tuple_with_labels_on_instructions() -> None:
    model, batch = tiny_llava().train(), make_batch()
    stirred(model)
    batch["labels"] = torch.where(batch["instruction_mask"], batch["input_ids"], batch["labels"])
    torch.testing.assert_close(model(**batch, return_dict=False)[0], model(**batch).loss)


@pytest.mark.parametrize("kind", ["LLaVA", "BLIP-2"])
def test_a_copy_looks_too(kind: str) -> None:
    model = MODELS[kind]()
    batch = batch_for(model)
    stirred(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(copied(**batch).logits, expected)
        copied.vpgc.guidance_weight.zero_()
        assert not torch.equal(copied(**batch).logits, expected) and torch.equal(model(**batch).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LLaVA", "BLIP-2"])
@pytest.mark.parametrize("method", ["vpgc", "bottleneck"])
def test_a_compiled_model(kind: str, method: str) -> None:
    model = MODELS[kind]()
    batch = batch_for(model)
    if method == "vpgc":
        stirred(model)
    else:
        vittle.attach_bottleneck(model)
    with torch.no_grad():
        expected = model(**batch).logits
        found = torch.compile(model, backend="eager")(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_recorded_states_are_those_that_the_next_layer_reads(model: Any) -> None:
    batch = batch_for(model)
    del batch["labels"], batch["instruction_mask"]
    stirred(model)
    vittle.attach_bottleneck(model, BottleneckConfig(layer=2, alpha=0.5))
    read = states_after(model, 2, batch)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    recorded = getattr(output, "hidden_states", None) or output.language_model_outputs.hidden_states
    assert torch.equal(recorded[2], read)


def test_what_was_trainable_is_so_again(tmp_path: Path) -> None:
    """After detaching, and where loading fails; adapters stay trainable, whichever came first."""
    model = tiny_llava()
    before = {name for name, each in model.named_parameters() if each.requires_grad}
    vittle.attach_vpgc(model)
    vittle.save_vpgc(model, tmp_path)
    vittle.detach_vpgc(model)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == before
    config = tmp_path / "vpgc_config.json"
    config.write_text(config.read_text().replace("linear", "qformer"))
    with pytest.raises(UserError, match="has form 'qformer'; the model needs 'linear'"):
        vittle.load_vpgc(model, tmp_path)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == before
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    vittle.attach_vpgc(adapted)
    trained = {name.split(".")[-3] for name, each in adapted.named_parameters() if each.requires_grad}
    assert "lora_A" in trained and any(
        "vpgc" in name for name, each in adapted.named_parameters() if each.requires_grad
    )


def test_adapters_on_all_that_is_linear() -> None:
    for kind in ("LLaVA", "BLIP-2"):
        model = MODELS[kind]()
        module = stirred(model)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        assert not any("lora" in name for name, _ in module.named_parameters())
        assert all(each.requires_grad for each in module.parameters())
        adapted(**make_batch()).loss.backward()


def test_somebodys_choice_of_tensors(tmp_path: Path) -> None:
    """A model saved without the second look's tensors leaves its own file where it is."""
    model = tiny_llava()
    stirred(model)
    vittle.attach_bottleneck(model)
    vittle.save_vpgc(model, tmp_path)
    state = {name: each for name, each in model.state_dict().items() if not name.startswith("vpgc.")}
    model.save_pretrained(tmp_path, state_dict=state)
    again = tiny_llava()
    vittle.load_vpgc(again, tmp_path)
    vittle.load_bottleneck(again, tmp_path)
    assert all(torch.equal(each, again.state_dict()[name]) for name, each in model.state_dict().items())


def test_a_call_that_names_an_argument_twice() -> None:
    model, batch = tiny_llava(), make_batch()
    vittle.attach_vpgc(model)
    with pytest.raises(TypeError, match=r"forward\(\) got multiple values for argument 'input_ids'"):
        model(batch["input_ids"], input_ids=batch["input_ids"])


def test_weights_are_fp32_whatever_is_the_default() -> None:
    model, before = tiny_llava(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = vittle.attach_vpgc(model)
    finally:
        torch.set_default_dtype(before)
    assert {each.dtype for each in module.parameters()} == {torch.float32}
