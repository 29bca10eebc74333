"""``make gpu-check`` as far as it runs without a GPU: stages, one file, going on where it stopped."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vittle_kernels import available_backends
from vittle_kernels.backends import cpu, native

pytestmark = pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the C++ library is not built")


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("gpu_check")


def run(gpu_check: ModuleType, folder: Path, stage: str, commit: str = "abc", *options: str) -> int:
    return gpu_check.main([stage, "--smoke", "--commit", commit, "--output", str(folder), *options])


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cpu.json").read_text())


def test_stages_merge_and_go_on(gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("op", "layer", "step"):
        assert run(gpu_check, tmp_path, stage) == 0
        printed = capsys.readouterr().out
        assert "[1/" in printed and "done before" not in printed and "FAILED" not in printed
        assert max(map(len, printed.splitlines())) <= 80
    entries = saved(tmp_path)["benchmarks"]
    assert {each["params"]["benchmark"] for each in entries} == {"op", "layer", "step"}
    assert all(each["extra_info"]["machine"]["commit"] == "abc" for each in entries)
    assert {each["params"]["contender"] for each in entries} > {"plain", "eager", "fused", "FusedIB cpu", "copy"}

    assert run(gpu_check, tmp_path, "op") == 0
    assert capsys.readouterr().out.count("done before") == 4
    assert saved(tmp_path)["benchmarks"] == entries

    assert run(gpu_check, tmp_path, "op", "def") == 0  # a new commit is measured anew, in the old one's place
    assert "done before" not in capsys.readouterr().out
    renewed = saved(tmp_path)["benchmarks"]
    assert len(renewed) == len(entries)
    assert {e["extra_info"]["machine"]["commit"] for e in renewed if e["params"]["benchmark"] == "op"} == {"def"}


def test_no_time_is_told_and_nothing_is_lost(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(gpu_check, tmp_path, "op", "abc", "--minutes", "0") == gpu_check.INCOMPLETE
    assert "no time left; run the stage again to go on" in capsys.readouterr().out
    assert run(gpu_check, tmp_path, "op") == 0


def test_a_wrong_kernel_fails_the_stage(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(problem: Any, hidden: Any) -> Any:
        out, kl = native.forward(problem, hidden)
        return out, 1.01 * kl

    with monkeypatch.context() as broken:
        broken.setattr(cpu, "forward", wrong)
        for stage in ("op", "layer", "step"):
            assert run(gpu_check, tmp_path, stage) == 1
            assert "FAILED: " in capsys.readouterr().out
    ours = [e for e in saved(tmp_path)["benchmarks"] if e["params"]["contender"].startswith(("fused", "Fused"))]
    assert ours == []
    assert run(gpu_check, tmp_path, "op", "mended") == 1  # the layer's failure still stands
    assert {each["params"]["benchmark"] for each in saved(tmp_path)["failures"]} == {"layer", "step"}


def test_commands(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    program = tmp_path / "program.py"

    def items(check: Any) -> list[Any]:
        return [gpu_check.command_item("test", "it", [sys.executable, str(program)], check)]

    monkeypatch.setitem(gpu_check.STAGES, "test", items)
    program.write_text("print('oh'); raise SystemExit(4)")
    assert run(gpu_check, tmp_path, "test") == 1
    assert "FAILED test: it: oh" in capsys.readouterr().out
    program.write_text("import time; print('slow', flush=True); time.sleep(60)")
    begin = time.monotonic()
    assert run(gpu_check, tmp_path, "test", "abc", "--minutes", "0.02") == gpu_check.INCOMPLETE
    assert time.monotonic() - begin < 30 and "cut off" in capsys.readouterr().out
    program.write_text("print('3 passed')")
    assert run(gpu_check, tmp_path, "test") == 0
    check = saved(tmp_path)["checks"]["test: it"]
    assert check["passed"] and check["detail"] == "3 passed" and check["machine"]["commit"] == "abc"


def test_roofline_of_a_gpu(gpu_check: ModuleType, tmp_path: Path) -> None:
    """Times made up from the machine code's own bounds, to see that every part of the plot is drawn."""
    from records import Results, entry, machine

    pytest.importorskip("matplotlib")
    facts = machine(torch.device("cpu"), "abc") | {"gpu": "NVIDIA H200"}
    results = Results(tmp_path / "made-up.json")
    for rows in (2048, 16384):
        problem = {"benchmark": "op", "dtype": "bfloat16", "rows": rows, "width": 4096, "prior": "fixed"}
        for contender, slower in {"copy": 1.0, "eager": 9.0, "fused_ib cuda": 1.05, "fused_ib triton": 1.3}.items():
            for step, moved in {"forward": 4, "backward": 6, "forward_backward": 10}.items():
                seconds = slower * rows * 4096 * 2 * moved / 4.3e12
                results.add([entry(problem, contender, step, [seconds], facts)])
    results.content["static"] = {"rows": [
        {"backend": name, "kernel": kernel, "dtype": "bfloat16", "prior": "fixed", "instructions": 35.0 + 20 * wide}
        for wide, name in enumerate(("cuda", "triton")) for kernel in ("forward", "backward")
    ]}  # fmt: skip
    results.save(facts)
    module = importlib.import_module("roofline")
    module.draw_roofline(Results.load(results.path), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_sanitizer_watches_runs(gpu_check: ModuleType) -> None:
    importlib.import_module("sanitized").every_kernel(torch.device("cpu"), "cpu")


def test_the_kernel_that_keeps_eps_is_right(gpu_check: ModuleType) -> None:
    """A contender that was wrong would be no contender."""
    pytest.importorskip("triton")
    module = importlib.import_module("contenders")
    inputs = module.make_inputs(5, 1500, torch.float32, False, torch.device("cpu"))
    out, kl = module.stored_noise(*inputs[:3])
    mu, logvar = inputs.posterior.detach().chunk(2, -1)
    z = (out.detach() - (1 - module.ALPHA) * inputs.hidden.detach()) / module.ALPHA
    eps = (z - mu) / (0.5 * logvar).exp()
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    results, truth = (out, kl), module.eager(*inputs[:3], lambda mu: eps)
    gradients = [
        torch.autograd.grad(each, inputs.leaves, (inputs.grad_out, inputs.grad_kl)) for each in (results, truth)
    ]
    torch.testing.assert_close((*results, *gradients[0]), (*truth, *gradients[1]), rtol=1e-5, atol=1e-5)


def test_errors(gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["op", "--output", str(tmp_path)])
    assert "there is no CUDA device" in capsys.readouterr().err
    (tmp_path / "cpu.json").write_text("{")
    with pytest.raises(SystemExit, match=r"cpu\.json is damaged"):
        run(gpu_check, tmp_path, "op")
