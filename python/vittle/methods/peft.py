"""A bottleneck beside PEFT's adapters: it stays trainable, and is saved and loaded with them.

PEFT freezes whatever is no adapter, the heads of a bottleneck that was there before too, and saves adapters only.
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
        setattr(peft_model, name, _WithBottleneck(peft_model, name))
    peft_model.add_adapter = KeepTrainable(peft_model, "add_adapter")


def _is(module: Any, name: str) -> bool:
    peft = sys.modules.get("peft")
    if peft is None:
        return False
    kind = peft.PeftModel if name == "PeftModel" else sys.modules["peft.tuners.tuners_utils"].BaseTuner
    return isinstance(module, kind)


def _registered(parent: nn.Module, name: str, module: Any) -> None:
    """The model goes into a tuner, which freezes it; then the tuner into a PeftModel."""
    if name == "model" and _is(parent, "BaseTuner") and (attachment := getattr(module, "_attachment", None)):
        attachment.trainable = _trainable(attachment)
    if name == "base_model" and _is(parent, "PeftModel") and _is(module, "BaseTuner"):
        attachment = getattr(module.model, "_attachment", None)
        if attachment is not None and attachment.trainable is not None:
            _restore(attachment, attachment.trainable)
            attachment.trainable = None
            follow(parent)


ADAPTER_METHODS = ("add_adapter", "load_adapter")
"""Of transformers' own models: they freeze what is no adapter."""


class KeepTrainable(saving.Replaced):
    """A method that freezes whatever is no adapter, and leaves the bottleneck as it was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method."""
        attachment = self.attachment
        if attachment is None:
            return self.method(*args, **kwargs)
        trainable = _trainable(attachment)
        try:
            return self.method(*args, **kwargs)
        finally:
            _restore(attachment, trainable)

    @property
    def attachment(self) -> Any:
        """The bottleneck's, or None once it is detached."""
        return getattr(base_model(self.owner), "_attachment", None)


class _WithBottleneck(KeepTrainable):
    """A PeftModel's ``save_pretrained`` or ``load_adapter``, then the bottleneck's files in the same folder."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's."""
        given = self.arguments(args, kwargs)
        result = super().__call__(*args, **kwargs)
        attachment = self.attachment
        if attachment is None:
            return result
        if self.name == "save_pretrained" and given.get("is_main_process", True):
            tensors = attachment.module.state_dict()
            gathered = {
                name.rpartition(saving.PREFIX)[2]: tensor
                for name, tensor in (given.get("state_dict") or {}).items()
                if f".{saving.PREFIX}" in name
            }
            saving.write(Path(given["save_directory"]), attachment.settings(), tensors | gathered)
        if self.name == "load_adapter" and (Path(given["model_id"]) / saving.CONFIG).exists():
            attachment.load(Path(given["model_id"]))
        return result


def _trainable(attachment: Any) -> list[bool]:
    return [parameter.requires_grad for parameter in attachment.module.parameters()]


def _restore(attachment: Any, trainable: list[bool]) -> None:
    for parameter, is_trainable in zip(attachment.module.parameters(), trainable, strict=True):
        parameter.requires_grad_(is_trainable)
