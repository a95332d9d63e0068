"""Parameters that FSDP has sharded: reading them whole, cutting other tensors alike, and writing into the local part.

``fully_shard`` replaces the parameters of a module by DTensors and gives the module a class derived from its own. What
is chosen from weights (masks, scores) is computed from whole tensors, alike on every rank; what goes with a parameter
element by element (a pull on its gradient, its optimizer's state) is cut as the parameter is. A tensor that is not
sharded passes through every function here as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the elements of all ranks, differentiable; every rank must ask for it."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank holds whole, sharded as ``like``, which has its shape; or sharded in another way."""
    if is_sharded(tensor):
        if is_sharded(like) and _layout(tensor) == _layout(like):
            return tensor
        tensor = whole(tensor)
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), *_layout(like), src_data_rank=None)


def _layout(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The elements that this rank holds, sharing their memory, and the position of the first in every dimension."""
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, *_layout(tensor))
    return tensor.to_local(), tuple(offsets)  # type: ignore[attr-defined]


def local_index(tensor: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """The elements that this rank holds, and those of ``index`` along ``dim`` that are among them, counted there."""
    if not is_sharded(tensor):
        return tensor, index  # a comparison would have a GPU wait
    part, offsets = local_part(tensor)
    here = index - offsets[dim]
    return part, here[(here >= 0) & (here < part.shape[dim])]


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module itself."""
    api = sys.modules.get("torch.distributed.fsdp")
    return api is not None and isinstance(module, api.FSDPModule)


@contextmanager
def unsharded_class(module: nn.Module) -> Iterator[None]:
    """Gives a module the class that it had before ``fully_shard``, whose code FX writes and whose copies it makes."""
    kind = type(module)
    if not is_fully_sharded(module):
        yield
        return
    api = sys.modules["torch.distributed.fsdp"]
    module.__class__ = next(base for base in kind.__mro__ if not issubclass(base, api.FSDPModule))
    try:
        yield
    finally:
        module.__class__ = kind


def in_process_group() -> bool:
    """Whether several processes may train one model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reshard(module: nn.Module) -> None:
    """Puts the sharded parameters back, in whose place ``fully_shard`` leaves the whole ones after an evaluation."""
    if is_fully_sharded(module):
        module.reshard()  # type: ignore[operator]


def leave_to_ranks(module: nn.Module, *names: str) -> None:
    """Tells ``DistributedDataParallel`` to neither reduce nor broadcast parameters and buffers of a module.

    They are those whose gradients are equal on all ranks and come from outside the forward pass, and those that each
    rank adds up over its own batches.
    """
    known = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    vars(module)["_ddp_params_and_buffers_to_ignore"] = sorted({*known, *names})
