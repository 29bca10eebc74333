"""The noise contract: Philox words bit for bit, normals within their bound, their statistics, what they depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from support import Case
from torch import Tensor

from vittle_kernels import fused_ib, noise
from vittle_kernels.backends import native
from vittle_kernels.backends import triton as triton_backend

if triton_backend.triton is not None:
    import triton
    import triton.language as tl

    box_muller_of_words = triton_backend._normals_of_words

    @triton.jit
    def philox_kernel(seed, counters, words, count: tl.constexpr):
        i = 4 * tl.arange(0, count)
        seed = tl.load(seed)
        c = (
            tl.load(counters + i).to(tl.uint32), tl.load(counters + i + 1).to(tl.uint32),
            tl.load(counters + i + 2).to(tl.uint32), tl.load(counters + i + 3).to(tl.uint32),
        )  # fmt: skip
        w0, w1, w2, w3 = tl.philox(seed, c[0], c[1], c[2], c[3], n_rounds=10)
        tl.store(words + i, w0.to(tl.int64))
        tl.store(words + i + 1, w1.to(tl.int64))
        tl.store(words + i + 2, w2.to(tl.int64))
        tl.store(words + i + 3, w3.to(tl.int64))

    @triton.jit
    def normals_kernel(words, eps, count, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < count
        radius = tl.load(words + 2 * i, mask=mask, other=0).to(tl.uint32)
        angle = tl.load(words + 2 * i + 1, mask=mask, other=0).to(tl.uint32)
        even, odd = box_muller_of_words(radius, angle)
        tl.store(eps + 2 * i, even, mask=mask)
        tl.store(eps + 2 * i + 1, odd, mask=mask)


def to_uint32(words: Tensor) -> Tensor:
    return (words - (words >> 31 << 32)).to(torch.int32)


def philox_words(case: Case, seed: int, counters: Tensor) -> Tensor:
    """Words (n, 4) of a backend; counters int64 (n, 4)."""
    signed = seed - 2**64 if seed >= 2**63 else seed
    seed_tensor, counters = torch.tensor([signed], device=case.device), counters.to(case.device)
    if case.backend == "eager":
        return torch.stack(noise.philox4x32(seed_tensor, tuple(counters.unbind(1))), 1)
    words = torch.zeros_like(counters)
    if case.backend == "triton":
        philox_kernel[(1,)](seed_tensor, counters, words, triton.next_power_of_2(len(counters)))
        return words
    packed, words = to_uint32(counters), words.to(torch.int32)
    native.library().philox(native.target(packed.device), signed, packed.data_ptr(), words.data_ptr(), len(counters))
    return words.long() & 0xFFFFFFFF


def normals_of_words(case: Case, words: Tensor) -> Tensor:
    """Normals (n, 2) of a backend from pairs of words, int64 (n, 2)."""
    words = words.to(case.device)
    if case.backend == "eager":
        return torch.stack(noise.box_muller(*words.unbind(1)), 1).float()
    eps = torch.empty(words.shape, dtype=torch.float32, device=case.device)
    if case.backend == "triton":
        normals_kernel[(triton.cdiv(len(words), 4096),)](words, eps, len(words), 4096)
        return eps
    packed = to_uint32(words)
    native.library().normals(native.target(packed.device), packed.data_ptr(), eps.data_ptr(), len(words))
    return eps


RANDOM123 = [  # key, counter, words: the known-answer vectors published with Random123 for philox4x32-10
    ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("key", "counter", "expected"), RANDOM123)
def test_known_answers(case: Case, key: str, counter: str, expected: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    counters = torch.tensor([[int(word, 16) for word in counter.split()]])
    words = philox_words(case, low | high << 32, counters)
    assert [f"{word:08x}" for word in words[0].tolist()] == expected.split()


def test_words_agree_on_every_backend(case: Case) -> None:
    counters = torch.randint(0, 2**32, (64, 4), generator=torch.Generator().manual_seed(0))
    expected = philox_words(Case("eager"), 0x0123456789ABCDEF, counters)
    assert torch.equal(philox_words(case, 0x0123456789ABCDEF, counters).cpu(), expected.cpu())


def edge_words() -> Tensor:
    edges = [0, 1, 2, 2**29, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, *range(2**32 - 4096, 2**32)]
    grid = torch.cartesian_prod(torch.tensor(edges), torch.tensor([*edges[:9], 2**32 - 1]))
    return torch.cat((grid, grid.flip(1)))


@pytest.mark.parametrize("words", [edge_words, lambda: torch.randint(0, 2**32, (1 << 18, 2))], ids=["edges", "random"])
def test_normals_keep_the_contract(case: Case, words: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    pairs = words()
    exact = torch.stack(noise.box_muller(*pairs.unbind(1)), 1)
    radius = torch.sqrt(-2 * torch.log((pairs[:, :1].double() + 0.5) * 2.0**-32))
    error = (normals_of_words(case, pairs).cpu().double() - exact).abs()
    assert (error <= 6e-4).all()
    assert (error <= 2e-6 * (1 + exact.abs()))[(radius >= 0.1).expand_as(error)].all()


def op_normals(tokens: int, columns: int, seed: int, **options: Tensor) -> Tensor:
    zeros = torch.zeros(tokens, columns)
    return fused_ib(zeros, zeros.repeat(1, 2), 1.0, seed=seed, **options)[0]


def test_the_op_draws_these_normals(case: Case) -> None:
    rows = torch.tensor([2, 0, 3, 1], device=case.device)
    zeros = torch.zeros(4, 45, device=case.device)
    out, _ = fused_ib(zeros, zeros.repeat(1, 2), 1.0, rows=rows, seed=77, backend=case.backend)
    exact = noise.normals(torch.tensor([77]), torch.arange(4), 45)
    assert (out.cpu() - exact).abs().max() < 2e-5


def test_statistics() -> None:
    eps = op_normals(1024, 1024, 3).double()
    n = eps.numel()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    for power, moment, variance in ((2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((eps**power).mean() - moment) < 5 * math.sqrt(variance / n), power
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    for shift in ((0, 1), (0, 2), (1, 0), (1, 1), (0, 4)):
        correlation = (eps * eps.roll(shift, (0, 1))).mean()
        assert abs(correlation) < 5 / math.sqrt(n), shift
    for other in (4, 3 + 2**32, -3):
        assert abs((eps * op_normals(1024, 1024, other)).mean()) < 5 / math.sqrt(n), other


def test_independent_of_threads_rows_and_their_order() -> None:
    whole = op_normals(300, 700, 9)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(whole, op_normals(300, 700, 9))
    torch.set_num_threads(threads)
    assert torch.equal(whole[:11], op_normals(11, 700, 9))
    assert torch.equal(whole[:, :33], op_normals(300, 33, 9))
    assert torch.equal(whole, op_normals(300, 700, 9, rows=torch.randperm(300)))
