"""SLoPe's ablation against its formulas, written element by element."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.ops.pruned_operands import pruned_operand_linear as linear
from fxsparse.passes import PruneOperands
from tests.support.traced import traced


def kept(rows: Tensor, n: int, m: int) -> Tensor:
    """``rows [lines, length]`` with the n largest of every m; the last group of a line may be shorter."""
    result = torch.zeros_like(rows)
    for line in range(rows.shape[0]):
        for start in range(0, rows.shape[1], m):
            group = rows[line, start : start + m]
            for place in group.abs().sort(descending=True, stable=True).indices[:n]:
                result[line, start + place] = group[place]
    return result


class Oracle(torch.autograd.Function):
    """x W^T as SLoPe's ablation computes and derives it, on tokens ``[tokens, features]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, n: int, m: int, matrix: str) -> Tensor:
        used = kept(x, n, m) if matrix == "inputs" else x
        ctx.save_for_backward(used, weight)
        ctx.options = n, m, matrix
        return used @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, weight), (n, m, matrix), dy = ctx.saved_tensors, ctx.options, grads[0]
        if matrix == "inputs":
            return (dy @ weight) * (x != 0), dy.t() @ kept(x.t(), n, m).t(), None, None, None
        return kept(dy, n, m) @ weight, kept(dy.t(), n, m) @ x, None, None, None


@pytest.mark.parametrize("leading", [(8,), (3, 5), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("matrix", ["inputs", "gradients"])
def test_values_and_gradients(matrix: str, pattern: tuple[int, int], leading: tuple[int, ...]) -> None:
    """Numbers of tokens that m divides and that it does not."""
    x, weight, bias = torch.randn(*leading, 12), torch.randn(24, 12), torch.randn(24)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y = linear(x, weight, bias, *pattern, matrix)
    expected = Oracle.apply(x.flatten(0, -2), weight, *pattern, matrix).view(*leading, 24) + bias
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (x, weight, bias), dy))


@pytest.mark.parametrize("matrix", ["inputs", "gradients"])
def test_the_operator_is_a_good_citizen(matrix: str) -> None:
    args = (torch.randn(3, 5, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True), torch.randn(16), 2, 4)
    torch.library.opcheck(torch.ops.fxsparse.pruned_operand_linear.default, (*args, matrix))
    x, weight, dy = args[0].detach(), args[1].detach(), torch.randn(3, 5, 16)
    for op, operands in (
        (torch.ops.fxsparse.pruned_operand_linear_grad_input.default, (dy, x, weight)),
        (torch.ops.fxsparse.pruned_operand_linear_grad_weight.default, (dy, x)),
    ):
        torch.library.opcheck(op, (*operands, 2, 4, matrix))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*args, matrix).dtype is torch.bfloat16
    with pytest.raises(RewriteError, match="none of inputs, gradients"):
        linear(*args, "weights")
    with pytest.raises(RewriteError, match="not a multiple of 3"):
        linear(*args[:3], 1, 3, matrix)


class OracleLinear(nn.Module):
    def __init__(self, module: nn.Module, matrix: str):
        super().__init__()
        self.weight, self.bias, self.matrix = module.weight, module.bias, matrix
        self.transposed = type(module).__name__ == "Conv1D"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        y = Oracle.apply(x.flatten(0, -2), weight, 2, 4, self.matrix).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("matrix", ["inputs", "gradients"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_train_as_the_method_says(name: str, matrix: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, [PruneOperands(matrix)]).eval()
    sites = [change.site for change in record_of(gm).entries[0].rewritten]
    assert len(sites) == {"gpt2": 7, "bert": 16}[name]
    oracle = copy.deepcopy(family.model).eval()
    for site in sites:
        oracle.set_submodule(site, OracleLinear(oracle.get_submodule(site), matrix))
    batch = family.make_batch(batch=3)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager"})
    grads = []
    for module in (oracle, gm, compiled):
        module.zero_grad()
        module(**batch).loss.backward()
        parameters = (gm if module is compiled else module).named_parameters()
        grads.append({key.replace(".module.", "."): value.grad for key, value in parameters if value.grad is not None})
    for got in grads[1:]:
        assert got.keys() == grads[0].keys()
        for key, grad in got.items():
            torch.testing.assert_close(grad, grads[0][key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: key + text)
    dense = family.model.eval()
    dense.zero_grad()
    loss = dense(**batch).loss
    loss.backward()
    assert any(not torch.allclose(p.grad, grads[0][k], rtol=1e-3) for k, p in dense.named_parameters() if k in grads[0])


def test_other_batch_sizes_run_compiled_once() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    gm = fxsparse.rewrite(model, "prune-operands{matrix=gradients}", (torch.randn(3, 8),))
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "aot_eager"}, dynamic=True)
    for batch in (3, 6, 7):
        x = torch.randn(batch, 8)
        grads = []
        for module in (gm, compiled):
            gm.zero_grad()
            module(x).square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in gm.parameters()])
        torch.testing.assert_close(*grads)
    assert len(record_of(gm).entries[0].rewritten) == 1


def test_what_is_left_alone_and_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 8))
    x = torch.randn(3, 8)
    gm = fxsparse.rewrite(model, [PruneOperands("gradients", keep_head=False)], (x,))
    details = {change.site: change.detail for change in record_of(gm).entries[0].changes}
    assert details["4"] == "gradients 2:4"
    assert details["2"] == "left alone, 6 features, not a multiple of 4" and "first linear" in details["0"]
    assert gm.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(OptionError, match="must be one of inputs, gradients"):
        PruneOperands("weights")
    with pytest.raises(RewriteError, match="'nothing' matches no linear"):
        fxsparse.rewrite(model, [PruneOperands(exclude="nothing")], (x,))
    again = fxsparse.replay(record_of(gm), copy.deepcopy(model), (x,))
    torch.testing.assert_close(again(x), gm(x))


def test_what_other_passes_added_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    passes = 'low-rank{rank=4,start=0.0,layers=["2"]},prune-operands{keep_first=false,keep_head=false}'
    gm = fxsparse.rewrite(model, passes, (torch.randn(3, 8),))
    entry = record_of(gm).entries[1]
    assert {change.site for change in entry.rewritten} == {"0", "2", "4"} and len(entry.rewritten) == 3
    assert all("of the low-rank branch of 2" in change.detail for change in entry.skipped) and len(entry.skipped) == 2
