"""Gradients of inputs from a kept transpose of W^{R,C}: the operator follows its weight, and a pin lets it be used."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.backend.options import BackendOptions
from fxsparse.codegen import kept_transpose
from fxsparse.codegen.kept_transpose import nm_linear_grad_input_kept
from fxsparse.lowering.after_partition import keep_transposes
from fxsparse.lowering.choose import GRAD_INPUT
from fxsparse.ops import define
from fxsparse.ops.nm import Pattern, double_prune_mask, nm_mask, pack, pack_column_mask
from fxsparse.ops.nm_linear import nm_linear_grad_input
from fxsparse.ops.operator import SPARSE_TENSOR_CORES

PATTERN = Pattern(2, 4)
ASK = {"lower": {GRAD_INPUT: SPARSE_TENSOR_CORES}}


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.randn(rows, columns).to(dtype)
    mask = nm_mask(dense.abs(), PATTERN)
    values, indices = pack(dense, mask, PATTERN)
    return values, indices, pack_column_mask(double_prune_mask(dense, mask, PATTERN), mask, PATTERN)


def check(dy: Tensor, values: Tensor, indices: Tensor, columns: Tensor) -> None:
    expected = nm_linear_grad_input.reference(dy, values, indices, columns, 2, 4)
    torch.testing.assert_close(nm_linear_grad_input_kept(dy, values, indices, columns), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rows", "columns", "leading"), [(48, 64, (5,)), (16, 32, (2, 3)), (32, 16, (0,))])
def test_it_equals_the_reference_and_follows_the_weight(rows: int, columns: int, leading: tuple[int, ...]) -> None:
    values, indices, column_mask = weight(rows, columns)
    dy = torch.randn(*leading, rows).bfloat16()
    torch.library.opcheck(nm_linear_grad_input_kept, (dy, values, indices, column_mask))
    check(dy, values, indices, column_mask)
    kept = kept_transpose.kept_transpose(values, indices, column_mask)
    values.copy_(torch.randn_like(values))  # an optimizer step
    check(dy, values, indices, column_mask)
    assert kept_transpose.kept_transpose(values, indices, column_mask) is kept
    _, other, other_mask = weight(rows, columns)  # another mask, in place
    indices.copy_(other)
    column_mask.copy_(other_mask)
    check(dy, values, indices, column_mask)
    assert kept_transpose.kept_transpose(values, indices, column_mask) is not kept


def test_what_is_gone_is_forgotten() -> None:
    dy = torch.randn(3, 32).bfloat16()
    gc.collect()
    for _ in range(20):  # new weights may lie where old ones did
        check(dy, *weight(32, 48))
    gc.collect()
    check(dy, *weight(32, 64))
    assert sum(kept.is_alive for kept in kept_transpose._kept.values()) <= 1
    assert len(kept_transpose._kept) <= 2


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse tensor cores, which a CPU plays in plain torch."""
    monkeypatch.setattr(define, "_kernels", define._kernels | {("sparse_tensor_core_linear", "cpu")})


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 48), nn.Linear(48, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def sparse(passes: str) -> torch.fx.GraphModule:
    return fxsparse.rewrite(Layers().bfloat16(), passes, (torch.randn(6, 32).bfloat16(),))


def backward_graph(passes: str) -> torch.fx.Graph:
    """What AOTAutograd makes of a training step."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm)

    model = torch.compile(sparse(passes), backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    model(torch.randn(6, 32).bfloat16()).sum().backward()
    return graphs[-1].graph


def test_only_where_it_was_asked_for_and_can_run(on_cpu: None) -> None:
    doubly = "nm-masks{pattern=2:4,keep_first=false},double-prune"
    graph = backward_graph(doubly)
    assert keep_transposes(graph, BackendOptions.parse({}).pins) == 0
    assert keep_transposes(graph, BackendOptions.parse(ASK).pins) == 1  # nobody asks for the first one's
    assert not graph.find_nodes(op="call_function", target=torch.ops.fxsparse.nm_linear_grad_input.default)
    once_pruned = "nm-masks{pattern=2:4,keep_first=false}"
    assert keep_transposes(backward_graph(once_pruned), BackendOptions.parse(ASK).pins) == 0
    one_of_four = "nm-masks{pattern=1:4,keep_first=false},double-prune"
    assert keep_transposes(backward_graph(one_of_four), BackendOptions.parse(ASK).pins) == 0


@pytest.mark.inductor
def test_a_compiled_step_uses_it_and_says_so(on_cpu: None) -> None:
    gm = sparse("nm-masks{pattern=2:4,keep_first=false},double-prune")
    kept_transpose._kept.clear()
    compiled = torch.compile(gm, backend="fxsparse", options=ASK)
    x = torch.randn(6, 32).bfloat16()
    for _ in range(2):
        gm.zero_grad()
        gm(x).float().square().sum().backward()
        expected = [parameter.grad.clone() for parameter in gm.parameters()]
        gm.zero_grad()
        compiled(x).float().square().sum().backward()
        for parameter, gradient in zip(gm.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=5e-2, atol=5e-2)
        with torch.no_grad():
            for parameter in gm.parameters():
                parameter.mul_(0.5)
    assert len(kept_transpose._kept) == 1
    shown = str(fxsparse.explain(compiled))
    assert GRAD_INPUT in shown and "pinned by options" in shown
