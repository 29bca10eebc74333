"""The benchmark's own contract: a full report of sound kernels, no number of a broken one."""

from __future__ import annotations

import importlib
import json
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
    assert code == 0
    assert {"cpu", "cores", "threads", "instruction_set", "torch", "commit"} <= saved["machine"].keys()
    problems = {(row["dtype"], row["prior"]) for row in saved["results"]}
    assert len(problems) == 4
    assert [row["contender"] for row in saved["results"]] == [*("eager", "fused_ib cpu", "kernel alone", "copy")] * len(
        problems
    )
    for eager, ours, alone, copy in zip(*(saved["results"][i::4] for i in range(4)), strict=True):
        for step in ("forward", "forward_backward"):
            assert eager[step]["speedup"] == 1 and alone[step]["speedup"] is copy[step]["speedup"] is None
            assert alone[step]["median_ms"] > 0
            assert ours[step]["speedup"] == pytest.approx(eager[step]["median_ms"] / ours[step]["median_ms"])
            assert ours[step]["p20_ms"] <= ours[step]["median_ms"] <= ours[step]["p80_ms"]
        posterior = saved["rows"] * 2 * saved["width"] * getattr(torch, ours["dtype"]).itemsize
        assert posterior <= ours["kept_bytes"] < 1.1 * posterior < eager["kept_bytes"]

    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("fused_ib cpu") == len(problems) and "FAILED" not in table
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


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
    ours = [row for row in saved["results"] if row["contender"] == "fused_ib cpu"]
    assert all(row["failure"] and row["forward"] is row["forward_backward"] is None for row in ours)
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
