"""``vittle demo``: the whole slice on real handwritten digits, plainly tuned against tuned with the bottleneck."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vittle.data import Collator, LlavaDataset
from vittle.demo.report import draw, table
from vittle.demo.scenes import write_dataset
from vittle.errors import UserError
from vittle.evaluate import Asking, ask, batches, progress_bar
from vittle.files import save_json
from vittle.methods.bottleneck import BottleneckConfig
from vittle.shifts import CLEAN, Condition, Shift
from vittle.tasks.exact import Exact
from vittle.train import TrainConfig, TrainResult, train

ALIGNED = Path(__file__).parent / "aligned"
"""The small LLaVA that the demo starts from; ``make demo-checkpoint`` makes it."""

TRAINING_QUESTIONS, HELD_OUT_QUESTIONS = 16_000, 400
KINDS = ("gaussian_noise", "defocus_blur", "contrast", "pixelate")
SEVERITIES = (1, 3, 5)

SETTINGS: dict[str, Any] = {
    "batch_size": 32,
    "max_steps": 500,
    "learning_rate": 5e-4,
    "max_length": 128,
    "workers": 0,
    "group_by_length": False,
    "save_steps": 0,
    "log_steps": 100,
}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"bottleneck": None},
    "bottleneck": {"bottleneck": BottleneckConfig()},
    "instruct": {"bottleneck": None, "loss": "instruct", "task_templates": "0"},
    "both": {"bottleneck": BottleneckConfig(), "loss": "instruct", "task_templates": "0"},
}
"""The questions are of some twenty sentences in all: none is left out, or all would be."""


@dataclass(frozen=True)
class Outcome:
    """What one method came to."""

    accuracy: dict[str, Any]
    kl: dict[str, float] | None
    steps_per_second: float
    bytes_for_backward: int


def run(output: str | Path, *, seed: int = 0, methods: Sequence[str] = ("plain", "bottleneck")) -> dict[str, Any]:
    """Makes the data, tunes and evaluates the models, prints the table, writes ``report.json`` and ``report.png``.

    A run that the folder holds is replaced. Returns the report.
    """
    start, output = time.perf_counter(), Path(output)
    if not (ALIGNED / "model.safetensors").exists():
        raise UserError(f"{ALIGNED} holds no model; `make demo-checkpoint` makes it")
    with _fresh_folder(output) as folder:
        training = write_dataset(folder / "training", split="train", count=TRAINING_QUESTIONS, seed=seed)
        held_out = write_dataset(folder / "held_out", split="held_out", count=HELD_OUT_QUESTIONS, seed=seed + 1)
        outcomes = {}
        for method in methods:
            print(f"\n{method}: {SETTINGS['max_steps']} steps of {SETTINGS['batch_size']}", flush=True)
            config = TrainConfig(
                model=str(ALIGNED), data=str(training), images=str(training.parent / "images"),
                output=str(folder / method), seed=seed, **METHODS[method], **SETTINGS,
            )  # fmt: skip
            outcomes[method] = _measure(train(config), held_out, training, seed)
        report = {
            "accuracy": {method: outcome.accuracy for method, outcome in outcomes.items()}
            | {"guessing": _guessing(training, held_out)},
            "kl": {method: outcome.kl for method, outcome in outcomes.items()},
            "steps_per_second": {method: outcome.steps_per_second for method, outcome in outcomes.items()},
            "bytes_for_backward": {method: outcome.bytes_for_backward for method, outcome in outcomes.items()},
            "settings": SETTINGS | {"questions": HELD_OUT_QUESTIONS, "severities": SEVERITIES},
            "seconds": round(time.perf_counter() - start, 1),
            "seed": seed,
        }
        save_json(folder / "report.json", report)
        draw(report, folder / "report.png")
    print("\n" + table(report) + f"\n\nThe report, the plot and the models are in {output}.")
    return report


def _measure(result: TrainResult, held_out: Path, training: Path, seed: int) -> Outcome:
    task = Exact(held_out, held_out.parent / "images")
    shifts = [Condition(Shift(kind, severity)) for kind in KINDS for severity in SEVERITIES]
    asking = Asking(max_new_tokens=6, seed=seed)
    with progress_bar(len(task.samples) * (1 + len(shifts)), "evaluating") as progress:

        def answers(condition: Condition) -> dict[str, str | None]:
            found: dict[str, str | None] = {}
            for batch in ask(result.model, result.processor, batches(task.samples, 100), condition, asking):
                found |= {each.id: each.text for each in batch}
                progress.update(len(batch))
            return found

        clean = answers(CLEAN)
        shifted: dict[str, dict[str, float]] = defaultdict(dict)
        for condition in shifts:
            assert condition.image is not None
            kind, severity = condition.image
            shifted[kind][str(severity)] = _accuracy(task, answers(condition))

    accuracy = {
        "clean": _accuracy(task, clean),
        "shifted": round(sum(sum(each.values()) for each in shifted.values()) / len(shifts), 4),
        "by_question": {kind: _accuracy(task, clean, kind) for kind in sorted(task.groups)},
        "by_shift": dict(shifted),
    }
    last = next(log for log in reversed(result.history) if "loss" in log)
    kl = {"vision": last["kl_vision"], "text": last["kl_text"]} if "kl_vision" in last else None
    steps_per_second = round(result.steps / result.seconds, 2)
    return Outcome(accuracy, kl, steps_per_second, _kept_for_backward(result, training))


def _accuracy(task: Exact, answers: dict[str, str | None], kind: str | None = None) -> float:
    return round(task.score(answers, kind)["accuracy"] / 100, 4)


def _kept_for_backward(result: TrainResult, training: Path) -> int:
    """Bytes of all tensors that one training step's forward pass keeps, parameters aside."""
    model, items = result.model, _items(training)
    batch = Collator(result.processor)([next(items) for _ in range(SETTINGS["batch_size"])])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**(batch if hasattr(model, "bottleneck") else _without_mask(batch))).loss
    model.eval()
    del loss
    return sum(size for address, size in kept.items() if address not in parameters)


def _without_mask(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "instruction_mask"}


def _guessing(training: Path, held_out: Path) -> float:
    """Accuracy of always giving the training set's most frequent answer to that kind of question."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in _records(training):
        answers[record["kind"]][record["conversations"][-1]["value"]] += 1
    majority = {kind: counter.most_common(1)[0][0] for kind, counter in answers.items()}
    return _mean([record["conversations"][-1]["value"] == majority[record["kind"]] for record in _records(held_out)])


def _records(data: Path) -> list[dict[str, Any]]:
    return json.loads(data.read_text(encoding="utf-8"))


def _items(data: Path) -> Iterator[Any]:
    dataset = LlavaDataset(data, data.parent / "images")
    return (dataset[index] for index in range(len(dataset)))


def _mean(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)


@contextmanager
def _fresh_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place once all is written: a run that fails leaves the old one."""
    folder = output.with_name(f".{output.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(output, ignore_errors=True)
    folder.replace(output)
