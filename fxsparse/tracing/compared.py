"""Whether a captured graph computes what the model does, on the example it was captured with.

Python may decide otherwise while a model is captured: libraries ask whether they are traced, and then build the masks
of attention that they leave out otherwise. Such a graph runs, and is another model.
"""

from __future__ import annotations

from typing import Any

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


def check_values(model: nn.Module, gm: GraphModule, example: Inputs) -> list[str]:
    """Compares graph and model in evaluation mode on the example; returns notes.

    Nothing is compared without values (fake and meta tensors, shards of several processes).

    Raises:
        TraceError: the outputs differ by more than rounding.
    """
    if any(map(_without_values, (*model.parameters(), *model.buffers(), *pytree.tree_leaves(example)))):
        return []
    try:
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
        return []
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
        state = {name: tensor.clone() for name, tensor in module.named_buffers()}
        if moved:
            state |= {name: _moved(tensor) for name, tensor in module.named_parameters()}
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, example)
        return torch.func.functional_call(module, state, args, kwargs)


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
