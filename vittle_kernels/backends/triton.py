"""The Triton kernels, on CUDA tensors; with ``TRITON_INTERPRET=1`` set before import, on CPU tensors too.

They read like ``csrc``: ``element.h`` has the formulas, ``philox.h`` the noise.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from vittle_kernels.backends.problem import Problem, RowLayout, prior_rows, row_layout

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError as error:
    triton = None
    _import_error = str(error)

ROWS_PER_BLOCK = 32
"""The prior's gradient sums fixed blocks of rows, then a group's blocks in their order: the same bits on any grid."""

_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


def why_unavailable(device: torch.device | None) -> str | None:
    """None where the Triton kernels can serve tensors on the device (None: on some device of this machine)."""
    if triton is None:
        return f"triton is not installed ({_import_error}): pip install triton"
    if not isinstance(_forward_kernel, triton.runtime.JITFunction):
        return None
    if device is not None and device.type != "cuda":
        return "it runs on CUDA tensors only (TRITON_INTERPRET=1 lets it run on CPU tensors)"
    return None if torch.cuda.is_available() else "no CUDA device (TRITON_INTERPRET=1 lets it run on CPU tensors)"


if triton is not None:
    # The compiler's own log2 and exp cost more; the interpreter and ROCm know these only.
    _APPROXIMATE: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)

    @triton.jit
    def _log2(x):
        return libdevice.fast_log2f(x) if _APPROXIMATE else tl.log2(x)

    @triton.jit
    def _exp(x):
        return libdevice.fast_expf(x) if _APPROXIMATE else tl.exp(x)

    @triton.jit
    def _spread(s, HALF: tl.constexpr):
        """Standard deviation and variance; the square's rounding shows where the posterior is in fp32 only."""
        sigma = _exp(0.5 * s)
        return sigma, sigma * sigma if HALF else _exp(s)

    @triton.jit
    def _row_offset(row, inner, outer_stride, inner_stride, ONE_LEVEL: tl.constexpr):
        if ONE_LEVEL:
            return row * inner_stride
        return (row // inner) * outer_stride + (row % inner) * inner_stride

    @triton.jit
    def _normals_of_words(radius_word, angle_word):
        """Box-Muller: u = (word + 1/2) 2^-32; the angle by quadrants and polynomials, its error below 1.5e-7."""
        u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        radius = tl.sqrt(-1.3862943611198906 * tl.minimum(_log2(u), 0.0))
        quadrant = (angle_word + 0x20000000) >> 30
        rest = (angle_word - (quadrant << 30)).to(tl.int32, bitcast=True)
        t = rest.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        t2 = t * t
        sine = t * (((-75.2400665 * t2 + 81.5881271) * t2 - 41.3416290) * t2 + 6.28318501)
        cosine = (((59.2204323 * t2 - 85.4428558) * t2 + 64.9393158) * t2 - 19.7392082) * t2 + 1.0
        swapped = (quadrant & 1) != 0
        x = tl.where(swapped, sine, cosine) * radius
        y = tl.where(swapped, cosine, sine) * radius
        return tl.where(((quadrant + 1) & 2) != 0, -x, x), tl.where((quadrant & 2) != 0, -y, y)

    @triton.jit
    def _normals(seed, row, column, BLOCK: tl.constexpr):
        """The noise of columns [column, column + BLOCK) of a row; column is a multiple of 4."""
        quad = ((column // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        row_low = tl.zeros_like(quad) + row.to(tl.uint32)
        row_high = tl.zeros_like(quad) + (row >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, quad, row_low, row_high, tl.zeros_like(quad), n_rounds=10)
        e0, e1 = _normals_of_words(w0, w1)
        e2, e3 = _normals_of_words(w2, w3)
        return tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), [BLOCK])

    @triton.jit
    def _clamp(x, bound):
        return tl.clamp(x, -bound, bound, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _group_rows(offsets, group, groups, tokens, ROWS: tl.constexpr):
        """Posterior rows [begin, end) of a group and its blocks [first, last)."""
        begin = tokens * 0
        end = tokens * 0
        first = tokens * 0
        last = tokens * 0
        for g in range(0, group + 1):
            begin = end
            first = last
            if g + 1 < groups:
                end = tl.minimum(tl.maximum(tl.load(offsets + g).to(tl.int64), begin), tokens)
            else:
                end = tokens
            last += (end - begin + ROWS - 1) // ROWS
        return begin, end, first, last

    # A count that happens to be 1 stays an argument: the JIT would compile anew for it, as a constant without a type.
    @triton.jit(do_not_specialize=["groups"])
    def _forward_kernel(
        hidden, hidden_inner, hidden_outer_stride, hidden_inner_stride,
        posterior, posterior_inner, posterior_outer_stride, posterior_inner_stride,
        out, kl, alpha, seed, rows, prior, offsets, groups, width, bound,
        ONE_LEVEL: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_PRIOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program, one posterior row."""
        half: tl.constexpr = posterior.dtype.element_ty != tl.float32
        i = tl.program_id(0).to(tl.int64)
        token = tl.load(rows + i) if HAS_ROWS else i
        alpha = tl.load(alpha)
        seed = tl.load(seed)
        hidden += _row_offset(token, hidden_inner, hidden_outer_stride, hidden_inner_stride, ONE_LEVEL)
        posterior += _row_offset(i, posterior_inner, posterior_outer_stride, posterior_inner_stride, ONE_LEVEL)
        out += token * width
        if HAS_PRIOR:
            group = i * 0
            for g in range(0, groups - 1):
                group += (i >= tl.load(offsets + g)).to(tl.int64)
            prior += group * 2 * width

        row_twice_kl = tl.zeros([BLOCK], tl.float32)
        for column in range(0, width, BLOCK):
            c = column + tl.arange(0, BLOCK)
            mask = c < width
            h = tl.load(hidden + c, mask=mask, other=0.0).to(tl.float32)
            mu = tl.load(posterior + c, mask=mask, other=0.0).to(tl.float32)
            s = _clamp(tl.load(posterior + width + c, mask=mask, other=0.0).to(tl.float32), bound)
            eps = _normals(seed, token, column, BLOCK)
            sigma, variance = _spread(s, half)
            z = mu + sigma * eps
            tl.store(out + c, ((1.0 - alpha) * h + alpha * z).to(out.dtype.element_ty), mask=mask)
            if HAS_PRIOR:
                m = tl.load(prior + c, mask=mask, other=0.0)
                v = tl.load(prior + width + c, mask=mask, other=0.0)
                twice_kl = v - s + (variance + (mu - m) * (mu - m)) * _exp(-v) - 1.0
            else:
                twice_kl = variance - s + mu * mu - 1.0
            row_twice_kl += tl.where(mask, twice_kl, 0.0)
        tl.store(kl + token, 0.5 * tl.sum(row_twice_kl, 0) / width)

    @triton.jit(do_not_specialize=["groups", "tokens"])
    def _backward_kernel(
        grad_out, grad_inner, grad_outer_stride, grad_inner_stride,
        posterior, posterior_inner, posterior_outer_stride, posterior_inner_stride,
        grad_kl, grad_hidden, grad_posterior, partials,
        alpha, seed, rows, prior, offsets, groups, tokens, width, bound,
        NEED_HIDDEN: tl.constexpr, ONE_LEVEL: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_PRIOR: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """One program, one tile of columns of one block of posterior rows."""
        half: tl.constexpr = posterior.dtype.element_ty != tl.float32
        block = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK
        c = column + tl.arange(0, BLOCK)
        mask = c < width
        alpha = tl.load(alpha)
        seed = tl.load(seed)
        tokens = tokens.to(tl.int64)
        begin = tl.minimum(block * ROWS, tokens)
        end = tl.minimum(begin + ROWS, tokens)
        if HAS_PRIOR:
            group = block * 0
            begin = tokens
            end = tokens
            for candidate in range(0, groups):
                rows_begin, rows_end, first, last = _group_rows(offsets, candidate, groups, tokens, ROWS)
                if (block >= first) & (block < last):
                    group = block * 0 + candidate
                    begin = rows_begin + (block - first) * ROWS
                    end = tl.minimum(begin + ROWS, rows_end)
            m = tl.load(prior + group * 2 * width + c, mask=mask, other=0.0)
            v = tl.load(prior + group * 2 * width + width + c, mask=mask, other=0.0)
            precision = _exp(-v)
            dm = tl.zeros([BLOCK], tl.float32)
            dv = tl.zeros([BLOCK], tl.float32)

        for row in range(begin, end):
            i = block * 0 + row  # int64 in the interpreter too
            token = tl.load(rows + i) if HAS_ROWS else i
            k = tl.load(grad_kl + token) / width
            g_row = grad_out + _row_offset(token, grad_inner, grad_outer_stride, grad_inner_stride, ONE_LEVEL)
            q_row = posterior + _row_offset(
                i, posterior_inner, posterior_outer_stride, posterior_inner_stride, ONE_LEVEL
            )
            g = tl.load(g_row + c, mask=mask, other=0.0).to(tl.float32)
            mu = tl.load(q_row + c, mask=mask, other=0.0).to(tl.float32)
            s = _clamp(tl.load(q_row + width + c, mask=mask, other=0.0).to(tl.float32), bound)
            sigma, variance = _spread(s, half)
            dz = alpha * g
            ds = (0.5 * alpha) * g * (_normals(seed, token, column, BLOCK) * sigma)
            if HAS_PRIOR:
                shift = (mu - m) * precision
                ratio = variance * precision
                dmu = dz + k * shift
                ds += (0.5 * k) * (ratio - 1.0)
                dm -= k * shift
                dv += 0.5 * k * (1.0 - ratio - shift * (mu - m))
            else:
                dmu = dz + k * mu
                ds += (0.5 * k) * (variance - 1.0)
            if NEED_HIDDEN:
                dh = (1.0 - alpha) * g
                tl.store(grad_hidden + token * width + c, dh.to(grad_hidden.dtype.element_ty), mask=mask)
            dq_row = grad_posterior + i * 2 * width
            tl.store(dq_row + c, dmu.to(grad_posterior.dtype.element_ty), mask=mask)
            tl.store(dq_row + width + c, ds.to(grad_posterior.dtype.element_ty), mask=mask)
        if HAS_PRIOR:
            tl.store(partials + block * 2 * width + c, dm, mask=mask)
            tl.store(partials + block * 2 * width + width + c, dv, mask=mask)

    @triton.jit(do_not_specialize=["groups", "tokens"])
    def _sum_partials_kernel(
        partials, grad_prior, offsets, groups, tokens, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr
    ):
        """One program, one tile of the prior's columns of one group."""
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = c < columns
        group = tl.program_id(1)
        _, _, first, last = _group_rows(offsets, group, groups, tokens.to(tl.int64), ROWS)
        total = tl.zeros([BLOCK], tl.float32)
        for block in range(first, last, ROWS):
            b = block + tl.arange(0, ROWS)
            tile = partials + b[:, None] * columns + c[None, :]
            total += tl.sum(tl.load(tile, mask=(b < last)[:, None] & mask[None, :], other=0.0), 0)
        tl.store(grad_prior + group.to(tl.int64) * columns + c, total, mask=mask)


def forward(problem: Problem, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``out`` like ``hidden`` and ``kl`` (...) in fp32, both in token order."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    kl = torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device)
    if problem.tokens > 0:
        prior = prior_rows(problem.prior)
        hidden_rows, posterior_rows = row_layout(hidden), row_layout(problem.posterior)
        with _device(hidden):
            _forward_kernel[(problem.tokens,)](
                *hidden_rows, *posterior_rows, out, kl, problem.alpha, problem.seed,
                problem.rows, prior, _offsets(problem), problem.groups, problem.width, _bound(problem),
                ONE_LEVEL=_one_level(problem, hidden_rows, posterior_rows),
                HAS_ROWS=problem.rows is not None, HAS_PRIOR=prior is not None, BLOCK=_block(problem.width),
                **_LAUNCH,
            )  # fmt: skip
    return out, kl


def backward(
    problem: Problem, grad_out: Tensor, grad_kl: Tensor, need_hidden: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Returns the gradients of hidden (None unless needed), posterior and prior (None without one)."""
    device, posterior, width = grad_out.device, problem.posterior, problem.width
    grad_hidden = torch.empty(grad_out.shape, dtype=grad_out.dtype, device=device) if need_hidden else None
    grad_posterior = torch.empty(posterior.shape, dtype=posterior.dtype, device=device)
    prior = prior_rows(problem.prior)
    blocks, block = problem.tokens // ROWS_PER_BLOCK + problem.groups, _block(width)
    partials = None if prior is None else torch.empty((blocks, 2 * width), dtype=torch.float32, device=device)
    grad_rows, posterior_rows = row_layout(grad_out), row_layout(posterior)
    with _device(grad_out):
        _backward_kernel[(blocks, triton.cdiv(width, block))](
            *grad_rows, *posterior_rows,
            grad_kl.to(torch.float32).contiguous(), grad_hidden, grad_posterior, partials,
            problem.alpha, problem.seed, problem.rows, prior, _offsets(problem), problem.groups,
            problem.tokens, width, _bound(problem),
            NEED_HIDDEN=need_hidden, ONE_LEVEL=_one_level(problem, grad_rows, posterior_rows),
            HAS_ROWS=problem.rows is not None, HAS_PRIOR=prior is not None, BLOCK=block, ROWS=ROWS_PER_BLOCK, **_LAUNCH,
        )  # fmt: skip
        if prior is None:
            return grad_hidden, grad_posterior, None
        assert problem.prior is not None
        grad_prior = torch.empty((problem.groups, 2 * width), dtype=torch.float32, device=device)
        _sum_partials_kernel[(triton.cdiv(2 * width, 128), problem.groups)](
            partials, grad_prior, _offsets(problem), problem.groups, problem.tokens, 2 * width,
            BLOCK=128, ROWS=ROWS_PER_BLOCK, **_LAUNCH,
        )  # fmt: skip
    return grad_hidden, grad_posterior, grad_prior.to(problem.prior.dtype).view(problem.prior.shape)


def _one_level(problem: Problem, *layouts: RowLayout) -> bool:
    return all(layout.inner >= problem.tokens for layout in layouts)


def _block(width: int) -> int:
    """Columns a program handles at a time: 8 a thread in rows that are long enough."""
    return int(min(1024, max(16, triton.next_power_of_2(width))))


def _offsets(problem: Problem) -> Tensor:
    """Of one group nobody reads them, but a kernel that may read them cannot be compiled for None."""
    return problem.seed if problem.offsets is None else problem.offsets


def _bound(problem: Problem) -> float:
    return math.inf if problem.logvar_bound is None else problem.logvar_bound


def _device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
