"""Which pass may run after which, and the orders that refusals recommend: all by the names of passes.

A recommendation is searched for among the few orders a person would try, and one that is itself refused is never made:

    the pass that it needs, and the refused one        nm-masks,double-prune
    the refused pass earlier                           nm-masks,select-tensors
    what ends the earlier pass in between              distill,end-distill,distill
    the refused pass and what ends it, both earlier    gates,materialize,nm-masks

A pass that another leaves nothing to do, unless options keep them apart, is left out of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxsparse.passes.base import Pass, pass_classes


def after(done: Sequence[str], name: str) -> list[str]:
    """The passes that have a part in the model once ``name`` has run after ``done``."""
    cls = _class(name)
    return [*(other for other in done if cls is None or other not in cls.ends), name]


def misplaced(name: str, done: Sequence[str]) -> str | None:
    """Why a pass cannot run after others; None where it can."""
    cls = _class(name)
    if cls is None:
        return None
    if cls.must_follow and not set(cls.must_follow) & set(done):
        return f"needs {' or '.join(cls.must_follow)}, which did not run before"
    clash = next((other for other in done if other in cls.cannot_follow), None)
    return None if clash is None else f"cannot follow {clash}"


def works(names: Sequence[str]) -> bool:
    """Whether no pass of an order is misplaced."""
    done: list[str] = []
    for name in names:
        if misplaced(name, done) is not None:
            return False
        done = after(done, name)
    return True


def acting(names: Sequence[str]) -> list[int]:
    """The positions of the passes, of those that ran, that no later one has ended."""
    ends = [() if cls is None else cls.ends for cls in map(_class, names)]
    return [at for at, name in enumerate(names) if not any(name in later for later in ends[at + 1 :])]


def crowded_out(name: str, ran: Sequence[str]) -> list[str]:
    """The passes of ``ran`` that others of it, or ``name``, leave nothing to do unless options keep them apart."""
    return [other for other in dict.fromkeys(ran) if _crowding(other, (name, *ran))]


def _crowding(name: str, others: Sequence[str]) -> list[str]:
    cls = _class(name)
    return [] if cls is None else [other for other in cls.crowded_out_by if other in others]


def working_order(name: str, ran: Sequence[str]) -> list[str] | None:
    """An order of the passes that ran, those that were ended too, and ``name``, perhaps with a pass that ends one of
    them, that is not refused; without the passes that are crowded out."""
    if _crowding(name, ran):
        return None
    out = crowded_out(name, ran)
    others = [other for other in ran if other not in out]
    return next((order for order in _orders(name, others) if works(order)), None)


def advice(name: str, ran: Sequence[str]) -> str:
    """What to do about a pass that cannot run after those that ran."""
    order = working_order(name, ran)
    if order is None:
        return "leave one of them out"
    apart = [
        f"{other} goes with {' and '.join(_crowding(other, (name, *ran)))} only on different layers"
        for other in crowded_out(name, ran)
    ]
    return "; ".join([f"the order that works is {','.join(order)}", *apart])


def _orders(name: str, ran: list[str]) -> Iterator[list[str]]:
    cls = _class(name)
    assert cls is not None
    places = acting(ran)
    for first in cls.must_follow if not set(cls.must_follow) & {ran[place] for place in places} else ():
        yield [first, name]
    for place in [place for place in places if ran[place] in cls.cannot_follow][:1]:
        before, later = ran[:place], ran[place:]
        yield [*before, name, *later]
        for ender in _enders(ran[place]):
            yield [*before, ran[place], ender, *ran[place + 1 :], name]
            yield [*ran, ender, name]
        for ender in _enders(name):
            yield [*before, name, ender, *later]


def _enders(name: str) -> list[str]:
    return [other for other, cls in pass_classes().items() if name in cls.ends and other != name]


def _class(name: str) -> type[Pass] | None:
    return pass_classes().get(name)
