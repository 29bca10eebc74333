"""Random small models of the families that the docs list, transformers' own classes, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
IMAGE = 50
VIDEO = 51


@dataclass(frozen=True)
class Family:
    """A model, the tokens of one image, and its vision inputs for some images."""

    name: str
    make: Callable[[], Any]
    image: tuple[int, ...]
    pixels: Callable[[int], dict[str, Tensor]]
    extra: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()

    def batch(self, left_padding: bool = False, images: tuple[int, ...] = (1, 2, 0)) -> dict[str, Tensor]:
        """A sample with one image, one with two, one without, as the model's processor would make them."""
        generator = torch.Generator().manual_seed(1)
        rows = []
        for count in images:
            row = torch.randint(10, 40, (3,), generator=generator).tolist()
            for _ in range(count):
                row += [*self.image, *torch.randint(10, 40, (2,), generator=generator).tolist()]
            rows.append(row + torch.randint(10, 40, (5,), generator=generator).tolist())
        width = max(map(len, rows))
        ids, attention = (
            torch.zeros(len(rows), width, dtype=torch.long),
            torch.zeros(len(rows), width, dtype=torch.long),
        )
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if left_padding else slice(len(row))
            ids[i, span], attention[i, span] = torch.tensor(row), 1
            labels[i, span.stop - 3 : span.stop] = ids[i, span.stop - 3 : span.stop]
        batch = {"input_ids": ids, "attention_mask": attention, "labels": labels} | self.extra(ids)
        return batch | (self.pixels(sum(images)) if sum(images) else {})


def _images(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def _llava() -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
        )
    )


def _llava_next() -> Any:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE,
            image_grid_pinpoints=[[8, 16]],
        )
    )  # fmt: skip


def _qwen() -> Any:
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = TEXT | {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=52, vision_end_token_id=53,
        )
    )  # fmt: skip


def _qwen_pixels(count: int) -> dict[str, Tensor]:
    patches = torch.randn(count * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}


def _internvl() -> Any:
    vision = VISION | {"image_size": [8, 8], "patch_size": [4, 4]}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**vision), text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE,
            image_seq_length=1, downsample_ratio=0.5,
        )
    )  # fmt: skip


def _idefics3() -> Any:
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(
            vision_config=VISION, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2,
        )
    )  # fmt: skip


def _smolvlm() -> Any:
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            vision_config=VISION, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2,
        )
    )  # fmt: skip


def _tiles(count: int) -> dict[str, Tensor]:
    """One image a sample of (1, 2, 0): padded to two images a row."""
    pixels, mask = torch.zeros(3, 2, 3, 8, 8), torch.zeros(3, 2, 8, 8, dtype=torch.bool)
    for row, column in ((0, 0), (1, 0), (1, 1))[:count]:
        pixels[row, column], mask[row, column] = _images(1)[0] + row + column, True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _gemma3() -> Any:
    text = TEXT | {"head_dim": 8, "sliding_window": 8}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(**text), mm_tokens_per_image=4,
            vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
            image_token_index=IMAGE, boi_token_index=52, eoi_token_index=53,
        )
    )  # fmt: skip


def _paligemma() -> Any:
    text = TEXT | {"head_dim": 8, "num_key_value_heads": 1}
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
            text_config=hf.GemmaConfig(**text),
            image_token_index=IMAGE, projection_dim=32,
        )
    )  # fmt: skip


def _token_types(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


FOUR = (IMAGE,) * 4
FAMILIES = [
    Family("LLaVA-1.5", _llava, FOUR, lambda n: {"pixel_values": _images(n)}),
    Family(
        "LLaVA-NeXT", _llava_next, (IMAGE,) * 14,
        lambda n: {"pixel_values": _images(3 * n).view(n, 3, 3, 8, 8), "image_sizes": torch.tensor([[8, 16]] * n)},
    ),
    Family("Qwen2.5-VL", _qwen, (52, *FOUR, 53), _qwen_pixels),
    Family("InternVL3", _internvl, (IMAGE,), lambda n: {"pixel_values": _images(n)}),
    Family("Idefics3", _idefics3, (IMAGE,), _tiles),
    Family("SmolVLM", _smolvlm, (IMAGE,), _tiles),
    Family("Gemma 3", _gemma3, (52, *FOUR, 53), lambda n: {"pixel_values": _images(n)}, _token_types),
    Family("PaliGemma", _paligemma, FOUR, lambda n: {"pixel_values": _images(n)}, _token_types),
    Family("Llama (text only)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), (), lambda n: {}),
]  # fmt: skip
