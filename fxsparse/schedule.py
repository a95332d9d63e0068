"""The schedule of a rewritten model makes all changes during training, with one call per optimizer step.

Each pass says what varies as an `Event`. The schedule builds the events of all passes that still have a part in the
model, shows them the batches, calls them before and after every optimizer step, and saves and restores their state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fxsparse import graph as fx
from fxsparse.backend.first_call import compiled_to_rewrite
from fxsparse.backend.whole_model import add_new_parameters
from fxsparse.conversion.optimizer_state import follow_weights
from fxsparse.errors import CheckpointError, OptionError
from fxsparse.graph.added_state import added_state_of, attach_state
from fxsparse.graph.record import Entry, record_of
from fxsparse.graph.sharded import reshard
from fxsparse.graph.wrapped import unwrapped_module
from fxsparse.history import History
from fxsparse.optimizers import works_on_matrices
from fxsparse.options import Count, checked, shown
from fxsparse.passes.base import parse_passes
from fxsparse.passes.event import Event
from fxsparse.passes.nm.sparse_linear import sparse_sites
from fxsparse.passes.order import acting


class Schedule:
    """Makes the changes that the passes of a rewritten graph planned for training.

    Build it after the optimizer and call :meth:`step` after every optimizer step::

        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=10_000)
        ...
        optimizer.step()
        schedule.step()

    The schedule of ``torch.compile(model, backend="fxsparse", options={"recipe": ...})`` may be built before the first
    call, which rewrites the model. It starts then, and gives the optimizer the parameters that passes added, each in
    the group of the parameter beside it. With ``"weights": "compressed"`` the compressed values take the places of the
    dense weights in the optimizer, also where it was built before that call and has state of them.

    Buffers change in place. A change of the graph itself (low-rank branches start) recompiles the graph module, and
    a running ``torch.compile`` notices. Under gradient accumulation, call :meth:`step` once per optimizer step.

    Args:
        gm: a rewritten graph module, or the module that `fxsparse.to_module` made of one; also wrapped by
            ``torch.compile`` or ``DistributedDataParallel``.
        optimizer: the optimizer that trains it, also wrapped by accelerate.
        total_steps: optimizer steps of the whole training.
        signals: options that vary during training. Each is named by pass and option, and is a function of the
            optimizer step, counted from 1: ``{"select-tensors.rho": lambda step: 0.4 if is_noon() else 0.7}``.

    Attributes:
        history: the numbers of :meth:`values` at up to some hundred steps, for `fxsparse.plot_history` and
            `fxsparse.report`; it is saved and resumed with the schedule.

    Raises:
        OptionError: ``total_steps`` is not positive, the optimizer trains none of the graph's parameters, or no pass
            of the graph reads the option of a signal.
    """

    def __init__(
        self,
        gm: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        signals: Mapping[str, Callable[[int], float]] | None = None,
    ):
        total_steps = checked("total_steps", total_steps, Count)
        signals = checked("signals", signals, Mapping[str, Callable[[int], float]] | None)
        if not hasattr(optimizer, "param_groups"):
            raise OptionError(f"optimizer={shown(optimizer)} is no torch.optim.Optimizer")
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # accelerate's steps the one inside, whose hooks are the ones that run
        self.total_steps = total_steps
        self.steps_done = 0
        self.history = History(total_steps)
        self.events: dict[str, Event] = {}
        self._optimizer, self._signals = optimizer, dict(signals or {})
        self._gm: Any = None
        self._loaded: dict[str, Any] | None = None
        self._creates_state = False
        self._hooks: tuple[Any, ...] = ()
        self._compiled = compiled_to_rewrite(gm)
        if self._compiled is None:
            self._bind(fx.rewritten_of(gm, "fxsparse.Schedule"))
        else:
            attach_state(self._compiled.model).waiting.append(self._bind)
        state = added_state_of(unwrapped_module(gm))
        if state is not None:
            state.scheduled = True

    @property
    def is_bound(self) -> bool:
        """Whether the model is rewritten; a compiled one is at its first call."""
        return self._gm is not None

    def _bind(self, rewritten: Any) -> None:
        """Builds the events of a rewritten graph module, or of a module made of one."""
        optimizer, signals = self._optimizer, self._signals
        self._gm = rewritten
        follow_weights(optimizer, rewritten)
        add_new_parameters(rewritten, optimizer)
        parameters = {id(parameter) for parameter in rewritten.parameters()}
        if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
            raise OptionError(
                "the optimizer holds none of the graph module's parameters; "
                "build it from gm.parameters() after rewriting"
            )
        _warn_of_matrices(rewritten, optimizer)
        read: set[str] = set()
        passes = [item for entry in _acting_entries(record_of(rewritten).entries) for item in parse_passes(entry.text)]
        for item in (passes[position] for position in acting([item.name for item in passes])):
            for event in item.schedule(rewritten, optimizer, self.total_steps):
                keys = {name: f"{item.name}.{name}" for name in event.varying}
                event.signals = {name: signals[key] for name, key in keys.items() if key in signals}
                read |= set(keys.values())
                self.events[f"{item.name}.{len(self.events)}"] = event
        if unknown := sorted(set(signals) - read):
            raise OptionError(
                f"no signal is called {', '.join(unknown)}; there are: {', '.join(sorted(read)) or 'none'}"
            )
        # Only inside optimizer.step() are the gradients unscaled and clipped.
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_creation),
            optimizer.register_load_state_dict_pre_hook(self._completed),
        )
        if self._loaded is not None:
            self.load_state_dict(self._loaded)

    def _rewritten(self, wanted_for: str) -> Any:
        if self._gm is None:
            raise OptionError(
                f"fxsparse.Schedule.{wanted_for}: the compiled model is rewritten when it is first called; call "
                "it, or Schedule.observe with a batch, before"
            )
        return self._gm

    def observe(self, batch: Any, *, loss: Callable[[Any], torch.Tensor] | None = None) -> None:
        """Shows the schedule the batch of the next step; call it before the forward pass.

        Passes that choose by measurements on a batch (``select-tensors{rho=...}``) do so here on the steps they are
        due, and ignore the batches of other steps. Under gradient accumulation the step's first batch counts.

        Args:
            batch: the inputs of the graph: a mapping of keyword inputs, a tuple of positional ones, or a tensor.
            loss: computes the scalar loss from the graph's output; by default the output's ``loss``, or its one scalar.
        """
        if self._gm is None and self._compiled is not None:
            self._compiled.rewrite(batch)
        reshard(self._gm)
        for event in self.events.values():
            event.observe(self.steps_done + 1, batch, loss)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """A hook of the optimizer; under a closure, as Lightning steps, gradients are final once that has run."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args begins with the optimizer
        if closure is None:
            self._use_gradients(optimizer)
            return None
        waits = [True]

        def closure_first() -> Any:
            loss = closure()
            if waits:  # an optimizer may call it again
                waits.clear()
                self._use_gradients(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": closure_first}

    def _use_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        reshard(self._gm)
        self._creates_state = _only_creates_state(optimizer)
        for event in self.events.values():
            event.forget() if self._creates_state else event.before_step(self.steps_done + 1)

    def _after_creation(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Takes the count of a step back that was none: a parameter that a checkpoint does not know starts anew."""
        if self._creates_state:
            for state in optimizer.state.values():
                for key, first in (("step", 0), ("mu_product", 1)):
                    if isinstance(state.get(key), torch.Tensor):
                        state[key].fill_(first)
                    elif key in state:
                        state[key] = first

    def _completed(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state of version 0.1.0 with the parameters that it lacks, which then had no state."""
        late = {id(parameter) for event in self.events.values() for parameter in event.late_parameters()}
        groups = []
        for here, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
            held, params = [id(parameter) for parameter in here["params"]], saved["params"]
            if len(params) < len(held) and len(params) == sum(key not in late for key in held):
                others = iter(params)
                params = [f"late {key}" if key in late else next(others) for key in held]
            groups.append({**saved, "params": params})
        return {**state, "param_groups": [*groups, *state["param_groups"][len(groups) :]]}

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """Makes the changes that are due; call it after each optimizer step.

        Args:
            loss: of the step, for the history; it is read only at the steps that the history keeps.
        """
        reshard(self._rewritten("step"))
        self.steps_done += 1
        for event in self.events.values():
            event.after_step(self.steps_done)
            chosen = event.trained_tensors()
            if chosen is not None:
                self.history.chose(self.steps_done, chosen)
        if self.history.due(self.steps_done):
            self.history.add(self.steps_done, self.values(), loss)

    def values(self) -> dict[str, float]:
        """Numbers for a log, named by pass: sparsity, omission, rho, whether branches have started."""
        return {
            f"{key.rpartition('.')[0]}.{name}": value
            for key, event in self.events.items()
            for name, value in event.values().items()
        }

    def remove(self) -> None:
        """Removes the schedule's hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The position in the training, to be saved beside the optimizer's state."""
        states = {key: event.state_dict() for key, event in self.events.items()}
        return {
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "history": self.history.to_json(),
            "events": {key: state for key, state in states.items() if state},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes at the step at which :meth:`state_dict` was called.

        Raises:
            CheckpointError: the state belongs to a graph with other passes.
        """
        if self._gm is None:
            self._loaded = state  # until the first call
            return
        saved = state["events"] if set(state["events"]) <= set(self.events) else self._by_order(state["events"])
        unknown = sorted(set(saved) - set(self.events))
        if unknown:
            raise CheckpointError(
                f"the schedule's state is of {', '.join(unknown)}, which this graph does not have; "
                "load it beside the model it was saved with"
            )
        self.steps_done = state["steps_done"]
        if "history" in state:  # earlier versions kept none
            self.history.load_json(state["history"])
        for key, part in saved.items():
            self.events[key].load_state_dict(part)
        for event in self.events.values():
            event.resume(self.steps_done)

    def _by_order(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The states under the keys of here; earlier versions numbered the events without those that have no state."""
        renamed = dict(saved)
        for name in {key.rpartition(".")[0] for key in saved}:
            before, now = ([key for key in keys if key.rpartition(".")[0] == name] for keys in (saved, self.events))
            if len(before) == len(now):
                states = [renamed.pop(key) for key in before]
                renamed.update(zip(now, states, strict=True))
        return renamed


def _warn_of_matrices(rewritten: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compressed values are no matrix of the model, which some optimizers take every two-dimensional parameter for."""
    if not works_on_matrices(optimizer):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = [site.parameter_name for site in sparse_sites(rewritten) if site.compressed]
    names = [name for name in dict.fromkeys(names) if id(fx.attribute(rewritten, name)) in held]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{type(optimizer).__name__} works on matrices, and {names[0]}{others} are none: a column of compressed "
            "values holds weights of different inputs. Give these to an optimizer of single elements (AdamW), or use "
            'nm-masks with storage="masked"',
            stacklevel=3,
        )


def _acting_entries(entries: Iterable[Entry]) -> list[Entry]:
    """The entries without repetitions that changed nothing, whose events would act twice on the sites of the first."""
    acting_entries: list[Entry] = []
    for entry in entries:
        if entry.rewritten or all(entry.text != other.text for other in acting_entries):
            acting_entries.append(entry)
    return acting_entries


def _only_creates_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is that of ``torch.distributed.checkpoint``, which lets an optimizer create its state by a step
    with learning rate 0 and gradients 0, and not one of the training."""
    if optimizer.state or any(group.get("lr", 1) != 0 for group in optimizer.param_groups):
        return False
    gradients = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
    return not any(gradient is not None and bool(gradient.any()) for gradient in gradients)
