"""Stacks of blocks are found by dataflow, on every family, whatever their modules are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks, stacks_and_unclear
from fxsparse.errors import RewriteError
from fxsparse.graph.record import record_of
from tests.support.families import HIDDEN
from tests.support.traced import traced

LISTS = {
    "bert": {"bert.encoder.layer": 3},
    "opt": {"model.decoder.layers": 3},
    "gpt2": {"transformer.h": 2},
    "llama": {"model.layers": 3},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "vit": {"vit.layers": 2},
    "qwen2": {"model.layers": 2},
}


@pytest.mark.parametrize("name", LISTS)
def test_blocks_pass_one_stream_on(name: str) -> None:
    _, gm = traced(name)
    found = stacks(gm)
    assert {stack.path: len(stack.blocks) for stack in found} == LISTS[name]
    for stack in found:
        assert [block.index for block in stack.blocks] == list(range(len(stack.blocks)))
        assert [block.path for block in stack.blocks] == [f"{stack.path}.{block.index}" for block in stack.blocks]
        for block, following in zip(stack.blocks, stack.blocks[1:], strict=False):
            assert following.stream_in is block.stream_out
            assert not block.nodes & following.nodes
        for block in stack.blocks:
            assert block.stream_out in block.nodes and block.stream_in not in block.nodes
            assert fx.value(block.stream_out).shape[-1] == HIDDEN
            assert all(fx.stack_path(node).startswith(block.path) for node in block.nodes)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_sequential_of_identical_blocks_between_other_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), *(Block(16) for _ in range(4)), nn.LayerNorm(16), nn.Linear(16, 4))
    (stack,) = stacks(fxsparse.trace(model, (torch.randn(3, 5, 8),)))
    assert [block.path for block in stack.blocks] == ["1", "2", "3", "4"]
    assert stack.path == ""


def test_layers_that_change_the_width_are_no_stack() -> None:
    _, gm = traced("sequential")
    assert stacks(gm) == []


def test_parallel_members_are_no_stack() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([head(x) for head in self.heads])

    assert stacks(fxsparse.trace(Heads(), (torch.randn(3, 16),))) == []


class SkipBlock(Block):
    def forward(self, x: Tensor, start: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + start)


def test_an_input_that_every_block_reads_is_not_the_stream() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(16, 16)
            self.blocks = nn.ModuleList(SkipBlock(16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            start = self.read(x)
            hidden = start * 2
            for block in self.blocks:
                hidden = block(hidden, start)
            return hidden

    gm = fxsparse.trace(Skips(), (torch.randn(3, 16),))
    (stack,) = stacks(gm)
    assert len(stack.blocks) == 3
    assert stack.blocks[0].stream_in.target is torch.ops.aten.mul.Tensor


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + self.f(b)
        return a, b + self.g(a)


def test_two_streams_are_refused() -> None:
    class Reversibles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Reversible() for _ in range(3))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            for block in self.blocks:
                a, b = block(a, b)
            return a + b

    gm = fxsparse.trace(Reversibles(), (torch.randn(3, 16), torch.randn(3, 16)))
    found, (unclear,) = stacks_and_unclear(gm)
    assert found == [] and unclear.path == "blocks.0" and "more than one stream" in unclear.reason
    for passes in ("drop-layers{indices=[1]}", "recompute", "multiplex"):
        with pytest.raises(RewriteError, match=r"blocks\.0: .*more than one stream"):
            fxsparse.rewrite(gm, passes)
    sparse = fxsparse.rewrite(gm, "nm-masks{keep_first=false,keep_head=false}")
    assert len(record_of(sparse).entries[-1].rewritten) == 6


class _BlockOnSide(nn.Module):
    """A block that adds what an input of its own gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.gate = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x)) * torch.sigmoid(self.gate(side))


class _Sided(nn.Module):
    """A stream, and for each block an input of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(16, 16)
        self.sides = nn.Linear(16, 3 * 16)
        self.blocks = nn.ModuleList(_BlockOnSide() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        sides = self.sides(x).unflatten(-1, (3, 16))
        hidden = self.read(x).tanh()
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, sides[:, i])
        return hidden


def test_an_input_of_each_block_is_no_stream() -> None:
    model, x = _Sided(), torch.randn(5, 16)
    gm = fxsparse.trace(model, (x,))
    (stack,) = stacks(gm)
    assert stack.blocks[0].stream_in.target is torch.ops.aten.tanh.default
    model.blocks[1].mlp.weight.data.zero_(), model.blocks[1].mlp.bias.data.zero_()
    torch.testing.assert_close(fxsparse.rewrite(gm, "drop-layers{indices=[1]}")(x), model(x))
