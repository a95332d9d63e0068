"""What fxsparse raises. For what a user did: what, where, why, and what to do instead. For a bug of its own: that."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxsparseError(Exception):
    """Base of every error of fxsparse."""


class TraceError(FxsparseError):
    """A model could not be captured; the message quotes the line of the model that stopped it."""


class RewriteError(FxsparseError):
    """A pass cannot do what was asked. Nothing was changed.

    Args:
        message: what was expected and what to do.
        pass_name: the pass's textual name, such as ``nm-masks``.
        site: the module path or parameter name concerned.
    """

    def __init__(self, message: str, *, pass_name: str | None = None, site: str | None = None):
        self.pass_name = pass_name
        self.site = site
        where = ": ".join(part for part in (pass_name, site) if part)
        super().__init__(f"{where}: {message}" if where else message)


class OptionError(RewriteError, ValueError):
    """An option has no meaning: an unknown name, or a value outside what it may be."""


class InternalError(FxsparseError):
    """A bug of fxsparse, to report, and nothing the caller did. Nothing was changed.

    The message has all that a report needs; the original exception is the ``__cause__``.

    Args:
        message: what broke, where, and what to report.
        pass_name: the textual name of the pass that broke; None while a model is traced.
        node: name of the node that the pass was looking at, where that is known.
        place: file, line and function that raised.
    """

    def __init__(
        self, message: str, *, pass_name: str | None = None, node: str | None = None, place: str | None = None
    ):
        self.pass_name, self.node, self.place = pass_name, node, place
        super().__init__(message)


class LoweringError(FxsparseError):
    """A node could not be lowered and ``options={"fallback": False}`` forbids the reference."""


class CheckpointError(FxsparseError):
    """A checkpoint does not fit the model it is loaded into."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'? `` where a known name is close to an unknown one, for the middle of a message."""
    near = difflib.get_close_matches(name, list(known), n=1) if len(name) <= 100 else []
    return f"did you mean {near[0]!r}? " if near else ""
