"""Vittle (arXiv 2505.13946): a stochastic bottleneck after one decoder layer, CE + beta (KL_vision + KL_text).

Attached to a Hugging Face model it changes two things: the hidden states after the chosen layer pass through
:class:`vittle_kernels.FusedIB`, and in training the KL joins ``model(**batch).loss``.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vittle import ranks
from vittle.errors import UserError
from vittle.methods import peft, saving
from vittle.methods.attachment import (
    IGNORED,
    AfterLayer,
    Attachment,
    Forward,
    add_to_loss,
    attach,
    attached,
    decoder_layers,
    detach,
    device_for,
    instruction_mask_of,
    loss_of,
    vision_ids,
)
from vittle_kernels import FusedIB
from vittle_kernels.functional import LOGVAR_BOUND
from vittle_kernels.layer import modality_order

NAME = "bottleneck"
FILES = saving.Files(NAME)

Modality = Literal["both", "vision", "text"]

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: its multiples by small numbers are far apart."""


@dataclass(frozen=True)
class BottleneckConfig:
    """Where the bottleneck stands and how much it weighs; the defaults are the paper's.

    Args:
        layer: it follows this many decoder layers; None: three quarters of them (24 of 32).
        text_layer: text tokens pass it after this many layers instead; the heads then run once for each modality.
            None: after ``layer``, in one pass.
        prior: "fixed", Vittle (F); or "learnable", Vittle (L).
        alpha: the interpolation weight that a schedule ends at, and that inference uses.
        beta: weight of the KL, a mean over dimensions and tokens.
    """

    layer: int | None = None
    text_layer: int | None = None
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

    vision: Tensor | None
    text_kl: Tensor | None = None
    kl_weights: Tensor | None = None


class Bottleneck(Attachment):
    """Reads the batch, lets the chosen layers end in the bottleneck, joins the KL to the loss."""

    name = NAME
    module: FusedIB

    def __init__(self, model: nn.Module, config: BottleneckConfig, module: FusedIB) -> None:
        super().__init__(model)
        self.config, self.module = config, module
        self.tokens: _Tokens | None = None
        self.kl: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        """Of the last training pass, detached: ce, kl_vision, kl_text."""
        self.measures_std = False
        self.std: dict[str, tuple[Tensor, Tensor]] = {}
        """If it is measured: by modality, the sum of the tokens' mean standard deviations, and their number."""
        self.warned = False

    def settings(self) -> dict[str, Any]:
        """What ``bottleneck_config.json`` says."""
        heads = ["vision", "text"] if self.module.vision else ["text"]
        facts = {"hidden_size": self.module.hidden_size, "heads": heads, "inference_only": self.module.inference_only}
        return asdict(self.config) | facts

    def load(self, folder: Path) -> None:
        """Puts the weights of a folder into the module.

        Raises:
            UserError: the folder's bottleneck is another: of other layers, or another prior.
        """
        settings, tensors = self.files.read(folder)
        for name in ("layer", "text_layer", "prior"):
            here, there = getattr(self.config, name), settings.get(name)
            if here != there:
                path = folder / self.files.config
                raise UserError(f"{path} has {name} {there!r}; the model's bottleneck has {here!r}")
        _load_weights(self.module, tensors, folder)

    def begin(self) -> None:
        """The metrics of a training pass are its own, or the sums of those that it is made of."""
        if self.model.training:
            self.metrics = {}

    def around(self, forward: Forward, batch: dict[str, Any]) -> Any:
        """The pass with the bottleneck in it."""
        if self.tokens is not None:
            kind = type(self.model).__name__
            raise UserError(
                f"another forward pass of this {kind} is under way (threads? nn.DataParallel?); one at a time"
            )
        tokens = self._read_batch(batch)
        self.tokens, self.kl, self.std = tokens, {}, {}
        try:
            output = forward(batch)
            kl = self.kl
        finally:
            self.tokens, self.kl = None, {}
        return self._join_kl(output, kl) if tokens.kl_weights is not None else output

    def _read_batch(self, batch: dict[str, Any]) -> _Tokens:
        """Where the vision tokens are, which text tokens count towards the KL, and what each weighs."""
        vision, labels = self.vision(batch), batch.get("labels")
        if not self.model.training:
            return _Tokens(vision)
        if labels is None:
            self._warn_of_no_labels()
            return _Tokens(vision)
        text_kl = instruction_mask_of(batch)
        if text_kl is None:  # as the released code: what the model reads and the loss does not cover
            text_kl = labels == IGNORED
            attended = batch.get("attention_mask")
            if isinstance(attended, Tensor) and attended.shape == labels.shape:
                text_kl = text_kl & attended.bool()
        is_vision = torch.zeros_like(labels, dtype=torch.bool) if vision is None else vision
        text_kl = text_kl & ~is_vision
        weights = token_weights(labels, is_vision, text_kl, batch.get("num_items_in_batch"))
        return _Tokens(vision, text_kl, weights)

    def _warn_of_no_labels(self) -> None:
        if torch.is_grad_enabled() and not self.warned:
            self.warned = True
            warnings.warn(
                "the model trains without labels, so no KL joins its loss: "
                "label smoothing and compute_loss_func keep them from it",
                stacklevel=4,
            )

    def after_layer(self, hidden_states: Tensor, modality: Modality) -> Tensor:
        """The hidden states (B, T, D) after a chosen layer, one modality's or both through the bottleneck."""
        tokens = self.tokens
        if tokens is None:
            kind = type(self.model).__name__
            raise UserError(
                f"the decoder ran outside {kind}.forward, so its bottleneck knows nothing of the batch; "
                f"call the {kind}, or detach_bottleneck(model) first"
            )
        device = hidden_states.device
        masks = [
            mask if mask is None else mask.to(device) for mask in (tokens.vision, tokens.text_kl, tokens.kl_weights)
        ]
        output = self.module(hidden_states, *masks, seed=self._seed(device) if self.module.training else None)
        if output.kl_vision is not None:
            here = ("vision", "text") if modality == "both" else (modality,)
            kl = {"vision": output.kl_vision, "text": output.kl_text}
            self.kl |= {name: kl[name] for name in here}
            if self.measures_std and tokens.text_kl is not None:
                vision, text = tokens.vision, tokens.text_kl
                std = _std(output.posterior, torch.zeros_like(text) if vision is None else vision, text)
                self.std |= {name: std[name] for name in here}
        if modality == "both" or tokens.vision is None:
            return output.hidden_states
        passes = (tokens.vision == (modality == "vision")).unsqueeze(-1).to(hidden_states.device)
        return torch.where(passes, output.hidden_states, hidden_states)

    def _seed(self, device: torch.device) -> Tensor:
        """Of the noise: drawn as ever, and apart from that of ranks that hold other tokens."""
        drawn = torch.randint(2**63 - 1, (1,), device=device)
        stream = ranks.noise_stream(self.model) * _GOLDEN % 2**64
        return drawn ^ (stream - 2**64 if stream >= 2**63 else stream)

    def _join_kl(self, output: Any, kl: dict[str, Tensor]) -> Any:
        """The KL joins the model's own loss."""
        ce = loss_of(output)
        kl = {name: each.to(ce.device) for name, each in kl.items()}
        for name, value in {"ce": ce, **{f"kl_{name}": each for name, each in kl.items()}}.items():
            self.metrics[name] = self.metrics.get(name, 0) + value.detach()
        return add_to_loss(output, self.config.beta * sum(kl.values()))


def _std(posterior: Tensor, vision: Tensor, text_kl: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The standard deviation of the posteriors of the tokens that count, by modality: sum and number; posteriors in
    the heads' order.
    """
    logvar = posterior[:, posterior.shape[1] // 2 :].float().clamp(-LOGVAR_BOUND, LOGVAR_BOUND)
    masks = {name: mask.to(posterior.device) for name, mask in (("vision", vision), ("text", text_kl))}
    std = (logvar / 2).exp().mean(1)[modality_order(masks["vision"])[1]].view(text_kl.shape)
    return {name: (torch.where(mask, std, 0.0).sum(), mask.sum()) for name, mask in masks.items()}


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
    """Puts a bottleneck after a decoder layer of a Hugging Face model, in place.

    The model stays the user's own: same class, same parameter names, plus ``bottleneck.*``. ``model(**batch).loss``
    is CE + beta (KL_vision + KL_text) in training, CE in eval mode. A batch may carry ``instruction_mask``, bool
    (B, T): the text tokens whose KL counts; without it, those are the attended tokens that have no label. Vision
    tokens are those with the model's image (or video) token id; a batch of ``inputs_embeds`` without ids carries
    ``vision_mask``, bool (B, T). A model without a vision tower gets the text head only.

    With PEFT it may come before or after ``get_peft_model``: the heads stay trainable.

    Args:
        model: has ``get_decoder()`` with a stack ``layers`` and, if it has a vision tower, an ``image_token_id`` in
            its config; or a PeftModel around one.
        config: where and how much; None: the paper's settings.
        backend: as in :func:`vittle_kernels.fused_ib`.

    Returns:
        The layer, which is ``model.bottleneck`` from now on; its ``set_alpha`` moves alpha.

    Raises:
        UserError: the model or the config does not fit; the message says what was found and what must be.
    """
    return _attach(model, config or BottleneckConfig(), backend=backend, inference_only=False)


def _attach(outer: nn.Module, config: BottleneckConfig, *, backend: str, inference_only: bool) -> FusedIB:
    model = peft.base_model(outer)
    layers, hidden_size = decoder_layers(model)
    ids = vision_ids(model)
    config = _resolved(config, len(layers), bool(ids))
    assert config.layer is not None
    first = layers[config.layer - 1]
    with (device := device_for(model, first, NAME)):
        module = FusedIB(
            hidden_size, prior=config.prior, alpha=config.alpha, vision=bool(ids),
            inference_only=inference_only, backend=backend,
        ).to(device)  # fmt: skip
    ranks.share_weights(module, like=next(first.parameters()))
    attachment = Bottleneck(model, config, module.train(model.training))
    after: dict[int, AfterLayer] = {}
    if config.text_layer in (None, config.layer):
        after[config.layer] = partial(attachment.after_layer, modality="both")
    else:
        after[config.layer] = partial(attachment.after_layer, modality="vision")
        after[config.text_layer] = partial(attachment.after_layer, modality="text")
    attach(outer, attachment, after)
    return module


def bottleneck_of(model: Any) -> Bottleneck | None:
    """The bottleneck's attachment to a model, if there is one."""
    attachment = attached(model, NAME)
    return attachment if isinstance(attachment, Bottleneck) else None


def attachment_of(model: nn.Module) -> Bottleneck:
    """The bottleneck's attachment to a model.

    Raises:
        UserError: there is none.
    """
    attachment = bottleneck_of(model)
    if attachment is None:
        raise UserError(f"{type(model).__name__} has no bottleneck; attach_bottleneck(model) puts one in")
    return attachment


def detach_bottleneck(model: nn.Module) -> None:
    """Restores the model as it was before :func:`attach_bottleneck`."""
    detach(attachment_of(model))


def save_bottleneck(model: nn.Module, folder: str | os.PathLike[str], *, inference_only: bool = False) -> None:
    """Writes ``bottleneck.safetensors`` and a readable ``bottleneck_config.json`` into the folder.

    Args:
        model: has a bottleneck.
        folder: made if it is not there; PEFT's files may lie beside.
        inference_only: leaves out what only training reads: the log-variance's half of each head's last matrix, a
            third of the bottleneck, and the prior. Outputs in eval mode are the same; there is no training on.

    Of a model that FSDP2 shards all ranks must come here, and the first writes.
    """
    attachment = attachment_of(model)
    settings, tensors = attachment.settings(), ranks.whole_tensors(attachment.module)
    if ranks.is_sharded(model) and not ranks.is_first():
        return
    if inference_only:
        settings["inference_only"] = True
        tensors.pop("prior", None)
        for name in ("weight_out", "bias_out"):
            tensors[name] = tensors[name][:, : attachment.module.hidden_size]
    attachment.files.write(Path(folder), settings, tensors)


def load_bottleneck(model: nn.Module, folder: str | os.PathLike[str], *, backend: str = "auto") -> FusedIB:
    """Attaches the bottleneck that :func:`save_bottleneck`, ``save_pretrained`` or Trainer wrote into the folder.

    Raises:
        UserError: a file is missing, damaged or from a newer version, or does not fit the model.
    """
    folder = Path(folder)
    settings, tensors = FILES.read(folder)
    names = BottleneckConfig.__dataclass_fields__
    if unknown := settings.keys() - names.keys() - {"hidden_size", "heads", "inference_only"}:
        raise UserError(f"{folder / FILES.config} has an unknown setting {min(unknown)!r}")
    config = BottleneckConfig(**{name: value for name, value in settings.items() if name in names})
    inference_only = bool(settings.get("inference_only"))
    module = _attach(model, config, backend=backend, inference_only=inference_only)
    try:
        _load_weights(module, tensors, folder)
    except Exception:
        detach_bottleneck(model)
        raise
    return module


def _load_weights(module: FusedIB, tensors: dict[str, Tensor], folder: Path) -> None:
    owner, heads = f"the bottleneck in {folder}", {1: "text only", 2: "vision and text"}
    stored = tensors["weight_in"].shape if "weight_in" in tensors else ()
    if len(stored) == 3 and stored[0] != 1 + module.vision:
        needed = heads[1 + module.vision]
        raise UserError(f"{owner} has heads for {heads.get(stored[0], stored[0])}; the model needs {needed}")
    if len(stored) == 3 and stored[-1] != module.hidden_size:
        raise UserError(f"{owner} has width {stored[-1]}; the model's hidden size is {module.hidden_size}")
    FILES.check(module, tensors, owner)
    if not 0 <= float(tensors["alpha"]) <= 1:
        raise UserError(f"{owner} has alpha {float(tensors['alpha'])}; must be in [0, 1]")
    module.load_state_dict(tensors)


def _resolved(config: BottleneckConfig, depth: int, has_vision: bool) -> BottleneckConfig:
    """The config with its layers, checked."""
    config = replace(config, layer=depth * 3 // 4 if config.layer is None else config.layer)
    for name in ("layer", "text_layer"):
        layer = getattr(config, name)
        if layer is not None and not (type(layer) is int and 1 <= layer <= depth):
            raise UserError(f"{name} is {layer!r}; must be in [1, {depth}], the model's decoder layers")
    if not has_vision and config.text_layer not in (None, config.layer):
        raise UserError(f"text_layer is {config.text_layer}; must be left out for a model that reads text only")
    if not (isinstance(config.beta, int | float) and 0 <= config.beta < math.inf):
        raise UserError(f"beta is {config.beta!r}; must not be negative")
    if not (isinstance(config.alpha, int | float) and 0 <= config.alpha <= 1):
        raise UserError(f"alpha is {config.alpha!r}; must be in [0, 1]")
    if config.prior not in ("fixed", "learnable"):
        raise UserError(f"prior is {config.prior!r}; must be 'fixed' or 'learnable'")
    return config
