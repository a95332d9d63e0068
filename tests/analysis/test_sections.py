"""Parts of a graph run at few positions, once for layers that are alike, and say what they say at the traced sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxsparse
from fxsparse import graph as fx
from fxsparse.analysis import heads as of_heads
from fxsparse.analysis import structures as of_structures
from fxsparse.analysis.probing import shape_of
from fxsparse.analysis.products import SDPA
from fxsparse.analysis.sections import KEY, Section
from fxsparse.analysis.structures import Structures, attentions, mlps, structures
from tests.support.families import FAMILIES
from tests.support.traced import traced


def plain(found: Structures) -> list[Any]:
    """What was found, without nodes."""
    return [
        (site.path, [(part.linear.name, part.index.tolist()) for part in (*site.projections, site.output)])
        for site in (*found.attentions, *found.mlps)
    ] + [str(change) for change in found.skipped]


class Counted:
    """Counts sections that are probed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for module, name in ((of_heads, "reached"), (of_heads, "changed"), (of_structures, "reached")):
            monkeypatch.setattr(module, name, self._noting(getattr(module, name)))

    def _noting(self, probe: Callable[..., Any]) -> Callable[..., Any]:
        def noting(section: Section, *args: Any) -> Any:
            (source, *_) = section.sources
            self.shapes.append((section.shape(source), shape_of(source)))
            return probe(section, *args)

        return noting


@pytest.mark.parametrize("name", FAMILIES)
def test_few_positions_say_what_the_traced_ones_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, gm = traced(name)
    gm.meta.pop(KEY, None)
    counted = Counted(monkeypatch)
    found = plain(structures(gm))
    assert found and counted.shapes
    for small, full in counted.shapes:
        assert small[-1] == full[-1] and small[:-1] != full[:-1], "a section was run at the traced sizes"
    gm.meta.pop(KEY)
    monkeypatch.setattr(Section, "positions", {})
    assert plain(structures(gm)) == found


def test_layers_that_are_alike_are_probed_once_and_the_answer_stays_with_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, gm = traced("opt")
    gm.meta.pop(KEY, None)
    counted = Counted(monkeypatch)
    found = plain(structures(gm))
    assert len({shape for _, shape in counted.shapes}) <= len(counted.shapes) < 3 * 4, "each of three layers was probed"
    before = len(counted.shapes)
    assert plain(structures(gm)) == found
    assert plain(structures(fx.copy_sharing_state(gm))) == found
    assert len(counted.shapes) == before


def test_rewrites_schedules_and_rungs_do_not_probe_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rewrite finds serves the next one, the events of a schedule, and every rung of a ladder."""
    family, gm = traced("opt")
    structures(gm)
    counted = Counted(monkeypatch)
    batch = family.make_batch()
    for passes, steps in (("gates{target=0.5}", 2), ("select-neurons{omission=0.5,rungs=2,multiple=4}", 4)):
        rewritten = fxsparse.rewrite(gm, passes)
        optimizer = torch.optim.SGD(rewritten.parameters(), lr=0.1)
        schedule = fxsparse.Schedule(rewritten, optimizer, total_steps=steps)
        for _ in range(steps):
            rewritten(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert not counted.shapes


class Attend(nn.Module):
    """Attention whose queries ``fn`` changes."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.qkv, self.out = fn, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(self.fn(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(self.fn(query), key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted tokens": lambda h: torch.cat([h[..., 1:, :], h[..., :1, :]], -2) + h,
    "summed tokens": lambda h: h.cumsum(-2),
    "rolled tokens": lambda h: h + h.roll(1, -2),
    "mean of tokens": lambda h: h - h.mean(-2, keepdim=True),
}


@pytest.mark.parametrize("name", MIXED)
def test_positions_that_are_mixed_are_not_taken_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fxsparse.trace(Attend(MIXED[name]), (torch.randn(3, 20, 16),))
    counted = Counted(monkeypatch)
    (found,) = attentions(gm)
    assert torch.equal(found.projections[0].index, torch.arange(16).view(4, 4))
    assert any(small == full for small, full in counted.shapes)


class Merged(nn.Module):
    """A projection of all tokens in a row, as Hugging Face's ``Conv1D`` has it, and sizes written down."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x.reshape(60, 16)).view(3, 20, 48).chunk(3, -1)
        query, key, value = (part.reshape(3, 20, 4, 4).permute(0, 2, 1, 3) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).reshape(60, 16)).view(3, 20, 16)


def test_positions_written_down_merged_and_parted() -> None:
    gm = fxsparse.trace(Merged(), (torch.randn(3, 20, 16),), dynamic_batch=False)
    (found,) = attentions(gm)
    (sdpa,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    linear, query = found.projections[0].linear, fx.arguments(sdpa)["query"]
    section = Section({linear.node: [0]}, [query], 8)
    assert (section.shape(linear.node), section.shape(query)) == ((8, 48), (2, 4, 4, 4))
    assert (shape_of(linear.node), shape_of(query)) == ((60, 48), (3, 4, 20, 4))
    assert torch.equal(found.projections[0].index, torch.arange(16).view(4, 4))
    assert torch.equal(found.output.index, torch.arange(16).view(4, 4))


class Rectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 512), nn.Linear(512, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x) - 1))


def test_channels_that_are_mostly_closed_are_still_hit() -> None:
    (found,) = mlps(fxsparse.trace(Rectified(), (torch.randn(3, 5, 16),)))
    assert torch.equal(found.projections[0].index, torch.arange(512)[:, None])


class Gated(nn.Module):
    """Gate and value side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 80), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


def rows(gm: GraphModule) -> list[list[int]]:
    (found,) = mlps(gm)
    index: list[list[int]] = found.projections[0].index.tolist()
    return index


def test_an_edit_of_the_graph_gives_another_answer() -> None:
    gm = fxsparse.trace(Gated(), (torch.randn(3, 5, 16),))
    before = rows(gm)
    copy = fx.copy_sharing_state(gm)
    (chunk,) = copy.graph.find_nodes(op="call_function", target=torch.ops.aten.chunk.default)
    parts = [user for user in chunk.users if user.target is operator.getitem]
    halves = [
        fx.insert_call(copy, torch.ops.aten.slice.Tensor, (chunk.args[0], -1, at, 80, 2), like=parts[-1])
        for at in (0, 1)
    ]
    for old, new in zip(parts, halves, strict=True):
        old.replace_all_uses_with(new)
    fx.eliminate_dead_code(copy)
    assert rows(copy) == torch.arange(80).view(40, 2).tolist()
    assert rows(gm) == before == torch.arange(80).view(2, 40).t().tolist()


class Chosen(nn.Module):
    """Heads in an order that a buffer says."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("order", torch.tensor([0, 1, 2, 3]))

    def forward(self, x: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        attended = F.scaled_dot_product_attention(heads[0].index_select(1, self.order), *heads[1:])
        return self.out(attended.transpose(1, 2).flatten(2))


def test_indices_that_are_written_in_place_give_another_answer() -> None:
    gm = fxsparse.trace(Chosen(), (torch.randn(3, 5, 16),))
    (first,) = attentions(gm)
    gm.get_buffer("order").copy_(torch.tensor([2, 0, 3, 1]))
    (second,) = attentions(gm)
    assert torch.equal(second.projections[0].index, first.projections[0].index[[2, 0, 3, 1]])
