"""One block of a graph as lines, before and after, side by side.

The lines are those of `fxsparse.graph.readable`. Two lines are the same call if they stand in the same module and call
the same function; a call whose arguments differ, other than by the names of earlier results, is a changed one.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fxsparse.page.layers import block_of

SAME, CHANGED, INSERTED, REMOVED = "same", "changed", "inserted", "removed"
REPLACED = "replaced"  # removed on the left, and on the right what was inserted at its place
_LONGEST = 400  # lines of a block that are shown


@dataclass(frozen=True)
class Call:
    """A line of a graph.

    Attributes:
        path: the module that it came from.
        name: of its result.
        code: the call.
        type: of its result: dtype and sizes.
        reads: names of the results and inputs that it reads.
    """

    path: str
    name: str
    code: str
    type: str
    reads: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str]:
        """The module and the function that is called."""
        return self.path, self.code.partition("(")[0]

    @property
    def unnamed(self) -> str:
        """The call without the names of the results that it reads, which differ wherever one before it does."""
        return re.sub(r"\w+", lambda word: "_" if word[0] in self.reads else word[0], self.code)


@dataclass(frozen=True)
class Line:
    """A row of the two columns: a call before, after, or both; ``state`` is one of the words above."""

    state: str
    before: Call | None
    after: Call | None

    def style(self, side: str) -> str:
        """How the call of one column is marked."""
        if self.state == REPLACED:
            return REMOVED if side == "before" else INSERTED
        return self.state


def calls(text: str, function: str | None = None) -> list[Call]:
    """The calls in a graph's text, of the function of that name or the first."""
    found: list[Call] = []
    path = ""
    for line in _function(text, function):
        code, _, comment = line.partition("  # ")
        if line.lstrip().startswith("# "):
            path = re.split(r" {4,}", line.lstrip()[2:], maxsplit=1)[0]
            path = "" if path == "the model itself" else path
            continue
        name, equals, call = code.strip().partition(" = ")
        if not equals or not name.isidentifier():
            continue
        try:
            tree = ast.parse(call.strip(), mode="eval")
        except SyntaxError:
            continue
        found.append(Call(path, name, call.strip(), comment.strip(), _names(tree)))
    return found


def _names(tree: ast.AST) -> tuple[str, ...]:
    """The names in a call, without the roots of paths (``aten.add``, ``q_proj.weight``)."""
    nodes = list(ast.walk(tree))
    roots = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    return tuple(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name) and node not in roots))


def _function(text: str, name: str | None) -> list[str]:
    """The lines of a function in a text of several."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("def "):
            if inside:
                break
            inside = name is None or line.startswith(f"def {name}(")
        elif inside:
            lines.append(line)
    return lines


def side_by_side(before: Sequence[Call], after: Sequence[Call]) -> list[Line]:
    """The calls in two columns; what stands in one row is the same call, or one in the place of the other."""
    lines: list[Line] = []
    matcher = difflib.SequenceMatcher(None, [call.key for call in before], [call.key for call in after], autojunk=False)
    for _, low, high, first, last in matcher.get_opcodes():
        old, new = before[low:high], after[first:last]
        if [call.key for call in old] == [call.key for call in new]:
            for was, now in zip(old, new, strict=True):
                lines.append(Line(SAME if was.unnamed == now.unnamed else CHANGED, was, now))
        else:
            both = min(len(old), len(new))
            lines += [Line(REPLACED, was, now) for was, now in zip(old, new, strict=False)]
            lines += [Line(REMOVED, call, None) for call in old[both:]]
            lines += [Line(INSERTED, None, call) for call in new[both:]]
    return lines


def chosen_block(before: Sequence[Call], after: Sequence[Call]) -> str:
    """The block in which most calls differ, the first of several; empty if the model has none."""
    blocks = dict.fromkeys(filter(None, (block_of(call.path) for call in (*before, *after))))
    scores = {
        block: sum(line.state != SAME for line in side_by_side(inside(before, block), inside(after, block)))
        for block in blocks
    }
    return max(scores, key=scores.__getitem__, default="")


def inside(found: Sequence[Call], block: str) -> list[Call]:
    """The calls of a block, of the whole model if it has none; the first ones if there are too many to look at."""
    chosen = [call for call in found if not block or block_of(call.path) == block]
    return chosen[:_LONGEST]
