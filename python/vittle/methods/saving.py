"""A bottleneck on disk: ``bottleneck.safetensors`` and a readable ``bottleneck_config.json``.

``save_pretrained`` of a model that has a bottleneck, Trainer's checkpoints included, writes the same config beside the
model's own weights, which hold the bottleneck's as ``bottleneck.*``: whatever resumes the model resumes both.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vittle.errors import UserError

WEIGHTS, CONFIG = "bottleneck.safetensors", "bottleneck_config.json"
PREFIX = "bottleneck."
"""Of the bottleneck's tensors among a model's."""

FORMAT = 1


def write(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files, each whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS}.tmp"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(folder / WEIGHTS)
    write_settings(folder, settings)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes ``bottleneck_config.json``."""
    partial = folder / f"{CONFIG}.tmp"
    partial.write_text(json.dumps({"format": FORMAT, **settings}, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / CONFIG)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors that a folder holds.

    Raises:
        UserError: a file is missing, damaged or from a newer version.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; must be a file that save_bottleneck wrote") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    version = settings.pop("format", None) if isinstance(settings, dict) else None
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        remedy = "upgrade vittle-kernels, which is older than the file" if newer else "save_bottleneck writes it"
        raise UserError(f"{path} has format {version!r}; this version reads format {FORMAT}: {remedy}")
    return settings, _read_tensors(folder)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Of the bottleneck's own file, or else of the model's in ``model.safetensors`` or its shards."""
    from safetensors import SafetensorError, safe_open

    files, prefix = [WEIGHTS], ""
    if not (folder / WEIGHTS).exists():
        prefix = PREFIX
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({Path(file).name for name, file in names.items() if name.startswith(prefix)})
        elif (folder / "model.safetensors").exists():
            files = ["model.safetensors"]
        else:
            raise UserError(f"{folder} has a {CONFIG} but neither {WEIGHTS} nor model.safetensors")
    tensors = {}
    for file in files:
        try:
            with safe_open(folder / file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no dictionary)
                    if name.startswith(prefix):
                        tensors[name.removeprefix(prefix)] = stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file} is damaged: {error}") from error
    if not tensors:
        raise UserError(f"{folder / files[0] if files else folder} holds no {PREFIX}* tensors")
    return tensors


class SavePretrained:
    """Stands in for one model's ``save_pretrained``: what it does, and the bottleneck's config beside it."""

    def __init__(self, model: Any, attachment: Any) -> None:
        self.model, self.attachment = model, attachment

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.save_pretrained``."""
        result = type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            (Path(save_directory) / WEIGHTS).unlink(missing_ok=True)  # the model's own file has newer ones
            write_settings(Path(save_directory), self.attachment.settings())
        return result


_RELEASED = {
    "weight_in": "bottleneck_layer_{}.0.weight",
    "bias_in": "bottleneck_layer_{}.0.bias",
    "weight_out": "bottleneck_layer_{}.2.weight",
    "bias_out": "bottleneck_layer_{}.2.bias",
}
_RELEASED_PRIOR = ("learnable_prior.mean_{}", "learnable_prior.logsigma_sq_{}")


def from_released(tensors: Mapping[str, Tensor], *, prior: str, alpha: float = 0.5) -> dict[str, Tensor]:
    """FusedIB's state from the tensors of a checkpoint of the released Vittle code.

    Args:
        tensors: by their names there, such as ``model.bottleneck_layer_v.0.weight``; others are left out.
        prior: "fixed" or "learnable", as it was trained: the released code stores a prior in either case.
        alpha: that inference uses, which the released code does not store.

    Raises:
        UserError: a tensor is missing.
    """
    ours = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    def stacked(*names: str) -> Tensor:
        found = []
        for modality in "vt":
            parts = [name.format(modality) for name in names]
            if missing := [name for name in parts if name not in ours]:
                raise UserError(f"the checkpoint has no {missing[0]}; must be one of the released Vittle code")
            flat = [ours[name].flatten() if len(parts) > 1 else ours[name] for name in parts]
            found.append(torch.cat(flat))
        return torch.stack(found).float()

    state = {name: stacked(released) for name, released in _RELEASED.items()}
    if prior == "learnable":
        state["prior"] = stacked(*_RELEASED_PRIOR)
    return state | {"alpha": torch.tensor(alpha)}


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released Vittle code's tensors from FusedIB's state; the inverse of :func:`from_released`."""
    tensors = {}
    for index, modality in enumerate("vt"):
        for name, released in _RELEASED.items():
            tensors[f"model.{released.format(modality)}"] = state[name][index].clone()
        if "prior" in state:
            for released, half in zip(_RELEASED_PRIOR, state["prior"][index].chunk(2), strict=True):
                tensors[f"model.{released.format(modality)}"] = half.clone().view(1, 1, -1)
    return tensors
