"""Rewrites a model in one call: `rewrite` runs passes, `replay` runs the passes of a record again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxsparse.codegen.cpu import operators as _  # noqa: F401  what rewritten models run eagerly on a CPU
from fxsparse.errors import CheckpointError
from fxsparse.graph.record import Record, record_of
from fxsparse.passes import Pass, Pipeline
from fxsparse.tracing.trace import trace


def rewrite(
    model: nn.Module,
    passes: Pipeline | Iterable[Pass | str] | Pass | str,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    copy: bool = False,
    dynamic_batch: bool = True,
    dynamic_sequence: bool | None = None,
) -> GraphModule:
    """Traces ``model`` and runs passes on it.

    Args:
        model: a module, or a graph module returned by :func:`fxsparse.trace` or ``rewrite``, which needs neither
            ``args`` nor ``kwargs``.
        passes: passes, the text of passes, or a pipeline.
        args, kwargs: an example batch, as for :func:`fxsparse.trace`.
        copy: give the result parameters and buffers of its own. Those that are one tensor in ``model`` remain one.
        dynamic_batch, dynamic_sequence: whether the graph must also run at other batch sizes and sequence lengths, see
            :func:`fxsparse.trace`.

    Returns:
        a graph module with the same arguments. Rewriting changes nothing in ``model``, but unless ``copy`` is set the
        two share every parameter and buffer that no pass replaced, such as embeddings, norms and running statistics:
        training one, casting it (``.to(torch.bfloat16)``) or loading a state into it changes them in the other as well.
        Set ``copy`` to go on using ``model``, as a baseline or as a teacher of your own loss. The dense weights of
        ``model`` stay in memory as long as it is referenced.

    Raises:
        TraceError: the model cannot be traced.
        RewriteError: a pass cannot do its work on this model; nothing was changed.
        InternalError: a pass of fxsparse has a bug; nothing was changed.
    """
    pipeline = passes if isinstance(passes, Pipeline) else Pipeline(passes)
    traced = trace(model, args, kwargs, dynamic_batch=dynamic_batch, dynamic_sequence=dynamic_sequence)
    return pipeline(deepcopy(traced) if copy else traced)


def replay(
    record: Record,
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    structure_only: bool = False,
    dynamic_batch: bool = True,
    dynamic_sequence: bool | None = None,
) -> GraphModule:
    """Runs the passes of a record on another instance of the model.

    Args:
        record: ``record_of(gm)`` of a rewritten graph module, or a record read with ``Record.from_json``.
        model: a fresh instance of the original model.
        args, kwargs: an example batch.
        structure_only: passes add tensors of the right shapes but do not compute their values, because these are
            loaded afterwards; ``wanda`` then needs no calibration data.
        dynamic_batch, dynamic_sequence: as for :func:`fxsparse.trace`.

    Returns:
        the rewritten graph module.

    Raises:
        CheckpointError: a pass changed other sites than in the record, so ``model`` differs from the original model.
    """
    traced = trace(model, args, kwargs, dynamic_batch=dynamic_batch, dynamic_sequence=dynamic_sequence)
    rewritten = Pipeline.parse(record.text)(traced, structure_only=structure_only)
    again = record_of(rewritten)
    for then, now in zip(record.entries, again.entries[-len(record.entries) :], strict=True):
        different = {change.site for change in then.rewritten} ^ {change.site for change in now.rewritten}
        if different:
            raise CheckpointError(
                f"{then.text} does not fit this model: it differs at {', '.join(sorted(different)[:4])}"
            )
    return rewritten
