"""The op inside autograd, torch.compile and activation checkpointing; what it keeps; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support import Case, make_inputs, run_op
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vittle_kernels import FusedIBFunction, available_backends, fused_ib


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_gradcheck(groups: int) -> None:
    inputs = make_inputs(5, 4, groups=groups, permuted=True).to(torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.posterior, inputs.prior) if t is not None]
    leaves[1].data.clamp_(-2, 2)  # inside the bound, whose gradient is straight through by design

    def op(hidden: torch.Tensor, posterior: torch.Tensor, prior: torch.Tensor | None = None) -> Any:
        return FusedIBFunction.apply(
            hidden, posterior, torch.tensor(0.25), prior, inputs.rows, inputs.offsets,
            torch.tensor([7]), inputs.logvar_bound, "eager",
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("groups", [0, 2])
def test_opcheck(case: Case, groups: int) -> None:
    inputs = make_inputs(6, 24, device=case.device, groups=groups, permuted=True)
    problem = (
        inputs.posterior, torch.tensor(0.25, device=case.device), inputs.prior, inputs.rows, inputs.offsets,
        torch.tensor([7], device=case.device), inputs.logvar_bound, case.backend,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.vittle_kernels.fused_ib_forward.default, (inputs.hidden, *problem), test_utils=tests
    )
    for need_hidden in (True, False):
        arguments = (inputs.grad_out, inputs.grad_kl, need_hidden, *problem)
        torch.library.opcheck(torch.ops.vittle_kernels.fused_ib_backward.default, arguments, test_utils=tests)


def test_compiles_whole_and_follows_a_moving_alpha(case: Case) -> None:
    inputs = make_inputs(6, 24, device=case.device, groups=2)
    compilations = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=compilations)
    def step(hidden: torch.Tensor, posterior: torch.Tensor, alpha: torch.Tensor, seed: torch.Tensor) -> Any:
        out, kl = fused_ib(
            hidden,
            posterior,
            alpha,
            prior=inputs.prior,
            offsets=inputs.offsets,
            seed=seed,
            backend=case.backend,
        )
        return out.square().sum() + kl.sum()

    seed = torch.tensor([5], device=case.device)
    for value in (0.1, 0.2, 0.7):
        alpha = torch.tensor(value, device=case.device)
        posterior = inputs.posterior.clone().requires_grad_()
        loss = step(inputs.hidden, posterior, alpha, seed)
        loss.backward()
        expected = inputs.posterior.clone().requires_grad_()
        out, kl = fused_ib(
            inputs.hidden,
            expected,
            value,
            prior=inputs.prior,
            offsets=inputs.offsets,
            seed=5,
            backend=case.backend,
        )
        (out.square().sum() + kl.sum()).backward()
        assert torch.equal(posterior.grad, expected.grad)
    assert compilations.frame_count == 1


def test_compiles_with_a_drawn_seed() -> None:
    inputs = make_inputs(6, 24)
    torch._dynamo.reset()
    step = torch.compile(lambda h, q: fused_ib(h, q, 0.5)[0], fullgraph=True)
    assert not torch.equal(step(inputs.hidden, inputs.posterior), step(inputs.hidden, inputs.posterior))


@pytest.mark.parametrize(("seed", "preserve"), [(None, True), (3, True), (3, False)])
def test_recomputation_sees_the_same_noise(case: Case, seed: int | None, preserve: bool) -> None:
    inputs = make_inputs(6, 24, device=case.device)

    def loss(posterior: torch.Tensor) -> torch.Tensor:
        out, kl = fused_ib(inputs.hidden, posterior, 0.5, seed=seed, backend=case.backend)
        return out.square().sum() + kl.sum()

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        posterior = inputs.posterior.clone().requires_grad_()
        if recompute:
            checkpoint(loss, posterior, use_reentrant=False, preserve_rng_state=preserve).backward()
        else:
            loss(posterior).backward()
        gradients.append(posterior.grad)
    assert torch.equal(*gradients)


def test_backward_keeps_the_posterior_and_a_constant(case: Case) -> None:
    inputs = make_inputs(64, 128, device=case.device)
    hidden, posterior = inputs.hidden.requires_grad_(), inputs.posterior.requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, kl = fused_ib(hidden, posterior, 0.5, backend=case.backend)
    total = sum(kept.values())
    assert total - posterior.numel() * posterior.element_size() == 4 + 8  # alpha and the seed
    (out.sum() + kl.sum()).backward()


def test_the_input_is_never_overwritten(case: Case) -> None:
    inputs = make_inputs(6, 24, device=case.device, groups=1)
    before = [t.clone() for t in (inputs.hidden, inputs.posterior, inputs.prior, inputs.grad_out, inputs.grad_kl)]
    run_op(inputs, case.backend)
    after = (inputs.hidden, inputs.posterior, inputs.prior, inputs.grad_out, inputs.grad_kl)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


H, Q = torch.zeros(4, 8), torch.zeros(4, 16)
PRIORS, ENDS = torch.zeros(2, 16), torch.tensor([1, 4], dtype=torch.int32)
VALID: dict[str, Any] = {"hidden": H, "posterior": Q, "alpha": 0.5}
BAD_CALLS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "hidden is int64 (4, 8) on cpu; must be a float32, bfloat16 or float16 tensor", {"hidden": H.long()}),
    (TypeError, "posterior is list; must be a float32", {"posterior": [1]}),
    (ValueError, "hidden is float32 (4, 0) on cpu; must be (..., D) with D >= 1", {"hidden": H[:, :0]}),
    (ValueError, "posterior is float32 (4, 8) on cpu; must be (4, 16)", {"posterior": H}),
    (ValueError, "posterior is float32 (8, 8) on cpu; must be (4, 16)", {"posterior": Q.view(8, 8)}),
    (ValueError, "posterior is on meta; must be on hidden's device, cpu", {"posterior": Q.to("meta")}),
    (ValueError, "alpha is 1.5; must be in [0, 1]", {"alpha": 1.5}),
    (ValueError, "alpha is nan; must be in [0, 1]", {"alpha": float("nan")}),
    (TypeError, "alpha is float64 () on cpu; must be a float, or a 0-d", {"alpha": torch.tensor(0.5).double()}),
    (TypeError, "alpha is str; must be a float", {"alpha": "0.5"}),
    (TypeError, "seed is float; must be None, an int, or an int64 tensor of 1 element", {"seed": 1.0}),
    (TypeError, "seed is float32 (1,) on cpu; must be None", {"seed": torch.zeros(1)}),
    (ValueError, f"seed is {2**64}; must be in [-2^63, 2^64)", {"seed": 2**64}),
    (TypeError, "rows is int32 (4,) on cpu; must be an int64 tensor", {"rows": torch.arange(4).int()}),
    (ValueError, "rows is int64 (3,) on cpu; must be (4,)", {"rows": torch.arange(3)}),
    (ValueError, "rows has an entry 4; must be in [0, 4)", {"rows": torch.arange(1, 5)}),
    (ValueError, "rows has an entry -1; must be in [0, 4)", {"rows": torch.arange(-1, 3)}),
    (ValueError, "rows names token 1 more than once; must be a", {"rows": torch.tensor([0, 1, 1, 3])}),
    (TypeError, "prior is int64 (16,) on cpu; must be a floating-point tensor", {"prior": Q[0].long()}),
    (ValueError, "prior is float32 (15,) on cpu; must be (2 D,) = (16,) or (G, 16)", {"prior": Q[0, :15]}),
    (ValueError, "offsets is None; must say where each of the 2 groups", {"prior": PRIORS}),
    (TypeError, "offsets is int64 (2,) on cpu; must be an int32", {"prior": PRIORS, "offsets": ENDS.long()}),
    (ValueError, "offsets is int32 (1,) on cpu; must be (2,)", {"prior": PRIORS, "offsets": ENDS[1:]}),
    (ValueError, "offsets is [4, 1]; must not decrease", {"prior": PRIORS, "offsets": ENDS.flip(0)}),
    (ValueError, "offsets is [0, 3]; must not decrease and must end at the", {"prior": PRIORS, "offsets": ENDS - 1}),
    (ValueError, "logvar_bound is -1; must be positive", {"logvar_bound": -1}),
    (ValueError, "backend is 'gpu'; must be one of 'auto', 'eager', 'cpu', 'triton', 'cuda'", {"backend": "gpu"}),
    (ValueError, "float64 needs backend 'eager' or 'auto'; backend is 'cpu'", {"hidden": H.double(), "backend": "cpu"}),
    (RuntimeError, "backend 'cuda' cannot serve tensors on cpu: it runs on CUDA tensors only", {"backend": "cuda"}),
]


@pytest.mark.parametrize(("kind", "message", "change"), BAD_CALLS, ids=[message[:40] for _, message, _ in BAD_CALLS])
def test_bad_calls(kind: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(kind) as raised:
        fused_ib(**VALID | change)
    text = str(raised.value)
    assert text.startswith(message) and "\n" not in text


def test_available_backends_says_why_not() -> None:
    reasons = available_backends()
    assert list(reasons) == ["eager", "cpu", "triton", "cuda"]
    assert reasons["eager"] is None
    assert all(reason is None or (reason and "\n" not in reason) for reason in reasons.values())


def test_out_of_memory_leaves_everything_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call is what it would have been."""
    if available_backends()["cpu"]:
        pytest.skip("the C++ library is not built")
    inputs = make_inputs(6, 40)
    hidden, posterior = inputs.hidden.requires_grad_(), inputs.posterior.detach().requires_grad_()
    expected = fused_ib(hidden, posterior, 0.5, seed=1, backend="cpu")
    empty = torch.empty
    for allocation in range(4):  # of out, kl, grad_hidden and grad_posterior
        left = [allocation]

        def exhausted(*args: Any, left: list[int] = left, **kwargs: Any) -> Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("out of memory")
            return empty(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", exhausted)
            with pytest.raises(torch.OutOfMemoryError):
                out, kl = fused_ib(hidden, posterior, 0.5, seed=1, backend="cpu")
                (out.sum() + kl.sum()).backward()
        assert hidden.grad is posterior.grad is None
        found = fused_ib(hidden, posterior, 0.5, seed=1, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
