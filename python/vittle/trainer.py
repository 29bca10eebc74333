"""transformers' Trainer for a model with a bottleneck: alpha's schedule, the log, checkpoints, resuming."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from vittle import checkpoints
from vittle.data import LlavaDataset, ModalityLengthSampler
from vittle.errors import UserError
from vittle.methods.attachment import methods_of
from vittle.methods.bottleneck import AlphaSchedule
from vittle.models import quiet
from vittle.monitor import Monitor


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


_COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("step", "{:6d}"),
    "loss": ("loss", "{:8.4f}"),
    "ce": ("CE", "{:8.4f}"),
    "kl_vision": ("KL vision", "{:10.4f}"),
    "kl_text": ("KL text", "{:8.4f}"),
    "std_vision": ("std v", "{:6.3f}"),
    "std_text": ("std t", "{:6.3f}"),
    "alpha": ("alpha", "{:6.3f}"),
    "bottleneck_share": ("share", "{:6.1%}"),
    "second_look_share": ("look", "{:6.1%}"),
    "tokens_per_second": ("tokens/s", "{:9.0f}"),
}
"""What a line of the terminal shows of a log: heads and formats; in all at most 80 columns."""


class TableCallback(ProgressCallback):
    """transformers' progress bar, above it one line of a table for each log."""

    shown: tuple[str, ...] = ()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One line, below a head where the columns change; of an evaluation what transformers shows."""
        if self.training_bar is None or "loss" not in logs:
            if "train_runtime" not in logs:
                super().on_log(args, state, control, logs=logs, **kwargs)
            return
        values = {"step": state.global_step} | logs
        shown = tuple(name for name in _COLUMNS if name in values)
        cells = [_COLUMNS[name][1].format(values[name]) for name in shown]
        if shown != self.shown:
            self.shown = shown
            heads = (_COLUMNS[name][0] for name in shown)
            self.training_bar.write("".join(f"{head:>{len(cell)}}" for head, cell in zip(heads, cells, strict=True)))
        self.training_bar.write("".join(cells))


class WindowCallback(TrainerCallback):
    """A checkpoint ends a window of the log: a run that goes on from it logs what the uninterrupted one does."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run logs and saves as it is told now; a checkpoint's state has what it was told then."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where a checkpoint is due, so is a log."""
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class BottleneckTrainer(Trainer):
    """transformers' Trainer, whose log also shows the bottleneck, and whose checkpoints are whole or not there at all.

    It takes a LlavaDataset in the order of :class:`vittle.data.ModalityLengthSampler` where the arguments ask for
    batches of like lengths (``train_sampling_strategy="group_by_length"``).

    Args:
        settings: of the run, as JSON has them; they lie in every checkpoint.
    """

    def __init__(self, *args: Any, settings: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = dict(settings or {})
        self.run_dir: Path | None = None
        self.monitor = Monitor(self.args.device, self.model)
        self.add_callback(self.monitor)
        if self.pop_callback(ProgressCallback):
            self.add_callback(TableCallback())
        self.add_callback(WindowCallback())

    @property
    def shares_weights(self) -> bool:
        """Whether ranks share the model's weights, and so must all see images, or none."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

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
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ModalityLengthSampler(data.lengths, data.image_counts, size, self.args.seed, fill=self.shares_weights)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, watched by the monitor."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.monitor.forward_pass():
            result = super().compute_loss(model, inputs, *args, **kwargs)
        copies = getattr(self.model, "_tp_size", None) or 1
        ranks = self.args.world_size // copies
        weight = 1 / (ranks * self.current_gradient_accumulation_steps)
        if kwargs.get("num_items_in_batch") is not None and self.model_accepts_loss_kwargs:
            weight = 1.0 if self.args.average_tokens_across_devices else 1 / ranks
        self.monitor.add(inputs, weight, copies)
        return result

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.run_dir is None else str(self.run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's own into a hidden folder, which becomes the checkpoint when all ranks have written."""
        output, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        partial = output / checkpoints.PARTIAL / name
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with checkpoints.writing(output, name) as self.run_dir:
            try:
                with quiet():
                    super()._save_checkpoint(model, trial)
            finally:
                self.run_dir = None
            self.accelerator.wait_for_everyone()
            is_best = self.state.best_model_checkpoint == str(partial)
            if is_best:
                self.state.best_model_checkpoint = str(output / name)
            if self.args.should_save:
                if is_best:
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                checkpoints.finish(partial, output / name, self.settings)
                if self.args.save_total_limit:
                    checkpoints.keep_newest(output, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the checkpoint that is resumed is the last; transformers 5.23 would train one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """By from_pretrained, which knows the names under which save_pretrained writes a model.

        transformers 5.23's own looks for the names that the model has now: a LLaVA would go on from the weights that
        it started with, with a warning.
        """
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load: Any = type(model).from_pretrained
        with quiet():  # it would report the bottleneck's tensors as unexpected
            loaded, report = load(resume_from_checkpoint, dtype=model.dtype, output_loading_info=True)
        if report["missing_keys"]:
            raise UserError(f"{resume_from_checkpoint} has no {min(report['missing_keys'])}; it holds another model")
        saved = loaded.state_dict()
        for each in methods_of(model):
            each.load(Path(resume_from_checkpoint))
            saved |= {name: t for name, t in model.state_dict().items() if name.startswith(each.files.prefix)}
        model.load_state_dict(saved)

    def _load_best_model(self) -> None:
        if not isinstance(self.model, PreTrainedModel) or self.shares_weights:
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what the monitor saw since the last log of a loss."""
        if "loss" in logs:
            logs |= self.monitor.window(lambda values: self.accelerator.reduce(values, "sum"))
        super().log(logs, *args, **kwargs)
