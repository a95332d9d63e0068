"""Saying whose mistake it is when a pass breaks.

An exception out of a user's own code (a pass class of theirs, a generator of batches) is theirs: the error names its
line. Every other one is a bug of fxsparse: the error says so, where it arose and what to put into a report.
"""

from __future__ import annotations

import inspect
import traceback
from types import FrameType

import torch
from torch.fx import Node

from fxsparse import graph as fx
from fxsparse.errors import FxsparseError, InternalError, RewriteError
from fxsparse.passes.base import Pass
from fxsparse.tracing.export import model_frames
from fxsparse.version import environment

_LONGEST_PASS = 300


def failure(item: Pass, error: Exception) -> FxsparseError:
    """The error to raise where ``item`` broke with ``error``; a refusal of another part of fxsparse is the pass's."""
    if isinstance(error, FxsparseError):
        return RewriteError(str(error), pass_name=item.name)
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return RewriteError(f"ran out of memory, and nothing was changed: {error}", pass_name=item.name)
    place = _users_place(item, error)
    if place is not None:
        return RewriteError(f"failed at {place}, and nothing was changed: {reason}", pass_name=item.name)
    frames = _frames(error, "fxsparse")
    node = _node_in(frames)
    place = _place(*frames[-1])
    at = f" at {node.name} ({fx.stack_path(node) or 'the model itself'})" if node is not None else ""
    text = str(item)
    return InternalError(
        f"{item.name} broke in {place},{at} with {reason}\n"
        "This is a bug in fxsparse, not in your model or your call. Nothing was changed. Please report it with this "
        f"message and the traceback above it: {environment()}, "
        f"{text[:_LONGEST_PASS]}{' ...' if len(text) > _LONGEST_PASS else ''}",
        pass_name=item.name,
        node=node.name if node is not None else None,
        place=place,
    )


def _users_place(item: Pass, error: Exception) -> str | None:
    """Where the user's own code failed; None where only fxsparse's and its libraries' ran."""
    package = type(item).rewrite.__module__.partition(".")[0]
    if package != "fxsparse":
        frames = _frames(error, package)
        return _place(*frames[-1]) if frames else _class_place(type(item))
    theirs = [frame for frame in model_frames(error) if not _is_installed(frame[0])]
    return _place(*theirs[-1]) if theirs else None


def _frames(error: Exception, package: str) -> list[tuple[FrameType, int]]:
    """The frames of ``error`` that run code of a package, outermost first."""
    return [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]


def _is_installed(frame: FrameType) -> bool:
    return any(f"{folder}-packages" in frame.f_code.co_filename for folder in ("site", "dist"))


def _place(frame: FrameType, line: int) -> str:
    return f"{frame.f_code.co_filename}:{line}, in {frame.f_code.co_name}"


def _class_place(cls: type[Pass]) -> str:
    """Of a pass whose rewrite ended and left a graph that does not hold together."""
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}, in {cls.__name__}"
    except (OSError, TypeError):  # typed into an interpreter
        return cls.__name__


def _node_in(frames: list[tuple[FrameType, int]]) -> Node | None:
    """The node that the code was looking at, innermost first: a local called ``node``, else any."""
    for frame, _ in reversed(frames):
        values = [frame.f_locals.get("node"), *frame.f_locals.values()]
        nodes = [value.node if isinstance(value, fx.Linear) else value for value in values]
        for node in nodes:
            if isinstance(node, Node):
                return node
    return None
