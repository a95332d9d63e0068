"""Sizes that calls write down follow what goes from their operands, at every place a size can stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxsparse
from fxsparse import graph as fx
from fxsparse.analysis.axes import Mixed, losses, losses_of_unit
from fxsparse.graph.resize import CannotResize, DoesNotFit, patches_for, resize

aten = torch.ops.aten


class Between(nn.Module):
    """A projection to 4 heads of 8, and something after it."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.project = fn, nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.project(x))


def traced(fn: Callable[[Tensor], Tensor]) -> tuple[GraphModule, Node, Node]:
    gm = fxsparse.trace(Between(fn), (torch.randn(3, 5, 16),))
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    result = gm.graph.output_node().all_input_nodes[0]
    return gm, linear, result


def narrowed(gm: GraphModule, linear: Node, target: Node, kept: Tensor) -> None:
    """Takes rows of the projection away and lets all follow."""
    gone = (~kept).nonzero().flatten()
    lost = losses({linear: gone}, [target])
    weight, bias = linear.args[1], linear.args[2]
    for read in (weight, bias):
        assert isinstance(read, Node)
        old = gm.get_parameter(str(read.target))
        fx.set_parameter(gm, str(read.target), old.detach()[kept])
        read.meta["val"] = fx.fake_mode(gm).from_tensor(old.detach()[kept], static_shapes=True)
    resize(gm, patches_for(lost), [weight, bias])
    gm.recompile()


HEADS = torch.tensor([True, False, True, True]).repeat_interleave(8)


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: y.view(y.shape[0], y.shape[1], 4, 8).transpose(1, 2),
        lambda y: y.reshape(y.shape[0], -1, 4, 8).flatten(2),
        lambda y: y.unflatten(-1, (4, 8)).movedim(2, 1),
        lambda y: y.unflatten(2, (4, -1))[:, :, :, None].expand(-1, -1, 4, 3, 8),
        lambda y: torch.cat([y.unflatten(-1, (4, 8)).softmax(-1), y.unflatten(-1, (4, 8))], -1),
        lambda y: nn.functional.layer_norm(y.unflatten(-1, (4, 8)), (8,)).transpose(1, 2),
        lambda y: torch.where(y > 0, y, 0.0).view(-1, 4, 8),
        lambda y: torch.cat([y.unflatten(-1, (4, 8)), y.unflatten(-1, (4, 8))[..., 8:]], -1),  # of no elements
    ],
    ids=["view", "reshape", "unflatten", "expand", "softmax", "norm", "where", "empty"],
)
def test_heads_that_go_leave_the_others(fn: Callable[[Tensor], Tensor]) -> None:
    gm, linear, result = traced(fn)
    x = torch.randn(2, 5, 16)
    whole = gm(x)
    narrowed(gm, linear, result, HEADS)
    small = gm(x)
    (axis,) = (at for at, (a, b) in enumerate(zip(whole.shape, small.shape, strict=True)) if a != b)
    kept = HEADS if whole.shape[axis] == 32 else HEADS[::8]
    torch.testing.assert_close(small, whole.index_select(axis, kept.nonzero().flatten()))


@pytest.mark.parametrize(
    ("fn", "parts"),
    [
        (lambda y: y[..., :16], [(0, 16)]),
        (lambda y: y[..., 8:], [(8, 32)]),
        (lambda y: y[..., -16:-8], [(16, 24)]),
        (lambda y: y.narrow(-1, 16, 16), [(16, 32)]),
        (lambda y: torch.cat(y.split([8, 24], -1)[::-1], -1), [(8, 32), (0, 8)]),
        (lambda y: torch.cat(aten.split.sizes(y, [24, 8], -1)[::-1], -1), [(24, 32), (0, 24)]),
        (lambda y: torch.cat(y.split([8, 24], 2), 2), [(0, 8), (8, 32)]),
    ],
    ids=["begin", "end", "negative", "narrow", "split", "split.sizes", "split_by_position"],
)
def test_slices_move(fn: Callable[[Tensor], Tensor], parts: list[tuple[int, int]]) -> None:
    gm, linear, result = traced(fn)
    x = torch.randn(2, 5, 16)
    whole = nn.functional.linear(x, gm.get_parameter("project.weight"), gm.get_parameter("project.bias"))
    kept = torch.rand(32) < 0.6
    narrowed(gm, linear, result, kept)
    expected = torch.cat([whole[..., low:high][..., kept[low:high]] for low, high in parts], -1)
    torch.testing.assert_close(gm(x), expected)


def test_equal_pieces_stay_equal_or_are_refused() -> None:
    gm, linear, result = traced(lambda y: y.split(16, -1)[0] * y.split(16, -1)[1])
    kept = (torch.rand(16) < 0.6).repeat(2)
    x = torch.randn(2, 5, 16)
    whole = gm(x)
    uneven = kept.clone()
    uneven[16:] = True
    uneven[0] = False
    with pytest.raises(CannotResize, match="splits units unevenly"):
        patches_for(losses({linear: (~uneven).nonzero().flatten()}, [result]))
    narrowed(gm, linear, result, kept)
    torch.testing.assert_close(gm(x), whole[..., kept[:16]])


def test_every_second_position_stays_every_second_one() -> None:
    gm, linear, result = traced(lambda y: y[..., ::2].relu() * y[..., 1::2])
    kept = (torch.rand(16) < 0.6).repeat_interleave(2)
    x = torch.randn(2, 5, 16)
    whole = gm(x)
    narrowed(gm, linear, result, kept)
    torch.testing.assert_close(gm(x), whole[..., kept[::2]])
    gm, linear, result = traced(lambda y: y[..., 16::2])
    with pytest.raises(CannotResize, match="takes every 2th position of a part"):
        patches_for(losses({linear: torch.tensor([0, 1])}, [result]))


def test_a_constant_that_does_not_follow_is_named() -> None:
    gm, linear, result = traced(lambda y: y * torch.ones(32))
    with pytest.raises(DoesNotFit, match="mul"):
        narrowed(gm, linear, result, HEADS)


def test_no_batch_size_is_assumed() -> None:
    gm, linear, result = traced(lambda y: y.reshape(-1, 32).unflatten(0, (y.shape[0], 5)) + 1)
    narrowed(gm, linear, result, HEADS)
    for batch in (1, 2, 7):
        assert gm(torch.randn(batch, 5, 16)).shape == (batch, 5, 24)


def test_units_that_are_mixed_cannot_go_one_by_one() -> None:
    for fn in (lambda y: y.softmax(-1), lambda y: y.unflatten(-1, (8, 4)).relu().flatten(2)):
        _, linear, result = traced(fn)
        with pytest.raises(Mixed, match="mixes units"):
            losses_of_unit({linear: torch.tensor([0])}, [result], 5)


def test_what_one_unit_loses_counts_for_all_like_it() -> None:
    _, linear, result = traced(lambda y: y.view(y.shape[0], 5, 4, 8).transpose(1, 2))
    lost = losses_of_unit({linear: torch.arange(8, 16)}, [result], 2)
    assert lost[result][0][1].tolist() == [0, 2, 0, 0]
    (view,) = (node for node in lost if node.target is aten.view.default)
    (patch,) = patches_for(lost)[view].values()
    assert patch[2:] == [2, 8]


def test_arguments_that_are_named_are_written_by_name() -> None:
    gm, linear, result = traced(lambda y: torch.relu(y))
    with gm.graph.inserting_before(gm.graph.output_node()):
        part = gm.graph.call_function(aten.slice.Tensor, (result,), {"dim": -1, "end": 16})
    fx.refresh(gm, part)
    gm.graph.output_node().replace_input_with(result, part)
    narrowed(gm, linear, part, HEADS)
    assert part.kwargs == {"dim": -1, "end": 8} and gm(torch.randn(2, 5, 16)).shape == (2, 5, 8)
