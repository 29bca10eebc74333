"""VPG-C (arXiv 2308.04152): the language model's middle layer says what to look at, and the images are seen again.

After half of the layers the state of the last instruction token becomes guidance; a second look at the images'
features under this guidance is added to their tokens. In a model with a Q-Former (section 2.1) the guidance goes into
new queries of the frozen Q-Former,

    g = W_q h_N,    V~_j = V_j + W_v QFormer(Q + g, X_j),

and in one with a projector (appendix C, equation 1) it weighs the features,

    V~_j = V_j + (W_1 h_N) * (W_2 X_j).
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vittle import ranks
from vittle.errors import UserError
from vittle.methods import peft, saving
from vittle.methods.attachment import (
    IGNORED,
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
    module_named,
    vision_ids,
)

NAME = "vpgc"
FILES = saving.Files(NAME)


@dataclass(frozen=True)
class VPGCConfig:
    """Where the second look stands.

    Args:
        layer: after this many decoder layers; None: half of them (16 of 32), the paper's.
    """

    layer: int | None = None


class QFormerLook(nn.Module):
    """Queries of its own, with guidance, through the model's frozen Q-Former.

    Both projections start at zero: nothing changes until they are trained. At 7B (D = 4096, 32 queries of 768) it has
    6,320,896 parameters. They are fp32, and no ``nn.Linear`` for PEFT to find.
    """

    def __init__(self, hidden_size: int, query_tokens: Tensor) -> None:
        super().__init__()
        query_size = query_tokens.shape[-1]
        self.queries = nn.Parameter(query_tokens.detach().to(torch.float32, copy=True))
        self.guidance_weight = _zeros(query_size, hidden_size)
        self.guidance_bias = _zeros(query_size)
        self.output_weight = _zeros(hidden_size, query_size)
        self.output_bias = _zeros(hidden_size)

    def forward(self, guidance: Tensor, features: Tensor, qformer: nn.Module) -> Tensor:
        """Guidance (N, D), an image a row, and its features (N, P, d) to what is added to its tokens, (N, K, D)."""
        dtype, device, there = self.queries.dtype, guidance.device, next(qformer.parameters()).device
        queries = self.queries + F.linear(guidance.to(dtype), self.guidance_weight, self.guidance_bias).unsqueeze(1)
        seen = ask_qformer(qformer, queries.to(there), features.to(there))
        return F.linear(seen.to(device, dtype), self.output_weight, self.output_bias)


def ask_qformer(qformer: nn.Module, queries: Tensor, features: Tensor) -> Tensor:
    """What queries (N, K, q) see in features (N, P, d), (N, K, q); without the text that InstructBLIP's takes, too."""
    text = {"input_ids": None} if "input_ids" in inspect.signature(qformer.forward).parameters else {}
    seen: Tensor = qformer(query_embeds=queries, encoder_hidden_states=features, **text).last_hidden_state
    return seen


class LinearLook(nn.Module):
    """The features weighed by the guidance, one weight a dimension.

    The guidance's projection starts at zero, and with it the product; with both at zero neither would ever get a
    gradient. As in :class:`QFormerLook`, they are fp32 and no ``nn.Linear``.
    """

    def __init__(self, hidden_size: int, feature_size: int) -> None:
        super().__init__()
        self.guidance_weight = _zeros(hidden_size, hidden_size)
        self.features_weight = _zeros(hidden_size, feature_size)
        nn.init.kaiming_uniform_(self.features_weight, a=math.sqrt(5))  # as nn.Linear

    def forward(self, guidance: Tensor, features: Tensor) -> Tensor:
        """Guidance (N, D), an image a row, and its features (N, P, d) to what is added to its tokens, (N, P, D)."""
        dtype = self.guidance_weight.dtype
        weights = F.linear(guidance.to(dtype), self.guidance_weight)
        return weights.unsqueeze(1) * F.linear(features.to(guidance.device, dtype), self.features_weight)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


class Where(NamedTuple):
    """Of a pass over whole prompts: the images' tokens, bool (B, T), and for each of them the column of the token that
    guides the look at it, int64 (B, T).

    -1 stands for no such token: that look goes without guidance.
    """

    vision: Tensor
    guidance: Tensor

    def hears_of(self) -> Tensor:
        """The last column that any image before a token has heard of, int64 (B, T)."""
        heard = torch.where(self.vision, self.guidance, -1).cummax(1).values
        return F.pad(heard[:, :-1], (1, 0), value=-1)


def where_to_look(
    vision: Tensor, attended: Tensor, labels: Tensor | None = None, instruction: Tensor | None = None
) -> Where:
    """An image's guidance is of the last text token before the first response token after it: so no token hears of a
    later one's answer through the images.

    Args:
        vision: bool (B, T).
        attended: bool (B, T): no padding.
        labels: int64 (B, T), if there are any; what has none is no response.
        instruction: bool (B, T): of the tokens with labels, those that are no response either (L2T).
    """
    length = vision.shape[1]
    columns = torch.arange(length, device=vision.device).expand_as(vision)
    ends = torch.full_like(columns, length)
    if labels is not None:
        response = (labels != IGNORED) & ~vision
        if instruction is not None:
            response = response & ~instruction
        ends = torch.where(response, columns, length).flip(1).cummin(1).values.flip(1)
    texts = torch.where(attended & ~vision, columns, -1).cummax(1).values
    return Where(vision, texts.gather(1, (ends - 1).clamp(min=0)))


class SecondLook(Attachment):
    """Serves the layer after which the images are looked at again, with what the pass says of its tokens."""

    name = NAME
    module: QFormerLook | LinearLook

    def __init__(self, model: Any, config: VPGCConfig, module: QFormerLook | LinearLook) -> None:
        super().__init__(model)
        self.config, self.module = config, module
        self.qformer = model.qformer if isinstance(module, QFormerLook) else None
        self.where: Where | None = None
        """Of a pass that looks."""
        self.prompt: Where | None = None
        """Of the prompts that text is generated after."""
        self.features: Tensor | None = None
        """Of the images of this pass or these prompts, (N, P, d), as the Q-Former or the projector reads them."""
        self.frozen: list[nn.Parameter] = []
        """What was trainable before."""
        if self.qformer is not None:
            self.hook = model.vision_model.register_forward_hook(self._leaves_tower)
        else:
            self.hook = _projector(model).register_forward_pre_hook(self._enters_projector)

    def settings(self) -> dict[str, Any]:
        """What ``vpgc_config.json`` says."""
        return asdict(self.config) | {"form": _form(self.module)}

    def load(self, folder: Path) -> None:
        """As :meth:`Attachment.load`."""
        settings, tensors = FILES.read(folder)
        for name, here in self.settings().items():
            if settings.get(name) != here:
                path = folder / FILES.config
                raise UserError(f"{path} has {name} {settings.get(name)!r}; the model's second look has {here!r}")
        _load_weights(self.module, tensors, folder)

    def prompted(self, prompt: Mapping[str, Any] | None) -> None:
        """As :meth:`Attachment.prompted`; the prompts' last text tokens guide."""
        self.prompt = self.features = None
        if prompt is None or all(prompt.get(name) is None for name in ("input_ids", "vision_mask")):
            return
        config = prompt.get("generation_config") or self.model.generation_config
        if prompt.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)):
            raise UserError("prefill_chunk_size is set; must be None: the second look needs the whole prompt at once")
        vision, attended = self.vision(prompt), prompt.get("attention_mask")
        assert vision is not None
        self.prompt = where_to_look(vision, torch.ones_like(vision) if attended is None else attended.bool())

    def around(self, forward: Forward, batch: dict[str, Any]) -> Any:
        """The pass with the second look; where tokens with labels would hear of themselves through the images, one
        without it for those, too.
        """
        if self.where is not None:
            kind = type(self.model).__name__
            raise UserError(f"another forward pass of this {kind} is under way (threads?); one at a time")
        if self.prompt is not None:
            return self._generating(forward, batch, self.prompt)
        vision, labels = self.vision(batch), batch.get("labels")
        if vision is None or not vision.any():
            return self._with_no_image(forward(batch))
        if labels is None and self.model.training and torch.is_grad_enabled():
            raise UserError(
                "the model trains without labels, so the second look cannot tell a prompt from its response: "
                "label smoothing and compute_loss_func keep them from it; pass labels"
            )
        where = self._where(vision, batch)
        if labels is not None and batch.get("instruction_mask") is not None:
            columns = torch.arange(labels.shape[1], device=labels.device)
            hear = (labels != IGNORED) & (where.hears_of() >= columns)
            if hear[:, 1:].any():
                return self._twice(forward, batch, where, hear)
        return self._looking(forward, batch, where)

    def after_layer(self, hidden_states: Tensor) -> Tensor:
        """The hidden states (B, T, D) with what a second look adds to the images' tokens."""
        where, features = self.where, self.features
        if where is None:
            return hidden_states
        if features is None:
            raise UserError("the images were encoded outside this forward pass; pass pixel_values")
        where = Where(*(each.to(hidden_states.device) for each in where))
        copies = hidden_states.shape[0] // where.vision.shape[0]  # beams, alike so far
        rows, columns = where.vision.nonzero(as_tuple=True)
        tokens = self.module.queries.shape[1] if isinstance(self.module, QFormerLook) else features.shape[1]
        if features.shape[0] * tokens == copies * len(rows):
            features = features[::copies]  # transformers 5.17 encodes them for each beam
        count = features.shape[0]
        if count * tokens != len(rows) or (rows.view(count, tokens) != rows[::tokens, None]).any():
            found = where.vision.sum(1).tolist()
            raise UserError(f"there are {count} images of {tokens} tokens each; the samples have {found} image tokens")
        guided = where.guidance[rows, columns][::tokens]
        guidance = hidden_states[copies * rows[::tokens], guided.clamp(min=0)] * (guided >= 0).unsqueeze(1)
        look: tuple[Any, ...] = (guidance, features) if self.qformer is None else (guidance, features, self.qformer)
        seen = self.module(*look).to(hidden_states.dtype).flatten(0, 1).repeat(copies, 1)
        rows = torch.cat([copies * rows + copy for copy in range(copies)])
        return hidden_states.index_put((rows, columns.repeat(copies)), seen, accumulate=True)

    def _generating(self, forward: Forward, batch: dict[str, Any], prompt: Where) -> Any:
        """A pass of ``generate``: over the prompts, or, after them, over tokens that saw what was looked at."""
        ids, past = batch.get("input_ids"), batch.get("past_key_values")
        length, whole = (batch["inputs_embeds"] if ids is None else ids).shape[1], prompt.vision.shape[1]
        if past is not None and (length == 1 < whole or past.get_seq_length() > 0):
            return forward(batch)
        vision = self.vision(batch)
        if length < whole or vision is None or not vision.any():  # such as a negative prompt
            return forward(batch)
        return self._looking(forward, batch, prompt)

    def _where(self, vision: Tensor, batch: dict[str, Any]) -> Where:
        attended, length, labels = batch.get("attention_mask"), vision.shape[1], batch.get("labels")
        if not isinstance(attended, Tensor) or attended.dim() != 2:
            attended = torch.ones_like(vision)
        mask = None if labels is None else instruction_mask_of(batch)
        return where_to_look(vision, attended[:, -length:].bool(), labels, mask)

    def _looking(self, forward: Forward, batch: dict[str, Any], where: Where) -> Any:
        self.where = where
        try:
            return forward(batch)
        finally:
            self.where = None
            if self.prompt is None:
                self.features = None

    def _twice(self, forward: Forward, batch: dict[str, Any], where: Where, hear: Tensor) -> Any:
        """The cross-entropy of the tokens that would hear of themselves from a pass without the look."""
        labels, items = batch["labels"], batch.get("num_items_in_batch")
        items = (labels[:, 1:] != IGNORED).sum() if items is None else items
        without, looking = (
            batch | {"labels": torch.where(here, labels, IGNORED), "num_items_in_batch": items}
            for here in (hear, ~hear)
        )
        before = forward(without | {"past_key_values": None, "use_cache": False})
        return add_to_loss(self._looking(forward, looking, where), loss_of(before))

    def _with_no_image(self, output: Any) -> Any:
        """In training the loss has a gradient for the second look: of nothing."""
        trained = [each for each in self.module.parameters() if each.requires_grad]
        has_loss = isinstance(output, tuple) or getattr(output, "loss", None) is not None
        trains = self.model.training and torch.is_grad_enabled() and not ranks.is_sharded(self.model)
        if not (trains and trained and has_loss):
            return output
        nothing = 0 * torch.stack([each.sum() for each in trained]).sum()
        return add_to_loss(output, nothing.to(loss_of(output).device))

    def _leaves_tower(self, tower: nn.Module, args: Any, output: Any) -> None:
        if self.where is not None or self.prompt is not None:
            self.features = output.last_hidden_state

    def _enters_projector(self, projector: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.where is not None or self.prompt is not None:
            self.features = args[0]


def attach_vpgc(outer: nn.Module, config: VPGCConfig | None = None, *, freeze: bool = True) -> QFormerLook | LinearLook:
    """Lets a Hugging Face model look at its images a second time, in place; a fresh one changes no logit.

    The model stays the user's own: same class, same parameter names, plus ``vpgc.*``. A model with a Q-Former (BLIP-2,
    InstructBLIP, with a causal language model) gets the paper's form, one with a projector (LLaVA) the linear one. All
    images of a batch, several a sample and anywhere in the text, are seen in one pass, when a prompt is read; later
    tokens cost nothing. A sample without images passes through unchanged.

    An image's guidance is of the last text token before the response after it: in training a token with a label begins
    one (``instruction_mask`` tells instructions that have labels, L2T's), so labels must be passed; in ``generate`` and
    in eval mode without labels all of the batch is prompt.

    Args:
        outer: the model, or a PeftModel around one.
        config: where; None: the paper's.
        freeze: leaves nothing else to be trained, but a bottleneck and PEFT's adapters.

    Returns:
        The module, which is ``model.vpgc`` from now on.

    Raises:
        UserError: the model or the config does not fit; the message says what was found and what must be.
    """
    model: Any = peft.base_model(outer)
    _check(model)
    layers, hidden_size = decoder_layers(model)
    config = config or VPGCConfig()
    config = replace(config, layer=len(layers) // 2 if config.layer is None else config.layer)
    if len(layers) < 2:
        raise UserError(f"{type(model).__name__} has {len(layers)} decoder layer; must have two, the look between them")
    if not (type(config.layer) is int and 1 <= config.layer < len(layers)):
        raise UserError(f"layer is {config.layer!r}; must be in [1, {len(layers) - 1}]: a layer must follow")
    with (device := device_for(model, layers[config.layer - 1], NAME)):
        module = _module(model, hidden_size).to(device)
    attachment = SecondLook(model, config, module.train(model.training))
    if freeze:
        kept = peft.adapter_parameters(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith("bottleneck.") and parameter not in kept:
                attachment.frozen.append(parameter.requires_grad_(False))
    attach(outer, attachment, {config.layer: attachment.after_layer})
    return module


def second_look_of(model: nn.Module) -> SecondLook:
    """The second look's attachment to a model.

    Raises:
        UserError: there is none.
    """
    attachment = attached(model, NAME)
    if not isinstance(attachment, SecondLook):
        raise UserError(f"{type(model).__name__} has no second look; attach_vpgc(model) gives it one")
    return attachment


def detach_vpgc(model: nn.Module) -> None:
    """Restores the model as it was before :func:`attach_vpgc`."""
    attachment = second_look_of(model)
    detach(attachment)
    attachment.hook.remove()
    for parameter in attachment.frozen:
        parameter.requires_grad_(True)


def save_vpgc(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes ``vpgc.safetensors`` and a readable ``vpgc_config.json`` into the folder.

    Of a model that FSDP2 shards all ranks must come here, and the first writes.
    """
    attachment = second_look_of(model)
    tensors = ranks.whole_tensors(attachment.module)
    if not ranks.is_sharded(model) or ranks.is_first():
        FILES.write(Path(folder), attachment.settings(), tensors)


def load_vpgc(model: nn.Module, folder: str | os.PathLike[str], *, freeze: bool = True) -> QFormerLook | LinearLook:
    """Attaches the second look that :func:`save_vpgc`, ``save_pretrained`` or Trainer wrote into the folder.

    Raises:
        UserError: a file is missing, damaged or from a newer version, or does not fit the model.
    """
    folder = Path(folder)
    settings, tensors = FILES.read(folder)
    form = settings.pop("form", None)
    if unknown := settings.keys() - VPGCConfig.__dataclass_fields__.keys():
        raise UserError(f"{folder / FILES.config} has an unknown setting {min(unknown)!r}")
    module = attach_vpgc(model, VPGCConfig(**settings), freeze=freeze)
    try:
        if form != _form(module):
            raise UserError(f"{folder / FILES.config} has form {form!r}; the model needs {_form(module)!r}")
        _load_weights(module, tensors, folder)
    except Exception:
        detach_vpgc(model)
        raise
    return module


def _form(module: nn.Module) -> str:
    return "qformer" if isinstance(module, QFormerLook) else "linear"


def _check(model: Any) -> None:
    """Whether a model sees images as one of the forms does."""
    kind, config = type(model).__name__, model.config
    if not hasattr(model, "query_tokens") and _projector(model) is None:
        raise UserError(f"{kind} has neither a Q-Former nor a projector with a linear layer; must have one")
    if hasattr(model, "query_tokens") and not config.use_decoder_only_language_model:
        raise UserError(f"this {kind} has an encoder-decoder language model; must have a causal one")
    if not vision_ids(model):
        raise UserError(f"{kind} reads no images; must have an image_token_id in its config")
    if getattr(config, "image_grid_pinpoints", None) is not None:
        raise UserError(f"{kind} cuts an image into tiles; must be a model whose images have one number of tokens")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(f"DeepSpeed ZeRO-3 has the {kind}'s weights; the second look goes with DDP, FSDP2 and ZeRO-2")


def _module(model: Any, hidden_size: int) -> QFormerLook | LinearLook:
    if hasattr(model, "query_tokens"):
        return QFormerLook(hidden_size, model.query_tokens)
    linear = next(module for module in _projector(model).modules() if isinstance(module, nn.Linear))
    return LinearLook(hidden_size, linear.in_features)


def _projector(model: Any) -> Any:
    """What brings features into the language model's space, by a linear layer first; None: there is none."""
    projector = module_named(model, "multi_modal_projector")
    has_linear = projector is not None and any(isinstance(each, nn.Linear) for each in projector.modules())
    return projector if has_linear else None


def _load_weights(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    FILES.check(module, tensors, f"the second look in {folder}")
    module.load_state_dict(tensors)
