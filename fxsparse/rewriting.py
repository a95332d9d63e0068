"""From a model to a rewritten graph module in one call, and the same again from a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxsparse.errors import CheckpointError
from fxsparse.graph.record import TRACE_KEY, Record
from fxsparse.passes import Pass, Pipeline
from fxsparse.tracing.trace import trace


def rewrite(
    model: nn.Module,
    passes: Pipeline | Iterable[Pass | str] | Pass | str,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_sequence: bool = False,
) -> GraphModule:
    """Traces ``model`` and runs passes on it.

    Args:
        model: a module, or a graph module that :func:`fxsparse.trace` or ``rewrite`` gave (then ``args`` and
            ``kwargs`` are not needed).
        passes: passes, their text, or a pipeline.
        args, kwargs: an example batch, as for :func:`fxsparse.trace`.
        dynamic_batch, dynamic_sequence: whether other batch sizes and sequence lengths will be used.

    Returns:
        a graph module that takes the same arguments and shares those parameters of ``model`` that no pass replaced.
        ``model`` is left as it was; while it is referenced its dense weights stay in memory.

    Raises:
        TraceError: the model cannot be traced.
        RewriteError: a pass refused; nothing was changed.
    """
    pipeline = passes if isinstance(passes, Pipeline) else Pipeline(passes)
    return pipeline(_traced(model, args, kwargs, dynamic_batch=dynamic_batch, dynamic_sequence=dynamic_sequence))


def replay(
    record: Record,
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    structure_only: bool = False,
) -> GraphModule:
    """Does to ``model`` what ``record`` says was done to another instance of it.

    Args:
        record: ``record_of(gm)`` of a rewritten graph module, or one read back with ``Record.from_json``.
        model: a fresh instance of the original model.
        args, kwargs: an example batch.
        structure_only: the values of what the passes add will be loaded afterwards, so they need not be computed
            (nor the calibration data of ``wanda`` be at hand).

    Raises:
        CheckpointError: a pass changed other sites than the record says: ``model`` is not what was rewritten then.
    """
    rewritten = Pipeline.parse(record.text)(_traced(model, args, kwargs), structure_only=structure_only)
    again = rewritten.meta["fxsparse"]
    for then, now in zip(record.entries, again.entries[-len(record.entries) :], strict=True):
        missing = {change.site for change in then.rewritten} ^ {change.site for change in now.rewritten}
        if missing:
            raise CheckpointError(
                f"{then.text} does not fit this model: it differs at {', '.join(sorted(missing)[:4])}"
            )
    return rewritten


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, **free: bool) -> GraphModule:
    if isinstance(model, GraphModule) and TRACE_KEY in model.meta:
        return model
    return trace(model, args, dict(kwargs or {}), **free)
