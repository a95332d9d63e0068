"""Saves a rewritten model in one safetensors file with its tensors and its record, and loads it again.

The file's metadata holds the record as JSON. `load` needs only this file and the code of the original model: it
replays the record on a fresh instance and then fills in the tensors. Nothing is pickled. A file is believed only after
it was checked: its checksums (`fxsparse.stored`), the types in its record, the tensors against the record, and once the
passes ran, names, shapes and dtypes against the graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse import stored
from fxsparse.dense_state import graph_state
from fxsparse.errors import CheckpointError, FxsparseError, TraceError
from fxsparse.graph.graph_state import follow, state_buffers, with_vectors
from fxsparse.graph.record import HeldWeight, Record, record_of
from fxsparse.ops.nm import Pattern, validate
from fxsparse.passes.base import Pass, parse_passes
from fxsparse.rewriting import replay

_RECORD = "fxsparse"
_SIZES = {"low-rank": ("rank",), "multiplex": ("n", "layers")}
"""The options that say sizes of what a pass adds; none is above every dimension of a checkpoint's tensors."""


def save(gm: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a rewritten model: parameters, masks and other buffers, and its record.

    Args:
        gm: a traced or rewritten graph module, or the module that `fxsparse.to_module` made of one; also wrapped by
            ``torch.compile`` or ``DistributedDataParallel``.
        path: the file, by convention ``*.safetensors``. It is written beside its place, read back and compared, and
            renamed, so that what was there is lost only to a whole file. What killed saves left there is removed.

    Raises:
        CheckpointError: ``gm`` was never traced, or is sharded, or the file cannot be written.
    """
    gm = fx.rewritten_of(gm, "fxsparse.save", whole=True, error=CheckpointError)
    stored.write(path, stored.distinct(graph_state(gm)), {_RECORD: record_of(gm).to_json()})


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_sequence: bool | None = None,
) -> GraphModule:
    """Reads a rewritten model.

    Args:
        path: a file written by :func:`save`.
        model: a fresh instance of the original model. The loaded graph module takes over its parameters; do not use
            ``model`` afterwards.
        args, kwargs: an example batch, as for :func:`fxsparse.trace`.
        dynamic_batch, dynamic_sequence: whether the graph must also run at other batch sizes and sequence lengths, see
            :func:`fxsparse.trace`.

    Returns:
        the rewritten graph module, with the saved tensors and record.

    Raises:
        CheckpointError: the file was not written by :func:`save`, is damaged, or does not fit the model.
        TraceError: the model cannot be traced.
    """
    name = os.fspath(path)
    file = stored.read(path)
    record = _record(file)
    try:
        gm = replay(
            record,
            model,
            args,
            kwargs,
            structure_only=True,
            dynamic_batch=dynamic_batch,
            dynamic_sequence=dynamic_sequence,
        )
    except TraceError:
        raise
    except FxsparseError as error:
        raise CheckpointError(f"{name}: its passes do not run on this model: {error}") from error
    _fill(gm, file.tensors, name)
    gm.meta["fxsparse"] = record
    return gm


def _record(file: stored.Stored) -> Record:
    """The record of a file, after it was compared with the file's tensors."""
    if _RECORD not in file.texts:
        raise CheckpointError(f"{file.path} holds no record of passes; it was not written by fxsparse.save")
    record = Record.from_json(file.texts[_RECORD], f"{file.path}: the record")
    try:
        for entry in record.entries:
            _check_sizes(parse_passes(entry.text), file.tensors)
        for weight in record.weights:
            _check_weight(weight, file.tensors)
    except (FxsparseError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{file.path}: {reason}") from error
    return record


def _check_sizes(passes: Iterable[Pass], tensors: Mapping[str, Tensor]) -> None:
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for item in passes:
        for option in _SIZES.get(item.name, ()):
            if (getattr(item, option) or 0) > largest:
                raise CheckpointError(f"the record is damaged: {item} adds larger tensors than the file has")


def _check_weight(weight: HeldWeight, tensors: Mapping[str, Tensor]) -> None:
    """A weight that the graph does not read has no tensors; `_fill` finds those that are missing."""
    pattern = Pattern.parse(weight.pattern)
    parts = {part: tensors.get(f"{weight.name}_{part}") for part in ("values", "indices", "column_mask", "mask")}
    if weight.storage == "compressed":
        if parts["values"] is not None and parts["indices"] is not None:
            validate(
                parts["values"],
                parts["indices"],
                pattern,
                weight.in_features,
                parts["column_mask"],
                name=weight.name,
            )
    elif weight.storage != "masked":
        raise CheckpointError(f"{weight.name}: the record says that it is held {weight.storage[:40]!r}")
    elif parts["mask"] is not None and weight.name in tensors:
        dense = tensors[weight.name]
        wanted = dense.mT.shape if weight.transposed and dense.dim() > 1 else dense.shape
        if parts["mask"].dtype != torch.bool or parts["mask"].shape != wanted:
            raise CheckpointError(f"{weight.name}_mask is no mask of {weight.name}")


@torch.no_grad()
def _fill(gm: GraphModule, tensors: Mapping[str, Tensor], path: str) -> None:
    expected, tensors = stored.distinct(gm.state_dict()), with_vectors(gm, tensors)
    expected = {name: tensor for name, tensor in expected.items() if name in tensors or name not in state_buffers(gm)}
    for problem, names in _misfits(expected, tensors):
        if names:
            raise CheckpointError(f"{path} {problem} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
    follow(gm)


def _misfits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """What does not fit, and the names of the tensors."""
    both = sorted(expected.keys() & tensors.keys())
    yield "lacks", sorted(expected.keys() - tensors.keys())
    yield "has unknown", sorted(tensors.keys() - expected.keys())
    yield "has other shapes for", [name for name in both if expected[name].shape != tensors[name].shape]
    yield (
        "has values for what is on the meta device; call model.to_empty(device=...) before:",
        [name for name in both if expected[name].is_meta],
    )
    for name in both:
        here, there = expected[name].dtype, tensors[name].dtype
        if here != there:
            action = f"; call model.to({there}) before" if here.is_floating_point and there.is_floating_point else ""
            yield f"has {there} where the model has {here}{action}:", [name]
