"""``vittle train``: transformers' own Trainer on LLaVA's data, plainly or with the bottleneck."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from vittle.data import CaptionCollator, Collator, LlavaDataset, ModalityLengthSampler
from vittle.errors import UserError
from vittle.methods.bottleneck import (
    ALPHA_SCHEDULES,
    AlphaSchedule,
    BottleneckConfig,
    attach_bottleneck,
    attachment_of,
    save_bottleneck,
)
from vittle.methods.instruct import Loss, TaskTemplates
from vittle.methods.peft import base_model
from vittle.methods.saving import PREFIX

RUN_FILE = "vittle_run.json"
"""The run's settings, in its output folder."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the paper's settings for LLaVA-1.5-7B's second stage."""

    model: str
    data: str
    images: str
    output: str
    stage: Literal["align", "tune"] = "tune"
    bottleneck: BottleneckConfig | None = field(default_factory=BottleneckConfig)
    alpha_schedule: str = "sigmoid"
    loss: Loss = "response"
    task_templates: str = "20"
    tuning: Literal["full", "lora", "frozen"] = "full"
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
    log_steps: int = 10
    report_to: str = "none"
    seed: int = 42
    resume: bool = False


class AlphaCallback(TrainerCallback):
    """Moves alpha along its schedule; what is trained ends, and is saved, with the schedule's final alpha."""

    def __init__(self, bottleneck: Any, schedule: AlphaSchedule, alpha: float) -> None:
        self.bottleneck, self.schedule, self.alpha = bottleneck, schedule, alpha

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Alpha for the step to come."""
        self.bottleneck.set_alpha(self.schedule(self.alpha, state.global_step / state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Alpha for inference."""
        self.bottleneck.set_alpha(self.alpha)


class BottleneckTrainer(Trainer):
    """transformers' Trainer, whose log also shows alpha, CE and the KL of each modality, and that resumes a LLaVA.

    It takes a LlavaDataset in the order of :class:`vittle.data.ModalityLengthSampler` where the arguments ask for
    batches of like lengths (``train_sampling_strategy="group_by_length"``).
    """

    data_seconds = 0.0
    """What training waited for data."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, timed."""
        begin = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.data_seconds += time.perf_counter() - begin

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(data, LlavaDataset):
            return super()._get_train_sampler(train_dataset)
        return ModalityLengthSampler(
            data.lengths, data.image_counts, self.args.train_batch_size * self.args.gradient_accumulation_steps
            * self.args.world_size, self.args.seed,
        )  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """By from_pretrained, which knows the names under which save_pretrained writes a model.

        transformers 5.23's own looks for the names that the model has now: a LLaVA would go on from the weights that
        it started with, with a warning.
        """
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype).state_dict()
        if hasattr(model, "bottleneck"):
            attachment_of(model).load(Path(resume_from_checkpoint))
            saved |= {name: t for name, t in model.state_dict().items() if name.startswith(PREFIX)}
        model.load_state_dict(saved)

    def _load_best_model(self) -> None:
        if not isinstance(self.model, PreTrainedModel):
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the last step's values of the bottleneck to a training log."""
        model = base_model(self.accelerator.unwrap_model(self.model))
        if "loss" in logs and hasattr(model, "bottleneck"):
            attachment = attachment_of(model)
            logs |= {name: round(float(value), 4) for name, value in attachment.metrics.items()}
            logs["alpha"] = round(float(attachment.module.alpha), 4)
        super().log(logs, *args, **kwargs)


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


def load_model(path: str) -> tuple[Any, Any]:
    """A vision-language model in fp32 and its processor, from a folder or a Hub id, safetensors only.

    Raises:
        UserError: there is no such model.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _no_model(path, error) from error
    return model, load_processor(path)


def load_processor(path: str) -> Any:
    """A vision-language model's processor.

    Raises:
        UserError: there is no such model.
    """
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _no_model(path, error) from error


def _no_model(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"model is {path!r}; must be a folder or Hub id of a vision-language model: {reason}")


def train(config: TrainConfig, callbacks: list[TrainerCallback] | None = None) -> TrainResult:
    """Tunes a model and writes it to ``config.output``, with ``bottleneck.safetensors`` where it has a bottleneck.

    Raises:
        UserError: a setting, the data or the output folder cannot be used.
    """
    if config.alpha_schedule not in ALPHA_SCHEDULES:
        choices = ", ".join(map(repr, ALPHA_SCHEDULES))
        raise UserError(f"alpha_schedule is {config.alpha_schedule!r}; must be one of {choices}")
    output = Path(config.output)
    checkpoint = _checkpoint_of(output, config.resume)
    set_seed(config.seed)
    dataset = _dataset(config)
    model, processor = load_model(config.model)
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
    model = _tuned(model, config)

    trainer = BottleneckTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=callbacks,
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / RUN_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    if config.loss == "instruct":
        templates.write(output)
    try:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        _end_progress(trainer)
    model.eval()
    save_run(model, processor, output)
    seconds = outcome.metrics["train_runtime"]
    if dataset.broken:
        print(f"{int(dataset.broken)} times a record gave way to the next, for an image that cannot be decoded")
    return TrainResult(
        model, processor, trainer.state.log_history, outcome.global_step, seconds,
        trainer.data_seconds / seconds, len(dataset.bad) + int(dataset.broken),
    )  # fmt: skip


def _dataset(config: TrainConfig) -> LlavaDataset:
    dataset = LlavaDataset(
        config.data, config.images, on_bad=config.on_bad, unique_ids=not config.repeated_ids,
        progress=Path(config.data).exists() and Path(config.data).stat().st_size > 1 << 26,
    )  # fmt: skip
    if dataset.bad:
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
    """What is trained: the projector; all but a frozen vision tower, PEFT's adapters, or the bottleneck alone."""
    if config.stage == "align":
        if config.bottleneck is not None or config.tuning != "full" or config.loss != "response":
            raise UserError("stage is 'align', which trains the projector alone; leave out bottleneck, tuning and loss")
        model.requires_grad_(False)
        projector = [p for name, p in model.named_parameters() if "multi_modal_projector" in name]
        if not projector:
            raise UserError(f"{type(model).__name__} has no multi_modal_projector to align")
        for parameter in projector:
            parameter.requires_grad_(True)
        return model
    if config.tuning == "full":
        return model
    if config.tuning == "frozen":
        if config.bottleneck is None:
            raise UserError("tuning is 'frozen' and there is no bottleneck; there would be nothing to train")
        model.requires_grad_(False)
        model.bottleneck.requires_grad_(True)
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
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_num_workers=config.workers,
        dataloader_persistent_workers=config.workers > 0,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.log_steps,
        save_strategy="steps" if config.save_steps > 0 else "no",
        save_steps=max(config.save_steps, 1),
        report_to=config.report_to,
        seed=config.seed,
    )


def freeze_vision(model: nn.Module) -> None:
    """The vision tower keeps its weights, as in the papers; projector and language model are tuned."""
    for name, parameter in model.named_parameters():
        if any(part in ("vision_tower", "vision_model", "visual") for part in name.split(".")):
            parameter.requires_grad_(False)


def save_run(model: Any, processor: Any, output: Path) -> None:
    """Writes the model as transformers reads it, its processor, and the bottleneck beside them."""
    processor.save_pretrained(output)
    if isinstance(model, PreTrainedModel):
        state = {name: value for name, value in model.state_dict().items() if not name.startswith(PREFIX)}
        model.save_pretrained(output, state_dict=state)
        if hasattr(model, "bottleneck"):
            save_bottleneck(model, output)
    else:
        model.save_pretrained(output)


def _end_progress(trainer: Trainer) -> None:
    """A message after a run that fails starts on a line of its own, not behind the progress bar."""
    for callback in trainer.callback_handler.callbacks:
        if (bar := getattr(callback, "training_bar", None)) is not None:
            bar.close()


def _checkpoint_of(output: Path, resume: bool) -> str | None:
    """Where to resume from; a folder that already holds a run is refused unless it is to be resumed."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output is {output}, a file; must be a folder")
    holds_a_run = output.is_dir() and any(path.name != RUN_FILE for path in output.iterdir())
    if holds_a_run and not resume:
        raise UserError(f"output {output} is not empty; name another folder, or resume the run it holds with --resume")
    checkpoint = get_last_checkpoint(output) if output.is_dir() else None
    if resume and checkpoint is None:
        raise UserError(f"output {output} holds no checkpoint to resume from")
    return checkpoint
