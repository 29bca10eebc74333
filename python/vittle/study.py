"""``vittle study``: does the bottleneck make the demo's model more robust? Every method, several seeds, all measured.

Each run is a tuning by ``vittle train`` and an evaluation by ``vittle evaluate``, in folders of their own that a study
which was broken off finds again. Methods are compared with plain tuning seed by seed, as the seeds share their data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vittle.checkpoints import PARTIAL
from vittle.demo import ALIGNED, HELD_OUT_QUESTIONS, SETTINGS, TRAINING_QUESTIONS
from vittle.demo.scenes import write_dataset
from vittle.evaluation import EvaluateConfig, evaluate
from vittle.experiments import beyond_chance, machine, paired_gain, same_scale, slug
from vittle.files import write_json, write_text
from vittle.methods.bottleneck import BottleneckConfig
from vittle.metrics import run as emid
from vittle.models import load_model, load_processor, quiet
from vittle.train import TrainConfig, train

PLAIN = "plain"
_L2T = {"loss": "instruct", "task_templates": "0"}
_FIXED = BottleneckConfig()

METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {"bottleneck": None},
    "Vittle (F)": {"bottleneck": _FIXED},
    "Vittle (L)": {"bottleneck": replace(_FIXED, prior="learnable")},
    "L2T": {"bottleneck": None, **_L2T},
    "Vittle (F) + L2T": {"bottleneck": _FIXED, **_L2T},
    "weight decay 0.1": {"bottleneck": None, "weight_decay": 0.1},
    "LoRA, rank 16": {"bottleneck": None, "tuning": "lora", "lora_rank": 16},
}
"""The papers do not say LoRA's rank nor the weight decay of their baselines; these are ours."""

SWEEPS: dict[str, dict[str, Any]] = {
    **{f"alpha {alpha}": {"bottleneck": replace(_FIXED, alpha=alpha)} for alpha in (0.1, 0.25, 0.75)},
    **{f"beta {beta}": {"bottleneck": replace(_FIXED, beta=beta)} for beta in (0.001, 0.01, 1.0)},
}
"""Vittle (F) with one of its two weights changed."""

GROUPS = ("clean", "image", "text", "joint")
MEASURES = {**{group: f"accuracy, {group}" for group in GROUPS}, "jsd": "JSD", "emid": "EMID"}


@dataclass(frozen=True)
class Scale:
    """How much is trained and asked."""

    seeds: int = 5
    sweep_seeds: int = 2
    training: int = TRAINING_QUESTIONS
    steps: int = SETTINGS["max_steps"]
    questions: int = HELD_OUT_QUESTIONS
    shifts: tuple[str, ...] = ("vittle",)


def study(output: str | Path, scale: Scale | None = None) -> dict[str, Any]:
    """Runs what has not been run, and writes ``study.json``, ``study.md`` and ``study.png``. Returns the JSON.

    Raises:
        UserError: the folder cannot be used.
    """
    scale, output = scale or Scale(), Path(output)
    same_scale(output / "scale.json", scale)
    held_out = _data(output / "data" / "held_out", "held_out", scale.questions, 10_000)
    encoders = _encoders(output / "encoders")
    plan = [(name, seed) for name in METHODS for seed in range(scale.seeds)]
    plan += [(name, seed) for name in SWEEPS for seed in range(scale.sweep_seeds)]
    folders = {run: output / "runs" / f"{slug(run[0])}-{run[1]}" for run in plan}
    summaries = {}
    for done, ((name, seed), folder) in enumerate(folders.items(), start=1):
        print(f"\n{name}, seed {seed}: run {done} of {len(plan)}", flush=True)
        model = _tuned(folder / "model", (METHODS | SWEEPS)[name], seed, output, scale)
        summaries[name, seed] = summary = _evaluated(folder / "evaluation", model, held_out, scale)
    club = output / "club.safetensors"
    if not club.exists():
        emid.train_club([folders[name, 0] / "evaluation" for name in METHODS], *encoders, club)
    results: dict[str, list[dict[str, float]]] = {}
    for (name, seed), folder in folders.items():
        print(f"EMID of {name}, seed {seed}", flush=True)
        measured = _measured(summaries[name, seed], folder / "evaluation", encoders, club)
        results.setdefault(name, []).append(measured)
    found = {
        "results": results,
        "settings": {**SETTINGS, "max_steps": scale.steps, "training": scale.training, "questions": scale.questions,
                     "shifts": list(summary["conditions"])},
        "machine": machine(),
    }  # fmt: skip
    write_json(output / "study.json", found)
    write_text(output / "study.md", page(found))
    draw(found, output / "study.png")
    return found


def _data(folder: Path, split: Any, count: int, seed: int) -> Path:
    data = folder / "questions.json"
    return data if data.exists() else write_dataset(folder, split=split, count=count, seed=seed)


def _tuned(folder: Path, method: Mapping[str, Any], seed: int, output: Path, scale: Scale) -> Path:
    """The model of one run, trained if it is not there; a run that was broken off starts again."""
    if any(folder.glob("*.safetensors")) and not (folder / PARTIAL).exists():  # there while files are moved in
        return folder
    data = _data(output / "data" / f"train-{seed}", "train", scale.training, seed)
    settings = SETTINGS | {"max_steps": scale.steps}
    train(TrainConfig(model=str(ALIGNED), data=str(data), images=str(data.parent / "images"), output=str(folder),
                      seed=seed, resume=folder.exists(), **method, **settings))  # fmt: skip
    return folder


def _evaluated(folder: Path, model: Path, held_out: Path, scale: Scale) -> dict[str, Any]:
    return evaluate(
        EvaluateConfig(
            model=str(model), task="exact", output=str(folder), data=str(held_out),
            images=str(held_out.parent / "images"), shifts=scale.shifts, batch_size=100, max_new_tokens=6,
            workers=0, layer_jsd=True,
        )
    )  # fmt: skip


def _encoders(folder: Path) -> tuple[str, str]:
    """For EMID: the vision tower and the token embeddings of the model that all runs start from."""
    image, text = folder / "image", folder / "text"
    if not all(any(path.glob("*.safetensors")) for path in (image, text)):
        with quiet():
            model, processor = load_model(str(ALIGNED)), load_processor(str(ALIGNED))
            model.model.vision_tower.save_pretrained(image)
            processor.image_processor.save_pretrained(image)
            model.get_decoder().save_pretrained(text)
            processor.tokenizer.save_pretrained(text)
    return str(image), str(text)


def _measured(summary: Mapping[str, Any], evaluation: Path, encoders: tuple[str, str], club: Path) -> dict[str, float]:
    """Means over the conditions of a group; of JSD over layers from the bottleneck's on and modalities, too."""
    jsd = [
        mean(values[len(values) * 3 // 4 - 1 :]) for each in summary["layer_jsd"].values() for values in each.values()
    ]
    measured = emid.measure(evaluation, *encoders, club=str(club))
    return {
        **{group: summary["means"][group] for group in GROUPS if group in summary["means"]},
        "jsd": mean(jsd),
        "emid": mean(each["emid"] for each in measured.values()),
    }


def gains(results: Mapping[str, Sequence[Mapping[str, float]]], name: str, measure: str) -> tuple[float, float, float]:
    """A method's mean gain over plain tuning of the same seeds, its deviation, and the p of a paired t-test."""
    here = [each[measure] for each in results[name]]
    return paired_gain(here, [each[measure] for each in results[PLAIN][: len(here)]])


def page(found: Mapping[str, Any]) -> str:
    """The study in Markdown: what was measured, and what follows from it."""
    results, settings, made = found["results"], found["settings"], found["machine"]
    shifted = [name for name in ("image", "text", "joint") if name in results[PLAIN][0]]
    lines = [
        "# Study: does it make the demo's model more robust?",
        "",
        f"The small LLaVA of `vittle demo`, tuned on {settings['training']} questions about digit scenes "
        f"({settings['max_steps']} steps of {settings['batch_size']}), asked {settings['questions']} held-out "
        f"questions under {len(settings['shifts'])} conditions: clean, and Vittle's 9 + 9 + 9 as `--shifts vittle` "
        "chooses them. "
        f"{len(results[PLAIN])} seeds a method; data, order and noise are the seed's. Accuracy in percent, mean ± "
        "standard deviation over seeds. JSD: of clean and shifted states, from the bottleneck's layer on, in nats. "
        "EMID: with the model's own vision tower and token embeddings as encoders, and one CLUB, trained on the first "
        "seed of every method; both are better the smaller.",
        "",
        "| method | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for name in METHODS:
        cells = (_spread(name, measure, results) for measure in MEASURES)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Against plain tuning",
        "",
        "Mean gain over the plain run of the same seed; in brackets the p of a paired t-test, starred below 0.05. "
        f"Chance alone gives one star in twenty: here there are {(len(METHODS) - 1) * len(MEASURES)} tests.",
        "",
        "| method | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for name in list(METHODS)[1:]:
        lines.append(f"| {name} | " + " | ".join(_gain(name, measure, results) for measure in MEASURES) + " |")
    lines += ["", _verdict(results, shifted), "", "![accuracy by method](study.png)", "", "## alpha and beta", ""]
    count = len(next(results[name] for name in SWEEPS))
    lines += [
        f"Vittle (F) with one weight changed ({count} seeds; its own alpha is {_FIXED.alpha}, its beta {_FIXED.beta}): "
        "gain over plain tuning of the same seeds.",
        "",
        "| setting | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    first = {**results, "Vittle (F)": results["Vittle (F)"][:count]}
    for name in ("Vittle (F)", *SWEEPS):
        cells = (f"{gains(first, name, measure)[0]:+.{_digits(measure)}f}" for measure in MEASURES)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## Made with", "", f"`vittle study`, commit {made['commit']}, {made['cpu']}, torch "
              f"{made['torch']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _verdict(results: Mapping[str, Any], shifted: Sequence[str]) -> str:
    """What the numbers say of each method under shifts, in words; of all these tests together, by Holm's rule."""
    found = {(name, group): gains(results, name, group) for name in list(METHODS)[1:] for group in shifted}
    sure = beyond_chance({test: p for test, (_, _, p) in found.items()})
    told: dict[str, list[str]] = {}
    for name in list(METHODS)[1:]:
        better = [group for group in shifted if (name, group) in sure and found[name, group][0] > 0]
        worse = [group for group in shifted if (name, group) in sure and found[name, group][0] < 0]
        words = [f"better than plain tuning under {', '.join(better)} shifts"] * bool(better)
        words += [f"worse than plain tuning under {', '.join(worse)} shifts"] * bool(worse)
        told.setdefault(" and ".join(words) or "no difference from plain tuning beyond chance", []).append(name)
    helps = any(key in sure and key[0].startswith("Vittle") and gain > 0 for key, (gain, _, _) in found.items())
    lines = [f"Of the {len(found)} tests of accuracy under shifts together (Holm's rule, 0.05):", ""]
    lines += [f"- {', '.join(names)}: {words}" for words, names in told.items()]
    return "\n".join(lines + ["", "At this scale the bottleneck does not help."] * (not helps))


def _digits(measure: str) -> int:
    return 1 if measure in GROUPS else 4


def _spread(name: str, measure: str, results: Mapping[str, Any]) -> str:
    values = [each[measure] for each in results[name] if measure in each]
    if not values:
        return ""
    digits = _digits(measure)
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _gain(name: str, measure: str, results: Mapping[str, Any]) -> str:
    if measure not in results[PLAIN][0]:
        return ""
    gain, _, p = gains(results, name, measure)
    told = "" if p != p else f" ({p:.2f}){'*' if p < 0.05 else ''}"
    return f"{gain:+.{_digits(measure)}f}{told}"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Each seed's accuracy as a dot, each method's mean as a bar: a panel for each group of conditions."""
    from matplotlib.figure import Figure

    results = found["results"]
    groups = [group for group in GROUPS if group in results[PLAIN][0]]
    figure = Figure(figsize=(2.9 * len(groups), 3.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        for row, name in enumerate(METHODS):
            values = [each[group] for each in results[name]]
            colour = "#5b6477" if name == PLAIN else "#1f5fbf"
            panel.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.55, linewidth=0)
            panel.plot([mean(values)] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2)
        panel.axvline(mean(each[group] for each in results[PLAIN]), color="#5b6477", linewidth=0.8, linestyle=":")
        panel.set_title(group if group == "clean" else f"{group} shifts", fontsize=10)
        panel.set_xlabel("accuracy, %", fontsize=9)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(METHODS)), list(METHODS), fontsize=9)
    panels[0].invert_yaxis()
    figure.savefig(path)
