"""``vittle demon``: a model on DEMON's tasks, or predictions made elsewhere, and the published table.

Results have the benchmark's own layout, a folder for each task with ``pred.json``, ``eval.json`` and
``eval_score.json``; beside those folders are ``demon.json`` and ``demon.md``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from vittle.data.lines import integer_of, read_json, read_list
from vittle.errors import UserError, must_be_at_least, shown
from vittle.evaluation import SETTINGS, SUMMARY, EvaluateConfig, load, prepared
from vittle.files import save_json, save_text
from vittle.metrics.demon import CATEGORIES, FULL_ONLY, QUESTION_TYPES, category_scores, must_be_a_task
from vittle.shifts import CLEAN
from vittle.tasks import Sample
from vittle.tasks.demon import CORE, Demon

PREDICTIONS, SCORE, SCORES = "pred.json", "eval.json", "eval_score.json"
RESULT, PAGE = "demon.json", "demon.md"


def run(
    data: str | Path, model: str, output: str | Path, *, tasks: Sequence[str] = (), limit: int | None = None,
    batch_size: int = 16, max_new_tokens: int | None = None, workers: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Asks a model the questions of DEMON's tasks, going on with what the output holds, and scores its answers.

    A sample with a broken image scores 0.

    Args:
        data: the benchmark's folder, with `TASK/core/core.json`.
        model: folder or Hub id; adapters and methods are found there.
        output: folder of the results.
        tasks: folders in data; none: all there are.
        limit: the first samples of each task only.
        batch_size: questions at a time.
        max_new_tokens: where an answer is cut; None: 300, as in the released runner.
        workers: processes that decode images.

    Returns:
        What ``demon.json`` holds.

    Raises:
        UserError: a file is not as it must be, before any question is asked; or a setting, the model or the output
            cannot be used.
    """
    output, loaded, by_folder = Path(output), cache(load), _tasks(Path(data), tasks)

    def config(folder: Path) -> EvaluateConfig:
        return EvaluateConfig(
            model=model, task="demon", output=str(output / folder.name), data=str(folder), limit=limit,
            batch_size=batch_size, max_new_tokens=max_new_tokens, workers=workers,
        )  # fmt: skip

    results: dict[str, Any] = {}
    with ExitStack() as stack:
        runs = {folder: stack.enter_context(prepared(config(folder))) for folder in by_folder}
        for folder, task in by_folder.items():
            broken = runs[folder].carried_out(loaded)["broken"]
            answers = {each.id: each.text or "" for each in runs[folder].evaluation.answers(CLEAN)}
            samples = task.samples[:limit]
            predictions = [
                {"sample_id": int(each.id), "pred_response": answers[each.id], "gt_response": each.reference}
                for each in samples
            ]
            save_json(output / folder.name / PREDICTIONS, predictions)
            results[task.name] = _scored(output / folder.name, task, samples, answers, broken)
    return _finish(output, {"model": model, "limit": limit, "tasks": results})


def score(
    data: str | Path, predictions: str | Path, *, tasks: Sequence[str] = (), limit: int | None = None
) -> dict[str, Any]:
    """Scores `TASK/pred.json` files, wherever they were made, and writes the scores beside them.

    The model and the samples with broken images are known where the predictions are those of :func:`run`.

    Args:
        data: the benchmark's folder, with `TASK/core/core.json`, whose references count.
        predictions: folder with `TASK/pred.json`.
        tasks: folders in both; none: all that have predictions.
        limit: the predictions are of the first samples of each task only.

    Returns:
        What ``demon.json`` holds.

    Raises:
        UserError: a file is missing or not as it must be; nothing is written.
    """
    output = Path(predictions)
    if limit is not None:
        must_be_at_least(limit=(limit, 1))
    names = tasks or [path.parent.name for path in output.glob(f"*/{PREDICTIONS}")]
    if not names:
        raise UserError(f"predictions {predictions} has no TASK/{PREDICTIONS}; must be a folder with such files")
    loaded = _tasks(Path(data), names)
    answers = {
        folder: _predictions(output / folder.name / PREDICTIONS, task.samples[:limit])
        for folder, task in loaded.items()
    }
    asked = {folder: _asked(output / folder.name) for folder in loaded}
    models = {digest: model for model, digest, _ in asked.values() if digest}
    if len(models) > 1:
        raise UserError(f"predictions {predictions} are of models {shown(list(models.values()))}; must be of one")
    model = next(iter(models.values()), None) if all(digest for _, digest, _ in asked.values()) else None
    results = {
        task.name: _scored(output / folder.name, task, task.samples[:limit], answers[folder], asked[folder][2])
        for folder, task in loaded.items()
    }
    return _finish(output, {"model": model, "limit": limit, "tasks": results})


def page(found: Mapping[str, Any]) -> str:
    """What ``demon.json`` holds, in Markdown of 80 columns: the score of each task, and the published table."""
    results, categories = found["tasks"], found["categories"]
    rows = [["category", "task", "metric", "samples", "score"]]
    rows += [
        [each["category"], name, each["metric"], str(each["samples"]), f"{100 * each['score']:.2f}"]
        for name, each in results.items()
    ]
    scores = [f"{categories[name]:.2f}" if name in categories else "-" for name in CATEGORIES]
    covered = [
        f"{sum(task in results for task in tasks)}/{sum(task in results or task not in FULL_ONLY for task in tasks)}"
        for tasks in CATEGORIES.values()
    ]
    parts = ["# DEMON", f"Model: {found['model']}"] if found["model"] else ["# DEMON"]
    parts += [_markdown(rows), _markdown([["", *CATEGORIES], ["score", *scores], ["tasks", *covered]])]
    broken = [reason for each in results.values() for reason in each.get("broken", {}).values()]
    if broken:
        parts.append(f"{len(broken)} samples have broken images and score 0. The first: {broken[0]}")
    return "\n\n".join(parts)


def _tasks(data: Path, names: Sequence[str]) -> dict[Path, Demon]:
    """The tasks by their folders, in the order of the published table, all read; none named: all there are."""
    folders = {path.parents[1].name: path.parents[1] for path in sorted(data.glob(f"*/{CORE}"))}
    if not folders:
        raise UserError(f"data {data} has no TASK/{CORE}; must be DEMON's folder")
    for name in names:
        if name not in folders:
            near = difflib.get_close_matches(name, folders) or folders
            raise UserError(f"task {name!r} is not in data {data}; must be such as {', '.join(near)}")
    loaded: dict[str, tuple[Path, Demon]] = {}
    for name in names or folders:
        task = Demon(folders[name])
        must_be_a_task(task.name)
        earlier, _ = loaded.setdefault(task.name, (folders[name], task))
        if earlier != folders[name]:
            raise UserError(f"{earlier} and {folders[name]} are both {task.name}; name one of them as a task")
    return dict(loaded[name] for name in QUESTION_TYPES if name in loaded)


def _predictions(path: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """The answers in a ``pred.json``, one to each sample."""
    answers: dict[str, str] = {}
    records, ids = list(read_list(path)), {sample.id for sample in samples}
    if len(records) != len(samples):
        raise UserError(f"{path} has {len(records)} predictions; must have {len(samples)}, one for each sample")
    for place, record in records:
        id, answer = str(integer_of(record, "sample_id", place)), record.get("pred_response")
        if id not in ids or id in answers:
            what = "which stands twice" if id in answers else "which no sample has"
            raise UserError(f"{place}: `sample_id` is {id}, {what}; must be each sample's once")
        if not isinstance(answer, str):
            found = "missing" if "pred_response" not in record else shown(answer)
            raise UserError(f"{place}: `pred_response` is {found}; must be text")
        answers[id] = answer
    return answers


def _asked(folder: Path) -> tuple[str, str, Mapping[str, str]]:
    """The model of predictions, its digest, and why samples were not asked; nothing where another has made them."""
    path = folder / SUMMARY
    if not (path.exists() and (folder / SETTINGS).exists()):
        return "", "", {}
    found = read_json(path)
    try:
        return found["settings"]["model"], found["settings"]["model_sha256"], dict(found["broken"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _scored(
    folder: Path, task: Demon, samples: Sequence[Sample], answers: Mapping[str, str], broken: Mapping[str, str]
) -> dict[str, Any]:
    """Writes both files of scores; returns what ``demon.json`` has of the task."""
    broken = {id: reason for id, reason in broken.items() if answers.get(id) == ""}
    scores = {each.id: task.score_of(each, answers[each.id]) * (each.id not in broken) for each in samples}
    mean = fmean(scores.values())
    save_json(folder / SCORE, {"Rouge-L f" if task.is_open_ended else "Accuracy": mean})
    save_json(folder / SCORES, [{"id": id, "score": str(round(value, 3))} for id, value in scores.items()])
    category = next(category for category, tasks in CATEGORIES.items() if task.name in tasks)
    metric = "ROUGE-L" if task.is_open_ended else "accuracy"
    return {"category": category, "metric": metric, "samples": len(scores), "score": mean, "broken": broken}


def _finish(output: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Adds the categories; writes the result and its page."""
    found["categories"] = category_scores({name: each["score"] for name, each in found["tasks"].items()})
    save_json(output / RESULT, found)
    save_text(output / PAGE, page(found) + "\n")
    return found


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )
    return "\n".join([head, "|".join(["", *("-" * (width + 2) for width in widths), ""]), *body])
