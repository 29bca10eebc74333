"""The page of an evaluation: tables, severity curves and example images in one file that needs no network."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

from PIL import Image

from vittle.data.llava import MARKER, decode
from vittle.errors import UserError
from vittle.evaluation import SUMMARY, Evaluation, open_evaluation
from vittle.pages import data_uri, write_page
from vittle.shifts import Condition
from vittle.tables import grid, languages, table
from vittle.tasks import Sample

REPORT = "report.html"

EXAMPLES = 4
_THUMBNAIL = (224, 224)
_TEXT = 400
"""Characters of an answer that are shown."""


@dataclass(frozen=True)
class Plot:
    """A title, what is to be seen, and the plot itself."""

    title: str
    text: str
    svg: str


@dataclass(frozen=True)
class Table:
    """Rows of cells that are already text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def show(folder: str) -> None:
    """Prints the table of the evaluation in a folder, and writes its page there."""
    evaluation = open_evaluation(folder)
    summary = evaluation.summary()
    write_report(evaluation, summary, Path(folder) / REPORT)
    print(table(summary))
    print(f"\nThe answers, {SUMMARY} and {REPORT} are in {folder}.")


def write_report(evaluation: Evaluation, summary: Mapping[str, Any], path: Path) -> None:
    """Writes the page, whole or not at all."""
    settings, headline = summary["settings"], summary["headline"]
    facts = {
        "Model": settings["model"],
        "Task": settings["task"] + (f", {settings['data']}" if settings["data"] else ""),
        "Questions": f"{len(evaluation.samples)} under each of {len(summary['conditions'])} conditions",
        "Answers": f"greedy, at most {settings['max_new_tokens']} tokens; seed of the shifts {settings['seed']}",
    }
    if settings["judge_model"]:
        facts["Judge"] = f"{settings['judge_model']}: 100 x its scores of the model / its scores of the references"
    write_page(
        path,
        "report.html.j2",
        title=f"{Path(settings['model']).name} on {settings['task']}",
        facts=facts,
        headline=headline.replace("_", " "),
        means={group: f"{value:.1f}" for group, value in summary["means"].items()},
        plots=list(_plots(summary)),
        tables=list(_tables(summary)),
        examples=list(_examples(evaluation, summary)),
        broken=list(summary["broken"].values()),
    )


def _plots(summary: Mapping[str, Any]) -> Iterator[Plot]:
    clean = summary["conditions"].get("clean", {}).get("metrics", {}).get(summary["headline"])
    for group, title in (("image", "Image shifts"), ("text", "Text shifts")):
        curves = {kind: row for kind, row in grid(summary, group).items() if len(row) > 1}
        if curves:
            text = f"{summary['headline'].replace('_', ' ').capitalize()} against severity; the dashed line is clean."
            yield Plot(title, text, _curves(curves, clean))
    if jsd := summary.get("layer_jsd"):
        text = "Representation JSD between clean and shifted states after each decoder layer, mean over the conditions."
        yield Plot("How far shifts move the states", text, _layers(jsd))


def _curves(curves: Mapping[str, Mapping[int, float]], clean: float | None) -> str:
    """A panel for each kind, all on one scale."""
    from matplotlib.figure import Figure

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel, (kind, row) in zip(panels, curves.items(), strict=False):
        if clean is not None:
            panel.axhline(clean, color="#5b6477", linewidth=0.9, linestyle="--")
        panel.plot(list(row), list(row.values()), marker="o", markersize=4, color="#1f5fbf")
        panel.set_title(kind.replace("_", " "), fontsize=9)
    for index, panel in enumerate(figure.axes):
        panel.set_visible(index < len(curves))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.set_ylim(bottom=0)
    return _svg(figure)


def _layers(jsd: Mapping[str, Mapping[str, list[float]]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panel = figure.subplots()
    for modality in ("vision", "text"):
        found = [each[modality] for each in jsd.values() if modality in each]
        if found:
            means = [sum(values) / len(values) for values in zip(*found, strict=True)]
            panel.plot(range(1, len(means) + 1), means, marker="o", markersize=4, label=f"{modality} tokens")
    panel.set_xlabel("after decoder layer", fontsize=9)
    panel.set_ylabel("JSD, nats", fontsize=9)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vittle"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    conditions, headline = summary["conditions"], summary["headline"]
    for group in ("image", "text"):
        if found := grid(summary, group):
            severities = sorted({each for row in found.values() for each in row})
            rows = [[kind, *(_number(row.get(each)) for each in severities)] for kind, row in found.items()]
            yield Table(
                f"{group.capitalize()} shifts: {headline.replace('_', ' ')}", ["severity", *map(str, severities)], rows
            )
    if found_languages := languages(summary):
        rows = [[language, _number(value)] for language, value in found_languages.items()]
        yield Table("Translations", ["", headline.replace("_", " ")], rows)
    joint = [
        [name, _number(each["metrics"][headline])] for name, each in conditions.items() if each["group"] == "joint"
    ]
    if joint:
        yield Table("Joint shifts", ["", headline.replace("_", " ")], joint)
    if clean := conditions.get("clean"):
        names = list(clean["metrics"])
        parts = {"all": clean["metrics"], **clean["groups"]}
        rows = [[part, *(_number(metrics.get(name)) for name in names)] for part, metrics in parts.items()]
        yield Table("Clean", ["", *(name.replace("_", " ") for name in names)], rows)
    if failures := summary.get("judge_failures"):
        rows = [[name, str(each["answers"]), str(each["replies"])] for name, each in failures.items()]
        yield Table("Failures of the judge", ["", "answers not judged", "replies without scores"], rows)


def _examples(evaluation: Evaluation, summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A few samples, each under the hardest severity of every kind; those that the shifts break come first."""
    whole = {each.name: each for each in evaluation.conditions if each.name in summary["conditions"]}
    hardest = {
        tuple(shift and shift.kind for shift in (condition.image, condition.text)): condition
        for condition in sorted(whole.values(), key=lambda condition: condition.name)
    }
    conditions = sorted(hardest.values(), key=evaluation.conditions.index)
    if not conditions:
        return
    answers = {each: {found.id: found for found in evaluation.answers(each)} for each in conditions}
    scored = {each: evaluation.scored(each) for each in conditions}

    def worth(condition: Condition, sample: Sample) -> float:
        if sample.id not in scored[condition]:
            return 0.0
        return evaluation.task.worth(sample, scored[condition][sample.id])

    def loss(sample: Sample) -> float:
        first, *others = (worth(each, sample) for each in conditions)
        judged = [each for each in others if not isnan(each)]
        return -inf if isnan(first) or not judged else first - sum(judged) / len(judged)

    whole_ones = [sample for sample in evaluation.samples[:500] if all(sample.id in each for each in scored.values())]
    for sample in sorted(whole_ones, key=loss, reverse=True)[:EXAMPLES]:
        looks = []
        for condition in conditions:
            answer, value = answers[condition][sample.id], worth(condition, sample)
            text = (answer.text or "(nothing)")[:_TEXT]
            mark = ("not judged: " if isnan(value) else f"{value:.0f}: ") if evaluation.task.is_judged else ""
            looks.append(
                {
                    "condition": condition.name,
                    "image": _thumbnail(sample, condition, evaluation.settings["seed"]),
                    "question": "" if condition.text is None else _plain(answer.question),
                    "answer": mark + text,
                    "verdict": "" if isnan(value) else "right" if value >= 100 else "wrong",
                }
            )
        yield {"question": _plain(sample.question), "reference": sample.reference[:_TEXT], "looks": looks}


def _thumbnail(sample: Sample, condition: Condition, seed: int) -> str:
    """The first image as the model saw it, as a data URI; empty if there is none."""
    if not sample.images:
        return ""
    try:
        image: Image.Image = condition.images([decode(sample.images[0])], sample.id, seed)[0]
    except UserError:
        return ""
    image.thumbnail(_THUMBNAIL)
    return data_uri(image)


def _plain(question: str) -> str:
    return question.replace(MARKER, " ").strip()


def _number(value: float | None) -> str:
    return "" if value is None else "-" if value != value else f"{value:.1f}"
