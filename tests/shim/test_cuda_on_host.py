"""The CUDA kernels, run as host code, in the tests of tests/kernels and in some of their own; see conftest.py.

What a GPU approximates is rounded correctly here, and a warp's lanes are not in step. All else is what a GPU runs: the
device branches of csrc, its indices, tiles, strides and reductions, its barriers and shuffles, its two access widths.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import FLOATS, Case, assert_as_good_as_torch, make_inputs, op_noise, run_op
from test_noise import (  # noqa: F401
    test_known_answers,
    test_normals_keep_the_contract,
    test_the_op_draws_these_normals,
    test_words_agree_on_every_backend,
)
from test_op import (  # noqa: F401
    test_alpha,
    test_bound_and_its_straight_through_gradient,
    test_every_group_may_be_empty,
    test_half_precision_is_the_rounded_fp32_result,
    test_hidden_that_needs_no_gradient_gets_none,
    test_nan_alpha_spreads,
    test_no_rows,
    test_prior_gets_its_own_dtype,
    test_pure_and_seeded,
    test_results_and_gradients,
    test_seed_forms_agree,
    test_special_values_spread_as_in_the_reference,
    test_views_are_read_in_place,
)
from torch import Tensor

from vittle_kernels import fused_ib
from vittle_kernels.backends import cuda, native
from vittle_kernels.backends.problem import Problem

SHIM = Path(__file__).parent
CSRC = SHIM.parents[1] / "csrc"


@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_more_rows_than_a_block_of_the_prior_sum(case: Case, groups: int, width: int) -> None:
    inputs = make_inputs(70, width, groups=groups, permuted=True)
    assert_as_good_as_torch(inputs, run_op(inputs, case.backend), op_noise(inputs, case.backend))


def misaligned(tensor: Tensor) -> Tensor:
    """The same tensor, one element into its storage."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


@pytest.mark.parametrize("shifted", ["hidden", "posterior", "grad_out", "prior"])
@pytest.mark.parametrize(("hidden_dtype", "posterior_dtype"), list(product(FLOATS, FLOATS)), ids=str)
def test_both_access_widths_have_the_same_bits(
    case: Case, hidden_dtype: torch.dtype, posterior_dtype: torch.dtype, shifted: str
) -> None:
    """Among others where the second tile of a row is a part of a tile."""
    inputs = make_inputs(5, 1048, groups=2, permuted=True, hidden_dtype=hidden_dtype, posterior_dtype=posterior_dtype)
    wide = run_op(inputs, case.backend)
    narrow = run_op(replace(inputs, **{shifted: misaligned(getattr(inputs, shifted))}), case.backend)
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)


@pytest.mark.parametrize("padding", [0, 8, 3])
def test_strides_of_two_levels(case: Case, padding: int) -> None:
    """Slices of a batch of sequences, with gradients that are slices too: in both access widths, without a copy."""

    def sliced(columns: int, generator: torch.Generator) -> Tensor:
        return torch.randn(3, 9, columns + padding, generator=generator)[:, 2:7, :columns]

    def gradients(*tensors: Tensor) -> list[Tensor]:
        h, q, grad_out = tensors
        h, q = h.detach().requires_grad_(), q.detach().requires_grad_()
        out, kl = fused_ib(h, q, 0.4, seed=3, backend=case.backend)
        torch.autograd.backward([out, kl], [grad_out, torch.ones_like(kl)])
        return [out, kl, h.grad, q.grad]

    generator = torch.Generator().manual_seed(0)
    views = [sliced(columns, generator) for columns in (24, 48, 24)]
    assert not any(view.is_contiguous() for view in views)
    copies = [view.contiguous() for view in views]
    assert all(torch.equal(a, b) for a, b in zip(gradients(*views), gradients(*copies), strict=True))


def test_garbage_in_the_offsets_reaches_the_prior_only(case: Case) -> None:
    inputs = make_inputs(70, 16, groups=4)
    problem = Problem(inputs.posterior, torch.tensor(0.3), inputs.prior, None, inputs.offsets, torch.tensor([1]), None)
    garbage = problem._replace(offsets=torch.tensor([-9, 2**31 - 1, 5, -(2**31)], dtype=torch.int32))
    for call in (native.forward, lambda *args: native.backward(*args, inputs.grad_kl, True)):
        right, wrong = call(problem, inputs.hidden), call(garbage, inputs.hidden)
        assert torch.equal(right[0], wrong[0])
        assert not any(result.isnan().any() for result in wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_and_rounded_as_torch_does(case: Case, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 4096)
    zeros = torch.zeros(len(every), 2 * 4096)
    out, _ = fused_ib(every, zeros, 0.0, seed=1, backend=case.backend)
    assert torch.equal(out.nan_to_num(1.5), every.nan_to_num(1.5))

    finite = every[every.isfinite()].float().sort().values
    ties = (finite + finite.roll(1)) / 2
    values = torch.cat([finite, *(ties.nextafter(ties + side) for side in (-torch.inf, 0, torch.inf))])
    values = torch.cat((values, values.new_tensor([65519.99, 65520, 1e38, 3.4e38, torch.inf, -torch.inf, torch.nan])))
    values = torch.cat((values, values.new_zeros(-len(values) % 4096))).view(-1, 4096)
    posterior = torch.zeros(len(values), 2 * 4096, dtype=dtype).requires_grad_()
    out, _ = fused_ib(torch.zeros_like(values), posterior, 1.0, seed=1, backend=case.backend)
    out.backward(values)
    rounded = posterior.grad[:, :4096]
    assert torch.equal(rounded.nan_to_num(1.5), values.to(dtype).nan_to_num(1.5))


def test_exponential(case: Case) -> None:
    x = torch.linspace(-87.3, 88.7, 1 << 16)
    y = torch.empty(x.shape)
    native.library().exponentials(native.target(x.device), x.data_ptr(), y.data_ptr(), x.numel())
    truth = x.double().exp()
    assert ((y - truth).abs() / truth).max() <= 3 * 2.0**-23


def test_refused_launches_raise(cuda_on_host: ModuleType) -> None:
    assert cuda_on_host.why_cuda_unavailable() == ""
    assert cuda_on_host.why_cuda_unavailable(7) == "no CUDA device 7"
    eps, words = torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    cuda_on_host.normals(cuda_on_host.Target(1, 0, 1), words.data_ptr(), eps.data_ptr(), 1)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        cuda_on_host.normals(cuda_on_host.Target(7, 0, 1), words.data_ptr(), eps.data_ptr(), 1)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("SHIM_DRIVER", "12040", "the driver supports CUDA up to 12.4 only"),
        ("SHIM_DRIVER", "0", "no CUDA driver on this machine"),
        ("SHIM_ARCHITECTURE", "75", "host is sm_75"),
    ],
)
def test_what_a_machine_lacks_is_named(
    cuda_on_host: ModuleType, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, reason: str
) -> None:
    built = SimpleNamespace(
        cuda_architectures="sm_80, sm_90, sm_100 and PTX of sm_100",
        cuda_version="13.0",
        why_cuda_unavailable=cuda_on_host.why_cuda_unavailable,
    )
    monkeypatch.setattr(native, "_native", built)
    monkeypatch.setattr(cuda, "_served", set())
    assert cuda.why_unavailable(None) is None
    monkeypatch.setenv(setting, value)
    cuda._served.clear()  # a device that works is not asked again
    message = f"built for sm_80, sm_90, sm_100 and PTX of sm_100 with CUDA 13.0, but: {reason}"
    assert cuda.why_unavailable(None) == message
    monkeypatch.delenv(setting)
    assert cuda.why_unavailable(torch.device("cuda", 1)) is None  # the failed question left no error behind


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([driver, *arguments], capture_output=True, text=True, timeout=300)


def test_row_index_out_of_range_stops(driver: Callable[..., Path]) -> None:
    result = run(driver(), "rows")
    assert result.returncode == -signal.SIGABRT
    assert "rows[i] in [0, tokens)" in result.stderr


@pytest.mark.parametrize(
    "sanitizer",
    ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("address,undefined", "thread"))],
    ids=lambda name: name or "none",
)
def test_sanitizers_find_nothing(driver: Callable[..., Path], sanitizer: str) -> None:
    result = run(driver(sanitizer), *(["float32"] if sanitizer == "thread" else []))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_address_sanitizer_finds_a_write_to_the_next_row(driver: Callable[..., Path]) -> None:
    mistake = ("csrc/cuda/backward.cu", "grad_posterior) + i *", "grad_posterior) + (i + 1) *")
    result = run(driver("address,undefined", mistake), "float32")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.parametrize("sanitizer", ["", "thread"], ids=["none", "thread"])
def test_barriers(driver: Callable[..., Path], sanitizer: str) -> None:
    result = run(driver(sanitizer, sources=["block_sum.cu"]))
    assert (result.returncode, result.stderr) == (0, "")


def test_thread_sanitizer_finds_a_missing_barrier(driver: Callable[..., Path]) -> None:
    result = run(driver("thread", ("block_sum.cu", "__syncthreads();", ""), sources=["block_sum.cu"]))
    assert result.returncode != 0
    assert "data race" in result.stderr


def test_conversions_are_the_toolkits(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    program = tmp_path / "conversions"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O2", f"-I{CSRC}", f"-I{SHIM}", SHIM / "conversions.cpp", "-o", program], check=True
    )
    subprocess.run([program], check=True)
