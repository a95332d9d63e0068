"""Running passes in order: all of them or none, on a copy that shares the model's parameters, with a record of each.

For each pass: check that its order makes sense, let it rewrite the copy, lint the graph, remove dead nodes and unused
state, derive the training form anew, and append an entry to the record. A failure drops the copy.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.inventory import unreported, weighted
from fxsparse.cost.flops import costs
from fxsparse.errors import OptionError, RewriteError
from fxsparse.exclusive import exclusive, random_state_kept
from fxsparse.graph import live
from fxsparse.graph.history import keep
from fxsparse.graph.record import Costs, Entry, append, forget_absent, record_of
from fxsparse.graph.training_form import TRAINING_ONLY, follow_edit
from fxsparse.options import shown
from fxsparse.passes.base import Pass, outcome, parse_passes, pass_classes
from fxsparse.passes.failure import failure
from fxsparse.passes.order import acting, advice, after, misplaced
from fxsparse.tracing.casting import note_rewrite

STRUCTURE_ONLY = "fxsparse_structure_only"

Callback = Callable[[Pass, GraphModule, GraphModule], object]
"""``callback(pass, before, after)``."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run.

    ``pipeline(gm)`` returns a rewritten copy and leaves ``gm`` unchanged. If a pass fails there is no copy, so a model
    is never half rewritten. The copy's record names every pass, every change and every skip with its reason.

    ``str(pipeline)`` and :meth:`parse` are inverse to each other.

    Attributes:
        passes: in the order they run.
        callback: called with ``(pass, before, after)`` once a pass has run. Both graph modules are the callback's to
            run and to keep: ``before`` is the one given to the pipeline or the last ``after``, ``after`` a copy that
            shares parameters with the result. An error out of it ends the pipeline, and the model stays as it was.
        keep_graphs: keep the text of the graph after every pass for `fxsparse.graphs`, 0.02 ms a node and pass. The
            environment variable ``FXSPARSE_KEEP_GRAPHS=1`` does it for every pipeline.
    """

    passes: tuple[Pass, ...]
    callback: Callback | None = field(default=None, compare=False, repr=False)
    keep_graphs: bool = field(default=False, compare=False, repr=False)

    def __init__(
        self,
        passes: Iterable[Pass | str] | Pass | str,
        *,
        callback: Callback | None = None,
        keep_graphs: bool = False,
    ):
        if not isinstance(passes, Iterable) and not isinstance(passes, Pass):
            raise OptionError(f"passes are passes or their text, one or several, not {type(passes).__name__}")
        items = [passes] if isinstance(passes, (Pass, str)) else list(passes)
        flat: list[Pass] = []
        for item in items:
            if isinstance(item, str):
                flat.extend(parse_passes(item))
            elif isinstance(item, Pass):
                flat.append(item)
            else:
                raise OptionError(
                    f"a pipeline is made of passes or their text, not of {type(item).__name__}: {shown(item)}"
                )
        object.__setattr__(self, "passes", tuple(flat))
        object.__setattr__(self, "callback", callback)
        object.__setattr__(self, "keep_graphs", keep_graphs)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline written in ``text``, such as ``nm-masks{pattern=2:4},double-prune``."""
        return cls(() if isinstance(text, str) and not text.strip() else parse_passes(text))

    def __str__(self) -> str:
        return ",".join(str(item) for item in self.passes)

    @exclusive
    def __call__(self, gm: GraphModule, *, structure_only: bool = False) -> GraphModule:
        """Runs the passes on a copy of ``gm``; the global random state stays as it was.

        Args:
            gm: a traced graph module.
            structure_only: the values of new state will be loaded afterwards, so passes may skip computing them.

        Raises:
            RewriteError: a pass refused, or a pass of the caller's own failed; nothing was changed.
            InternalError: a pass of fxsparse has a bug; nothing was changed.
        """
        self._check_order(gm)
        copy = fx.copy_sharing_state(gm)
        keep_graphs = self.keep_graphs or os.environ.get("FXSPARSE_KEEP_GRAPHS", "0") not in {"", "0"}
        if keep_graphs:
            keep(copy)
        if structure_only:
            copy.meta[STRUCTURE_ONLY] = True
        previous = gm
        try:
            before = costs(copy)
            for item in self.passes:
                with random_state_kept(copy):
                    before = _run(item, copy, before)
                if keep_graphs:
                    keep(copy)
                if self.callback is not None:
                    after = _snapshot(copy)
                    self.callback(item, previous, after)
                    previous = after
        finally:
            copy.meta.pop(STRUCTURE_ONLY, None)
        copy.meta[TRAINING_ONLY] = _training_only(copy)
        copy.recompile()
        note_rewrite(copy, gm, _again)
        return copy

    def _check_order(self, gm: GraphModule) -> None:
        ran = [entry.text.partition("{")[0] for entry in record_of(gm).entries]
        done: list[str] = []
        for name in ran:
            done = after(done, name)
        for item in self.passes:
            problem = misplaced(item.name, done)
            if problem is not None:
                raise RewriteError(f"{problem}; {advice(item.name, ran)}", pass_name=item.name)
            done, ran = after(done, item.name), [*ran, item.name]


def _again(gm: GraphModule, passes: str) -> GraphModule:
    return Pipeline.parse(passes)(gm, structure_only=True)


def _training_only(gm: GraphModule) -> tuple[str, ...]:
    """The names of the passes that compute something else in training, while they have a part in the graph."""
    names = [entry.text.partition("{")[0] for entry in record_of(gm).entries]
    classes = pass_classes()
    acting_names = dict.fromkeys(names[position] for position in acting(names))
    return tuple(name for name in acting_names if name in classes and classes[name].training_only)


def _snapshot(gm: GraphModule) -> GraphModule:
    """A graph module of its own that stays as it is while passes go on editing ``gm``."""
    copy = fx.copy_sharing_state(gm)
    copy.meta.pop(STRUCTURE_ONLY, None)
    copy.recompile()
    return copy


def structure_only(gm: GraphModule) -> bool:
    """Whether the values of new state will be loaded after the running pipeline."""
    return bool(gm.meta.get(STRUCTURE_ONLY))


def _follow_in_training(item: Pass, gm: GraphModule) -> None:
    """Lets what runs in training follow the pass; RewriteError where it cannot."""
    try:
        follow_edit(gm)
    except RewriteError as error:
        raise RewriteError(f"does not go with an earlier pass: {error}", pass_name=item.name) from error


def _acted_on(gm: GraphModule) -> set[str]:
    """The names of the weights that passes act on."""
    return {name for site in live.sites(gm, live.Live) for name in site.weights}  # type: ignore[type-abstract]


def _run(item: Pass, gm: GraphModule, before: Costs) -> Costs:
    """Runs one pass on ``gm`` itself and records it; returns the costs after it."""
    read_before = fx.state_read(gm)
    sites = weighted(gm) if item.rest else []
    acted_on = _acted_on(gm)
    start = time.perf_counter()
    try:
        changes, recorded = outcome(item, gm)
        fx.eliminate_dead_code(gm)
        gm.graph.lint()
        fx.delete_state(gm, read_before - fx.state_read(gm))
        forget_absent(gm)
        live.settle(gm)
        _follow_in_training(item, gm)
        milliseconds = (time.perf_counter() - start) * 1e3
        after = costs(gm)
    except RewriteError:
        raise
    except Exception as error:
        raise failure(item, error) from error
    if not any(change.rewritten for change in changes) and not structure_only(gm):  # a load finds what was recorded
        reasons = list({change.detail: str(change) for change in changes}.values())
        warnings.warn(f"{item} rewrote nothing ({'; '.join(reasons[:4]) or 'it found no site'})", stacklevel=4)
    own = acted_on ^ _acted_on(gm)  # sites that the pass entered, or ended
    left = [site for site in sites if not site.names & own]
    changes = (*changes, *unreported(changes, left, item.rest))
    append(gm, Entry(str(recorded), changes, before, after, milliseconds))
    return after
