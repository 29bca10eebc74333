from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import CASES, Case

from vittle_kernels import available_backends
from vittle_kernels.backends import native


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Each backend, the CPU one with each instruction set; skipped by name where this machine has it not."""
    chosen: Case = request.param
    if reason := available_backends()[chosen.backend]:
        pytest.skip(f"{chosen}: {reason}")
    if chosen.instruction_set is None:
        yield chosen
        return
    library = native.library()
    best = library.instruction_set()
    if not library.select_instruction_set(chosen.instruction_set):
        pytest.skip(f"{chosen}: this processor has it not")
    yield chosen
    library.select_instruction_set(best)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element which no kernel writes shows."""
    empty = torch.empty

    def nan_filled(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not torch.compiler.is_compiling() else tensor

    monkeypatch.setattr(torch, "empty", nan_filled)
