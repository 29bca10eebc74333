"""A random LLaVA of a few thousand weights, transformers' own class, and batches for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vittle_kernels import FusedIB
from vittle_kernels.backends.eager import forward as reference_forward
from vittle_kernels.backends.problem import Problem

IMAGE_TOKEN, IMAGE_TOKENS, VOCABULARY, LAYERS, WIDTH = 9, 4, 50, 4, 32


def tiny_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """Four decoder layers of width 32; an 8 x 8 image is four tokens."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, pad_token_id=0)
    return LlavaForConditionalGeneration(config).eval()


def make_batch(
    lengths: tuple[int, ...] = (14, 17, 11), images: tuple[int, ...] = (1, 2, 0), left_padding: bool = False
) -> dict[str, Tensor]:
    """Samples of different lengths and numbers of images; the images start at the sample's third token, the last
    third of a sample is its response, and what is between is instruction.
    """
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    instruction = torch.zeros_like(ids, dtype=torch.bool)
    for row, (length, count) in enumerate(zip(lengths, images, strict=True)):
        start = width - length if left_padding else 0
        text_start, response = start + 2 + count * IMAGE_TOKENS, start + length - length // 3
        ids[row, start : start + length] = torch.randint(10, VOCABULARY, (length,), generator=generator)
        ids[row, start + 2 : text_start] = IMAGE_TOKEN
        attention[row, start : start + length] = 1
        labels[row, response : start + length] = ids[row, response : start + length]
        instruction[row, text_start:response] = True
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels, "instruction_mask": instruction}
    if sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, 8, 8, generator=generator)
    return batch


def through_heads(bottleneck: FusedIB, hidden_states: Tensor, vision: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """What the paper's formula makes of hidden states (B, T, D), each token by the head of its modality: (out, kl)."""
    head = (~vision).long() if bottleneck.vision else torch.zeros_like(vision, dtype=torch.long)
    x = torch.einsum("btk,btmk->btm", hidden_states, bottleneck.weight_in[head]) + bottleneck.bias_in[head]
    x = nn.functional.gelu(x)
    posterior = torch.einsum("btk,btmk->btm", x, bottleneck.weight_out[head]) + bottleneck.bias_out[head]
    problem = Problem(posterior, bottleneck.alpha, None, None, None, seed, math.log(10))
    return reference_forward(problem, hidden_states)


def drawn_seeds(seed: int, count: int) -> list[Tensor]:
    """The seeds that a layer's next calls draw."""
    torch.manual_seed(seed)
    drawn = [torch.randint(2**63 - 1, (1,)) for _ in range(count)]
    torch.manual_seed(seed)
    return drawn
