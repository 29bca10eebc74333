"""The benchmark's own contract: a full report of sound kernels, no number of a broken one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vittle_kernels import available_backends
from vittle_kernels.backends import cpu, native
from vittle_kernels.backends.problem import Problem

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the C++ library is not built")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], tuple[int, dict[str, Any]]]:
    """Runs the benchmark on a tiny problem; gives the exit code and what it saved."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("bench_fused_ib")

    def run() -> tuple[int, dict[str, Any]]:
        code = module.main(["--smoke", "--device", "cpu", "--output", str(tmp_path)])
        return code, json.loads((tmp_path / "results.json").read_text())

    return run


def test_report(bench: Callable[[], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, saved = bench()
    assert code == 0 and saved["failures"] == []
    assert {"cpu", "cores", "threads", "instruction_set", "torch", "commit"} <= saved["machine_info"].keys()
    groups = {entry["group"] for entry in saved["benchmarks"]}
    assert len(groups) == 8  # two dtypes, two priors, two steps
    for group in groups:
        entries = {e["params"]["contender"]: e for e in saved["benchmarks"] if e["group"] == group}
        assert list(entries) == ["eager", "fused_ib cpu", "kernel alone", "copy"]
        for entry in entries.values():
            stats = entry["stats"]
            assert 0 < stats["min"] <= stats["q1"] <= stats["median"] <= stats["q3"] <= stats["max"]
            assert stats["rounds"] == 3 and entry["extra_info"]["machine"]["commit"] == saved["machine_info"]["commit"]
        params = entries["eager"]["params"]
        posterior = params["rows"] * 2 * params["width"] * getattr(torch, params["dtype"]).itemsize
        kept = {name: entry["extra_info"].get("kept_bytes") for name, entry in entries.items()}
        assert posterior <= kept["fused_ib cpu"] < 1.1 * posterior < kept["eager"]
        assert kept["copy"] is kept["kernel alone"] is None

    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("fused_ib cpu") == 4 and "FAILED" not in table
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_pytest_benchmark_reads_the_report(bench: Callable[[], Any], tmp_path: Path) -> None:
    bench()
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(tmp_path / "results.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "benchmark 'op-float32-32-256-fixed-forward': 4 tests" in result.stdout
    assert "fused_ib cpu[op-float32-32-256-fixed-forward]" in result.stdout and "WARNING" not in result.stderr


def wrong_forward(problem: Problem, hidden: Tensor) -> tuple[Tensor, Tensor]:
    out, kl = native.forward(problem, hidden)
    return out, 1.001 * kl


def wrong_backward(problem: Problem, *gradients: Any) -> tuple[Tensor | None, Tensor, Tensor | None]:
    grad_hidden, grad_posterior, grad_prior = native.backward(problem, *gradients)
    return grad_hidden, grad_posterior.roll(1), grad_prior


def no_noise(problem: Problem, hidden: Tensor) -> tuple[Tensor, Tensor]:
    out, kl = native.forward(problem, hidden)
    return out * 0, kl


@pytest.mark.parametrize(
    ("name", "broken"), [("forward", wrong_forward), ("backward", wrong_backward), ("forward", no_noise)]
)
def test_a_broken_kernel_has_no_speed(
    bench: Callable[[], Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    broken: Callable[..., Any],
) -> None:
    monkeypatch.setattr(cpu, name, broken)
    code, saved = bench()
    assert code == 1
    assert [each["params"]["contender"] for each in saved["failures"]] == 4 * ["fused_ib cpu"]
    assert {each["params"]["contender"] for each in saved["benchmarks"]} == {"eager", "copy"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fused_ib cpu")]
    assert len(lines) == 4 and all("FAILED: " in line and "x  " not in line for line in lines)


def test_scaling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("bench_scaling")
    arguments = ["--device", "cpu", "--powers", "12", "14", "--turns", "2", "--output", str(tmp_path)]
    assert module.main(arguments) == 0
    points = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert [(p["along"], p["rows"], p["width"]) for p in points] == [
        *(("rows", 2**i, 4096) for i in range(3)),
        *(("width", 1024, 4 * 2**i) for i in range(3)),
    ]
    assert all(p["elements"] == p["rows"] * p["width"] and min(p["nanoseconds"].values()) > 0 for p in points)
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 80
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr(cpu, "forward", wrong_forward)
    with pytest.raises(SystemExit, match="fused_ib cpu is wrong at 1 x 4096, so it is not timed"):
        importlib.import_module("bench_scaling").main(
            ["--device", "cpu", "--powers", "12", "12", "--output", str(tmp_path)]
        )
    assert not list(tmp_path.iterdir())


def test_a_second_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One turn of each form; what is predicted is the second look's own multiply-adds."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("bench_second_look")
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)  # it would hold for all tests after this one
    options = ["--shape", "demo", "demo-qformer", "--turns", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert module.main(options) == 0
    saved = json.loads((tmp_path / "second_look.json").read_text())["benchmarks"]
    assert len(saved) == 2 * 2 * 2 and all(entry["stats"]["median"] > 0 for entry in saved)
    table = capsys.readouterr().out.splitlines()[-5:]
    assert max(map(len, table)) <= 80 and [row.split(",")[0] for row in table[1::2]] == ["demo", "demo-qformer"]

    shape, device = module.SHAPES["demo"], torch.device("cpu")
    model, prompt = module.build(shape, torch.float32, device).eval(), module.make_prompt(shape, 4, device)
    with module.FlopCounterMode(display=False) as counter:
        model(**prompt)
    look = 2 * 4 * 128 * 128 + 2 * 4 * 16 * 128 * 128  # W_1 for four images, W_2 for their patches
    assert module.predicted_share(model, prompt) == pytest.approx(look / counter.get_total_flops())
