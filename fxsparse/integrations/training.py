"""Training a rewritten model with the Trainer of transformers.

`FxsparseCallback` does with any Trainer what a loop by hand does with a `Schedule`: it is built once the optimizer
exists, sees the batches, takes a step after each optimizer step, is saved beside the optimizer and resumes with it.
`FxsparseTrainer` is a Trainer that has the callback and saves what its model is::

    by hand                                        Trainer
    schedule = fxsparse.Schedule(gm, optimizer)    the optimizer is made; at the latest on_train_begin
    schedule.observe(batch)                        a hook before the forward pass, if a pass wants batches
    fxsparse.sparsity_loss(gm).backward()          on_pre_optimizer_step, if there are gates to train
    schedule.step()                                on_optimizer_step
    torch.save(schedule.state_dict(), ...)         on_save, or with the optimizer: checkpoint-N/fxsparse_schedule.pt

The sparsity loss reaches gates and multipliers only. Its gradient is added after that of the task was clipped.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import GraphModule
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from fxsparse import files
from fxsparse import graph as fx
from fxsparse.checkpoint import save
from fxsparse.errors import CheckpointError, OptionError
from fxsparse.graph.record import record_of
from fxsparse.graph.trainable import trainable
from fxsparse.graph.wrapped import within_data_parallel
from fxsparse.integrations.huggingface import save_pretrained
from fxsparse.passes.base import parse_passes
from fxsparse.passes.distill.distill import PATH as DISTILLATION
from fxsparse.passes.event import Event
from fxsparse.passes.order import acting
from fxsparse.passes.structured.hard_concrete import sparsity_loss
from fxsparse.schedule import Schedule

SCHEDULE_FILE = "fxsparse_schedule.pt"
"""The state of the schedule, in the folder of a checkpoint."""
GRAPH_FILE = "fxsparse.safetensors"
"""The graph with its record, for ``fxsparse.load``, in the folder of a finished model."""
_PREFIX = "fxsparse/"
"""Of the schedule's values in a log."""

logger = transformers.utils.logging.get_logger(__name__)

Signals = Mapping[str, Callable[[int], float]]


class FxsparseCallback(TrainerCallback, ExportableState):
    """Drives the schedule of a rewritten model in a Trainer.

    Give it to a Trainer whose model is rewritten: ``Trainer(gm, args, ..., callbacks=[FxsparseCallback()])``. It logs
    the schedule's values beside the loss, as ``fxsparse/gates.sparsity`` and the like.

    Args:
        signals: options that vary during training, as for `Schedule`.
        resume_from: the folder of the checkpoint that the Trainer resumes from; needed if it lies outside the Trainer's
            ``output_dir``.

    Attributes:
        schedule: the running `Schedule`; None before training.

    Raises:
        OptionError: at the start of training, if the model was never rewritten, or the Trainer's arguments do not go
            with it.
        CheckpointError: when training resumes, if the checkpoint holds no state of a schedule.
    """

    def __init__(self, signals: Signals | None = None, resume_from: str | os.PathLike[str] | None = None):
        self.signals, self.resume_from = signals, resume_from
        self.schedule: Schedule | None = None
        self.needs_signals = False
        self._mark = ""
        self._optimizer: Any = None
        self._hook: Any = None

    # --- the schedule ---

    def start(self, model: nn.Module, optimizer: Any, total_steps: int) -> Schedule:
        """Builds the schedule, unless it exists for this optimizer and number of steps."""
        inner = getattr(optimizer, "optimizer", optimizer)
        if self.schedule is not None and self._optimizer is inner and not self.schedule.steps_done:
            return self.schedule
        self.stop()
        self.schedule = Schedule(model, optimizer, total_steps=total_steps, signals=self.signals)
        self._optimizer = inner
        waits = not self.schedule.is_bound  # for the first call, whose passes are not known to want batches yet
        if waits or any(type(event).observe is not Event.observe for event in self.schedule.events.values()):
            self._hook = _observed(model, _Observer(self.schedule))
        return self.schedule

    def stop(self) -> None:
        """Takes the schedule's hooks off the optimizer and the model; the schedule itself stays to be looked at."""
        if self.schedule is not None:
            self.schedule.remove()
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Builds the schedule, and resumes it where the Trainer resumes."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        _check(args, fx.unwrapped(model), optimizer)
        if self.schedule is None or self._optimizer is None:
            _check_stock(args, fx.unwrapped(model))
        if self.needs_signals and not self.signals:
            raise OptionError(
                "the training had signals, which restore_callback_states_from_checkpoint cannot make anew; leave it "
                "False, the schedule is restored all the same"
            )
        schedule = self.start(model, optimizer, state.max_steps)
        if state.global_step:
            self._resume(schedule, args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient of the sparsity loss."""
        gm = fx.unwrapped(kwargs["model"])
        if not _has_trained_gates(gm):
            return
        with torch.enable_grad():
            parameters = [parameter for parameter in gm.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(sparsity_loss(gm), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the changes that are due."""
        assert self.schedule is not None
        self.schedule.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the hooks off."""
        self.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Adds the schedule's values to the Trainer's history and to what later callbacks log."""
        if logs is not None and "loss" in logs:
            logs.update(self.values())
            state.log_history[-1].update(self.values())

    def values(self) -> dict[str, float]:
        """The schedule's values under the names that they have in a log."""
        values = self.schedule.values() if self.schedule is not None else {}
        return {f"{_PREFIX}{name}": value for name, value in values.items()}

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` says of the file of the schedule: a mark by which the two know each other."""
        self._mark = self._mark or uuid.uuid4().hex
        return {"args": {}, "attributes": {"_mark": self._mark, "needs_signals": bool(self.signals)}}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the schedule's state into the folder of the checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.should_save and folder.is_dir() and not args.save_only_model:
            self.save(folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the schedule's state into a folder."""
        if self.schedule is not None:
            self.state()
            with files.unfinished(Path(folder), SCHEDULE_FILE) as part:
                torch.save({"mark": self._mark, "schedule": self.schedule.state_dict()}, part / SCHEDULE_FILE)
                files.put(part / SCHEDULE_FILE, Path(folder) / SCHEDULE_FILE)

    def _resume(self, schedule: Schedule, args: Any, state: Any) -> None:
        folder = Path(self.resume_from or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        file = folder / SCHEDULE_FILE
        advice = (
            f"give FxsparseCallback(resume_from=folder), the folder of the checkpoint whose {SCHEDULE_FILE} is read"
        )
        if not file.exists():
            raise CheckpointError(
                f"{file} does not exist: the training that resumes had no FxsparseCallback, was stopped while it "
                f"saved, or its checkpoint lies elsewhere; {advice}"
            )
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            mark, steps_done = saved["mark"], saved["schedule"]["steps_done"]
        except Exception as error:  # what a damaged file raises is torch's affair
            raise CheckpointError(f"{file} is damaged: {error}") from error
        noted = (state.stateful_callbacks or {}).get(type(self).__name__)
        marks = [
            item["attributes"]["_mark"] for item in (noted if isinstance(noted, list) else [noted] if noted else [])
        ]
        if mark not in marks or steps_done != state.global_step:
            raise CheckpointError(f"{file} is of another training than the one that resumes; {advice}")
        schedule.load_state_dict(saved["schedule"])
        self._mark = mark


class _Observer:
    """Shows a schedule the batches of training, before the forward pass of the model."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.is_busy = schedule, False

    @torch._dynamo.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled() and not self.is_busy:  # a pass may run the model on the batch
            self.is_busy = True
            try:
                self.schedule.observe(kwargs or args)
            finally:
                self.is_busy = False


class _CompiledCall:
    """Shows an observer the calls of a module that ``module.compile(...)`` compiled together with its hooks."""

    def __init__(self, module: nn.Module, observer: _Observer):
        self.module = module
        compiled: Any = module._compiled_call_impl

        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            observer(module, args, kwargs)
            return compiled(*args, **kwargs)

        module._compiled_call_impl, self.compiled = call, compiled

    def remove(self) -> None:
        self.module._compiled_call_impl = self.compiled


def _observed(model: nn.Module, observer: _Observer) -> Any:
    """Shows ``observer`` the calls of a model, outside of what is compiled; a handle that can be removed."""
    model = within_data_parallel(model)
    if getattr(model, "_compiled_call_impl", None) is not None:
        return _CompiledCall(model, observer)
    if isinstance(fx.unwrapped(model), GraphModule) or not isinstance(model, OptimizedModule):
        model = fx.unwrapped(model)
    return model.register_forward_pre_hook(observer, with_kwargs=True)


def _has_trained_gates(gm: nn.Module) -> bool:
    return any(name == "sparsity.lambda_1" for name, _ in gm.named_parameters())


def _check(args: Any, model: nn.Module, optimizer: Any) -> None:
    """OptionError where the Trainer's arguments would lose a part of the rewritten model."""
    if _has_trained_gates(model) and getattr(optimizer, "scaler", None) is not None:
        raise OptionError("gates have optimizers of their own, which fp16's scaler does not know; train with bf16=True")
    distills = isinstance(model, GraphModule) and model.graph.find_nodes(op="call_module", target=DISTILLATION)
    if distills and args.label_smoothing_factor:
        raise OptionError(
            "label_smoothing_factor computes the loss from logits, and the distillation in the model's loss would be "
            "lost; set it to 0"
        )
    if args.gradient_accumulation_steps > 1 and _counts_labels(model) and not model.accepts_loss_kwargs:
        logger.warning(
            "The graph does not take num_items_in_batch: micro-batches count alike, whatever their number of labels. "
            'Rewrite with kwargs={**batch, "num_items_in_batch": torch.tensor(1)} to weight them as the original model '
            "does."
        )


def _check_stock(args: Any, model: nn.Module) -> None:
    """OptionError where a stock Trainer would write checkpoints that it cannot read."""
    if args.save_strategy == SaveStrategy.NO or not isinstance(model, GraphModule):
        return
    tied = next((names for names in fx.parameter_names(model).values() if len(names) > 1), None)
    if tied:
        raise OptionError(f"a stock Trainer cannot save {tied[1]}, which is tied to {tied[0]}; use FxsparseTrainer")
    chooses = any(item.name == "select-tensors" and item.rho is not None for item in _passes(model))
    if chooses and not args.save_only_model:
        raise OptionError(
            "a stock Trainer makes the optimizer of what requires a gradient when it resumes, and that is only the "
            "tensors that were chosen last; use FxsparseTrainer",
            pass_name="select-tensors",
        )


def _passes(gm: GraphModule) -> list[Any]:
    passes = parse_passes(record_of(gm).text) if record_of(gm).text else ()
    return [passes[position] for position in acting([item.name for item in passes])]


def _counts_labels(model: Any) -> bool:
    """Whether the Trainer would tell the original model the number of labels of all micro-batches."""
    original = getattr(model, "original_class", None)
    if original is None or hasattr(original, "accepts_loss_kwargs"):
        return bool(getattr(original, "accepts_loss_kwargs", False))
    parameters = inspect.signature(original.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


class FxsparseTrainer(Trainer):
    """A Trainer of a rewritten model.

    It takes the arguments of ``transformers.Trainer``, adds an `FxsparseCallback` unless one is among the callbacks,
    and saves models as what they are. A checkpoint (``checkpoint-N``) holds the graph with its record, from which
    training resumes. `save_model` writes a finished model: a checkpoint of the model's own class, which
    ``fxsparse.from_pretrained`` reads and, where its configuration can express it, transformers' ``from_pretrained``;
    and the graph itself, ``fxsparse.safetensors``, for ``fxsparse.load``. Where no module of the class computes what
    the graph does, only the graph is written, and a warning says why.

    Args:
        signals: options that vary during training, as for `Schedule`.
    """

    _graph_file = "model.safetensors"

    def __init__(self, *args: Any, signals: Signals | None = None, **kwargs: Any):
        model = kwargs.get("model", args[0] if args else None)
        if fx.module_form_of(model) is not None:
            raise OptionError(
                "FxsparseTrainer takes a graph, and a module of fxsparse.to_module needs no trainer of its own: "
                "transformers.Trainer(module, args, callbacks=[FxsparseCallback()])"
            )
        fx.graph_module_of(model, "FxsparseTrainer")
        config = getattr(fx.unwrapped(model), "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(*args, **kwargs)
        if use_cache is not None:
            fx.unwrapped(
                model
            ).config.use_cache = use_cache  # the graph has no cache; the setting belongs to the saved model
        of_callbacks = [item for item in self.callback_handler.callbacks if isinstance(item, FxsparseCallback)]
        if signals and of_callbacks:
            raise OptionError("give the signals to the FxsparseCallback that is among the callbacks")
        if not of_callbacks:
            self.add_callback(FxsparseCallback(signals))

    @property
    def sparsity(self) -> FxsparseCallback:
        """The callback that drives the schedule."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, FxsparseCallback))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Gives the optimizer all that may be trained, and builds the schedule before the optimizer loads its state."""
        gm = fx.graph_module_of(self.model, "FxsparseTrainer")
        frozen = [gm.get_parameter(name) for name in trainable(gm)]
        frozen = [parameter for parameter in frozen if not parameter.requires_grad]
        for parameter in frozen:  # not trained at present; another choice of tensors may train it
            parameter.requires_grad_(True)
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        if self.is_in_train and self.state.max_steps > 0:
            self.sparsity.start(gm, optimizer, self.state.max_steps)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the schedule's values beside the loss."""
        super().log({**logs, **self.sparsity.values()} if "loss" in logs else logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a finished model, see the class; within a checkpoint, the graph alone."""
        self._graph_file = "model.safetensors" if _internal_call else GRAPH_FILE
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir or ".")
        if _internal_call or not self.args.should_save:
            return
        gm = fx.graph_module_of(self.model, "FxsparseTrainer.save_model")
        try:
            save_pretrained(gm, _original(gm), folder)
        except CheckpointError as error:
            logger.warning(f"{folder} holds the graph alone, {GRAPH_FILE}, which fxsparse.load reads: {error}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict={})
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        with files.unfinished(folder, "trainer") as part:
            super()._save(os.fspath(part), state_dict={})  # the Trainer writes no tied tensors; its other files are
            (part / "model.safetensors").unlink(missing_ok=True)  # right, but this one is empty
            shutil.copytree(part, folder, dirs_exist_ok=True)
        save(fx.graph_module_of(self.model, "FxsparseTrainer.save_model"), folder / self._graph_file)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.sparsity.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.sparsity.resume_from = checkpoint


def _original(gm: GraphModule) -> nn.Module:
    """A module of the class that was traced, without storage."""
    kind: Any = getattr(gm, "original_class", None)
    if kind is None:
        raise CheckpointError(f"{record_of(gm).text or 'the graph'} is of no transformers model")
    with torch.device("meta"):
        model: nn.Module = kind(gm.config)
    return model
