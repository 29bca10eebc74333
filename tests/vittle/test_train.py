"""`vittle train` on a small LLaVA of random weights: what it writes, what it refuses, how it resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vittle import load_bottleneck
from vittle.cli import main
from vittle.demo.checkpoint import make_model, make_processor, save
from vittle.demo.scenes import write_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's LLaVA, untrained."""
    torch.manual_seed(0)
    folder, processor = tmp_path_factory.mktemp("small"), make_processor()
    save(make_model(processor), processor, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), split="train", count=24, seed=0)


def arguments(small: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(small), "--data", str(data), "--images", str(data.parent / "images"),
        "--output", str(output), "--batch-size", "4", "--max-steps", "4", "--learning-rate", "1e-3",
        "--workers", "0", "--log-steps", "1", *more,
    ]  # fmt: skip


def test_a_run_is_a_model_and_its_bottleneck(
    small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(arguments(small, data, output, "--save-steps", "0", "--prior", "learnable")) == 0
    assert "4 steps in" in capsys.readouterr().out
    model, info = LlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    AutoProcessor.from_pretrained(output)
    before = LlavaForConditionalGeneration.from_pretrained(small, dtype=torch.float32).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    bottleneck = load_bottleneck(model, output)
    assert bottleneck.alpha == 0.5 and bottleneck.prior is not None and bottleneck.prior.any()
    assert json.loads((output / "bottleneck_config.json").read_text())["layer"] * 4 == 3 * len(
        model.get_decoder().layers
    )
    assert not list(output.rglob("*.pt")) and not list(output.rglob("*.tmp"))


def test_the_log_shows_the_bottleneck(small: Path, data: Path, tmp_path: Path) -> None:
    from vittle.train import TrainConfig, train

    config = TrainConfig(
        str(small), str(data), str(data.parent / "images"), str(tmp_path / "run"),
        batch_size=4, max_steps=3, log_steps=1, save_steps=0, workers=0, alpha_schedule="cosine",
    )  # fmt: skip
    result = train(config)
    logs = [log for log in result.history if "loss" in log]
    assert [log["alpha"] for log in logs] == [0.0, 0.125, 0.375]
    for log in logs:
        assert log["loss"] == pytest.approx(log["ce"] + 0.1 * (log["kl_vision"] + log["kl_text"]), abs=2e-3)
    assert not result.model.training


def test_an_existing_run_is_refused_or_resumed(
    small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(arguments(small, data, output, "--resume")) == 2
    assert f"output {output} holds no run of vittle train to resume" in capsys.readouterr().err
    assert main(arguments(small, data, output, "--save-steps", "2")) == 0
    first = (output / "bottleneck.safetensors").read_bytes()
    model = load_file(output / "model.safetensors")
    capsys.readouterr()
    assert main(arguments(small, data, output)) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"vittle: output {output} is not empty; name another folder, or resume the run it holds with --resume\n"
    )
    assert (output / "bottleneck.safetensors").read_bytes() == first
    (output / "checkpoint-4").rename(tmp_path / "away")
    assert main(arguments(small, data, output, "--save-steps", "2", "--resume")) == 0
    assert (output / "checkpoint-4").is_dir()
    assert (output / "bottleneck.safetensors").read_bytes() == first  # bit for bit the uninterrupted run
    resumed = load_file(output / "model.safetensors")
    assert resumed.keys() == model.keys() and all(torch.equal(resumed[name], model[name]) for name in model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "no/such/folder"), "model is 'no/such/folder'; must be a folder or Hub id"),
        (("--data", "no.json"), "no.json"),
        (("--layer", "99"), "layer is 99; must be in [1, "),
        (("--report-to", "nothing"), "report_to is 'nothing', which is not installed"),
        (("--beta", "-1"), "beta is -1.0; must not be negative"),
        (
            ("--max-length", "10"),
            '(id "questions-000',  # the file and the record come first
        ),
        (("--max-length", "10"), "max_length 10 cuts image tokens or the whole answer; raise max_length to"),
    ],
)
def test_bad_settings_are_told_in_one_line(
    small: Path, data: Path, tmp_path: Path, change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(small, data, tmp_path / "run"), *change]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vittle: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['transformers'] = None; from vittle.cli import main; sys.exit(main(['demo']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == "vittle: transformers is not installed: pip install 'vittle-kernels[eval]'\n"


def test_the_plain_pytorch_loop(small: Path, data: Path, tmp_path: Path) -> None:
    script = ROOT / "python" / "tune_llava.py"
    assert len(script.read_text().splitlines()) < 60
    command = [sys.executable, str(script), str(small), str(data), str(data.parent / "images"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "step 6/6: CE" in result.stdout
    assert (tmp_path / "out" / "bottleneck.safetensors").exists()


def test_help_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in (["--help"], ["train", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit):
            main(command)
        text = capsys.readouterr().out
        assert text.startswith("usage: vittle") and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "options",
    [
        ("--loss", "instruct"),
        ("--loss", "instruct", "--tuning", "lora", "--lora-rank", "4", "--prior", "learnable"),
        ("--tuning", "frozen"),
        ("--tuning", "lora", "--lora-rank", "4", "--plain"),
    ],
    ids=" ".join,
)
def test_ways_of_tuning(small: Path, data: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    output = tmp_path / "run"
    assert main(arguments(small, data, output, "--save-steps", "0", *options)) == 0
    before = LlavaForConditionalGeneration.from_pretrained(small, dtype=torch.float32)
    has_bottleneck = "--plain" not in options
    assert (output / "bottleneck.safetensors").exists() == has_bottleneck
    assert (output / "task_templates.json").exists() == ("instruct" in options)
    if "lora" in options:
        model = PeftModel.from_pretrained(before, output)
        assert all("language_model" in name for name, _ in model.named_parameters() if "lora_" in name)
        assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32)
        weights = before.state_dict()
        is_same = all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert is_same == ("frozen" in options)
    if has_bottleneck:
        assert load_bottleneck(model, output).weight_in.any()


def test_the_loss_on_instructions_differs_and_its_templates_can_be_edited(
    small: Path, data: Path, tmp_path: Path
) -> None:
    from vittle.train import TrainConfig, train

    def first_loss(name: str, **settings: str) -> float:
        config = TrainConfig(
            str(small), str(data), str(data.parent / "images"), str(tmp_path / name), None,
            batch_size=4, max_steps=1, log_steps=1, save_steps=0, workers=0, **settings,
        )  # fmt: skip
        return train(config).history[0]["loss"]

    response, instruct = first_loss("response"), first_loss("instruct", loss="instruct", task_templates="0")
    assert response != instruct
    counted = first_loss("counted", loss="instruct", task_templates="3")
    templates = json.loads((tmp_path / "counted" / "task_templates.json").read_text())
    assert len(templates) == 3 and list(templates.values()) == sorted(templates.values(), reverse=True)
    assert (
        first_loss("again", loss="instruct", task_templates=str(tmp_path / "counted" / "task_templates.json"))
        == counted
    )
    assert counted not in (response, instruct)


def test_bad_records_are_skipped_on_demand_and_counted(
    small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(data.read_text())
    records[3]["image"] = "missing.png"
    records[5] = dict(records[4])
    bad = data.parent / "bad.json"
    bad.write_text(json.dumps(records))
    assert main(arguments(small, bad, tmp_path / "run")) == 2
    assert f"{bad}: record 3 (id " in capsys.readouterr().err
    assert main(arguments(small, bad, tmp_path / "run", "--on-bad", "skip", "--save-steps", "0")) == 0
    printed = capsys.readouterr().out
    assert "2 bad records are skipped, 22 are used; the first bad one:" in printed and "missing.png" in printed
