"""The whole layer as people write it, to be timed against ``FusedIB`` and to stand in for it in a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contenders import eager, make_inputs
from contenders import failure as op_failure
from records import one_line
from torch import Tensor, nn

from vittle_kernels import FusedIB, FusedIBOutput
from vittle_kernels.backends import resolve_backend

Draw = Callable[[Tensor], Tensor]


class EagerBottleneck(nn.Module):
    """Two ``nn.Sequential`` heads on the tokens that a boolean mask picks, and ``contenders.eager``, fixed prior.

    It takes what :class:`FusedIB` takes, starts with its weights, and has them in the base's precision, which spares
    it the cast of FusedIB's fp32 weights.
    """

    def __init__(self, fused: FusedIB, dtype: torch.dtype, draw: Draw = torch.randn_like) -> None:
        super().__init__()
        width = fused.hidden_size
        self.draw, self.alpha = draw, float(fused.alpha)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2 * width)) for _ in range(2)
        )
        names = ("0.weight", "0.bias", "2.weight", "2.bias")
        for index, head in enumerate(self.heads):
            stacked = (fused.weight_in, fused.bias_in, fused.weight_out, fused.bias_out)
            head.load_state_dict({name: each[index].detach() for name, each in zip(names, stacked, strict=True)})
        self.to(fused.weight_in.device, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        vision_mask: Tensor,
        text_kl_mask: Tensor | None = None,
        kl_weights: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> FusedIBOutput:
        """As FusedIB.forward in training; its noise is torch's own, whatever the seed."""
        out = torch.empty_like(hidden_states)
        kl = hidden_states.new_empty(vision_mask.shape, dtype=torch.float32)
        for head, mask in zip(self.heads, (vision_mask, ~vision_mask), strict=True):
            tokens = hidden_states[mask]
            mixed, each_kl = eager(tokens, head(tokens), None, self.draw, self.alpha)
            out[mask], kl[mask] = mixed, each_kl.float()
        text_mask = ~vision_mask if text_kl_mask is None else text_kl_mask & ~vision_mask

        def total(mask: Tensor) -> Tensor:
            return kl[mask].mean() if kl_weights is None else (kl[mask] * kl_weights[mask]).sum()

        return FusedIBOutput(out, total(vision_mask), total(text_mask), vision_mask.sum(), text_mask.sum())


def failure(backend: str, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """None where the op is right in this dtype, and FusedIB has EagerBottleneck's KL and gradients in it and in fp32.

    alpha is 0 in the comparison of the layers, so that no noise touches it. The reference is in fp32; half precision
    may differ by 2 % of the largest value, after two matrix products and a GELU.
    """
    try:
        inputs = make_inputs(64, width, dtype, False, device)
        if why := op_failure(resolve_backend(backend, device.type, device.index, False), inputs):
            return why
        fused = FusedIB(width, alpha=0.0, backend=backend).to(device)
        reference = EagerBottleneck(fused, torch.float32)
        vision = (torch.arange(32, device=device) % 3 > 0).expand(2, 32)
        for each in dict.fromkeys((torch.float32, dtype)):
            states = inputs.hidden.detach().view(2, 32, width)
            results = []
            for layer, leaf in ((fused, states.to(each, copy=True)), (reference, states.float())):
                output = layer(leaf.requires_grad_(), vision)
                loss = output.hidden_states.float().square().mean() + output.kl_vision + output.kl_text
                weights = [layer.weight_in] if layer is fused else [head[0].weight for head in layer.heads]
                grad, *grads = torch.autograd.grad(loss, [leaf, *weights])
                grads = grads[0] if layer is fused else torch.stack(grads)
                results.append((output.kl_vision, output.kl_text, grad, grads))
            for value, true_value in zip(*results, strict=True):
                atol = (1e-4 if each == torch.float32 else 2e-2) * true_value.abs().max().item()
                torch.testing.assert_close(value.float(), true_value, rtol=0, atol=atol)
    except Exception as error:  # of many kinds: wrong numbers, a kernel that does not compile, ...
        return one_line(error)
    return None
