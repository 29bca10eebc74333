"""A method attached to a Hugging Face model, in place: around its forward pass, after decoder layers, in its files.

The model stays the user's own: same class, same names of parameters, plus those of each method's module. Several
methods may be attached, in any order; a forward pass meets them in that of :data:`ORDER`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial, wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vittle import ranks
from vittle.errors import UserError
from vittle.methods import peft, saving

ORDER = ("vpgc", "bottleneck")
"""The methods, by the names of their modules in the model: from the outermost around the forward pass inwards, and
after a layer from the first to the last."""

BATCH_KEYS = ("instruction_mask", "vision_mask")
"""What a batch may carry beyond what the model knows; instruction_mask also in a Trainer that drops columns."""

IGNORED = -100
"""The label of a token that the cross-entropy does not cover."""

Forward = Callable[[dict[str, Any]], Any]
"""A forward pass over a batch that has everything by name."""
AfterLayer = Callable[[Tensor], Tensor]


class Attachment(ABC):
    """One method on one model."""

    name: ClassVar[str]
    module: nn.Module
    """What it adds to the model, under its name."""
    trainable: list[bool] | None = None
    """Which parameters were trainable before PEFT froze them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.vision_ids = vision_ids(model)

    @property
    def files(self) -> saving.Files:
        """Where it lies in a folder."""
        return saving.Files(self.name)

    def begin(self) -> None:  # noqa: B027 (most need nothing)
        """A forward pass of the model begins, of which :meth:`around` may make several."""

    def prompted(self, prompt: Mapping[str, Any] | None) -> None:  # noqa: B027
        """Forward passes from now on generate text after this batch; None: no more."""

    @abstractmethod
    def around(self, forward: Forward, batch: dict[str, Any]) -> Any:
        """A forward pass of the model over a batch."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its config file says."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Puts the weights of a folder into the module.

        Raises:
            UserError: the folder's is another.
        """

    def vision(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The vision tokens of a batch, bool (B, T), by their ids or by the mask that stands for them; None: none.

        Raises:
            UserError: the batch has neither, or they differ.
        """
        ids, mask = batch.get("input_ids"), batch.get("vision_mask")
        if not self.vision_ids:
            if mask is not None:
                raise UserError(f"vision_mask is given; {type(self.model).__name__} reads text only")
            return None
        if ids is None:
            if mask is None:
                raise UserError("the model got inputs_embeds and no input_ids; pass vision_mask, bool (B, T), too")
            return mask  # type: ignore[no-any-return]
        vision: Tensor = ids == self.vision_ids[0]
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


class Host:
    """Stands in for one model's ``forward`` and ``generate``: the model's own, with all attached methods around it.

    It is ``forward`` and no hook, as some wrappers call ``forward`` by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own_forward = model.__dict__.get("forward")  # accelerate's hooks replace it too
        self.attachments: dict[str, Attachment] = {}
        self.under_way = False
        self.states: dict[int, Tensor] = {}
        """In a pass: what the layers that methods end gave, by their numbers from 1."""

    @property
    def forward(self) -> Callable[..., Any]:
        """The model's own."""
        return self.own_forward or type(self.model).forward.__get__(self.model)

    @cached_property
    def __signature__(self) -> inspect.Signature:
        """The model's own, and what a batch may carry: Trainer drops the columns that it does not find here.

        ``generate`` asks for it at every token.
        """
        signature = inspect.signature(self.forward)
        mask = inspect.Parameter("instruction_mask", inspect.Parameter.KEYWORD_ONLY, default=None)
        named = [each for each in signature.parameters.values() if each.kind != inspect.Parameter.VAR_KEYWORD]
        rest = [each for each in signature.parameters.values() if each.kind == inspect.Parameter.VAR_KEYWORD]
        return signature.replace(parameters=[*named, mask, *rest])

    def in_order(self) -> list[Attachment]:
        """The methods, from the outermost."""
        return [self.attachments[name] for name in ORDER if name in self.attachments]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with the methods around it."""
        if args and args[0] is self.model:  # accelerate binds a forward to its model when it unwraps one
            args = args[1:]
        # No bound method, which leads torch.compile back to this call.
        own = self.own_forward or partial(type(self.model).forward, self.model)
        return self.passed(partial(_without_masks, own), _named(self.forward, args, kwargs))

    def passed(self, forward: Forward, batch: dict[str, Any]) -> Any:
        """A forward pass, the model's own or its language model's, with the methods around it."""
        for attachment in reversed(self.in_order()):
            attachment.begin()
            forward = partial(attachment.around, forward)
        self.under_way = True
        try:
            output = forward(batch)
            states = self.states
        finally:
            self.under_way, self.states = False, {}
        return _with_states(output, states)

    def ended(self, number: int, states: Tensor) -> None:
        """What a layer gave, after all methods."""
        self.states[number] = states

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, of whose prompt the methods know.

        BLIP-2's goes past its forward pass: there they are around its language model's.
        """
        own: Any = type(self.model).generate  # type: ignore[attr-defined]
        prompt = _named(own.__get__(self.model), args, kwargs)
        prompt["input_ids"] = _prompt_ids(self.model, prompt)
        language: Any = self.model.language_model if hasattr(self.model, "query_tokens") else None
        if language is not None:
            prompt["vision_mask"] = _vision_of_prompt(self.model, prompt)
        for attachment in self.in_order():
            attachment.prompted(prompt)
        try:
            with self._in(language, prompt.get("vision_mask")):
                return own(self.model, *args, **kwargs)
        finally:
            for attachment in self.in_order():
                attachment.prompted(None)

    @contextmanager
    def _in(self, language: Any, vision: Any) -> Iterator[None]:
        """The methods around the forward pass of the language model that ``generate`` calls, if it does."""
        if language is None:
            yield
            return
        own = language.forward

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.under_way:
                return own(*args, **kwargs)
            batch = _named(own, args, kwargs)
            if batch.get("inputs_embeds") is not None:  # else they are tokens that were generated
                rows, length = batch["inputs_embeds"].shape[:2]
                mask = vision.repeat_interleave(rows // vision.shape[0], 0)[:, :length]
                batch["vision_mask"] = nn.functional.pad(mask, (0, length - mask.shape[1]))
            return self.passed(partial(_without_masks, own), batch)

        before = language.__dict__.get("forward")
        language.forward = forward
        try:
            yield
        finally:
            del language.forward
            if before is not None:
                language.forward = before


def _without_masks(forward: Callable[..., Any], batch: Mapping[str, Any]) -> Any:
    return forward(**{name: value for name, value in batch.items() if name not in BATCH_KEYS})


def _named(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All that a call is given, by name."""
    given = inspect.signature(function).bind_partial(*args).arguments if args else {}
    if twice := given.keys() & kwargs.keys():
        raise TypeError(f"{function.__qualname__}() got multiple values for argument {min(twice)!r}")
    return {**given, **kwargs}


def _prompt_ids(model: Any, prompt: Mapping[str, Any]) -> Tensor | None:
    """The ids that text is generated after; BLIP-2 makes them where it gets images alone."""
    ids = prompt.get("input_ids", prompt.get("inputs"))
    is_alone = ids is None and prompt.get("inputs_embeds") is None and prompt.get("pixel_values") is not None
    if not (is_alone and hasattr(model, "query_tokens")):
        return ids
    config, pixels = model.config, prompt["pixel_values"]
    row = [config.image_token_id] * config.num_query_tokens + [config.text_config.bos_token_id]
    return torch.tensor([row], device=pixels.device).repeat(pixels.shape[0], 1)


def _vision_of_prompt(model: Any, prompt: Mapping[str, Any]) -> Tensor:
    """Where its images' tokens are, bool (B, T); among embeddings they are those of the image token, as in BLIP-2."""
    token = vision_ids(model)[0]
    if (ids := prompt["input_ids"]) is not None:
        return ids == token  # type: ignore[no-any-return]
    embeds: Tensor = prompt["inputs_embeds"]
    return (embeds == model.get_input_embeddings()(torch.tensor(token, device=embeds.device))).all(-1)


def _with_states(output: Any, states: Mapping[int, Tensor]) -> Any:
    """Puts what the next layers read in the place of what transformers recorded before the methods."""
    recorded = getattr(output, "hidden_states", None)
    if isinstance(recorded, tuple):
        last = len(recorded) - 1
        output.hidden_states = tuple(states.get(i, each) if i < last else each for i, each in enumerate(recorded))
    if (inner := getattr(output, "language_model_outputs", None)) is not None:  # BLIP-2's
        _with_states(inner, states)
    return output


def add_to_loss(output: Any, extra: Tensor | float) -> Any:
    """A model's output with something added to its loss."""
    if isinstance(output, tuple):
        return (output[0] + extra, *output[1:])
    output.loss = output.loss + extra
    return output


def loss_of(output: Any) -> Tensor:
    """The loss of a model's output, which has one."""
    loss: Tensor = output[0] if isinstance(output, tuple) else output.loss
    return loss


def instruction_mask_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The batch's ``instruction_mask``, if there is one.

    Raises:
        UserError: it is not as the labels are.
    """
    mask, labels = batch.get("instruction_mask"), batch["labels"]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != labels.shape):
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise UserError(f"instruction_mask is {found}; must be torch.bool {tuple(labels.shape)}, as labels are")
    return mask


def host_of(model: Any) -> Host | None:
    """What stands in for the forward of a model, or of the one inside PEFT's; None where nothing is attached."""
    return getattr(peft.base_model(model), "_vittle", None)


def methods_of(model: Any) -> list[Attachment]:
    """The methods on a model, or on the one inside PEFT's."""
    return peft.attachments(peft.base_model(model))


def module_named(model: nn.Module, *names: str) -> nn.Module | None:
    """The first module of a model whose own name is one of these."""
    return next((module for name, module in model.named_modules() if name.rpartition(".")[2] in names), None)


def attached(model: Any, name: str) -> Attachment | None:
    """The method of that name on a model, if it is attached."""
    host = host_of(model)
    return None if host is None else host.attachments.get(name)


def attach(outer: nn.Module, attachment: Attachment, after: Mapping[int, AfterLayer]) -> None:
    """Puts a method on its model.

    Args:
        outer: the model, or PEFT's around it.
        attachment: not attached yet.
        after: what each of these decoder layers, counted from 1, ends in: a function of the hidden states (B, T, D).
    """
    model = attachment.model
    host = host_of(model)
    if host is None:
        host = Host(model)
        model._vittle = host  # type: ignore[assignment]
        model.forward = host
        if hasattr(model, "generate"):
            model.generate = host.generate  # type: ignore[assignment]
        if hasattr(model, "save_pretrained"):
            model.save_pretrained = saving.SavePretrained(model, host.in_order)  # type: ignore[assignment]
        for name in peft.ADAPTER_METHODS:
            if hasattr(model, name):
                setattr(model, name, peft.KeepTrainable(model, name))
    host.attachments[attachment.name] = attachment
    setattr(model, attachment.name, attachment.module)
    _end_in(decoder_layers(model)[0], attachment.name, after, host)
    peft.watch()
    if outer is not model:
        peft.follow(outer)


def device_for(model: nn.Module, layer: nn.Module, name: str) -> torch.device:
    """Where a new method of this name that follows a layer has its weights.

    Raises:
        UserError: the model has the method already, or its weights are where no other can join them.
    """
    kind, device = type(model).__name__, next(layer.parameters()).device
    if hasattr(model, name):
        raise UserError(f"{kind} has {_NAMES[name]} already; detach_{name}(model) takes it off")
    if ranks.is_sharded(model):
        raise UserError(f"the {kind} is sharded already; attach {_NAMES[name]} before fully_shard")
    elsewhere = any(each.device.type != "meta" for each in model.parameters())
    if device.type == "meta" and (elsewhere or any(hasattr(module, "_hf_hook") for module in model.modules())):
        raise UserError(f"the model's weights are offloaded; attach {_NAMES[name]} before accelerate offloads them")
    return device


_NAMES = {"vpgc": "a second look", "bottleneck": "a bottleneck"}


def detach(attachment: Attachment) -> None:
    """Takes a method off its model; the last leaves the model as it was.

    Raises:
        UserError: the model is sharded.
    """
    model, host = attachment.model, host_of(attachment.model)
    assert host is not None
    if ranks.is_sharded(model):
        raise UserError(f"the {type(model).__name__} is sharded; it keeps its {attachment.name}")
    layers = decoder_layers(model)[0]
    for layer in layers:
        layer.__dict__.get("_after", {}).pop(attachment.name, None)
    delattr(model, attachment.name)
    del host.attachments[attachment.name]
    if host.attachments:
        return
    for layer in layers:
        if "_after" in layer.__dict__:
            del layer.__dict__["_after"], layer.__dict__["_ended"]
            layer.__class__ = type(layer).__mro__[1]
    del model.forward, model._vittle
    for name in ("generate", "save_pretrained", *peft.ADAPTER_METHODS):
        model.__dict__.pop(name, None)
    if host.own_forward is not None:
        model.forward = host.own_forward


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, int]:
    """The stack of decoder layers of the model's language model, and its hidden size.

    Raises:
        UserError: there is none.
    """
    decoder: Any = model
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):  # BLIP-2's decoder has one in turn
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else None
        if inner is None or inner is decoder:
            raise UserError(f"{type(model).__name__} has no stack of decoder layers; get_decoder().layers must be one")
        decoder = inner
    return decoder.layers, decoder.config.hidden_size


def vision_ids(model: Any) -> list[int]:
    """The ids that stand for pieces of images and videos; none for a model that reads text only."""
    config = model.config
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    sees = any(getattr(config, name, None) is not None for name in ("vision_config", "vq_config"))
    if ids[0] is None and sees:
        kind = type(config).__name__
        raise UserError(f"{kind} has no image_token_id; set model.config.image_token_id to the image token's id")
    return [each for each in ids if each is not None]


def _end_in(layers: nn.ModuleList, name: str, after: Mapping[int, AfterLayer], host: Host) -> None:
    """Lets every call of the layers with these numbers end in a function of the hidden states.

    A subclass of the layers' own class overrides ``__call__``: the names of parameters stay, and the function stands
    outside the region that gradient checkpointing recomputes, where a forward hook is inside it on transformers 5.17.
    Where the first layer is among them, all get the subclass: FSDP's wrapping policies take the first's class.
    """
    for number, layer in enumerate(layers, start=1):
        if "_after" not in layer.__dict__ and (1 in after or number in after):
            layer._after, layer._ended = {}, partial(host.ended, number)  # type: ignore[assignment]
            original: Any = type(layer)
            layer.__class__ = _subclass(original)
        if number in after:
            layer.__dict__["_after"][name] = after[number]


@cache
def _subclass(original: Any) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original.__call__(self, *args, **kwargs)
        after = self.__dict__["_after"]
        if not after:
            return output
        is_tuple = isinstance(output, tuple)
        states = output[0] if is_tuple else output
        for name in ORDER:
            if name in after:
                states = after[name](states)
        self.__dict__["_ended"](states)
        return (states, *output[1:]) if is_tuple else states

    names = {"__call__": call, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), names)
