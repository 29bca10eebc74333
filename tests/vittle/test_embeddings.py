"""Embeddings against Hugging Face models that are run by hand, and files of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from families import VISION
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vittle import UserError
from vittle.metrics import CLUB, embed_images, embed_texts, read_embeddings, write_embeddings

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *"what is on the left of red square blue".split()]
TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP_TEXT = {**TEXT, "hidden_size": 24, "max_position_embeddings": 10}


def clip() -> Any:
    return hf.CLIPModel(hf.CLIPConfig(vision_config=VISION, text_config=CLIP_TEXT))


def siglip() -> Any:
    return hf.SiglipModel(hf.SiglipConfig(vision_config=VISION, text_config=CLIP_TEXT))


IMAGE_ENCODERS: dict[str, tuple[Callable[[], Any], int]] = {
    "clip": (clip, 1),
    "clip vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), 1),
    "siglip": (siglip, 0),
    "siglip vision": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), 0),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), 1),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)), 1),
    "dinov2 with registers": (lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VISION)), 5),
}
"""And how many tokens come before the patches."""


def saved(model: Any, folder: Path, length: int = 12) -> Any:
    """A model with norms that are not the identity, beside an image processor and a tokenizer."""
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            torch.nn.init.normal_(parameter, mean=1.0)
    model.eval().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8, do_convert_rgb=False).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", model_max_length=length, model_input_names=["input_ids"],
    ).save_pretrained(folder)  # fmt: skip
    return model


def pictures() -> list[Image.Image]:
    """Five of several sizes and modes."""
    draw = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "RGB", "RGB")
    return [
        Image.fromarray(draw.integers(0, 255, (9 + i, 12 - i, 3), dtype=np.uint8)).convert(mode)
        for i, mode in enumerate(modes)
    ]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", IMAGE_ENCODERS)
def test_images(name: str, tmp_path: Path) -> None:
    """The mean of the patch tokens that the last layer, caught by a hook, gives out: no norm after it counts."""
    make, before = IMAGE_ENCODERS[name]
    torch.manual_seed(0)
    model = saved(make(), tmp_path)
    tower = getattr(model, "vision_model", model)
    layers = [module for module in tower.modules() if type(module).__name__.endswith("Layer")]
    caught: list[Tensor] = []
    layers[-1].register_forward_hook(
        lambda module, args, output: caught.append(output if isinstance(output, Tensor) else output[0])
    )
    processor, wanted = CLIPImageProcessorPil.from_pretrained(tmp_path), []
    for picture in pictures():
        with torch.no_grad():
            tower(pixel_values=processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"])
        tokens = caught.pop()[0]
        assert tokens.shape == (4 + before, 16)
        wanted.append(unit(tokens[before:].mean(0)))
    found = embed_images(iter(pictures()), tmp_path, batch_size=2, device="cpu")
    assert found.dtype == torch.float32 and found.shape == (5, 16)
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [clip, siglip, lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**TEXT))])
def test_texts(make: Callable[[], Any], tmp_path: Path) -> None:
    """The mean of the embedding layer's output over all tokens but the first."""
    torch.manual_seed(0)
    model = saved(make(), tmp_path, length=8)
    tower, wanted = getattr(model, "text_model", model), []
    texts = ["what is on the left", "red", "", "the red square is left of the blue square"]
    for text in texts:
        words = [WORDS.index(word) for word in text.split()]
        ids = torch.tensor([[0, *words[:6], 2]])
        with torch.no_grad():
            wanted.append(unit(tower.embeddings(input_ids=ids)[0, 1:].mean(0)))
    found = embed_texts(texts, str(tmp_path), batch_size=3, device="cpu")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-6, rtol=1e-5)


def test_embeddings_train_a_club(tmp_path: Path) -> None:
    saved(clip(), tmp_path)
    visual = embed_images(pictures(), tmp_path)
    CLUB(16, 16, 8).fit(visual, visual, steps=1)


def test_progress_fits_80_columns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved(clip(), tmp_path)
    capfd.readouterr()
    embed_images(pictures(), tmp_path, batch_size=2, progress=True)
    bars = [line for line in capfd.readouterr().err.split("\r") if line.startswith("images:")]
    assert any("/5" in bar for bar in bars) and max(map(len, bars)) <= 80
    embed_images(pictures(), tmp_path)
    assert "images:" not in capfd.readouterr().err


def test_refuses_inputs(tmp_path: Path) -> None:
    saved(clip(), tmp_path)
    swin = hf.SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    saved(hf.SwinModel(swin), tmp_path / "swin")
    (tmp_path / "empty").mkdir()
    assert refusal(lambda: embed_images([], tmp_path)) == "images is empty; must hold at least one image"
    assert refusal(lambda: embed_texts([], tmp_path)) == "texts is empty; must hold at least one text"
    assert refusal(lambda: embed_texts("red", tmp_path)) == "texts is one string; must be a list of them"
    assert refusal(lambda: embed_texts(["red"], tmp_path, batch_size=0)) == "batch_size is 0; must be at least 1"
    assert "a SwinModel; must end in a token for each patch" in refusal(
        lambda: embed_images(pictures(), tmp_path / "swin")
    )
    wrong = f"encoder is {str(tmp_path / 'empty')!r}; must be a folder or Hub id of "
    assert refusal(lambda: embed_images(pictures(), tmp_path / "empty")).startswith(f"{wrong}an image encoder: ")
    assert refusal(lambda: embed_texts(["red"], tmp_path / "empty")).startswith(f"{wrong}a text encoder: ")


def test_a_tokenizer_without_special_tokens(tmp_path: Path) -> None:
    model = saved(clip(), tmp_path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    found = embed_texts(["red square", "red", "", "</s>"], tmp_path)  # no special token begins a text: all count
    with torch.no_grad():
        one = unit(model.text_model.embeddings(input_ids=torch.tensor([[WORDS.index("red")]]))[0, 0])
    torch.testing.assert_close(found[1], one, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[2], found[3])
    hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path)
    assert refusal(lambda: embed_texts(["red", ""], tmp_path)).startswith("texts has '', of no token")


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        embeddings = {"visual": torch.randn(4, 3).T.contiguous().T, "text": torch.randn(4, 2, dtype=torch.float64)}
        write_embeddings(embeddings, tmp_path / "clean.safetensors")
        found = read_embeddings(tmp_path / "clean.safetensors")
        assert found.keys() == embeddings.keys()
        assert all(torch.equal(found[name], value) for name, value in embeddings.items())
        assert [path.name for path in tmp_path.iterdir()] == ["clean.safetensors"]

    def test_refuses(self, tmp_path: Path) -> None:
        path = tmp_path / "clean.safetensors"
        for tensors, message in (
            ({}, " is empty; must hold at least one tensor"),
            ({"a": torch.ones(3)}, ": a has shape (3,); must be (n, d)"),
            ({"a": torch.ones(3, 2).int()}, ": a is of torch.int32; must be a floating tensor (n, d)"),
            ({"a": torch.full((3, 2), torch.nan)}, ": a has values that are not finite, first in row 0"),
            ({"a": torch.ones(3, 2), "b": torch.ones(2, 2)}, " has unequal numbers of rows (a 3, b 2); must have one"),
        ):
            assert refusal(partial(write_embeddings, tensors, path)).startswith(f"embeddings{message}")
            assert not path.exists()
            save_file(tensors, tmp_path / "other")
            assert refusal(lambda: read_embeddings(tmp_path / "other")).startswith(f"{tmp_path / 'other'}{message}")
        path.write_bytes(b"no tensors at all")
        assert "is no safetensors file, or is damaged" in refusal(lambda: read_embeddings(path))
        assert "does not exist" in refusal(lambda: read_embeddings(tmp_path / "none"))
        good = {"a": torch.ones(3, 2)}
        assert "cannot be written" in refusal(lambda: write_embeddings(good, tmp_path / "none" / "file"))
        (tmp_path / "folder").mkdir()
        assert "cannot be written" in refusal(lambda: write_embeddings(good, tmp_path / "folder"))
        assert not list(tmp_path.glob(".*"))
