"""Images and texts as the vectors that EMI measures (arXiv 2502.00577, the released code), and files of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from vittle.errors import UserError
from vittle.files import whole

Embedder = Callable[[Sequence[Any]], Tensor]
"""Of a batch of images, or of texts: (batch, d)."""

MAX_TOKENS = 512
"""Of a text; the rest is cut."""


def embed_images(
    images: Iterable[Image.Image],
    encoder: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    """The mean over an image's patches after the encoder's last layer, L2-normalised: (images, d), fp32, on the CPU.

    That layer's output is ``hidden_states[-1]``, before the encoder's last norm; class and register tokens are left
    out. The paper's encoder is CLIP ViT-B/32, of width 768.

    Args:
        images: of any mode and size; they are read a batch at a time.
        encoder: the folder or Hub id of a vision transformer, such as CLIP (with or without its text half), SigLIP,
            ViT or DINOv2, with an image processor and in safetensors.
        batch_size: images at a time.
        device: that the encoder runs on; by default a GPU if there is one.
        progress: whether a bar shows.

    Raises:
        UserError: there is no such encoder, it has no patches, or there are no images.
    """
    return embed(images, image_embedder(encoder, device), batch_size, "image", progress)


def image_embedder(encoder: str | os.PathLike[str], device: str | torch.device | None = None) -> Embedder:
    """An image encoder, loaded once, as what embeds a batch; as :func:`embed_images`, not yet normalised."""
    model, processor = _load(encoder, "AutoImageProcessor", "an image encoder", device)
    tower = getattr(model, "vision_model", model)
    size = getattr(tower.config, "patch_size", None)
    height, width = size if isinstance(size, Sequence) else (size, size)

    def embedded(batch: Sequence[Image.Image]) -> Tensor:
        pixels = processor([image.convert("RGB") for image in batch], return_tensors="pt")["pixel_values"]
        states = tower(pixel_values=pixels.to(model.device), output_hidden_states=True).hidden_states[-1]
        patches = (pixels.shape[-2] // height) * (pixels.shape[-1] // width) if height and pixels.dim() == 4 else 0
        if states.dim() != 3 or not 0 < patches <= states.shape[1]:
            kind = type(tower).__name__
            raise UserError(f"encoder is {str(encoder)!r}, a {kind}; must end in a token for each patch")
        return states[:, -patches:].mean(1)

    return embedded


def embed_texts(
    texts: Iterable[str],
    encoder: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    """The mean over a text's tokens before the encoder's first layer, L2-normalised: (texts, d), fp32, on the CPU.

    That is ``hidden_states[0]``, the output of the embedding layer, which knows no context. Padding is left out, and so
    is the special token that begins every text, where the tokenizer writes one; an empty text is the token that ends
    one. The paper's encoder is xlm-roberta-base, of width 768.

    Args:
        texts: each is cut after 512 tokens, or after as many as the encoder takes.
        encoder: the folder or Hub id of a text encoder, or of CLIP or SigLIP as a whole, with a tokenizer and in
            safetensors.
        batch_size: texts at a time.
        device: that the encoder runs on; by default a GPU if there is one.
        progress: whether a bar shows.

    Raises:
        UserError: there is no such encoder, there are no texts, or one has no token besides the first.
    """
    if isinstance(texts, str):
        raise UserError("texts is one string; must be a list of them")
    return embed(texts, text_embedder(encoder, device), batch_size, "text", progress)


def text_embedder(encoder: str | os.PathLike[str], device: str | torch.device | None = None) -> Embedder:
    """A text encoder, loaded once, as what embeds a batch; as :func:`embed_texts`, not yet normalised."""
    model, tokenizer = _load(encoder, "AutoTokenizer", "a text encoder", device)
    tower = getattr(model, "text_model", model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    longest = min(MAX_TOKENS, tokenizer.model_max_length)
    stand_in = "" if len(tokenizer("")["input_ids"]) > 1 else tokenizer.eos_token or ""

    def embedded(batch: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            [text or stand_in for text in batch], padding=True, padding_side="right",
            truncation=True, max_length=longest, return_attention_mask=True, return_tensors="pt",
        ).to(model.device)  # fmt: skip
        ids, attention = tokens["input_ids"], tokens["attention_mask"]
        states = tower(input_ids=ids, attention_mask=attention, output_hidden_states=True).hidden_states[0]
        first = int(ids[0, 0].item() in (tokenizer.bos_token_id, tokenizer.cls_token_id))
        kept = attention[:, first:, None].to(states)
        if bool((counts := kept.sum(1)).eq(0).any()):
            text = batch[int(counts.argmin())]
            raise UserError(f"texts has {text!r}, of no token; must have one, beside that which begins all texts")
        return (states[:, first:] * kept).sum(1) / counts

    return embedded


def _load(encoder: str | os.PathLike[str], inputs: str, name: str, device: Any) -> tuple[Any, Any]:
    """An encoder in eval mode and what prepares its inputs."""
    import transformers  # takes seconds, which the numbers of embeddings need not wait for

    from vittle.models import quiet

    try:
        with quiet():
            prepares = getattr(transformers, inputs).from_pretrained(encoder)
            model = transformers.AutoModel.from_pretrained(encoder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"encoder is {str(encoder)!r}; must be a folder or Hub id of {name}: {reason}") from error
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), prepares


def embed(
    items: Iterable[Any], embedder: Embedder, batch_size: int = 32, unit: str = "item", progress: bool = False
) -> Tensor:
    """Images or texts, a batch at a time: (items, d), L2-normalised, on the CPU.

    Raises:
        UserError: there are none, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; must be at least 1")
    total, rows, stream = len(items) if isinstance(items, Sized) else None, [], iter(items)
    with tqdm(total=total, desc=f"{unit}s", unit=unit, ncols=80, leave=False, disable=not progress) as bar:
        while batch := list(islice(stream, batch_size)):
            with torch.no_grad():
                rows.append(nn.functional.normalize(embedder(batch), dim=-1).cpu())
            bar.update(len(batch))
    if not rows:
        raise UserError(f"{unit}s is empty; must hold at least one {unit}")
    return torch.cat(rows)


def write_embeddings(
    embeddings: Mapping[str, Tensor], path: str | os.PathLike[str], origin: Mapping[str, str] | None = None
) -> None:
    """Writes embeddings by their names to a safetensors file, whole or not at all.

    Args:
        embeddings: each (n, d) and floating; n, the number of samples, is the same for all.
        path: of the file, in a folder that exists.
        origin: of what and by what they are; :func:`read_origin` reads it.

    Raises:
        UserError: the embeddings are not as they must be, or the file cannot be written.
    """
    _must_align(embeddings, "embeddings")
    write_tensors(embeddings, path, origin)


def read_embeddings(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The embeddings by their names, each (n, d), that a safetensors file holds.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not embeddings of the same n samples.
    """
    embeddings = read_tensors(path)
    _must_align(embeddings, str(path))
    return embeddings


def _must_align(embeddings: Mapping[str, Tensor], where: str) -> None:
    if not embeddings:
        raise UserError(f"{where} is empty; must hold at least one tensor")
    for name, value in embeddings.items():
        must_be_embeddings(f"{where}: {name}", value)
    counts = {name: len(value) for name, value in embeddings.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"{where} has unequal numbers of rows ({listed}); must have one row a sample in each tensor")


def must_be_embeddings(name: str, value: Tensor, least: int = 1) -> None:
    """Refuses what is not (n, d), floating and finite with at least so many rows.

    Raises:
        UserError: it is not; ``name`` says which argument.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{name} is of {kind}; must be a floating tensor (n, d)")
    if value.dim() != 2 or not value.shape[1]:
        raise UserError(f"{name} has shape {tuple(value.shape)}; must be (n, d)")
    if len(value) < least:
        raise UserError(f"{name} has {len(value)} rows; must have at least {least}")
    if not bool((is_finite := value.isfinite().all(1)).all()):
        raise UserError(f"{name} has values that are not finite, first in row {int(is_finite.int().argmin())}")


def read_origin(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """What :func:`write_embeddings` was told of a file's origin; None: nothing, or there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {}) or None
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or is damaged: {error}") from error


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with whole(Path(path)) as partial:
            save_file(stored, partial, dict(metadata) if metadata else None)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A safetensors file's tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; must be a safetensors file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or is damaged: {error}") from error
