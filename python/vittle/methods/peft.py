"""What is attached to a model beside PEFT's adapters: it stays trainable, and is saved and loaded with them.

PEFT freezes whatever is no adapter, what was attached before too, and saves adapters only.
PyTorch tells us when a model goes into PEFT's: ``register_module_module_registration_hook``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from vittle.methods import saving

_watching = False


def base_model(model: Any) -> Any:
    """The user's own model, also where PEFT's is around it."""
    return model.get_base_model() if _is(model, "PeftModel") else model


def watch() -> None:
    """From now on models with a bottleneck that go into PEFT's keep it trainable, and saved with the adapters."""
    global _watching
    if not _watching:
        register_module_module_registration_hook(_registered)  # type: ignore[arg-type]
        _watching = True


def follow(peft_model: Any) -> None:
    """Lets a PeftModel save and load the bottleneck of the model inside it."""
    for name in ("save_pretrained", "load_adapter"):
        setattr(peft_model, name, _WithMethods(peft_model, name))
    peft_model.add_adapter = KeepTrainable(peft_model, "add_adapter")


def _is(module: Any, name: str) -> bool:
    peft = sys.modules.get("peft")
    if peft is None:
        return False
    kind = peft.PeftModel if name == "PeftModel" else sys.modules["peft.tuners.tuners_utils"].BaseTuner
    return isinstance(module, kind)


def _registered(parent: nn.Module, name: str, module: Any) -> None:
    """The model goes into a tuner, which freezes it; then the tuner into a PeftModel."""
    if name == "model" and _is(parent, "BaseTuner"):
        for attachment in attachments(module):
            attachment.trainable = _trainable(attachment)
    if name == "base_model" and _is(parent, "PeftModel") and _is(module, "BaseTuner"):
        frozen = [each for each in attachments(module.model) if each.trainable is not None]
        for attachment in frozen:
            _restore(attachment, attachment.trainable)
            attachment.trainable = None
        if frozen:
            follow(parent)


ADAPTER_METHODS = ("add_adapter", "load_adapter")
"""Of transformers' own models: they freeze what is no adapter."""


class KeepTrainable(saving.Replaced):
    """A method that freezes whatever is no adapter, and leaves what is attached as it was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method."""
        trainable = [(each, _trainable(each)) for each in self.attachments]
        try:
            return self.method(*args, **kwargs)
        finally:
            for attachment, before in trainable:
                _restore(attachment, before)

    @property
    def attachments(self) -> list[Any]:
        """The methods on the model; none once they are detached."""
        return attachments(base_model(self.owner))


class _WithMethods(KeepTrainable):
    """A PeftModel's ``save_pretrained`` or ``load_adapter``, then the methods' files in the same folder."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's."""
        given = self.arguments(args, kwargs)
        result = super().__call__(*args, **kwargs)
        for attachment in self.attachments:
            files = attachment.files
            if self.name == "save_pretrained" and given.get("is_main_process", True):
                gathered = {
                    name.rpartition(files.prefix)[2]: tensor
                    for name, tensor in (given.get("state_dict") or {}).items()
                    if f".{files.prefix}" in name
                }
                tensors = attachment.module.state_dict() | gathered
                files.write(Path(given["save_directory"]), attachment.settings(), tensors)
            if self.name == "load_adapter" and (Path(given["model_id"]) / files.config).exists():
                attachment.load(Path(given["model_id"]))
        return result


def attachments(model: Any) -> list[Any]:
    """The methods on a model, from the outermost; none on PEFT's around one."""
    host = getattr(model, "_vittle", None)
    return [] if host is None else host.in_order()


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What PEFT added to a model."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return set()
    layers = [module for module in model.modules() if isinstance(module, tuners.BaseTunerLayer)]
    added = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names if hasattr(layer, name)]
    return {parameter for each in added for parameter in each.parameters()}


def _trainable(attachment: Any) -> list[bool]:
    return [parameter.requires_grad for parameter in attachment.module.parameters()]


def _restore(attachment: Any, trainable: list[bool]) -> None:
    for parameter, is_trainable in zip(attachment.module.parameters(), trainable, strict=True):
        parameter.requires_grad_(is_trainable)
