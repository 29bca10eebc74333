"""`vittle train --vpgc` on discriminative pairs: what is trained, what is written, how it resumes, what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from test_vpgc import blip
from transformers import Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import vittle
from vittle import UserError
from vittle.cli import main
from vittle.data import Collator, LlavaDataset
from vittle.demo.checkpoint import make_model, make_processor, save
from vittle.demo.edits import write_questions, write_scene_pairs
from vittle.discriminative import to_llava
from vittle.evaluate import Asking, ask, batches, generate
from vittle.evaluation import load
from vittle.models import load_model, load_processor, load_tuned
from vittle.tasks.exact import Exact

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of digit scenes and captions, both in LLaVA's format."""
    pairs = write_scene_pairs(tmp_path_factory.mktemp("pairs"), split="train", count=8, seed=0)
    return to_llava(pairs, pairs.with_name("llava.json"), caption_prompt="Describe the scene.")


@pytest.fixture(scope="module", params=["LLaVA", "BLIP-2"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, with its own kind's processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    if request.param == "LLaVA":
        processor = make_processor()
        save(make_model(processor), processor, folder)
    else:
        write_blip(folder)
    return folder


def write_blip(folder: Path, image: int = 8) -> None:
    """A BLIP-2 with the demo's words and its own kind's processor; an image is four tokens."""
    tokenizer = make_processor().tokenizer
    model = blip(text={"vocab_size": len(tokenizer)}, vision={"image_size": image, "patch_size": image // 2})
    model.config.image_token_index = model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": image, "width": image})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)


def test_an_encoder_decoder_answers_without_its_prompt() -> None:
    processor = make_processor()
    size = len(processor.tokenizer)
    text = hf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=size, decoder_start_token_id=0
    )
    model, image = blip(language=text), processor.tokenizer.convert_tokens_to_ids("<image>")
    model.config.image_token_index = model.config.image_token_id = image
    words = torch.randint(image + 1, size, (2, 40), generator=torch.Generator().manual_seed(0))
    tensors = {
        "input_ids": torch.cat([torch.full((2, 4), image), words], 1), "attention_mask": torch.ones(2, 44).long(),
        "pixel_values": torch.randn(2, 3, 8, 8),
    }  # fmt: skip
    settings = {"max_new_tokens": 3, "do_sample": False}
    ids = model.generate(**tensors, **settings)
    assert ids.shape[1] == 4  # the start token, and no prompt
    assert generate(model, processor, tensors, settings) == processor.batch_decode(ids, skip_special_tokens=True)


def test_a_processor_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    blip("InstructBlip").save_pretrained(tmp_path)
    tokenizer = make_processor().tokenizer
    tokenizer.chat_template = None
    images = BlipImageProcessorPil(size={"height": 8, "width": 8})
    hf.InstructBlipProcessor(images, tokenizer, tokenizer, num_query_tokens=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="whose processor has no chat template; must have one, to be asked"):
        load(str(tmp_path))


def run(small: Path, data: Path, output: Path, *more: str) -> int:
    return main([
        "train", "--model", str(small), "--data", str(data), "--images", str(data.parent), "--output", str(output),
        "--batch-size", "4", "--max-steps", str(STEPS), "--learning-rate", "1e-2", "--workers", "0", "--log-steps", "1",
        "--save-steps", "2", "--keep-checkpoints", "0", "--no-grouping", *more,
    ])  # fmt: skip


def changed(small: Path, output: Path) -> set[str]:
    before, after = load_file(small / "model.safetensors"), load_file(output / "model.safetensors")
    assert after.keys() <= before.keys()  # tied ones are written once
    return {name for name, tensor in after.items() if not torch.equal(tensor.float(), before[name].float())}


def some(data: Path, processor: Any) -> dict[str, Any]:
    dataset = LlavaDataset(data, data.parent)
    batch = Collator(processor)([dataset[index] for index in range(6)])
    assert len(batch["pixel_values"]) > 6  # pairs and captions
    return batch


@pytest.mark.parametrize("tuning", ["frozen", "projector", pytest.param("lora", marks=pytest.mark.slow)])
def test_what_is_trained(
    small: Path, data: Path, tmp_path: Path, tuning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert run(small, data, output, "--plain", "--vpgc", "--tuning", tuning, "--lora-rank", "2") == 0
    shown = capsys.readouterr().out
    assert re.search(r"; the second look took \d+\.\d% of the forward passes; the model is in", shown)
    head = next(line for line in shown.splitlines() if "loss" in line)
    assert head.split() == ["step", "loss", "look", "tokens/s"]
    if tuning != "lora":
        assert all(("projector" in name or "language_projection" in name) for name in changed(small, output))
        assert bool(changed(small, output)) == (tuning == "projector")
    weights = load_file(output / "vpgc.safetensors")
    assert all(tensor.any() for tensor in weights.values())
    model, processor = load_tuned(str(output)), load_processor(str(output))
    batch = some(data, processor)
    with torch.no_grad():
        looked = model(**batch).logits
        vittle.detach_vpgc(model)
        assert not torch.equal(model(**{k: v for k, v in batch.items() if k != "instruction_mask"}).logits, looked)
        vittle.load_vpgc(model, output / f"checkpoint-{STEPS}")
        assert torch.equal(model(**batch).logits, looked)


@pytest.mark.parametrize(
    "more",
    [pytest.param((), marks=pytest.mark.slow), ("--loss", "instruct", "--layer", "3", "--beta", "0.01")],
)
def test_resumed(
    small: Path, data: Path, tmp_path: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, alone and with the bottleneck and L2T; other settings are named."""
    more = ("--vpgc", "2", *(more or ("--plain", "--tuning", "frozen")))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(small, data, whole, *more) == 0
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("checkpoint-4", "checkpoint-6", "*.safetensors"))
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2", dirs_exist_ok=True)
    capsys.readouterr()
    assert run(small, data, broken, *more, "--resume", "--vpgc", "1") == 2
    assert "vpgc.layer is 1 and was 2" in capsys.readouterr().err
    assert run(small, data, broken, *more, "--resume") == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    timed = {"tokens_per_second", "bottleneck_share", "second_look_share"}
    logs = [
        json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
        for folder in (whole, broken)
    ]
    one, two = ([{k: v for k, v in log.items() if k not in timed} for log in each] for each in logs)
    assert one == two and len(one) == STEPS
    for file in whole.glob("*.safetensors"):
        expected, found = load_file(file), load_file(broken / file.name)
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_questions_about_two_images_are_answered(small: Path, tmp_path: Path) -> None:
    """With one look a batch; the answers are text after the prompt."""
    questions = write_questions(tmp_path, split="held_out", count=6, seed=0)
    task = Exact(questions, questions.parent / "images")
    model, processor = load_model(str(small)), load_processor(str(small))
    model.eval()

    def answers() -> dict[str, str | None]:
        settings = Asking(max_new_tokens=4)
        return {
            each.id: each.text
            for batch in ask(model, processor, batches(task.samples, 3), asking=settings)
            for each in batch
        }

    plain, looks = answers(), []
    module = vittle.attach_vpgc(model)
    module.register_forward_hook(lambda *call: looks.append(1))
    assert answers() == plain and len(looks) == 2
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(30 * torch.randn(parameter.shape))
    looked = answers()
    assert looked.keys() == plain.keys() and len(looks) == 4
    assert not any("Which" in str(text) or "<image>" in str(text) for text in looked.values())


def test_nothing_to_train(small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(small, data, tmp_path / "one", "--plain", "--tuning", "frozen") == 2
    assert "there is neither bottleneck nor second look; nothing would be trained" in capsys.readouterr().err
    assert run(small, data, tmp_path / "two", "--vpgc", "--stage", "align") == 2
    assert "stage is 'align', which trains the projector alone; leave out methods" in capsys.readouterr().err
