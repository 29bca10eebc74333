"""From a vision tower and a language model to a LLaVA, its projector aligned on captions, then tuned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from test_collate import metaspace
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vittle.cli import main
from vittle.data import CaptionCollator, Collator, LlavaDataset
from vittle.demo.scenes import write_dataset


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """A CLIP tower and a Llama of random weights, as their own libraries save them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    tower.save_pretrained(tmp_path / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "vision"
    )
    tokenizer = metaspace()
    llm = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=512))
    llm.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    return tmp_path / "vision", tmp_path / "language"


def test_two_stages_from_parts(parts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vision, language = map(str, parts)
    start = str(tmp_path / "start")
    assemble = ["assemble", "--vision", vision, "--language", language, "--output", start]
    assert main(assemble) == 0
    model, processor = AutoModelForImageTextToText.from_pretrained(start), AutoProcessor.from_pretrained(start)
    tower, llm = CLIPVisionModel.from_pretrained(vision), LlamaForCausalLM.from_pretrained(language)
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    ids = torch.tensor([[3, 5, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits[..., : llm.config.vocab_size], llm(ids).logits)
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")

    wide = processor.image_processor(Image.new("RGB", (32, 16), "red"), return_tensors="pt")["pixel_values"][0]
    assert wide.shape == (3, 16, 16)
    assert wide[:, 0].abs().max() < 0.03 and wide[0, 8].min() > 1  # the mean colour above, red in the middle

    data = write_dataset(tmp_path / "data", split="train", count=8, seed=0)
    images = str(tmp_path / "data" / "images")
    item = LlavaDataset(data, images)[0]
    batch = Collator(processor)([item])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.count("<image>") == 4 and "A chat between a curious user" in text
    plain = CaptionCollator(processor)([item])
    answer = item["messages"][1]["content"][0]["text"]
    labels = plain["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]).strip() == f"{answer}</s>"
    assert "USER" not in processor.tokenizer.decode(plain["input_ids"][0]) and not plain["instruction_mask"].any()

    common = ["--data", str(data), "--images", images, "--batch-size", "4", "--max-steps", "2", "--workers", "0"]
    common += ["--save-steps", "0", "--log-steps", "1"]
    aligned, tuned = str(tmp_path / "aligned"), str(tmp_path / "tuned")
    assert main(["train", "--stage", "align", "--model", start, "--output", aligned, *common]) == 0
    after = AutoModelForImageTextToText.from_pretrained(aligned).state_dict()
    before = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    assert main(["train", "--model", aligned, "--output", tuned, *common]) == 0
    assert (tmp_path / "tuned" / "bottleneck.safetensors").exists()

    capsys.readouterr()
    assert main(assemble) == 2
    assert f"output {start} is not an empty folder" in capsys.readouterr().err
    assert main([*assemble[:2], language, *assemble[3:-1], str(tmp_path / "x")]) == 2
    assert f"vision is '{language}', a LlamaModel; must be a CLIP or SigLIP" in capsys.readouterr().err
    other = str(tmp_path / "y")
    assert main(["train", "--stage", "align", "--tuning", "lora", "--model", start, "--output", other, *common]) == 2
    assert "stage is 'align', which trains the projector alone" in capsys.readouterr().err
