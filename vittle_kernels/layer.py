"""``FusedIB``: the visual instruction bottleneck as a layer (Vittle, arXiv 2505.13946)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vittle_kernels.backends import BACKEND_NAMES
from vittle_kernels.functional import LOGVAR_BOUND, fused_ib
from vittle_kernels.grouped import grouped_linear, take_rows

VISION, TEXT = 0, 1
"""The index of each modality's head and prior in the stacked parameters."""


class FusedIBOutput(NamedTuple):
    """What :class:`FusedIB` returns."""

    hidden_states: Tensor
    """(..., D), in the input's dtype."""
    kl_vision: Tensor | None
    """fp32, 0-d: mean KL in nats over the vision tokens (0 if none); None in eval mode."""
    kl_text: Tensor | None
    """fp32, 0-d: mean KL in nats over the text tokens that count (0 if none); None in eval mode."""
    vision_tokens: Tensor
    """int64, 0-d: how many vision tokens there are."""
    text_tokens: Tensor
    """int64, 0-d: how many text tokens count towards ``kl_text``."""
    posterior: Tensor | None = None
    """(N, 2 D) in the heads' dtype, detached: each token's mean, then log-variance before it is bounded, vision tokens
    first; None in eval mode."""


class FusedIB(nn.Module):
    """A stochastic bottleneck after one layer of an LLM, with a head and a prior for each modality.

    Every token passes exactly one head, Linear(D, D) -> GELU -> Linear(D, 2 D), which gives its Gaussian posterior.
    In training a sample of it is interpolated with the token; in eval mode the mean is. A layer without vision has
    one head, for text; one for inference has the mean's half of each head's last matrix only, and no prior.

    The parameters stay fp32 under ``.to(torch.bfloat16)`` and ``.half()``, as alpha does: at a learning rate of 2e-5
    a bf16 weight of 0.02 never moves. They are computed with in autocast's dtype, or else in the input's. (DeepSpeed,
    which keeps fp32 copies of its own, may set them to bf16 one by one; then they stay that.)

    Args:
        hidden_size: D.
        prior: "fixed", N(0, I); or "learnable", a mean and a log-variance for each modality and dimension.
        alpha: weight of the sample against the token, in [0, 1]; :meth:`set_alpha` moves it.
        vision: whether there is a head for vision tokens; without it, all tokens are text.
        inference_only: no training, half of each last matrix.
        backend: as in :func:`vittle_kernels.fused_ib`.

    Raises:
        ValueError: an argument out of range, named in the message.
    """

    alpha: Tensor

    def __init__(
        self,
        hidden_size: int,
        *,
        prior: Literal["fixed", "learnable"] = "fixed",
        alpha: float = 0.5,
        vision: bool = True,
        inference_only: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size!r}; must be a positive integer")
        if prior not in ("fixed", "learnable"):
            raise ValueError(f"prior is {prior!r}; must be 'fixed' or 'learnable'")
        if backend not in BACKEND_NAMES:
            raise ValueError(f"backend is {backend!r}; must be one of {', '.join(map(repr, BACKEND_NAMES))}")
        self.hidden_size = hidden_size
        self.vision = vision
        self.inference_only = inference_only
        self.backend = backend
        heads, columns = 1 + vision, hidden_size if inference_only else 2 * hidden_size
        fp32: dict[str, Any] = {"dtype": torch.float32}  # whatever the default is
        self.weight_in = nn.Parameter(torch.empty(heads, hidden_size, hidden_size, **fp32))
        self.bias_in = nn.Parameter(torch.empty(heads, hidden_size, **fp32))
        self.weight_out = nn.Parameter(torch.empty(heads, columns, hidden_size, **fp32))
        self.bias_out = nn.Parameter(torch.empty(heads, columns, **fp32))
        has_prior = prior == "learnable" and not inference_only
        self.prior = nn.Parameter(torch.empty(heads, columns, **fp32)) if has_prior else None
        self.register_buffer("alpha", torch.empty((), dtype=torch.float32))
        self.reset_parameters()
        self.set_alpha(alpha)

    def reset_parameters(self) -> None:
        """Weights N(0, 0.02), biases and priors 0: every learnable prior starts as N(0, I)."""
        for weight in (self.weight_in, self.weight_out):
            nn.init.normal_(weight, std=0.02)
        for zeroed in (self.bias_in, self.bias_out, self.prior):
            if zeroed is not None:
                nn.init.zeros_(zeroed)

    def set_alpha(self, alpha: float) -> None:
        """Moves the interpolation weight, in place: compiled code and captured graphs follow it."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; must be in [0, 1]")
        self.alpha.fill_(alpha)

    def forward(
        self,
        hidden_states: Tensor,
        vision_mask: Tensor | None = None,
        text_kl_mask: Tensor | None = None,
        kl_weights: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> FusedIBOutput:
        """Passes every token through its modality's bottleneck.

        Args:
            hidden_states: (..., D).
            vision_mask: bool (...), True at vision tokens, wherever they are. None: all tokens are text.
            text_kl_mask: bool (...), the text tokens whose KL counts, as instruction tokens do; it is ignored at
                vision tokens, which all count. None: all text tokens.
            kl_weights: fp32 (...), what each counted token weighs in ``kl_vision`` or ``kl_text``. None: 1 / their
                number, the mean.
            seed: of the noise, as in :func:`vittle_kernels.fused_ib`. None: drawn from torch's generator.

        Raises:
            TypeError, ValueError: an argument of wrong dtype or shape, named in the message.
            RuntimeError: training of a layer that is for inference only.
        """
        self._check(hidden_states, vision_mask, text_kl_mask, kl_weights)
        shape, tokens = hidden_states.shape[:-1], hidden_states.shape[:-1].numel()
        inputs = hidden_states.reshape(-1, self.hidden_size)
        rows = None
        if vision_mask is None:
            vision_mask = torch.zeros(shape, dtype=torch.bool, device=hidden_states.device)
            ends = torch.arange(2, dtype=torch.int32, device=hidden_states.device)
            offsets = tokens * (ends if self.vision else ends[1:])
            inverse = None
        else:
            rows, inverse, offsets = modality_order(vision_mask)
            inputs = take_rows(inputs, rows, inverse)

        text_mask = ~vision_mask if text_kl_mask is None else text_kl_mask & ~vision_mask
        vision_tokens, text_tokens = vision_mask.sum(), text_mask.sum()

        if not self.training:
            mean = self._heads(inputs, offsets, self.hidden_size)
            if inverse is not None:
                mean = mean.index_select(0, inverse)
            # fp32, like the kernels, so that alpha is not rounded to the state's precision.
            out = torch.lerp(hidden_states.float(), mean.float().view(hidden_states.shape), self.alpha)
            return FusedIBOutput(out.to(hidden_states.dtype), None, None, vision_tokens, text_tokens)

        if self.inference_only:
            raise RuntimeError("this bottleneck has what inference needs only (inference_only=True); call eval()")
        posterior = self._heads(inputs, offsets, 2 * self.hidden_size)
        out, kl = fused_ib(
            hidden_states,
            posterior if rows is not None else posterior.view(*shape, -1),
            self.alpha,
            prior=self.prior,
            rows=rows,
            offsets=offsets,
            seed=seed,
            logvar_bound=LOGVAR_BOUND,
            backend=self.backend,
        )

        def total(mask: Tensor, count: Tensor) -> Tensor:
            if kl_weights is None:
                return torch.where(mask, kl, 0.0).sum() / count.clamp(min=1)
            return torch.where(mask, kl * kl_weights, 0.0).sum()

        kl_vision, kl_text = total(vision_mask, vision_tokens), total(text_mask, text_tokens)
        return FusedIBOutput(out, kl_vision, kl_text, vision_tokens, text_tokens, posterior.detach())

    def _heads(self, inputs: Tensor, offsets: Tensor, columns: int) -> Tensor:
        """Linear -> GELU -> the first columns of Linear, each row by the head of its group."""
        device_type = inputs.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else inputs.dtype
        inner = grouped_linear(inputs.to(dtype), self.weight_in.to(dtype), self.bias_in.to(dtype), offsets)
        weight_out, bias_out = self.weight_out[:, :columns], self.bias_out[:, :columns]
        return grouped_linear(F.gelu(inner), weight_out.to(dtype), bias_out.to(dtype), offsets)

    def _check(
        self,
        hidden_states: Tensor,
        vision_mask: Tensor | None,
        text_kl_mask: Tensor | None,
        kl_weights: Tensor | None,
    ) -> None:
        if hidden_states.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"hidden_states is {tuple(hidden_states.shape)}; must be (..., {self.hidden_size})")
        if vision_mask is not None and not self.vision:
            raise ValueError("vision_mask is given; must be None, as this layer has no head for vision (vision=False)")
        expected = hidden_states.shape[:-1]
        for name, mask in (("vision_mask", vision_mask), ("text_kl_mask", text_kl_mask)):
            if mask is not None and mask.dtype != torch.bool:
                raise TypeError(f"{name} is {mask.dtype}; must be torch.bool")
        for name, each in (
            ("vision_mask", vision_mask),
            ("text_kl_mask", text_kl_mask),
            ("kl_weights", kl_weights),
        ):
            if each is not None and each.shape != expected:
                raise ValueError(f"{name} is {tuple(each.shape)}; must be {tuple(expected)}, one entry for each token")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedIB:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and (moved.dtype.itemsize < 4 or tensor is self.alpha):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        prior = "fixed" if self.prior is None else "learnable"
        options = {"vision": self.vision, "inference_only": self.inference_only, "backend": self.backend}
        return ", ".join([f"{self.hidden_size}, prior={prior!r}", *(f"{k}={v!r}" for k, v in options.items())])


def modality_order(vision_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The permutation that puts vision tokens first, without a host sync.

    Returns:
        rows: int64 (N,), the token of each row, vision tokens first, each modality in the tokens' order.
        inverse: int64 (N,), the row of each token.
        offsets: int32 (2,), where the vision and the text rows end.
    """
    vision = vision_mask.flatten()
    text = ~vision
    vision_count = vision.sum()
    inverse = torch.where(vision, vision.cumsum(0), vision_count + text.cumsum(0)) - 1
    tokens = torch.arange(vision.numel(), device=vision.device)
    rows = torch.empty_like(tokens).scatter_(0, inverse, tokens)
    offsets = torch.stack((vision_count, torch.full_like(vision_count, vision.numel()))).to(torch.int32)
    return rows, inverse, offsets
