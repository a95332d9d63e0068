"""Whether a captured graph computes what the model does, on the example it was captured with.

Python may decide otherwise while a model is captured: libraries ask whether they are traced, and then build the masks
of attention that they leave out otherwise. Such a graph runs, and is another model. A ``torch.autograd.Function`` is
captured as its forward, so where a model runs one, gradients are compared too.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse.errors import TraceError
from fxsparse.graph.outputs import largest, named_floats, named_tensors
from fxsparse.tracing.export import Inputs, left_as_it_was, model_frames, quote, without_autocast

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative to the largest value of an output. Attention may run another kernel; a wrong capture is far off."""
ROUGH = 5e-2
"""The same in half precision."""
_UNSTABLE = 0.1
"""A model that rounding moves by this part of the difference decides on close numbers; nothing follows from it."""


OF_GRADIENTS = 1e-2
"""Relative to the largest gradient of a parameter; one of another function is far off."""

Function = type[torch.autograd.Function]


@contextlib.contextmanager
def functions_noted() -> Iterator[set[Function]]:
    """Notes the functions with a backward of their own that run meanwhile, torch's aside."""
    noted: set[Function] = set()
    apply = inspect.getattr_static(torch.autograd.Function, "apply")  # of C in torch 2.15

    def noting(cls: Function, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            noted.add(cls)
        return apply.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(noting)):
        yield noted


def check_values(model: nn.Module, gm: GraphModule, example: Inputs, captured: Collection[Function] = ()) -> list[str]:
    """Compares graph and model in evaluation mode on the example; returns notes.

    Nothing is compared without values (fake and meta tensors, shards of several processes).

    Args:
        model, gm: the model and its graph.
        example: what it was captured with.
        captured: functions with a backward of their own that ran then.

    Raises:
        TraceError: the outputs differ by more than rounding, or where such functions run, gradients.
    """
    if any(map(_without_values, (*model.parameters(), *model.buffers(), *pytree.tree_leaves(example)))):
        return []
    try:
        with functions_noted() as functions:
            wanted = _run(model, example)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return [f"not compared with the model, which does not run on the example: {type(error).__name__}: {reason}"]
    try:
        got = _run(gm, example)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} runs on the example, but the graph captured of it does not: "
            f"{type(error).__name__}: {error}{quote(model_frames(error))}"
        ) from error
    different = _difference(wanted, got)
    if different is None:
        notes = _check_gradients(model, gm, example, functions, training=False)
        return notes + _check_gradients(model, gm, example, {*captured} - functions, training=True)
    name, most, off = different
    moved = _difference(wanted, _run(model, example, moved=True), tolerant=False)
    if moved is not None and moved[2] >= _UNSTABLE * off:
        return [f"{name} of graph and model differ by {off:.3g} of {most:.3g}, as the model's own do by rounding"]
    raise TraceError(
        f"{type(model).__name__}: the captured graph computes something else than the model on the example: {name}, of "
        f"up to {most:.3g}, differs by {off:.3g}. Something in the model's Python is decided differently while it is "
        "captured, often which mask attention gets: pass what it is made of (attention_mask, position_ids, "
        "token_type_ids) in the example"
    )


def _check_gradients(
    model: nn.Module, gm: GraphModule, example: Inputs, functions: set[Function], *, training: bool
) -> list[str]:
    """Compares the gradients of all parameters, if functions with a backward of their own run in a mode."""
    if not functions:
        return []
    names = ", ".join(sorted(function.__name__ for function in functions))
    (theirs, wanted), (mine, got) = (_gradients(module, example, training) for module in (model, gm))
    if training and _difference(theirs, mine) is not None:
        return [
            f"{names} has a backward of its own, which a graph does not keep; random draws keep it from a comparison"
        ]
    least = 1e-3 * max(map(largest, wanted.values()), default=0.0)
    for name, gradient in wanted.items():
        most = max(largest(gradient), least)
        off = largest(gradient.double() - got.get(name, torch.zeros_like(gradient)).double())
        if not off <= OF_GRADIENTS * most:
            raise TraceError(
                f"{type(model).__name__}: {names} has a backward of its own that is not the derivative of its forward, "
                f"and a graph keeps the forward alone: the gradient of {name}, of up to {most:.3g}, differs by "
                f"{off:.3g}. Write it as a torch.library.custom_op with register_autograd, or without a function, such "
                "as y + (x - x.detach()) for a gradient that passes"
            )
    return []


def _gradients(module: nn.Module, example: Inputs, training: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of the parameters for some gradient of the outputs; nothing of a module changes."""
    with left_as_it_was(module), without_autocast(), torch.enable_grad():
        module.train(training)
        trained = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        outputs = [tensor for _, tensor in named_floats(_called(module, example, trained))]
        total = sum((y * torch.arange(y.numel(), device=y.device).cos().view(y.shape)).sum() for y in outputs)
        if not isinstance(total, Tensor) or not total.requires_grad:
            return outputs, {}
        gradients = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
        return outputs, {name: found for name, found in zip(trained, gradients, strict=True) if found is not None}


def _without_values(leaf: Any) -> bool:
    return isinstance(leaf, FakeTensor | DTensor) or (isinstance(leaf, Tensor) and leaf.is_meta)


def _run(module: nn.Module, example: Inputs, moved: bool = False) -> Any:
    """What a module returns in evaluation mode; its state, and torch's random one from which each run begins, stay.

    Args:
        module: the model or the graph.
        example: its inputs.
        moved: whether to move the parameters within their rounding.
    """
    with left_as_it_was(module), without_autocast(), torch.no_grad():
        module.eval()
        parameters = module.named_parameters() if moved else ()
        return _called(module, example, {name: _moved(tensor) for name, tensor in parameters})


def _called(module: nn.Module, example: Inputs, parameters: dict[str, Tensor]) -> Any:
    """What a module returns with these parameters instead of its own; it may write into copies alone."""
    state = {name: tensor.clone() for name, tensor in module.named_buffers()}
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, example)
    return torch.func.functional_call(module, state | parameters, args, kwargs)


def _moved(parameter: Tensor) -> Tensor:
    if not parameter.is_floating_point():
        return parameter
    return parameter * (1 + torch.finfo(parameter.dtype).eps * torch.randn_like(parameter))


def _difference(wanted: Any, got: Any, tolerant: bool = True) -> tuple[str, float, float] | None:
    """An output that differs, its largest value and the largest difference; the largest of all if not ``tolerant``."""
    theirs, mine = named_tensors(wanted), named_tensors(got)
    if [tensor.shape for _, tensor in theirs] != [tensor.shape for _, tensor in mine]:
        return "the list of outputs and their sizes", float("nan"), float("inf")
    found = []
    for (name, tensor), (_, other) in zip(named_floats(wanted), named_floats(got), strict=True):
        same = (tensor == other) | (tensor.isnan() & other.isnan())
        most = largest(tensor[tensor.isfinite()])
        off = largest((tensor.double() - other.double())[~same])
        if not tolerant or not off <= TOLERANCE.get(tensor.dtype, ROUGH) * most:
            found.append((name, most, off))
    return max(found, key=lambda item: item[2], default=None)
