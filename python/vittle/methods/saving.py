"""A method on disk: `bottleneck.safetensors` and a readable `bottleneck_config.json`, `vpgc.safetensors` and its own.

``save_pretrained`` of a model that has a method attached, Trainer's checkpoints included, writes the same config beside
the model's own weights, which hold the method's as ``bottleneck.*``: whatever resumes the model resumes both.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vittle.errors import UserError
from vittle.files import whole, write_json

FORMAT = 1


@dataclass(frozen=True)
class Files:
    """Where a method of this name lies in a folder."""

    name: str

    @property
    def weights(self) -> str:
        """The file of its tensors."""
        return f"{self.name}.safetensors"

    @property
    def config(self) -> str:
        """The file of its settings."""
        return f"{self.name}_config.json"

    @property
    def prefix(self) -> str:
        """Of its tensors among a model's."""
        return f"{self.name}."

    def write(self, folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes both files, each whole or not at all."""
        from safetensors.torch import save_file

        _make(folder)
        with whole(folder / self.weights) as partial:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        self.write_settings(folder, settings)

    def write_settings(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Writes the config alone."""
        _make(folder)
        write_json(folder / self.config, {"format": FORMAT, **settings})

    def read(self, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The settings and the tensors that a folder holds.

        Raises:
            UserError: a file is missing, damaged or from a newer version.
        """
        path, writer = folder / self.config, f"save_{self.name}"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"{path} does not exist; must be a file that {writer} wrote") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from error
        version = settings.pop("format", None) if isinstance(settings, dict) else None
        if type(version) is not int or version != FORMAT:
            newer = type(version) is int and version > FORMAT
            remedy = "upgrade vittle-kernels, which is older than the file" if newer else f"{writer} writes it"
            raise UserError(f"{path} has format {version!r}; this version reads format {FORMAT}: {remedy}")
        return settings, self._tensors(folder)

    def check(self, module: nn.Module, tensors: Mapping[str, Tensor], owner: str) -> None:
        """Whether tensors that were read are the module's.

        Raises:
            UserError: one is missing, too many, of another shape or of integers.
        """
        wanted = module.state_dict()
        for name in sorted(wanted.keys() | tensors.keys()):
            here, there = (tuple(each[name].shape) if name in each else None for each in (wanted, tensors))
            if here != there:
                found = f"no {name}" if there is None else f"{name} of shape {there}"
                must = "left out" if here is None else here
                raise UserError(f"{owner} has {found}; must be {must}, by the model and {self.config}")
            if not tensors[name].dtype.is_floating_point:
                raise UserError(f"{owner} has {name} of {tensors[name].dtype}; must be floating point")

    def _tensors(self, folder: Path) -> dict[str, Tensor]:
        """Of the method's own file, or else of the model's in ``model.safetensors`` or its shards."""
        from safetensors import SafetensorError, safe_open

        files, prefix = [self.weights], ""
        if not (folder / self.weights).exists():
            files, prefix = self._model_files(folder), self.prefix
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
            raise UserError(f"{folder / files[0] if files else folder} holds no {self.prefix}* tensors")
        return tensors

    def _model_files(self, folder: Path) -> list[str]:
        """Those of a model's files that hold the method's tensors."""
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").exists():
            return ["model.safetensors"]
        if not index.exists():
            raise UserError(f"{folder} has a {self.config} but neither {self.weights} nor model.safetensors")
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return sorted({Path(file).name for name, file in names.items() if name.startswith(self.prefix)})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged: {error}") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is a file, or below one; must be a folder") from None


class Replaced:
    """Stands in for a method of one object, with the method's own signature."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    @property
    def method(self) -> Any:
        """The object's own."""
        return getattr(type(self.owner), self.name).__get__(self.owner)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.method)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """By their names, however they were passed; defaults included."""
        bound = inspect.signature(self.method).bind(*args, **kwargs)
        bound.apply_defaults()
        named = dict(bound.arguments)
        return named | named.pop("kwargs", {})


class SavePretrained(Replaced):
    """A model's ``save_pretrained``, and the methods' configs beside it.

    Their tensors are among the model's own, or, where those are adapters or somebody's choice of tensors, in files of
    their own.
    """

    def __init__(self, model: Any, attachments: Callable[[], Sequence[Any]]) -> None:
        super().__init__(model, "save_pretrained")
        self.attachments = attachments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.save_pretrained``."""
        given = self.arguments(args, kwargs)
        folder, pushes = Path(given["save_directory"]), given.get("push_to_hub")
        if not given.get("is_main_process", True):
            return self.method(*args, **kwargs)
        tensors = given.get("state_dict")
        is_plain = not given.get("variant") and not getattr(self.owner, "_hf_peft_config_loaded", False)
        among: list[Files] = []
        for each in self.attachments():  # before the model, so that a push has them
            each.files.write_settings(folder, each.settings())
            if is_plain and (tensors is None or any(name.startswith(each.files.prefix) for name in tensors)):
                among.append(each.files)
            elif tensors is None or pushes:
                each.files.write(folder, each.settings(), each.module.state_dict())
        result = self.method(*args, **kwargs)
        for files in among:
            (folder / files.weights).unlink(missing_ok=True)  # the model's own file has newer ones
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
    if prior not in ("fixed", "learnable"):
        raise UserError(f"prior is {prior!r}; must be 'fixed' or 'learnable'")
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
    heads, columns, width = state["weight_out"].shape
    if heads != 2 or columns != 2 * width:
        raise UserError("the released code's bottleneck has two whole heads; this one is for text or inference only")
    tensors = {}
    for index, modality in enumerate("vt"):
        for name, released in _RELEASED.items():
            tensors[f"model.{released.format(modality)}"] = state[name][index].clone()
        if "prior" in state:
            for released, half in zip(_RELEASED_PRIOR, state["prior"][index].chunk(2), strict=True):
                tensors[f"model.{released.format(modality)}"] = half.clone().view(1, 1, -1)
    return tensors
