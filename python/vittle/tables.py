"""Tables of an evaluation, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vittle.shifts.condition import TRANSLATION

WIDTH = 80
_NAME, _CELL, _LONG = 24, 7, 70


def table(summary: Mapping[str, Any]) -> str:
    """The headline metric, kinds by severities; then joint conditions, the groups of the task, and what was broken."""
    conditions, headline = summary["conditions"], summary["headline"]
    if not conditions:
        return "\n".join(_broken(summary)[1:]) or "no condition is whole yet"
    means = summary["means"]
    lines = [f"{headline.replace('_', ' '):{_NAME}}" + _cells(["clean", "image", "text", "joint"])]
    lines += [f"{'mean over conditions':{_NAME}}" + _cells([means.get(g) for g in ("clean", "image", "text", "joint")])]
    for group, title in (("image", "image shifts"), ("text", "text shifts")):
        rows = grid(summary, group)
        if rows:
            severities = sorted({severity for row in rows.values() for severity in row})
            lines += ["", f"{title + ', severity':{_NAME}}" + _cells([str(severity) for severity in severities])]
            lines += [f"  {kind:{_NAME - 2}}" + _cells([row.get(s) for s in severities]) for kind, row in rows.items()]
    joint = {name: each["metrics"][headline] for name, each in conditions.items() if each["group"] == "joint"}
    for title, values in (("translations", languages(summary)), ("joint shifts", joint)):
        if values:
            lines += ["", title]
            lines += [f"  {name[:_LONG]:{_NAME + 20}}" + _cells([value]) for name, value in values.items()]
    lines += _groups(conditions, headline)
    if failures := summary.get("judge_failures"):
        answers, replies = (sum(each[name] for each in failures.values()) for name in ("answers", "replies"))
        lines += ["", f"{answers} answers were not judged and do not count; {replies} replies had no scores."]
    return "\n".join(lines + _broken(summary))


def _broken(summary: Mapping[str, Any]) -> list[str]:
    broken = list(summary["broken"].values())
    if not broken:
        return []
    return ["", f"{len(broken)} samples have broken images and do not count. The first:", broken[0]]


def grid(summary: Mapping[str, Any], group: str) -> dict[str, dict[int, float]]:
    """The headline metric of a group of conditions by kind and severity."""
    found: dict[str, dict[int, float]] = {}
    for kind, severity, value in _shifts(summary, group):
        if kind != TRANSLATION:
            found.setdefault(kind, {})[int(severity)] = value
    return {kind: dict(sorted(row.items())) for kind, row in found.items()}


def languages(summary: Mapping[str, Any]) -> dict[str, float]:
    """The headline metric of the translations by language."""
    return {language: value for kind, language, value in _shifts(summary, "text") if kind == TRANSLATION}


def _shifts(summary: Mapping[str, Any], group: str) -> Iterator[tuple[str, str, float]]:
    for name, each in summary["conditions"].items():
        if each["group"] == group:
            kind, _, severity = name.partition(":")
            yield kind, severity, each["metrics"][summary["headline"]]


def _groups(conditions: Mapping[str, Any], headline: str) -> list[str]:
    """The clean metrics, over all and by the task's groups."""
    clean = conditions.get("clean")
    if clean is None:
        return []
    names = list(clean["metrics"])[:7]
    lines = ["", f"{'clean':{_NAME}}" + _cells([name.replace("_", " ")[: _CELL + 1] for name in names])]
    for group, metrics in {"all": clean["metrics"], **clean["groups"]}.items():
        lines.append(f"  {group[: _NAME - 2]:{_NAME - 2}}" + _cells([metrics.get(name) for name in names]))
    return lines


def _cells(values: list[Any]) -> str:
    return "".join(f" {_cell(value):>{_CELL}}" for value in values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else "-" if value != value else f"{value:.1f}"
