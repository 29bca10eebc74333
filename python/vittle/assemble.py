"""``vittle assemble``: a Hugging Face LLaVA from a vision tower and a language model, the projector at random start."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vittle.errors import UserError
from vittle.models import CHAT_TEMPLATE

IMAGE_TOKEN = "<image>"


def assemble(vision: str, language: str, output: str, *, seed: int = 0) -> None:
    """Writes model, tokenizer and processor into a new folder.

    The vision tower is CLIP's or SigLIP's; its features are taken before its last layer, without a class token, from
    pictures padded to a square with the mean colour, as in LLaVA-1.5. The tokenizer gets an ``<image>`` token and, if
    it has none, a padding token.

    Raises:
        UserError: a part is not such a model, or the folder is not empty.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output {output} is not an empty folder; name a new one")
    tower = _part("vision", vision, AutoModel)
    tower = getattr(tower, "vision_model", tower)
    if not hasattr(tower.config, "patch_size") or not hasattr(tower.config, "image_size"):
        raise UserError(f"vision is {vision!r}, a {type(tower).__name__}; must be a CLIP or SigLIP vision tower")
    llm = _part("language", language, AutoModelForCausalLM)
    tokenizer = _part("language", language, AutoTokenizer)
    images = _padding(_part("vision", vision, AutoImageProcessor))

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise UserError(f"language is {language!r}, whose tokenizer has no token that ends an answer")
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    has_class_token = hasattr(getattr(tower, "embeddings", None), "class_embedding")
    strategy: Literal["default", "full"] = "default" if has_class_token else "full"

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config, text_config=llm.config, vision_feature_select_strategy=strategy,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
    ).to(llm.dtype)  # fmt: skip
    _fill(model.model.vision_tower, tower)
    _fill(model.get_decoder(), llm.get_decoder())
    _fill(model.get_output_embeddings(), llm.get_output_embeddings())
    model.generation_config = llm.generation_config
    processor = LlavaProcessor(
        images, tokenizer, patch_size=tower.config.patch_size, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token), chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _padding(images: Any) -> LlavaImageProcessorPil:
    """The tower's own sizes and statistics, on pictures that are padded to a square first, as LLaVA-1.5 trains."""
    settings = images.to_dict()
    names = ("size", "crop_size", "do_center_crop", "resample", "rescale_factor", "image_mean", "image_std")
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    return LlavaImageProcessorPil(**{"do_center_crop": False} | chosen, do_pad=True)


def _part(option: str, path: str, kind: Any) -> Any:
    try:
        return kind.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{option} is {path!r}; must be a folder or Hub id of such a model: {reason}") from error


def _fill(target: torch.nn.Module, source: torch.nn.Module) -> None:
    """The weights of a part; what the LLaVA's part has and the source has not, such as CLIP's last norm, is named."""
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in source.state_dict().items()}
    wanted = {name.removeprefix("vision_model."): name for name in target.state_dict()}
    if missing := wanted.keys() - weights.keys():
        raise UserError(f"{type(source).__name__} has no {min(missing)}, which the LLaVA's part needs")
    target.load_state_dict({full: weights[short] for short, full in wanted.items()})
