"""Saving and loading rewritten models: one safetensors file that holds the tensors and the record.

The file's metadata has the record as JSON, so that loading needs the original model's code and nothing else: the
record is replayed on a fresh instance, then the tensors are filled in. Nothing is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.errors import CheckpointError
from fxsparse.graph.record import HeldWeight, Record, record_of
from fxsparse.ops.nm import Pattern, unpack, validate
from fxsparse.passes.mux.multiplex import PATH as MULTIPLEXER
from fxsparse.passes.nm.low_rank import merged
from fxsparse.rewriting import replay

_RECORD = "fxsparse"


def save(gm: GraphModule, path: str | os.PathLike[str]) -> None:
    """Writes a rewritten model: parameters, masks and other buffers, and its record.

    Args:
        gm: a traced or rewritten graph module.
        path: the file, by custom ``*.safetensors``; it appears whole or not at all.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in _unique(gm.state_dict()).items()}
    unfinished = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        save_file(tensors, unfinished, metadata={"format": "pt", _RECORD: record_of(gm).to_json()})
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> GraphModule:
    """Reads a rewritten model.

    Args:
        path: what :func:`save` wrote.
        model: a fresh instance of the original model. The loaded graph module takes over its parameters, so it is
            used up.
        args, kwargs: an example batch, as for :func:`fxsparse.trace`.

    Raises:
        CheckpointError: the file was not written by :func:`save`, or does not fit the model.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read as a safetensors file: {error}") from error
    if _RECORD not in metadata:
        raise CheckpointError(f"{os.fspath(path)} holds no record of passes; it was not written by fxsparse.save")
    gm = replay(Record.from_json(metadata[_RECORD]), model, args, kwargs, structure_only=True)
    _fill(gm, tensors, os.fspath(path))
    gm.meta["fxsparse"] = Record.from_json(metadata[_RECORD])
    return gm


def _unique(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors under their first name only: a file holds each once."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        key = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
        if key not in seen:
            unique[name] = tensor
        seen.add(key)
    return unique


@torch.no_grad()
def _fill(gm: GraphModule, tensors: Mapping[str, Tensor], path: str) -> None:
    own = _unique(gm.state_dict())
    missing, unexpected = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    misfits = [name for name in set(own) & set(tensors) if own[name].shape != tensors[name].shape]
    for what, names in (("lacks", missing), ("has unknown", unexpected), ("has other shapes for", sorted(misfits))):
        if names:
            raise CheckpointError(f"{path} {what} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    for weight in record_of(gm).weights:
        if weight.storage == "compressed":
            parts = (tensors.get(f"{weight.name}_{part}") for part in ("values", "indices", "column_mask"))
            _check(weight, *parts)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _check(weight: HeldWeight, values: Tensor | None, indices: Tensor | None, column_mask: Tensor | None) -> None:
    if values is None or indices is None:  # _fill has said so of a weight that the graph reads
        return
    validate(values, indices, Pattern.parse(weight.pattern), weight.in_features, column_mask, name=weight.name)


_SUFFIXES = ("_values", "_indices", "_column_mask", "_mask", "_down", "_up")


@torch.no_grad()
def dense_state_dict(gm: GraphModule) -> dict[str, Tensor]:
    """The state dict of the model as it was before the rewrite: its keys, dense values, pruned weights zero.

    Low-rank branches that take part are merged into their weight, which is then no longer sparse, so that the result
    computes what the graph computes. It loads into the original model with ``load_state_dict``. What multiplexing added
    is no part of it.

    Args:
        gm: a traced or rewritten graph module.

    Returns:
        every key of the original's ``state_dict``; tied weights under all their names.
    """
    state = {name: tensor.detach() for name, tensor in gm.state_dict().items()}
    branches = {
        str(node.target) for node in gm.graph.nodes if node.op == "get_attr" and str(node.target).endswith("_down")
    }
    held = {weight.name: weight for weight in record_of(gm).weights}
    own = {f"{name}{suffix}" for name in held for suffix in _SUFFIXES}
    own |= {name for name in state if _is_branch(name, state)}
    own |= {name for name in state if name.startswith(f"{MULTIPLEXER}.") and "multiplex{" in record_of(gm).text}
    dense = {name: tensor for name, tensor in state.items() if name not in own}
    for weight in held.values():
        values = _dense(weight, state)
        dense.update((name, values) for name in weight.names)
    stored_transposed = {linear.name: linear.transposed for linear in fx.linears(gm)}
    for down in sorted(branches & set(state)):
        name = down.removesuffix("_down")
        transposed = held[name].transposed if name in held else stored_transposed[name]
        original = dense[name].t() if transposed else dense[name]
        total = merged(original, state[down], state[f"{name}_up"])
        names = held[name].names if name in held else (name,)
        dense.update((alias, total.t().contiguous() if transposed else total) for alias in names)
    return dense


def _is_branch(name: str, state: dict[str, Tensor]) -> bool:
    stem = name.removesuffix("_down").removesuffix("_up")
    return stem != name and f"{stem}_down" in state and f"{stem}_up" in state


def _dense(weight: HeldWeight, state: dict[str, Tensor]) -> Tensor:
    """A held weight as it was stored before, with its pruned positions zero."""
    if weight.storage == "masked":
        mask = state[f"{weight.name}_mask"]
        return state[weight.name] * (mask.t() if weight.transposed else mask)
    pattern = Pattern.parse(weight.pattern)
    values, indices = state[f"{weight.name}_values"], state[f"{weight.name}_indices"]
    dense = unpack(values, indices, pattern, weight.in_features)
    return dense.t().contiguous() if weight.transposed else dense
