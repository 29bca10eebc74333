"""What only a GPU can show: streams, devices, captured graphs, a bad index on the device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import make_inputs, run_op

from vittle_kernels import FusedIB, available_backends, fused_ib

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := available_backends()[request.param]:
        pytest.skip(reason)
    return request.param


def test_runs_on_the_current_stream(backend: str) -> None:
    inputs = make_inputs(64, 1024, device="cuda")
    expected = run_op(inputs, backend)["out"]
    stream = torch.cuda.Stream()
    hidden = torch.zeros_like(inputs.hidden)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        hidden.copy_(inputs.hidden)  # a launch on another stream would read zeros
        out, _ = fused_ib(hidden, inputs.posterior, inputs.alpha, backend=backend, **inputs.options)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_runs_on_a_device_that_is_not_current(backend: str) -> None:
    expected = run_op(make_inputs(7, 100, device="cuda:0", groups=2), backend)
    found = run_op(make_inputs(7, 100, device="cuda:1", groups=2), backend)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(found[name].cpu(), expected[name].cpu()) for name in expected)


def test_a_captured_graph_draws_fresh_noise_and_follows_alpha(backend: str) -> None:
    torch.manual_seed(0)
    layer = FusedIB(256, backend=backend).cuda().to(torch.bfloat16)
    hidden = torch.randn(2, 32, 256, device="cuda", dtype=torch.bfloat16)
    vision = torch.zeros(2, 32, dtype=torch.bool, device="cuda")
    vision[:, 3:20] = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            layer(hidden, vision)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = layer(hidden, vision).hidden_states
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)
    layer.set_alpha(0.0)
    graph.replay()
    assert torch.equal(out, hidden)


def test_no_host_sync(backend: str) -> None:
    layer = FusedIB(256, backend=backend, prior="learnable").cuda()
    hidden = torch.randn(2, 32, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    vision = torch.zeros(2, 32, dtype=torch.bool, device="cuda")
    vision[:, 3:20] = True
    layer(hidden, vision)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = layer(hidden, vision)
        (output.hidden_states.float().sum() + output.kl_vision + output.kl_text).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_leaves_the_generator_and_the_layer_usable(backend: str) -> None:
    layer = FusedIB(256, backend=backend).cuda()
    hidden = torch.randn(8, 256, device="cuda")
    many, posterior = torch.randn(1 << 16, 256, device="cuda"), torch.randn(1 << 16, 512, device="cuda")
    torch.manual_seed(3)
    expected = layer(hidden).hidden_states
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fused_ib(many, posterior, 0.5, seed=1, backend=backend)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.manual_seed(3)
    assert torch.equal(layer(hidden).hidden_states, expected)


def test_a_modality_without_tokens_gets_no_gradient(backend: str) -> None:
    """bf16 takes grouped_mm, whose groups may be empty."""
    layer = FusedIB(256, backend=backend).cuda()
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    output = layer(hidden, torch.zeros(64, dtype=torch.bool, device="cuda"))
    (output.hidden_states.float().square().sum() + output.kl_text).backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all() and not parameter.grad[0].any() and parameter.grad[1].any()
    assert hidden.grad.isfinite().all()


def test_this_gpu_is_served() -> None:
    """By machine code of its own architecture, by its major version's (86 and 89 by 80), or by PTX (120 by 100)."""
    assert available_backends()["cuda"] is None or "built without CUDA" in available_backends()["cuda"]


def test_a_bad_row_is_caught_on_the_device() -> None:
    code = """
import torch
from vittle_kernels import fused_ib
rows = torch.tensor([0, 9], device="cuda")
fused_ib(torch.zeros(2, 8, device="cuda"), torch.zeros(2, 16, device="cuda"), 0.5, rows=rows, backend="cuda")
torch.cuda.synchronize()
"""
    if reason := available_backends()["cuda"]:
        pytest.skip(reason)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "rows[i]" in result.stdout + result.stderr
