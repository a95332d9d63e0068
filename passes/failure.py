"""Saying whose mistake it is when a pass breaks.

An exception out of a user's own code (a pass class of theirs, a generator of batches) is theirs: the error names its
line. Every other one is a bug of fxsparse: the error says so, where it arose and what to put into a report.
"""

from __future__ import annotations

import inspect
from types import FrameType

import torch
from torch.fx import Node

from fxsparse import graph as fx
from fxsparse.errors import FxsparseError, InternalError, RewriteError
from fxsparse.passes.base import Pass
from fxsparse.text import shortened
from fxsparse.tracing.export import Frame, model_frames, package_frames, place
from fxsparse.version import how_to_report

_LONGEST_PASS = 300


def failure(item: Pass, error: Exception) -> FxsparseError:
    """The error to raise where ``item`` broke with ``error``; a refusal of another part of fxsparse is the pass's."""
    if isinstance(error, FxsparseError):
        return RewriteError(str(error), pass_name=item.name)
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return RewriteError(f"ran out of memory, and nothing was changed: {error}", pass_name=item.name)
    theirs = _users_place(item, error)
    if theirs is not None:
        return RewriteError(f"failed at {theirs}, and nothing was changed: {reason}", pass_name=item.name)
    frames = package_frames(error, "fxsparse")
    node = _node_in(frames)
    ours = place(*frames[-1])
    at = f" at {node.name} ({fx.stack_path(node) or 'the model itself'})" if node is not None else ""
    return InternalError(
        f"{item.name} broke in {ours},{at} with {reason}\n{how_to_report(shortened(str(item), _LONGEST_PASS))}",
        pass_name=item.name,
        node=node.name if node is not None else None,
        place=ours,
    )


def _users_place(item: Pass, error: Exception) -> str | None:
    """Where the user's own code failed; None where only fxsparse's and its libraries' ran."""
    package = type(item).rewrite.__module__.partition(".")[0]
    if package != "fxsparse":
        frames = package_frames(error, package)
        return place(*frames[-1]) if frames else _class_place(type(item))
    theirs = [frame for frame in model_frames(error) if not _is_installed(frame[0])]
    return place(*theirs[-1]) if theirs else None


def _is_installed(frame: FrameType) -> bool:
    return any(f"{folder}-packages" in frame.f_code.co_filename for folder in ("site", "dist"))


def _class_place(cls: type[Pass]) -> str:
    """Of a pass whose rewrite ended and left a graph that does not hold together."""
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}, in {cls.__name__}"
    except (OSError, TypeError):  # typed into an interpreter
        return cls.__name__


def _node_in(frames: list[Frame]) -> Node | None:
    """The node that the code was looking at, innermost first: a local called ``node``, else any."""
    for frame, _ in reversed(frames):
        values = [frame.f_locals.get("node"), *frame.f_locals.values()]
        nodes = [value.node if isinstance(value, fx.Linear) else value for value in values]
        for node in nodes:
            if isinstance(node, Node):
                return node
    return None
