"""Models of transformers' own classes, with random weights, to be timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """A LLaVA's; with queries a BLIP-2's, whose Q-Former attends the image every other layer. Images are square."""

    layers: int
    width: int
    intermediate: int
    heads: int
    vocabulary: int
    vision_layers: int
    vision_width: int
    vision_intermediate: int
    vision_heads: int
    image: int
    patch: int
    queries: int = 0
    query_layers: int = 0
    query_width: int = 0

    @property
    def image_tokens(self) -> int:
        return self.queries or (self.image // self.patch) ** 2

    @property
    def image_token(self) -> int:
        return self.vocabulary - 1


LLAVA_7B = Shape(32, 4096, 11008, 32, 32064, 24, 1024, 4096, 16, 336, 14)
"""LLaVA-1.5-7B."""

DEMO = Shape(8, 128, 256, 4, 75, 4, 128, 512, 4, 64, 16)
"""The model of `vittle demo`."""


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """The model, made on its device in its dtype."""
    import transformers as hf

    vision = {
        "hidden_size": shape.vision_width, "intermediate_size": shape.vision_intermediate,
        "num_hidden_layers": shape.vision_layers, "num_attention_heads": shape.vision_heads,
        "image_size": shape.image, "patch_size": shape.patch,
    }  # fmt: skip
    text = hf.LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, vocab_size=shape.vocabulary, max_position_embeddings=4096,
    )  # fmt: skip
    kind: Any = hf.LlavaForConditionalGeneration
    config: Any = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=text, image_token_index=shape.image_token
    )
    if shape.queries:
        qformer = {
            "hidden_size": shape.query_width, "intermediate_size": 4 * shape.query_width, "vocab_size": 1,
            "num_hidden_layers": shape.query_layers, "num_attention_heads": max(1, shape.query_width // 64),
            "encoder_hidden_size": shape.vision_width,
        }  # fmt: skip
        kind = hf.Blip2ForConditionalGeneration
        config = hf.Blip2Config(
            vision_config=vision, qformer_config=qformer, text_config=text.to_dict(),
            num_query_tokens=shape.queries, image_token_index=shape.image_token,
        )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return kind(config)
    finally:
        torch.set_default_dtype(default)
