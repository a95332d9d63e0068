"""The base class of passes, and passes from text.

A pass is a frozen dataclass: its options are its fields, whose annotations say what they may be (`fxsparse.options`),
and its name is a class variable. The graph is valid before and after (``torch.fx.passes.infra.pass_base.PassBase``),
and for every site it looked at the pass yields a :class:`Change`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxsparse.errors import OptionError, nearest
from fxsparse.graph.record import Change, record_of
from fxsparse.options import check_fields, options_of, shown
from fxsparse.passes.event import Event
from fxsparse.passes.text import read, write


@dataclass(frozen=True)
class Pass(PassBase):
    """Base of all passes; subclass it as a frozen dataclass, set ``name`` and write :meth:`rewrite`.

    A pass edits a copy of the graph and of the module tree that shares the model's parameters. It may replace
    parameters and buffers, but must never write to them. It raises :class:`~fxsparse.errors.RewriteError` if it cannot
    fulfil its options; the model then stays unchanged.

    Attributes:
        name: the pass in text.
        must_follow: names of passes; one of them must have run before.
        cannot_follow: names of passes after which this one cannot run.
        crowded_out_by: names of passes that, run on all layers before or after this one, leave it nothing to do. They
            go together where options keep them apart, and no refusal recommends an order of both.
        ends: names of passes whose part in the model is over after this one, so that they may run again.
        training_only: whether training computes something else in every step, which an exported program cannot.
        no_module: why no module of the model's class can hold this pass's part, and what to do; empty if one can.
        rest: the reason that a pipeline records for every weight which the changes name nowhere; empty for a pass that
            is not about weights.
    """

    name: ClassVar[str]
    must_follow: ClassVar[tuple[str, ...]] = ()
    cannot_follow: ClassVar[tuple[str, ...]] = ()
    crowded_out_by: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[bool] = False
    no_module: ClassVar[str] = ""
    rest: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Checks every option against its annotation; one of a subclass calls this first."""
        check_fields(self, pass_name=self.name)

    @abstractmethod
    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        """Rewrites ``graph`` in place and yields a change for every site it looked at: the edit, or why there is none.

        A pass is frozen and may run on several graphs at once, so it keeps nothing. One that finds something out which
        a replay needs returns, at the end of the generator, the pass that the record names in its place.
        """

    @property
    def needs_schedule(self) -> bool:
        """Whether training without a ``Schedule`` would leave out what the options ask for; not by default."""
        return False

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        """The events that change a rewritten graph while it trains; none by default."""
        return ()

    def call(self, graph_module: GraphModule) -> PassResult:
        """``PassBase``'s form: runs on ``graph_module`` itself, so that torch's own pass managers can run a pass."""
        changes, _ = outcome(self, graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, any(change.rewritten for change in changes))

    def __str__(self) -> str:
        options = _options(self)
        # The first option is the subject of a pass, so it is written even with its default.
        about = [option.name for option in options[:1] if getattr(self, option.name) is not None]
        shown = [option for option in options if option.name in about or _differs(self, option)]
        written = ",".join(f"{option.name}={write(getattr(self, option.name))}" for option in shown)
        return f"{self.name}{{{written}}}" if written else self.name


def outcome(item: Pass, gm: GraphModule) -> tuple[tuple[Change, ...], Pass]:
    """Runs ``item.rewrite`` on ``gm`` itself: the changes, and the pass that the record names."""
    changes: list[Change] = []
    rewrite = iter(item.rewrite(gm))
    while True:
        try:
            changes.append(next(rewrite))
        except StopIteration as end:
            return tuple(changes), end.value or item


def sites_of_others(item: Pass, gm: nn.Module) -> frozenset[str]:
    """The sites that other passes of the same name rewrote, which events of ``item`` leave to theirs."""
    entries = [entry for entry in record_of(gm).entries if entry.name == item.name]
    return frozenset(change.site for entry in entries if entry.text != str(item) for change in entry.rewritten)


def _options(item: Pass | type[Pass]) -> list[Field[Any]]:
    """The options that text carries; a field that does not compare (calibration data, a model) is not text."""
    return [option for option in fields(item) if option.compare and option.init]


def _differs(item: Pass, option: Field[Any]) -> bool:
    default = option.default if option.default is not MISSING else None
    if option.default_factory is not MISSING:
        default = option.default_factory()
    return bool(getattr(item, option.name) != default)


def pass_classes() -> dict[str, type[Pass]]:
    """Every pass class by its name: fxsparse's own and any subclass that was imported."""
    classes: dict[str, type[Pass]] = {}
    pending: list[type[Pass]] = [Pass]  # type: ignore[type-abstract]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if "name" in vars(cls):
                classes[cls.name] = cls
    return classes


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass called ``name``; an OptionError lists the known names if the name or an option is unknown."""
    classes = pass_classes()
    if name not in classes:
        raise OptionError(
            f"unknown pass {shown(name)}; {nearest(name, classes)}known passes: {', '.join(sorted(classes))}"
        )
    known = [option.name for option in _options(classes[name])]
    for option in options:
        if option not in known:
            raise OptionError(
                f"unknown option {shown(option)}; {nearest(option, known)}its options: {', '.join(known) or 'none'}",
                pass_name=name,
            )
    missing = [
        option.name for option in options_of(classes[name]) if option.default is MISSING and option.name not in options
    ]
    if missing:
        raise OptionError(f"needs the option {missing[0]!r}", pass_name=name)
    return classes[name](**options)


def parse_passes(text: str) -> tuple[Pass, ...]:
    """The passes written in ``text``; an OptionError names the position of a syntax error."""
    return tuple(build(name, options) for name, options in read(text))
