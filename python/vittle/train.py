"""``vittle train``: transformers' own Trainer on LLaVA's data, plainly, with the bottleneck, with a second look."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from vittle import checkpoints, ranks
from vittle.curves import CURVES, draw
from vittle.data import CaptionCollator, Collator, LlavaDataset
from vittle.errors import UserError
from vittle.methods import instruct
from vittle.methods.attachment import methods_of, module_named
from vittle.methods.bottleneck import (
    ALPHA_SCHEDULES,
    BottleneckConfig,
    attach_bottleneck,
)
from vittle.methods.instruct import Loss, TaskTemplates
from vittle.methods.vpgc import VPGCConfig, attach_vpgc
from vittle.models import load_model, load_processor, quiet
from vittle.monitor import SHARE
from vittle.trainer import AlphaCallback, BottleneckTrainer


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the paper's settings for LLaVA-1.5-7B's second stage."""

    model: str
    data: str
    images: str
    output: str
    stage: Literal["align", "tune"] = "tune"
    bottleneck: BottleneckConfig | None = field(default_factory=BottleneckConfig)
    vpgc: VPGCConfig | None = None
    alpha_schedule: str = "sigmoid"
    loss: Loss = "response"
    task_templates: str = "20"
    tuning: Literal["full", "lora", "projector", "frozen"] = "full"
    lora_rank: int = 128
    on_bad: Literal["stop", "skip"] = "stop"
    repeated_ids: bool = False
    group_by_length: bool = True
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    max_length: int = 2048
    tune_vision: bool = False
    gradient_checkpointing: bool = False
    workers: int = 2
    save_steps: int = 500
    keep_checkpoints: int = 2
    log_steps: int = 10
    report_to: str = "none"
    seed: int = 42
    resume: bool = False


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the model in eval mode, its processor, the log and the wall time."""

    model: Any
    processor: Any
    history: list[dict[str, float]]
    steps: int
    seconds: float
    data_share: float
    """Of the time, spent waiting for data."""
    skipped: int
    """Records that were bad, and times that one had a broken image."""
    second_look_share: float | None
    """Of the forward passes' time, in the last window of the log; None without a second look."""


def train(config: TrainConfig, callbacks: list[TrainerCallback] | None = None) -> TrainResult:
    """Tunes a model and writes it to ``config.output``, with ``bottleneck.safetensors`` where it has a bottleneck and
    ``vpgc.safetensors`` where it has a second look.

    Raises:
        UserError: a setting, the data or the output folder cannot be used.
    """
    if config.alpha_schedule not in ALPHA_SCHEDULES:
        choices = ", ".join(map(repr, ALPHA_SCHEDULES))
        raise UserError(f"alpha_schedule is {config.alpha_schedule!r}; must be one of {choices}")
    installed = get_available_reporting_integrations()
    if config.report_to not in ("none", *installed):
        found = ", ".join(sorted(installed)) or "none"
        raise UserError(f"report_to is {config.report_to!r}, which is not installed; of those that transformers knows, "
                        f"there is: {found}")  # fmt: skip
    args, output = training_arguments(config), Path(config.output)  # from here on the processes know each other
    dataset = ranks.first_then_all(lambda: _dataset(config))
    processor = ranks.first_then_all(lambda: load_processor(config.model))
    # A batch without images leaves the projector out; LLaVA never reads its tower's last layer.
    args.ddp_find_unused_parameters = config.tune_vision or not all(dataset.image_counts)
    checkpoint, settings = ranks.agree(lambda: _begin(config, args.world_size))
    model = load_model(config.model)
    set_seed(config.seed)  # here: DeepSpeed's way of loading a model draws from the generator
    templates = task_templates(config.loss, config.task_templates, dataset)
    if config.stage == "align":
        collator: Collator = CaptionCollator(processor, config.max_length)
    else:
        collator = Collator(processor, config.max_length, loss=config.loss, task_templates=templates)
    if not config.tune_vision:
        freeze_vision(model)
    callbacks = list(callbacks or [])
    if config.bottleneck is not None:
        bottleneck = attach_bottleneck(model, config.bottleneck)
        schedule = ALPHA_SCHEDULES[config.alpha_schedule]
        callbacks.append(AlphaCallback(bottleneck, schedule, config.bottleneck.alpha))
    if config.vpgc is not None:
        attach_vpgc(model, config.vpgc, freeze=False)
    model = _tuned(model, config)
    trainer = BottleneckTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=callbacks,
        settings=settings,
    )
    if trainer.shares_weights and not config.group_by_length and len({count > 0 for count in dataset.image_counts}) > 1:
        raise UserError(
            "some records have images and some have none: ranks that share weights must all see images, or none; "
            "leave out --no-grouping"
        )
    if config.loss == "instruct" and ranks.is_first():
        with checkpoints.writing(output, instruct.FILE) as folder:
            templates.write(folder)
            checkpoints.move_into(folder, output)
    try:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        _end_progress(trainer)
    save_run(trainer, processor, output)
    seconds = outcome.metrics["train_runtime"]
    if broken := int(dataset.broken):
        print(f"{ranks.label()}{broken} times a record gave way to the next, for an image that cannot be decoded")
    return TrainResult(
        model.eval(), processor, trainer.state.log_history, outcome.global_step, seconds,
        trainer.data_seconds / seconds, len(dataset.bad) + broken,
        next((log[SHARE] for log in reversed(trainer.state.log_history) if SHARE in log), None),
    )  # fmt: skip


_NOT_COMPARED = {
    "output", "resume", "data", "workers", "report_to", "log_steps", "save_steps", "keep_checkpoints",
    "batch_size", "gradient_accumulation", "bottleneck", "vpgc",
}  # fmt: skip
"""Settings that the losses do not depend on, or that others below stand for."""


def _begin(config: TrainConfig, processes: int) -> tuple[str | None, dict[str, Any]]:
    """The checkpoint that the run goes on from, and the settings that its losses depend on."""
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_COMPARED}
    settings["global_batch"] = config.batch_size * config.gradient_accumulation * processes
    settings[checkpoints.SPLIT] = [config.batch_size, config.gradient_accumulation, processes]
    for method in ("bottleneck", "vpgc"):
        of_method = getattr(config, method)
        if of_method is not None:
            settings |= {f"{method}.{name}": value for name, value in asdict(of_method).items()}
    for name in ("model", "images"):
        if Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    files = {"data_sha256": Path(config.data), "task_templates_sha256": Path(config.task_templates)}
    files["model_config_sha256"] = Path(config.model) / "config.json"
    for name, path in files.items():
        if path.is_file():
            with path.open("rb") as file:
                settings[name] = hashlib.file_digest(file, "sha256").hexdigest()
    weights = sorted(Path(config.model).glob("*.safetensors"))
    settings["model_bytes"] = sum(path.stat().st_size for path in weights)
    checkpoint = checkpoints.begin(Path(config.output), settings, config.resume)
    return checkpoint if checkpoint is None else str(checkpoint), settings


def _dataset(config: TrainConfig) -> LlavaDataset:
    dataset = LlavaDataset(
        config.data, config.images, on_bad=config.on_bad, unique_ids=not config.repeated_ids,
        progress=Path(config.data).exists() and Path(config.data).stat().st_size > 1 << 26,
    )  # fmt: skip
    if dataset.bad and ranks.is_first():
        print(f"{len(dataset.bad)} bad records are skipped, {len(dataset)} are used; the first bad one:")
        print(dataset.bad[0])
    return dataset


def task_templates(loss: str, source: str, dataset: LlavaDataset) -> TaskTemplates:
    """Read from a file, or so many counted over the data; none where the loss does not cover instructions."""
    if loss != "instruct":
        return TaskTemplates({})
    if source.isdecimal():
        return TaskTemplates.count(dataset.instructions(), int(source))
    return TaskTemplates.read(source)


def _tuned(model: Any, config: TrainConfig) -> Any:
    """What is trained besides bottleneck and second look: all but a frozen vision tower, PEFT's adapters, the
    projector, or nothing.
    """
    attached = [each.module for each in methods_of(model)]
    if config.stage == "align" and (attached or config.tuning != "full" or config.loss != "response"):
        raise UserError("stage is 'align', which trains the projector alone; leave out methods, tuning and loss")
    if config.tuning == "frozen" and not attached:
        raise UserError("tuning is 'frozen' and there is neither bottleneck nor second look; nothing would be trained")
    if config.stage == "align" or config.tuning in ("projector", "frozen"):
        model.requires_grad_(False)
        trained = attached if config.tuning == "frozen" else [*attached, projector_of(model)]
        for module in trained:
            module.requires_grad_(True)
        return model
    if config.tuning == "full":
        return model
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in model.named_modules() if module is model.get_decoder()]
    names = [name for name, module in model.get_decoder().named_modules() if isinstance(module, nn.Linear)]
    targets = [f"{layers[0]}.{name}" for name in names]
    return get_peft_model(
        model, LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=targets)
    )


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The run as transformers' Trainer takes it."""
    on_gpu = torch.cuda.is_available()
    checkpointing = "activation_checkpointing"  # as transformers names it since 5.20
    if checkpointing not in TrainingArguments.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    return TrainingArguments(
        output_dir=config.output,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_num_workers=config.workers,
        dataloader_persistent_workers=False,  # their first epoch draws from the generator, others do not
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.log_steps,
        save_strategy="steps" if config.save_steps > 0 else "no",
        save_steps=max(config.save_steps, 1),
        save_total_limit=config.keep_checkpoints or None,
        report_to=config.report_to,
        seed=config.seed,
        **{checkpointing: config.gradient_checkpointing},  # type: ignore[arg-type]
    )


def projector_of(model: nn.Module) -> nn.Module:
    """What brings the images' features into the language model's space.

    Raises:
        UserError: there is none.
    """
    names = ("multi_modal_projector", "language_projection")  # LLaVA's and BLIP-2's
    projector = module_named(model, *names)
    if projector is None:
        raise UserError(f"{type(model).__name__} has no {' or '.join(names)} to train")
    return projector


def freeze_vision(model: nn.Module) -> None:
    """The vision tower keeps its weights, as in the papers; projector and language model are tuned."""
    for name, parameter in model.named_parameters():
        if any(part in ("vision_tower", "vision_model", "visual") for part in name.split(".")):
            parameter.requires_grad_(False)


def save_run(trainer: BottleneckTrainer, processor: Any, output: Path) -> None:
    """Writes the model as transformers or PEFT reads it, its processor, the bottleneck and the run's curves; all ranks
    come here, as each may hold a part of the weights.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not ranks.is_first():
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    with checkpoints.writing(output, "the model") as folder, quiet():
        processor.save_pretrained(folder)
        if isinstance(model, PreTrainedModel):
            own: dict[str, dict[str, Any]] = {}
            for each in methods_of(model):
                prefix = each.files.prefix
                own[prefix] = {
                    name.removeprefix(prefix): state.pop(name) for name in [*state] if name.startswith(prefix)
                }
            model.save_pretrained(folder, state_dict=state)
            for each in methods_of(model):
                each.files.write(folder, each.settings(), own[each.files.prefix])
        else:
            model.save_pretrained(folder, state_dict=state)
        draw(trainer.state.log_history, folder / CURVES)
        checkpoints.move_into(folder, output)


def _end_progress(trainer: Trainer) -> None:
    """A message after a run that fails starts on a line of its own, not behind the progress bar."""
    for callback in trainer.callback_handler.callbacks:
        if (bar := getattr(callback, "training_bar", None)) is not None:
            bar.close()
