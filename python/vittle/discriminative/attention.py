"""Where a model looks in pictures: the map by which VPG-C (arXiv 2308.04152, section 2.2) finds what it ignores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from vittle.discriminative.pipeline import Attend
from vittle.errors import UserError
from vittle.evaluate import prompt_of, tensors_of
from vittle.methods.attachment import decoder_layers, vision_ids
from vittle.methods.peft import base_model
from vittle.methods.vpgc import ask_qformer


def attention_of(model: Any, processor: Any, prompt: str = "Describe the image.") -> Attend:
    """A model's own attention, for :func:`vittle.discriminative.make_pairs`.

    With a Q-Former: its queries' cross-attention to the image, averaged over layers, heads and queries. Without: the
    language model's attention to the image's tokens, averaged over layers, heads and the text tokens that come after
    them.

    Args:
        model: LLaVA, BLIP-2 or InstructBLIP, plain or tuned, in eval mode.
        processor: its processor; with a chat template, unless the model has a Q-Former.
        prompt: what the language model reads after the image; of no matter with a Q-Former.

    Returns:
        A function of N pictures, to float32 (N, h, w): a patch of the vision tower a number.
    """

    def attend(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        if has_queries:
            tensors = dict(processor.image_processor(list(images), return_tensors="pt"))
        else:
            texts = [prompt_of(processor, f"<image>\n{prompt}")] * len(images)
            tensors = tensors_of(processor, texts, [[image] for image in images])
        tensors = {name: tensor.to(base.device) for name, tensor in tensors.items()}
        with torch.inference_mode(), _eager(base):
            rows = _of_queries(base, tensors) if has_queries else _of_language(base, tensors)
        side = math.isqrt(rows.shape[1])
        if side * side != rows.shape[1]:
            kind = type(base).__name__
            raise UserError(f"{kind} sees {rows.shape[1]} patches of a picture; must be a square of them")
        return rows.view(-1, side, side).cpu().numpy()

    base = base_model(model)
    has_queries = hasattr(base, "query_tokens")
    return attend


def _of_queries(model: Any, tensors: dict[str, Tensor]) -> Tensor:
    """(N, P), of the patches without the class token."""
    features = model.vision_model(tensors["pixel_values"].to(model.dtype)).last_hidden_state
    queries = model.query_tokens.expand(len(features), -1, -1)
    layers = [m for name, m in model.qformer.named_modules() if name.endswith("crossattention.attention")]
    with _weights_of(layers, lambda weights: weights.mean((1, 2))) as of_layers:
        ask_qformer(model.qformer, queries, features)
    return torch.stack(of_layers).mean(0)[:, 1:]


def _of_language(model: Any, tensors: dict[str, Tensor]) -> Tensor:
    """(N, P), of the image's tokens."""
    vision = torch.isin(tensors["input_ids"], torch.tensor(vision_ids(model), device=model.device))
    after = tensors["attention_mask"].bool() & ~vision & (vision.cumsum(1) == vision.sum(1, keepdim=True))
    layers: list[Any] = [layer.self_attn for layer in decoder_layers(model)[0]]

    def over_text(weights: Tensor) -> Tensor:
        each = after.to(weights.dtype) / after.sum(1, keepdim=True)
        return torch.einsum("bhqk,bq->bk", weights, each) / weights.shape[1]

    with _weights_of(layers, over_text) as of_layers:
        model(**tensors)
    return torch.stack(of_layers).mean(0)[vision].view(len(vision), -1)


@contextmanager
def _weights_of(layers: Sequence[nn.Module], mean: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """The attention of each layer as it is computed, by what brings weights (B, H, Q, K) to (B, K)."""
    found: list[Tensor] = []

    def leaves(layer: nn.Module, args: Any, output: Any) -> None:
        found.append(mean(output[1].float()))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(leaves).remove)
        yield found


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """With attention that has weights: fused ones return none."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
