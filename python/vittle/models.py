"""Models and processors from a folder or a Hub id: plain, with adapters, with a bottleneck and a second look."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForImageTextToText, AutoProcessor, Blip2Processor, LlavaProcessor
from transformers.utils import logging

from vittle.errors import UserError
from vittle.methods import bottleneck, vpgc

ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT writes beside its adapters."""

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What a model is read from: weights, settings, chat template, tokenizer."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and \
polite answers to the user's questions.
{%- for message in messages -%}
{{ ' ' if message['role'] == 'user' or loop.first }}{{ message['role'] | upper }}:{{ ' ' }}
{%- for part in message['content'] -%}
{{ '<image>\n' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{{ eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt }}"""
"""LLaVA-1.5's, ``v1``: Vicuna's system prompt and roles."""


def folder_of(path: str) -> Path:
    """The folder itself, or where the files of a Hub id are, which are fetched if they are not there.

    Raises:
        UserError: there is no such model.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise _no_model(path, error) from error


def load_model(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """A vision-language model, safetensors only.

    Raises:
        UserError: there is no such model.
    """
    try:
        return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _no_model(path, error) from error


def load_tuned(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model as a run of ``vittle train`` left it, in eval mode: with PEFT's adapters and its methods, if any.

    Raises:
        UserError: there is no such model, or its adapters or methods do not fit.
    """
    folder = folder_of(path)
    has_adapters = (folder / ADAPTER_CONFIG).is_file()
    model = _with_adapters(folder, dtype) if has_adapters else load_model(str(folder), dtype)
    if (folder / vpgc.FILES.config).is_file():
        vpgc.load_vpgc(model, folder, freeze=False)
    if (folder / bottleneck.FILES.config).is_file():
        bottleneck.load_bottleneck(model, folder)
    return model.eval()


def _with_adapters(folder: Path, dtype: torch.dtype) -> Any:
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} has an {ADAPTER_CONFIG} and no adapter_model.safetensors; save the adapters so")
    model = load_model(_base_of(folder), dtype)
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_model(str(folder), error) from error


def _base_of(folder: Path) -> str:
    """The model that a folder's adapters are for."""
    path = folder / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(base, str):
        raise UserError(f"{path} has base_model_name_or_path {base!r}; must name the model that the adapters are for")
    return base


def fingerprint(path: str) -> str:
    """What tells a model from all others: a digest of its folder's weights, settings, tokenizer and template.

    Raises:
        UserError: there is no such model.
    """
    folder, digest = folder_of(path), hashlib.sha256()
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise _no_model(path, FileNotFoundError("it has no config.json"))
    for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
        stat = file.stat()
        digest.update(f"{file.name}\0{_sha256(file, stat.st_size, stat.st_mtime_ns)}\0".encode())
    if (folder / ADAPTER_CONFIG).is_file():
        digest.update(fingerprint(_base_of(folder)).encode())
    return digest.hexdigest()


@cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Of a file of this size, last changed then."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_processor(path: str) -> Any:
    """A vision-language model's processor, which takes any number of images anywhere in a text.

    Raises:
        UserError: there is no such model.
    """
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _no_model(path, error) from error
    return _interleaved(processor) if isinstance(processor, Blip2Processor) else processor


def _interleaved(processor: Any) -> LlavaProcessor:
    """BLIP-2's processor puts one image before a text; LLaVA's, told so, puts as many tokens wherever one is marked."""
    return LlavaProcessor(
        processor.image_processor, processor.tokenizer,
        patch_size=1 << 30, num_additional_image_tokens=processor.num_query_tokens,  # no patches, all queries
        vision_feature_select_strategy="full", chat_template=processor.chat_template or CHAT_TEMPLATE,
    )  # fmt: skip


def _no_model(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"model is {path!r}; must be a folder or Hub id of a vision-language model: {reason}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of files: a model's loading and writing, in the middle of the table."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
