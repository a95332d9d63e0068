"""Measuring a model's operators ahead of time, for a user who asks for it."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxsparse.backend.compiled import compiled_graphs
from fxsparse.errors import OptionError
from fxsparse.lowering import measure, timings
from fxsparse.lowering.choose import gradients
from fxsparse.lowering.frozen import pattern_of
from fxsparse.lowering.measure import Measurement
from fxsparse.lowering.sites import operators, site_of
from fxsparse.ops.operator import OPERATORS, REFERENCE, Problem
from fxsparse.options import Count, Positive, checked

ROWS = (1, 16, 64, 512, 4096)
"""Rows of the input that are measured where nothing else is said: decoding up to training."""


def tune(
    model: nn.Module | Callable[..., Any],
    *,
    rows: Sequence[Count] | None = None,
    seconds: Positive = 60.0,
    again: bool = False,
    progress: bool = True,
) -> list[Measurement]:
    """Measures, ahead of time, the implementations of every operator of a model and of its gradients.

    Times are kept: code compiled from then on chooses by them, in this process and in later ones; code compiled before
    stays as it is.

    Args:
        model: a rewritten graph module, a model with N:M weights, or what ``torch.compile(..., backend="fxsparse")``
            returned for one.
        rows: of the inputs, batch times sequence; by default those a compiled model has met, else `ROWS`.
        seconds: at most spent; products that no time was left for are not in the result, call it again for them.
        again: also measure what was measured before.
        progress: print a line for each product to standard error, above a bar where rich is installed.

    Raises:
        OptionError: the model holds no such operator, or an option is out of range.
    """
    rows = checked("rows", rows, tuple[Count, ...] | None)
    seconds = checked("seconds", seconds, Positive)
    device, problems = problems_of(model, rows)
    if not problems:
        raise OptionError("the model has nothing to tune: rewrite it, with nm-masks say, or give it N:M weights")
    pending = [problem for problem in problems if again or not _is_measured(problem, device)]
    until, measured = time.monotonic() + seconds, []
    with _bar(len(pending)) if progress else contextlib.nullcontext(lambda line: None) as say:
        for count, problem in enumerate(pending, 1):
            if time.monotonic() > until:
                say(f"tuning stopped after {seconds:g} s, {len(pending) - count + 1} left")
                break
            measured.append(measure.measure(problem, device, until=until))
            say(f"[{count}/{len(pending)}] {measured[-1]}")
    return measured


def _is_measured(problem: Problem, device: str) -> bool:
    """Whether what the kernels have to beat was measured."""
    return REFERENCE in timings.times(problem, device)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    """What prints a line for a product to standard error, above a progress bar where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield functools.partial(print, file=sys.stderr, flush=True)
        return
    columns = TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=True) as bar:
        task = bar.add_task("tuning", total=total)

        def say(line: str) -> None:
            bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)

        yield say


def problems_of(model: Any, rows: Sequence[int] | None) -> tuple[str, list[Problem]]:
    """The device and the products of a model, each once."""
    chosen = [choice.problem for graph in compiled_graphs(model) for choice in graph.choices]
    met = [problem for problem in chosen if problem is not None]
    if met and rows is None:
        problems: Iterable[Problem] = met
    else:
        every = [*met, *_problems_in(model)]
        problems = [_with_rows(problem, count) for problem in every for count in rows or ROWS]
    module = getattr(model, "_orig_mod", model)
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    return (tensors[0].device.type if tensors else "cpu"), list(dict.fromkeys(problems))


def _problems_in(model: Any) -> Iterator[Problem]:
    model = getattr(model, "_orig_mod", model)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, GraphModule):
            yield from _problems_in_graph(module)
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 2:
            pattern = None if isinstance(module, nn.Embedding) else pattern_of(weight)
            if pattern is not None:
                yield Problem("nm_linear", pattern, weight.dtype, 1, *weight.shape)


def _problems_in_graph(gm: GraphModule) -> Iterator[Problem]:
    is_trained = any(parameter.requires_grad for parameter in gm.parameters())
    for op, node in operators(gm):
        site = site_of(op, node)
        if site is not None:
            for each in (site, *(gradients(site) if is_trained else ())):
                if each.problem is not None:
                    yield each.problem


def _with_rows(problem: Problem, count: int) -> Problem:
    """A product on another number of rows; of operators that take whole groups, at least so many."""
    multiple = OPERATORS[problem.op].row_multiple(problem)
    return replace(problem, rows=-(-count // multiple) * multiple)
