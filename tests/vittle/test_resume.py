"""`vittle train` killed at any moment goes on to the same bits; what it finds in its folder that is not whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vittle.checkpoints import MANIFEST, PARTIAL, RUN_FILE, in_order, keep_newest, whole
from vittle.cli import main
from vittle.demo.checkpoint import make_model, make_processor, save
from vittle.demo.scenes import write_dataset

STEPS, EVERY = 18, 3


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's LLaVA, untrained, and data."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    processor = make_processor()
    save(make_model(processor), processor, folder / "model")
    write_dataset(folder, split="train", count=26, seed=0)
    return folder


def arguments(start: Path, output: Path, *more: str) -> list[str]:
    """18 steps over three epochs, the last batch of each a smaller one; two processes decode."""
    return [
        "train", "--model", str(start / "model"), "--data", str(start / "questions.json"),
        "--images", str(start / "images"), "--output", str(output), "--batch-size", "2", "--gradient-accumulation", "2",
        "--max-steps", str(STEPS), "--learning-rate", "1e-3", "--workers", "2", "--log-steps", "2",
        "--save-steps", str(EVERY), "--prior", "learnable", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept all its checkpoints."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(arguments(start, output, "--keep-checkpoints", "0")) == 0
    return output


def outcome(output: Path) -> dict[str, Any]:
    """What a finished run's folder holds, but for measured times."""
    last = output / f"checkpoint-{STEPS}"
    logs = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timed = {"tokens_per_second", "bottleneck_share"}
    weights = load_file(output / "model.safetensors") | load_file(output / "bottleneck.safetensors")
    assert in_order(output)[-1] == last  # and not a step more
    return {"logs": [{k: v for k, v in log.items() if k not in timed} for log in logs], "weights": weights}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["logs"] == wanted["logs"]
    assert found["weights"].keys() == wanted["weights"].keys()
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in wanted["weights"].items())


def run(words: list[str], log: str) -> None:
    """``vittle`` in a process of its own."""
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        multiprocessing.set_start_method("fork", force=True)  # of its data workers
        sys.exit(main(words))


Moment = Callable[[Path, random.Random], None]


def any_time(output: Path, chance: random.Random) -> None:
    """Sometime after the data are read."""
    time.sleep(chance.uniform(0.2, 3.0))


def while_saving(output: Path, chance: random.Random) -> None:
    """Soon after a checkpoint, or the model at the end, is begun."""
    end = time.monotonic() + 20
    for _ in range(chance.randint(1, 3)):
        while not (output / PARTIAL).exists() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        while chance.random() < 0.5 and (output / PARTIAL).exists():
            time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_any_moment(start: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vittle.train", "vittle.cli"])
    chance, kills, halves, log = random.Random(0), 0, 0, tmp_path / "log"
    found: set[str] = set()

    def begin(output: Path, *more: str) -> Any:
        process = context.Process(target=run, args=(arguments(start, output, *more), str(log)))
        process.start()
        return process

    whole = begin(tmp_path / "whole")
    whole.join(120)
    assert whole.exitcode == 0, log.read_text()[-3000:]
    wanted = outcome(tmp_path / "whole")
    for number in range(100):
        if kills >= 24 and halves >= 6 and len(found) >= 4:
            break
        output = tmp_path / f"run{number}"
        while True:
            resumed = ["--resume"] if (output / RUN_FILE).exists() else []
            process = begin(output, *resumed)
            moment: Moment = chance.choice([any_time, while_saving])
            while not (output / RUN_FILE).exists() and process.is_alive():
                time.sleep(0.001)
            moment(output, chance)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -9, log.read_text()[-3000:]
            kills += 1
            halves += (output / PARTIAL).exists()
            found |= {each.name for each in in_order(output)[-1:]}
        assert_same(outcome(output), wanted)
        shutil.rmtree(output)
    else:
        pytest.fail(f"{kills} kills, {halves} of them in a save, left {found}")


@pytest.fixture
def broken_off(uninterrupted: Path, tmp_path: Path) -> Path:
    """The run with checkpoints up to the ninth step."""
    kept = shutil.ignore_patterns("checkpoint-12", "checkpoint-15", "checkpoint-18", "*.safetensors")
    output = shutil.copytree(uninterrupted, tmp_path / "run", ignore=kept)
    for step in (3, 6, 9):
        shutil.copytree(uninterrupted / f"checkpoint-{step}", output / f"checkpoint-{step}", dirs_exist_ok=True)
    return output


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


HALVES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt has "),
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"it has no readable {MANIFEST}"),
    "cut manifest": (lambda folder: cut(folder / MANIFEST), f"it has no readable {MANIFEST}"),
    "empty": (empty, f"it has no readable {MANIFEST}"),
}


@pytest.mark.parametrize("damage", HALVES)
def test_a_half_written_checkpoint_is_passed_over(
    start: Path, uninterrupted: Path, broken_off: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, reason = HALVES[damage]
    harm(broken_off / "checkpoint-9")
    assert main(arguments(start, broken_off, "--resume")) == 0
    out = capsys.readouterr().out
    assert f"checkpoint-9 is passed over: {reason}" in out and "resuming from checkpoint-6" in out
    assert_same(outcome(broken_off), outcome(uninterrupted))
    assert [each.name for each in in_order(broken_off)] == ["checkpoint-15", "checkpoint-18"]  # two are kept
    assert not [each for each in broken_off.iterdir() if each.name.startswith(".")]


def test_keep_newest(uninterrupted: Path, tmp_path: Path) -> None:
    output = shutil.copytree(uninterrupted, tmp_path / "run")
    cut(output / "checkpoint-18" / "optimizer.pt")
    keep_newest(output, 3, best=str(output / "checkpoint-6"))
    assert [each.name for each in whole(output)] == ["checkpoint-6", "checkpoint-12", "checkpoint-15"]
    keep_newest(output, 1, best=str(output / "checkpoint-6"))
    assert [each.name for each in whole(output)] == ["checkpoint-6", "checkpoint-15"]
    keep_newest(output, 1)
    assert [each.name for each in whole(output)] == ["checkpoint-15"]
    assert (output / "checkpoint-18").is_dir()


def test_the_split_of_a_batch_may_change(start: Path, broken_off: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(start, broken_off, "--resume", "--batch-size", "4", "--gradient-accumulation", "1")) == 0
    told = "the batch is split as [4, 1, 1] and was as [2, 2, 1]: the noise will not be the uninterrupted run's"
    assert told in capsys.readouterr().out


def test_without_a_whole_checkpoint_the_run_starts_again(
    start: Path, uninterrupted: Path, broken_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for each in in_order(broken_off):
        cut(each / "trainer_state.json")
    assert main(arguments(start, broken_off, "--resume")) == 0
    assert "holds no whole checkpoint; the run starts again" in capsys.readouterr().out
    assert_same(outcome(broken_off), outcome(uninterrupted))


def test_a_finished_run_is_resumed_at_its_end(start: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output = shutil.copytree(uninterrupted, tmp_path / "run")
    (output / "model.safetensors").write_bytes(b"cut off by a kill")
    assert main(arguments(start, output, "--resume")) == 0
    assert_same(outcome(output), outcome(uninterrupted))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (("--learning-rate", "2e-3"), "learning_rate is 0.002 and was 0.001"),
        (("--batch-size", "4"), "global_batch is 8 and was 4"),
        (("--beta", "0.2"), "bottleneck.beta is 0.2 and was 0.1"),
        (("--seed", "1", "--alpha", "0.4"), "bottleneck.alpha is 0.4 and was 0.5; seed is 1 and was 42"),
        (("--plain",), "bottleneck.alpha is null and was 0.5"),
    ],
)
def test_other_settings_are_named(
    start: Path, uninterrupted: Path, change: tuple[str, ...], difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert main(arguments(start, uninterrupted, "--resume", *change)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"vittle: {uninterrupted / RUN_FILE} belongs to a run with other settings: ")
    assert difference in error
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_other_data_are_named(
    start: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((start / "questions.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[::-1]))
    assert main(arguments(start, uninterrupted, "--resume", "--data", str(tmp_path / "other.json"))) == 2
    assert "belongs to a run with other settings: data_sha256 is " in capsys.readouterr().err
    (tmp_path / "moved.json").write_bytes((start / "questions.json").read_bytes())
    output = shutil.copytree(uninterrupted, tmp_path / "run")  # the same data in another place will do
    assert main(arguments(start, output, "--resume", "--data", str(tmp_path / "moved.json"))) == 0


def test_a_foreign_checkpoint_is_refused(
    start: Path, uninterrupted: Path, broken_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (broken_off / RUN_FILE).unlink()  # as transformers' own Trainer leaves a folder
    assert main(arguments(start, broken_off, "--resume")) == 2
    assert (
        f"output {broken_off} holds no run of vittle train to resume; it has no {RUN_FILE}" in capsys.readouterr().err
    )
    (broken_off / RUN_FILE).write_bytes((uninterrupted / RUN_FILE).read_bytes())
    manifest = json.loads((broken_off / "checkpoint-9" / MANIFEST).read_text())
    manifest["run"]["model"] = "another"
    (broken_off / "checkpoint-9" / MANIFEST).write_text(json.dumps(manifest))
    assert main(arguments(start, broken_off, "--resume")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"vittle: {broken_off / 'checkpoint-9'} belongs to a run with other settings: model is ")


def test_an_output_that_cannot_be_written(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(start, Path("/proc/run"))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vittle: output /proc/run cannot be written: ")


FULL = """
mount -t tmpfs -o size={size} tmpfs "$0" || exit 77
"$@" && exit 78  # it must not fit
echo "left: $(cd "$0"/run && echo .[!.]* *)"
mount -o remount,size=1g tmpfs "$0"
"$@" --resume || exit 79
cp -r "$0"/run "$0".saved
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", ["a checkpoint", "the model"])
def test_a_full_disk_loses_nothing(start: Path, uninterrupted: Path, tmp_path: Path, at: str) -> None:
    checkpoint = sum(path.stat().st_size for path in (uninterrupted / "checkpoint-18").rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    size = int(checkpoint * 2.6) if at == "a checkpoint" else int(checkpoint * 2.1)
    keep = ["--keep-checkpoints", "0"] if at == "a checkpoint" else ["--save-steps", "9", "--keep-checkpoints", "0"]
    command = [sys.executable, "-m", "vittle", *arguments(start, disk / "run", *keep)]
    script = FULL.format(size=size)
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(disk), *command],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no small disk can be mounted here")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    told = [line for line in done.stderr.splitlines() if line.startswith("vittle: ")]
    name, last = ("checkpoint-9", "checkpoint-6") if at == "a checkpoint" else ("the model", "checkpoint-18")
    assert len(told) == 1 and told[0].startswith(
        f"vittle: {name} cannot be written to {disk / 'run'}: the disk is too full, "
    )
    assert told[0].endswith(f"; {last} is whole: --resume goes on from it")
    left = next(line for line in done.stdout.splitlines() if line.startswith("left: "))
    assert last in left and f" {name}" not in left and PARTIAL not in left
    found, wanted = outcome(Path(f"{disk}.saved")), outcome(uninterrupted)
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in wanted["weights"].items())
