"""The four backends of the op, and the choice among them.

A backend is a module with ``why_unavailable(device)``, ``forward(problem, hidden)`` and
``backward(problem, grad_out, grad_kl, need_hidden)``; see ``problem.py`` for what they are handed.
"""

from __future__ import annotations

from types import ModuleType

import torch

from vittle_kernels.backends import cpu, cuda, eager, triton

_BACKENDS: dict[str, ModuleType] = {"eager": eager, "cpu": cpu, "triton": triton, "cuda": cuda}
_AUTO = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}

BACKEND_NAMES = ("auto", *_BACKENDS)


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None where it works on this machine, else the reason why not."""
    return {name: module.why_unavailable(None) for name, module in _BACKENDS.items()}


def get_backend(name: str) -> ModuleType:
    """The backend's module."""
    return _BACKENDS[name]


@torch.compiler.assume_constant_result
def resolve_backend(name: str, device_type: str, device_index: int | None, is_double: bool) -> str:
    """The backend that serves tensors on a device: ``name`` itself, or the choice that "auto" makes.

    Raises:
        ValueError: no such backend.
        RuntimeError: an explicitly named backend cannot serve these tensors; it is never replaced silently.
    """
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend is {name!r}; must be one of {', '.join(map(repr, BACKEND_NAMES))}")
    if name == "auto":
        candidates = _AUTO.get(device_type, ("eager",)) if not is_double else ("eager",)
        return next(each for each in candidates if _BACKENDS[each].why_unavailable(device) is None)
    if is_double and name != "eager":
        raise ValueError(f"float64 needs backend 'eager' or 'auto'; backend is {name!r}")
    if (reason := _BACKENDS[name].why_unavailable(device)) is not None:
        raise RuntimeError(f"backend {name!r} cannot serve tensors on {device}: {reason}")
    return name
