"""``vittle evaluate``: one model on one task under many conditions, in a folder that a broken-off run goes on in.

The folder holds what was asked and answered, a file of JSON lines for each condition; a summary; and a report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from vittle.data.lines import LineWriter, id_of, read_lines
from vittle.data.llava import MARKER
from vittle.endpoint import Endpoint
from vittle.errors import UserError, must_be_at_least, shown
from vittle.evaluate import Answer, Asking, ask, batches, progress_bar
from vittle.files import save_json
from vittle.judge import Verdict, judge
from vittle.locks import alone_in
from vittle.metrics.layers import LayerJSD, layer_states
from vittle.models import fingerprint, load_processor, load_tuned, quiet
from vittle.shifts import CLEAN, Condition, parse_conditions, text_shift
from vittle.shifts.text import SYNONYM_SHIFTS
from vittle.shifts.translation import Translations
from vittle.tasks import Sample, Task, load_task

SETTINGS, SUMMARY, LAYERS = "evaluation.json", "summary.json", "layer_jsd.json"
ANSWERS, VERDICTS, SCENES = "answers", "verdicts", "scenes"
"""Folders in the output: files by condition, and the digit scenes where they are the task."""


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
            question, text, error = (record.get(name) for name in ("question", "answer", "error"))
            if not isinstance(question, str) or not isinstance(text if error is None else error, str):
                raise UserError(f"{place} is {shown(record)}; must have `question`, and `answer` or `error`, all texts")
            found.append(Answer(record["id"], question, text, error or ""))
        return found

    def verdicts(self, condition: Condition) -> dict[str, Verdict]:
        """The judge's, by sample."""
        lines = _lines(self._file(VERDICTS, condition))
        return {id_of(record, "id", place): _verdict(record, place) for place, record in lines}

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
        """Asks for the verdicts that are not there; yields how many came, those that were there first.

        The judge reads the question as it is in the task, not shifted: it is the model that is measured.
        """
        with LineWriter(self._file(VERDICTS, condition)) as writer:
            done = self.verdicts(condition)
            todo = [each for each in self.answers(condition) if each.text is not None and each.id not in done]
            yield len(done)

            def verdict(answer: Answer) -> Verdict:
                sample = self.task.by_id[answer.id]
                question = sample.question.replace(MARKER, "").strip()
                return judge(question, sample.context, sample.reference, answer.text or "", endpoint.complete)

            for answer, each in endpoint.each(verdict, todo):
                writer.append([{"id": answer.id, **asdict(each)}])
                yield 1

    def layers(self) -> dict[str, dict[str, list[float]]]:
        """The representation JSD after each layer, by condition and modality, where it was measured."""
        return _read_json(self.folder / LAYERS) if (self.folder / LAYERS).exists() else {}

    def summary(self) -> dict[str, Any]:
        """The metrics under every condition whose answers are all there, over the verdicts there are if judged."""
        conditions, broken = dict[str, dict[str, Any]](), dict[str, str]()
        judge_failures: dict[str, dict[str, int]] = {}
        for condition in self.conditions:
            answers = self.answers(condition)
            if len(answers) < len(self.samples):
                continue
            broken |= {each.id: each.error for each in answers if each.error}
            scored: dict[str, Any] = {each.id: each.text for each in answers if each.text is not None}
            if self.task.is_judged:
                scored = dict(self.verdicts(condition))
            if not scored:
                continue
            groups = {self.task.by_id[id].group for id in scored}
            conditions[condition.name] = {
                "group": condition.group,
                "answered": sum(each.text is not None for each in answers),
                "metrics": self.task.score(scored),
                "groups": {group: self.task.score(scored, group) for group in self.task.groups if group in groups},
            }
            if self.task.is_judged and (replies := sum(each.failures for each in scored.values())):
                unjudged = sum(not self.task.is_scored(each) for each in scored.values())
                judge_failures[condition.name] = {"answers": unjudged, "replies": replies}
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
            "judge_failures": judge_failures,
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
    if digest(samples) != settings["samples_sha256"]:
        raise UserError(f"{folder} holds answers to other samples than {settings['data'] or settings['task']} has now")
    return Evaluation(folder, settings, task, samples)


def load(model: str) -> tuple[Any, Any]:
    """A model on its device, bf16 on a GPU, and its processor.

    Raises:
        UserError: there is no such model, or its processor has no chat template.
    """
    processor = load_processor(model)
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"model is {model!r}, whose processor has no chat template; must have one, to be asked")
    with quiet():
        tuned = load_tuned(model, _dtype())
    return tuned.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def evaluate(config: EvaluateConfig, load: Callable[[str], tuple[Any, Any]] = load) -> dict[str, Any]:
    """Asks, judges, and writes the summary; goes on with what ``config.output`` holds. Returns the summary.

    Args:
        config: the evaluation.
        load: how ``config.model`` becomes a model and its processor, if any question is left.

    Raises:
        UserError: a setting, the model, the task or the folder cannot be used, or a judge's endpoint fails; what is
            done is kept.
    """
    with prepared(config) as run:
        return run.carried_out(load)


@contextmanager
def prepared(config: EvaluateConfig) -> Iterator[Run]:
    """An evaluation that can begin: its folder is locked, and all is checked but the model.

    Raises:
        UserError: as :func:`evaluate`; no setting and no answer is written.
    """
    with alone_in(_usable(Path(config.output))):
        yield _checked(config)


@dataclass(frozen=True)
class Run:
    """What one call does in the folder of an evaluation."""

    config: EvaluateConfig
    evaluation: Evaluation
    asking: Asking
    conditions: list[Condition]
    """That it was asked for; the folder may hold more."""
    endpoint: Endpoint | None
    """Of the judge."""

    def carried_out(self, load: Callable[[str], tuple[Any, Any]]) -> dict[str, Any]:
        """As :func:`evaluate`."""
        loaded = cache(partial(load, self.config.model))
        if not all(map(self.evaluation.is_answered, self.conditions)):
            loaded()  # before anything is written
        save_json(self.evaluation.folder / SETTINGS, self.evaluation.settings)
        _ask(self, loaded)
        if self.endpoint is not None:
            _judge(self, self.endpoint)
        summary = _summarized(self.evaluation)
        if self.config.layer_jsd:
            _measure_layers(self, loaded)
            summary = _summarized(self.evaluation)
        return summary


def _summarized(evaluation: Evaluation) -> dict[str, Any]:
    summary = evaluation.summary()
    save_json(evaluation.folder / SUMMARY, summary)
    return summary


def _usable(folder: Path) -> Path:
    """A folder of an evaluation, or one that may become one."""
    if (folder / SETTINGS).exists() or not folder.exists():
        return folder
    if not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {SCENES, ".lock"}):
        raise UserError(f"output {folder} is not empty and holds no evaluation; name another folder")
    return folder


def _checked(config: EvaluateConfig) -> Run:
    """What the folder becomes, or goes on with."""
    folder = Path(config.output)
    counts = {"batch_size": config.batch_size, "limit": config.limit, "max_new_tokens": config.max_new_tokens}
    must_be_at_least(workers=(config.workers, 0), **{n: (value, 1) for n, value in counts.items() if value is not None})
    if config.layer_jsd and config.limit == 1:
        raise UserError("limit is 1; must be at least 2 with layer_jsd, which compares distributions")
    translations = Translations.read(config.translations) if config.translations else None
    languages = translations.languages if translations else []
    conditions = parse_conditions(config.shifts, languages)
    for kind in {each.text.kind for each in conditions if each.text} & set(SYNONYM_SHIFTS):
        text_shift("a good day", kind, 1, seed=0)  # says now what of WordNet is missing
    task = load_task(config.task, config.data, config.images, folder / SCENES)
    judge = None
    if task.is_judged:
        if not (config.judge_url and config.judge_model):
            raise UserError(f"task {config.task} needs a judge: --judge-url and --judge-model")
        judge = Endpoint(config.judge_url, config.judge_model)
    samples = task.samples[: config.limit]
    _must_be_translated(samples, translations)
    asking = Asking(
        config.max_new_tokens or task.max_new_tokens, config.seed, config.workers,
        translations.text if translations else None,
    )  # fmt: skip
    settings = {
        "model": config.model,
        "model_sha256": fingerprint(config.model),
        "dtype": str(_dtype()).removeprefix("torch."),
        "task": config.task,
        "data": config.data and str(Path(config.data).resolve()),
        "images": config.images and str(Path(config.images).resolve()),
        "limit": config.limit,
        "batch_size": config.batch_size,
        "max_new_tokens": asking.max_new_tokens,
        "seed": asking.seed,
        "judge_model": config.judge_model if judge else None,
        "samples_sha256": digest(samples),
        "languages": {each: _digest_of_texts(samples, translations, each) for each in languages},
        "conditions": [each.name for each in conditions],
    }
    if (folder / SETTINGS).exists():
        settings = _joined(folder, _read_settings(folder), settings)
    return Run(config, Evaluation(folder, settings, task, samples), asking, conditions, judge)


def _dtype() -> torch.dtype:
    """Of the model: bf16 on a GPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _digest_of_texts(samples: Sequence[Sample], translations: Translations | None, language: str) -> str:
    assert translations is not None
    texts = [translations.text(sample.id, language) for sample in samples]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


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


_NOT_COMPARED = ("model", "data", "images", "conditions", "languages")
"""Settings that others stand for, or that may grow."""


def _joined(folder: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a folder with the conditions and languages that come now.

    Raises:
        UserError: it is another evaluation.
    """
    names = {"model_sha256": "model", "samples_sha256": "data"}
    for name, value in settings.items():
        if name not in _NOT_COMPARED and earlier.get(name) != value:
            told = names.get(name, name)
            here, there = settings[told], earlier.get(told)
            what = f"its {told} was {shown(there)}, now it is {shown(here)}"
            if here == there:
                what = f"its {told}, {shown(here)}, has changed since"
            raise UserError(f"output {folder} holds another evaluation: {what}; name another folder")
    for language, of_texts in settings["languages"].items():
        if earlier["languages"].get(language, of_texts) != of_texts:
            raise UserError(f"output {folder} holds answers to another {language} translation; name another folder")
    return {
        **settings,
        "conditions": list(dict.fromkeys([*earlier["conditions"], *settings["conditions"]])),
        "languages": {**earlier["languages"], **settings["languages"]},
    }


def _ask(run: Run, load: Callable[[], tuple[Any, Any]]) -> None:
    todo = [each for each in run.conditions if not run.evaluation.is_answered(each)]
    if not todo:
        return
    model, processor = load()
    with progress_bar(len(todo) * len(run.evaluation.samples), "answering") as bar:
        for condition in todo:
            bar.set_description(condition.name[:24])
            for count in run.evaluation.run(model, processor, condition, run.asking):
                bar.update(count)


def _measure_layers(run: Run, load: Callable[[], tuple[Any, Any]]) -> None:
    """Adds what is missing to the folder's divergences, a condition at a time."""
    evaluation = run.evaluation
    path, found = evaluation.folder / LAYERS, evaluation.layers()
    todo = [each for each in run.conditions if each != CLEAN and each.name not in found]
    if not todo:
        return
    model, processor = load()
    with progress_bar((1 + len(todo)) * len(evaluation.samples), "states of layers") as bar:
        clean, *shifted = (
            partial(layer_states, model, processor, evaluation.batches, each, run.asking, bar.update)
            for each in (CLEAN, *todo)
        )
        measured = LayerJSD(clean())
        for condition, states in zip(todo, shifted, strict=True):
            found[condition.name] = measured(states())
            save_json(path, found)


def _judge(run: Run, endpoint: Endpoint) -> None:
    with progress_bar(len(run.conditions) * len(run.evaluation.samples), "judging") as bar:
        for condition in run.conditions:
            for count in run.evaluation.judge(condition, endpoint):
                bar.update(count)
    if endpoint.retries:
        print(f"the judge's endpoint was asked again {endpoint.retries} times")


def _record(answer: Answer, sample: Sample) -> dict[str, Any]:
    told = {"error": answer.error} if answer.error else {"answer": answer.text}
    return {"id": answer.id, "question": answer.question, **told, "reference": sample.reference}


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return read_lines(path, may_be_cut=True) if path.exists() else iter(())


def _verdict(record: Mapping[str, Any], place: str) -> Verdict:
    model, reference, failures, reply = (record.get(name) for name in ("model", "reference", "failures", "reply"))
    are_scores = all(each is None or type(each) in (int, float) for each in (model, reference))
    if not (are_scores and isinstance(failures, int) and isinstance(reply, str)):
        raise UserError(f"{place} is {shown(record)}; must be as vittle evaluate writes verdicts")
    return Verdict(model, reference, failures, reply)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder} holds no evaluation; vittle evaluate writes {SETTINGS} there")
    settings = _read_json(path)
    for name, kind in _KINDS.items():
        if not isinstance(settings.get(name), kind):
            raise UserError(f"{path} has {name} {shown(settings.get(name))}; vittle evaluate of this version writes it")
    return settings


_KINDS: Mapping[str, Any] = {
    "task": str, "data": str | None, "images": str | None, "limit": int | None, "batch_size": int,
    "max_new_tokens": int, "seed": int, "judge_model": str | None, "samples_sha256": str, "languages": dict,
    "conditions": list,
}  # fmt: skip
"""What is read of a folder's settings."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def digest(samples: Sequence[Sample]) -> str:
    """Of all that is asked: texts, and the images' contents."""
    of_images: dict[Path, str] = {}
    for path in dict.fromkeys(path for sample in samples for path in sample.images):
        try:
            with path.open("rb") as file:
                of_images[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    asked = [asdict(sample) | {"images": [of_images[path] for path in sample.images]} for sample in samples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
