"""LayerCHOP: dropping whole layers of a stack (CHOP, arXiv 2305.14864).

    x -> block i -> y     becomes     x = y

The paper drops half the layers at once, keeps the first and the last, and continues pretraining. It names five
configurations in a figure; for n layers of which r go, they are

    input     1 .. r
    output    n-1-r .. n-2
    middle    r in a row, centred
    both      ceil(r/2) after the first layer and floor(r/2) before the last
    max-gap   those that leave the survivors evenly spread: survivor i is layer round(i (n-1) / (n-r-1))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Interval, MinLen
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.blocks import Block, Stack, mark_alone, only_members, stacks_and_unclear
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.derived_buffers import weights_borrowed
from fxsparse.graph.record import Change, rewrote, skipped
from fxsparse.options import Count, FrozenMapping, Glob, Index
from fxsparse.passes.base import Pass

Configuration = Literal["max-gap", "input", "output", "middle", "both"]
CONFIGURATIONS = get_args(Configuration)
_Fraction = Annotated[float, Interval(gt=0, lt=1)]
_Indices = Annotated[tuple[Index, ...], MinLen(1)]
_SIZES = ("fraction", "count", "indices")


@dataclass(frozen=True)
class DropLayers(Pass):
    """Drops layers of the model's stacks; encoder and decoder are stacks of their own.

    Give one of ``fraction``, ``count`` and ``indices``, or none for a fraction of 0.5. Each may be a mapping from globs
    over the stacks' paths (``{"encoder.*": 0.5}``); a stack without a match stays whole.

    Attributes:
        configuration: which layers go if only their number is known.
        fraction: share of a stack's layers to drop, in (0, 1), rounded down to whole layers.
        count: number of layers of each stack to drop.
        indices: the layers to drop, by the number in their module path; the first and the last may be among them.

    If training continues with the same optimizer, `fxsparse.forget_dropped` removes the dropped parameters from it.

    Raises:
        OptionError: an option is out of range.
        RewriteError: there is no stack, a glob matches none, a layer does not exist or would be the last one left, or
            the graph returns a result of a dropped layer.
    """

    name: ClassVar[str] = "drop-layers"
    rest: ClassVar[str] = "stays, it is in no stack of layers"
    cannot_follow: ClassVar[tuple[str, ...]] = ("select-tensors", "distill", "multiplex")
    configuration: Configuration = "max-gap"
    fraction: _Fraction | Mapping[Glob, _Fraction] | None = None
    count: Count | Mapping[Glob, Count] | None = None
    indices: _Indices | Mapping[Glob, _Indices] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        options = [option for option in _SIZES if getattr(self, option) is not None]
        if len(options) > 1:
            raise OptionError(
                f"give one of fraction, count and indices, not {' and '.join(options)}", pass_name=self.name
            )
        if not options:
            object.__setattr__(self, "fraction", 0.5)
        if isinstance(self.indices, FrozenMapping):
            in_order = FrozenMapping((glob, tuple(sorted(set(numbers)))) for glob, numbers in self.indices)
            object.__setattr__(self, "indices", in_order)
        elif self.indices is not None:
            object.__setattr__(self, "indices", tuple(sorted(set(self.indices))))

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if weights_borrowed(graph):
            raise RewriteError(
                "a one-line call may see only a part of the layers at a time, and would drop others than asked; call "
                "fxsparse.rewrite(model, passes, ...) and compile its result",
                pass_name=self.name,
            )
        every, unclear = stacks_and_unclear(graph)
        if not every and unclear:
            raise unclear[0].refusal(self.name)
        if not every:
            alone = only_members(graph)
            if alone:
                raise RewriteError("is the only layer, and one must stay", pass_name=self.name, site=alone[0])
            raise RewriteError(
                "the model has no stack of layers: no list of modules whose members pass hidden states of one shape on",
                pass_name=self.name,
            )
        wanted = self._wanted(every)
        yield from (skipped(item.path, item.reason) for item in unclear)
        dropped = {stack.path: self._chosen(stack, *wanted[stack.path]) for stack in every if stack.path in wanted}
        for stack in every:
            gone = dropped.get(stack.path, ())
            for block in stack.blocks:
                if block in gone:
                    yield rewrote(block.path, f"dropped, {len(stack.blocks) - len(gone)} of {len(stack.blocks)} stay")
                else:
                    yield skipped(block.path, self._why_kept(stack, block, stack.path in wanted))
        for stack in every:
            _drop(graph, stack, dropped.get(stack.path, ()))

    def _wanted(self, every: list[Stack]) -> dict[str, tuple[str, Any]]:
        """The option and its value for each stack's path; the first glob that matches it counts."""
        (option,) = (option for option in _SIZES if getattr(self, option) is not None)
        value = getattr(self, option)
        if not isinstance(value, FrozenMapping):
            return {stack.path: (option, value) for stack in every}
        wanted: dict[str, tuple[str, Any]] = {}
        for glob, item in value:
            named = [stack.path for stack in every if fnmatchcase(stack.path, glob)]
            if not named:
                known = ", ".join(stack.path or '""' for stack in every)
                raise RewriteError(f"the glob {glob!r} matches no stack; there are: {known}", pass_name=self.name)
            for path in named:
                wanted.setdefault(path, (option, item))
        return wanted

    def _chosen(self, stack: Stack, option: str, value: Any) -> tuple[Block, ...]:
        layers = len(stack.blocks)
        if option == "indices":
            present = {block.index: block for block in stack.blocks}
            unknown = [number for number in value if number not in present]
            if unknown:
                left = f"its layers are {', '.join(map(str, present))}: name some of them with indices="
                if layers == 1:
                    left = f"its only layer is {stack.blocks[0].index}, which must stay: leave this pass out"
                raise RewriteError(
                    f"has no layer {', '.join(map(str, unknown))}; {left}",
                    pass_name=self.name,
                    site=stack.path,
                )
            if len(value) == layers:
                raise RewriteError(
                    f"all {layers} layers would be dropped; leave at least one", pass_name=self.name, site=stack.path
                )
            return tuple(present[number] for number in value)
        # A half of 7 layers is 3.5: a share is a bound, and 0.1 of 30 must not be 2 for rounding's sake.
        count = math.floor(value * layers + 1e-9) if option == "fraction" else value
        if count > layers - 2:
            raise RewriteError(
                f"{count} of {layers} layers cannot go: the first and the last are kept, so at most "
                f"{max(0, layers - 2)} can; name others with indices=",
                pass_name=self.name,
                site=stack.path,
            )
        return tuple(stack.blocks[position] for position in dropped_positions(self.configuration, layers, count))

    def _why_kept(self, stack: Stack, block: Block, is_wanted: bool) -> str:
        if not is_wanted:
            return "kept, no glob names its stack"
        if self.indices is not None:
            return "kept, not named"
        if block in (stack.blocks[0], stack.blocks[-1]):
            return "kept, the first and the last layer stay"
        return f"kept by {self.configuration}"


def dropped_positions(configuration: str, layers: int, count: int) -> list[int]:
    """The positions, from 0, of the layers that go: ``count`` of 1 .. layers - 2."""
    if configuration == "input":
        return list(range(1, 1 + count))
    if configuration == "output":
        return list(range(layers - 1 - count, layers - 1))
    if configuration == "middle":
        start = 1 + (layers - 2 - count) // 2
        return list(range(start, start + count))
    if configuration == "both":
        early, late = (count + 1) // 2, count // 2
        return [*range(1, 1 + early), *range(layers - 1 - late, layers - 1)]
    last = layers - count - 1  # of the survivors
    survivors = {(2 * i * (layers - 1) + last) // (2 * last) for i in range(last + 1)}
    return [position for position in range(layers) if position not in survivors]


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _drop(gm: GraphModule, stack: Stack, gone: Iterable[Block]) -> None:
    blocks = tuple(gone)
    for block in blocks:
        _check_not_returned(gm, stack, block)
    for block in reversed(blocks):
        block.stream_out.replace_all_uses_with(block.stream_in)
    for block in blocks:
        _erase_writes(gm, block)
    if len(blocks) == len(stack.blocks) - 1:
        (alone,) = (block for block in stack.blocks if block not in blocks)
        mark_alone(alone, stack.blocks[0].stream_in)
    if blocks:
        fx.eliminate_dead_code(gm)
        # State of the block that no graph reads (a mask of older models) goes with it.
        inside = {name for name in _state(gm) if any(name.startswith(f"{block.path}.") for block in blocks)}
        fx.delete_state(gm, inside - fx.state_read(gm))


def _state(gm: GraphModule) -> set[str]:
    parts = (gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
    return {name for part in parts for name, _ in part}


def _check_not_returned(gm: GraphModule, stack: Stack, block: Block) -> None:
    is_last = block is stack.blocks[-1]
    returned = [node for node in gm.graph.output_node().all_input_nodes if node in block.nodes]
    if any(node is not block.stream_out or not is_last for node in returned):
        raise RewriteError(
            "the model returns what this layer computes; trace it with use_cache=False, output_hidden_states=False and "
            "output_attentions=False",
            pass_name=DropLayers.name,
            site=block.path,
        )


def _erase_writes(gm: GraphModule, block: Block) -> None:
    """Removes the block's writes to its own buffers (a batch norm counts batches), which are kept otherwise."""
    for node in [node for node in reversed(gm.graph.nodes) if node in block.nodes]:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or node.users:
            continue
        written = node.args[0]
        is_state = isinstance(written, Node) and written.op == "get_attr"
        if is_state and all(user in block.nodes for user in written.users):
            gm.graph.erase_node(node)
