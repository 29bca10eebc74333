"""Every backend against an independent fp64 reference: results, gradients, layouts, special values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import FLOATS, RESULTS, Case, assert_as_good_as_torch, make_inputs, op_noise, run_op, ulps_apart

from vittle_kernels import fused_ib


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize(("tokens", "width"), [(7, 1), (7, 3), (1, 5), (7, 63), (40, 64), (7, 1000), (3, 4096)])
def test_results_and_gradients(case: Case, tokens: int, width: int, groups: int) -> None:
    inputs = make_inputs(tokens, width, device=case.device, groups=groups, permuted=tokens > 1)
    assert_as_good_as_torch(inputs, run_op(inputs, case.backend), op_noise(inputs, case.backend))


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_no_rows(case: Case, groups: int) -> None:
    results = run_op(make_inputs(0, 16, device=case.device, groups=groups), case.backend)
    for name in set(results) - {"grad_prior"}:
        assert results[name].shape[0] == 0
    if groups:
        assert not results["grad_prior"].any()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha(case: Case, alpha: float) -> None:
    inputs = make_inputs(5, 40, device=case.device, alpha=alpha)
    results = run_op(inputs, case.backend)
    assert_as_good_as_torch(inputs, results, op_noise(inputs, case.backend))
    if alpha == 0:
        assert torch.equal(results["out"], inputs.hidden)
    as_tensor, _ = fused_ib(
        inputs.hidden,
        inputs.posterior,
        torch.tensor(alpha, device=case.device),
        backend=case.backend,
        **inputs.options,
    )
    assert torch.equal(as_tensor, results["out"])


@pytest.mark.parametrize("posterior_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden_dtype", FLOATS, ids=str)
def test_half_precision_is_the_rounded_fp32_result(
    case: Case, hidden_dtype: torch.dtype, posterior_dtype: torch.dtype
) -> None:
    inputs = make_inputs(
        6,
        72,
        device=case.device,
        hidden_dtype=hidden_dtype,
        posterior_dtype=posterior_dtype,
        groups=2,
        permuted=True,
    )
    results, exact = run_op(inputs, case.backend), run_op(inputs.to(torch.float32), case.backend)
    expected = {"out": hidden_dtype, "grad_hidden": hidden_dtype, "grad_posterior": posterior_dtype}
    for name in RESULTS:
        dtype = expected.get(name, torch.float32)
        assert results[name].dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(results[name], exact[name], rtol=1e-6, atol=1e-6)
        else:
            assert ulps_apart(results[name], exact[name].to(dtype)) <= 1


def test_every_group_may_be_empty(case: Case) -> None:
    inputs = make_inputs(70, 24, device=case.device, groups=4, permuted=True)
    offsets = torch.tensor([0, 33, 33, 70], dtype=torch.int32, device=case.device)
    inputs = replace(inputs, offsets=offsets)
    results = run_op(inputs, case.backend)
    assert_as_good_as_torch(inputs, results, op_noise(inputs, case.backend))
    assert not results["grad_prior"][[0, 2]].any()


def test_views_are_read_in_place(case: Case) -> None:
    """Halves of a chunk, slices of the sequence, a transposed batch, a misaligned start, an expanded gradient."""
    wide = torch.randn(3, 10, 2 * 36 + 3, device=case.device)
    posterior = torch.randn(3, 10, 4 * 36 + 5, device=case.device)
    for cut in (
        lambda t, d: t[..., :d],
        lambda t, d: t[:, 2:9, 1 : 1 + d],
        lambda t, d: t[1:, ::2, 3 : 3 + d],
        lambda t, d: t.transpose(0, 1)[2:, :, :d],
        lambda t, d: t[1, :, :d],
    ):
        h, q = cut(wide, 36), cut(posterior, 72)
        assert not h.is_contiguous()
        views = fused_ib(h, q, 0.4, seed=3, backend=case.backend)
        copies = fused_ib(h.contiguous(), q.contiguous(), 0.4, seed=3, backend=case.backend)
        assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))

        h, q = h.detach().requires_grad_(), q.detach().requires_grad_()
        out, kl = fused_ib(h, q, 0.4, seed=3, backend=case.backend)
        (out.sum() + kl.sum()).backward()
        assert torch.allclose(h.grad, torch.full_like(h, 0.6))


def test_row_strides_need_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    wide, posterior = torch.randn(3, 10, 64), torch.randn(3, 10, 256)
    for h, q in ((wide[..., :32], posterior[..., :64]), (wide[:, 2:7, 32:], posterior[:, 2:7, 64:128])):
        fused_ib(h, q, 0.4, seed=3, backend="cpu")


def test_bound_and_its_straight_through_gradient(case: Case) -> None:
    inputs = make_inputs(4, 32, device=case.device, groups=1)
    posterior = inputs.posterior.clone()
    posterior[:, 32:] *= 2
    for bound in (None, 0.7, 2.302585):
        bounded = replace(inputs, posterior=posterior, logvar_bound=bound)
        assert_as_good_as_torch(bounded, run_op(bounded, case.backend), op_noise(bounded, case.backend))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["hidden", "mean", "logvar", "prior_mean", "prior_logvar", "grad_out", "grad_kl"])
def test_special_values_spread_as_in_the_reference(case: Case, where: str, value: float) -> None:
    inputs = make_inputs(3, 20, device=case.device, groups=1)
    half = 20 if "logvar" in where else 0
    target = {"mean": "posterior", "logvar": "posterior", "prior_mean": "prior", "prior_logvar": "prior"}.get(
        where, where
    )
    tensor = getattr(inputs, target).clone()
    tensor[(1, half + 7) if tensor.dim() == 2 else (1 if where == "grad_kl" else half + 7)] = value
    inputs = replace(inputs, **{target: tensor})
    results, expected = run_op(inputs, case.backend), run_op(inputs, "eager")
    for name, truth in expected.items():
        assert torch.equal(results[name].isnan(), truth.isnan()), name
        assert torch.equal(results[name].isinf(), truth.isinf()), name
    if torch.isnan(torch.tensor(value)) and where in ("mean", "logvar"):
        assert results["out"][1, 7].isnan() and results["kl"][1].isnan()
        assert results["grad_posterior"][1].isnan().any() and not results["kl"][[0, 2]].isnan().any()


def test_nan_alpha_spreads(case: Case) -> None:
    inputs = make_inputs(3, 20, device=case.device)
    alpha = torch.tensor(torch.nan, device=case.device)
    out, kl = fused_ib(inputs.hidden, inputs.posterior, alpha, seed=1, backend=case.backend)
    assert out.isnan().all() and not kl.isnan().any()


def test_pure_and_seeded(case: Case) -> None:
    inputs = make_inputs(9, 200, device=case.device, groups=2, permuted=True)
    first, second = run_op(inputs, case.backend), run_op(inputs, case.backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run_op(replace(inputs, seed=inputs.seed + 1), case.backend)
    assert not torch.equal(first["out"], other["out"]) and torch.equal(first["kl"], other["kl"])


def test_seed_forms_agree(case: Case) -> None:
    inputs = make_inputs(2, 16, device=case.device)

    def out(seed: int | torch.Tensor | None) -> torch.Tensor:
        return fused_ib(inputs.hidden, inputs.posterior, 0.5, seed=seed, backend=case.backend)[0]

    assert torch.equal(out(2**64 - 5), out(-5))
    assert torch.equal(out(-5), out(torch.tensor([-5], device=case.device)))
    assert not torch.equal(out(5), out(5 + 2**32))
    torch.manual_seed(0)
    first, second = out(None), out(None)
    torch.manual_seed(0)
    assert torch.equal(first, out(None)) and not torch.equal(first, second)


def test_prior_gradient_has_the_same_bits_for_any_number_of_threads() -> None:
    inputs = make_inputs(300, 130, groups=3, permuted=True)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run_op(inputs, "cpu"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


def test_offsets_past_2_to_31() -> None:
    """Rows that lie more than 2^31 elements apart; the memory between them is never touched."""
    stride = 2**31 + 64
    storage = torch.UntypedStorage(4 * (stride + 64))
    far = torch.empty(0).set_(storage, 0, (2, 8), (stride, 1))  # type: ignore[call-overload]
    near = torch.randn(2, 8)
    far.copy_(near)
    posterior = torch.randn(2, 16)
    a = fused_ib(far, posterior, 0.5, seed=1, backend="cpu")
    b = fused_ib(near, posterior, 0.5, seed=1, backend="cpu")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_prior_gets_its_own_dtype(case: Case) -> None:
    inputs = make_inputs(5, 16, device=case.device, groups=1)
    prior = inputs.prior.to(torch.bfloat16).requires_grad_()
    _, kl = fused_ib(inputs.hidden, inputs.posterior, 0.5, prior=prior, seed=1, backend=case.backend)
    kl.sum().backward()
    assert prior.grad.dtype == torch.bfloat16


def test_hidden_that_needs_no_gradient_gets_none(case: Case) -> None:
    inputs = make_inputs(5, 16, device=case.device)
    posterior = inputs.posterior.requires_grad_()
    out, kl = fused_ib(inputs.hidden, posterior, inputs.alpha, backend=case.backend, **inputs.options)
    torch.autograd.backward([out, kl], [inputs.grad_out, inputs.grad_kl])
    assert torch.equal(posterior.grad, run_op(inputs, case.backend)["grad_posterior"])
