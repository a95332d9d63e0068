"""Recomputing blocks in the backward pass: activation checkpointing (arXiv 1604.06174) on the rewritten graph.

    forward     x -> block -> y         only x is kept
    backward    x -> block again, with the same dropout -> gradients

A model of n blocks then keeps n block inputs and, for one block at a time, what its operators need; a training step
costs one more forward pass of the blocks. A graph calls none of its model's modules, so what switches this on for
modules (``gradient_checkpointing_enable``) does not reach it; a model that was traced with it has the same marks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse.analysis.blocks import Block, stacks_and_unclear
from fxsparse.cost.flops import node_flops
from fxsparse.errors import RewriteError
from fxsparse.graph.recompute import is_marked, mark, plan
from fxsparse.graph.record import Change, rewrote, skipped
from fxsparse.options import Count
from fxsparse.passes.base import Pass
from fxsparse.text import quantity


@dataclass(frozen=True)
class Recompute(Pass):
    """Recomputes blocks of the model's stacks in the backward pass instead of keeping their activations.

    Gradients are those without it, bit for bit where operators are deterministic. It acts in training mode where
    gradients are recorded, under ``torch.compile`` too; evaluation is not touched. The graph stays as it is, so it may
    run before or after other passes.

    Attributes:
        every: 1 recomputes every block, 2 every second one, and so on, beginning with the first of each stack.

    Raises:
        OptionError: ``every`` is no positive whole number.
        RewriteError: the model has no stack of blocks.
    """

    name: ClassVar[str] = "recompute"
    every: Count = 1

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        every, unclear = stacks_and_unclear(graph)
        if not every and unclear:
            raise unclear[0].refusal(self.name)
        if not every:
            raise RewriteError(
                "the model has no stack of blocks: no list of modules whose members pass hidden states of one shape on",
                pass_name=self.name,
            )
        yield from (skipped(item.path, item.reason) for item in unclear)
        flops = node_flops(graph)
        for stack in every:
            for position, block in enumerate(stack.blocks):
                if position % self.every:
                    yield skipped(block.path, f"kept, one in {self.every} is recomputed")
                elif any(map(is_marked, block.nodes)):
                    yield skipped(block.path, "recomputed already")
                else:
                    yield _marked(graph, block, sum(flops.get(node, 0) for node in block.nodes))


def _marked(gm: GraphModule, block: Block, flops: int) -> Change:
    number = mark(gm.graph, block.nodes)
    region = next(region for region in plan(gm.graph) if region.number == number)
    if region.refusal:
        return skipped(block.path, f"cannot be recomputed: {region.refusal}")
    return rewrote(block.path, f"recomputed in the backward pass, up to {quantity(flops, 1000)} FLOPs a step")
