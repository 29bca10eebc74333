"""Vittle (arXiv 2505.13946): a stochastic bottleneck after one decoder layer, CE + beta (KL_vision + KL_text).

Attached to a Hugging Face vision-language model it changes two things: the hidden states after the chosen layer pass
through :class:`vittle_kernels.FusedIB`, and in training the KL joins ``model(**batch).loss``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vittle.errors import UserError
from vittle_kernels import FusedIB

IGNORED = -100
"""The label of a token that the cross-entropy does not cover."""

WEIGHTS, CONFIG = "bottleneck.safetensors", "bottleneck_config.json"


@dataclass(frozen=True)
class BottleneckConfig:
    """Where the bottleneck stands and how much it weighs; the defaults are the paper's.

    Args:
        layer: it follows this many decoder layers; None: three quarters of them (24 of 32).
        prior: "fixed", Vittle (F); or "learnable", Vittle (L).
        alpha: the interpolation weight that a schedule ends at, and that inference uses.
        beta: weight of the KL, a mean over dimensions and tokens.
    """

    layer: int | None = None
    prior: Literal["fixed", "learnable"] = "fixed"
    alpha: float = 0.5
    beta: float = 0.1


AlphaSchedule = Callable[[float, float], float]

ALPHA_SCHEDULES: dict[str, AlphaSchedule] = {
    "sigmoid": lambda alpha, t: alpha / (1 + math.exp(-10 * (t - 0.5))),
    "cosine": lambda alpha, t: alpha * (1 - math.cos(math.pi * t)) / 2,
    "constant": lambda alpha, t: alpha,
}
"""alpha at the fraction t of training: the released code's schedule, the paper's, and none."""


@dataclass
class _Tokens:
    """What one forward pass of the model says about its tokens, all (B, T)."""

    vision: Tensor
    text_kl: Tensor | None
    kl_weights: Tensor | None


@dataclass
class Attachment:
    """The bottleneck of one model: its module, and what passes between the model's hooks and the layer."""

    config: BottleneckConfig
    module: FusedIB
    image_token_id: int
    tokens: _Tokens | None = None
    kl: tuple[Tensor, Tensor] | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached means of the last training pass: ce, kl_vision, kl_text."""

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reads the batch: where its vision tokens are and which text tokens count towards the KL."""
        kwargs = dict(kwargs)
        instruction_mask = kwargs.pop("instruction_mask", None)
        vision = kwargs.pop("vision_mask", None)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if vision is None:
            if ids is None:
                raise UserError("the model got inputs_embeds and no input_ids; pass vision_mask, bool (B, T), too")
            vision = ids == self.image_token_id
        self.kl, self.tokens = None, _Tokens(vision, None, None)
        labels = kwargs.get("labels")
        if model.training and labels is not None:
            text_kl = instruction_mask
            if text_kl is None:  # as the released code: what the model reads and the loss does not cover
                attended = kwargs.get("attention_mask")
                text_kl = labels == IGNORED if attended is None else (labels == IGNORED) & attended.bool()
            text_kl = text_kl & ~vision
            weights = token_weights(labels, vision, text_kl, kwargs.get("num_items_in_batch"))
            self.tokens = _Tokens(vision, text_kl, weights)
        return args, kwargs

    def after_layer(self, hidden_states: Tensor) -> Tensor:
        """The hidden states (B, T, D) after the chosen layer, through the bottleneck."""
        if self.tokens is None:
            return hidden_states
        masks = (self.tokens.vision, self.tokens.text_kl, self.tokens.kl_weights)
        output = self.module(hidden_states, *(m if m is None else m.to(hidden_states.device) for m in masks))
        if output.kl_vision is not None:
            self.kl = output.kl_vision, output.kl_text
        return output.hidden_states

    def after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Joins the KL to the model's own loss, in training only."""
        tokens, kl, self.tokens, self.kl = self.tokens, self.kl, None, None
        if tokens is None or tokens.kl_weights is None or kl is None or not model.training:
            return output
        is_tuple = isinstance(output, tuple)
        ce = output[0] if is_tuple else output.loss
        kl_vision, kl_text = (each.to(ce.device) for each in kl)
        loss = ce + self.config.beta * (kl_vision + kl_text)
        self.metrics = {"ce": ce.detach(), "kl_vision": kl_vision.detach(), "kl_text": kl_text.detach()}
        if is_tuple:
            return (loss, *output[1:])
        output.loss = loss
        return output


def token_weights(labels: Tensor, vision: Tensor, text_kl: Tensor, num_items: Tensor | int | None) -> Tensor:
    """What each token's KL weighs, fp32 (B, T): a mean over its sample's tokens of the modality, and samples weigh
    as the cross-entropy weighs them, by their number of predicted tokens.

    ``num_items`` is that number in the global batch, which transformers' Trainer hands to the model. So however a
    global batch is cut, into accumulation steps or among ranks, its parts sum to one KL.
    """
    predicted = (labels[:, 1:] != IGNORED).sum(1, keepdim=True)
    total = predicted.sum() if num_items is None else num_items
    share = predicted / torch.as_tensor(total, device=labels.device).clamp(min=1)
    counts = torch.where(vision, vision.sum(1, keepdim=True), text_kl.sum(1, keepdim=True))
    return share / counts.clamp(min=1)


def attach_bottleneck(model: nn.Module, config: BottleneckConfig | None = None, *, backend: str = "auto") -> FusedIB:
    """Puts a bottleneck after one decoder layer of a Hugging Face vision-language model, in place.

    The model stays the user's own: same class, same parameter names, plus ``bottleneck.*``. ``model(**batch).loss``
    is CE + beta (KL_vision + KL_text) in training, CE in eval mode. A batch may carry ``instruction_mask``, bool
    (B, T): the text tokens whose KL counts; without it, those are the attended tokens that have no label.

    Args:
        model: has ``get_decoder()`` with a stack ``layers``, and an ``image_token_id`` in its config.
        config: where and how much; None: the paper's settings.
        backend: as in :func:`vittle_kernels.fused_ib`.

    Returns:
        The layer, which is ``model.bottleneck`` from now on; its ``set_alpha`` moves alpha.

    Raises:
        UserError: the model or the config does not fit; the message says what was found and what must be.
    """
    config = config or BottleneckConfig()
    if hasattr(model, "bottleneck"):
        raise UserError(f"{type(model).__name__} has a bottleneck already; detach_bottleneck(model) takes it off")
    layers, hidden_size = _decoder(model)
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is None:
        raise UserError(f"{type(model.config).__name__} has no image_token_id; a vision-language model has one")
    after = config.layer if config.layer is not None else len(layers) * 3 // 4
    if not 1 <= after <= len(layers):
        raise UserError(f"layer is {config.layer}; must be in [1, {len(layers)}], the model's decoder layers")
    if not config.beta >= 0:
        raise UserError(f"beta is {config.beta}; must not be negative")
    config = BottleneckConfig(after, config.prior, config.alpha, config.beta)

    layer = layers[after - 1]
    module = FusedIB(hidden_size, prior=config.prior, alpha=config.alpha, backend=backend)
    module.to(next(layer.parameters()).device).train(model.training)
    attachment = Attachment(config, module, image_token_id)
    model.bottleneck = module
    model._attachment = attachment  # type: ignore[assignment]
    model._attachment_hooks = (  # type: ignore[assignment]
        model.register_forward_pre_hook(attachment.before_model, with_kwargs=True),
        model.register_forward_hook(attachment.after_model, with_kwargs=True),
    )
    _bottleneck_calls(layer, attachment)
    return module


def attachment_of(model: nn.Module) -> Attachment:
    """The bottleneck's attachment to a model.

    Raises:
        UserError: there is none.
    """
    attachment = getattr(model, "_attachment", None)
    if attachment is None:
        raise UserError(f"{type(model).__name__} has no bottleneck; attach_bottleneck(model) puts one in")
    return attachment


def detach_bottleneck(model: nn.Module) -> None:
    """Restores the model as it was before :func:`attach_bottleneck`."""
    attachment = attachment_of(model)
    for hook in model._attachment_hooks:  # type: ignore[union-attr]
        hook.remove()
    layer: Any = _decoder(model)[0][attachment.config.layer - 1]  # type: ignore[operator]
    layer.__class__ = type(layer).__mro__[1]
    del layer._attachment, model.bottleneck, model._attachment, model._attachment_hooks


def save_bottleneck(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes ``bottleneck.safetensors`` and a readable ``bottleneck_config.json`` into the folder."""
    from safetensors.torch import save_file

    attachment, folder = attachment_of(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in attachment.module.state_dict().items()}
    save_file(weights, folder / f"{WEIGHTS}.tmp")
    (folder / f"{WEIGHTS}.tmp").replace(folder / WEIGHTS)
    text = json.dumps({"format": 1, **asdict(attachment.config)}, indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def load_bottleneck(model: nn.Module, folder: str | os.PathLike[str], *, backend: str = "auto") -> FusedIB:
    """Attaches the bottleneck that :func:`save_bottleneck` wrote into the folder.

    Raises:
        UserError: a file is missing or unreadable, or its weights do not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; must be a file that save_bottleneck wrote") from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} holds a damaged bottleneck: {error}") from error
    if (found := settings.pop("format", None)) != 1:
        raise UserError(f"{folder / CONFIG} has format {found!r}; this version reads format 1")
    module = attach_bottleneck(model, BottleneckConfig(**settings), backend=backend)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        width = weights["weight_in"].shape[-1] if "weight_in" in weights else "unknown"
        detach_bottleneck(model)
        raise UserError(
            f"{folder / WEIGHTS} is of width {width}; the model's hidden size is {module.hidden_size}"
        ) from error
    return module


def _decoder(model: nn.Module) -> tuple[nn.ModuleList, int]:
    """The stack of decoder layers of the model's language model, and its hidden size."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder: Any = None if get_decoder is None else get_decoder()
    layers: Any = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(model).__name__} has no stack of decoder layers; get_decoder().layers must be one")
    return layers, decoder.config.hidden_size


def _bottleneck_calls(layer: Any, attachment: Attachment) -> None:
    """Lets every call of the layer end in the bottleneck.

    A subclass of the layer's own class overrides ``__call__``: the names of parameters stay, and the bottleneck stands
    outside the region that gradient checkpointing recomputes, where a forward hook is inside it on transformers 5.17.
    """
    original = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original.__call__(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (self._attachment.after_layer(output[0]), *output[1:])
        return self._attachment.after_layer(output)

    layer._attachment = attachment
    names = {"__call__": call, "__module__": original.__module__, "__qualname__": original.__qualname__}
    layer.__class__ = type(original.__name__, (original,), names)
