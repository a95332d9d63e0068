"""Which axes operators tie together, probed numerically: what goes from one axis of a group goes from all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse import graph as fx
from fxsparse.analysis.residual_streams import streams
from fxsparse.analysis.ties import ties
from fxsparse.passes import GateStructures, Materialize, Pipeline
from fxsparse.passes.structured.hard_concrete import mask_name

SIZE = 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(SIZE), nn.Linear(SIZE, 24), nn.Linear(24, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Between(nn.Module):
    """Blocks with something between a stem and them."""

    def __init__(self, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Linear(7, SIZE)
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(SIZE, 5)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.between(self.stem(x))))


def assert_narrows(model: nn.Module, example: Tensor) -> None:
    """The model with half of its hidden dimensions gated is the smaller one that comes of it."""
    gates = fxsparse.rewrite(model, [GateStructures(("hidden",), score="random", target=0.0)], (example,)).eval()
    with torch.no_grad():
        gates.get_buffer(mask_name("blocks.hidden_gate")).copy_((torch.arange(SIZE) % 3 > 0).float())
    small = Pipeline([Materialize()])(gates)
    assert small.get_parameter("head.weight").shape == (5, int((torch.arange(SIZE) % 3 > 0).sum()))
    torch.testing.assert_close(small(example), gates(example), rtol=1e-5, atol=1e-5)


class Activated(Between):
    def between(self, x: Tensor) -> Tensor:
        return F.hardswish(x) + F.relu6(x) - F.celu(x).sinh()


class Transposed(Between):
    def between(self, x: Tensor) -> Tensor:
        return x.mT.swapaxes(1, 2).movedim(2, 1).moveaxis(1, -1)


class Reshaped(Between):
    def between(self, x: Tensor) -> Tensor:
        return x.broadcast_to(x.shape).view_as(x).flatten(0, 1).reshape_as(x)


class Placed(Between):
    """Tokens stacked, padded, pooled and repeated."""

    def between(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x.square()], 1).flatten(1, 2)
        x = F.pad(x, (0, 0, 1, 2)).transpose(1, 2)
        return F.adaptive_avg_pool1d(x, 3).transpose(1, 2).repeat_interleave(2, dim=1)


class Summed(Between):
    """Products over indices, into a tensor of heads and out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(torch.randn(2, SIZE, 3)), nn.Parameter(torch.randn(SIZE, 2, 3))

    def between(self, x: Tensor) -> Tensor:
        heads = torch.einsum("bth,nhd->btnd", x, self.into)
        return x + torch.einsum("btnd,hnd->bth", heads.tanh(), self.out)


class Joined(Between):
    """The stream twice, side by side, under a norm and a linear, as patches are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.merge = nn.LayerNorm(2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def between(self, x: Tensor) -> Tensor:
        return x + self.merge(self.norm(torch.cat([x, x.square()], -1)))


@pytest.mark.parametrize("kind", [Activated, Transposed, Reshaped, Placed, Summed, Joined])
def test_operators_that_keep_hidden_dimensions_apart(kind: type[Between]) -> None:
    model = kind()
    gm = fxsparse.trace(model, (torch.randn(3, 4, 7),))
    found, left = streams(gm)
    assert len(found) == 1 and not left
    assert_narrows(model, torch.randn(3, 4, 7))


class Typed(Between):
    """Takes the dtype of a parameter whose axes have the size of the stream and are not part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(SIZE, SIZE)

    def between(self, x: Tensor) -> Tensor:
        return x.type_as(self.other.weight)


def test_a_dtype_that_is_lent_ties_nothing() -> None:
    gm = fxsparse.trace(Typed(), (torch.randn(3, 4, 7),))
    (conversion,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.type_as.default)
    assert all(node in (conversion, conversion.args[0]) for group in ties(conversion) for node, _ in group)
    (stream,), _ = streams(gm)
    assert all(node.target != "other.weight" for node in stream.nodes)


class Rolled(Between):
    def between(self, x: Tensor) -> Tensor:
        return x.roll(1)


def test_a_roll_over_all_elements_keeps_nothing_apart() -> None:
    gm = fxsparse.trace(Rolled(), (torch.randn(3, 4, 7),))
    found, (change,) = streams(gm)
    assert not found and "does not keep them apart" in change.detail


@pytest.mark.parametrize(
    ("stem", "shape"),
    [
        (nn.Conv3d(2, SIZE, 2, stride=2), (3, 2, 2, 4, 4)),
        (nn.Conv2d(2, SIZE, 3, padding="same"), (3, 2, 2, 3)),
        (nn.Conv1d(2, SIZE, 3, padding="same"), (3, 2, 5)),
        (nn.ConvTranspose1d(2, SIZE, 3), (3, 2, 5)),
    ],
    ids=lambda item: type(item).__name__,
)
def test_channels_of_convolutions(stem: nn.Module, shape: tuple[int, ...]) -> None:
    class Patches(Between):
        def between(self, x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

    if isinstance(stem, nn.ConvTranspose1d):  # its operator has no row: what it makes is refused
        found, (change,) = streams(fxsparse.trace(Patches(stem), (torch.randn(shape),)))
        assert not found and "conv_transpose1d" in change.detail
    else:
        assert_narrows(Patches(stem), torch.randn(shape))


class Turned(nn.Module):
    """A product with a weight that is transposed in one way or another."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.way, self.weight = way, nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.way(self.weight)


@pytest.mark.parametrize(
    "way",
    [lambda w: w.t(), lambda w: w.T, lambda w: w.mT, lambda w: w.movedim(0, 1), lambda w: w.swapaxes(1, 0),
     lambda w: w.permute(1, 0), lambda w: w.transpose(-1, 0)],
    ids=["t", "T", "mT", "movedim", "swapaxes", "permute", "transpose"],
)  # fmt: skip
def test_transposed_weights_make_linears(way: Any) -> None:
    model = Turned(way)
    (linear,) = fx.linears(fxsparse.trace(model, (torch.randn(3, 7),)))
    assert (linear.out_features, linear.in_features, linear.transposed) == (5, 7, False)
