"""How far a shift moves a model's own representations, layer by layer: what Vittle's bottleneck shrinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vittle.evaluate import Asking, inputs
from vittle.methods import peft
from vittle.methods.attachment import decoder_layers, vision_ids
from vittle.metrics.representation import Spectrum
from vittle.shifts import Condition
from vittle.tasks import Sample

States = dict[str, Tensor]
"""By modality, vision and text: the mean state of each sample's tokens after each layer, (layers, samples, D), in the
model's own dtype, which is what its states are known to."""


def layer_states(
    model: Any, processor: Any, batches: Sequence[Sequence[Sample]], condition: Condition, asking: Asking,
    moved: Callable[[int], Any] = lambda samples: None,
) -> States:  # fmt: skip
    """The mean states of the questions' tokens, after the bottleneck where a layer ends in one; on the CPU.

    Args:
        model: in eval mode, with or without bottleneck and adapters.
        processor: its processor.
        batches: of samples; those without images have no vision states, those with broken ones neither.
        condition: the shift.
        asking: the settings of the evaluation.
        moved: is told how many samples have gone through.
    """
    ids = torch.tensor(vision_ids(peft.base_model(model)), device=model.device)
    found: dict[str, list[Tensor]] = {"vision": [], "text": []}
    with torch.inference_mode(), _recorded(model) as states:
        for answers, tensors in inputs(processor, batches, condition, asking):
            if tensors is not None:
                tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
                states.clear()
                model(**tensors, use_cache=False)
                vision = torch.isin(tensors["input_ids"], ids)
                masks = {"vision": vision, "text": ~vision & tensors["attention_mask"].bool()}
                for modality, mask in masks.items():
                    if (mask.any(1)).all():
                        found[modality].append(torch.stack([_mean(state, mask) for state in states]).cpu())
            moved(len(answers))
    return {modality: torch.cat(parts, 1) for modality, parts in found.items() if parts}


class LayerJSD:
    """How far shifted states are from clean ones, whose entropies are worked out once for all shifts."""

    def __init__(self, clean: States) -> None:
        self._clean = {name: [Spectrum("clean", each) for each in states] for name, states in clean.items()}

    def __call__(self, shifted: States) -> dict[str, list[float]]:
        """The representation JSD after each layer, in nats, by modality."""
        return {
            name: [one.jsd(Spectrum("shifted", other)) for one, other in zip(clean, shifted[name], strict=True)]
            for name, clean in self._clean.items()
            if name in shifted
        }


@contextmanager
def _recorded(model: Any) -> Iterator[list[Tensor]]:
    """The states after each decoder layer, in order: what the next one, or the last norm, is given."""
    layers, _ = decoder_layers(peft.base_model(model))
    norm = peft.base_model(model).get_decoder().norm
    states: list[Tensor] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    hooks = [each.register_forward_pre_hook(record, with_kwargs=True) for each in (*layers[1:], norm)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)
