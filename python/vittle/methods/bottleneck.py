"""Vittle (arXiv 2505.13946): a stochastic bottleneck after one decoder layer, CE + beta (KL_vision + KL_text).

Attached to a Hugging Face model it changes two things: the hidden states after the chosen layer pass through
:class:`vittle_kernels.FusedIB`, and in training the KL joins ``model(**batch).loss``.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vittle import ranks
from vittle.errors import UserError
from vittle.methods import peft, saving
from vittle_kernels import FusedIB
from vittle_kernels.functional import LOGVAR_BOUND
from vittle_kernels.layer import modality_order

IGNORED = -100
"""The label of a token that the cross-entropy does not cover."""

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


class Attachment:
    """Stands in for one model's ``forward``, and serves the decoder layers that end in the bottleneck.

    A forward pass goes: read the batch, run the model's own forward, whose chosen layers call :meth:`after_layer`,
    join the KL to the loss. It is ``forward`` and no hook, as some wrappers call ``forward`` by name.
    """

    def __init__(self, model: nn.Module, config: BottleneckConfig, module: FusedIB, vision_ids: list[int]) -> None:
        self.model, self.config, self.module, self.vision_ids = model, config, module, vision_ids
        self.own_forward = model.__dict__.get("forward")  # accelerate's hooks replace it too
        self.tokens: _Tokens | None = None
        self.kl: dict[str, Tensor] = {}
        self.states: list[tuple[int, Tensor]] = []
        """What the layers that end in the bottleneck gave, by the number of layers before."""
        self.metrics: dict[str, Tensor] = {}
        """Of the last training pass, detached: ce, kl_vision, kl_text."""
        self.measures_std = False
        self.std: dict[str, tuple[Tensor, Tensor]] = {}
        """If it is measured: by modality, the sum of the tokens' mean standard deviations, and their number."""
        self.warned = False
        self.trainable: list[bool] | None = None
        """Which parameters were trainable before PEFT froze them."""

    @property
    def forward(self) -> Callable[..., Any]:
        """The model's own."""
        return self.own_forward or type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own, and what a batch may carry: Trainer drops the columns that it does not find here."""
        signature = inspect.signature(self.forward)
        mask = inspect.Parameter("instruction_mask", inspect.Parameter.KEYWORD_ONLY, default=None)
        named = [each for each in signature.parameters.values() if each.kind != inspect.Parameter.VAR_KEYWORD]
        rest = [each for each in signature.parameters.values() if each.kind == inspect.Parameter.VAR_KEYWORD]
        return signature.replace(parameters=[*named, mask, *rest])

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
        settings, tensors = saving.read(folder)
        for name in ("layer", "text_layer", "prior"):
            here, there = getattr(self.config, name), settings.get(name)
            if here != there:
                raise UserError(f"{folder / saving.CONFIG} has {name} {there!r}; the model's bottleneck has {here!r}")
        _load_weights(self.module, tensors, folder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with the bottleneck in it."""
        if args and args[0] is self.model:  # accelerate binds a forward to its model when it unwraps one
            args = args[1:]
        if self.tokens is not None:
            kind = type(self.model).__name__
            raise UserError(
                f"another forward pass of this {kind} is under way (threads? nn.DataParallel?); one at a time"
            )
        tokens = self._read_batch(args, kwargs)
        self.tokens, self.kl, self.states, self.std = tokens, {}, [], {}
        try:
            output = self.forward(*args, **kwargs)
            kl, states = self.kl, self.states
        finally:
            self.tokens, self.kl, self.states = None, {}, []
        hidden_states = getattr(output, "hidden_states", None)
        if isinstance(hidden_states, tuple):  # what the next layer reads, and transformers recorded before it
            changed = dict(states)
            output.hidden_states = tuple(
                changed.get(i, each) if i + 1 < len(hidden_states) else each for i, each in enumerate(hidden_states)
            )
        return self._join_kl(output, kl) if tokens.kl_weights is not None else output

    def _read_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Tokens:
        """Where the vision tokens are, which text tokens count towards the KL, and what each weighs."""
        instruction_mask, vision = kwargs.pop("instruction_mask", None), kwargs.pop("vision_mask", None)
        batch = kwargs
        if args:
            names = [name for name in inspect.signature(self.forward).parameters if name not in kwargs]
            batch = dict(zip(names, args, strict=False)) | kwargs
        vision = self._vision(batch.get("input_ids"), vision)
        labels = batch.get("labels")
        if not self.model.training:
            return _Tokens(vision)
        if labels is None:
            self._warn_of_no_labels()
            return _Tokens(vision)
        if instruction_mask is not None and (
            instruction_mask.dtype != torch.bool or instruction_mask.shape != labels.shape
        ):
            found = f"{instruction_mask.dtype} {tuple(instruction_mask.shape)}"
            raise UserError(f"instruction_mask is {found}; must be torch.bool {tuple(labels.shape)}, as labels are")
        text_kl = instruction_mask
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

    def _vision(self, ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The vision tokens by their ids, or by the mask that stands for them."""
        if not self.vision_ids:
            if mask is not None:
                raise UserError(f"vision_mask is given; {type(self.model).__name__} reads text only")
            return None
        if ids is None:
            if mask is None:
                raise UserError("the model got inputs_embeds and no input_ids; pass vision_mask, bool (B, T), too")
            return mask
        vision = ids == self.vision_ids[0]
        for other in self.vision_ids[1:]:
            vision = vision | (ids == other)
        if mask is not None and not torch.equal(mask, vision):
            where = (
                "is of another shape"
                if mask.shape != vision.shape
                else f"differs at {int((mask != vision).sum())} tokens"
            )
            raise UserError(f"vision_mask {where}; must be True where input_ids is {self.vision_ids}, or be left out")
        return vision

    def after_layer(self, hidden_states: Tensor, modality: Modality) -> Tensor:
        """The hidden states (B, T, D) after a chosen layer, one modality's or both through the bottleneck."""
        states = self._through_bottleneck(hidden_states, modality)
        layer = self.config.text_layer if modality == "text" else self.config.layer
        assert layer is not None
        self.states.append((layer, states))
        return states

    def _through_bottleneck(self, hidden_states: Tensor, modality: Modality) -> Tensor:
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
        is_tuple = isinstance(output, tuple)
        ce = output[0] if is_tuple else output.loss
        kl = {name: each.to(ce.device) for name, each in kl.items()}
        loss = ce + self.config.beta * sum(kl.values())
        self.metrics = {"ce": ce.detach()} | {f"kl_{name}": each.detach() for name, each in kl.items()}
        if is_tuple:
            return (loss, *output[1:])
        output.loss = loss
        return output


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
    if hasattr(model, "bottleneck"):
        raise UserError(f"{type(model).__name__} has a bottleneck already; detach_bottleneck(model) takes it off")
    layers, hidden_size = decoder_layers(model)
    ids = vision_ids(model)
    config = _resolved(config, len(layers), bool(ids))
    assert config.layer is not None
    if ranks.is_sharded(model):
        raise UserError(f"the {type(model).__name__} is sharded already; attach the bottleneck before fully_shard")
    first = layers[config.layer - 1]
    device = next(first.parameters()).device
    if device.type == "meta":
        raise UserError("the model's weights are offloaded; attach the bottleneck before accelerate offloads them")
    with device:
        module = FusedIB(
            hidden_size, prior=config.prior, alpha=config.alpha, vision=bool(ids),
            inference_only=inference_only, backend=backend,
        )  # fmt: skip
    ranks.share_weights(module, like=next(first.parameters()))
    attachment = Attachment(model, config, module.train(model.training), ids)
    model.bottleneck = module
    model._attachment = attachment  # type: ignore[assignment]
    model.forward = attachment
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = saving.SavePretrained(model, attachment)  # type: ignore[assignment]
    for name in peft.ADAPTER_METHODS:
        if hasattr(model, name):
            setattr(model, name, peft.KeepTrainable(model, name))
    if config.text_layer in (None, config.layer):
        ends: dict[int, Modality] = {config.layer: "both"}
    else:
        ends = {config.layer: "vision", config.text_layer: "text"}
    _end_in_bottleneck(layers, attachment, ends)
    peft.watch()
    if outer is not model:
        peft.follow(outer)
    return module


def attachment_of(model: nn.Module) -> Attachment:
    """The bottleneck's attachment to a model.

    Raises:
        UserError: there is none.
    """
    attachment = getattr(peft.base_model(model), "_attachment", None)
    if attachment is None:
        raise UserError(f"{type(model).__name__} has no bottleneck; attach_bottleneck(model) puts one in")
    return attachment


def detach_bottleneck(model: nn.Module) -> None:
    """Restores the model as it was before :func:`attach_bottleneck`."""
    attachment = attachment_of(model)
    model = attachment.model
    if ranks.is_sharded(model):
        raise UserError(f"the {type(model).__name__} is sharded; it keeps its bottleneck")
    for layer in decoder_layers(model)[0]:
        layer.__dict__.pop("_bottleneck", None)
        layer.__class__ = type(layer).__mro__[1]
    del model.forward, model.bottleneck, model._attachment
    for name in ("save_pretrained", *peft.ADAPTER_METHODS):
        model.__dict__.pop(name, None)
    if attachment.own_forward is not None:
        model.forward = attachment.own_forward


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
    saving.write(Path(folder), settings, tensors)


def load_bottleneck(model: nn.Module, folder: str | os.PathLike[str], *, backend: str = "auto") -> FusedIB:
    """Attaches the bottleneck that :func:`save_bottleneck`, ``save_pretrained`` or Trainer wrote into the folder.

    Raises:
        UserError: a file is missing, damaged or from a newer version, or does not fit the model.
    """
    folder = Path(folder)
    settings, tensors = saving.read(folder)
    names = BottleneckConfig.__dataclass_fields__
    if unknown := settings.keys() - names.keys() - {"hidden_size", "heads", "inference_only"}:
        raise UserError(f"{folder / saving.CONFIG} has an unknown setting {min(unknown)!r}")
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
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted == found:
        if bad := [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]:
            raise UserError(
                f"the bottleneck in {folder} has {bad[0]} of {tensors[bad[0]].dtype}; must be floating point"
            )
        if not 0 <= float(tensors["alpha"]) <= 1:
            raise UserError(f"the bottleneck in {folder} has alpha {float(tensors['alpha'])}; must be in [0, 1]")
        module.load_state_dict(tensors)
        return
    heads = {1: "text only", 2: "vision and text"}
    stored = found.get("weight_in", ())
    if len(stored) == 3 and stored[0] != 1 + module.vision:
        reason = f"heads for {heads.get(stored[0], stored[0])}; the model needs {heads[1 + module.vision]}"
    elif len(stored) == 3 and stored[-1] != module.hidden_size:
        reason = f"width {stored[-1]}; the model's hidden size is {module.hidden_size}"
    else:
        name = next(name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name))
        reason = f"{name} of shape {found.get(name)}; must be {wanted.get(name)}, by {saving.CONFIG}"
    raise UserError(f"the bottleneck in {folder} has {reason}")


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


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, int]:
    """The stack of decoder layers of the model's language model, and its hidden size."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder: Any = None if get_decoder is None else get_decoder()
    layers: Any = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(model).__name__} has no stack of decoder layers; get_decoder().layers must be one")
    return layers, decoder.config.hidden_size


def vision_ids(model: Any) -> list[int]:
    """The ids that stand for pieces of images and videos; none for a model that reads text only."""
    config = model.config
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    sees = any(getattr(config, name, None) is not None for name in ("vision_config", "vq_config"))
    if ids[0] is None and sees:
        kind = type(config).__name__
        raise UserError(f"{kind} has no image_token_id; set model.config.image_token_id to the image token's id")
    return [each for each in ids if each is not None]


def _end_in_bottleneck(layers: nn.ModuleList, attachment: Attachment, ends: dict[int, Modality]) -> None:
    """Lets every call of the layers with these numbers end in the bottleneck.

    A subclass of the layers' own class overrides ``__call__``: the names of parameters stay, and the bottleneck stands
    outside the region that gradient checkpointing recomputes, where a forward hook is inside it on transformers 5.17.
    All layers get the one subclass: FSDP's wrapping policies look for the class of the first.
    """
    classes: dict[type, type] = {}
    for number, layer in enumerate(layers, start=1):
        original = type(layer)
        if original not in classes:
            classes[original] = _subclass(original)
        if number in ends:
            layer._bottleneck = (attachment, ends[number])  # type: ignore[assignment]
        layer.__class__ = classes[original]


def _subclass(original: Any) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original.__call__(self, *args, **kwargs)
        bottleneck = self.__dict__.get("_bottleneck")
        if bottleneck is None:
            return output
        attachment, modality = bottleneck
        if isinstance(output, tuple):
            return (attachment.after_layer(output[0], modality), *output[1:])
        return attachment.after_layer(output, modality)

    names = {"__call__": call, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), names)
