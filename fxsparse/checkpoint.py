"""Saves a rewritten model in one safetensors file with its tensors and its record, and loads it again.

The file's metadata holds the record as JSON. `load` needs only this file and the code of the original model: it
replays the record on a fresh instance and then fills in the tensors. Nothing is pickled.

`dense_state_dict` goes the other way: it gives the weights in the form that the original model loads.

| a weight ``w`` in the graph | in the file                                       | in `dense_state_dict`              |
|-----------------------------|---------------------------------------------------|------------------------------------|
| compressed N:M              | ``w_values``, ``w_indices``                       | ``w``, zero at pruned positions    |
| masked N:M                  | ``w``, ``w_mask``                                 | ``w`` times its mask               |
| double-pruned               | and ``w_column_mask``                             | the same                           |
| with a low-rank branch      | and ``w_down``, ``w_up``                          | the branch is added to ``w``       |
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
from fxsparse.graph.graph_state import follow, state_buffers, with_vectors
from fxsparse.graph.record import NAMES_KEY, HeldWeight, Record, record_of
from fxsparse.modules.sites import module_sites
from fxsparse.ops.nm import Pattern, unpack, validate
from fxsparse.passes.mux.multiplex import PATH as MULTIPLEXER
from fxsparse.passes.nm.low_rank import merged
from fxsparse.rewriting import replay

_RECORD = "fxsparse"


def save(gm: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a rewritten model: parameters, masks and other buffers, and its record.

    Args:
        gm: a traced or rewritten graph module, or the module that `fxsparse.to_module` made of one; also wrapped by
            ``torch.compile`` or ``DistributedDataParallel``.
        path: the file, by convention ``*.safetensors``. It is written under another name and then renamed, so that
            it is never incomplete.

    Raises:
        CheckpointError: ``gm`` was never rewritten, or is sharded.
    """
    gm = fx.rewritten_of(gm, "fxsparse.save", whole=True, error=CheckpointError)
    tensors = {name: tensor.detach().contiguous() for name, tensor in _unique(_graph_state(gm)).items()}
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
        path: a file written by :func:`save`.
        model: a fresh instance of the original model. The loaded graph module takes over its parameters; do not use
            ``model`` afterwards.
        args, kwargs: an example batch, as for :func:`fxsparse.trace`.

    Returns:
        the rewritten graph module, with the saved tensors and record.

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


def _graph_state(gm: nn.Module) -> dict[str, Tensor]:
    """The state dict under the graph's names, also of a module form."""
    names = fx.meta_of(gm).get(NAMES_KEY, {})
    state: dict[str, Tensor] = {}
    for name, tensor in gm.state_dict().items():
        state.setdefault(names.get(name, name), tensor)
    for site in () if isinstance(gm, GraphModule) else module_sites(gm):
        if f"{site.form.name}{'_values' if site.compressed else ''}" not in state:
            raise CheckpointError(
                f"{site.path} was moved since fxsparse.to_module made it, as adapters do: unload them first "
                "(PEFT's unload()), or save the wrapped model as its library does"
            )
    return state


def _unique(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keeps tied tensors under their first name only, because a file holds each tensor once."""
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
    expected, tensors = _unique(gm.state_dict()), with_vectors(gm, tensors)
    expected = {name: tensor for name, tensor in expected.items() if name in tensors or name not in state_buffers(gm)}
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    misfits = [name for name in set(expected) & set(tensors) if expected[name].shape != tensors[name].shape]
    for problem, names in (("lacks", missing), ("has unknown", unexpected), ("has other shapes for", sorted(misfits))):
        if names:
            raise CheckpointError(f"{path} {problem} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    for weight in record_of(gm).weights:
        if weight.storage == "compressed":
            parts = (tensors.get(f"{weight.name}_{part}") for part in ("values", "indices", "column_mask"))
            _check(weight, *parts)
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
    follow(gm)


def _check(weight: HeldWeight, values: Tensor | None, indices: Tensor | None, column_mask: Tensor | None) -> None:
    if values is None or indices is None:  # the graph does not read this weight, or _fill would have raised
        return
    validate(values, indices, Pattern.parse(weight.pattern), weight.in_features, column_mask, name=weight.name)


_SUFFIXES = ("_values", "_indices", "_column_mask", "_mask", "_down", "_up")


@torch.no_grad()
def dense_state_dict(gm: nn.Module) -> dict[str, Tensor]:
    """A state dict with the keys of the original model and dense values; pruned positions are zero.

    It loads into the original model with ``load_state_dict``. Low-rank branches that the graph reads are added to
    their weight, which is then no longer sparse, so that the original model computes the same as the graph. The tensors
    that multiplexing added are left out.

    Args:
        gm: a traced or rewritten graph module, or the module that `fxsparse.to_module` made of one; also wrapped by
            ``torch.compile`` or ``DistributedDataParallel``.

    Returns:
        a tensor for every key of the original's ``state_dict``; tied weights stand under all their names.

    Raises:
        CheckpointError: ``gm`` was never rewritten, or is sharded.
    """
    gm = fx.rewritten_of(gm, "fxsparse.dense_state_dict", whole=True, error=CheckpointError)
    state = {name: tensor.detach() for name, tensor in _graph_state(gm).items()}
    held = {weight.name: weight for weight in record_of(gm).weights}
    added = {f"{name}{suffix}" for name in held for suffix in _SUFFIXES}
    added |= {name for name in state if _is_branch(name, state)} | state_buffers(gm)
    added |= {name for name in state if name.startswith(f"{MULTIPLEXER}.") and "multiplex{" in record_of(gm).text}
    dense = {name: tensor for name, tensor in state.items() if name not in added}
    for weight in held.values():
        values = _dense(weight, state)
        dense.update((name, values) for name in weight.names)
    for name, transposed in _branches(gm).items():
        original = dense[name].t() if transposed else dense[name]
        total = merged(original, state[f"{name}_down"], state[f"{name}_up"])
        names = held[name].names if name in held else (name,)
        dense.update((alias, total.t().contiguous() if transposed else total) for alias in names)
    return dense


def _branches(gm: nn.Module) -> dict[str, bool]:
    """The weights whose branch takes part, and whether each is stored ``[in, out]``."""
    if not isinstance(gm, GraphModule):
        return {site.form.name: site.form.transposed for site in module_sites(gm) if site.form.started}
    held = {weight.name: weight.transposed for weight in record_of(gm).weights}
    transposed = held | {linear.name: linear.transposed for linear in fx.linears(gm)}
    reads = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    return {name: transposed[name] for name in sorted(transposed) if f"{name}_down" in reads}


def _is_branch(name: str, state: dict[str, Tensor]) -> bool:
    stem = name.removesuffix("_down").removesuffix("_up")
    return stem != name and f"{stem}_down" in state and f"{stem}_up" in state


def _dense(weight: HeldWeight, state: dict[str, Tensor]) -> Tensor:
    """A held weight in its original layout, with zeros at its pruned positions."""
    if weight.storage == "masked":
        mask = state[f"{weight.name}_mask"]
        return state[weight.name] * (mask.t() if weight.transposed else mask)
    pattern = Pattern.parse(weight.pattern)
    values, indices = state[f"{weight.name}_values"], state[f"{weight.name}_indices"]
    dense = unpack(values, indices, pattern, weight.in_features)
    return dense.t().contiguous() if weight.transposed else dense
