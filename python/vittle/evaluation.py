"""``vittle evaluate``: one model on one task under many conditions, in a folder that a broken-off run goes on in.

The folder holds what was asked and answered, a file of JSON lines for each condition; a summary; and a report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vittle.data.lines import LineWriter, read_lines
from vittle.data.llava import MARKER
from vittle.endpoint import Endpoint
from vittle.errors import UserError, shown
from vittle.evaluate import Answer, Asking, ask, batches, progress_bar
from vittle.judge import Verdict, judge
from vittle.methods.saving import write_json
from vittle.metrics.layers import layer_jsd, layer_states
from vittle.models import fingerprint, load_processor, load_tuned, quiet
from vittle.shifts import CLEAN, Condition, parse_conditions
from vittle.shifts.translation import Translations
from vittle.tasks import Sample, Task, load_task

SETTINGS, SUMMARY, LAYERS = "evaluation.json", "summary.json", "layer_jsd.json"
ANSWERS, VERDICTS, SCENES = "answers", "verdicts", "scenes"
"""Folders in the output: files by condition, and the digit scenes where they are the task."""

JUDGES = 8
"""Requests to a judge at a time."""


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation."""

    model: str
    task: str
    output: str
    data: str | None = None
    images: str | None = None
    shifts: tuple[str, ...] = ()
    translations: str | None = None
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    seed: int = 0
    workers: int = 2
    judge_url: str | None = None
    judge_model: str | None = None
    layer_jsd: bool = False


class Evaluation:
    """A folder with the answers of one model to one task, under the conditions that were asked for so far."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], task: Task, samples: Sequence[Sample]) -> None:
        self.folder, self.settings, self.task = folder, settings, task
        self.batches = batches(samples, settings["batch_size"])
        self.samples = [sample for batch in self.batches for sample in batch]
        """In the order in which they are asked."""
        self.conditions = parse_conditions(settings["conditions"], settings["languages"])

    def answers(self, condition: Condition) -> list[Answer]:
        """Those that are there, in the order in which they are asked.

        Raises:
            UserError: they are of other samples.
        """
        path = self._file(ANSWERS, condition)
        found: list[Answer] = []
        for place, record in _lines(path):
            expected = self.samples[len(found)].id if len(found) < len(self.samples) else None
            if record.get("id") != expected:
                raise UserError(f"{place} answers {shown(record.get('id'))}; the task has {shown(expected)} there")
            found.append(Answer(record["id"], record["question"], record.get("answer"), record.get("error", "")))
        return found

    def verdicts(self, condition: Condition) -> dict[str, Verdict]:
        """The judge's, by sample."""
        lines = _lines(self._file(VERDICTS, condition))
        return {record.pop("id"): Verdict(**record) for _, record in lines}

    def scored(self, condition: Condition) -> dict[str, Any]:
        """What the task counts, by sample: answers, or verdicts on them; samples without are left out."""
        if self.task.is_judged:
            return dict(self.verdicts(condition))
        return {each.id: each.text for each in self.answers(condition) if each.text is not None}

    def is_answered(self, condition: Condition) -> bool:
        """Whether all samples have been asked under it."""
        return len(self.answers(condition)) == len(self.samples)

    def run(self, model: Any, processor: Any, condition: Condition, asking: Asking) -> Iterator[int]:
        """Asks what has not been asked; yields how many answers came, those that were there first.

        Answers are written a batch at a time; of one that was broken off, none counts: its samples are asked together
        again, as padding makes their answers depend on each other's lengths in the last bits.
        """
        with LineWriter(self._file(ANSWERS, condition)) as writer:
            there, whole, kept = len(self.answers(condition)), 0, 0
            for batch in self.batches:
                if kept + len(batch) > there:
                    break
                whole, kept = whole + 1, kept + len(batch)
            writer.keep(kept)
            yield kept
            for answers in ask(model, processor, self.batches[whole:], condition, asking):
                writer.append(_record(each, self.task.by_id[each.id]) for each in answers)
                yield len(answers)

    def judge(self, condition: Condition, endpoint: Endpoint) -> Iterator[int]:
        """Asks for the verdicts that are not there; yields how many came, those that were there first."""
        with LineWriter(self._file(VERDICTS, condition)) as writer:
            done = self.verdicts(condition)
            todo = [each for each in self.answers(condition) if each.text is not None and each.id not in done]
            yield len(done)

            def verdict(answer: Answer) -> Verdict:
                sample = self.task.by_id[answer.id]
                question = answer.question.replace(MARKER, "").strip()
                return judge(question, sample.context, sample.reference, answer.text or "", endpoint.complete)

            with ThreadPoolExecutor(JUDGES) as pool:
                try:
                    for answer, each in zip(todo, pool.map(verdict, todo), strict=True):
                        writer.append([{"id": answer.id, **asdict(each)}])
                        yield 1
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def layers(self) -> dict[str, dict[str, list[float]]]:
        """The representation JSD after each layer, by condition and modality, where it was measured."""
        return _read_json(self.folder / LAYERS) if (self.folder / LAYERS).exists() else {}

    def summary(self) -> dict[str, Any]:
        """The metrics under every condition whose answers, and verdicts if it is judged, are all there."""
        conditions, broken = dict[str, dict[str, Any]](), dict[str, str]()
        for condition in self.conditions:
            if not self.is_answered(condition):
                continue
            answers, scored = self.answers(condition), self.scored(condition)
            broken |= {each.id: each.error for each in answers if each.error}
            if not scored:
                continue
            conditions[condition.name] = {
                "group": condition.group,
                "answered": sum(each.text is not None for each in answers),
                "metrics": self.task.score(scored),
                "groups": {group: self.task.score(scored, group) for group in self.task.groups},
            }
        headline = self.task.headline
        means = {
            group: [each["metrics"][headline] for each in conditions.values() if each["group"] == group]
            for group in ("clean", "image", "text", "joint")
        }
        return {
            "settings": dict(self.settings),
            "headline": headline,
            "means": {group: sum(values) / len(values) for group, values in means.items() if values},
            "conditions": conditions,
            "layer_jsd": self.layers(),
            "broken": broken,
        }

    def _file(self, kind: str, condition: Condition) -> Path:
        return self.folder / kind / f"{condition.file_name}.jsonl"


def open_evaluation(folder: str | Path) -> Evaluation:
    """An evaluation that a folder holds.

    Raises:
        UserError: it holds none, or the task's files have changed since.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    task = load_task(settings["task"], settings["data"], settings["images"], folder / SCENES)
    samples = task.samples[: settings["limit"]]
    if _digest(samples) != settings["samples_sha256"]:
        raise UserError(f"{folder} holds answers to other samples than {settings['data'] or settings['task']} has now")
    return Evaluation(folder, settings, task, samples)


def load(model: str) -> tuple[Any, Any]:
    """A model on its device, bf16 on a GPU, and its processor.

    Raises:
        UserError: there is no such model.
    """
    on_gpu = torch.cuda.is_available()
    with quiet():
        tuned = load_tuned(model, torch.bfloat16 if on_gpu else torch.float32)
    return tuned.to("cuda" if on_gpu else "cpu"), load_processor(model)


def evaluate(config: EvaluateConfig, load: Callable[[str], tuple[Any, Any]] = load) -> dict[str, Any]:
    """Asks, judges, and writes the summary; goes on with what ``config.output`` holds. Returns the summary.

    Args:
        config: the evaluation.
        load: how ``config.model`` becomes a model and its processor, if any question is left.

    Raises:
        UserError: a setting, the model, the task or the folder cannot be used, or a judge's endpoint fails; what is
            done is kept.
    """
    evaluation, asking = _begin(config)
    loaded = partial(load, config.model)
    _ask(evaluation, loaded, asking)
    if evaluation.task.is_judged:
        _judge(evaluation, config)
    if config.layer_jsd:
        _measure_layers(evaluation, loaded, asking)
    summary = evaluation.summary()
    write_json(evaluation.folder / SUMMARY, summary)
    return summary


def _begin(config: EvaluateConfig) -> tuple[Evaluation, Asking]:
    """The folder, made or found to be of the same settings."""
    folder = Path(config.output)
    for name in ("batch_size", "limit", "max_new_tokens"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise UserError(f"{name} is {value}; must be at least 1")
    is_new = not (folder / SETTINGS).exists()
    if is_new and folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {SCENES}):
        raise UserError(f"output {folder} is not empty and holds no evaluation; name another folder")
    translations = Translations.read(config.translations) if config.translations else None
    languages = translations.languages if translations else []
    conditions = [each.name for each in parse_conditions(config.shifts, languages)]
    task = load_task(config.task, config.data, config.images, folder / SCENES)
    if task.is_judged and not (config.judge_url and config.judge_model):
        raise UserError(f"task {config.task} needs a judge: --judge-url and --judge-model")
    samples = task.samples[: config.limit]
    _must_be_translated(samples, translations)
    asking = Asking(
        config.batch_size, config.max_new_tokens or task.max_new_tokens, config.seed, config.workers,
        translations.text if translations else None,
    )  # fmt: skip
    settings = {
        "model": config.model,
        "model_sha256": fingerprint(config.model),
        "task": config.task,
        "data": config.data and str(Path(config.data).resolve()),
        "images": config.images and str(Path(config.images).resolve()),
        "samples_sha256": _digest(samples),
        "limit": config.limit,
        "batch_size": asking.batch_size,
        "max_new_tokens": asking.max_new_tokens,
        "seed": asking.seed,
        "languages": languages,
        "judge_model": config.judge_model if task.is_judged else None,
        "conditions": conditions,
    }
    if not is_new:
        earlier = _read_settings(folder)
        _must_be_the_same(folder, earlier, settings)
        settings["conditions"] = list(dict.fromkeys([*earlier["conditions"], *conditions]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
    except OSError as error:
        raise UserError(f"output {folder} cannot be written: {error.strerror}") from error
    return Evaluation(folder, settings, task, samples), asking


def _must_be_translated(samples: Sequence[Sample], translations: Translations | None) -> None:
    """Each question in each language, with its markers."""
    for language in translations.languages if translations else ():
        for sample in samples:
            text = translations.text(sample.id, language) if translations else ""
            if text.count(MARKER) != sample.question.count(MARKER):
                raise UserError(
                    f"{language} text of id {shown(sample.id)} has {text.count(MARKER)} {MARKER} marker(s); must have "
                    f"{sample.question.count(MARKER)}, as the question"
                )


_NOT_COMPARED = ("model", "data", "images", "conditions")
"""Settings that others stand for, or that may grow."""


def _must_be_the_same(folder: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    names = {"model_sha256": "model", "samples_sha256": "data"}
    for name, value in settings.items():
        if name not in _NOT_COMPARED and earlier.get(name) != value:
            told = names.get(name, name)
            here, there = settings[told], earlier.get(told)
            what = f"its {told} was {shown(there)}, now it is {shown(here)}"
            if here == there:
                what = f"its {told}, {shown(here)}, has changed since"
            raise UserError(f"output {folder} holds another evaluation: {what}; name another folder")


def _ask(evaluation: Evaluation, load: Callable[[], tuple[Any, Any]], asking: Asking) -> None:
    todo = [each for each in evaluation.conditions if not evaluation.is_answered(each)]
    if not todo:
        return
    model, processor = load()
    with progress_bar(len(todo) * len(evaluation.samples), "answering") as bar:
        for condition in todo:
            bar.set_description(condition.name[:24])
            for count in evaluation.run(model, processor, condition, asking):
                bar.update(count)


def _measure_layers(evaluation: Evaluation, load: Callable[[], tuple[Any, Any]], asking: Asking) -> None:
    """Adds what is missing to the folder's divergences, a condition at a time."""
    path, found = evaluation.folder / LAYERS, evaluation.layers()
    todo = [each for each in evaluation.conditions if each != CLEAN and each.name not in found]
    if not todo:
        return
    model, processor = load()
    with progress_bar((1 + len(todo)) * len(evaluation.samples), "states of layers") as bar:
        clean, *shifted = (
            partial(layer_states, model, processor, evaluation.batches, each, asking, bar.update)
            for each in (CLEAN, *todo)
        )
        states = clean()
        for condition, measure in zip(todo, shifted, strict=True):
            found[condition.name] = layer_jsd(states, measure())
            write_json(path, found)


def _judge(evaluation: Evaluation, config: EvaluateConfig) -> None:
    assert config.judge_url and config.judge_model
    endpoint = Endpoint(config.judge_url, config.judge_model)
    with progress_bar(len(evaluation.conditions) * len(evaluation.samples), "judging") as bar:
        for condition in evaluation.conditions:
            for count in evaluation.judge(condition, endpoint):
                bar.update(count)
    if endpoint.retries:
        print(f"the judge's endpoint was asked again {endpoint.retries} times")


def _record(answer: Answer, sample: Sample) -> dict[str, Any]:
    told = {"error": answer.error} if answer.error else {"answer": answer.text}
    return {"id": answer.id, "question": answer.question, **told, "reference": sample.reference}


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_lines(path, may_be_cut=True) if path.exists() else iter(())


def _read_settings(folder: Path) -> dict[str, Any]:
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder} holds no evaluation; vittle evaluate writes {SETTINGS} there")
    return _read_json(folder / SETTINGS)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _digest(samples: Sequence[Sample]) -> str:
    """Of all that is asked, images by their paths."""
    text = json.dumps([asdict(sample) | {"images": [path.name for path in sample.images]} for sample in samples])
    return hashlib.sha256(text.encode()).hexdigest()
