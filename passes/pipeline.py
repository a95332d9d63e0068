"""Running passes in order: all of them or none, on a copy that shares the model's parameters, with a record of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.cost.flops import costs
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import Costs, Entry, append, record_of
from fxsparse.passes.base import Pass, outcome, parse_passes, pass_classes

STRUCTURE_ONLY = "fxsparse_structure_only"


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run.

    ``pipeline(gm)`` returns a rewritten copy and leaves ``gm`` as it was; where a pass fails there is no copy, so a
    model is never half rewritten. The copy's record names every pass, every change and every skip with its reason.

    ``str(pipeline)`` and :meth:`parse` are inverse to each other.
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass | str] | Pass | str):
        given = [passes] if isinstance(passes, (Pass, str)) else list(passes)
        flat: list[Pass] = []
        for item in given:
            if isinstance(item, str):
                flat.extend(parse_passes(item))
            elif isinstance(item, Pass):
                flat.append(item)
            else:
                raise OptionError(f"a pipeline is made of passes or their text, not of {type(item).__name__}: {item!r}")
        object.__setattr__(self, "passes", tuple(flat))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline written in ``text``, such as ``nm-masks{pattern=2:4},double-prune``."""
        return cls(parse_passes(text) if text.strip() else ())

    def __str__(self) -> str:
        return ",".join(str(item) for item in self.passes)

    def __call__(self, gm: GraphModule, *, structure_only: bool = False) -> GraphModule:
        """Runs the passes on a copy of ``gm``.

        Args:
            gm: a traced graph module.
            structure_only: the values of new state will be loaded afterwards, so passes may skip computing them.

        Raises:
            RewriteError: a pass refused; nothing was changed.
        """
        self._check_order(gm)
        copy = fx.copy_sharing_state(gm)
        if structure_only:
            copy.meta[STRUCTURE_ONLY] = True
        try:
            before = costs(copy)
            for item in self.passes:
                before = _run(item, copy, before)
        finally:
            copy.meta.pop(STRUCTURE_ONLY, None)
        copy.recompile()
        return copy

    def _check_order(self, gm: GraphModule) -> None:
        done: list[str] = []
        for entry in record_of(gm).entries:
            done = _after(done, entry.text.partition("{")[0])
        for item in self.passes:
            if item.must_follow and not set(item.must_follow) & set(done):
                first = item.must_follow[0]
                raise RewriteError(
                    f"works on what {' or '.join(item.must_follow)} inserts, which did not run before; "
                    f"the order that works is {first},{item.name}",
                    pass_name=item.name,
                )
            clash = [name for name in done if name in item.cannot_follow]
            if clash:
                raise RewriteError(
                    f"cannot follow {clash[0]}; the order that works is {item.name},{clash[0]}", pass_name=item.name
                )
            done = _after(done, item.name)


def _after(done: list[str], name: str) -> list[str]:
    """The passes that have a part in the model once ``name`` has run as well."""
    ended = getattr(pass_classes().get(name), "ends", ())
    return [*(other for other in done if other not in ended), name]


def structure_only(gm: GraphModule) -> bool:
    """Whether the values of new state will be loaded after the running pipeline."""
    return bool(gm.meta.get(STRUCTURE_ONLY))


def _run(item: Pass, gm: GraphModule, before: Costs) -> Costs:
    """Runs one pass on ``gm`` itself and records it; returns the costs after it."""
    read_before = fx.state_read(gm)
    start = time.perf_counter()
    try:
        changes, recorded = outcome(item, gm)
        fx.eliminate_dead_code(gm)
        gm.graph.lint()
    except RewriteError:
        raise
    except Exception as error:
        raise RewriteError(f"failed, and nothing was changed: {error}", pass_name=item.name) from error
    fx.delete_state(gm, read_before - fx.state_read(gm))
    milliseconds = (time.perf_counter() - start) * 1e3
    if not any(change.rewritten for change in changes) and not structure_only(gm):  # a load finds what was recorded
        reasons = list({change.detail: str(change) for change in changes}.values())
        warnings.warn(f"{item} rewrote nothing ({'; '.join(reasons[:4]) or 'it found no site'})", stacklevel=3)
    after = costs(gm)
    append(gm, Entry(str(recorded), changes, before, after, milliseconds))
    return after
