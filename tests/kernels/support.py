"""What the kernel tests share: backends, inputs, an independent fp64 reference, tolerances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from vittle_kernels import fused_ib

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A backend, and for the CPU one an instruction set."""

    backend: str
    instruction_set: str | None = None

    def __str__(self) -> str:
        return self.backend if self.instruction_set is None else f"{self.backend}-{self.instruction_set}"

    @property
    def device(self) -> str:
        return "cuda" if self.backend != "cpu" and torch.cuda.is_available() else "cpu"


CASES = [
    Case("eager"),
    *(Case("cpu", name) for name in ("avx512", "avx2", "baseline")),
    Case("triton"),
    Case("cuda"),
]


@dataclass(frozen=True)
class Inputs:
    """One call of the op, with the gradients that come back to it."""

    hidden: Tensor
    posterior: Tensor
    grad_out: Tensor
    grad_kl: Tensor
    alpha: float = 0.3
    prior: Tensor | None = None
    rows: Tensor | None = None
    offsets: Tensor | None = None
    seed: int = 1234567890123
    logvar_bound: float | None = 2.302585

    @property
    def options(self) -> dict[str, Any]:
        return {
            "prior": self.prior, "rows": self.rows, "offsets": self.offsets,
            "seed": self.seed, "logvar_bound": self.logvar_bound,
        }  # fmt: skip

    def to(self, dtype: torch.dtype) -> Inputs:
        return replace(
            self,
            hidden=self.hidden.to(dtype), posterior=self.posterior.to(dtype), grad_out=self.grad_out.to(dtype),
            grad_kl=self.grad_kl.to(torch.promote_types(dtype, torch.float32)),
            prior=None if self.prior is None else self.prior.to(torch.promote_types(dtype, torch.float32)),
        )  # fmt: skip


def make_inputs(
    tokens: int,
    width: int,
    *,
    device: str = "cpu",
    hidden_dtype: torch.dtype = torch.float32,
    posterior_dtype: torch.dtype = torch.float32,
    groups: int = 0,
    permuted: bool = False,
    **options: Any,
) -> Inputs:
    """Random inputs; groups: 0 for the fixed prior, 1 for a (2 D,) one, else (G, 2 D) with uneven offsets."""
    generator = torch.Generator().manual_seed(tokens * 1009 + width)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    prior = offsets = None
    if groups == 1:
        prior = normal(2 * width)
    elif groups > 1:
        prior = normal(groups, 2 * width)
        ends = torch.randint(0, tokens + 1, (groups,), generator=generator).sort().values
        ends[-1] = tokens
        offsets = ends.to(device, torch.int32)
    return Inputs(
        hidden=normal(tokens, width, dtype=hidden_dtype),
        posterior=normal(tokens, 2 * width, dtype=posterior_dtype) * 1.5,
        grad_out=normal(tokens, width, dtype=hidden_dtype),
        grad_kl=normal(tokens),
        prior=prior,
        offsets=offsets,
        rows=torch.randperm(tokens, generator=generator).to(device) if permuted else None,
        **options,
    )


RESULTS = ("out", "kl", "grad_hidden", "grad_posterior", "grad_prior")


def run_op(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The op's results and gradients."""
    hidden, posterior = (t.detach().requires_grad_() for t in (inputs.hidden, inputs.posterior))
    prior = None if inputs.prior is None else inputs.prior.detach().requires_grad_()
    options = inputs.options | {"prior": prior}
    out, kl = fused_ib(hidden, posterior, inputs.alpha, backend=backend, **options)
    torch.autograd.backward([out, kl], [inputs.grad_out, inputs.grad_kl])
    results = (out.detach(), kl.detach(), hidden.grad, posterior.grad, None if prior is None else prior.grad)
    return {name: value for name, value in zip(RESULTS, results, strict=True) if value is not None}


def op_noise(inputs: Inputs, backend: str) -> Tensor:
    """The normals that a backend draws, by token: with hidden 0, mu 0, s 0 and alpha 1 they are the output."""
    zeros = torch.zeros_like(inputs.hidden, dtype=torch.float32)
    posterior = torch.zeros(*zeros.shape[:-1], 2 * zeros.shape[-1], device=zeros.device)
    out, _ = fused_ib(zeros, posterior, 1.0, seed=inputs.seed, backend=backend)
    return out


class Bounded(torch.autograd.Function):
    """Clamp whose gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        return x.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _closed_form(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    return 0.5 * (prior_logvar - logvar + (logvar.exp() + (mean - prior_mean) ** 2) * (-prior_logvar).exp() - 1)


def _distributions(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    return kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(prior_mean, (prior_logvar / 2).exp()))


def reference(
    inputs: Inputs, eps: Tensor, dtype: torch.dtype, kl_of: Callable[..., Tensor] = _distributions
) -> dict[str, Tensor]:
    """The op by PyTorch's autograd in a precision of choice, given the noise by token."""
    inputs, eps = inputs.to(dtype), eps.to(dtype)
    hidden, posterior = (t.detach().requires_grad_() for t in (inputs.hidden, inputs.posterior))
    prior = None if inputs.prior is None else inputs.prior.detach().to(dtype).requires_grad_()
    tokens, width = hidden.shape
    rows = torch.arange(tokens, device=hidden.device) if inputs.rows is None else inputs.rows

    mean, logvar = posterior[torch.argsort(rows)].chunk(2, -1)  # in token order
    if inputs.logvar_bound is not None:
        logvar = Bounded.apply(logvar, inputs.logvar_bound)
    prior_mean, prior_logvar = torch.zeros_like(mean), torch.zeros_like(mean)
    if prior is not None:
        group = torch.zeros_like(rows)
        if inputs.offsets is not None:
            index = torch.arange(tokens, device=hidden.device)
            group = (index.unsqueeze(1) >= inputs.offsets.unsqueeze(0)).sum(1).clamp(max=len(inputs.offsets) - 1)
        prior_mean, prior_logvar = prior.view(-1, 2 * width)[group][torch.argsort(rows)].chunk(2, -1)
    out = (1 - inputs.alpha) * hidden + inputs.alpha * (mean + (logvar / 2).exp() * eps)
    kl = kl_of(mean, logvar, prior_mean, prior_logvar).mean(-1)
    torch.autograd.backward([out, kl], [inputs.grad_out, inputs.grad_kl.to(dtype)])
    results = (out.detach(), kl.detach(), hidden.grad, posterior.grad, None if prior is None else prior.grad)
    return {name: value for name, value in zip(RESULTS, results, strict=True) if value is not None}


def assert_as_good_as_torch(inputs: Inputs, results: dict[str, Tensor], eps: Tensor) -> None:
    """At most twice the error of plain PyTorch in fp32 against fp64.

    PyTorch's error is the largest over 32 inputs that differ by 1 %, and at least the rounding of the largest value:
    a single one of a handful of elements can be exact by luck.
    """
    exact = reference(inputs, eps, torch.float64)
    assert results.keys() == exact.keys()
    torch_error = {name: truth.abs().max().item() * 2.0**-24 for name, truth in exact.items() if truth.numel()}
    generator = torch.Generator().manual_seed(0)

    def nearby(tensor: Tensor) -> Tensor:
        return tensor * (1 + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.device))

    for _ in range(32):
        prior = None if inputs.prior is None else nearby(inputs.prior)
        other = replace(inputs, hidden=nearby(inputs.hidden), posterior=nearby(inputs.posterior), prior=prior)
        plain, truth = (
            reference(other, eps, torch.float32, _closed_form),
            reference(other, eps, torch.float64),
        )
        for name in torch_error:
            torch_error[name] = max(torch_error[name], (plain[name].double() - truth[name]).abs().max().item())
    for name, bound in torch_error.items():
        error = (results[name].double() - exact[name]).abs().max().item()
        assert error <= 2 * bound, f"{name}: {error:.2e}, torch has {bound:.2e}"


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """How many representable values of a half-precision dtype lie between two tensors, at most."""

    def ordered(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordered(a) - ordered(b)).abs().max())


def fused_ib_variance(s: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """e^(s/2) and, where it is large, e^s as the kernel has them: the noise's factor and twice the KL's growth."""
    n = s.numel()
    posterior = torch.stack((torch.zeros_like(s), s), -1)
    eps, _ = fused_ib(torch.zeros(n, 1), torch.zeros(n, 2), 1.0, seed=1, backend=backend)
    out, kl = fused_ib(torch.zeros(n, 1), posterior, 1.0, seed=1, logvar_bound=None, backend=backend)
    return (out.double() / eps.double()).squeeze(), 2 * kl.double() + s.double() + 1
