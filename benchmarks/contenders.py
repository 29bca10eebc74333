"""Who is timed, on what, and the check that a kernel of ours passes before its speed is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from records import one_line
from torch import Tensor

from vittle_kernels import available_backends, fused_ib, noise
from vittle_kernels.backends import native
from vittle_kernels.backends.problem import Problem
from vittle_kernels.functional import LOGVAR_BOUND

Op = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""hidden, posterior, prior -> out, kl."""

BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""Ours, by the kind of device."""

ALPHA = 0.3
SEED = 1234567890123


class Inputs(NamedTuple):
    """One problem, with the gradients that come back to it."""

    hidden: Tensor
    posterior: Tensor
    prior: Tensor | None
    grad_out: Tensor
    grad_kl: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What needs a gradient."""
        return [leaf for leaf in self[:3] if leaf is not None]

    def head(self, rows: int) -> Inputs:
        """The first rows of the problem."""
        return self._replace(**{name: getattr(self, name)[:rows] for name in self._fields if name != "prior"})

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers as new leaves, in another precision."""
        inputs = Inputs._make(tensor if tensor is None else tensor.detach().to(dtype) for tensor in self)
        for leaf in inputs.leaves:
            leaf.requires_grad_()
        return inputs


def make_inputs(rows: int, width: int, dtype: torch.dtype, learnable: bool, device: torch.device) -> Inputs:
    """Log-variances stay inside the bound, where a plain clamp has the gradient that passes straight through it."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).clamp_(-2, 2)

    return Inputs(
        hidden=normal(rows, width),
        posterior=normal(rows, 2 * width),
        prior=normal(2 * width) if learnable else None,
        grad_out=normal(rows, width),
        grad_kl=normal(rows),
    ).to(dtype)


def eager(
    hidden: Tensor,
    posterior: Tensor,
    prior: Tensor | None,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
    alpha: float = ALPHA,
) -> tuple[Tensor, Tensor]:
    """The bottleneck as people write it: each operator is a pass over memory, and autograd keeps what it needs."""
    mu, logvar = posterior.chunk(2, -1)
    logvar = logvar.clamp(-LOGVAR_BOUND, LOGVAR_BOUND)
    z = mu + torch.exp(0.5 * logvar) * draw(mu)
    out = (1 - alpha) * hidden + alpha * z
    if prior is None:
        kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar)
    else:
        m, v = prior.chunk(2, -1)
        kl = 0.5 * (v - logvar + (logvar.exp() + (mu - m) ** 2) * torch.exp(-v) - 1)
    return out, kl.mean(-1)


def eager_as_released(hidden: Tensor, posterior: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """The released Vittle code's way to the noise."""
    return eager(hidden, posterior, prior, drawn_on_the_host)


def drawn_on_the_host(mu: Tensor) -> Tensor:
    """Normals like mu, that the CPU draws."""
    return torch.randn(mu.shape).to(mu.device, mu.dtype)


def ours(backend: str) -> Op:
    """The public call."""
    return lambda hidden, posterior, prior: fused_ib(hidden, posterior, ALPHA, prior=prior, backend=backend)


def kernel_alone(inputs: Inputs) -> tuple[Callable[[], None], Callable[[], None]]:
    """The compiled forward and backward kernels, on results that are there already."""
    hidden, posterior, prior, grad_out, grad_kl = (each if each is None else each.detach() for each in inputs)
    alpha, seed = hidden.new_tensor(ALPHA, dtype=torch.float32), hidden.new_tensor([SEED], dtype=torch.int64)
    problem = Problem(posterior, alpha, prior if prior is None else prior.float(), None, None, seed, LOGVAR_BOUND)
    out, kl, grad_hidden = torch.zeros_like(hidden), torch.zeros_like(grad_kl, dtype=torch.float32), hidden.clone()
    grad_posterior, grad_kl, partials, grad_prior = posterior.clone(), grad_kl.float(), None, None
    if prior is not None:
        blocks = native.library().max_row_blocks(problem.tokens, 1)
        partials, grad_prior = (prior.new_zeros((n, len(prior)), dtype=torch.float32) for n in (blocks, 1))
    return (
        lambda: native.forward_into(problem, hidden, out, kl),
        lambda: native.backward_into(problem, grad_out, grad_kl, grad_hidden, grad_posterior, partials, grad_prior),
    )


@dataclass(frozen=True)
class Contender:
    """An implementation; ``backend`` names ours, the rest what it serves and where its noise comes from."""

    name: str
    op: Op
    backend: str | None = None
    takes_prior: bool = True
    draws_on_host: bool = False


def stored_noise(hidden: Tensor, posterior: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """A plain Triton kernel."""
    from stored_noise import stored_noise as op

    return op(hidden, posterior, ALPHA, LOGVAR_BOUND)


def contenders(device: torch.device, compiled: bool) -> tuple[list[Contender], dict[str, str]]:
    """Everyone that can run on the device, eager first; and who ought to but cannot here, each with the reason."""
    listed, missing = [Contender("eager", eager)], {}
    if device.type == "cuda":
        listed.append(Contender("eager, released", eager_as_released, draws_on_host=True))
        listed.append(Contender("triton, eps kept", stored_noise, takes_prior=False))
    if compiled:
        contender = Contender("torch.compile", torch.compile(eager, dynamic=False))
        try:
            contender.op(*make_inputs(1, 8, torch.float32, False, device)[:3])
            listed.append(contender)
        except Exception as error:  # of many kinds: no C++ compiler, no Triton, ...
            missing[contender.name] = " ".join(str(error).split())
    reasons = available_backends()
    for name in BACKENDS[device.type]:
        contender = Contender(f"fused_ib {name}", ours(name), name)
        if (reason := reasons[name]) is None:
            listed.append(contender)
        else:
            missing[contender.name] = reason
    return listed, missing


def failure(backend: str, inputs: Inputs) -> str | None:
    """None where the kernel's noise keeps the contract and, given it, results and gradients are the fp64 formula's."""
    inputs = inputs.head(64).to(inputs.hidden.dtype)
    exact = inputs.to(torch.float64)
    zeros = torch.zeros(inputs.posterior.shape, device=inputs.hidden.device)
    rows, width = inputs.hidden.shape
    try:
        eps = fused_ib(zeros[:, :width], zeros, 1.0, seed=SEED, backend=backend)[0].double()
        contract = noise.normals(torch.tensor([SEED], device=eps.device), torch.arange(rows, device=eps.device), width)
        torch.testing.assert_close(eps, contract, rtol=2e-6, atol=6e-4)

        results = fused_ib(*inputs[:2], ALPHA, prior=inputs.prior, seed=SEED, backend=backend)
        truth = eager(*exact[:3], lambda mu: eps)
        gradients = torch.autograd.grad(results, inputs.leaves, (inputs.grad_out, inputs.grad_kl.float()))
        true_gradients = torch.autograd.grad(truth, exact.leaves, (exact.grad_out, exact.grad_kl))
        for value, true_value in zip((*results, *gradients), (*truth, *true_gradients), strict=True):
            rtol = max(1e-5, torch.finfo(value.dtype).eps)
            torch.testing.assert_close(value.double(), true_value, rtol=rtol, atol=1e-5)
    except Exception as error:  # of many kinds: wrong numbers, a kernel that does not compile, ...
        return one_line(error)
    return None
