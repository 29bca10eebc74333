"""FusedIB against a module written with two nn.Linear heads, token by token."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Bounded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vittle_kernels import FusedIB, FusedIBOutput, functional, noise
from vittle_kernels.grouped import grouped_linear
from vittle_kernels.layer import TEXT, VISION, modality_order

D = 24


def make_layer(prior: str = "fixed", **options: object) -> FusedIB:
    torch.manual_seed(0)
    layer = FusedIB(D, prior=prior, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return layer


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 11, D, generator=generator)
    vision = torch.rand(3, 11, generator=generator) < 0.5
    vision[2] = False  # a text-only sample
    text_kl = torch.rand(3, 11, generator=generator) < 0.4
    return hidden, vision, text_kl


def head(layer: FusedIB, hidden: Tensor, modality: int) -> Tensor:
    inner = F.gelu(F.linear(hidden, layer.weight_in[modality], layer.bias_in[modality]))
    return F.linear(inner, layer.weight_out[modality], layer.bias_out[modality])


def expected(layer: FusedIB, hidden: Tensor, vision: Tensor, text_kl: Tensor, seed: Tensor) -> FusedIBOutput:
    """The paper, one modality at a time, every token through both heads."""
    posterior = torch.where(vision[..., None], head(layer, hidden, VISION), head(layer, hidden, TEXT))
    mu, logvar = posterior.chunk(2, -1)
    logvar = Bounded.apply(logvar, math.log(10))
    eps = noise.normals(seed, torch.arange(vision.numel()), D).view_as(hidden).float()
    out = (1 - layer.alpha) * hidden + layer.alpha * (mu + (logvar / 2).exp() * eps)
    m = v = torch.zeros_like(mu)
    if layer.prior is not None:
        m, v = torch.where(vision[..., None], layer.prior[VISION], layer.prior[TEXT]).chunk(2, -1)
    kl = (0.5 * (v - logvar + (logvar.exp() + (mu - m) ** 2) * (-v).exp() - 1)).mean(-1)
    text = text_kl & ~vision
    by_modality = torch.cat((posterior[vision], posterior[~vision])).detach()
    return FusedIBOutput(out, kl[vision].mean(), kl[text].mean(), vision.sum(), text.sum(), by_modality)


def drawn_seed(seed: int) -> Tensor:
    torch.manual_seed(seed)
    drawn = torch.randint(2**63 - 1, (1,))
    torch.manual_seed(seed)
    return drawn


@pytest.mark.parametrize("prior", ["fixed", "learnable"])
def test_training_matches_the_paper(prior: str) -> None:
    layer, (hidden, vision, text_kl) = make_layer(prior), make_batch()
    reference, seed = copy.deepcopy(layer), drawn_seed(5)
    output = layer(hidden.requires_grad_(), vision, text_kl)
    (output.hidden_states.square().mean() + 0.3 * output.kl_vision + 0.7 * output.kl_text).backward()

    other = hidden.detach().clone().requires_grad_()
    truth = expected(reference, other, vision, text_kl, seed)
    (truth.hidden_states.square().mean() + 0.3 * truth.kl_vision + 0.7 * truth.kl_text).backward()

    for found, wanted in zip(output, truth, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(hidden.grad, other.grad)
    for (name, parameter), twin in zip(layer.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, msg=name)


def test_an_explicit_seed_is_the_noise() -> None:
    layer, (hidden, vision, _) = make_layer(), make_batch()
    drawn = drawn_seed(5)
    states = [layer(hidden, vision, seed=seed).hidden_states for seed in (None, drawn, int(drawn), int(drawn) + 1)]
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])


def test_eval_interpolates_with_the_mean() -> None:
    layer, (hidden, vision, _) = make_layer().eval(), make_batch()
    output = layer(hidden, vision)
    mean = torch.where(vision[..., None], head(layer, hidden, VISION), head(layer, hidden, TEXT))[..., :D]
    torch.testing.assert_close(output.hidden_states, torch.lerp(hidden, mean, 0.5))
    assert output.kl_vision is None and output.kl_text is None
    with torch.no_grad():
        layer.weight_out[:, D:] = torch.nan  # the log-variance half is not read
    assert torch.equal(layer(hidden, vision).hidden_states, output.hidden_states)


@pytest.mark.parametrize("training", [True, False])
def test_text_only_is_an_empty_vision_group(training: bool) -> None:
    layer, (hidden, vision, _) = make_layer("learnable").train(training), make_batch()
    torch.manual_seed(0)
    without = layer(hidden)
    torch.manual_seed(0)
    empty = layer(hidden, torch.zeros_like(vision))
    torch.testing.assert_close(without.hidden_states, empty.hidden_states)
    if training:
        assert without.kl_vision.item() == empty.kl_vision.item() == 0
        without.kl_text.backward()
        assert not layer.weight_in.grad[VISION].any() and layer.weight_in.grad[TEXT].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prior", ["fixed", "learnable"])
def test_a_layer_without_vision_is_the_text_head(prior: str, training: bool) -> None:
    both, (hidden, _, text_kl) = make_layer(prior).train(training), make_batch()
    text = FusedIB(D, prior=prior, alpha=float(both.alpha), vision=False).train(training)
    text.load_state_dict({n: t if n == "alpha" else t[TEXT:] for n, t in both.state_dict().items()})
    results = []
    for layer in (both, text):
        torch.manual_seed(0)
        results.append(layer(hidden, None, text_kl))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a is not None)
    assert results[1].vision_tokens.item() == 0
    with pytest.raises(ValueError, match="no head for vision"):
        text(hidden, torch.zeros_like(text_kl))


def test_inference_only_keeps_half_of_the_last_matrix_and_its_outputs() -> None:
    layer, (hidden, vision, _) = make_layer("learnable").eval(), make_batch()
    small = FusedIB(D, alpha=float(layer.alpha), inference_only=True, prior="learnable").eval()
    state = {n: t for n, t in layer.state_dict().items() if n != "prior"}
    state |= {n: state[n][:, :D] for n in ("weight_out", "bias_out")}
    small.load_state_dict(state)
    assert torch.equal(small(hidden, vision).hidden_states, layer(hidden, vision).hidden_states)
    with pytest.raises(RuntimeError, match="what inference needs only"):
        small.train()(hidden, vision)


def test_a_modality_with_no_token_gives_zero() -> None:
    layer, (hidden, vision, _) = make_layer(), make_batch()
    everything = layer(hidden, torch.ones_like(vision), torch.ones_like(vision))
    assert everything.kl_text.item() == 0 and everything.text_tokens.item() == 0
    nothing_counts = layer(hidden, vision, torch.zeros_like(vision))
    assert nothing_counts.kl_text.item() == 0 and not nothing_counts.kl_text.isnan()
    assert layer(hidden[:, :0], vision[:, :0]).hidden_states.shape == (3, 0, D)


def test_weights_of_the_kl() -> None:
    layer, (hidden, vision, text_kl) = make_layer(), make_batch()
    weights = torch.rand(3, 11)
    torch.manual_seed(0)
    weighted = layer(hidden, vision, text_kl, kl_weights=weights)
    single = [layer(hidden[i : i + 1, j : j + 1], vision[i : i + 1, j : j + 1]) for i in range(3) for j in range(11)]
    kl = torch.stack([each.kl_vision + each.kl_text for each in single]).view(3, 11)
    torch.testing.assert_close(weighted.kl_vision, (kl * weights)[vision].sum())
    torch.testing.assert_close(weighted.kl_text, (kl * weights)[text_kl & ~vision].sum())


def test_stays_fp32_and_follows_the_device_only() -> None:
    layer = FusedIB(D, prior="learnable", alpha=0.3)
    weight = layer.weight_in.detach().clone()
    layer.to(torch.bfloat16).half()
    assert {t.dtype for t in (*layer.parameters(), *layer.buffers())} == {torch.float32}
    assert torch.equal(layer.weight_in, weight) and layer.alpha == torch.tensor(0.3)
    assert "alpha" in layer.state_dict()
    assert layer.double().weight_in.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_and_autocast(dtype: torch.dtype) -> None:
    layer, (hidden, vision, text_kl) = make_layer(), make_batch()
    torch.manual_seed(0)
    exact = layer(hidden, vision, text_kl)
    torch.manual_seed(0)
    half = layer(hidden.to(dtype), vision, text_kl)
    assert half.hidden_states.dtype == dtype and half.kl_vision.dtype == torch.float32
    torch.testing.assert_close(half.hidden_states.float(), exact.hidden_states, rtol=0.05, atol=0.05)
    half.kl_vision.backward()
    assert layer.weight_out.grad.dtype == torch.float32
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        mixed = layer(hidden, vision, text_kl)
    assert mixed.hidden_states.dtype == torch.float32
    torch.testing.assert_close(mixed.kl_text, exact.kl_text, rtol=0.05, atol=0.05)


def test_set_alpha_moves_a_saved_buffer() -> None:
    layer, (hidden, vision, _) = make_layer(), make_batch()
    layer.set_alpha(0.0)
    assert torch.equal(layer(hidden, vision).hidden_states, hidden)
    assert torch.equal(layer.eval()(hidden, vision).hidden_states, hidden)
    other = FusedIB(D)
    other.load_state_dict(layer.state_dict())
    assert other.alpha == 0
    with pytest.raises(ValueError, match=r"alpha is 1.5; must be in \[0, 1\]"):
        layer.set_alpha(1.5)


def test_start_and_size() -> None:
    layer = FusedIB(256, prior="learnable")
    assert abs(layer.weight_in.std() - 0.02) < 1e-3 and abs(layer.weight_out.std() - 0.02) < 1e-3
    assert not layer.bias_in.any() and not layer.bias_out.any() and not layer.prior.any()
    with torch.device("meta"):
        seven_b = {
            prior: sum(p.numel() for p in FusedIB(4096, prior=prior).parameters()) for prior in ("fixed", "learnable")
        }
    assert seven_b == {"fixed": 100_687_872, "learnable": 100_687_872 + 16_384}


def test_modality_order() -> None:
    vision = torch.tensor([[False, True, True], [False, False, True]])
    rows, inverse, offsets = modality_order(vision)
    assert rows.tolist() == [1, 2, 5, 0, 3, 4]
    assert offsets.tolist() == [3, 6] and offsets.dtype == torch.int32
    assert torch.equal(rows[inverse], torch.arange(6))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 32), (torch.float32, 32), (torch.float32, 5)], ids=str)
def test_grouped_linear(dtype: torch.dtype, width: int) -> None:
    """bf16 in aligned shapes takes grouped_mm, the rest goes group by group; one group is empty."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, width), torch.randn(3, 2 * width, width), torch.randn(3, 2 * width)
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    y = grouped_linear(*leaves, offsets)
    grad = torch.randn(9, 2 * width).to(dtype)
    y.backward(grad)
    exact = [t.detach().float().requires_grad_() for t in leaves]
    group = torch.tensor([0] * 4 + [2] * 5)
    truth = torch.einsum("nk,nmk->nm", exact[0], exact[1][group]) + exact[2][group]
    truth.backward(grad.float())
    tolerance = {"rtol": 2e-2, "atol": 0.15} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.float(), truth, **tolerance)
    for found, wanted in zip(leaves, exact, strict=True):
        torch.testing.assert_close(found.grad.float(), wanted.grad, **tolerance)


def test_compiles_whole_and_follows_alpha() -> None:
    torch._dynamo.reset()
    layer, (hidden, vision, text_kl) = make_layer("learnable"), make_batch()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for alpha in (0.0, 0.5):
        layer.set_alpha(alpha)
        torch.manual_seed(3)
        found = compiled(hidden, vision, text_kl)
        torch.manual_seed(3)
        torch.testing.assert_close(found.hidden_states, layer(hidden, vision, text_kl).hidden_states)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"hidden_states is \(3, 11, 23\); must be \(..., 24\)", lambda h, v, t: (h[..., 1:], v, t)),
        (r"vision_mask is torch.int64; must be torch.bool", lambda h, v, t: (h, v.long(), t)),
        (
            r"vision_mask is \(3, 10\); must be \(3, 11\), one entry for each token",
            lambda h, v, t: (h, v[:, 1:], t),
        ),
        (r"text_kl_mask is \(11,\); must be \(3, 11\)", lambda h, v, t: (h, v, t[0])),
    ],
)
def test_bad_masks(message: str, arguments: object) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make_layer()(*arguments(*make_batch()))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("hidden_size is 0; must be a positive integer", {"hidden_size": 0}),
        ("prior is 'gaussian'; must be 'fixed' or 'learnable'", {"hidden_size": 4, "prior": "gaussian"}),
        ("backend is 'fast'; must be one of", {"hidden_size": 4, "backend": "fast"}),
        (r"alpha is -1; must be in \[0, 1\]", {"hidden_size": 4, "alpha": -1}),
    ],
)
def test_bad_options(message: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        FusedIB(**options)


class WideTensors(TorchDispatchMode):
    """Notes each operator and the storages of at least ``size`` elements that it makes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.operators, self.made, self.tensors = size, list[str](), dict[int, int](), list[Tensor]()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        results = operator(*args, **(kwargs or {}))
        self.operators.append(str(operator))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.size:
                self.tensors.append(tensor)  # alive, so that no other takes its address
                address = tensor.untyped_storage().data_ptr()
                if address not in given:
                    self.made[address] = tensor.numel()
        return results


@pytest.mark.parametrize("prior", ["fixed", "learnable"])
def test_one_pass(prior: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call in training makes and keeps: one gathered copy, the heads' three results, the op's one; no more."""
    monkeypatch.setattr(functional, "_check_rows", lambda hidden, rows: None)  # reads CPU tensors only
    layer = make_layer(prior).to(torch.bfloat16)
    hidden, vision, text_kl = make_batch()
    hidden = hidden.to(torch.bfloat16).requires_grad_()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    size = hidden.numel()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
        WideTensors(size) as wide,
    ):
        layer(hidden, vision, text_kl)
    weights = {layer.weight_in.numel(), layer.weight_out.numel()}  # autocast makes bf16 copies of these
    assert sorted(made for made in wide.made.values() if made not in weights) == [*(4 * [size]), 2 * size]
    # No copy by concatenation or mask, and nothing that a host would wait for.
    assert not {"cat", "_local_scalar_dense", "nonzero", "masked_select"} & {
        name.split(".")[1] for name in wide.operators
    }

    parameters = {parameter.numel() for parameter in layer.parameters()}
    wide_kept = sorted(tensor.numel() for tensor in kept.values() if tensor.numel() not in parameters)
    assert [count for count in wide_kept if count >= size] == [*(3 * [size]), 2 * size]
    assert sum(count for count in wide_kept if count < size) <= 16 * vision.numel()


def test_precision_whatever_the_default_is() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = FusedIB(D)
    finally:
        torch.set_default_dtype(default)
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
    double = layer.double()
    assert double.weight_in.dtype == torch.float64 and double.alpha.dtype == torch.float32
    output = double(torch.randn(3, D, dtype=torch.float64))
    assert output.hidden_states.dtype == torch.float64
    assert double.float().weight_in.dtype == torch.float32
