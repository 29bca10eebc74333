"""The command ``vittle``."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vittle import ranks
from vittle.errors import UserError
from vittle.methods.bottleneck import ALPHA_SCHEDULES, BottleneckConfig
from vittle.methods.vpgc import VPGCConfig

_EXTRAS = dict.fromkeys(("train", "labels", "assemble"), "train") | {"endpoint": "judge"}
"""What a module of the application needs; all others: eval."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; what the user can mend is told in one line, with exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        arguments = _with_config(arguments)
    except UserError as error:
        print(f"vittle: {error}", file=sys.stderr)
        return 2
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"vittle: {ranks.label()}{error}", file=sys.stderr)
        ranks.tell_launcher(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        ranks.tell_launcher(error)
        raise
    return 0


def _with_config(arguments: list[str]) -> list[str]:
    """The options of ``--config FILE`` before those of the command line, which override them."""
    if "--config" not in arguments[:-1]:
        return arguments
    import yaml

    at = arguments.index("--config")
    path = Path(arguments[at + 1])
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"config {path} must hold options and values, such as `learning-rate: 2.0e-5`")
    known = {flag for action in _train_parser()._actions for flag in action.option_strings}
    options = []
    for name, value in settings.items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag not in known or flag == "--config":
            raise UserError(f"config {path} has {name!r}, which is no option of vittle train")
        if isinstance(value, list | dict) or value is None:
            raise UserError(f"config {path} has {value!r} for {name}; must be one value")
        if value is not False:
            options += [flag] if value is True else [flag, str(value)]
    return [*arguments[:1], *options, *arguments[1:at], *arguments[at + 2 :]]


def _train_parser() -> argparse.ArgumentParser:
    commands = next(each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction))
    parser: argparse.ArgumentParser = commands.choices["train"]
    return parser


def _application(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(module.removeprefix("vittle."), "eval")
        raise UserError(f"{error.name} is not installed: pip install 'vittle-kernels[{extra}]'") from error


def _train(options: argparse.Namespace) -> None:
    train = _application("vittle.train")
    settings = vars(options)
    is_align, bottleneck = options.stage == "align", None
    settings["learning_rate"] = options.learning_rate or (1e-3 if is_align else 2e-5)
    if not (options.plain or is_align):
        bottleneck = BottleneckConfig(**{name: settings[name] for name in BottleneckConfig.__dataclass_fields__})
    vpgc = None if options.vpgc is None else VPGCConfig(None if options.vpgc is True else options.vpgc)
    names = train.TrainConfig.__dataclass_fields__.keys() - {"bottleneck", "vpgc"}
    methods = {"bottleneck": bottleneck, "vpgc": vpgc}
    result = train.train(train.TrainConfig(**methods, **{name: settings[name] for name in names}))
    if not ranks.is_first():
        return
    waited = f"{100 * result.data_share:.1f} % of it waiting for data"
    if result.second_look_share is not None:
        waited += f"; the second look took {result.second_look_share:.1%} of the forward passes"
    print(f"{result.steps} steps in {result.seconds:.0f} s, {waited}; the model is in {options.output}")


def _labels(options: argparse.Namespace) -> None:
    train, labels = _application("vittle.train"), _application("vittle.labels")
    dataset = train.LlavaDataset(options.data, options.images, unique_ids=False, progress=sys.stderr.isatty())
    templates = train.task_templates(options.loss, options.task_templates, dataset)
    processor = train.load_processor(options.model)
    collator = train.Collator(processor, options.max_length, loss=options.loss, task_templates=templates)
    labels.show(dataset, collator, options.show, options.html)


def _assemble(options: argparse.Namespace) -> None:
    _application("vittle.assemble").assemble(options.vision, options.language, options.output, seed=options.seed)
    print(f"the model is in {options.output}; its projector is random: vittle train --stage align")


def _evaluate(options: argparse.Namespace) -> None:
    evaluation, report = _application("vittle.evaluation"), _application("vittle.report")
    settings = vars(options) | {"shifts": tuple(options.shifts)}
    names = evaluation.EvaluateConfig.__dataclass_fields__
    evaluation.evaluate(evaluation.EvaluateConfig(**{name: settings[name] for name in names}))
    report.show(options.output)


def _compare(options: argparse.Namespace) -> None:
    compare = _application("vittle.compare")
    print(compare.table(compare.compare(options.runs, seed=options.seed)))


def _emid(options: argparse.Namespace) -> None:
    run = _application("vittle.metrics.run")
    print(run.table(run.measure(
        options.run_folder, options.image_encoder, options.text_encoder, club=options.club,
        entropy_scale=options.entropy_scale, seed=options.seed,
    )))  # fmt: skip
    print(f"\nAll of it is in {Path(options.run_folder) / run.RESULT}.")


def _translate(options: argparse.Namespace) -> None:
    translation, tasks = _application("vittle.shifts.translation"), _application("vittle.tasks")
    endpoint = _application("vittle.endpoint").Endpoint(options.url, options.translator)
    with tempfile.TemporaryDirectory() as scenes:
        task = tasks.load_task(options.task, options.data, options.images, Path(scenes))
        texts = {sample.id: sample.question for sample in task.samples}
        for language in options.languages:
            translation.translate(texts, language, endpoint.complete, options.output)
    print(f"{len(texts)} questions in {', '.join(options.languages)} are in {options.output}")


def _benchmark(options: argparse.Namespace) -> None:
    demon = _application("vittle.demon")
    if (options.model is None) != (options.output is None):
        raise UserError("--model needs --output; --predictions goes without, scores are written beside the predictions")
    if options.model is None:
        found = demon.score(options.data, options.predictions, tasks=options.tasks, limit=options.limit)
    else:
        found = demon.run(
            options.data, options.model, options.output, tasks=options.tasks, limit=options.limit,
            batch_size=options.batch_size, max_new_tokens=options.max_new_tokens, workers=options.workers,
        )  # fmt: skip
    print(demon.page(found))
    print(f"\n{demon.RESULT} and {demon.PAGE} are in {options.output or options.predictions}.")


def _study(options: argparse.Namespace) -> None:
    study = _application("vittle.study")
    study.study(options.output, study.Scale(seeds=options.seeds))
    print(f"\nstudy.md, study.png and study.json are in {options.output}.")


def _demo(options: argparse.Namespace) -> None:
    demo = _application("vittle.demo")
    demo.run(options.output, seed=options.seed, methods=options.methods)


def _add_data(command: argparse.ArgumentParser) -> None:
    """The options that say what a sample is and which of its tokens have labels."""
    add = command.add_argument
    add("--model", required=True, metavar="DIR|ID", help="folder or Hub id of the model")
    add("--data", required=True, metavar="FILE", help="conversations in LLaVA's JSON format")
    add("--images", required=True, metavar="DIR", help="folder that the records' image paths start from")
    add("--max-length", type=int, default=2048, metavar="N", help="tokens of a sample, image tokens included")
    add(
        "--loss",
        choices=("response", "instruct"),
        default="response",
        help="instruct (L2T): instructions have labels too",
    )
    add("--task-templates", default="20", metavar="K|FILE", help="sentences of instructions without labels: the K most "
        "frequent of the data, or an edited task_templates.json")  # fmt: skip


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_evaluate)
    add = command.add_argument
    add("--model", required=True, metavar="DIR|ID", help="folder or Hub id; adapters and methods are found there")
    add("--task", required=True, help="digits, pope, pope-strict, mme, choice, exact, demon or llava-bench")
    add("--output", required=True, metavar="DIR", help="folder of the evaluation")
    add("--data", metavar="PATH", help="the task's file or folder (digits: none)")
    add("--images", metavar="DIR", help="folder that image paths start from, if not the data's")
    add("--shifts", nargs="*", default=[], metavar="SHIFT", help="such as frost:3 fog:1-5 snow keyboard:2 "
        "frost:3+keyboard:2 translation:German; or images, texts, vittle (27 conditions)")  # fmt: skip
    add("--translations", metavar="FILE", help="JSON lines of id, language, text")
    add("--limit", type=int, metavar="N", help="the first samples only")
    add("--batch-size", type=int, default=16, metavar="N", help="questions at a time")
    add("--max-new-tokens", type=int, metavar="N", help="where an answer is cut (default: the task's)")
    add("--seed", type=int, default=0, help="of the shifts")
    add("--workers", type=int, default=2, metavar="N", help="processes that decode and shift images")
    add("--judge-url", metavar="URL", help="OpenAI-compatible endpoint; its key: OPENAI_API_KEY")
    add("--judge-model", metavar="NAME", help="the judge's name there")
    add("--layer-jsd", action="store_true", help="how far shifts move the states after each layer")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vittle", description="Tune multimodal LLMs to be robust.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.ArgumentDefaultsHelpFormatter

    demo = commands.add_parser("demo", help="tune a small LLaVA on digit scenes, plainly and with the bottleneck",
                               description="Tunes a small LLaVA on scenes of handwritten digits, plainly and with the "
                               "bottleneck, and compares both on clean and corrupted images.",
                               formatter_class=formatter)  # fmt: skip
    demo.add_argument("--output", default="runs/demo", help="folder of the report and the plot")
    demo.add_argument("--seed", type=int, default=0, help="of the data, the training and the corruptions")
    demo.add_argument("--methods", nargs="+", choices=("plain", "bottleneck", "instruct", "both"),
                      default=["plain", "bottleneck"], metavar="METHOD",
                      help="of plain, bottleneck (Vittle), instruct (L2T), both")  # fmt: skip
    demo.set_defaults(run=_demo)

    study = commands.add_parser("study", help="tune the demo's model by every method and compare, over several seeds",
                                description="Tunes the demo's model plainly, with Vittle, L2T, weight decay and LoRA, "
                                "evaluates all on clean and shifted scenes, and writes a page. Hours on two cores; the "
                                "same command goes on where it stopped.", formatter_class=formatter)  # fmt: skip
    study.add_argument("--output", default="runs/study", help="folder of the page, the plot and all runs")
    study.add_argument("--seeds", type=int, default=5, metavar="N", help="of each method")
    study.set_defaults(run=_study)

    labels = commands.add_parser("labels", help="show which tokens of the data have labels",
                                 description="Shows samples of the data, token by token: what is in the loss, what in "
                                 "the KL, what is the template's.", formatter_class=formatter)  # fmt: skip
    labels.set_defaults(run=_labels)
    _add_data(labels)
    labels.add_argument("--show", type=int, default=5, metavar="N", help="samples")
    labels.add_argument("--html", metavar="FILE", help="write a page instead")

    assemble = commands.add_parser("assemble", help="make a LLaVA of a vision tower and a language model",
                                   description="Makes a Hugging Face LLaVA of a vision tower and a language model; "
                                   "its projector starts at random.", formatter_class=formatter)  # fmt: skip
    assemble.set_defaults(run=_assemble)
    assemble.add_argument("--vision", required=True, metavar="DIR|ID", help="CLIP's or SigLIP's vision tower")
    assemble.add_argument("--language", required=True, metavar="DIR|ID", help="language model with its tokenizer")
    assemble.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    assemble.add_argument("--seed", type=int, default=0, help="of the projector")

    _add_evaluate(commands.add_parser(
        "evaluate", help="measure a model on a task, clean and shifted",
        description="Asks a model a task's questions, clean and under shifts of images and texts. The same command "
        "goes on with what the output folder holds; further --shifts are added to it.", formatter_class=formatter,
    ))  # fmt: skip

    benchmark = commands.add_parser("demon", help="measure a model on DEMON, or score predictions",
                                    description="Asks a model the questions of the DEMON benchmark, or scores "
                                    "predictions made elsewhere, by the published metrics. The same command goes on "
                                    "with what the output folder holds.", formatter_class=formatter)  # fmt: skip
    benchmark.set_defaults(run=_benchmark)
    add = benchmark.add_argument
    add("--data", required=True, metavar="DIR", help="the benchmark's folder, with TASK/core/core.json")
    answers = benchmark.add_mutually_exclusive_group(required=True)
    answers.add_argument("--model", metavar="DIR|ID", help="folder or Hub id; adapters and methods are found there")
    answers.add_argument("--predictions", metavar="DIR", help="folder with TASK/pred.json, instead of a model")
    add("--output", metavar="DIR", help="folder of the results (predictions: theirs)")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="folders of the data (default: all)")
    add("--limit", type=int, metavar="N", help="the first samples of each task only")
    add("--batch-size", type=int, default=16, metavar="N", help="questions at a time")
    add("--max-new-tokens", type=int, metavar="N", help="where an answer is cut (default: 300)")
    add("--workers", type=int, default=2, metavar="N", help="processes that decode images")

    compare = commands.add_parser("compare", help="put evaluations beside each other, with confidence intervals",
                                  description="Puts evaluations of one task beside each other; differences are from "
                                  "the first, with paired bootstrap intervals.", formatter_class=formatter)  # fmt: skip
    compare.set_defaults(run=_compare)
    compare.add_argument("runs", nargs="+", metavar="DIR", help="output folders of vittle evaluate")
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap")

    emid = commands.add_parser("emid", help="measure effective mutual information over an evaluation",
                               description="EMI, EMID and its bound (arXiv 2502.00577) of every condition of an "
                               "evaluation against the clean one.", formatter_class=formatter)  # fmt: skip
    emid.set_defaults(run=_emid)
    emid.add_argument("run_folder", metavar="DIR", help="output folder of vittle evaluate")
    emid.add_argument(
        "--image-encoder", default="openai/clip-vit-base-patch32", metavar="DIR|ID", help="as the paper's"
    )
    emid.add_argument("--text-encoder", default="FacebookAI/xlm-roberta-base", metavar="DIR|ID", help="as the paper's")
    emid.add_argument("--club", metavar="FILE", help="weights, such as the released CLUB_global.pt (default: trained "
                      "on the evaluation)")  # fmt: skip
    emid.add_argument("--entropy-scale", type=float, metavar="H", help="of the full bound (default: all terms alike)")
    emid.add_argument("--seed", type=int, default=0, help="of the CLUB that is trained")

    translate = commands.add_parser("translate", help="have a task's questions translated, for --translations",
                                    description="Has a task's questions translated by a language model; the same "
                                    "command goes on where it stopped.", formatter_class=formatter)  # fmt: skip
    translate.set_defaults(run=_translate)
    translate.add_argument("--task", required=True, help="as vittle evaluate takes it")
    translate.add_argument("--data", metavar="PATH", help="the task's file or folder")
    translate.add_argument("--images", metavar="DIR", help="folder that image paths start from, if not the data's")
    translate.add_argument("--languages", nargs="+", required=True, metavar="LANGUAGE", help="such as German Korean")
    translate.add_argument("--url", required=True, help="OpenAI-compatible endpoint; its key: OPENAI_API_KEY")
    translate.add_argument("--translator", required=True, metavar="NAME", help="the model's name there")
    translate.add_argument("--output", required=True, metavar="FILE", help="JSON lines of id, language, text")

    train = commands.add_parser("train", help="tune a vision-language model on LLaVA's data",
                                description="Tunes a Hugging Face vision-language model on a file in LLaVA's JSON "
                                "format: CE + beta (KL_vision + KL_text). The defaults are the paper's.",
                                formatter_class=formatter)  # fmt: skip
    train.set_defaults(run=_train)
    _add_data(train)
    add = train.add_argument
    add("--config", metavar="FILE", help="YAML of these options; those of the command line override it")
    add("--output", required=True, metavar="DIR", help="folder of the run; must be empty unless --resume")
    add("--stage", choices=("align", "tune"), default="tune", help="align: the projector alone, on captions")
    add("--plain", action="store_true", help="no bottleneck")
    add(
        "--layer",
        type=int,
        metavar="N",
        help="the bottleneck follows N decoder layers (default: three quarters)",
    )
    add("--text-layer", type=int, metavar="N", help="for text tokens, if another (default: the same)")
    add("--prior", choices=("fixed", "learnable"), default="fixed", help="Vittle (F) or Vittle (L)")
    add("--alpha", type=float, default=0.5, help="interpolation weight at the end of training")
    add("--alpha-schedule", choices=tuple(ALPHA_SCHEDULES), default="sigmoid", help="how alpha gets there")
    add("--beta", type=float, default=0.1, help="weight of the KL")
    add("--vpgc", nargs="?", type=int, const=True, metavar="N",
        help="VPG-C's second look at the images, after N decoder layers (default: half)")  # fmt: skip
    add("--tuning", choices=("full", "lora", "projector", "frozen"), default="full",
        help="beside bottleneck and second look: the model, adapters, the projector or nothing")  # fmt: skip
    add("--lora-rank", type=int, default=128, metavar="R", help="of LoRA's adapters")
    add("--on-bad", choices=("stop", "skip"), default="stop", help="what a bad record does")
    add("--repeated-ids", action="store_true", help="allow ids that repeat, as in LLaVA's released files")
    add("--no-grouping", dest="group_by_length", action="store_false", help="batches of any lengths and modalities")
    add("--epochs", type=float, default=1.0, help="passes over the data")
    add(
        "--max-steps",
        type=int,
        default=-1,
        metavar="N",
        help="optimizer steps, instead of epochs if positive",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="samples a device and step")
    add(
        "--gradient-accumulation",
        type=int,
        default=1,
        metavar="N",
        help="steps summed before the optimizer's",
    )
    add("--learning-rate", type=float, metavar="LR", help="peak of the cosine schedule (2e-5; align: 1e-3)")
    add("--weight-decay", type=float, default=0.0, metavar="W", help="AdamW's")
    add("--warmup-ratio", type=float, default=0.03, metavar="R", help="share of the steps that warm up")
    add("--tune-vision", action="store_true", help="tune the vision tower too")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    add("--workers", type=int, default=2, metavar="N", help="processes that decode images")
    add("--save-steps", type=int, default=500, metavar="N", help="steps between checkpoints; 0: none")
    add("--keep-checkpoints", type=int, default=2, metavar="N", help="the newest stay; 0: all")
    add("--log-steps", type=int, default=10, metavar="N", help="steps between log lines")
    add("--report-to", default="none", help="tensorboard, wandb or trackio, through transformers")
    add("--seed", type=int, default=42, help="of data order, noise and new weights")
    add("--resume", action="store_true", help="continue the run that --output holds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
