"""``python -m vittle_kernels``: what works here and why the rest does not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from vittle_kernels import __version__, available_backends
from vittle_kernels.backends import native


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The diagnosis as text."""
    library = native.library()
    rows = {
        "vittle-kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "CPU instructions": library.instruction_set() if library else "none: the C++ library is not built",
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": (library and library.cuda_architectures) or "not built",
        "CUDA toolkit": (library and library.cuda_version) or "none at build time",
    }
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows["CUDA devices"] = ", ".join(devices) or "none"
    lines = [f"{name:<18}{value}" for name, value in rows.items()]
    lines += ["", "backends"]
    for name, reason in available_backends().items():
        lines.append(f"  {name:<8}{'available' if reason is None else 'not available: ' + reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
